"""Compare every method of the paper with the exact optimum, on the same worlds, budgets and loop.

    python toy/compare.py            # the committed numbers: 15 to 25 minutes on two cores; resumes where it stopped
    python toy/compare.py --quick    # the same path with tiny budgets, for a look or a test

Each method's step size and strength are chosen by one declared sweep on one seed; then it runs on five other seeds. All
see equal numbers of sampled chains. --out gets compare.json, compare.md and three figures.
"""

import hashlib
import json
import math
import multiprocessing
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file is run as a script

import d3po
from toy import baselines, optimum, plots, runs
from toy.align import Losses, align, by_pairs
from toy.ddpm import MLP, Adapter, data_variance, pretrain
from toy.measure import measure, sample
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES

SWEEP_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
STEP_SIZES = {True: (3e-4, 1e-3, 3e-3), False: (1e-3, 3e-3, 1e-2)}  # by each_step: an update a step, or a chain
CLIP = 0.1  # the released code's


class Method(NamedTuple):
    """How one line of the comparison trains. `losses(strength, reference)` gives the losses that `align` takes."""

    losses: Callable[[float, d3po.Denoiser], Losses]
    each_step: bool  # update at every step, or once after all of them
    strength: str  # what the strength parameter is
    strengths: tuple[float, ...]  # its values in the sweep
    moving: bool = False  # the reference is the policy that sampled
    replay: int = 0  # batches of stored pairs that an epoch adds
    redrawn: bool = False  # these on chains drawn anew
    labels_only: bool = True  # sees preferences, not scores


def preferences(function, **options) -> Callable[[float, d3po.Denoiser], Losses]:
    """A loss of d3po.py whose strength is its beta."""
    return lambda beta, reference: by_pairs(function, beta, **options)


def by_scores(function) -> Callable[[float, d3po.Denoiser], Losses]:
    """A loss of baselines.py that needs the scores and no reference."""

    def losses(strength, reference):
        return lambda policy, schedule, seen: function(policy, schedule, seen.chains, seen.scores.flatten(), strength)

    return losses


def dpok(beta, reference) -> Losses:
    return lambda policy, schedule, seen: baselines.dpok_losses(
        policy, reference, schedule, seen.chains, seen.scores.flatten(), beta
    )


def preferred(kl_weight, reference) -> Losses:
    return lambda policy, schedule, seen: baselines.preferred_losses(
        policy, reference, schedule, seen.chains, d3po.pairs_from_feedback(seen.h), kl_weight
    )


def diffusion_dpo(beta, reference) -> Losses:
    return lambda policy, schedule, seen: baselines.diffusion_dpo_losses(
        policy, reference, schedule, seen.chains, d3po.pairs_from_feedback(seen.h), beta
    )


eq14, eq12, chain = d3po.d3po_losses, partial(d3po.d3po_losses, steps=[0]), d3po.chain_dpo_losses
BETAS = (0.1, 0.2, 0.3, 0.6)
METHODS = {
    "whole chain, redrawn pairs": Method(preferences(chain), False, "beta", BETAS, replay=7, redrawn=True),
    "whole chain, stored pairs": Method(preferences(chain), False, "beta", BETAS, replay=3),
    "whole chain (Eq. 5)": Method(preferences(chain), False, "beta", BETAS),
    "whole chain, moving reference": Method(preferences(chain), False, "beta", BETAS, moving=True),
    "Eq. 14 (D3PO)": Method(preferences(eq14), True, "beta", BETAS),
    "Eq. 14, moving reference": Method(preferences(eq14), True, "beta", BETAS, moving=True),
    "Eq. 14, released clamp": Method(preferences(eq14, clip=CLIP), True, "beta", BETAS),
    "Eq. 12": Method(preferences(eq12), True, "beta", BETAS),
    "Eq. 12, moving reference": Method(preferences(eq12), True, "beta", BETAS, moving=True),
    "Diffusion-DPO": Method(diffusion_dpo, True, "beta", (1.0, 10.0, 100.0, 1000.0)),
    "preferred samples (SFT)": Method(preferred, True, "KL weight", (0.0, 0.1, 0.3, 1.0)),
    "DDPO": Method(by_scores(baselines.ddpo_losses), True, "clip", (0.001, 0.01, 0.1, 0.3), labels_only=False),
    "DPOK": Method(dpok, False, "beta", BETAS, labels_only=False),
    "Reward Weighted": Method(
        by_scores(baselines.reward_weighted_losses), True, "temperature", (0.3, 1.0, 3.0, 10.0), labels_only=False
    ),
}


class Job(NamedTuple):
    """One training run. Its result is kept under a name that all of this decides: a second start does not repeat it."""

    method: str
    lr: float
    strength: float
    seed: int
    settings: tuple  # of the comparison: (name, value) pairs


def parse(argv: list[str] | None) -> Namespace:
    parser = runs.Parser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("--mixture", choices=MIXTURES, default="ring", help="the data")
    parser.add_argument("--preference", choices=SCORES, default="reach", help="the score")
    parser.add_argument("--beta", type=float, default=0.3, help="strength of the KL in J, score per nat")
    parser.add_argument("--num-steps", type=int, default=20, help="T, denoising steps")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=128, help="pairs of chains, and labels, an epoch")
    args = parse_budget(parser, argv)
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: give 1 or more")
    if not 0 < args.beta < math.inf:
        parser.error(f"--beta {args.beta}: give a positive number")
    try:
        d3po.make_schedule(ALPHA_BARS, args.num_steps)
    except ValueError as error:
        parser.error(str(error))
    return args


def parse_budget(parser: runs.Parser, argv: list[str] | None) -> Namespace:
    """Add the flags that compare.py and limits.py share; parse, check, and make the folders."""
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="tiny budgets, one setting and one seed a method")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="results of single runs, for a resume")
    parser.add_argument("--out", type=Path, help="default toy/results, with --quick the --work folder")
    args = parser.parse_args(argv)
    for name in ("pairs", "processes"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    args.pretrain_steps = 8000
    if args.quick:
        args.epochs, args.pairs, args.pretrain_steps = 3, 16, 300
    args.out = args.out or (args.work if args.quick else runs.ROOT / "toy" / "results")
    try:
        for folder in (args.work, args.out):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{folder} cannot be written ({error.strerror}): choose another --work or --out")
    return args


def run_all(title: str, function: Callable, jobs: list, args: Namespace) -> list:
    """Map a function over jobs in parallel processes, with a progress bar; finished jobs are not repeated."""
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        results = pool.imap(partial(function, work=args.work), jobs)
        return list(tqdm(results, title, len(jobs), unit=" runs", mininterval=0.5))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    names = ("mixture", "preference", "beta", "num_steps", "epochs", "pairs", "pretrain_steps")
    settings = (*((name, getattr(args, name)) for name in names), ("average", True))  # of weights, as align says
    print(
        f"{len(METHODS)} methods on the {args.mixture}, preference {args.preference}, beta {args.beta:g}: "
        f"{args.epochs * args.pairs:,} labels each.\nSingle runs are kept in {args.work}, the results in {args.out}."
    )

    seeds, tried = (SEEDS[:1], slice(1, 2)) if args.quick else (SEEDS, slice(None))
    run_all("references", prepare, [(seed, settings) for seed in (SWEEP_SEED, *seeds)], args)
    grid = [
        Job(name, lr, strength, SWEEP_SEED, settings)
        for name, method in METHODS.items()
        for lr in STEP_SIZES[method.each_step][tried]
        for strength in method.strengths[tried]
    ]
    sweep = [row | job._asdict() for job, row in zip(grid, run_all("sweep", train, grid, args), strict=True)]
    best = {name: max((r for r in sweep if r["method"] == name), key=final_share) for name in METHODS}
    finals = [Job(name, best[name]["lr"], best[name]["strength"], seed, settings) for name in METHODS for seed in seeds]
    rows = [row | job._asdict() for job, row in zip(finals, run_all("seeds", train, finals, args), strict=True)]

    reference, _ = load(seeds[0], settings, args.work)
    schedule, score = d3po.make_schedule(ALPHA_BARS, args.num_steps), SCORES[args.preference]
    betas = sorted({args.beta, 2.0} if args.quick else {args.beta, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0})
    exact = {beta: optimum.solve(reference, schedule, score, beta) for beta in tqdm(betas, "frontier")}
    frontier = [{"beta": beta, **best.numbers()} for beta, best in exact.items()]

    result = {
        "command": "python toy/compare.py" + (" --quick" if args.quick else ""),
        "settings": dict(settings), "sweep_seed": SWEEP_SEED, "seeds": seeds, "frontier": frontier,
        "methods": {name: summary(name, [r for r in rows if r["method"] == name], sweep) for name in METHODS},
    }  # fmt: skip
    runs.save_json(args.out / "compare.json", rounded(result))
    (args.out / "compare.md").write_text(table(result))
    print(table(result))
    points = {name: next(r["points"] for r in rows if r["method"] == name) for name in METHODS}
    x_T = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    chains = optimum.sample_optimum(reference, schedule, score, args.beta, exact[args.beta], x_T)
    points["exact optimum"] = chains[-1].tolist()
    for path in plots.draw_comparison(result, points, args.out):
        print(path)


def prepare(seed_and_settings: tuple, work: Path) -> None:
    """Train a seed's reference and solve for its optimum, once; `load` reads them."""
    seed, settings = seed_and_settings
    path = place(work, "reference", seed_and_settings)
    if path.exists():
        return
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    world = dict(settings)
    reference = pretrain(MIXTURES[world["mixture"]], world["pretrain_steps"], progress=False)
    schedule = d3po.make_schedule(ALPHA_BARS, world["num_steps"])
    exact = optimum.solve(reference, schedule, SCORES[world["preference"]], world["beta"])
    runs.save_tensors(path, {"weights": reference.state_dict(), "optimum": exact.numbers()})


def load(seed: int, settings: tuple, work: Path) -> tuple[MLP, dict]:
    """A seed's reference and the numbers of its optimum."""
    stored = torch.load(place(work, "reference", (seed, settings)))
    reference = MLP(data_variance(MIXTURES[dict(settings)["mixture"]]))
    reference.load_state_dict(stored["weights"])
    return reference.requires_grad_(False), stored["optimum"]


def place(work: Path, kind: str, what: tuple) -> Path:
    """The file that keeps the result of a piece of work."""
    return work / f"{kind}_{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"


def train(job: Job, work: Path) -> dict:
    """Run one job, or read its result: the curve of what `measure` says, and some last points. Sweeps have the end."""
    path = place(work, "run", job)
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    world, method = dict(job.settings), METHODS[job.method]
    mixture, score, beta = MIXTURES[world["mixture"]], SCORES[world["preference"]], world["beta"]
    schedule = d3po.make_schedule(ALPHA_BARS, world["num_steps"])
    reference, exact = load(job.seed, job.settings, work)
    torch.manual_seed(job.seed)
    policy = Adapter(reference, schedule, mixture)
    reference = policy.reference

    @cache
    def unmoved(chains: int, noise: int) -> Tensor:
        return sample(reference, schedule, chains, noise)

    def measured(chains: int, noise: int) -> tuple[Tensor, dict]:
        x, x_ref = sample(policy, schedule, chains, noise), unmoved(chains, noise)
        now = measure(x, x_ref, policy, reference, schedule, mixture, score, beta)
        return x[-1], {"share": optimum.attained_share(now.j, Namespace(**exact)), **now._asdict()}

    training = align(
        policy, None if method.moving else reference, schedule, score, d3po.bradley_terry,
        method.losses(job.strength, reference), method.each_step, job.lr, world["epochs"], world["pairs"],
        method.replay, method.redrawn, world["average"],
    )  # fmt: skip
    result, whole = {"curve": [], "points": []}, job.seed != SWEEP_SEED
    try:
        for epoch, done in enumerate(training, 1):
            if whole and epoch % 5 == 0 or epoch == world["epochs"]:
                result["curve"].append({"labels": done.labels, **measured(1000, 7 + job.seed % SWEEP_SEED)[1]})
        if whole:
            points, result["final"] = measured(10_000, 1000 + job.seed)
            result["points"] = points[:500].tolist()
            runs.save_tensors(place(work, "policy", job), policy.state_dict())
    except FloatingPointError as error:
        result["failed"] = str(error)
    result = rounded(result)
    runs.save_json(path, result)
    return result


def final_share(row: dict) -> float:
    """The attained share at the end of a run; minus infinity for one that broke off."""
    share = -math.inf if "failed" in row else row["curve"][-1]["share"]
    return share if math.isfinite(share) else -math.inf


def summary(name: str, rows: list[dict], sweep: list[dict]) -> dict:
    """What compare.json says of a method: its chosen settings, the end and the curve over the seeds, and the sweep."""
    whole = [row for row in rows if "failed" not in row]
    over_seeds = [
        {"labels": points[0]["labels"], **over([{key: p[key] for key in ("share", "score")} for p in points])}
        for points in zip(*(row["curve"] for row in whole), strict=True)
    ]
    reached = [point["labels"] for point in over_seeds if point["share"]["mean"] >= 0.9]
    method = METHODS[name]
    return {
        "lr": rows[0]["lr"], "strength": {method.strength: rows[0]["strength"]}, "labels_only": method.labels_only,
        "failed": len(rows) - len(whole), "labels_to_0.9": reached[0] if reached else None,
        "final": over([row["final"] for row in whole]), "curve": over_seeds,
        "sweep": [
            {"lr": r["lr"], "strength": r["strength"], "failed": "failed" in r}
            | {key: r["curve"][-1][key] for key in ("share", "score", "kl") if "failed" not in r}
            for r in sweep if r["method"] == name
        ],
    }  # fmt: skip


def over(rows: list[dict]) -> dict:
    """Mean and standard deviation of each number over the seeds; nothing where no seed came through."""
    columns = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in (rows[0] if rows else ())}
    one = min(1, len(rows) - 1)
    return {key: {"mean": c.mean().item(), "sd": c.std(correction=one).item()} for key, c in columns.items()}


def table(result: dict) -> str:
    """The comparison as a table in Markdown, best first."""
    lines = [
        "| method | sees | labels to 0.9 | attained share | score | KL (nats) | win rate | on data | lr, strength |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ended = {name: method["final"] for name, method in result["methods"].items() if method["final"]}
    for name in sorted(ended, key=lambda name: -ended[name]["share"]["mean"]):
        method, end = result["methods"][name], ended[name]
        (strength, value), needed = *method["strength"].items(), method["labels_to_0.9"]
        cells = [f"{end[k]['mean']:.{d}f} ± {end[k]['sd']:.{d}f}" for k, d in (("share", 3), ("score", 2), ("kl", 2))]
        cells += [f"{end[key]['mean']:.1%}" for key in ("win_rate", "on_data")]
        cells += [f"{method['lr']:g}, {strength} {value:g}"]
        budget = f"{needed:,}" if needed else f"not within {method['curve'][-1]['labels']:,}"
        lines.append(" | ".join([f"| {name}", "labels" if method["labels_only"] else "scores", budget, *cells]) + " |")
    return "\n".join(lines) + "\n"


def rounded(content):
    """The same JSON content with numbers of five significant digits: what the seeds determine, in a small file."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content


if __name__ == "__main__":
    main()

"""Compare the paper's methods and later ones with the exact optimum, in one loop, at equal budgets.

    python -m toy.compare            # the committed numbers: an hour on two free cores; resumes
    python -m toy.compare --quick    # the same path with tiny budgets
    python -m toy.compare --methods "Eq. 12"    # this row anew; the others stay as they stand

Each method's step size and hyperparameter are chosen by one declared sweep on one seed; then it
runs on five other seeds. All see equal numbers of labelled chains. Variants of a method, with other
x_T or on another model, take its settings. --out gets compare.json, the two tables of the page
compare.md between its marks, and three figures.
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import d3po
from toy import baselines, flow, optimum, plots
from toy.align import PreferenceBatch, UpdateEvery, align, pair_loss
from toy.ddpm import MLP, Adapter, data_variance, pretrain
from toy.measure import measure, sample
from toy.reward_model import RewardModelChain, RewardModelDPOK
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES

RESULTS = Path(__file__).resolve().parent / "results"
MARK = "<!-- python -m toy.compare writes what is between these two lines -->\n"
SWEEP_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
STEP_SIZES = {"timestep": (3e-4, 1e-3, 3e-3), "trajectory": (1e-3, 3e-3, 1e-2)}
BETAS = (0.1, 0.2, 0.3, 0.6)
CLIP = 0.1  # the released code's, and GRPO's here
GROUP = 8  # chains of a group of GRPO and DiffusionNFT
KL_WEIGHTS = (0.0, 0.3, 1.0, 3.0)  # theirs, per standard deviation of the score


class Method(NamedTuple):
    """How one line of the comparison trains."""

    # (policy, schedule, batch, *, reference, value); a class is made anew for each run
    losses: Callable[..., Iterator[Tensor]]
    update_every: UpdateEvery
    hyperparameter: str  # what value is
    values: tuple[float, ...]  # those of the sweep
    reference: str = "initial"  # or "previous", the policy that sampled
    replay: int = 0  # batches of stored pairs that an epoch adds
    bridged: bool = False  # these on trajectories drawn anew
    labels_only: bool = True  # sees preferences, not scores
    chains_per_x_T: int = 2
    settings_of: str | None = None  # of a variant: the method whose sweep it uses
    world: dict = {}  # what a variant changes in the settings: "model" (ddpm or flow), "eta"


def preference_method(function, *, update_every="timestep", **options) -> Method:
    """A loss of d3po.py; its hyperparameter is its beta."""

    def losses(policy, schedule, batch, *, reference, value):
        return pair_loss(function, value)(policy, schedule, batch)

    return Method(losses, update_every, "beta", values=BETAS, **options)


def diffusion_dpo(policy, schedule, batch: PreferenceBatch, *, reference, value):
    pairs = d3po.pairs_from_feedback(batch.h)
    return baselines.diffusion_dpo_losses(
        policy, schedule, batch.trajectory, reference=reference, pairs=pairs, beta=value
    )


def preferred(policy, schedule, batch: PreferenceBatch, *, reference, value):
    pairs = d3po.pairs_from_feedback(batch.h)
    return baselines.preferred_losses(
        policy, schedule, batch.trajectory, reference=reference, pairs=pairs, kl_weight=value
    )


def ddpo(policy, schedule, batch: PreferenceBatch, *, reference, value):
    scores = batch.scores.flatten()
    return baselines.ddpo_losses(policy, schedule, batch.trajectory, scores=scores, clip=value)


def dpok(policy, schedule, batch: PreferenceBatch, *, reference, value):
    scores = batch.scores.flatten()
    return baselines.dpok_losses(
        policy, schedule, batch.trajectory, reference=reference, scores=scores, beta=value
    )


def reward_weighted(policy, schedule, batch: PreferenceBatch, *, reference, value):
    scores = batch.scores.flatten()
    return baselines.reward_weighted_losses(
        policy, schedule, batch.trajectory, scores=scores, temperature=value
    )


def grpo(policy, schedule, batch: PreferenceBatch, *, reference, value):
    return baselines.grpo_losses(
        policy,
        schedule,
        batch.trajectory,
        scores=batch.scores.view(-1, GROUP),
        clip=CLIP,
        kl_weight=value,
        reference=reference,
    )


def nft(policy, schedule, batch: PreferenceBatch, *, reference, value):
    return baselines.nft_losses(
        policy,
        schedule,
        batch.trajectory,
        old=copy.deepcopy(policy),  # which sampled: its weights change at every loss
        scores=batch.scores.view(-1, GROUP),
        beta=1.0,
        kl_weight=value,
        reference=reference,
    )


def group_method(losses) -> Method:
    """A loss that compares the scores of a group of chains from one x_T."""
    return Method(
        losses,
        "timestep",
        "KL weight",
        values=KL_WEIGHTS,
        labels_only=False,
        chains_per_x_T=GROUP,
    )


def variant(name: str, **changes) -> Method:
    """A method with changes, at the settings that its own sweep found."""
    return METHODS[name]._replace(settings_of=name, **changes)


whole_chain = partial(preference_method, d3po.chain_dpo_losses, update_every="trajectory")
eq14 = partial(preference_method, d3po.d3po_losses)
eq14_clamped = partial(preference_method, partial(d3po.d3po_losses, clip=CLIP))
eq12 = partial(preference_method, partial(d3po.d3po_losses, steps=[0]))
BRIDGED, CHAIN, EQ14 = "whole chain, bridged pairs", "whole chain (Eq. 5)", "Eq. 14 (D3PO)"
METHODS = {
    BRIDGED: whole_chain(replay=7, bridged=True),
    "whole chain, stored pairs": whole_chain(replay=3),
    CHAIN: whole_chain(),
    "whole chain, reference previous": whole_chain(reference="previous"),
    EQ14: eq14(),
    "Eq. 14, reference previous": eq14(reference="previous"),
    "Eq. 14, released clamp": eq14_clamped(),
    "Eq. 12": eq12(),
    "Eq. 12, reference previous": eq12(reference="previous"),
    "reward model, then DPOK": Method(
        RewardModelDPOK, "trajectory", "beta", values=BETAS, replay=7
    ),
    "reward model, then whole chain": Method(
        RewardModelChain, "trajectory", "beta", values=BETAS, replay=7
    ),
    "Diffusion-DPO": Method(diffusion_dpo, "timestep", "beta", values=(1.0, 10.0, 100.0, 1000.0)),
    "preferred samples (SFT)": Method(
        preferred, "timestep", "KL weight", values=(0.0, 0.1, 0.3, 1.0)
    ),
    "DDPO": Method(ddpo, "timestep", "clip", values=(0.001, 0.01, 0.1, 0.3), labels_only=False),
    "DPOK": Method(dpok, "trajectory", "beta", values=BETAS, labels_only=False),
    "Reward Weighted": Method(
        reward_weighted,
        "timestep",
        "temperature",
        values=(0.3, 1.0, 3.0, 10.0),
        labels_only=False,
    ),
    "GRPO": group_method(grpo),
    "DiffusionNFT": group_method(nft),
}
OWN_X_T = {"chains_per_x_T": 1}
METHODS |= {
    **{f"{name}, own x_T": variant(name, **OWN_X_T) for name in (CHAIN, EQ14, "GRPO")},
    f"{CHAIN}, eta 0.2": variant(CHAIN, world={"eta": 0.2}),
    f"{CHAIN}, eta 0.2, own x_T": variant(CHAIN, world={"eta": 0.2}, **OWN_X_T),
    **{
        f"{name}, flow": variant(name, world={"model": "flow"})
        for name in (BRIDGED, "GRPO", "DiffusionNFT")
    },
}


class Job(NamedTuple):
    """One training run. All of this names its result: a second start does not repeat it."""

    method: str
    lr: float
    hyperparameter: float
    seed: int
    settings: dict  # of the comparison


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("python -m toy.compare", __doc__.splitlines()[0])
    parser.add_argument("--mixture", choices=MIXTURES, default="ring", help="the data")
    parser.add_argument("--preference", choices=SCORES, default="reach", help="the score")
    parser.add_argument("--beta", type=float, default=0.3, help="beta of J, score per nat")
    parser.add_argument("--num-steps", type=int, default=20, help="T, denoising steps")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of every run")
    parser.add_argument("--pairs", type=int, default=128, help="pairs, so labels, an epoch")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"these rows alone; the others stay as they stand: {'; '.join(METHODS)}",
    )
    args = parse_budget(parser, argv)
    if args.pairs % (GROUP // 2):
        parser.error(
            f"--pairs {args.pairs}: give a multiple of {GROUP // 2}, for groups of {GROUP}"
        )
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: give 1 or more")
    if not 0 < args.beta < math.inf:
        parser.error(f"--beta {args.beta}: give a positive number")
    try:
        d3po.make_schedule(ALPHA_BARS, args.num_steps)
    except ValueError as error:
        parser.error(str(error))
    return args


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that compare.py and limits.py share."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [flags]   (--help lists the flags)",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="runs at a time, one core each"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny budgets, one setting and one seed a method"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/compare"), help="results of runs, for a resume"
    )
    parser.add_argument("--out", type=Path, help="toy/results, with --quick the --work folder")
    return parser


def parse_budget(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, check what compare.py and limits.py share, and make the folders."""
    args = parser.parse_args(argv)
    for name in ("pairs", "processes"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    args.pretrain_steps = 8000
    if args.quick:
        args.epochs, args.pairs, args.pretrain_steps = 3, 16, 300
    args.out = args.out or (args.work if args.quick else RESULTS)
    for folder in (args.work, args.out):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{folder} cannot be written ({error.strerror})"
            parser.error(f"{reason}: choose another --work or --out")
    return args


def run_all(function: Callable, jobs: list, args: argparse.Namespace, title: str) -> list:
    """Map a function over jobs in --processes processes; finished jobs are not repeated."""
    run = partial(function, work=args.work)
    bar = partial(tqdm, desc=title, total=len(jobs), unit=" runs", mininterval=0.5)
    if args.processes == 1:
        return list(bar(map(run, jobs)))
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        return list(bar(pool.imap(run, jobs)))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    settings = {
        "mixture": args.mixture,
        "preference": args.preference,
        "beta": args.beta,
        "num_steps": args.num_steps,
        "epochs": args.epochs,
        "pairs": args.pairs,
        "pretrain_steps": args.pretrain_steps,
        "average": True,
    }
    names, stored = args.methods or list(METHODS), {"methods": {}}
    if args.methods and (args.out / "compare.json").exists():
        before = json.loads((args.out / "compare.json").read_text())
        stored = before if before["settings"] == settings else stored
    earlier = stored["methods"]
    print(
        f"{len(names)} methods on the {args.mixture}, preference {args.preference}, "
        f"beta {args.beta:g}: {args.epochs * args.pairs:,} labels each.\n"
        f"Single runs are kept in {args.work}, the results in {args.out}."
    )

    # References, sweep, and the chosen settings on the other seeds
    seeds = SEEDS[:1] if args.quick else SEEDS
    worlds = [{}]
    for name in names:
        if METHODS[name].world not in worlds:
            worlds.append(METHODS[name].world)
    references = [(SWEEP_SEED, settings)]
    references += [(seed, settings | world) for world in worlds for seed in seeds]
    run_all(prepare, references, args, title="references")
    bases = dict.fromkeys(METHODS[name].settings_of or name for name in names)
    grid = sweep_jobs(settings, [b for b in bases if b in names or b not in earlier], args.quick)
    sweep = with_results(grid, run_all(train, grid, args, title="sweep"))
    finals = []
    for name in names:
        lr, value = best_settings(METHODS[name].settings_of or name, sweep, earlier)
        world = settings | METHODS[name].world
        finals += [Job(name, lr, value, seed=seed, settings=world) for seed in seeds]
    rows = with_results(finals, run_all(train, finals, args, title="seeds"))

    frontier, points = stored.get("frontier"), None
    if frontier is None:
        frontier, points = what_is_possible(settings, args)
        points = {
            name: next(r["points"] for r in rows if r["method"] == name)
            for name in names
            if METHODS[name].settings_of is None
        } | points
    result = {
        "command": "python -m toy.compare" + (" --quick" if args.quick else ""),
        "settings": settings,
        "sweep_seed": SWEEP_SEED,
        "seeds": seeds,
        "frontier": frontier,
        "methods": {},
    }
    for name, method in METHODS.items():
        if name in names:
            own = ([row for row in found if row["method"] == name] for found in (rows, sweep))
            result["methods"][name] = summary(method, *own)
        elif name in earlier:
            result["methods"][name] = earlier[name]
    (args.out / "compare.json").write_text(json.dumps(rounded(result), indent=2) + "\n")
    write_tables(args.out / "compare.md", MARK, tables(result))
    print(*tables(result), sep="\n")

    shown = {
        name: row for name, row in result["methods"].items() if METHODS[name].settings_of is None
    }
    for path in plots.draw_comparison(result | {"methods": shown}, points, args.out):
        print(path)


def what_is_possible(settings: dict, args: argparse.Namespace) -> tuple[list[dict], dict]:
    """The exact frontier of the first seed's reference, and points of the optimum at J's beta."""
    reference, _ = load(SEEDS[0], settings, args.work)
    schedule, score = make_schedule(settings), SCORES[args.preference]
    betas = {args.beta, 2.0} if args.quick else {args.beta, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0}
    exact = {
        beta: optimum.solve(reference, schedule, score, beta=beta)
        for beta in tqdm(sorted(betas), "frontier")
    }
    generator = torch.Generator().manual_seed(0)
    x = optimum.sample_optimum(
        reference,
        schedule,
        score,
        beta=args.beta,
        optimum=exact[args.beta],
        x_T=torch.randn(500, 2, generator=generator),
        generator=generator,
    )
    frontier = [{"beta": beta, **best.numbers()} for beta, best in exact.items()]
    return frontier, {"exact optimum": x[-1].tolist()}


def best_settings(name: str, sweep: list[dict], earlier: dict) -> tuple[float, float]:
    """Step size and hyperparameter of a method, from the sweep or from stored results."""
    rows = [row for row in sweep if row["method"] == name]
    if rows:
        best = max(rows, key=final_share)
        return best["lr"], best["hyperparameter"]
    (value,) = earlier[name]["hyperparameter"].values()
    return earlier[name]["lr"], value


def sweep_jobs(settings: dict, names: list[str], quick: bool) -> list[Job]:
    """Every step size with every hyperparameter of every method; with quick the second of each."""
    chosen = slice(1, 2) if quick else slice(None)
    return [
        Job(name, lr, value, seed=SWEEP_SEED, settings=settings)
        for name in names
        for lr in STEP_SIZES[METHODS[name].update_every][chosen]
        for value in METHODS[name].values[chosen]
    ]


def with_results(jobs: list[Job], results: list[dict]) -> list[dict]:
    """Results of `train`, each with the fields of its job."""
    return [result | job._asdict() for job, result in zip(jobs, results, strict=True)]


def prepare(seed_and_settings: tuple[int, dict], work: Path) -> None:
    """Train a seed's reference and solve for its optimum, once; `load` reads them."""
    seed, settings = seed_and_settings
    path = cache_path(work, "reference", seed_and_settings)
    if path.exists():
        return
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    mixture, score = MIXTURES[settings["mixture"]], SCORES[settings["preference"]]
    learn = flow.pretrain if is_flow(settings) else pretrain
    reference = learn(mixture, settings["pretrain_steps"], progress=False)
    exact = optimum.solve(reference, make_schedule(settings), score, beta=settings["beta"])
    torch.save({"weights": reference.state_dict(), "optimum": exact.numbers()}, path)


def load(seed: int, settings: dict, work: Path) -> tuple[nn.Module, dict]:
    """A seed's reference and the numbers of its optimum."""
    stored = torch.load(cache_path(work, "reference", (seed, settings)))
    variance = data_variance(MIXTURES[settings["mixture"]])
    reference = flow.FlowDenoiser(flow.Velocity(variance)) if is_flow(settings) else MLP(variance)
    reference.load_state_dict(stored["weights"])
    return reference.requires_grad_(False), stored["optimum"]


def is_flow(settings: dict) -> bool:
    return settings.get("model") == "flow"


def make_schedule(settings: dict) -> d3po.Schedule:
    """The sampler of a world: DDPM's steps (eta 1) unless its settings say otherwise."""
    eta = settings.get("eta", 1.0)
    if is_flow(settings):
        return flow.make_schedule(settings["num_steps"], eta)
    return d3po.make_schedule(ALPHA_BARS, settings["num_steps"], eta)


def cache_path(work: Path, kind: str, key: tuple) -> Path:
    """The file that keeps the result of a piece of work."""
    return work / f"{kind}_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"


def train(job: Job, work: Path) -> dict:
    """Run one job, or read its result: the curve over the labels, and some final points.

    The runs of the sweep have the last point of the curve only.
    """
    path = cache_path(work, "run", job)
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    settings, method = job.settings, METHODS[job.method]
    mixture, score = MIXTURES[settings["mixture"]], SCORES[settings["preference"]]
    schedule = make_schedule(settings)
    reference, exact = load(job.seed, settings, work)
    torch.manual_seed(job.seed)
    alpha_bars = flow.ALPHA_BARS if is_flow(settings) else ALPHA_BARS
    policy = Adapter(reference, schedule, mixture, alpha_bars)
    reference = policy.reference

    @cache
    def reference_samples(n: int, seed: int) -> Tensor:
        return sample(reference, schedule, n, seed=seed)

    def measured(n: int, seed: int) -> tuple[Tensor, dict]:
        x = sample(policy, schedule, n, seed=seed)
        now = measure(
            x,
            reference_samples(n, seed),
            policy,
            reference=reference,
            schedule=schedule,
            mixture=mixture,
            score=score,
            beta=settings["beta"],
        )
        share = optimum.attained_share(now.j, SimpleNamespace(**exact))
        return x[-1], {"share": share, **now._asdict()}

    losses = method.losses() if isinstance(method.losses, type) else method.losses
    training = align(
        policy,
        schedule,
        partial(losses, reference=reference, value=job.hyperparameter),
        reference=reference if method.reference == "initial" else "previous",
        score=score,
        label=d3po.bradley_terry,
        update_every=method.update_every,
        lr=job.lr,
        epochs=settings["epochs"],
        pairs=settings["pairs"],
        replay=method.replay,
        bridged=method.bridged,
        average=settings["average"],
        chains_per_x_T=method.chains_per_x_T,
    )
    in_sweep = job.seed == SWEEP_SEED
    result = {"curve": [], "points": []}
    seconds, started = 0.0, time.perf_counter()
    try:
        for number, epoch in enumerate(training, 1):
            seconds += time.perf_counter() - started
            if number == settings["epochs"] or number % 5 == 0 and not in_sweep:
                _, now = measured(1000, seed=7 + job.seed % SWEEP_SEED)
                result["curve"].append({"labels": epoch.labels, **now})
            started = time.perf_counter()
        if not in_sweep:
            points, result["final"] = measured(10_000, seed=1000 + job.seed)
            result["points"] = points[:500].tolist()
            torch.save(policy.state_dict(), cache_path(work, "policy", job))
    except FloatingPointError as error:
        result["failed"] = str(error)
    result["seconds"] = {"training": seconds, "reward_model": getattr(losses, "seconds", 0.0)}
    result = rounded(result)
    path.write_text(json.dumps(result))
    return result


def final_share(row: dict) -> float:
    """The attained share at the end of a run; minus infinity for one that broke off."""
    share = -math.inf if "failed" in row else row["curve"][-1]["share"]
    return share if math.isfinite(share) else -math.inf


def summary(method: Method, rows: list[dict], sweep: list[dict]) -> dict:
    """What compare.json says of a method, from its runs and those of its sweep."""
    finished = [row for row in rows if "failed" not in row]
    curve = []
    for points in zip(*(row["curve"] for row in finished), strict=True):
        numbers = [{key: point[key] for key in ("share", "score")} for point in points]
        curve.append({"labels": points[0]["labels"], **mean_and_std(numbers)})
    reached = [point["labels"] for point in curve if point["share"]["mean"] >= 0.9]
    return {
        "lr": rows[0]["lr"],
        "hyperparameter": {method.hyperparameter: rows[0]["hyperparameter"]},
        "labels_only": method.labels_only,
        "failed": len(rows) - len(finished),
        "labels_to_0.9": reached[0] if reached else None,
        "final": mean_and_std([row["final"] for row in finished]),
        "curve": curve,
        "seconds": mean_and_std([row["seconds"] for row in finished if "seconds" in row]),
        "sweep": [sweep_row(row) for row in sweep],
    }


def sweep_row(row: dict) -> dict:
    failed = "failed" in row
    end = {} if failed else {key: row["curve"][-1][key] for key in ("share", "score", "kl")}
    return {"lr": row["lr"], "hyperparameter": row["hyperparameter"], "failed": failed, **end}


def mean_and_std(rows: list[dict]) -> dict:
    """Mean and standard deviation of each number over the seeds; nothing where none finished."""
    if not rows:
        return {}
    columns = {key: torch.tensor([r[key] for r in rows], dtype=torch.float64) for key in rows[0]}
    correction = min(1, len(rows) - 1)
    return {
        key: {"mean": column.mean().item(), "sd": column.std(correction=correction).item()}
        for key, column in columns.items()
    }


def tables(result: dict) -> list[str]:
    """Methods, then variants, as tables in Markdown, best first; unmeasured ones last."""
    variants = [name for name, method in METHODS.items() if method.settings_of]
    return [table(result, [n for n in METHODS if n not in variants]), table(result, variants)]


def table(result: dict, names: list[str]) -> str:
    never = f"not within {result['settings']['epochs'] * result['settings']['pairs']:,}"
    rows, missing = [], []
    for name in names:
        if name not in result["methods"]:
            missing.append(f"| {name} | not measured yet |\n")
            continue
        method = result["methods"][name]
        final, needed = method["final"], method["labels_to_0.9"]
        if not final:
            continue
        ((hyperparameter, value),) = method["hyperparameter"].items()
        share, score, kl = (final[key] for key in ("share", "score", "kl"))
        row = {
            "method": name,
            "sees": "labels" if method["labels_only"] else "scores",
            "labels to 0.9": f"{needed:,}" if needed else never,
            "attained share": f"{share['mean']:.3f} ± {share['sd']:.3f}",
            "score": f"{score['mean']:.2f} ± {score['sd']:.2f}",
            "KL (nats)": f"{kl['mean']:.2f} ± {kl['sd']:.2f}",
            "win rate": f"{final['win_rate']['mean']:.1%}",
            "on data": f"{final['on_data']['mean']:.1%}",
            "lr, hyperparameter": f"{method['lr']:g}, {hyperparameter} {value:g}",
        }
        rows.append((share["mean"], row))
    if not rows:
        return "Not measured yet, or every run broke off.\n"
    best_first = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
    header = list(best_first[0])
    lines = [header, ["---"] * len(header), *(row.values() for row in best_first)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "".join(missing)


def write_tables(page: Path, mark: str, tables: list[str]) -> None:
    """Replace what a page has between each pair of marks; a new page has nothing else.

    Raises ValueError for a page that has other than two marks a table.
    """
    parts = page.read_text().split(mark) if page.exists() else [""] * (2 * len(tables) + 1)
    parts[1::2] = [f"\n{table}\n" for table in tables]
    page.write_text(mark.join(parts))


def rounded(content):
    """The same JSON content with five significant digits: what the seeds determine."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content


if __name__ == "__main__":
    main()

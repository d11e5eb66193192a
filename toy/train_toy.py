"""Align a 2D diffusion model from pairwise preferences. No flag is needed.

    python toy/train_toy.py

First a small DDPM of a mixture, or a rectified flow (--model flow), is trained: the reference.
Then, epoch after epoch, pairs of chains are sampled from one x_T each and labelled by an analytic
score, and the losses of d3po.py train an adapter on the reference (align.py). The run leaves in
--out: config.json, metrics.jsonl (a line an epoch), labels.jsonl (a line a comparison), policy.pt
(the weights after the last good epoch), samples.npz and toy.png.
"""

import argparse
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

import d3po
from toy import ddpm, flow, optimum, plots
from toy.align import PreferenceBatch, UpdateEvery, align, pair_loss
from toy.measure import Measurement, measure, sample
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES, Mixture, exact_denoiser, sample_data


class Model(NamedTuple):
    alpha_bars: Tensor  # (1000,) of the model times
    make_schedule: Callable[[int, float], d3po.Schedule]  # (num_steps, eta); ValueError
    pretrain: Callable[[Mixture], nn.Module]


class Loss(NamedTuple):
    function: Callable[..., Iterator[Tensor]]  # of d3po.py
    update_every: UpdateEvery
    lr: float  # default step size
    replay: int  # default number of batches of stored pairs that an epoch adds


MODELS = {
    "ddpm": Model(ALPHA_BARS, partial(d3po.make_schedule, ALPHA_BARS), ddpm.pretrain),
    "flow": Model(flow.ALPHA_BARS, flow.make_schedule, flow.pretrain),
}
LOSSES = {
    "chain": Loss(d3po.chain_dpo_losses, "trajectory", lr=5e-3, replay=7),
    "eq14": Loss(d3po.d3po_losses, "timestep", lr=1e-3, replay=0),
    "eq12": Loss(partial(d3po.d3po_losses, steps=[0]), "timestep", lr=1e-3, replay=0),
}
LABELS = {"bradley-terry": d3po.bradley_terry, "greedy": d3po.preference}
SAMPLES = 4000  # chains that the final table and the figure are made from


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="train_toy.py",
        usage="%(prog)s [flags]   (--help lists the flags)",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    world = parser.add_argument_group("the world")
    world.add_argument("--mixture", choices=MIXTURES, default="ring", help="the data")
    world.add_argument(
        "--preference",
        choices=SCORES,
        default="reach",
        help="the score by which points are compared",
    )
    world.add_argument(
        "--labels",
        choices=LABELS,
        default="bradley-terry",
        help="drawn from Eq. 3, or the better wins",
    )
    world.add_argument(
        "--model", choices=MODELS, default="ddpm", help="a DDPM, or a rectified flow"
    )
    world.add_argument(
        "--reference",
        choices=["learned", "exact"],
        default="learned",
        help="trained on samples, or the formula",
    )
    world.add_argument("--num-steps", type=int, default=20, help="T, denoising steps")
    world.add_argument(
        "--eta", type=float, default=1.0, help="DDIM's noise scale, above 0 and at most 1"
    )
    method = parser.add_argument_group("the method")
    method.add_argument(
        "--loss", choices=LOSSES, default="chain", help="Eq. 5 on the whole chain, Eq. 14 or Eq. 12"
    )
    method.add_argument("--beta", type=float, default=0.3, help="strength of the KL: score per nat")
    method.add_argument(
        "--lr", type=float, help="Adam's first step size, falling to 0 as a cosine; by --loss"
    )
    method.add_argument(
        "--epochs", type=int, default=30, help="times that pairs are sampled and trained on"
    )
    method.add_argument(
        "--pairs", type=int, default=128, help="pairs of chains, so labels, an epoch"
    )
    method.add_argument(
        "--replay", type=int, help="batches of stored pairs that an epoch adds; by --loss"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same metrics.jsonl"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="run folder")
    args = parser.parse_args(argv)

    args.lr = LOSSES[args.loss].lr if args.lr is None else args.lr
    args.replay = LOSSES[args.loss].replay if args.replay is None else args.replay
    for name in ("beta", "lr", "epochs", "pairs"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            parser.error(f"--{name} {value}: give a positive number")
    if args.replay < 0:
        parser.error(f"--replay {args.replay}: give 0 or more")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: give a number from 0 to 2^63 - 1")
    if not args.out.name:
        parser.error(f"--out {args.out} is the folder you are in: give a folder for this run alone")
    try:
        MODELS[args.model].make_schedule(args.num_steps, args.eta)
    except ValueError as error:
        parser.error(str(error))
    return parser, args


def open_run(args: argparse.Namespace) -> dict:
    """Make the run folder; return what its config.json holds: settings, versions and git revision.

    A run that is there already is kept as NAME.1, NAME.2, ... Raises OSError.
    """
    out = args.out
    if (out / "config.json").exists():
        names = (out.with_name(f"{out.name}.{n}") for n in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        out.rename(kept)
        print(f"{out} held a run already: that one is now {kept.name}.")
    out.mkdir(parents=True, exist_ok=True)
    config = vars(args) | {
        "out": str(out),
        "versions": {
            "d3po": d3po.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "git_revision": git_revision(),
    }
    write_config(out, config)
    (out / "metrics.jsonl").write_text("")
    (out / "labels.jsonl").write_text("")
    return config


def write_config(out: Path, config: dict) -> None:
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def append_lines(path: Path, rows: list[dict]) -> None:
    """Append one JSON object a line."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def git_revision() -> str | None:
    """The commit of this repository; None without git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    parser, args = parse(argv)
    out = args.out
    torch.set_num_threads(1)  # small tensors gain nothing from more; one gives the same bits
    torch.manual_seed(args.seed)
    try:
        config = open_run(args)
    except OSError as error:
        parser.error(f"--out {out} cannot be written ({error.strerror}): choose another folder")
    print(
        f"D3PO on the plane: data {args.mixture}, model {args.model}, "
        f"preference {args.preference}, loss {args.loss}, beta {args.beta:g}, "
        f"T = {args.num_steps}, seed {args.seed}.\n"
        f"An epoch: {args.pairs} new pairs with {args.labels} labels, then {args.replay} batches "
        f"of stored pairs on trajectories drawn anew; lr {args.lr:g}. Run folder: {out}."
    )

    # The world: data, reference, and the best that can be reached
    mixture, score = MIXTURES[args.mixture], SCORES[args.preference]
    model = MODELS[args.model]
    schedule = model.make_schedule(args.num_steps, args.eta)
    if args.reference == "exact":
        denoiser = exact_denoiser(mixture, model.alpha_bars)
    else:
        denoiser = model.pretrain(mixture)
    policy = ddpm.Adapter(denoiser, schedule, mixture, alpha_bars=model.alpha_bars)
    reference = policy.reference
    best = optimum.solve(reference, schedule, score, beta=args.beta)
    try:
        optimum.attained_share(best.j_ref, best)
    except ValueError as error:
        parser.error(str(error))
    write_config(out, config | {"optimum": best.numbers()})
    torch.save(policy.state_dict(), out / "policy.pt")

    def measured(x: Tensor, x_ref: Tensor, denoiser: d3po.Denoiser) -> Measurement:
        return measure(
            x,
            x_ref,
            denoiser,
            reference=reference,
            schedule=schedule,
            mixture=mixture,
            score=score,
            beta=args.beta,
        )

    # Alg. 1
    loss = LOSSES[args.loss]
    training = align(
        policy,
        schedule,
        pair_loss(loss.function, args.beta),
        reference=reference,
        score=score,
        label=LABELS[args.labels],
        update_every=loss.update_every,
        lr=args.lr,
        epochs=args.epochs,
        pairs=args.pairs,
        replay=args.replay,
        bridged=True,
        average=True,
    )
    x_ref = sample(reference, schedule, 256, seed=1)
    bar = tqdm(training, "align", args.epochs, unit=" epochs", mininterval=0.5)
    try:
        for number, epoch in enumerate(bar, 1):
            now = measured(sample(policy, schedule, 256, seed=1), x_ref, policy)
            row = {
                "epoch": number,
                "score": now.score,
                "kl": now.kl,
                "win_rate": now.win_rate,
                "on_data": now.on_data,
                "attained_share": optimum.attained_share(now.j, best),
                "accuracy": epoch.accuracy,
                "margin": args.beta * epoch.margin,
                "loss": epoch.loss,
                "labels": epoch.labels,
            }
            if not all(math.isfinite(value) for value in row.values()):
                raise FloatingPointError(
                    f"epoch {number}: a measured number is not finite any more"
                )
            append_lines(out / "metrics.jsonl", [row])
            append_lines(out / "labels.jsonl", label_rows(number, epoch.new))
            torch.save(policy.state_dict(), out / "policy.pt")
            bar.set_postfix_str(
                f"score {now.score:.2f}, KL {now.kl:.2f}, accuracy {epoch.accuracy:.0%}"
            )
    except FloatingPointError as error:
        bar.close()
        sys.exit(
            f"{error}, so the run stops. Lower --lr (now {args.lr:g}), or raise --beta (now "
            f"{args.beta:g}) or --pairs (now {args.pairs}). {out} holds the metrics so far and "
            "policy.pt, the weights of the last good epoch."
        )

    # What was reached
    x_ref = sample(reference, schedule, SAMPLES, seed=2)
    x = sample(policy, schedule, SAMPLES, seed=2)
    x_best = optimum.sample_optimum(
        reference, schedule, score, beta=args.beta, optimum=best, x_T=x_ref[0]
    )
    data = sample_data(mixture, SAMPLES)
    np.savez(out / "samples.npz", data=data, before=x_ref, after=x, optimum=x_best)
    print_table(measured(x_ref, x_ref, reference), measured(x, x_ref, policy), best)
    figure = plots.draw_run(out)
    seconds = time.perf_counter() - start
    print(f"\n{epoch.labels:,} labels, {seconds:.0f} s. Figure: {figure}")


def label_rows(epoch: int, batch: PreferenceBatch) -> list[dict]:
    """One row of labels.jsonl for each labelled pair: the two final points, their scores, and h."""
    points = batch.trajectory.x[-1].view(-1, 2, 2).tolist()
    pairs = zip(points, batch.scores.tolist(), batch.h.tolist(), strict=True)
    return [{"epoch": epoch, "points": p, "scores": s, "h": h} for p, s, h in pairs]


def print_table(before: Measurement, after: Measurement, best: optimum.Optimum) -> None:
    """The reference, the aligned policy, the best that a denoiser can be, and the best of all."""
    share = partial(optimum.attained_share, optimum=best)
    rows = {
        "mean score": (best.j_ref, after.score, best.score_gauss, best.score_star),
        "KL to the reference (nats)": (0.0, after.kl, best.kl_gauss, best.kl_star),
        "J = mean score - beta KL": (best.j_ref, after.j, best.j_gauss, best.j_star),
        "attained share": (0.0, share(after.j), 1.0, share(best.j_star)),
        "win rate against before": (before.win_rate, after.win_rate),
        "samples within 3 sd of a mode": (before.on_data, after.on_data),
    }
    widths = (9, 9, 13, 15)
    print(f"{'':32}{'before':>9}{'after':>9}{'best means':>13}{'exact optimum':>15}")
    for name, values in rows.items():
        cells = [f"{value:{width}.3f}" for value, width in zip(values, widths, strict=False)]
        print(f"{name:32}" + "".join(cells))


if __name__ == "__main__":
    main()

"""Align a 2D diffusion model from pairwise preferences. No flag is needed.

    python toy/train_toy.py

First a small DDPM of a mixture is trained: the reference. Then, epoch after epoch, pairs of chains are sampled from one
x_T each and labelled by an analytic score, and the losses of d3po.py move an adapter on the reference (align.py). The
run leaves in --out: config.json, metrics.jsonl (a line an epoch), labels.jsonl (a line a comparison), policy.pt (the
weights after the last good epoch), samples.npz and toy.png.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file is run as a script

import d3po
from toy import optimum, plots, runs
from toy.align import Comparisons, align, by_pairs
from toy.ddpm import Adapter, pretrain
from toy.measure import Measured, measure, sample
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES, exact_denoiser, sample_data


class Loss(NamedTuple):
    function: Callable[..., Iterator[Tensor]]  # of d3po.py
    each_step: bool  # update at every step, as Alg. 1 does, or once a chain
    lr: float  # default step size
    replay: int  # default number of batches of stored pairs that an epoch adds


LOSSES = {
    "chain": Loss(d3po.chain_dpo_losses, False, 5e-3, 7),
    "eq14": Loss(d3po.d3po_losses, True, 1e-3, 0),
    "eq12": Loss(partial(d3po.d3po_losses, steps=[0]), True, 1e-3, 0),
}
LABELS = {"bradley-terry": d3po.bradley_terry, "greedy": d3po.preference}
SAMPLES = 4000  # chains that the final table and the figure are made from


def parse(argv: list[str] | None) -> tuple[runs.Parser, Namespace, d3po.Schedule]:
    parser = runs.Parser(prog="train_toy.py", description=__doc__.splitlines()[0])
    world = parser.add_argument_group("the world")
    world.add_argument("--mixture", choices=MIXTURES, default="ring", help="the data")
    world.add_argument("--preference", choices=SCORES, default="reach", help="the score by which points are compared")
    world.add_argument("--labels", choices=LABELS, default="bradley-terry", help="drawn from Eq. 3, or the better wins")
    world.add_argument("--reference", choices=["learned", "exact"], default="learned", help="a DDPM, or the formula")
    world.add_argument("--num-steps", type=int, default=20, help="T, denoising steps")
    world.add_argument("--eta", type=float, default=1.0, help="DDIM's noise scale, above 0 and at most 1")
    method = parser.add_argument_group("the method")
    method.add_argument("--loss", choices=LOSSES, default="chain", help="Eq. 5 on the whole chain, Eq. 14 or Eq. 12")
    method.add_argument("--beta", type=float, default=0.3, help="strength of the KL: score per nat")
    method.add_argument("--lr", type=float, help="Adam's first step size, falling to 0 as a cosine; chosen by --loss")
    method.add_argument("--epochs", type=int, default=30, help="times that pairs are sampled, labelled and trained on")
    method.add_argument("--pairs", type=int, default=128, help="pairs of chains, so labels, an epoch")
    method.add_argument("--replay", type=int, help="batches of redrawn stored pairs that an epoch adds; by --loss")
    parser.add_argument("--seed", type=int, default=0, help="of everything; the same seed gives the same metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="run folder")
    args = parser.parse_args(argv)
    args.lr = LOSSES[args.loss].lr if args.lr is None else args.lr
    args.replay = LOSSES[args.loss].replay if args.replay is None else args.replay
    runs.refuse_unless_positive(parser, args, "beta", "lr", "epochs", "pairs")
    if args.replay < 0:
        parser.error(f"--replay {args.replay}: give 0 or more")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: give a number from 0 to 2^63 - 1")
    try:
        schedule = d3po.make_schedule(ALPHA_BARS, args.num_steps, args.eta)
    except ValueError as error:
        parser.error(str(error))
    return parser, args, schedule


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    parser, args, schedule = parse(argv)
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and one thread always gives the same bits
    torch.manual_seed(args.seed)
    config, out = runs.open_run(parser, vars(args)), args.out
    mixture, score, label = MIXTURES[args.mixture], SCORES[args.preference], LABELS[args.labels]
    print(
        f"D3PO on the plane: data {args.mixture}, preference {args.preference}, loss {args.loss}, beta {args.beta:g}, "
        f"T = {args.num_steps}, seed {args.seed}.\nAn epoch: {args.pairs} new pairs with {args.labels} labels, then "
        f"{args.replay} batches of stored pairs on redrawn chains; lr {args.lr:g}. Run folder: {out}."
    )

    policy = Adapter(exact_denoiser(mixture) if args.reference == "exact" else pretrain(mixture), schedule, mixture)
    reference = policy.reference
    best = optimum.solve(reference, schedule, score, args.beta)
    try:
        optimum.attained_share(best.j_ref, best)
    except ValueError as error:
        parser.error(str(error))
    runs.save_json(out / "config.json", config | {"optimum": best.numbers()})
    runs.save_tensors(out / "policy.pt", policy.state_dict())

    loss = LOSSES[args.loss]
    losses = by_pairs(loss.function, args.beta)

    def measured(x, x_ref):
        return measure(x, x_ref, policy, reference, schedule, mixture, score, args.beta)

    x_ref = sample(reference, schedule, 256, seed=1)
    training = align(
        policy, reference, schedule, score, label, losses, loss.each_step, args.lr, args.epochs, args.pairs,
        args.replay, redrawn=True, average=True,
    )  # fmt: skip
    bar = tqdm(training, "align", args.epochs, unit=" epochs", mininterval=0.5)
    try:
        for epoch, done in enumerate(bar, 1):
            now = measured(sample(policy, schedule, 256, seed=1), x_ref)
            row = {
                "epoch": epoch, "score": now.score, "kl": now.kl, "win_rate": now.win_rate, "on_data": now.on_data,
                "attained_share": optimum.attained_share(now.j, best), "accuracy": done.accuracy,
                "margin": args.beta * done.margin, "loss": done.loss, "labels": done.labels,
            }  # fmt: skip
            if not all(math.isfinite(value) for value in row.values()):
                raise FloatingPointError(f"epoch {epoch}: what its chains measure is not finite any more")
            runs.append(out / "metrics.jsonl", [row])
            runs.append(out / "labels.jsonl", comparisons(epoch, done.new))
            runs.save_tensors(out / "policy.pt", policy.state_dict())
            bar.set_postfix_str(f"score {now.score:.2f}, KL {now.kl:.2f}, accuracy {done.accuracy:.0%}")
    except FloatingPointError as error:
        bar.close()
        sys.exit(
            f"{error}, so the run stops. Lower --lr (now {args.lr:g}), or raise --beta (now {args.beta:g}) or --pairs "
            f"(now {args.pairs}). {out} holds the metrics so far and policy.pt, the weights of the last good epoch."
        )

    x, x_ref = (sample(denoiser, schedule, SAMPLES, seed=2) for denoiser in (policy, reference))
    x_best = optimum.sample_optimum(reference, schedule, score, args.beta, best, x_ref[0])
    np.savez(out / "samples.npz", data=sample_data(mixture, SAMPLES), before=x_ref, after=x, optimum=x_best)
    before = measure(x_ref, x_ref, reference, reference, schedule, mixture, score, args.beta)
    print_table(measured(x, x_ref), before, best)
    print(f"\n{done.labels:,} labels, {time.perf_counter() - start:.0f} s. Figure: {plots.draw_run(out)}")


def print_table(after: Measured, before: Measured, best: optimum.Optimum) -> None:
    """The reference, the aligned policy, the best chain that a denoiser can make, and the best of all chains."""
    share = partial(optimum.attained_share, optimum=best)
    print(f"{'':32}{'before':>9}{'after':>9}{'best means':>13}{'exact optimum':>15}")
    for name, *values in (
        ("mean score", best.j_ref, after.score, best.score_gauss, best.score_star),
        ("KL to the reference (nats)", 0.0, after.kl, best.kl_gauss, best.kl_star),
        ("J = mean score - beta KL", best.j_ref, after.j, best.j_gauss, best.j_star),
        ("attained share", 0.0, share(after.j), 1.0, share(best.j_star)),
        ("win rate against before", before.win_rate, after.win_rate),
        ("samples within 3 sd of a mode", before.on_data, after.on_data),
    ):
        print(f"{name:32}" + "".join(f"{v:{w}.3f}" for v, w in zip(values, (9, 9, 13, 15), strict=False)))


def comparisons(epoch: int, new: Comparisons) -> list[dict]:
    """One row of labels.jsonl for each labelled pair: the two final points, their scores, and h."""
    points = new.chains.x[-1].view(-1, 2, 2).tolist()
    return [
        {"epoch": epoch, "points": p, "scores": s, "h": h}
        for p, s, h in zip(points, new.scores.tolist(), new.h.tolist(), strict=True)
    ]


if __name__ == "__main__":
    main()

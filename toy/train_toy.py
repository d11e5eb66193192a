"""Align a 2D diffusion model from pairwise preferences, by Eq. 14 and by the whole chain.

    python toy/train_toy.py

First a small DDPM of a mixture, or a rectified flow (--model flow), is trained: the reference.
From it, with one seed, each loss of d3po.py trains an adapter (align.py): epoch after epoch, pairs
of chains are sampled from one x_T each and labelled by an analytic score. --loss eq14 takes the
paper's loss alone, --loss chain the whole chain. The run leaves in --out:

    config.json     the settings, and the numbers of the best that can be reached
    metrics.jsonl   a line for each epoch of each loss
    labels.jsonl    a line for each comparison of each loss
    policy.pt       name of each loss: weights after its last good epoch
    samples.npz     final points: before, after each loss, of the optimum, and epoch by epoch
    toy.png         these, and the share of the best chain that the labels bought

`python -m toy.plots RUN` draws toy.png again, and toy.gif: the samples over the epochs.
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
from toy.align import Epoch, PreferenceBatch, UpdateEvery, align, pair_loss
from toy.measure import Measurement, measure, sample
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES, Mixture, exact_denoiser, on_data


class Model(NamedTuple):
    alpha_bars: Tensor  # (1000,) of the model times
    make_schedule: Callable[[int, float], d3po.Schedule]  # (num_steps, eta); ValueError
    pretrain: Callable[[Mixture], nn.Module]


class Loss(NamedTuple):
    title: str
    function: Callable[..., Iterator[Tensor]]  # of d3po.py
    update_every: UpdateEvery
    lr: float  # default step size
    replay: int  # default number of batches of stored pairs that an epoch adds


PRETRAIN_STEPS = 5000
MODELS = {
    "ddpm": Model(
        ALPHA_BARS,
        partial(d3po.make_schedule, ALPHA_BARS),
        partial(ddpm.pretrain, steps=PRETRAIN_STEPS),
    ),
    "flow": Model(
        flow.ALPHA_BARS, flow.make_schedule, partial(flow.pretrain, steps=PRETRAIN_STEPS)
    ),
}
LOSSES = {
    "eq14": Loss("Eq. 14", d3po.d3po_losses, "timestep", lr=2e-3, replay=0),
    "chain": Loss("whole chain", d3po.chain_dpo_losses, "trajectory", lr=1e-2, replay=15),
    "eq12": Loss("Eq. 12", partial(d3po.d3po_losses, steps=[0]), "timestep", lr=1e-3, replay=0),
}
REPLAY_PAIRS = 128  # in a batch of stored pairs
LABELS = {"bradley-terry": d3po.bradley_terry, "greedy": d3po.preference}
SPACING = 0.1  # of the optimum's grid; its J err by 0.003
SAMPLES = 4000  # chains that the table is made from
WATCHED = 400  # chains that a line of metrics.jsonl and a frame of toy.gif are made from


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
        help="the score that compares points",
    )
    world.add_argument(
        "--labels",
        choices=LABELS,
        default="bradley-terry",
        help="the better point wins by the odds of Eq. 3, or always",
    )
    world.add_argument(
        "--model",
        choices=MODELS,
        default="ddpm",
        help="what is trained: a DDPM, or a rectified flow",
    )
    world.add_argument(
        "--reference",
        choices=["learned", "exact"],
        default="learned",
        help="the model before training: trained on samples, or the exact formula",
    )
    world.add_argument("--num-steps", type=int, default=20, help="denoising steps T")
    world.add_argument(
        "--eta", type=float, default=1.0, help="noise of DDIM's steps, above 0 and at most 1"
    )
    method = parser.add_argument_group("the method")
    method.add_argument(
        "--loss",
        choices=LOSSES,
        nargs="+",
        default=argparse.SUPPRESS,
        help="one or more, each from the same reference and seed; by default eq14 and chain",
    )
    method.add_argument("--beta", type=float, default=0.3, help="price of a nat of KL, in score")
    method.add_argument(
        "--lr",
        type=float,
        default=argparse.SUPPRESS,
        help="Adam's first step size, which falls to 0 as a cosine; by default the loss's own",
    )
    method.add_argument(
        "--epochs", type=int, default=15, help="how often pairs are sampled and trained on"
    )
    method.add_argument(
        "--pairs", type=int, default=256, help="pairs of chains in an epoch, with a label each"
    )
    method.add_argument(
        "--replay",
        type=int,
        default=argparse.SUPPRESS,
        help="batches of earlier pairs in an epoch; by default the loss's own",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the run")
    by_default = argparse.Namespace(loss=["eq14", "chain"], lr=None, replay=None)
    args = parser.parse_args(argv, by_default)

    for name in ("beta", "lr", "epochs", "pairs"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} {value}: give a positive number")
    if args.replay is not None and args.replay < 0:
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


def loss_settings(name: str, args: argparse.Namespace) -> dict:
    """Title, step size and replay of a loss, its own where the flags leave them open."""
    loss = LOSSES[name]
    return {
        "title": loss.title,
        "lr": loss.lr if args.lr is None else args.lr,
        "replay": loss.replay if args.replay is None else args.replay,
    }


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
    settings = {key: value for key, value in vars(args).items() if key not in ("lr", "replay")}
    config = settings | {
        "loss": {name: loss_settings(name, args) for name in args.loss},
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


class World(NamedTuple):
    """What every loss starts from, and what its policy is measured by."""

    mixture: Mixture
    score: Callable[[Tensor], Tensor]  # (B, 2) -> (B,)
    alpha_bars: Tensor  # (1000,) of the model times
    schedule: d3po.Schedule
    reference: d3po.Denoiser
    beta: float
    best: optimum.Optimum

    def measure(self, policy: ddpm.Adapter, x: Tensor, x_ref: Tensor) -> Measurement:
        """Compare states x of a policy with x_ref of the reference, from `sample` with one seed."""
        return measure(
            x,
            x_ref,
            policy,
            reference=policy.reference,
            schedule=self.schedule,
            mixture=self.mixture,
            score=self.score,
            beta=self.beta,
        )

    def new_policy(self) -> ddpm.Adapter:
        return ddpm.Adapter(self.reference, self.schedule, self.mixture, self.alpha_bars)


def make_world(args: argparse.Namespace) -> World:
    """Train the reference, and solve for the best that can be made of it."""
    mixture, score, model = MIXTURES[args.mixture], SCORES[args.preference], MODELS[args.model]
    schedule = model.make_schedule(args.num_steps, args.eta)
    if args.reference == "exact":
        reference = exact_denoiser(mixture, model.alpha_bars)
    else:
        reference = model.pretrain(mixture).requires_grad_(False)
    best = optimum.solve(reference, schedule, score, beta=args.beta, spacing=SPACING)
    return World(mixture, score, model.alpha_bars, schedule, reference, args.beta, best)


def train(
    name: str, policy: ddpm.Adapter, world: World, args: argparse.Namespace
) -> Iterator[Epoch]:
    """Alg. 1 with one loss; yield after each epoch."""
    loss, settings = LOSSES[name], loss_settings(name, args)
    return align(
        policy,
        world.schedule,
        pair_loss(loss.function, args.beta),
        reference=policy.reference,
        score=world.score,
        label=LABELS[args.labels],
        update_every=loss.update_every,
        lr=settings["lr"],
        epochs=args.epochs,
        pairs=args.pairs,
        replay=settings["replay"],
        replay_pairs=REPLAY_PAIRS,
        bridged=True,
        average=True,
    )


def metrics_row(name: str, number: int, epoch: Epoch, now: Measurement, world: World) -> dict:
    """A line of metrics.jsonl. Raises FloatingPointError for a number that is not finite."""
    row = {
        "loss_name": name,
        "epoch": number,
        "score": now.score,
        "kl": now.kl,
        "win_rate": now.win_rate,
        "on_data": now.on_data,
        "attained_share": optimum.attained_share(now.j, world.best),
        "accuracy": epoch.accuracy,
        "margin": world.beta * epoch.margin,
        "loss": epoch.loss,
        "labels": epoch.labels,
    }
    if not all(math.isfinite(value) for value in list(row.values())[1:]):
        raise FloatingPointError(f"epoch {number}: a measured number is not finite any more")
    return row


def label_rows(name: str, number: int, batch: PreferenceBatch) -> list[dict]:
    """Lines of labels.jsonl, one for each pair: the two final points, their scores, and h."""
    points = batch.trajectory.x[-1].view(-1, 2, 2).tolist()
    pairs = zip(points, batch.scores.tolist(), batch.h.tolist(), strict=True)
    start = {"loss_name": name, "epoch": number}
    return [start | {"points": p, "scores": s, "h": h} for p, s, h in pairs]


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
        f"preference {args.preference}, beta {args.beta:g}, T = {args.num_steps}, "
        f"seed {args.seed}. An epoch has {args.pairs} new pairs with {args.labels} labels."
    )
    for loss in config["loss"].values():
        print(
            f"{loss['title']}: lr {loss['lr']:g}, {loss['replay']} batches of stored pairs an epoch"
        )

    world = make_world(args)
    try:
        optimum.attained_share(world.best.j_ref, world.best)
    except ValueError as error:
        parser.error(str(error))
    write_config(out, config | {"optimum": world.best.numbers()})

    # Alg. 1 with each loss
    policies, points = {}, {}
    x_ref = sample(world.reference, world.schedule, WATCHED, seed=1)
    for name in args.loss:
        torch.manual_seed(args.seed)
        policy = policies[name] = world.new_policy()
        frames = [x_ref[-1]]
        training = train(name, policy, world, args)
        bar = tqdm(training, LOSSES[name].title, args.epochs, unit=" epochs", mininterval=0.5)
        try:
            for number, epoch in enumerate(bar, 1):
                x = sample(policy, world.schedule, WATCHED, seed=1)
                now = world.measure(policy, x, x_ref)
                row = metrics_row(name, number, epoch, now=now, world=world)
                append_lines(out / "metrics.jsonl", [row])
                append_lines(out / "labels.jsonl", label_rows(name, number, epoch.new))
                torch.save({k: p.state_dict() for k, p in policies.items()}, out / "policy.pt")
                frames.append(x[-1])
                bar.set_postfix_str(
                    f"score {now.score:.2f}, KL {now.kl:.2f}, accuracy {epoch.accuracy:.0%}"
                )
        except FloatingPointError as error:
            bar.close()
            sys.exit(
                f"{LOSSES[name].title}, {error}, so the run stops. Lower --lr (now "
                f"{config['loss'][name]['lr']:g}), or raise --beta (now {args.beta:g}) or --pairs "
                f"(now {args.pairs}). {out} has the epochs before it."
            )
        points[f"{name}_epochs"] = torch.stack(frames)

    columns, final = measure_policies(policies, world)
    np.savez(out / "samples.npz", **points, **final)
    print_table(columns)
    figure = plots.draw_run(out)
    seconds = time.perf_counter() - start
    print(f"\n{epoch.labels:,} labels for each loss, {seconds:.0f} s. Figure: {figure}")


def measure_policies(
    policies: dict[str, ddpm.Adapter], world: World
) -> tuple[dict[str, tuple[float, ...]], dict[str, Tensor]]:
    """The columns of the table by their titles, and final points by the names of samples.npz."""
    best, share = world.best, partial(optimum.attained_share, optimum=world.best)
    x_ref = sample(world.reference, world.schedule, SAMPLES, seed=2)
    before = on_data(world.mixture, x_ref[-1]).float().mean().item()
    columns = {"before": (best.j_ref, 0.0, best.j_ref, 0.0, 0.5, before)}
    points = {"before": x_ref[-1]}
    for name, policy in policies.items():
        x = sample(policy, world.schedule, SAMPLES, seed=2)
        now = world.measure(policy, x, x_ref)
        numbers = (now.score, now.kl, now.j, share(now.j), now.win_rate, now.on_data)
        columns[LOSSES[name].title] = numbers
        points[name] = x[-1]
    columns["best means"] = (best.score_gauss, best.kl_gauss, best.j_gauss, 1.0)
    star = (best.score_star, best.kl_star, best.j_star, share(best.j_star))
    columns["exact optimum"] = star
    x = optimum.sample_optimum(
        world.reference,
        world.schedule,
        world.score,
        beta=world.beta,
        optimum=best,
        x_T=x_ref[0, : plots.SHOWN],
    )
    points["optimum"] = x[-1]
    return columns, points


def print_table(columns: dict[str, tuple[float, ...]]) -> None:
    """Six numbers of each column; the last two exist for what was sampled only."""
    names = (
        "mean score",
        "KL to the reference (nats)",
        "J = mean score - beta KL",
        "attained share",
        "win rate against before",
        "samples within 3 sd of a mode",
    )
    widths = {title: max(9, len(title) + 2) for title in columns}
    print(" " * 31 + "".join(f"{title:>{width}}" for title, width in widths.items()))
    for k, name in enumerate(names):
        cells = [
            f"{numbers[k]:{widths[t]}.3f}" for t, numbers in columns.items() if k < len(numbers)
        ]
        print(f"{name:31}" + "".join(cells))


if __name__ == "__main__":
    main()

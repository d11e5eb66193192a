"""The losses of --loss on a labelled batch: those of d3po.py, and of the methods compared with.

Each is a function of (model, batch, args), where batch is a LabelledBatch of sd/memory.py, and of

    ref_log_prob (T, B): log-probs of the reference, nats.
    steps: actions to train on, in this order.
    generator: of the noises that some draw.

It yields a loss for each of the steps.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator

from torch import Tensor

import d3po
from sd.model import Model
from toy import baselines

# Methods that see scores; the others see preferences
SCORED = {"reward-weighted", "ddpo", "dpok"}


def of_pairs(function: Callable[..., Iterator[Tensor]]) -> Callable[..., Iterator[Tensor]]:
    """A loss of d3po.py, which sees log-ratios to the reference."""

    def losses(model: Model, batch, args: Namespace, *, ref_log_prob, steps, generator):
        options = {"cond": batch.cond, "steps": steps} | ({"clip": args.clip} if args.clip else {})
        chains, pairs = batch.trajectory, batch.pairs
        schedule = model.schedule
        return function(model.policy, schedule, chains, pairs, args.beta, ref_log_prob, **options)

    return losses


def baseline(
    function: Callable[..., Iterator[Tensor]], settings: Callable[..., dict], *, noise: bool = True
) -> Callable[..., Iterator[Tensor]]:
    """A loss of toy/baselines.py; settings: what it takes besides, from (model, batch, args)."""

    def losses(model: Model, batch, args: Namespace, *, ref_log_prob, steps, generator):
        options = settings(model, batch, args) | ({"generator": generator} if noise else {})
        options |= {"cond": batch.cond, "steps": steps}
        return function(model.policy, model.schedule, batch.trajectory, **options)

    return losses


def anchored(known: str, strength: str = "beta") -> Callable[..., dict]:
    """Settings of a baseline with a reference; known: what it sees, "pairs" or "scores"."""

    def settings(model: Model, batch, args: Namespace) -> dict:
        return {known: getattr(batch, known), "reference": model.reference, strength: args.beta}

    return settings


LOSSES = {
    "eq14": of_pairs(d3po.d3po_losses),
    "eq12": of_pairs(d3po.d3po_losses),  # on the first step alone
    "chain": of_pairs(d3po.chain_dpo_losses),
    "sft": baseline(baselines.preferred_losses, anchored("pairs", "kl_weight")),
    "reward-weighted": baseline(
        baselines.reward_weighted_losses,
        lambda model, batch, args: {"scores": batch.scores, "temperature": args.beta},
    ),
    "ddpo": baseline(
        baselines.ddpo_losses,
        lambda model, batch, args: {"scores": batch.scores, "clip": args.clip},
        noise=False,
    ),
    "dpok": baseline(baselines.dpok_losses, anchored("scores"), noise=False),
    "diffusion-dpo": baseline(baselines.diffusion_dpo_losses, anchored("pairs")),
}

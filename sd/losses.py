"""The losses of --loss on a labelled batch: those of d3po.py, and of the methods compared with."""

from collections.abc import Iterator

from torch import Generator, Tensor

import d3po
from sd.model import Model
from sd.options import Settings
from sd.replay import LabelledBatch
from toy import baselines


def step_losses(
    model: Model,
    batch: LabelledBatch,
    args: Settings,
    *,
    ref_log_prob: Tensor,
    steps: list[int],
    generator: Generator | None = None,
) -> Iterator[Tensor]:
    """A loss for each of the steps, in their order.

    ref_log_prob (T, B): log-probs of the reference, nats.
    generator: of the noise that some losses draw.
    """
    chains = model.policy, model.schedule, batch.trajectory
    pairs, scores, beta = batch.pairs, batch.scores, args.beta
    on = {"cond": batch.cond, "steps": steps}
    noise = {**on, "generator": generator}
    anchor = {"reference": model.reference}
    match args.loss:
        case "chain":
            return d3po.chain_dpo_losses(*chains, pairs, beta, ref_log_prob, **on)
        case "eq14":
            return d3po.d3po_losses(*chains, pairs, beta, ref_log_prob, clip=args.clip, **on)
        case "eq12":  # Eq. 14 on the first step alone
            on["steps"] = [0]
            return d3po.d3po_losses(*chains, pairs, beta, ref_log_prob, clip=args.clip, **on)
        case "sft":
            more = {**anchor, **noise, "kl_weight": beta}
            return baselines.preferred_losses(*chains, pairs=pairs, **more)
        case "diffusion-dpo":
            more = {**anchor, **noise, "beta": beta}
            return baselines.diffusion_dpo_losses(*chains, pairs=pairs, **more)
        case "reward-weighted":
            more = {**noise, "temperature": beta}
            return baselines.reward_weighted_losses(*chains, scores=scores, **more)
        case "ddpo":
            return baselines.ddpo_losses(*chains, scores=scores, clip=args.clip, **on)
        case "dpok":
            return baselines.dpok_losses(*chains, scores=scores, beta=beta, **anchor, **on)

"""Alg. 1 in the plane: the loop that train_toy.py, compare.py and the notebooks share."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import d3po

MAX_GRAD_NORM = 1.0  # Table 2


class Comparisons(NamedTuple):
    """Labelled pairs of chains; pair n is chains 2n and 2n + 1."""

    chains: d3po.Trajectory  # x (T+1, 2N, 2), log_prob (T, 2N) of the policy that sampled
    scores: Tensor  # (N, 2)
    h: Tensor  # (N,) in {+1, -1, 0}
    ref_log_prob: Tensor  # (T, 2N)

    def select(self, n: Tensor) -> "Comparisons":
        """The pairs with numbers n (M,)."""
        rows = torch.stack([2 * n, 2 * n + 1], 1).flatten()
        chains = d3po.Trajectory(self.chains.x[:, rows], self.chains.log_prob[:, rows])
        return Comparisons(chains, self.scores[n], self.h[n], self.ref_log_prob[:, rows])

    def join(self, other: "Comparisons") -> "Comparisons":
        """These pairs followed by the others."""
        chains = d3po.Trajectory(*(torch.cat(pair, 1) for pair in zip(self.chains, other.chains, strict=True)))
        both = torch.cat([self.scores, other.scores]), torch.cat([self.h, other.h])
        return Comparisons(chains, *both, torch.cat([self.ref_log_prob, other.ref_log_prob], 1))


Losses = Callable[[d3po.Denoiser, d3po.Schedule, Comparisons], Iterator[Tensor]]


def by_pairs(function: Callable[..., Iterator[Tensor]], beta: float, **options) -> Losses:
    """A loss of d3po.py, such as d3po_losses, on the labelled pairs."""

    def losses(policy, schedule, seen):
        pairs = d3po.pairs_from_feedback(seen.h)
        return function(policy, schedule, seen.chains, pairs, beta, seen.ref_log_prob, **options)

    return losses


class Epoch(NamedTuple):
    """What `align` tells after each epoch; accuracy and margin were taken before it trained on these pairs."""

    new: Comparisons
    labels: int  # comparisons made so far
    loss: float  # mean over the updates of the epoch; 0 if there was none, as all pairs were ties
    accuracy: float  # share of the pairs whose winner has the larger log(pi / pi_ref), equal ones counting half
    margin: float  # mean of log(pi / pi_ref)(winner) - log(pi / pi_ref)(loser) over whole chains, nats


def align(policy: nn.Module, reference: d3po.Denoiser | None, schedule: d3po.Schedule,
          score: Callable[[Tensor], Tensor], label: Callable[[Tensor, Tensor], Tensor], losses: Losses, each_step: bool,
          lr: float, epochs: int, pairs: int, replay: int = 0) -> Iterator[Epoch]:
    """Train a policy from labelled pairs of its own chains; yield after each epoch. Line numbers are those of Alg. 1.

    reference: None for the policy that sampled, a reference that moves. score (B, 2) -> (B,), label (score_a, score_b)
    -> h. losses: the method, as an iterator of losses over the steps. each_step: update the weights at every loss (line
    33), or once after the last. lr: Adam's step size at the start; it falls to 0 as a cosine. pairs: comparisons an
    epoch. replay: after the new pairs, an epoch also trains on this many batches, each of 2 * pairs drawn from all the
    pairs so far (Alg. 1 has none: 0). Uses torch's global generator.
    Raises FloatingPointError at the first score, loss or weight that is not finite.
    """
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    memory = None

    def update():
        nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(1, epochs + 1):  # line 2
        x_T = torch.randn(pairs, 2).repeat_interleave(2, 0)  # lines 4-5
        chains = d3po.rollout(policy, schedule, x_T)  # lines 6-11
        scores = score(chains.x[-1]).view(pairs, 2)
        _finite(scores, f"epoch {epoch}: a sample's score")
        h = label(*scores.unbind(1))  # lines 12-22
        moving = reference is None
        ref_log_prob = chains.log_prob if moving else d3po.trajectory_log_prob(reference, schedule, chains)  # line 31
        new = Comparisons(chains, scores, h, ref_log_prob)
        memory = new if memory is None or replay == 0 else memory.join(new)

        total, number = 0.0, 0
        for k in range(1 + replay):
            seen = new if k == 0 else memory.select(torch.randperm(len(memory.h))[: 2 * pairs])
            for loss in losses(policy, schedule, seen):  # lines 24-35
                _finite(loss, f"epoch {epoch}: the loss")
                loss.backward()
                if each_step:
                    update()
                total, number = total + loss.item(), number + each_step
            if not each_step:
                update()
                number += 1
        for weight in weights:
            _finite(weight, f"epoch {epoch}: a weight")
        cosine.step()

        winner, loser = d3po.pairs_from_feedback(h).T
        log_ratio = (chains.log_prob - new.ref_log_prob).sum(0)
        margin = log_ratio[winner] - log_ratio[loser] if len(winner) else torch.zeros(1)
        accuracy = ((margin > 0).float() + (margin == 0).float() / 2).mean()
        yield Epoch(new, epoch * pairs, total / max(number, 1), accuracy.item(), margin.mean().item())


def _finite(x: Tensor, what: str) -> None:
    if not x.isfinite().all():
        raise FloatingPointError(f"{what} is not finite any more")

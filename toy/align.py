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

    def redrawn(self, schedule: d3po.Schedule, reference: d3po.Denoiser) -> "Comparisons":
        """The same final points, labels and x_T, on new chains between them (`redraw`)."""
        chains = self.chains._replace(x=redraw(schedule, self.chains.x))
        return self._replace(chains=chains, ref_log_prob=d3po.trajectory_log_prob(reference, schedule, chains))


def redraw(schedule: d3po.Schedule, x: Tensor) -> Tensor:
    """Draw the states between x_T and y = x[T-2] anew, from the noising process between these two (DDIM, Eq. 7).

        x[i+1] = sqrt(ab_prev) y + sqrt(1 - ab_prev - sigma^2) (x[i] - sqrt(ab) y) / sqrt(1 - ab) + sigma z

    with alpha-bars relative to that of y, and the sigma that belongs to them. h depends on the final point alone, so it
    holds for every chain that leads there; a policy that sees a pair on one chain only learns that chain's noise by
    heart. For the exact denoiser and small steps these are the chains of the reference, and of pi*, given both ends.
    The last two actions stay: at low noise their sigma is far smaller than what the noising process leaves open.
    x (T+1, B, *D): stored chains. Returns (T+1, B, *D).
    """
    end = max(len(x) - 3, 1)
    y, states = x[end], [x[0]]
    for i in range(end - 1):
        left, left_prev = 1 - schedule.alpha_bar[i], 1 - schedule.alpha_bar_prev[i]
        ab, ab_prev = (bar[i] / schedule.alpha_bar[end] for bar in (schedule.alpha_bar, schedule.alpha_bar_prev))
        sigma = schedule.sigma[i] * ((1 - ab_prev) / left_prev * left / (1 - ab)).sqrt()
        noise = (1 - ab_prev - sigma**2).clamp(min=0).sqrt()
        mean = ab_prev.sqrt() * y + noise * (states[-1] - ab.sqrt() * y) / (1 - ab).sqrt()
        states.append(mean + sigma * torch.randn_like(y))
    return torch.cat([torch.stack(states), x[end:]])


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
          lr: float, epochs: int, pairs: int, replay: int = 0, redrawn: bool = False,
          average: bool = False) -> Iterator[Epoch]:
    """Train a policy from labelled pairs of its own chains; yield after each epoch. Line numbers are those of Alg. 1.

    reference: None for the policy that sampled, a reference that moves. score (B, 2) -> (B,), label (score_a, score_b)
    -> h. losses: the method, as an iterator of losses over the steps. each_step: update the weights at every loss (line
    33), or once after the last. lr: Adam's step size at the start; it falls to 0 as a cosine. pairs: comparisons an
    epoch. replay: after the new pairs, an epoch also trains on this many batches, each of 2 * pairs drawn from all the
    pairs so far (Alg. 1 has none: 0). redrawn: these on chains drawn anew (`redraw`).
    average: at each yield the policy has the average of its weights after the epochs so far, in which epoch n enters
    with weight 10 / (n + 9) (Shamir & Zhang 2013), so about the last tenth of them: the step size that learns fastest
    leaves noise in the weights, and the KL grows with its square. Sampling and training go on from the weights
    themselves. Uses torch's global generator. Raises ValueError for redrawn chains with a reference that moves, and
    FloatingPointError at the first score, loss or weight that is not finite.
    """
    if redrawn and reference is None:
        raise ValueError("redrawn chains need a reference that stays: give one, or redrawn=False")
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    memory, own = None, [w.detach().clone() for w in weights]
    mean = own

    def update():
        nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(1, epochs + 1):  # line 2
        _set(weights, own)
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
            seen = seen.redrawn(schedule, reference) if redrawn and k else seen
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
        own = [w.detach().clone() for w in weights]
        if average:
            mean = [m.lerp(w, 10 / (epoch + 9)) for m, w in zip(mean, own, strict=True)]
            _set(weights, mean)

        winner, loser = d3po.pairs_from_feedback(h).T
        log_ratio = (chains.log_prob - new.ref_log_prob).sum(0)
        margin = log_ratio[winner] - log_ratio[loser] if len(winner) else torch.zeros(1)
        accuracy = ((margin > 0).float() + (margin == 0).float() / 2).mean()
        yield Epoch(new, epoch * pairs, total / max(number, 1), accuracy.item(), margin.mean().item())


@torch.no_grad()
def _set(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _finite(x: Tensor, what: str) -> None:
    if not x.isfinite().all():
        raise FloatingPointError(f"{what} is not finite any more")

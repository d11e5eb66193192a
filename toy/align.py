"""Alg. 1 in the plane: the loop that train_toy.py, compare.py and the notebooks share."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import d3po

MAX_GRAD_NORM = 1.0  # Table 2

UpdateEvery = Literal["timestep", "trajectory"]


class PreferenceBatch(NamedTuple):
    """N labelled pairs of chains; pair n is chains 2n and 2n + 1."""

    trajectory: d3po.Trajectory  # x (T+1, 2N, 2), log_prob (T, 2N) of the policy that sampled
    scores: Tensor  # (N, 2)
    h: Tensor  # (N,) in {+1, -1, 0}
    ref_log_prob: Tensor  # (T, 2N)

    def select(self, n: Tensor) -> "PreferenceBatch":
        """The pairs with numbers n (M,)."""
        rows = torch.stack([2 * n, 2 * n + 1], 1).flatten()
        x, log_prob = self.trajectory.x[:, rows], self.trajectory.log_prob[:, rows]
        return PreferenceBatch(
            trajectory=d3po.Trajectory(x, log_prob),
            scores=self.scores[n],
            h=self.h[n],
            ref_log_prob=self.ref_log_prob[:, rows],
        )

    def join(self, other: "PreferenceBatch") -> "PreferenceBatch":
        """These pairs followed by the others."""
        x = torch.cat([self.trajectory.x, other.trajectory.x], 1)
        log_prob = torch.cat([self.trajectory.log_prob, other.trajectory.log_prob], 1)
        return PreferenceBatch(
            trajectory=d3po.Trajectory(x, log_prob),
            scores=torch.cat([self.scores, other.scores]),
            h=torch.cat([self.h, other.h]),
            ref_log_prob=torch.cat([self.ref_log_prob, other.ref_log_prob], 1),
        )

    def bridged(self, schedule: d3po.Schedule, reference: d3po.Denoiser) -> "PreferenceBatch":
        """The same labels, x_T and last three states, with states drawn anew between them.

        h depends on the final point alone, so it holds for every trajectory that leads there; a
        policy that sees a pair on one trajectory only learns that one's noise by heart. The last
        two actions stay: their sigma is far smaller than what the noising process leaves open.
        """
        x = self.trajectory.x
        end = max(len(x) - 3, 1)
        states = d3po.bridge(schedule, x[0], x[end], end=end)
        trajectory = self.trajectory._replace(x=torch.cat([states, x[end + 1 :]]))
        ref_log_prob = d3po.trajectory_log_prob(reference, schedule, trajectory)
        return self._replace(trajectory=trajectory, ref_log_prob=ref_log_prob)


Losses = Callable[[d3po.Denoiser, d3po.Schedule, PreferenceBatch], Iterator[Tensor]]


def pair_loss(function: Callable[..., Iterator[Tensor]], beta: float, **options) -> Losses:
    """A loss of d3po.py, such as d3po_losses, on the labelled pairs."""

    def losses(policy, schedule, batch):
        pairs = d3po.pairs_from_feedback(batch.h)
        ref_log_prob = batch.ref_log_prob
        return function(policy, schedule, batch.trajectory, pairs, beta, ref_log_prob, **options)

    return losses


class Epoch(NamedTuple):
    """What `align` yields; accuracy and margin were taken before it trained on these pairs."""

    new: PreferenceBatch
    labels: int  # comparisons made so far
    loss: float  # sum of the losses over the number of updates; 0 if all pairs were ties
    accuracy: float  # share of the margins that are positive, zeros counting half
    margin: float  # mean of `log_ratio_margins`, nats


def align(
    policy: nn.Module,
    schedule: d3po.Schedule,
    losses: Losses,
    *,
    reference: d3po.Denoiser | Literal["previous"],
    score: Callable[[Tensor], Tensor],
    label: Callable[[Tensor, Tensor], Tensor],
    update_every: UpdateEvery,
    lr: float,
    epochs: int,
    pairs: int,
    replay: int = 0,
    replay_pairs: int | None = None,
    bridged: bool = False,
    average: bool = False,
    chains_per_x_T: int = 2,
) -> Iterator[Epoch]:
    """Train a policy from labelled pairs of its own chains; yield after each epoch.

    Line numbers are those of Alg. 1. Uses torch's global generator.

    losses: the method, as an iterator of losses over the steps.
    reference: a denoiser, or "previous", the policy that sampled the pairs.
    score: (B, 2) -> (B,). label: (score_a, score_b) -> h.
    update_every: "timestep" updates the weights at every loss (line 33), "trajectory" once, after
        the last.
    lr: Adam's step size at the start; it falls to 0 as a cosine.
    pairs: comparisons an epoch.
    replay: after the new pairs, an epoch trains on this many batches, each of replay_pairs (by
        default 2 * pairs) drawn from all the pairs so far (Alg. 1 has none: 0).
    bridged: those on trajectories drawn anew (`PreferenceBatch.bridged`).
    average: at each yield the policy has the average of its weights after the epochs so far; epoch
        n enters with weight 10 / (n + 9) (Shamir & Zhang 2013), so it is about the last tenth of
        them. The step size that learns fastest leaves noise in the weights, and the KL grows with
        its square. Sampling and training go on from the weights themselves.

    chains_per_x_T: chains that start from one noise: 2 is a pair, 1 gives each chain its own; it
        divides 2 * pairs.

    Raises ValueError for bridged batches with reference="previous", and FloatingPointError at the
    first score, loss or weight that is not finite.
    """
    if bridged and reference == "previous":
        raise ValueError("bridged batches need a reference that stays: give one, or bridged=False")
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    replay_pairs = replay_pairs or 2 * pairs
    memory = None
    trained = averaged = [w.detach().clone() for w in weights]

    def update():
        nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(1, epochs + 1):  # line 2
        # Sample pairs of chains, and label them
        _set_weights(weights, trained)
        x_T = torch.randn(2 * pairs // chains_per_x_T, 2)  # lines 4-5
        x_T = x_T.repeat_interleave(chains_per_x_T, 0)
        trajectory = d3po.rollout(policy, schedule, x_T)  # lines 6-11
        scores = score(trajectory.x[-1]).view(pairs, 2)
        _check_finite(scores, f"epoch {epoch}: a sample's score")
        h = label(scores[:, 0], scores[:, 1])  # lines 12-22
        if reference == "previous":
            ref_log_prob = trajectory.log_prob
        else:
            ref_log_prob = d3po.trajectory_log_prob(reference, schedule, trajectory)  # line 31
        new = PreferenceBatch(trajectory, scores, h, ref_log_prob=ref_log_prob)
        memory = new if memory is None or replay == 0 else memory.join(new)

        # Train on the new pairs, then on earlier ones
        total, updates = 0.0, 0
        for k in range(1 + replay):
            batch = new
            if k > 0:
                batch = memory.select(torch.randperm(len(memory.h))[:replay_pairs])
                batch = batch.bridged(schedule, reference) if bridged else batch
            for loss in losses(policy, schedule, batch):  # lines 24-35
                _check_finite(loss, f"epoch {epoch}: the loss")
                loss.backward()
                total += loss.item()
                if update_every == "timestep":
                    update()
                    updates += 1
            if update_every == "trajectory":
                update()
                updates += 1
        for weight in weights:
            _check_finite(weight, f"epoch {epoch}: a weight")
        cosine.step()

        trained = [w.detach().clone() for w in weights]
        if average:
            pace = 10 / (epoch + 9)
            averaged = [a.lerp(w, pace) for a, w in zip(averaged, trained, strict=True)]
            _set_weights(weights, averaged)

        margins = log_ratio_margins(new)
        yield Epoch(
            new=new,
            labels=epoch * pairs,
            loss=total / max(updates, 1),
            accuracy=((margins > 0).float() + (margins == 0).float() / 2).mean().item(),
            margin=margins.mean().item(),
        )


def log_ratio_margins(batch: PreferenceBatch) -> Tensor:
    """log(pi / pi_ref)(winner) - log(pi / pi_ref)(loser), pi the policy that sampled: (P,), nats.

    Summed over the steps. Without any winner, one margin of 0.
    """
    winner, loser = d3po.pairs_from_feedback(batch.h).T
    log_ratio = (batch.trajectory.log_prob - batch.ref_log_prob).sum(0)
    return log_ratio[winner] - log_ratio[loser] if len(winner) else torch.zeros(1)


@torch.no_grad()
def _set_weights(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _check_finite(x: Tensor, what: str) -> None:
    if not x.isfinite().all():
        raise FloatingPointError(f"{what} is not finite any more")

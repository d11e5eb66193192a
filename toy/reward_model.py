"""The road that D3PO leaves out: a reward model fitted to the labels, then DPOK or pairs on it."""

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d3po
from toy import baselines
from toy.align import PreferenceBatch

WIDTH, LR, STEPS = 64, 3e-3, 10  # of the reward model; STEPS: of Adam on each batch of labels
COPIES = 16  # of a pair, to write its soft label as winners and losers


class RewardModelDPOK:
    """A loss for `toy.align.align`: both stages, so that both see the labels as they come.

    Each batch of labels first improves the reward model r, by maximum likelihood:

        L = - mean log logistic(r(winner) - r(loser))                                     (Eq. 4)

    Then DPOK makes its update on trajectories from the same x_T drawn anew, which only r scores. So
    one epoch with replay has as many updates as a method that learns from labels directly, and its
    further samples cost no label. One object is for one run.

    seconds: what the reward model took so far, fitting and scoring.
    """

    def __init__(self):
        self.net = nn.Sequential(
            *(nn.Linear(2, WIDTH), nn.SiLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.SiLU()),
            nn.Linear(WIDTH, 1),
        )
        self.optimizer = torch.optim.Adam(self.net.parameters(), LR)
        self.seconds = 0.0

    def __call__(
        self, policy, schedule, batch: PreferenceBatch, *, reference, value: float
    ) -> Iterator[Tensor]:
        """value: beta of the second stage."""
        trajectory = d3po.rollout(policy, schedule, batch.trajectory.x[0])
        started = time.perf_counter()
        self.fit(batch.trajectory.x[-1, d3po.pairs_from_feedback(batch.h)])
        scores = self.scores(trajectory.x[-1])
        self.seconds += time.perf_counter() - started
        return self.climb(
            policy, schedule, trajectory, reference=reference, scores=scores, beta=value
        )

    def climb(self, policy, schedule, trajectory, *, reference, scores, beta) -> Iterator[Tensor]:
        """The second stage: one update's losses on trajectories that the reward model scored."""
        return baselines.dpok_losses(
            policy, schedule, trajectory, reference=reference, scores=scores, beta=beta
        )

    def fit(self, points: Tensor) -> None:
        """Steps of Adam on Eq. 4 for points (P, 2, 2): winners and losers."""
        for _ in range(STEPS if len(points) else 0):
            winner, loser = self.net(points).squeeze(2).T
            loss = -F.logsigmoid(winner - loser).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def scores(self, points: Tensor) -> Tensor:
        """r (B,) of points (B, 2)."""
        return self.net(points).squeeze(1)


class RewardModelChain(RewardModelDPOK):
    """The same, but the second stage is Eq. 5 on the whole chain, of pairs that r labels."""

    def climb(self, policy, schedule, trajectory, *, reference, scores, beta) -> Iterator[Tensor]:
        ref_log_prob = d3po.trajectory_log_prob(reference, schedule, trajectory)
        pairs = soft_pairs(scores.view(-1, 2))
        return d3po.chain_dpo_losses(policy, schedule, trajectory, pairs, beta, ref_log_prob)


def soft_pairs(scores: Tensor) -> Tensor:
    """Rows (winner, loser) (COPIES N, 2) of pairs scored (N, 2): soft labels by Eq. 3.

    Of a pair's COPIES rows the first chain wins the share logistic(its score - the other's), to the
    nearest row. A chain goes through the network once, however many rows name it.
    """
    p = torch.sigmoid(scores[:, 0] - scores[:, 1])
    u = (torch.arange(COPIES) + 0.5) / COPIES
    h = torch.where(u < p[:, None], 1, -1)  # (N, COPIES)
    rows = d3po.pairs_from_feedback(h.T.flatten())  # as if each copy had chains of its own
    return rows % scores.numel()

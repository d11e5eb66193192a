"""The road that D3PO leaves out: a reward model fitted to the labels, and DPOK that climbs it."""

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d3po
from toy import baselines
from toy.align import PreferenceBatch

WIDTH, LR, STEPS = 64, 3e-3, 10  # of the reward model; STEPS: of Adam on each batch of labels


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
        """value: DPOK's beta."""
        trajectory = d3po.rollout(policy, schedule, batch.trajectory.x[0])
        started = time.perf_counter()
        self.fit(batch.trajectory.x[-1, d3po.pairs_from_feedback(batch.h)])
        scores = self.scores(trajectory.x[-1])
        self.seconds += time.perf_counter() - started
        return baselines.dpok_losses(
            policy, schedule, trajectory, reference=reference, scores=scores, beta=value
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

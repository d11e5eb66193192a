"""What a run reports: score, KL, J = E[r] - beta KL, win rate, and the share on the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import d3po
from toy.worlds import Mixture, on_data


class Measurement(NamedTuple):
    """Averages over B trajectories of a policy. Made by `measure`."""

    score: float  # E[r], mean score of the final points
    kl: float  # KL(trajectory || the reference's) in nats
    j: float  # E[r] - beta KL
    j_sem: float  # its standard error
    win_rate: float  # share better than the reference from the same noise, a tie counting half
    on_data: float  # share of final points within 3 sd of a mode


def step_kl(
    policy: d3po.Denoiser,
    reference: d3po.Denoiser,
    schedule: d3po.Schedule,
    i: int,
    x: Tensor,
    cond: Any = None,
) -> Tensor:
    """KL of action i to the reference's in states x (B, *D): (B,), nats.

        KL_i = |mu - mu_ref|^2 / (2 sigma_i^2)

    The gradient is the policy's.
    """
    with torch.no_grad():
        mean_ref = d3po.policy_mean(reference, schedule, i, x, cond)
    mean = d3po.policy_mean(policy, schedule, i, x, cond)
    return (mean - mean_ref).square().flatten(1).sum(1) / (2 * schedule.sigma[i] ** 2)


@torch.no_grad()
def trajectory_kl(
    policy: d3po.Denoiser,
    reference: d3po.Denoiser,
    schedule: d3po.Schedule,
    x: Tensor,
) -> Tensor:
    """Sum of `step_kl` along states x (T+1, B, 2) that the policy sampled: (B,), nats.

    Its mean is an unbiased estimate of the KL of the policy's trajectories to the reference's.
    """
    steps = range(len(schedule.sigma))
    return sum(step_kl(policy, reference, schedule, i=i, x=x[i]) for i in steps)


def sample(denoiser: d3po.Denoiser, schedule: d3po.Schedule, n: int, seed: int) -> Tensor:
    """States (T+1, n, 2) whose x_T and noises depend on the seed alone, whatever the denoiser."""
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(n, 2, generator=generator)
    return d3po.rollout(denoiser, schedule, x_T, generator=generator).x


def measure(
    x: Tensor,
    x_ref: Tensor,
    policy: d3po.Denoiser,
    reference: d3po.Denoiser,
    schedule: d3po.Schedule,
    mixture: Mixture,
    score: Callable[[Tensor], Tensor],
    beta: float,
) -> Measurement:
    """Compare states x of a policy with x_ref of the reference.

    x, x_ref (T+1, B, 2): from `sample` with one seed. beta: of J, score per nat.
    """
    r, r_ref = score(x[-1]), score(x_ref[-1])
    kl = trajectory_kl(policy, reference, schedule, x=x)
    j = r - beta * kl
    wins = (r > r_ref).float() + (r == r_ref).float() / 2
    return Measurement(
        score=r.mean().item(),
        kl=kl.mean().item(),
        j=j.mean().item(),
        j_sem=j.std().item() / len(j) ** 0.5,
        win_rate=wins.mean().item(),
        on_data=on_data(mixture, x[-1]).float().mean().item(),
    )

"""What a run reports: score, KL to the reference chain, their objective J, win rate and closeness to the data."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import d3po
from toy.worlds import Mixture, on_data


class Measured(NamedTuple):
    """Averages over B chains of a policy. Made by `measure`."""

    score: float  # E[r], mean score of the final points
    kl: float  # KL(chain || reference chain) in nats
    j: float  # E[r] - beta KL
    j_sem: float  # its standard error
    win_rate: float  # share of chains that score better than the reference's from the same noise; a tie counts half
    on_data: float  # share of final points within 3 sd of a mode


def step_kl(policy: d3po.Denoiser, reference: d3po.Denoiser, schedule: d3po.Schedule, i: int, x: Tensor) -> Tensor:
    """KL of one step's Gaussian to the reference's in states x (B, 2), |mu - mu_ref|^2 / (2 sigma_i^2): (B,), nats."""
    with torch.no_grad():
        mean_ref = d3po.policy_mean(reference, schedule, i, x)
    return (d3po.policy_mean(policy, schedule, i, x) - mean_ref).square().sum(1) / (2 * schedule.sigma[i] ** 2)


@torch.no_grad()
def chain_kl(policy: d3po.Denoiser, reference: d3po.Denoiser, schedule: d3po.Schedule, x: Tensor) -> Tensor:
    """KL of a chain of the policy to the reference chain, given its states: sum_i |mu - mu_ref|^2 / (2 sigma_i^2).

    x (T+1, B, 2): chains sampled from the policy. Returns (B,), nats; its mean is an unbiased estimate of the KL.
    """
    return sum(step_kl(policy, reference, schedule, i, x[i]) for i in range(len(schedule.sigma)))


def sample(denoiser: d3po.Denoiser, schedule: d3po.Schedule, chains: int, seed: int) -> Tensor:
    """Chains x (T+1, chains, 2) whose x_T and noises depend on the seed alone: equal for every denoiser."""
    generator = torch.Generator().manual_seed(seed)
    return d3po.rollout(denoiser, schedule, torch.randn(chains, 2, generator=generator), generator=generator).x


def measure(x: Tensor, x_ref: Tensor, policy: d3po.Denoiser, reference: d3po.Denoiser, schedule: d3po.Schedule,
            mixture: Mixture, score: Callable[[Tensor], Tensor], beta: float) -> Measured:
    """Compare chains x of a policy with chains x_ref of the reference, both (T+1, B, 2) from `sample` with one seed."""
    r, r_ref = score(x[-1]), score(x_ref[-1])
    kl = chain_kl(policy, reference, schedule, x)
    j = r - beta * kl
    win = (r > r_ref).float() + (r == r_ref).float() / 2
    averages = (a.mean().item() for a in (r, kl, j))
    near = on_data(mixture, x[-1]).float().mean().item()
    return Measured(*averages, j.std().item() / len(j) ** 0.5, win.mean().item(), near)

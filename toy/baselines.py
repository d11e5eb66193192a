"""The methods that the paper compares with, and later ones: iterators of losses like d3po.py's.

Every method gets the same trajectories of B chains, of any shape *D, and what it may know about
them: the scores (B,) of the final points, or the pairs (P, 2) of winners and losers. A loss is the
mean over the chains or pairs. All of them take

    cond: None or a tensor (B, ...), as in d3po.py.
    steps: actions to train on, in this order; by default all, shuffled by torch's global generator.
    generator: of the noise that some of them draw; by default torch's global one.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import d3po
from d3po import Denoiser, Schedule, Trajectory
from toy.measure import step_kl


def ddpo_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    scores: Tensor,
    clip: float,
    cond: Any = None,
    steps: list[int] | None = None,
) -> Iterator[Tensor]:
    """DDPO with importance sampling: PPO's clipped policy gradient, advantages normalised.

        L_i = - mean min(rho A, clamp(rho, 1 - clip, 1 + clip) A),    A = (r - mean r) / sd r
        rho = pi(a_i | s_i) / pi_sampling(a_i | s_i)

    Knows no KL: clip bounds how far one batch can change the policy. Equal scores: A = 0.
    Source: Black et al., arXiv 2305.13301, Sec. 4.3.
    """
    advantage = (scores - scores.mean()) / scores.std().clamp(min=1e-8)
    for i in _order(schedule, steps):
        rho = _ratio(policy, schedule, trajectory, i=i, cond=cond)
        clipped = rho.clamp(1 - clip, 1 + clip)
        yield -torch.minimum(rho * advantage, clipped * advantage).mean()


def dpok_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    reference: Denoiser,
    scores: Tensor,
    beta: float,
    cond: Any = None,
    steps: list[int] | None = None,
) -> Iterator[Tensor]:
    """DPOK: policy gradient, plus beta times the KL of each action to the reference's.

        L_i = mean(- rho A + beta KL_i),    A = r - mean r,    KL_i of `step_kl`

    The KL is differentiated at the sampled states, not through them.
    Source: Fan et al., arXiv 2305.16381, Sec. 4.2.
    """
    advantage = scores - scores.mean()
    for i in _order(schedule, steps):
        kl = step_kl(policy, reference, schedule, i=i, x=trajectory.x[i], cond=cond)
        rho = _ratio(policy, schedule, trajectory, i=i, cond=cond)
        yield (-rho * advantage + beta * kl).mean()


def reward_weighted_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    scores: Tensor,
    temperature: float,
    cond: Any = None,
    steps: list[int] | None = None,
    generator: Generator | None = None,
) -> Iterator[Tensor]:
    """Reward Weighted: denoising of the policy's own final samples, each weighted by its reward.

        L_i = mean w |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps)|^2
        w = exp(r / temperature) / its mean

    At infinite temperature it is plain denoising. Source: Lee et al., arXiv 2302.12192, Eq. 4, with
    the weights of reward-weighted regression (Peters & Schaal 2007), as scores can be negative.
    """
    weight = torch.softmax(scores / temperature, 0) * len(scores)
    x_0 = trajectory.x[-1]
    for i in _order(schedule, steps):
        eps = _noise(x_0, generator)
        error = _denoising_error(policy, schedule, i, x_0=x_0, eps=eps, cond=cond)
        yield (weight * error).mean()


def preferred_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    reference: Denoiser,
    pairs: Tensor,
    kl_weight: float,
    cond: Any = None,
    steps: list[int] | None = None,
    generator: Generator | None = None,
) -> Iterator[Tensor]:
    """Supervised fine-tuning on the preferred samples (paper, Table 1 b): denoising of the winners.

        L_i = mean |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps)|^2 + kl_weight mean KL_i

    The paper's is kl_weight = 0. Without an anchor it does not know where to stop. A sample that
    wins n pairs goes through the network once, with weight n.
    """
    winners, wins = pairs[:, 0].to(trajectory.x.device).unique(return_counts=True)
    x, cond = trajectory.x[:, winners], _rows(cond, winners)
    for i in _order(schedule, steps):
        eps = _noise(x[-1], generator)
        loss = _denoising_error(policy, schedule, i, x_0=x[-1], eps=eps, cond=cond)
        if kl_weight:
            kl = step_kl(policy, reference, schedule, i=i, x=x[i], cond=cond)
            loss = loss + kl_weight * kl
        yield (wins * loss).sum() / len(pairs)


def diffusion_dpo_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    reference: Denoiser,
    pairs: Tensor,
    beta: float,
    cond: Any = None,
    steps: list[int] | None = None,
    generator: Generator | None = None,
) -> Iterator[Tensor]:
    """Diffusion-DPO: like Eq. 14, on x_0 noised forwards in place of the states of the trajectory.

        L_i = - log logistic(- beta (e_w - e_w_ref - e_l + e_l_ref)),    e = |eps - eps_theta(x)|^2

    Source: Wallace et al., arXiv 2311.12908, Eq. 14, their weight T omega(lambda_t) inside beta.
    """
    both = pairs.T.flatten().to(trajectory.x.device)  # the winners, then the losers
    x_0, cond = trajectory.x[-1, both], _rows(cond, both)
    for i in _order(schedule, steps):
        eps = _noise(x_0[: len(pairs)], generator).repeat(2, *[1] * (x_0.ndim - 1))
        with torch.no_grad():
            error_ref = _denoising_error(reference, schedule, i, x_0=x_0, eps=eps, cond=cond)
        error = _denoising_error(policy, schedule, i, x_0=x_0, eps=eps, cond=cond)
        winner, loser = (error - error_ref).chunk(2)
        yield -F.logsigmoid(-beta * (winner - loser)).mean()


def grpo_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    scores: Tensor,
    clip: float,
    kl_weight: float = 0.0,
    reference: Denoiser | None = None,
    cond: Any = None,
    steps: list[int] | None = None,
) -> Iterator[Tensor]:
    """GRPO: DDPO's clipped loss, advantages normalised inside each group of K chains.

        L_i = mean(- min(rho A, clamp(rho, 1 - clip, 1 + clip) A) + kl_weight KL_i)
        A = (r - mean r of the group) / sd r of the group,    KL_i of `step_kl`

    scores (N, K): chain k of group n, one prompt's, is number n K + k. With K = 2, A says only who
    won. DanceGRPO has no KL. reference: for the KL; None without one. Equal scores: A = 0.
    Sources: Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818.
    """
    deviation = scores - scores.mean(1, keepdim=True)
    advantage = (deviation / scores.std(1, keepdim=True).clamp(min=1e-8)).flatten()
    for i in _order(schedule, steps):
        rho = _ratio(policy, schedule, trajectory, i=i, cond=cond)
        clipped = rho.clamp(1 - clip, 1 + clip)
        loss = -torch.minimum(rho * advantage, clipped * advantage)
        if kl_weight:
            x = trajectory.x[i]
            loss = loss + kl_weight * step_kl(policy, reference, schedule, i=i, x=x, cond=cond)
        yield loss.mean()


def nft_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    old: Denoiser,
    scores: Tensor,
    beta: float,
    kl_weight: float = 0.0,
    reference: Denoiser | None = None,
    cond: Any = None,
    steps: list[int] | None = None,
    generator: Generator | None = None,
) -> Iterator[Tensor]:
    """DiffusionNFT: denoising of final samples, by a positive and by a negative policy.

        L_i = mean(p |eps - eps_+|^2 + (1 - p) |eps - eps_-|^2 + kl_weight KL_i)
        eps_+ = (1 - beta) eps_old + beta eps_theta,    eps_- = (1 + beta) eps_old - beta eps_theta
        p = 1/2 + clamp((r - mean r of the group) / sd r, -1, 1) / 2

    Both policies are made from the one network in training and from `old`, which sampled: good
    samples pull eps_theta towards their noise, bad ones push it away from theirs. scores (N, K): as
    in `grpo_losses`; sd r is that of all. reference: for KL_i, of `step_kl` in the noised state.
    A smaller beta makes a longer step. Its authors predict a velocity, and their code divides the
    squares by the size of the error in x_0. Source: Zheng et al., arXiv 2509.16117.
    """
    deviation = scores - scores.mean(1, keepdim=True)
    optimality = (0.5 + (deviation / scores.std().clamp(min=1e-8)).clamp(-1, 1) / 2).flatten()
    x_0 = trajectory.x[-1]
    for i in _order(schedule, steps):
        eps = _noise(x_0, generator)
        x, time = _noised(schedule, i, x_0=x_0, eps=eps)
        with torch.no_grad():
            eps_old = old(x, time, cond)
        change = beta * (policy(x, time, cond) - eps_old)
        positive = (eps - eps_old - change).square().flatten(1).sum(1)
        negative = (eps - eps_old + change).square().flatten(1).sum(1)
        loss = optimality * positive + (1 - optimality) * negative
        if kl_weight:
            loss = loss + kl_weight * step_kl(policy, reference, schedule, i=i, x=x, cond=cond)
        yield loss.mean()


def _ratio(policy, schedule, trajectory, i, cond=None) -> Tensor:
    """pi(a_i | s_i) / pi_sampling(a_i | s_i): (B,)."""
    mean = d3po.policy_mean(policy, schedule, i, trajectory.x[i], cond)
    log_prob = d3po.log_prob(trajectory.x[i + 1], mean, schedule.sigma[i])
    return (log_prob - trajectory.log_prob[i]).exp()


def _denoising_error(denoiser, schedule, i, x_0, eps, cond) -> Tensor:
    """|eps - eps_theta|^2 (B,) at the noise level of step i, for x_0 (B, *D) noised with eps."""
    x, time = _noised(schedule, i, x_0=x_0, eps=eps)
    return (eps - denoiser(x, time, cond)).square().flatten(1).sum(1)


def _noised(schedule, i, x_0, eps) -> tuple[Tensor, Tensor]:
    """x_0 (B, *D) at the noise level of step i, and the model time (B,) of that level."""
    ab = schedule.alpha_bar[i]
    x = ab.sqrt() * x_0 + (1 - ab).sqrt() * eps
    return x, schedule.timesteps[i].to(x.device).expand(len(x))


def _noise(x: Tensor, generator: Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _rows(cond: Any, chains: Tensor) -> Any:
    return None if cond is None else cond[chains]


def _order(schedule: Schedule, steps: list[int] | None) -> list[int]:
    return torch.randperm(len(schedule.sigma)).tolist() if steps is None else list(steps)

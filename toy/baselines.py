"""The methods that the paper compares with, and Diffusion-DPO: iterators of losses like d3po.py's.

Every method gets the same trajectories of B chains, and what it may know about them: the scores
(B,) of the final points, or the pairs (P, 2) of winners and losers. Steps come in random order; a
loss is the mean over the chains or pairs.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

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
) -> Iterator[Tensor]:
    """DDPO with importance sampling: PPO's clipped policy gradient, advantages normalised.

        L_i = - mean min(rho A, clamp(rho, 1 - clip, 1 + clip) A),    A = (r - mean r) / sd r
        rho = pi(a_i | s_i) / pi_sampling(a_i | s_i)

    Knows no KL: clip bounds how far one batch can change the policy.
    Source: Black et al., arXiv 2305.13301, Sec. 4.3.
    """
    advantage = (scores - scores.mean()) / scores.std()
    for i in _random_order(schedule):
        rho = _ratio(policy, schedule, trajectory, i=i)
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
) -> Iterator[Tensor]:
    """DPOK: policy gradient, plus beta times the KL of each action to the reference's.

        L_i = mean(- rho A + beta KL_i),    A = r - mean r,    KL_i of `step_kl`

    The KL is differentiated at the sampled states, not through them.
    Source: Fan et al., arXiv 2305.16381, Sec. 4.2.
    """
    advantage = scores - scores.mean()
    for i in _random_order(schedule):
        kl = step_kl(policy, reference, schedule, i=i, x=trajectory.x[i])
        rho = _ratio(policy, schedule, trajectory, i=i)
        yield (-rho * advantage + beta * kl).mean()


def reward_weighted_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    scores: Tensor,
    temperature: float,
) -> Iterator[Tensor]:
    """Reward Weighted: denoising of the policy's own final samples, each weighted by its reward.

        L_i = mean w |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps)|^2
        w = exp(r / temperature) / its mean

    At infinite temperature it is plain denoising. Source: Lee et al., arXiv 2302.12192, Eq. 4, with
    the weights of reward-weighted regression (Peters & Schaal 2007), as scores can be negative.
    """
    weight = torch.softmax(scores / temperature, 0) * len(scores)
    x_0 = trajectory.x[-1]
    for i in _random_order(schedule):
        error = _denoising_error(policy, schedule, i, x_0=x_0, eps=torch.randn_like(x_0))
        yield (weight * error).mean()


def preferred_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    reference: Denoiser,
    pairs: Tensor,
    kl_weight: float,
) -> Iterator[Tensor]:
    """Supervised fine-tuning on the preferred samples (paper, Table 1 b): denoising of the winners.

        L_i = mean |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps)|^2 + kl_weight mean KL_i

    The paper's is kl_weight = 0. Without an anchor it does not know where to stop.
    """
    x = trajectory.x[:, pairs[:, 0]]
    for i in _random_order(schedule):
        error = _denoising_error(policy, schedule, i, x_0=x[-1], eps=torch.randn_like(x[-1]))
        yield (error + kl_weight * step_kl(policy, reference, schedule, i=i, x=x[i])).mean()


def diffusion_dpo_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    *,
    reference: Denoiser,
    pairs: Tensor,
    beta: float,
) -> Iterator[Tensor]:
    """Diffusion-DPO: like Eq. 14, on x_0 noised forwards in place of the states of the trajectory.

        L_i = - log logistic(- beta (e_w - e_w_ref - e_l + e_l_ref)),    e = |eps - eps_theta(x)|^2

    Source: Wallace et al., arXiv 2311.12908, Eq. 14, their weight T omega(lambda_t) inside beta.
    """
    winners, losers = trajectory.x[-1, pairs.T]
    for i in _random_order(schedule):
        eps = torch.randn_like(winners)
        with torch.no_grad():
            ref_w = _denoising_error(reference, schedule, i, x_0=winners, eps=eps)
            ref_l = _denoising_error(reference, schedule, i, x_0=losers, eps=eps)
        error_w = _denoising_error(policy, schedule, i, x_0=winners, eps=eps)
        error_l = _denoising_error(policy, schedule, i, x_0=losers, eps=eps)
        yield -F.logsigmoid(-beta * (error_w - ref_w - error_l + ref_l)).mean()


def _ratio(policy, schedule, trajectory, i) -> Tensor:
    """pi(a_i | s_i) / pi_sampling(a_i | s_i): (B,)."""
    mean = d3po.policy_mean(policy, schedule, i, trajectory.x[i])
    log_prob = d3po.log_prob(trajectory.x[i + 1], mean, schedule.sigma[i])
    return (log_prob - trajectory.log_prob[i]).exp()


def _denoising_error(denoiser, schedule, i, x_0, eps) -> Tensor:
    """|eps - eps_theta|^2 (B,) at the noise level of step i, for x_0 (B, 2) noised with eps."""
    ab = schedule.alpha_bar[i]
    x = ab.sqrt() * x_0 + (1 - ab).sqrt() * eps
    time = schedule.timesteps[i].expand(len(x_0))
    return (eps - denoiser(x, time, None)).square().sum(1)


def _random_order(schedule: Schedule) -> list[int]:
    return torch.randperm(len(schedule.sigma)).tolist()

"""The methods that the paper compares with, and Diffusion-DPO: each an iterator of losses over the steps, as d3po.py's.

Every method gets the same chains, x (T+1, B, 2) of `d3po.rollout`, and what it may know about them: the scores (B,) of
the final points, or the pairs (P, 2) of winners and losers. Steps come in random order; losses are means.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import d3po
from d3po import Denoiser, Schedule, Trajectory
from toy.measure import step_kl


def ddpo_losses(policy: Denoiser, schedule: Schedule, chains: Trajectory, scores: Tensor,
                clip: float) -> Iterator[Tensor]:
    """DDPO with importance sampling: PPO's clipped policy gradient, advantages normalised in the batch.

        L_i = - mean min(rho A, clamp(rho, 1 - clip, 1 + clip) A),   rho = pi(a_i | s_i) / pi_sampling(a_i | s_i)

    Knows no KL: clip bounds how far one batch can move the policy. Source: Black et al., arXiv 2305.13301, Sec. 4.3.
    """
    advantage = (scores - scores.mean()) / scores.std()
    for i in _random_order(schedule):
        rho = _ratio(policy, schedule, chains, i)
        yield -torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage).mean()


def dpok_losses(policy: Denoiser, reference: Denoiser, schedule: Schedule, chains: Trajectory, scores: Tensor,
                beta: float) -> Iterator[Tensor]:
    """DPOK: policy gradient, plus beta times the KL of each step's Gaussian to the reference's in closed form.

        L_i = mean(- rho A + beta KL_i),    KL_i = |mu - mu_ref|^2 / (2 sigma_i^2),    A = r - mean r

    The KL is differentiated at the sampled states, not through them. Source: Fan et al., arXiv 2305.16381, Sec. 4.2.
    """
    advantage = scores - scores.mean()
    for i in _random_order(schedule):
        kl = step_kl(policy, reference, schedule, i, chains.x[i])
        yield (-_ratio(policy, schedule, chains, i) * advantage + beta * kl).mean()


def reward_weighted_losses(policy: Denoiser, schedule: Schedule, chains: Trajectory, scores: Tensor,
                           temperature: float) -> Iterator[Tensor]:
    """Reward Weighted: denoising of the policy's own final samples, each weighted by exp(r / temperature).

        L_i = mean w |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps)|^2,    w = exp(r / temperature) / its mean

    At infinite temperature it is plain denoising. Source: Lee et al., arXiv 2302.12192, Eq. 4, with the exponential
    weights of reward-weighted regression (Peters & Schaal 2007), as our scores can be negative.
    """
    weight = torch.softmax(scores / temperature, 0) * len(scores)
    for i in _random_order(schedule):
        yield (weight * _denoising_error(policy, schedule, i, chains.x[-1], torch.randn_like(chains.x[-1]))).mean()


def preferred_losses(policy: Denoiser, reference: Denoiser, schedule: Schedule, chains: Trajectory, pairs: Tensor,
                     kl_weight: float) -> Iterator[Tensor]:
    """Supervised fine-tuning on the preferred samples (paper, Table 1 b): denoising of the winners.

        L_i = mean |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps)|^2 + kl_weight mean KL_i

    The paper's is kl_weight = 0. Without an anchor it does not know where to stop, so this one can have DPOK's.
    """
    winners = chains.x[:, pairs[:, 0]]
    for i in _random_order(schedule):
        error = _denoising_error(policy, schedule, i, winners[-1], torch.randn_like(winners[-1]))
        yield (error + kl_weight * step_kl(policy, reference, schedule, i, winners[i])).mean()


def diffusion_dpo_losses(policy: Denoiser, reference: Denoiser, schedule: Schedule, chains: Trajectory, pairs: Tensor,
                         beta: float) -> Iterator[Tensor]:
    """Diffusion-DPO: like Eq. 14, but on x_0 noised forwards in place of the states that the chain went through.

        L_i = - log logistic(- beta (e_w - e_w_ref - e_l + e_l_ref)),    e = |eps - eps_theta(x)|^2

    Source: Wallace et al., arXiv 2311.12908, Eq. 14, with their constant weight T omega(lambda_t) inside beta.
    """
    winners, losers = chains.x[-1, pairs.T]
    for i in _random_order(schedule):
        eps = torch.randn_like(winners)
        with torch.no_grad():
            ref_w, ref_l = (_denoising_error(reference, schedule, i, x, eps) for x in (winners, losers))
        error_w, error_l = (_denoising_error(policy, schedule, i, x, eps) for x in (winners, losers))
        yield -F.logsigmoid(-beta * (error_w - ref_w - error_l + ref_l)).mean()


def _ratio(policy, schedule, chains, i) -> Tensor:
    mean = d3po.policy_mean(policy, schedule, i, chains.x[i])
    return (d3po.log_prob(chains.x[i + 1], mean, schedule.sigma[i]) - chains.log_prob[i]).exp()


def _denoising_error(denoiser, schedule, i, x_0, eps) -> Tensor:
    """|eps - eps_theta|^2 (B,) at the noise level of step i, for x_0 (B, 2) noised with eps."""
    ab = schedule.alpha_bar[i]
    x, time = ab.sqrt() * x_0 + (1 - ab).sqrt() * eps, schedule.timesteps[i].expand(len(x_0))
    return (eps - denoiser(x, time, None)).square().sum(1)


def _random_order(schedule: Schedule) -> list[int]:
    return torch.randperm(len(schedule.sigma)).tolist()

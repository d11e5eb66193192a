"""The baselines against torch.distributions, REINFORCE by autograd, and their special cases."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import d3po
from toy import baselines
from toy.ddpm import Adapter
from toy.worlds import ALPHA_BARS, MIXTURES, exact_denoiser, reach

RING = MIXTURES["ring"]
REFERENCE = exact_denoiser(RING)
SCHEDULE = d3po.make_schedule(ALPHA_BARS, 10)


def a_policy(seed=0, size=0.3):
    """An adapter that is away from its reference."""
    torch.manual_seed(seed)
    policy = Adapter(REFERENCE, SCHEDULE, RING)
    torch.nn.init.normal_(policy.correction.mlp[-1].weight, std=size)
    return policy


@pytest.fixture
def sampled():
    """A policy, 32 chains of its own, and their scores."""
    policy = a_policy()
    trajectory = d3po.rollout(policy, SCHEDULE, torch.randn(16, 2).repeat_interleave(2, 0))
    return policy, trajectory, reach(trajectory.x[-1])


def test_ddpo_ratio_is_exactly_one_before_the_first_update(sampled):
    policy, trajectory, _ = sampled
    for i in range(len(SCHEDULE.sigma)):
        assert torch.equal(baselines._ratio(policy, SCHEDULE, trajectory, i=i), torch.ones(32))


# Images, with prompts


class Linear(torch.nn.Module):
    """eps = weight * x + bias of the prompt, for x (B, 2, 3, 4)."""

    def __init__(self, seed):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(2, 3, 4, generator=random) / 5)
        self.bias = torch.nn.Parameter(torch.randn(3, 2, 3, 4, generator=random) / 5)

    def forward(self, x, time, cond):
        return self.weight * x + self.bias[cond]


COND = torch.tensor([0, 0, 0, 2, 2, 2])  # two groups of three images
SCORES = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.5, -1.0])
PAIRS = d3po.pairs_from_scores(SCORES.view(2, 3))
POLICY, SAMPLED_BY, INITIAL = Linear(0), Linear(1), Linear(2)


def step_gaussian(denoiser, i, state, k):
    """The action of chain k in one state, by torch.distributions."""
    one = d3po.policy_mean(denoiser, SCHEDULE, i, state[k : k + 1], COND[k : k + 1])[0]
    return Independent(Normal(one, SCHEDULE.sigma[i]), 3)


def expected_losses(method, i, x, eps):
    """Each method's loss of step i, chain by chain, as its docstring says."""
    chains, ab = range(6), SCHEDULE.alpha_bar[i]
    log_ratio = [
        step_gaussian(POLICY, i, x[i], k).log_prob(x[i + 1, k])
        - step_gaussian(SAMPLED_BY, i, x[i], k).log_prob(x[i + 1, k])
        for k in chains
    ]
    kl = [
        kl_divergence(step_gaussian(POLICY, i, x[i], k), step_gaussian(INITIAL, i, x[i], k))
        for k in chains
    ]

    def error(denoiser, k, noise):
        noised = ab.sqrt() * x[-1, k] + (1 - ab).sqrt() * noise
        return ((noise - denoiser(noised[None], None, COND[k : k + 1])[0]) ** 2).sum()

    def group_deviation(k):
        first = k // 3 * 3
        group = SCORES[first : first + 3]
        return SCORES[k] - sum(group) / 3, (sum((group - sum(group) / 3) ** 2) / 2).sqrt()

    centred = SCORES - sum(SCORES) / 6
    if method is baselines.ddpo_losses:
        advantage = centred / (sum(centred**2) / 5).sqrt()
        losses = []
        for k in chains:
            rho = log_ratio[k].exp()
            bound = 1.1 if advantage[k] > 0 else 0.9
            beyond = rho > bound if advantage[k] > 0 else rho < bound
            losses.append(-(bound if beyond else rho) * advantage[k])
    elif method is baselines.grpo_losses:
        losses = []
        for k in chains:
            deviation, sd = group_deviation(k)
            rho = log_ratio[k].exp()
            losses.append(-min(rho * deviation, rho.clamp(0.9, 1.1) * deviation) / sd)
            losses[-1] = losses[-1] + 0.3 * kl[k]
    elif method is baselines.nft_losses:
        sd = (sum(centred**2) / 5).sqrt()
        losses = []
        for k in chains:
            p = (1 + max(-1, min(1, group_deviation(k)[0] / sd))) / 2

            def mixture(share):
                return lambda *x: (1 - share) * SAMPLED_BY(*x) + share * POLICY(*x)

            loss = p * error(mixture(0.7), k, eps[k]) + (1 - p) * error(mixture(-0.7), k, eps[k])
            noised = ab.sqrt() * x[-1, k] + (1 - ab).sqrt() * eps[k]
            at_noised = (
                step_gaussian(net, i, noised[None].expand(6, -1, -1, -1), k)
                for net in (POLICY, INITIAL)
            )
            losses.append(loss + 0.3 * kl_divergence(*at_noised))
    elif method is baselines.dpok_losses:
        losses = [-log_ratio[k].exp() * centred[k] + 0.3 * kl[k] for k in chains]
    elif method is baselines.reward_weighted_losses:
        weight = (SCORES / 0.7).exp()
        weight = weight / weight.mean()
        losses = [weight[k] * error(POLICY, k, eps[k]) for k in chains]
    elif method is baselines.preferred_losses:
        winners = sorted(set(PAIRS[:, 0].tolist()))
        noises = dict(zip(winners, eps, strict=False))
        losses = [error(POLICY, k, noises[k]) + 0.4 * kl[k] for k in PAIRS[:, 0].tolist()]
    else:
        losses = []
        for (winner, loser), noise in zip(PAIRS.tolist(), eps, strict=False):
            gain_w, gain_l = (
                error(INITIAL, k, noise) - error(POLICY, k, noise) for k in (winner, loser)
            )
            losses.append((1 + (-5e-4 * (gain_w - gain_l)).exp()).log())
    return sum(losses) / len(losses)


METHODS = {
    baselines.ddpo_losses: {"scores": SCORES, "clip": 0.1},
    baselines.dpok_losses: {"scores": SCORES, "beta": 0.3, "reference": INITIAL},
    baselines.reward_weighted_losses: {"scores": SCORES, "temperature": 0.7},
    baselines.preferred_losses: {"pairs": PAIRS, "kl_weight": 0.4, "reference": INITIAL},
    baselines.diffusion_dpo_losses: {"pairs": PAIRS, "beta": 5e-4, "reference": INITIAL},
    baselines.grpo_losses: {
        "scores": SCORES.view(2, 3),
        "clip": 0.1,
        "kl_weight": 0.3,
        "reference": INITIAL,
    },
    baselines.nft_losses: {
        "old": SAMPLED_BY,
        "scores": SCORES.view(2, 3),
        "beta": 0.7,
        "kl_weight": 0.3,
        "reference": INITIAL,
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_images_with_prompts_follow_the_formulas_chain_by_chain(method):
    random = torch.Generator().manual_seed(3)
    x_T = torch.randn(2, 2, 3, 4, generator=random).repeat_interleave(3, 0)
    trajectory = d3po.rollout(SAMPLED_BY, SCHEDULE, x_T, COND, random)
    order = [7, 0, 4]
    options = METHODS[method] | {"cond": COND, "steps": order}
    shapes = {  # of the noises that a step draws
        baselines.reward_weighted_losses: (6, 2, 3, 4),
        baselines.preferred_losses: (len(PAIRS[:, 0].unique()), 2, 3, 4),
        baselines.diffusion_dpo_losses: (len(PAIRS), 2, 3, 4),
        baselines.nft_losses: (6, 2, 3, 4),
    }
    if method in shapes:
        options["generator"] = torch.Generator().manual_seed(4)
    same = torch.Generator().manual_seed(4)
    losses = method(POLICY, SCHEDULE, trajectory, **options)
    for i, loss in zip(order, losses, strict=True):
        eps = torch.randn(shapes.get(method, 0), generator=same)
        expected = expected_losses(method, i, trajectory.x, eps)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        others = [*SAMPLED_BY.parameters(), *INITIAL.parameters()]
        unused = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
        assert unused == (None,) * 4
        weights = list(POLICY.parameters())
        gradients = zip(
            *(torch.autograd.grad(value, weights) for value in (loss, expected)), strict=True
        )
        for found, wanted in gradients:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_equal_scores_teach_ddpo_and_grpo_nothing():
    trajectory = d3po.rollout(SAMPLED_BY, SCHEDULE, torch.randn(6, 2, 3, 4), COND)
    for function, shape in ((baselines.ddpo_losses, 6), (baselines.grpo_losses, (2, 3))):
        scores = torch.ones(shape)
        for loss in function(POLICY, SCHEDULE, trajectory, scores=scores, clip=0.1, cond=COND):
            assert loss == 0


def test_without_a_kl_the_reference_is_not_asked():
    trajectory = d3po.rollout(SAMPLED_BY, SCHEDULE, torch.randn(6, 2, 3, 4), COND)
    options = {"reference": None, "pairs": PAIRS, "kl_weight": 0, "cond": COND}
    losses = baselines.preferred_losses(POLICY, SCHEDULE, trajectory, **options)
    assert len(list(losses)) == len(SCHEDULE.sigma)


def test_grpo_in_pairs_without_clip_is_ddpo_of_each_pair_and_knows_the_winner_alone(sampled):
    _, trajectory, scores = sampled
    far = a_policy(seed=1)  # so ratios are far from 1
    options = {"clip": 1e9, "steps": [7]}
    pairs = scores.view(-1, 2)
    (loss,) = baselines.grpo_losses(far, SCHEDULE, trajectory, scores=pairs, **options)
    of_pairs = []
    for k in range(0, 32, 2):
        x, log_prob = trajectory.x[:, k : k + 2], trajectory.log_prob[:, k : k + 2]
        pair = d3po.Trajectory(x, log_prob)
        of_pairs += baselines.ddpo_losses(far, SCHEDULE, pair, scores=scores[k : k + 2], **options)
    torch.testing.assert_close(loss, sum(of_pairs) / 16)

    winners = d3po.preference(*pairs.T)
    signs = torch.stack([winners, -winners], 1).float()
    (by_labels,) = baselines.grpo_losses(far, SCHEDULE, trajectory, scores=signs, **options)
    torch.testing.assert_close(loss, by_labels)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_nft_ends_at_the_old_noise_plus_the_improvement_over_beta(beta):
    """The minimum of DiffusionNFT's theorem, for a network that is one number c everywhere.

    c = c_old + E[(2 p - 1)(eps - c_old)] / beta.
    """
    x_0 = torch.randn(1000, 1, dtype=torch.float64)
    scores = x_0.view(-1, 4)  # 250 groups
    trajectory = d3po.Trajectory(x_0.expand(len(SCHEDULE.sigma) + 1, -1, -1), None)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=x_0.dtype)
    deviation = (scores - scores.mean(1, keepdim=True)).flatten() / scores.std()
    best = 0.3 + (deviation.clamp(-1, 1) * (eps[:, 0] - 0.3)).mean().item() / beta
    c = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    (loss,) = baselines.nft_losses(
        lambda x, *_: c.expand(x.shape),
        SCHEDULE,
        trajectory,
        old=lambda x, *_: torch.full_like(x, 0.3),
        scores=scores,
        beta=beta,
        steps=[4],
        generator=torch.Generator().manual_seed(1),
    )
    (slope,) = torch.autograd.grad(loss, c)
    assert abs(slope) < 1e-12 and best != pytest.approx(0.3, abs=1e-3)

"""d3po.py against references that share no code with it.

torch.distributions, diffusers' schedulers, Alg. 1 typed out, autograd through the whole chain,
finite differences, plain-Python loops, and problems whose answer is known.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

from d3po import (
    Schedule,
    Trajectory,
    bradley_terry,
    bridge,
    chain_dpo_losses,
    clip_log_ratio,
    d3po_loss,
    d3po_losses,
    log_prob,
    make_schedule,
    pairs_from_feedback,
    pairs_from_scores,
    pairs_from_tags,
    policy_mean,
    preference,
    rollout,
    trajectory_log_prob,
)
from toy.ddpm import MLP

NOISE_RATES = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
BARS = torch.cumprod(1 - NOISE_RATES, 0)
QUICK = settings(deadline=None, max_examples=50, derandomize=True)
BOTH = pytest.mark.parametrize("losses", [d3po_losses, chain_dpo_losses])
# float64 rounds at 1e-16; sums of a few hundred terms of size 100 at 1e-12.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def tanh_net(weight, slope):
    def eps(x, time, cond=None):
        shift = 0 if cond is None else cond
        return torch.tanh(x @ weight + slope * time[:, None] / 1000 + shift)

    return eps


def zero_eps(x, time, cond=None):
    return torch.zeros_like(x)


class Counting:
    """A denoiser that remembers its calls."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.calls = []

    def __call__(self, x, time, cond=None):
        self.calls.append((x, time, cond))
        return self.denoiser(x, time, cond)

    def times(self):
        return [int(time[0]) for _, time, _ in self.calls]


@dataclass
class World:
    """Three groups of two chains in three dimensions, sampled by a reference, not by the policy."""

    args: dict  # of d3po_losses
    parameters: list  # of the policy
    reference: object


def world(T=4, pairs=((0, 1), (3, 2), (4, 5)), dtype=torch.float64):
    weight = randn(3, 3, seed=1, dtype=dtype) / 2
    slope = randn(3, seed=2, dtype=dtype)
    reference = tanh_net(weight, slope)
    tuned = weight + 0.1 * randn(3, 3, seed=3, dtype=dtype)
    parameters = [tuned.requires_grad_(), slope.clone().requires_grad_()]

    schedule = make_schedule(BARS.to(dtype), T)
    cond = randn(6, 3, seed=4, dtype=dtype)
    x_T = randn(3, 3, seed=5, dtype=dtype).repeat_interleave(2, 0)
    trajectory = rollout(reference, schedule, x_T, cond, seeded(6))
    args = {
        "policy": tanh_net(*parameters),
        "schedule": schedule,
        "trajectory": trajectory,
        "pairs": torch.tensor(pairs),
        "beta": 0.3,
        "ref_log_prob": trajectory.log_prob,
        "cond": cond,
    }
    return World(args, parameters, reference)


def line_28(denoiser, schedule, i, x, cond=None):
    ab = schedule.alpha_bar[i]
    alpha = ab / schedule.alpha_bar_prev[i]
    eps = denoiser(x, schedule.timesteps[i].expand(len(x)), cond)
    return (x - (1 - alpha) / (1 - ab).sqrt() * eps) / alpha.sqrt()


def lines_28_to_31(denoiser, args, i):
    schedule = args["schedule"]
    x = args["trajectory"].x
    ab = schedule.alpha_bar[i]
    ab_prev = schedule.alpha_bar_prev[i]
    posterior_variance = (1 - ab / ab_prev) * (1 - ab_prev) / (1 - ab)
    mean = line_28(denoiser, schedule, i, x[i], args["cond"])
    return Normal(mean, posterior_variance.sqrt()).log_prob(x[i + 1]).sum(-1)


def log_ratios(w):
    rows = []
    for i in range(len(w.args["schedule"].sigma)):
        reference = lines_28_to_31(w.reference, w.args, i).detach()
        rows.append(lines_28_to_31(w.args["policy"], w.args, i) - reference)
    return torch.stack(rows)


def dpo(log_ratio, pairs, beta):
    differences = [log_ratio[winner] - log_ratio[loser] for winner, loser in pairs.tolist()]
    per_pair = [torch.log1p(torch.exp(-beta * difference)) for difference in differences]
    return sum(per_pair) / len(per_pair)


def eq_14(w, i):
    return dpo(log_ratios(w)[i], w.args["pairs"], w.args["beta"])


def eq_5(w):
    return dpo(log_ratios(w).sum(0), w.args["pairs"], w.args["beta"])


def summed_gradient(losses, parameters):
    total = [torch.zeros_like(p) for p in parameters]
    for loss in losses:
        gradient = torch.autograd.grad(loss, parameters)
        total = [t + g for t, g in zip(total, gradient, strict=True)]
    return total


# Schedule and policy


@pytest.mark.parametrize("curve", ["scaled_linear", "linear"])
@pytest.mark.parametrize("T", [5, 10, 20, 50])
@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_a_step_is_that_of_diffusers_ddim(curve, T, eta):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=curve,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(T)
    schedule = make_schedule(scheduler.alphas_cumprod, T, eta)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    x, eps, z = randn(3, 2, 4, 4, seed=T)
    for i, time in enumerate(scheduler.timesteps):
        ours = policy_mean(lambda *_: eps, schedule, i, x) + schedule.sigma[i] * z
        theirs = scheduler.step(eps, time, x, eta=eta, variance_noise=z).prev_sample
        assert_close(ours, theirs, **EXACT)


def ddpm_steps(scheduler, schedule):
    """Pairs of (our x after one step, theirs) for the same noise, one for each step."""
    x, eps = randn(2, 2, 5)
    for i, time in enumerate(schedule.timesteps):
        z = randn(2, 5, seed=i)
        ours = policy_mean(lambda *_: eps, schedule, i, x) + schedule.sigma[i] * z
        yield ours, scheduler.step(eps, time, x, generator=seeded(i)).prev_sample


def test_eta_1_with_consecutive_times_is_ddpm_at_every_step_that_has_noise():
    scheduler = DDPMScheduler(100, variance_type="fixed_small", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = make_schedule(scheduler.alphas_cumprod, 99)
    assert schedule.timesteps.tolist() == list(range(99, 0, -1))
    for ours, theirs in ddpm_steps(scheduler, schedule):
        assert_close(ours, theirs, **EXACT)


def test_eta_1_with_spaced_times_is_ddpm_but_for_the_last_step_which_ddpm_ends_at_alpha_bar_1():
    scheduler = DDPMScheduler(
        variance_type="fixed_small",
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(20)
    schedule = make_schedule(scheduler.alphas_cumprod, 20)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    steps = ddpm_steps(scheduler, schedule)
    agrees = [torch.allclose(ours, theirs, **EXACT) for ours, theirs in steps]
    assert agrees == [True] * 19 + [False]


levels_and_steps = st.integers(2, 80).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, n - 1)),
)


@QUICK
@given(levels_and_steps, st.floats(0.01, 1))
def test_any_number_of_steps_makes_noisy_steps_that_end_at_the_first_alpha_bar(n_and_T, eta):
    n, T = n_and_T
    bars = torch.linspace(0.99, 0.01, n, dtype=torch.float64)
    s = make_schedule(bars, T, eta)
    assert len(s.timesteps) == T
    assert s.timesteps[-1] == 1
    assert (s.timesteps.diff() < 0).all()
    assert torch.equal(s.alpha_bar, bars[s.timesteps])
    assert torch.equal(s.alpha_bar_prev[:-1], s.alpha_bar[1:])
    assert s.alpha_bar_prev[-1] == bars[0]
    assert (s.sigma > 0).all()
    assert_close(s.sigma, eta * make_schedule(bars, T).sigma, **EXACT)


def test_a_schedule_takes_other_times():
    s = make_schedule(BARS, 3, timesteps=torch.tensor([999.0, 400.0, 7.0]))
    assert s.timesteps.tolist() == [999, 400, 7]
    assert s.timesteps.dtype == torch.int64
    assert torch.equal(s.alpha_bar_prev, BARS[[400, 7, 0]])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_schedule_is_never_narrower_than_float32(dtype, wide):
    s = make_schedule(torch.tensor([0.9, 0.5, 0.1], dtype=dtype, requires_grad=True), 2)
    assert s.sigma.dtype == s.alpha_bar.dtype == s.alpha_bar_prev.dtype == wide
    assert s.timesteps.dtype == torch.int64
    assert not any(values.requires_grad for values in s)


@pytest.mark.parametrize("T", [1, 7, 50, 999])
def test_with_eta_1_the_mean_is_alg_1_line_28(T):
    schedule = make_schedule(BARS, T)
    net = tanh_net(randn(3, 3), randn(3))
    x = randn(4, 3, seed=1)
    for i in range(0, T, 7):
        assert_close(policy_mean(net, schedule, i, x), line_28(net, schedule, i, x), **EXACT)


def test_states_are_finite_where_rounding_makes_the_variance_left_to_the_mean_negative():
    x = randn(2, 3, dtype=torch.float32)
    left = []
    for ab_prev in torch.linspace(0.1, 0.9, 50):
        schedule = make_schedule(torch.tensor([0.99, ab_prev, 1e-12]), 2)
        left.append(1 - schedule.alpha_bar_prev[0] - schedule.sigma[0] ** 2)
        assert policy_mean(zero_eps, schedule, 0, x).isfinite().all()
        assert bridge(schedule, x, x).isfinite().all()
    assert min(left) < 0


@QUICK
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(0.01, 10), st.integers(0, 99))
def test_log_prob_is_the_normal_density_summed_over_every_dimension(D, sigma, seed):
    action, mean = randn(2, 3, *D, seed=seed)
    expected = Normal(mean, sigma).log_prob(action).flatten(1).sum(1)
    assert_close(log_prob(action, mean, sigma), expected, **EXACT)
    sigma = torch.tensor(sigma, dtype=torch.float64)
    assert_close(log_prob(action, mean, sigma), expected, **EXACT)


def test_log_prob_doubles_when_the_image_is_laid_twice():
    action, mean = randn(2, 3, 4, 8, 8)
    twice = log_prob(action.repeat(1, 2, 1, 1), mean.repeat(1, 2, 1, 1), 0.3)
    assert_close(twice, 2 * log_prob(action, mean, 0.3), **EXACT)


def test_gradient_of_log_prob_by_finite_differences():
    action, mean = randn(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, m: log_prob(a, m, 0.7), (action, mean))


# Rollout


class GaussianChain(NamedTuple):
    """The exact denoiser of data N(1, 0.6^2) in one dimension and the law of its chain from x_T."""

    eps: object
    schedule: Schedule
    mean: torch.Tensor  # (T,) of x_{T-1} ... x_0
    cov: torch.Tensor  # (T, T)

    def sample(self, B, seed):
        x_T = torch.full((B, 1), 0.7, dtype=torch.float64)
        return rollout(self.eps, self.schedule, x_T, generator=seeded(seed))


def gaussian_chain(T):
    """Every step is affine, x' = A x + b + sigma z, so the chain is jointly Gaussian.

    A and b are read off line 28 at x = 0 and x = 1.
    """
    schedule = make_schedule(BARS, T)

    def eps(x, time, cond=None):
        ab = BARS[time][:, None]
        return (1 - ab).sqrt() * (x - ab.sqrt()) / (0.36 * ab + 1 - ab)

    mean = [torch.tensor(0.7, dtype=torch.float64)]
    factor = [torch.zeros(T, dtype=torch.float64)]
    for i, sigma in enumerate(schedule.sigma):
        b, A_plus_b = line_28(eps, schedule, i, torch.eye(2, dtype=torch.float64)[:, 1:]).flatten()
        A = A_plus_b - b
        mean.append(A * mean[i] + b)
        factor.append(A * factor[i])
        factor[-1][i] = sigma
    factor = torch.stack(factor[1:])
    return GaussianChain(eps, schedule, torch.stack(mean[1:]), factor @ factor.T)


@QUICK
@given(st.integers(1, 6), st.integers(0, 99))
def test_the_log_probs_of_a_chain_add_up_to_its_joint_density(T, seed):
    chain = gaussian_chain(T)
    trajectory = chain.sample(5, seed)
    joint = MultivariateNormal(chain.mean, chain.cov).log_prob(trajectory.x[1:, :, 0].T)
    # The covariance of neighbouring states is nearly singular: its Cholesky loses up to eight of
    # sixteen digits.
    assert_close(trajectory.log_prob.sum(0), joint, rtol=1e-8, atol=1e-8)


def test_rollout_samples_the_known_law_of_a_gaussian_chain():
    B = 40_000
    chain = gaussian_chain(5)
    x = chain.sample(B, 0).x[1:, :, 0]
    var = chain.cov.diag()
    mean_error = (var / B).sqrt()
    cov_error = ((var[:, None] * var + chain.cov**2) / B).sqrt()
    assert ((x.mean(1) - chain.mean).abs() < 5 * mean_error).all()
    assert ((torch.cov(x) - chain.cov).abs() < 5 * cov_error).all()


def test_chains_of_a_group_start_alike_and_then_draw_independent_noise():
    N = 10_000
    schedule = make_schedule(BARS, 2)
    x_T = randn(N, 1).repeat_interleave(2, 0)
    x = rollout(zero_eps, schedule, x_T, generator=seeded(1)).x
    assert torch.equal(x[0], x_T)
    z = (x[1] - line_28(zero_eps, schedule, 0, x_T)) / schedule.sigma[0]
    correlation = torch.corrcoef(z.view(N, 2).T)[0, 1]
    assert correlation.abs() < 5 / math.sqrt(N)  # five standard errors of a correlation that is 0


def test_rollout_repeats_with_its_generator_and_keeps_no_graph():
    w = world()
    x_T = w.args["trajectory"].x[0]

    def sample(seed):
        return rollout(w.args["policy"], w.args["schedule"], x_T, None, seeded(seed))

    once = sample(7)
    again = sample(7)
    assert torch.equal(once.x, again.x)
    assert torch.equal(once.log_prob, again.log_prob)
    assert not torch.equal(once.x, sample(8).x)
    assert once.x.shape == (5, 6, 3)
    assert once.log_prob.shape == (4, 6)
    assert not once.x.requires_grad
    assert not once.log_prob.requires_grad


def test_a_step_of_a_rollout_adds_sigma_times_the_next_numbers_of_its_generator():
    w = world()
    policy, schedule, cond = (w.args[name] for name in ("policy", "schedule", "cond"))
    x_T = w.args["trajectory"].x[0]
    x = rollout(policy, schedule, x_T, cond, seeded(7)).x
    torch.manual_seed(7)
    assert torch.equal(x, rollout(policy, schedule, x_T, cond).x)
    torch.manual_seed(7)
    for i, sigma in enumerate(schedule.sigma):
        expected = line_28(policy, schedule, i, x[i], cond) + sigma * torch.randn_like(x_T)
        assert_close(x[i + 1], expected, **EXACT)


def test_with_a_generator_each_a_chain_has_the_noise_that_it_has_alone():
    schedule = make_schedule(BARS, 5)
    x_T, x_0 = randn(2, 3, 4, 2)

    def eps(x, time, cond=None):
        return x.sin() + time.view(-1, 1, 1) / 1000

    def both(chains, generators):
        trajectory = rollout(eps, schedule, x_T[chains], generator=generators())
        return *trajectory, bridge(schedule, x_T[chains], x_0[chains], generator=generators())

    batch = both([0, 1, 2], lambda: [seeded(b) for b in range(3)])
    alone = [both([b], lambda b=b: seeded(b)) for b in range(3)]
    for together, *parts in zip(batch, *alone, strict=True):
        assert torch.equal(together, torch.cat(parts, 1))
    for number in (2, 4):
        with pytest.raises(ValueError, match="one for each chain"):
            both([0, 1, 2], lambda n=number: [seeded(b) for b in range(n)])
        with pytest.raises(ValueError, match="one for each chain"):
            bridge(schedule, x_T, x_0, generator=[seeded(b) for b in range(number)])


def test_trajectory_log_prob_of_the_sampling_policy_is_the_log_prob_of_the_trajectory():
    w = world()
    trajectory = w.args["trajectory"]
    again = trajectory_log_prob(w.reference, w.args["schedule"], trajectory, w.args["cond"])
    assert torch.equal(again, trajectory.log_prob)


def test_in_float32_the_ratio_to_the_policy_that_sampled_is_exactly_1():
    torch.manual_seed(0)
    denoiser = MLP(data_variance=2.0)  # the toy's network
    schedule = make_schedule(BARS.float(), 20)
    trajectory = rollout(denoiser, schedule, torch.randn(64, 2))
    again = trajectory_log_prob(denoiser, schedule, trajectory)
    assert again.dtype == torch.float32
    assert torch.equal((again - trajectory.log_prob).exp(), torch.ones(20, 64))


def test_log_probs_of_another_policy_are_those_of_alg_1_lines_28_to_31_with_its_cond():
    w = world()
    policy = w.args["policy"]
    ours = trajectory_log_prob(
        policy, w.args["schedule"], w.args["trajectory"], cond=w.args["cond"]
    )
    theirs = torch.stack([lines_28_to_31(policy, w.args, i) for i in range(4)])
    assert not ours.requires_grad
    assert_close(ours, theirs.detach(), **EXACT)


# Bridge


def relative_levels(schedule, end):
    """alpha-bar of the states 0 ... end, relative to that of state end."""
    levels = torch.cat([schedule.alpha_bar, schedule.alpha_bar_prev[-1:]])
    return levels[: end + 1] / levels[end]


def noising_process(ab):
    """Law N(slope y, cov) of all states given the last one, y, when noise is added step by step.

    x_i = sqrt(ab_i / ab_{i+1}) x_{i+1} + sqrt(1 - ab_i / ab_{i+1}) z_i
    """
    end = len(ab) - 1
    slope = torch.ones(end + 1, dtype=torch.float64)
    factor = torch.zeros(end + 1, end + 1, dtype=torch.float64)
    for i in reversed(range(end)):
        kept = ab[i] / ab[i + 1]
        slope[i] = kept.sqrt() * slope[i + 1]
        factor[i] = kept.sqrt() * factor[i + 1]
        factor[i, i] = (1 - kept).sqrt()
    return slope, factor @ factor.T


class Affine(NamedTuple):
    """Middle states of a bridge: x_T * from_T + x_end * from_end + factor z."""

    from_T: torch.Tensor  # (end-1,)
    from_end: torch.Tensor  # (end-1,)
    factor: torch.Tensor  # (end-1, end-1), lower triangular


def affine_bridge(schedule, end):
    """The exact coefficients, found from more chains than there are unknowns and their noise."""
    B = 2 * end + 9
    x_T, x_end = randn(2, B, 1)
    x = bridge(schedule, x_T, x_end, end, seeded(7))[1:end, :, 0]
    generator = seeded(7)
    z = [torch.randn(B, 1, generator=generator, dtype=torch.float64) for _ in range(end - 1)]
    causes = torch.cat([x_T, x_end, *z], 1)
    coefficients = torch.linalg.lstsq(causes, x.T).solution
    assert_close(causes @ coefficients, x.T, **EXACT)
    return Affine(coefficients[0], coefficients[1], coefficients[2:].T)


T_AND_END = pytest.mark.parametrize(("T", "end"), [(20, 20), (20, 18), (20, 5), (2, 2), (50, 50)])


@T_AND_END
def test_with_eta_1_the_bridge_is_the_noising_process_given_both_ends(T, end):
    schedule = make_schedule(BARS, T)
    ours = affine_bridge(schedule, end)
    slope, cov = noising_process(relative_levels(schedule, end))
    middle = slice(1, end)
    gain = cov[middle, 0] / cov[0, 0]
    assert_close(ours.from_T, gain, **EXACT)
    assert_close(ours.from_end, slope[middle] - gain * slope[0], **EXACT)
    conditional = cov[middle, middle] - gain[:, None] * cov[0, middle]
    assert_close(ours.factor @ ours.factor.T, conditional, **EXACT)


@T_AND_END
@pytest.mark.parametrize("eta", [0.05, 0.5, 1.0])
def test_with_any_eta_a_state_of_the_bridge_keeps_its_law_given_the_end(T, end, eta):
    schedule = make_schedule(BARS, T, eta)
    ab = relative_levels(schedule, end)
    ours = affine_bridge(schedule, end)
    mean = ours.from_T * ab[0].sqrt() + ours.from_end
    var = ours.from_T**2 * (1 - ab[0]) + (ours.factor**2).sum(1)
    assert_close(mean, ab[1:end].sqrt(), **EXACT)
    assert_close(var, 1 - ab[1:end], **EXACT)
    noise = affine_bridge(make_schedule(BARS, T), end).factor.diag()
    assert_close(ours.factor.diag(), eta * noise, **EXACT)


def redraw(schedule, x):
    """The bridge of toy/align.py before it was made general: from x_T to x[T-2]."""
    end = max(len(x) - 3, 1)
    y, states = x[end], [x[0]]
    for i in range(end - 1):
        left, left_prev = 1 - schedule.alpha_bar[i], 1 - schedule.alpha_bar_prev[i]
        ab = schedule.alpha_bar[i] / schedule.alpha_bar[end]
        ab_prev = schedule.alpha_bar_prev[i] / schedule.alpha_bar[end]
        sigma = schedule.sigma[i] * ((1 - ab_prev) / left_prev * left / (1 - ab)).sqrt()
        noise = (1 - ab_prev - sigma**2).clamp(min=0).sqrt()
        mean = ab_prev.sqrt() * y + noise * (states[-1] - ab.sqrt() * y) / (1 - ab).sqrt()
        states.append(mean + sigma * torch.randn_like(y))
    return torch.stack([*states, y])


@pytest.mark.parametrize("T", [3, 4, 20])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_bridge_to_state_T_minus_2_is_the_former_redraw_bit_for_bit(T, eta):
    schedule = make_schedule(BARS.float(), T, eta)
    x = randn(T + 1, 6, 2, dtype=torch.float32)
    torch.manual_seed(5)
    expected = redraw(schedule, x)
    torch.manual_seed(5)
    assert torch.equal(bridge(schedule, x[0], x[T - 2], T - 2), expected)
    assert torch.equal(bridge(schedule, x[0], x[T - 2], T - 2, seeded(5)), expected)


@pytest.mark.parametrize("end", [1, 2, 4, 6, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_both_ends_of_a_bridge_come_back_untouched(end, dtype):
    schedule = make_schedule(BARS.float(), 6)
    x_T, x_end = randn(2, 3, 2, 5, 4).to(dtype)
    x = bridge(schedule, x_T.requires_grad_(), x_end, end)
    assert x.shape == ((end or 6) + 1, 3, 2, 5, 4)
    assert x.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(x[0], x_T.to(x.dtype))
    assert torch.equal(x[-1], x_end.to(x.dtype))
    assert not x.requires_grad
    assert x.isfinite().all()


def test_by_default_a_bridge_ends_at_the_last_state():
    schedule = make_schedule(BARS, 6, 0.5)
    x_T, x_end = randn(2, 3, 2)
    by_default = bridge(schedule, x_T, x_end, generator=seeded(1))
    assert torch.equal(by_default, bridge(schedule, x_T, x_end, 6, seeded(1)))


def test_a_generator_on_the_cpu_serves_states_on_another_device():
    schedule = make_schedule(BARS, 3)
    x_T = randn(4, 2).to("meta")
    denoiser = Counting(zero_eps)
    before = torch.get_rng_state()
    assert rollout(denoiser, schedule, x_T, generator=seeded(0)).x.device == x_T.device
    assert bridge(schedule, x_T, x_T, generator=seeded(0)).device == x_T.device
    assert torch.equal(torch.get_rng_state(), before)
    assert all(time.device == x_T.device for _, time, _ in denoiser.calls)


# Preferences


quarters = st.integers(-8, 8).map(lambda n: n / 4)  # sums and differences of these are exact
margins = st.integers(0, 8).map(lambda n: n / 4)


def label_by_hand(a, b, margin):
    if abs(a - b) <= margin:
        return 0
    return 1 if a > b else -1


@QUICK
@given(st.lists(st.tuples(quarters, quarters), max_size=9), margins)
def test_preference_is_the_sign_of_a_difference_beyond_the_margin(scores, margin):
    a, b = torch.tensor(scores, dtype=torch.float64).reshape(-1, 2).T
    h = preference(a, b, margin)
    assert h.tolist() == [label_by_hand(*row, margin) for row in scores]
    assert h.dtype == torch.int64
    assert torch.equal(preference(b, a, margin), -h)


def test_without_margin_only_equal_scores_tie():
    h = preference(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0001, 1.0]))
    assert h.tolist() == [0, -1, 1]


@pytest.mark.parametrize("gap", [-2.0, -0.5, 0.0, 1.0, 3.0])
def test_bradley_terry_prefers_as_often_as_eq_3_says(gap):
    n = 40_000
    p = 1 / (1 + math.exp(-gap))
    score = randn(n)
    h = bradley_terry(score + gap, score, seeded(1))
    assert set(h.tolist()) == {1, -1}
    assert h.dtype == torch.int64
    share = (h == 1).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)  # five binomial standard deviations
    assert torch.equal(h, bradley_terry(score + gap, score, seeded(1)))
    torch.manual_seed(1)
    assert torch.equal(h, bradley_terry(score + gap, score))


@st.composite
def groups(draw, values):
    N = draw(st.integers(0, 4))
    K = draw(st.integers(1, 6))
    return [[draw(values) for _ in range(K)] for _ in range(N)], K


def double_loop(table, K, better):
    pairs = []
    for n, row in enumerate(table):
        for k in range(K):
            for m in range(K):
                if better(row[k], row[m]):
                    pairs.append([n * K + k, n * K + m])
    return pairs


@QUICK
@given(groups(st.integers(0, 3)), st.sampled_from([torch.int64, torch.float16, torch.float64]))
def test_scores_pair_every_better_chain_of_a_group_with_every_worse_one(table_and_K, dtype):
    table, K = table_and_K
    pairs = pairs_from_scores(torch.tensor(table, dtype=dtype).reshape(-1, K))
    assert sorted(pairs.tolist()) == double_loop(table, K, lambda a, b: a > b)
    assert pairs.shape[1:] == (2,)
    assert pairs.dtype == torch.int64


@QUICK
@given(groups(st.booleans()))
def test_tags_pair_every_untagged_chain_of_a_group_with_every_tagged_one(table_and_K):
    table, K = table_and_K
    pairs = pairs_from_tags(torch.tensor(table, dtype=torch.bool).reshape(-1, K))
    assert sorted(pairs.tolist()) == double_loop(table, K, lambda a, b: b and not a)
    assert pairs.shape[1:] == (2,)


@QUICK
@given(st.lists(st.sampled_from([1, -1, 0]), max_size=9))
def test_feedback_pairs_chain_2n_with_chain_2n_plus_1(h):
    pairs = pairs_from_feedback(torch.tensor(h, dtype=torch.int64))
    expected = []
    for n, label in enumerate(h):
        if label == 1:
            expected.append([2 * n, 2 * n + 1])
        if label == -1:
            expected.append([2 * n + 1, 2 * n])
    assert sorted(pairs.tolist()) == expected
    assert pairs.shape[1:] == (2,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.float32])
def test_feedback_may_have_any_dtype_that_holds_its_labels(dtype):
    assert pairs_from_feedback(torch.tensor([1, 0], dtype=dtype)).tolist() == [[0, 1]]


def test_chain_k_of_group_n_is_row_n_K_plus_k():
    pairs = pairs_from_scores(torch.tensor([[5.0, 5.0, 5.0], [1.0, 1.0, 2.0]]))
    assert pairs.tolist() == [[5, 3], [5, 4]]


def test_seven_images_with_three_tags_make_twelve_pairs():
    bad = torch.tensor([[True, False, False, True, False, True, False]])
    assert len(pairs_from_tags(bad)) == 12


# The loss: algebra


nats = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=8)
betas = st.floats(0.01, 5)


def columns(rows):
    return torch.tensor(rows, dtype=torch.float64).T


@QUICK
@given(nats, betas)
def test_swapping_winner_and_loser_changes_the_loss_by_beta_delta(rows, beta):
    a, b = columns(rows)
    assert_close(d3po_loss(a, b, beta) - d3po_loss(b, a, beta), -beta * (a - b), **EXACT)


@QUICK
@given(nats, betas, st.floats(-1000, 1000))
def test_a_common_shift_of_both_log_ratios_does_nothing(rows, beta, shift):
    a, b = columns(rows)
    assert_close(d3po_loss(a + shift, b + shift, beta), d3po_loss(a, b, beta), **EXACT)


@QUICK
@given(nats, betas)
def test_loss_and_gradient_have_their_closed_form(rows, beta):
    a, b = columns(rows).requires_grad_()
    loss = d3po_loss(a, b, beta)
    assert loss.shape == (len(rows),)
    assert_close(loss.tolist(), [math.log1p(math.exp(-beta * (x - y))) for x, y in rows], **EXACT)
    gradient_a, gradient_b = torch.autograd.grad(loss.sum(), (a, b))
    closed = [-beta / (1 + math.exp(beta * (x - y))) for x, y in rows]
    assert_close(gradient_a.tolist(), closed, **EXACT)
    assert_close(gradient_b.tolist(), [-g for g in closed], **EXACT)


def test_gradient_of_the_loss_by_finite_differences():
    a, b = randn(2, 5).mul(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: d3po_loss(a, b, 0.4), (a, b))


@QUICK
@given(
    st.floats(-1e4, 1e4),
    st.floats(0.001, 10),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_loss_and_gradient_are_finite_for_any_difference(delta, beta, dtype):
    a = torch.tensor([delta], dtype=dtype, requires_grad=True)
    loss = d3po_loss(a, torch.zeros(1, dtype=dtype), beta)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_log_ratios_cost_log_2(dtype):
    a = torch.tensor([0.0, 3.0, -40.0], dtype=dtype)
    loss = d3po_loss(a, a, 0.1)
    assert torch.equal(loss, torch.full((3,), math.log(2), dtype=loss.dtype))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_policy_that_is_its_reference_has_loss_log_2(losses, dtype):
    w = world(dtype=dtype)
    values = torch.stack(list(losses(**w.args | {"policy": w.reference})))
    expected = math.log(2) if losses is d3po_losses else math.log(2) / 4
    assert torch.equal(values, torch.full((4,), expected, dtype=dtype))


# The losses on chains


def assert_same(losses, others):
    for a, b in zip(losses, others, strict=True):
        assert_close(a, b, **EXACT)


def test_each_loss_is_eq_14_by_torch_distributions_and_autograd():
    w = world()
    for i, loss in enumerate(d3po_losses(**w.args, steps=range(4))):
        expected = eq_14(w, i)
        assert_close(loss, expected, **EXACT)
        ours = torch.autograd.grad(loss, w.parameters)
        theirs = torch.autograd.grad(expected, w.parameters)
        assert_close(ours, theirs, **EXACT)


def test_the_pieces_of_the_chain_loss_are_eq_5_by_autograd_through_the_whole_chain():
    w = world()
    assert_close(sum(chain_dpo_losses(**w.args)), eq_5(w), **EXACT)
    ours = summed_gradient(chain_dpo_losses(**w.args), w.parameters)
    theirs = torch.autograd.grad(eq_5(w), w.parameters)
    assert_close(ours, list(theirs), **EXACT)


@BOTH
def test_gradient_of_the_losses_by_finite_differences(losses):
    w = world()

    def total(*parameters):
        return sum(losses(**w.args | {"policy": tanh_net(*parameters), "steps": [2, 0, 3, 1]}))

    assert torch.autograd.gradcheck(total, w.parameters)


def test_chain_loss_restricted_to_one_step_is_eq_14_of_that_step():
    w = world()
    (piece,) = chain_dpo_losses(**w.args, steps=[2])
    expected = eq_14(w, 2)
    assert_close(piece, expected, **EXACT)
    ours = torch.autograd.grad(piece, w.parameters)
    assert_close(ours, torch.autograd.grad(expected, w.parameters), **EXACT)


def test_step_0_alone_is_eq_12_where_the_pair_shares_its_state():
    w = world()
    x_T = w.args["trajectory"].x[0]
    winner, loser = w.args["pairs"].T
    assert torch.equal(x_T[winner], x_T[loser])
    (loss,) = d3po_losses(**w.args, steps=[0])
    assert_close(loss, eq_14(w, 0), **EXACT)


@BOTH
@QUICK
@given(order=st.permutations(range(6)))
def test_losses_do_not_depend_on_the_order_of_the_chains(losses, order):
    w = world()
    order = torch.tensor(order)
    x, log_probs = w.args["trajectory"]
    reordered = {
        "trajectory": Trajectory(x[:, order], log_probs[:, order]),
        "ref_log_prob": w.args["ref_log_prob"][:, order],
        "cond": w.args["cond"][order],
        "pairs": torch.argsort(order)[w.args["pairs"]],
    }
    steps = range(4)
    assert_same(losses(**w.args, steps=steps), losses(**w.args | reordered, steps=steps))


@BOTH
@QUICK
@given(order=st.permutations(range(5)))
def test_losses_do_not_depend_on_the_order_of_the_pairs(losses, order):
    w = world(pairs=((0, 1), (5, 0), (0, 3), (3, 2), (4, 5)))
    reordered = {"pairs": w.args["pairs"][order]}
    steps = range(4)
    assert_same(losses(**w.args, steps=steps), losses(**w.args | reordered, steps=steps))


def test_a_chain_may_be_in_many_pairs_and_a_pair_may_be_named_twice():
    w = world(pairs=((0, 1), (0, 1), (5, 0), (3, 1)))
    for i, loss in enumerate(d3po_losses(**w.args, steps=range(4))):
        assert_close(loss, eq_14(w, i), **EXACT)
    assert_close(sum(chain_dpo_losses(**w.args)), eq_5(w), **EXACT)


@BOTH
def test_images_and_flat_vectors_of_the_same_numbers_have_the_same_losses(losses):
    schedule = make_schedule(BARS, 3, eta=0.5)
    x_T = randn(4, 2, 5, 3)
    pairs = torch.tensor([[0, 1], [3, 2]])

    def values(x_T):
        trajectory = rollout(lambda x, *_: x.sin(), schedule, x_T, generator=seeded(0))
        assert trajectory.x.shape == (4, *x_T.shape)
        return losses(
            lambda x, *_: x.cos(),
            schedule,
            trajectory,
            pairs=pairs,
            beta=0.1,
            ref_log_prob=trajectory.log_prob,
            steps=range(3),
        )

    assert_same(values(x_T), values(x_T.flatten(1)))


def test_each_loss_is_that_of_the_weights_at_its_turn():
    w = world()
    losses = d3po_losses(**w.args, steps=[3, 1])
    assert_close(next(losses), eq_14(w, 3), **EXACT)
    with torch.no_grad():
        w.parameters[0].add_(0.3)
    assert_close(next(losses), eq_14(w, 1), **EXACT)


# One Gaussian step: the optimum is known


ONE_STEP = Schedule(
    timesteps=torch.tensor([500]),
    alpha_bar=torch.tensor([0.3], dtype=torch.float64),
    alpha_bar_prev=torch.tensor([0.8], dtype=torch.float64),
    sigma=torch.tensor([0.4], dtype=torch.float64),
)
SIGMA = 0.4
REWARD = torch.tensor([1.0, -2.0], dtype=torch.float64)
BETA = 0.5
OPTIMAL_DISPLACEMENT = SIGMA**2 * REWARD / BETA


def constant(shift):
    return lambda x, time, cond=None: shift.expand_as(x)


def shifted_by(displacement):
    """The constant eps that displaces the mean of ONE_STEP by this much."""
    per_eps = math.sqrt(1 - 0.8 - SIGMA**2) - math.sqrt(0.8 / 0.3 * (1 - 0.3))
    return displacement / per_eps


def one_step_chains(n):
    zero = torch.zeros(2, dtype=torch.float64)
    return rollout(constant(zero), ONE_STEP, zero.expand(2 * n, 2), generator=seeded(1))


def test_one_step_with_expected_labels_is_stationary_at_the_known_optimum():
    trajectory = one_step_chains(1000)
    shift = shifted_by(OPTIMAL_DISPLACEMENT).requires_grad_()
    mean = policy_mean(constant(shift), ONE_STEP, 0, trajectory.x[0])
    log_ratio = log_prob(trajectory.x[1], mean, ONE_STEP.sigma[0]) - trajectory.log_prob[0]
    a = log_ratio[::2]
    b = log_ratio[1::2]
    p_a = torch.sigmoid((trajectory.x[1, ::2] - trajectory.x[1, 1::2]) @ REWARD)
    loss = p_a * d3po_loss(a, b, BETA) + (1 - p_a) * d3po_loss(b, a, BETA)
    (gradient,) = torch.autograd.grad(loss.mean(), shift)
    assert_close(gradient, torch.zeros_like(gradient), **EXACT)


@BOTH
def test_one_step_with_drawn_labels_learns_the_known_optimum(losses):
    trajectory = one_step_chains(100_000)
    a = trajectory.x[-1, ::2]
    b = trajectory.x[-1, 1::2]
    pairs = pairs_from_feedback(bradley_terry(a @ REWARD, b @ REWARD, seeded(2)))
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [shift],
        max_iter=50,
        tolerance_grad=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        (loss,) = losses(
            constant(shift),
            ONE_STEP,
            trajectory,
            pairs=pairs,
            beta=BETA,
            ref_log_prob=trajectory.log_prob,
        )
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    learned = shift.detach() / shifted_by(torch.ones(2, dtype=torch.float64))

    # Logistic regression of the label on beta / sigma^2 (a - b): its Fisher information gives one
    # standard error of 0.004.
    p = torch.sigmoid((a - b) @ REWARD)
    information = (BETA / SIGMA**2) ** 2 * (p * (1 - p) * (a - b).T) @ (a - b)
    error = information.inverse().diag().sqrt()
    assert ((learned - OPTIMAL_DISPLACEMENT).abs() < 4.5 * error).all()
    assert (error < 0.02 * OPTIMAL_DISPLACEMENT.abs()).all()


# Calls of the denoiser


def test_a_step_calls_the_policy_once_and_only_when_its_loss_is_asked_for():
    w = world()
    policy = Counting(w.args["policy"])
    losses = d3po_losses(**w.args | {"policy": policy})
    assert policy.calls == []
    for n, _ in enumerate(losses, 1):
        assert len(policy.calls) == n
    assert n == 4


def test_the_chain_loss_calls_the_policy_once_a_step_for_delta_and_once_a_step_for_gradients():
    w = world()
    policy = Counting(w.args["policy"])
    for n, _ in enumerate(chain_dpo_losses(**w.args | {"policy": policy}), 1):
        assert len(policy.calls) == 4 + n
    assert sorted(policy.times()) == sorted(w.args["schedule"].timesteps.tolist() * 2)


@BOTH
def test_only_chains_in_pairs_reach_the_policy_each_once_with_its_own_state_time_and_cond(losses):
    w = world(pairs=((4, 1), (3, 1), (4, 3)))
    policy = Counting(lambda x, time, cond: w.args["policy"](x, time))
    list(losses(**w.args | {"policy": policy, "cond": torch.arange(6), "steps": range(4)}))
    for n, (x, time, chains) in enumerate(policy.calls):
        assert sorted(chains.tolist()) == [1, 3, 4]
        assert torch.equal(x, w.args["trajectory"].x[n % 4, chains])
        assert time.tolist() == [w.args["schedule"].timesteps[n % 4]] * 3


@BOTH
def test_without_pairs_there_is_no_loss_and_no_call(losses):
    w = world()
    policy = Counting(w.args["policy"])
    no_pairs = pairs_from_scores(torch.ones(3, 2))
    assert list(losses(**w.args | {"policy": policy, "pairs": no_pairs})) == []
    assert policy.calls == []


def test_the_policy_that_sampled_is_a_reference_that_need_not_be_called_again():
    w = world()
    model = Counting(w.reference)
    x_T = w.args["trajectory"].x[0]
    trajectory = rollout(model, w.args["schedule"], x_T, w.args["cond"], seeded(6))
    fresh = {"policy": model, "trajectory": trajectory, "ref_log_prob": trajectory.log_prob}
    for loss in d3po_losses(**w.args | fresh):
        assert loss == math.log(2)
    assert len(model.calls) == 4 + 4


def test_steps_are_taken_in_the_order_given():
    w = world()
    policy = Counting(w.args["policy"])
    list(d3po_losses(**w.args | {"policy": policy, "steps": [2, 0, 3, 2]}))
    assert policy.times() == w.args["schedule"].timesteps[[2, 0, 3, 2]].tolist()


def test_by_default_all_steps_are_taken_in_an_order_drawn_from_torchs_global_generator():
    w = world(T=10)

    def order(seed):
        policy = Counting(w.args["policy"])
        torch.manual_seed(seed)
        list(d3po_losses(**w.args | {"policy": policy}))
        return policy.times()

    orders = [order(seed) for seed in (0, 1, 2)]
    for times in orders:
        assert sorted(times, reverse=True) == w.args["schedule"].timesteps.tolist()
    assert len({tuple(times) for times in orders}) == 3
    assert order(0) == orders[0]


# ReplayBuffer


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, now and at their peak."""

    def __init__(self):
        self.live = self.peak = 0

    class Held:
        def __init__(self, owner, tensor):
            self.owner = owner
            # detached, as a node that saves its own output would keep itself alive
            self.tensor = tensor.detach()
            owner.live += tensor.nbytes
            owner.peak = max(owner.peak, owner.live)

        def __del__(self):
            self.owner.live -= self.tensor.nbytes

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self.Held(self, tensor),
            lambda held: held.tensor,
        )


def peak_of(T, body):
    w = world(T)
    saved = SavedBytes()
    with saved.watch():
        body(w)
    assert saved.live == 0
    return saved.peak


def documented_d3po_loop(w):
    optimizer = torch.optim.SGD(w.parameters, lr=1e-3)
    for loss in d3po_losses(**w.args):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def documented_chain_loop(w):
    optimizer = torch.optim.SGD(w.parameters, lr=1e-3)
    for loss in chain_dpo_losses(**w.args):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("loop", [documented_d3po_loop, documented_chain_loop])
def test_autograd_keeps_the_same_bytes_for_10_steps_as_for_80(loop):
    assert 0 < peak_of(80, loop) == peak_of(10, loop)


@BOTH
def test_a_loss_that_is_dropped_takes_its_whole_graph_with_it(losses):
    w = world()
    saved = SavedBytes()
    with saved.watch():
        for loss in losses(**w.args):
            assert saved.live > 0
            del loss
            assert saved.live == 0


def test_plain_autograd_through_the_chain_keeps_bytes_in_proportion_to_its_length():
    assert peak_of(80, lambda w: eq_5(w).backward()) > 7 * peak_of(10, lambda w: eq_5(w).backward())


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_prob_squares_in_float32_what_would_overflow_in_half(dtype):
    action = torch.full((2, 8), 300.0, dtype=dtype)
    mean = torch.full((2, 8), -200.0, dtype=dtype)
    assert not ((action - mean).half() ** 2).isfinite().any()
    ours = log_prob(action, mean, 0.5)
    theirs = Normal(mean.float(), 0.5).log_prob(action.float()).sum(1)
    assert ours.dtype == torch.float32
    assert_close(ours, theirs, rtol=1e-6, atol=0)  # float32 carries 7 digits


def test_a_half_denoiser_and_half_states_give_a_float32_mean():
    x = randn(4, 3).half()
    eps = randn(4, 3, seed=1).half()
    schedule = make_schedule(BARS.float(), 5)
    mean = policy_mean(lambda *_: eps, schedule, 2, x)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, policy_mean(lambda *_: eps.float(), schedule, 2, x.float()))


def test_rollout_from_half_noise_keeps_states_and_log_probs_in_float32():
    x_T = randn(4, 3).half()
    denoiser = Counting(lambda x, *_: x.half())
    trajectory = rollout(denoiser, make_schedule(BARS.float(), 5), x_T, generator=seeded(0))
    assert trajectory.x.dtype == trajectory.log_prob.dtype == torch.float32
    assert torch.equal(trajectory.x[0], x_T.float())
    # as when the log-probs are computed again
    assert all(x.dtype == torch.float32 for x, _, _ in denoiser.calls)


@BOTH
def test_losses_of_a_half_trajectory_are_those_of_its_values_in_float32(losses):
    w = world(dtype=torch.float32)
    x, log_probs = w.args["trajectory"]
    half = x.half()
    half[1:, 0] = half[1:, 1] = 300

    def values(x):
        change = {"policy": lambda x, *_: x / 2, "trajectory": Trajectory(x, log_probs)}
        return torch.stack(list(losses(**w.args | change, steps=range(4))))

    assert values(half).dtype == torch.float32
    assert values(half).isfinite().all()
    assert_close(values(half), values(half.float()))


def test_loss_subtracts_half_log_ratios_in_float32():
    loss = d3po_loss(torch.tensor([-6e4]).half(), torch.tensor([6e4]).half(), 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == 6e4  # float16 holds 6e4 exactly, but not the difference 1.2e5


def test_bradley_terry_draws_rare_upsets_of_half_scores_in_float32():
    n = 1_000_000
    p = 1 / (1 + math.exp(8))
    # 1 - p is no float16: with the nearest one upsets would be half as frequent again.
    h = bradley_terry(torch.full((n,), 8.0).half(), torch.zeros(n).half(), seeded(0))
    upsets = (h == -1).sum().item()
    assert abs(upsets - n * p) < 5 * math.sqrt(n * p)  # five standard deviations of a rare count


# The clamp of the released code


def test_clip_is_the_log_of_the_clamped_ratio_with_zero_gradient_outside():
    x = torch.linspace(-2, 2, 401, dtype=torch.float64, requires_grad=True)
    clipped = clip_log_ratio(x, 0.1)
    assert_close(clipped, x.exp().clamp(0.9, 1.1).log(), **EXACT)
    (gradient,) = torch.autograd.grad(clipped.sum(), x)
    assert torch.equal(gradient, ((x.exp() > 0.9) & (x.exp() < 1.1)).double())


def test_clip_applies_to_each_log_ratio_and_is_off_by_default():
    w = world()
    clamped = log_ratios(w).exp().clamp(0.9, 1.1).log()
    for i in range(4):
        (plain,) = d3po_losses(**w.args, steps=[i])
        (clipped,) = d3po_losses(**w.args, steps=[i], clip=0.1)
        assert_close(plain, eq_14(w, i), **EXACT)
        assert_close(clipped, dpo(clamped[i], w.args["pairs"], 0.3), **EXACT)
        assert not torch.isclose(plain, clipped)


# What is refused


NAN = torch.tensor([math.nan, 0.0])
ONES = torch.ones(2)
FOUR_STEPS = make_schedule(BARS, 4)


def schedule_of_bars(*bars):
    return make_schedule(torch.tensor(bars), 2)


def schedule_of_times(*times):
    return make_schedule(BARS, 2, timesteps=torch.tensor(times))


REFUSED = {  # the message must name what was wrong
    "alpha_bars of two dimensions": (lambda: make_schedule(BARS[None], 4), "alpha_bars"),
    "no alpha_bars": (lambda: make_schedule(BARS[:0], 4), "noise levels"),
    "one alpha_bar": (lambda: make_schedule(BARS[:1], 1), "noise levels"),
    "alpha_bars that increase": (lambda: schedule_of_bars(0.1, 0.5, 0.9), "alpha_bars.*decrease"),
    "alpha_bars that stay": (lambda: schedule_of_bars(0.9, 0.5, 0.5), "alpha_bars.*decrease"),
    "alpha_bars of 1": (lambda: schedule_of_bars(1.0, 0.5, 0.1), "alpha_bars"),
    "alpha_bars of 0": (lambda: schedule_of_bars(0.9, 0.5, 0.0), "alpha_bars"),
    "betas for alpha_bars": (lambda: make_schedule(NOISE_RATES, 20), "alpha_bars"),
    "no steps": (lambda: make_schedule(BARS, 0), "num_steps"),
    "more steps than noise levels": (lambda: make_schedule(BARS, 1000), "num_steps.*999"),
    "eta 0": (lambda: make_schedule(BARS, 4, eta=0), "eta.*(no noise|density)"),
    "negative eta": (lambda: make_schedule(BARS, 4, eta=-0.5), "eta"),
    "eta above 1": (lambda: make_schedule(BARS, 4, eta=1.01), "eta"),
    "eta NaN": (lambda: make_schedule(BARS, 4, eta=math.nan), "eta"),
    "times that increase": (lambda: schedule_of_times(5, 9), "timesteps"),
    "times that stay": (lambda: schedule_of_times(5, 5), "timesteps"),
    "too few times": (lambda: schedule_of_times(5), "timesteps"),
    "time 0": (lambda: schedule_of_times(5, 0), "timesteps"),
    "time N": (lambda: schedule_of_times(1000, 5), "timesteps"),
    "denoiser that drops a dimension": (
        lambda: policy_mean(lambda x, *_: x[:, 0], FOUR_STEPS, 0, randn(2, 3)),
        "denoiser",
    ),
    "denoiser that would broadcast": (
        lambda: rollout(lambda x, *_: x[:1], FOUR_STEPS, randn(2, 3)),
        "denoiser",
    ),
    "action and mean of other shapes": (lambda: log_prob(ONES[None], ONES, 1.0), "action.*mean"),
    "sigma 0": (lambda: log_prob(ONES, ONES, 0.0), "sigma.*eta"),
    "negative sigma": (lambda: log_prob(ONES, ONES, torch.tensor(-1.0)), "sigma"),
    "bridge to state 0": (lambda: bridge(FOUR_STEPS, ONES, ONES, 0), r"end = 0.*1 \.\.\. 4"),
    "bridge beyond x_0": (lambda: bridge(FOUR_STEPS, ONES, ONES, 5), r"end = 5.*1 \.\.\. 4"),
    "bridge to state -1": (lambda: bridge(FOUR_STEPS, ONES, ONES, -1), "end = -1"),
    "bridge to state 1.5": (lambda: bridge(FOUR_STEPS, ONES, ONES, 1.5), "end = 1.5"),
    "bridge of other shapes": (lambda: bridge(FOUR_STEPS, ONES[:1], ONES), "x_T.*x_end"),
    "preference of other shapes": (lambda: preference(ONES, torch.ones(3)), "scores.*shape"),
    "preference of NaN": (lambda: preference(ONES, NAN), "NaN"),
    "negative margin": (lambda: preference(ONES, ONES, -0.1), "margin"),
    "bradley_terry of other shapes": (lambda: bradley_terry(ONES, torch.ones(3)), "scores.*shape"),
    "bradley_terry of NaN": (lambda: bradley_terry(NAN, ONES), "NaN"),
    "label 2": (lambda: pairs_from_feedback(torch.tensor([1, 2])), "label"),
    "label 0.5": (lambda: pairs_from_feedback(torch.tensor([0.5])), "label"),
    "labels of two dimensions": (lambda: pairs_from_feedback(torch.tensor([[1, -1]])), "h "),
    "scores of one dimension": (lambda: pairs_from_scores(ONES), "scores"),
    "scores NaN": (lambda: pairs_from_scores(NAN[None]), "NaN"),
    "tags that are numbers": (lambda: pairs_from_tags(torch.tensor([[0, 1]])), "bool"),
    "tags of one dimension": (lambda: pairs_from_tags(torch.tensor([True, False])), r"\(N, K\)"),
    "log-ratios of other shapes": (lambda: d3po_loss(ONES, ONES[:1], 0.1), "log-ratios"),
    "loss with beta 0": (lambda: d3po_loss(ONES, ONES, 0), "beta"),
    "loss with negative beta": (lambda: d3po_loss(ONES, ONES, -1), "beta"),
    "clip of 0": (lambda: clip_log_ratio(ONES, 0), "eps"),
    "clip of 1": (lambda: clip_log_ratio(ONES, 1), "eps"),
    "clip of 1 in d3po_losses": (lambda: next(d3po_losses(**world().args, clip=1)), "eps"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


UNFIT = {
    "beta 0": ({"beta": 0.0}, "beta"),
    "negative beta": ({"beta": -0.1}, "beta"),
    "beta NaN": ({"beta": math.nan}, "beta"),
    "negative chain": ({"pairs": torch.tensor([[0, -1]])}, "pairs"),
    "chain B": ({"pairs": torch.tensor([[0, 6]])}, "pairs"),
    "float pairs": ({"pairs": torch.tensor([[0.0, 1.0]])}, "pairs"),
    "pairs of one dimension": ({"pairs": torch.tensor([0, 1])}, "pairs"),
    "triples": ({"pairs": torch.tensor([[0, 1, 2]])}, "pairs"),
    "step T": ({"steps": [4]}, "steps"),
    "negative step": ({"steps": [0, -1]}, "steps"),
    "cond of other length": ({"cond": torch.zeros(3, 3)}, "cond"),
    "ref_log_prob of fewer steps": ({"ref_log_prob": torch.zeros(3, 6)}, "ref_log_prob"),
    "ref_log_prob that would broadcast": ({"ref_log_prob": torch.zeros(4, 1)}, "ref_log_prob"),
    "ref_log_prob summed": ({"ref_log_prob": torch.zeros(6)}, "ref_log_prob"),
    "schedule of other length": ({"schedule": make_schedule(BARS, 5)}, "states"),
}


@BOTH
@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_losses_refuse_at_the_call_before_any_denoising(losses, change, message):
    w = world()
    policy = Counting(w.args["policy"])
    with pytest.raises(ValueError, match=message):
        losses(**w.args | {"policy": policy} | change)
    assert policy.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond": torch.zeros(3, 3)}, "cond"),
        ({"schedule": make_schedule(BARS, 5)}, "states"),
        ({"trajectory": Trajectory(torch.zeros(5, 6, 3), torch.zeros(4, 1))}, "log_prob"),
    ],
)
def test_trajectory_log_prob_refuses_what_does_not_fit(change, message):
    w = world()
    fit = {name: w.args[name] for name in ("schedule", "trajectory", "cond")}
    with pytest.raises(ValueError, match=message):
        trajectory_log_prob(w.reference, **fit | change)


def test_a_step_without_noise_is_refused_by_number_with_the_remedy():
    args = world().args
    silent = args["schedule"]._replace(sigma=args["schedule"].sigma * torch.tensor([1, 1, 0, 1]))
    calls = [
        lambda: rollout(args["policy"], silent, args["trajectory"].x[0]),
        lambda: trajectory_log_prob(args["policy"], silent, args["trajectory"]),
        lambda: d3po_losses(**args | {"schedule": silent}),
        lambda: chain_dpo_losses(**args | {"schedule": silent}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"steps \[2\].*sigma.*eta"):
            call()

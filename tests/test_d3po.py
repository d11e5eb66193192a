"""d3po.py against references that share no code with it: torch.distributions, diffusers' schedulers, Alg. 1 typed out,
autograd through the whole chain, finite differences, plain-Python loops, and problems whose answer is known."""

import ast
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

import d3po
from d3po import (
    Schedule,
    Trajectory,
    bradley_terry,
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

BARS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
QUICK = settings(deadline=None, max_examples=50, derandomize=True)
BOTH = pytest.mark.parametrize("losses", [d3po_losses, chain_dpo_losses])
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64 rounds at 1e-16; sums of a few hundred terms of size 100 at 1e-12


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def tanh_net(weight, slope):
    def eps(x, time, cond=None):
        return torch.tanh(x @ weight + slope * time[:, None] / 1000 + (0 if cond is None else cond))

    return eps


class Counting:
    """A denoiser that remembers what it was given."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []

    def __call__(self, x, time, cond=None):
        self.calls.append((x, time, cond))
        return self.denoiser(x, time, cond)

    def times(self):
        return [int(time[0]) for _, time, _ in self.calls]


@dataclass
class World:
    """Three groups of two chains in three dimensions, sampled by a reference that differs from the policy."""

    args: dict  # of d3po_losses
    parameters: list  # of the policy
    reference: object


def world(T=4, pairs=((0, 1), (3, 2), (4, 5)), dtype=torch.float64):
    weight, slope = randn(3, 3, seed=1, dtype=dtype) / 2, randn(3, seed=2, dtype=dtype)
    parameters = [(weight + 0.1 * randn(3, 3, seed=3, dtype=dtype)).requires_grad_(), slope.clone().requires_grad_()]
    schedule, cond = make_schedule(BARS.to(dtype), T), randn(6, 3, seed=4, dtype=dtype)
    x_T, reference = randn(3, 3, seed=5, dtype=dtype).repeat_interleave(2, 0), tanh_net(weight, slope)
    trajectory = rollout(reference, schedule, x_T, cond, seeded(6))
    args = dict(policy=tanh_net(*parameters), schedule=schedule, trajectory=trajectory, pairs=torch.tensor(pairs),
                beta=0.3, ref_log_prob=trajectory.log_prob, cond=cond)
    return World(args, parameters, reference)


def line_28(denoiser, schedule, i, x, cond=None):
    ab, alpha = schedule.alpha_bar[i], schedule.alpha_bar[i] / schedule.alpha_bar_prev[i]
    eps = denoiser(x, schedule.timesteps[i].expand(len(x)), cond)
    return (x - (1 - alpha) / (1 - ab).sqrt() * eps) / alpha.sqrt()


def lines_28_to_31(denoiser, args, i):
    schedule, x = args["schedule"], args["trajectory"].x
    ab, ab_prev = schedule.alpha_bar[i], schedule.alpha_bar_prev[i]
    posterior_variance = (1 - ab / ab_prev) * (1 - ab_prev) / (1 - ab)
    mean = line_28(denoiser, schedule, i, x[i], args["cond"])
    return Normal(mean, posterior_variance.sqrt()).log_prob(x[i + 1]).sum(-1)


def log_ratios(w):
    T = len(w.args["schedule"].sigma)
    return torch.stack([lines_28_to_31(w.args["policy"], w.args, i) - lines_28_to_31(w.reference, w.args, i).detach()
                        for i in range(T)])


def dpo(log_ratio, pairs, beta):
    per_pair = [torch.log1p(torch.exp(-beta * (log_ratio[a] - log_ratio[b]))) for a, b in pairs.tolist()]
    return sum(per_pair) / len(per_pair)


def eq_14(w, i):
    return dpo(log_ratios(w)[i], w.args["pairs"], w.args["beta"])


def eq_5(w):
    return dpo(log_ratios(w).sum(0), w.args["pairs"], w.args["beta"])


def summed_gradient(losses, parameters):
    total = [torch.zeros_like(p) for p in parameters]
    for loss in losses:
        total = [t + g for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
    return total


# Schedule and policy


@pytest.mark.parametrize("curve", ["scaled_linear", "linear"])
@pytest.mark.parametrize("T", [5, 10, 20, 50])
@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_a_step_is_that_of_diffusers_ddim(curve, T, eta):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=curve, clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(T)
    schedule = make_schedule(scheduler.alphas_cumprod, T, eta)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    x, eps, z = randn(3, 2, 4, 4, seed=T)
    for i, time in enumerate(scheduler.timesteps):
        ours = policy_mean(lambda *_: eps, schedule, i, x) + schedule.sigma[i] * z
        assert_close(ours, scheduler.step(eps, time, x, eta=eta, variance_noise=z).prev_sample, **EXACT)


def test_eta_1_with_consecutive_times_is_ddpm_at_every_step_that_has_noise():
    scheduler = DDPMScheduler(num_train_timesteps=100, variance_type="fixed_small", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = make_schedule(scheduler.alphas_cumprod, 99)
    assert schedule.timesteps.tolist() == list(range(99, 0, -1))
    x, eps = randn(2, 2, 5)
    for i, time in enumerate(schedule.timesteps):
        ours = policy_mean(lambda *_: eps, schedule, i, x) + schedule.sigma[i] * randn(2, 5, seed=i)
        assert_close(ours, scheduler.step(eps, time, x, generator=seeded(i)).prev_sample, **EXACT)


def test_eta_1_with_spaced_times_is_ddpm_at_all_steps_but_the_last_which_ddpm_ends_at_alpha_bar_1():
    scheduler = DDPMScheduler(variance_type="fixed_small", clip_sample=False, timestep_spacing="leading",
                              steps_offset=1)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(20)
    schedule = make_schedule(scheduler.alphas_cumprod, 20)
    x, eps = randn(2, 2, 5)
    agrees = []
    for i, time in enumerate(scheduler.timesteps):
        ours = policy_mean(lambda *_: eps, schedule, i, x) + schedule.sigma[i] * randn(2, 5, seed=i)
        agrees.append(torch.allclose(ours, scheduler.step(eps, time, x, generator=seeded(i)).prev_sample, **EXACT))
    assert agrees == [True] * 19 + [False]


@QUICK
@given(st.integers(2, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), st.floats(0.01, 1))
def test_any_number_of_steps_makes_a_chain_of_noisy_steps_that_ends_at_the_first_alpha_bar(n_and_T, eta):
    n, T = n_and_T
    bars = torch.linspace(0.99, 0.01, n, dtype=torch.float64)
    s = make_schedule(bars, T, eta)
    assert s.timesteps[-1] == 1 and (s.timesteps.diff() < 0).all() and len(s.timesteps) == T
    assert torch.equal(s.alpha_bar, bars[s.timesteps]) and torch.equal(s.alpha_bar_prev[:-1], s.alpha_bar[1:])
    assert s.alpha_bar_prev[-1] == bars[0] and (s.sigma > 0).all()
    assert_close(s.sigma, eta * make_schedule(bars, T).sigma, **EXACT)


def test_a_schedule_takes_other_times_and_is_never_narrower_than_float32():
    s = make_schedule(BARS, 3, timesteps=torch.tensor([999, 400, 7]))
    assert s.timesteps.tolist() == [999, 400, 7] and torch.equal(s.alpha_bar_prev, BARS[[400, 7, 0]])
    for dtype, wide in [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]:
        s = make_schedule(torch.tensor([0.9, 0.5, 0.1], dtype=dtype), 2)
        assert s.sigma.dtype == s.alpha_bar.dtype == s.alpha_bar_prev.dtype == wide and s.timesteps.dtype == torch.int64


@pytest.mark.parametrize("T", [1, 7, 50, 999])
def test_with_eta_1_the_mean_is_alg_1_line_28(T):
    schedule, net, x = make_schedule(BARS, T), tanh_net(randn(3, 3), randn(3)), randn(4, 3, seed=1)
    for i in range(0, T, 7):
        assert_close(policy_mean(net, schedule, i, x), line_28(net, schedule, i, x), **EXACT)


@QUICK
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(0.01, 10), st.integers(0, 99))
def test_log_prob_is_the_normal_density_summed_over_every_dimension(D, sigma, seed):
    action, mean = randn(2, 3, *D, seed=seed)
    expected = Normal(mean, sigma).log_prob(action).flatten(1).sum(1)
    assert_close(log_prob(action, mean, sigma), expected, **EXACT)
    assert_close(log_prob(action, mean, torch.tensor(sigma, dtype=torch.float64)), expected, **EXACT)


def test_log_prob_doubles_when_the_image_is_laid_twice():
    action, mean = randn(2, 3, 4, 8, 8)
    twice = log_prob(action.repeat(1, 2, 1, 1), mean.repeat(1, 2, 1, 1), 0.3)
    assert_close(twice, 2 * log_prob(action, mean, 0.3), **EXACT)


def test_gradient_of_log_prob_by_finite_differences():
    action, mean = randn(2, 3, 4)
    assert torch.autograd.gradcheck(lambda a, m: log_prob(a, m, 0.7), (action.requires_grad_(), mean.requires_grad_()))


# Rollout


def gaussian_chain(T, x_T=0.7):
    """The exact denoiser of data N(1, 0.6^2) in one dimension, and the law N(mean, cov) of its chain x_{T-1} ... x_0.

    Every step is affine, x' = A x + b + sigma z, so the chain is jointly Gaussian; A and b are read off line 28.
    """
    schedule, bar = make_schedule(BARS, T), BARS[:, None]

    def eps(x, time, cond=None):
        ab = bar[time]
        return (1 - ab).sqrt() * (x - ab.sqrt()) / (0.36 * ab + 1 - ab)

    mean, factor, last, row = [], [], x_T, torch.zeros(T, dtype=torch.float64)
    for i in range(T):
        b, A_plus_b = line_28(eps, schedule, i, torch.tensor([[0.0], [1.0]], dtype=torch.float64)).flatten()
        last, row = (A_plus_b - b) * last + b, (A_plus_b - b) * row
        row[i] = schedule.sigma[i]
        mean.append(last)
        factor.append(row)
    factor = torch.stack(factor)
    return eps, schedule, torch.stack(mean), factor @ factor.T


@QUICK
@given(st.integers(1, 6), st.integers(0, 99))
def test_the_log_probs_of_a_chain_add_up_to_its_joint_density(T, seed):
    eps, schedule, mean, cov = gaussian_chain(T)
    trajectory = rollout(eps, schedule, torch.full((5, 1), 0.7, dtype=torch.float64), generator=seeded(seed))
    joint = MultivariateNormal(mean, cov).log_prob(trajectory.x[1:, :, 0].T)
    # the covariance of neighbouring states is nearly singular: its Cholesky loses up to eight of sixteen digits
    assert_close(trajectory.log_prob.sum(0), joint, rtol=1e-8, atol=1e-8)


def test_rollout_samples_the_known_law_of_a_gaussian_chain():
    B, T = 40_000, 5
    eps, schedule, mean, cov = gaussian_chain(T)
    x = rollout(eps, schedule, torch.full((B, 1), 0.7, dtype=torch.float64), generator=seeded(0)).x[1:, :, 0]
    var = cov.diag()
    mean_error, cov_error = (var / B).sqrt(), ((var[:, None] * var + cov**2) / B).sqrt()  # one standard error each
    assert ((x.mean(1) - mean).abs() < 5 * mean_error).all()
    assert ((torch.cov(x) - cov).abs() < 5 * cov_error).all()


def test_chains_of_a_group_start_alike_and_then_draw_independent_noise():
    B, schedule = 20_000, make_schedule(BARS, 2)
    x_T = randn(B // 2, 1).repeat_interleave(2, 0)
    x = rollout(lambda x, *_: torch.zeros_like(x), schedule, x_T, generator=seeded(1)).x
    assert torch.equal(x[0], x_T)
    z = (x[1] - line_28(lambda x, *_: torch.zeros_like(x), schedule, 0, x_T)) / schedule.sigma[0]
    correlation = torch.corrcoef(z.view(-1, 2).T)[0, 1]
    assert correlation.abs() < 5 / math.sqrt(B / 2)  # five standard errors of a correlation that is 0


def test_rollout_repeats_with_its_generator_and_keeps_no_graph():
    w = world()
    x_T, schedule = w.args["trajectory"].x[0], w.args["schedule"]
    once, again, other = (rollout(w.args["policy"], schedule, x_T, None, seeded(s)) for s in (7, 7, 8))
    assert torch.equal(once.x, again.x) and torch.equal(once.log_prob, again.log_prob)
    assert not torch.equal(once.x, other.x)
    assert once.x.shape == (5, 6, 3) and once.log_prob.shape == (4, 6)
    assert not once.x.requires_grad and not once.log_prob.requires_grad


def test_trajectory_log_prob_of_the_sampling_policy_is_the_log_prob_of_the_trajectory():
    w = world()
    again = trajectory_log_prob(w.reference, w.args["schedule"], w.args["trajectory"], w.args["cond"])
    assert torch.equal(again, w.args["trajectory"].log_prob)


def test_log_probs_of_another_policy_are_those_of_alg_1_lines_28_to_31_with_its_cond():
    w = world()
    ours = trajectory_log_prob(w.args["policy"], w.args["schedule"], w.args["trajectory"], w.args["cond"])
    assert not ours.requires_grad
    assert_close(ours, torch.stack([lines_28_to_31(w.args["policy"], w.args, i) for i in range(4)]).detach(), **EXACT)


# Preferences


quarters = st.integers(-8, 8).map(lambda n: n / 4)  # sums and differences of these are exact


@QUICK
@given(st.lists(st.tuples(quarters, quarters), max_size=9), st.integers(0, 8).map(lambda n: n / 4))
def test_preference_is_the_sign_of_a_difference_beyond_the_margin(scores, margin):
    a, b = torch.tensor(scores, dtype=torch.float64).reshape(-1, 2).T
    h = preference(a, b, margin)
    assert h.tolist() == [0 if abs(x - y) <= margin else 1 if x > y else -1 for x, y in scores]
    assert h.dtype == torch.int64 and torch.equal(preference(b, a, margin), -h)


def test_without_margin_only_equal_scores_tie():
    assert preference(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0001, 1.0])).tolist() == [0, -1, 1]


@pytest.mark.parametrize("gap", [-2.0, -0.5, 0.0, 1.0, 3.0])
def test_bradley_terry_prefers_as_often_as_eq_3_says(gap):
    n, p = 40_000, 1 / (1 + math.exp(-gap))
    score = randn(n)
    h = bradley_terry(score + gap, score, seeded(1))
    assert set(h.tolist()) == {1, -1} and h.dtype == torch.int64
    share = (h == 1).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)  # five binomial standard deviations
    assert torch.equal(h, bradley_terry(score + gap, score, seeded(1)))


@st.composite
def groups(draw, values):
    N, K = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    return [[draw(values) for _ in range(K)] for _ in range(N)], K


def double_loop(table, K, better):
    return [[n * K + k, n * K + m] for n, row in enumerate(table) for k in range(K) for m in range(K)
            if better(row[k], row[m])]


@QUICK
@given(groups(st.integers(0, 3)), st.sampled_from([torch.int64, torch.float16, torch.float64]))
def test_scores_pair_every_better_chain_of_a_group_with_every_worse_one(table_and_K, dtype):
    table, K = table_and_K
    pairs = pairs_from_scores(torch.tensor(table, dtype=dtype).reshape(-1, K))
    assert sorted(pairs.tolist()) == double_loop(table, K, lambda a, b: a > b)
    assert pairs.shape[1:] == (2,) and pairs.dtype == torch.int64


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
    rows = {1: lambda n: [[2 * n, 2 * n + 1]], -1: lambda n: [[2 * n + 1, 2 * n]], 0: lambda n: []}
    assert sorted(pairs.tolist()) == sorted(row for n, label in enumerate(h) for row in rows[label](n))
    assert pairs.shape[1:] == (2,)


def test_chain_k_of_group_n_is_row_n_K_plus_k():
    assert pairs_from_scores(torch.tensor([[5.0, 5.0, 5.0], [1.0, 1.0, 2.0]])).tolist() == [[5, 3], [5, 4]]


def test_seven_images_with_three_tags_make_twelve_pairs():
    assert len(pairs_from_tags(torch.tensor([[True, False, False, True, False, True, False]]))) == 12


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
    gradient_a, gradient_b = torch.autograd.grad(loss.sum(), (a, b))
    closed = [-beta / (1 + math.exp(beta * (x - y))) for x, y in rows]
    assert loss.shape == (len(rows),)
    assert_close(loss.tolist(), [math.log1p(math.exp(-beta * (x - y))) for x, y in rows], **EXACT)
    assert_close(gradient_a.tolist(), closed, **EXACT)
    assert_close(gradient_b.tolist(), [-g for g in closed], **EXACT)


def test_gradient_of_the_loss_by_finite_differences():
    a, b = randn(2, 5).mul(3)
    assert torch.autograd.gradcheck(lambda a, b: d3po_loss(a, b, 0.4), (a.requires_grad_(), b.requires_grad_()))


@QUICK
@given(st.floats(-1e4, 1e4), st.floats(0.001, 10), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_loss_and_gradient_are_finite_for_any_difference(delta, beta, dtype):
    a = torch.tensor([delta], dtype=dtype, requires_grad=True)
    loss = d3po_loss(a, torch.zeros(1, dtype=dtype), beta)
    loss.sum().backward()
    assert loss.isfinite().all() and (loss >= 0).all() and a.grad.isfinite().all()


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


def test_each_loss_is_eq_14_by_torch_distributions_and_autograd():
    w = world()
    for i, loss in enumerate(d3po_losses(**w.args, steps=range(4))):
        assert_close(loss, eq_14(w, i), **EXACT)
        ours, theirs = (torch.autograd.grad(value, w.parameters) for value in (loss, eq_14(w, i)))
        assert_close(ours, theirs, **EXACT)


def test_the_pieces_of_the_chain_loss_are_eq_5_by_autograd_through_the_whole_chain():
    w = world()
    assert_close(sum(chain_dpo_losses(**w.args)), eq_5(w), **EXACT)
    expected = torch.autograd.grad(eq_5(w), w.parameters)
    assert_close(summed_gradient(chain_dpo_losses(**w.args), w.parameters), list(expected), **EXACT)


@BOTH
def test_gradient_of_the_losses_by_finite_differences(losses):
    w = world()

    def total(*parameters):
        return sum(losses(**w.args | {"policy": tanh_net(*parameters), "steps": [2, 0, 3, 1]}))

    assert torch.autograd.gradcheck(total, w.parameters)


def test_chain_loss_restricted_to_one_step_is_eq_14_of_that_step():
    w = world()
    (piece,) = chain_dpo_losses(**w.args, steps=[2])
    assert_close(piece, eq_14(w, 2), **EXACT)
    assert_close(torch.autograd.grad(piece, w.parameters), torch.autograd.grad(eq_14(w, 2), w.parameters), **EXACT)


def test_step_0_alone_is_eq_12_where_the_pair_shares_its_state():
    w = world()
    x, (winner, loser) = w.args["trajectory"].x, w.args["pairs"].T
    assert torch.equal(x[0, winner], x[0, loser])
    (loss,) = d3po_losses(**w.args, steps=[0])
    assert_close(loss, eq_14(w, 0), **EXACT)


@BOTH
@QUICK
@given(order=st.permutations(range(6)))
def test_losses_do_not_depend_on_the_order_of_the_chains(losses, order):
    w, order = world(), torch.tensor(order)
    trajectory, where = w.args["trajectory"], torch.argsort(order)
    moved = {"trajectory": Trajectory(trajectory.x[:, order], trajectory.log_prob[:, order]),
             "ref_log_prob": w.args["ref_log_prob"][:, order], "cond": w.args["cond"][order],
             "pairs": where[w.args["pairs"]]}
    for a, b in zip(losses(**w.args, steps=range(4)), losses(**w.args | moved, steps=range(4)), strict=True):
        assert_close(a, b, **EXACT)


@BOTH
@QUICK
@given(order=st.permutations(range(5)))
def test_losses_do_not_depend_on_the_order_of_the_pairs(losses, order):
    w = world(pairs=((0, 1), (5, 0), (0, 3), (3, 2), (4, 5)))
    moved = w.args | {"pairs": w.args["pairs"][order]}
    for a, b in zip(losses(**w.args, steps=range(4)), losses(**moved, steps=range(4)), strict=True):
        assert_close(a, b, **EXACT)


def test_a_chain_may_be_in_many_pairs_and_a_pair_may_be_named_twice():
    w = world(pairs=((0, 1), (0, 1), (5, 0), (3, 1)))
    for i, loss in enumerate(d3po_losses(**w.args, steps=range(4))):
        assert_close(loss, eq_14(w, i), **EXACT)
    assert_close(sum(chain_dpo_losses(**w.args)), eq_5(w), **EXACT)


@BOTH
def test_images_and_flat_vectors_of_the_same_numbers_have_the_same_losses(losses):
    schedule, pairs = make_schedule(BARS, 3, eta=0.5), torch.tensor([[0, 1], [3, 2]])
    image = rollout(lambda x, *_: x.sin(), schedule, randn(4, 2, 5, 3), generator=seeded(0))
    flat = rollout(lambda x, *_: x.sin(), schedule, randn(4, 2, 5, 3).flatten(1), generator=seeded(0))
    assert image.x.shape == (4, 4, 2, 5, 3)
    values = [torch.stack(list(losses(lambda x, *_: x.cos(), schedule, t, pairs, 0.1, t.log_prob, steps=range(3))))
              for t in (image, flat)]
    assert_close(*values, **EXACT)


def test_each_loss_is_that_of_the_weights_at_its_turn():
    w = world()
    losses = d3po_losses(**w.args, steps=[3, 1])
    assert_close(next(losses), eq_14(w, 3), **EXACT)
    with torch.no_grad():
        w.parameters[0].add_(0.3)
    assert_close(next(losses), eq_14(w, 1), **EXACT)


# One Gaussian step: the optimum is known


ONE_STEP = Schedule(torch.tensor([500]), *torch.tensor([[0.3], [0.8], [0.4]], dtype=torch.float64))
REWARD, BETA = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5


def constant(shift):
    return lambda x, time, cond=None: shift.expand_as(x)


def shifted_by(displacement):
    """The constant eps that moves the mean of ONE_STEP by this much."""
    per_eps = math.sqrt(1 - 0.8 - 0.4**2) - math.sqrt(0.8 / 0.3 * (1 - 0.3))
    return displacement / per_eps


def one_step_chains(n):
    zero = torch.zeros(2, dtype=torch.float64)
    return rollout(constant(zero), ONE_STEP, zero.expand(2 * n, 2), generator=seeded(1))


def test_one_step_with_expected_labels_is_stationary_at_the_mean_moved_by_sigma_squared_w_over_beta():
    trajectory = one_step_chains(1000)
    shift = shifted_by(0.4**2 * REWARD / BETA).requires_grad_()
    mean = policy_mean(constant(shift), ONE_STEP, 0, trajectory.x[0])
    log_ratio = log_prob(trajectory.x[1], mean, ONE_STEP.sigma[0]) - trajectory.log_prob[0]
    a, b = log_ratio[::2], log_ratio[1::2]
    p_a = torch.sigmoid((trajectory.x[1, ::2] - trajectory.x[1, 1::2]) @ REWARD)
    loss = p_a * d3po_loss(a, b, BETA) + (1 - p_a) * d3po_loss(b, a, BETA)
    (gradient,) = torch.autograd.grad(loss.mean(), shift)
    assert_close(gradient, torch.zeros_like(gradient), **EXACT)


@BOTH
def test_one_step_with_drawn_labels_learns_the_mean_moved_by_sigma_squared_w_over_beta(losses):
    n, sigma = 100_000, 0.4
    trajectory = one_step_chains(n)
    score = trajectory.x[-1] @ REWARD
    pairs = pairs_from_feedback(bradley_terry(score[::2], score[1::2], seeded(2)))
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=50, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        (loss,) = losses(constant(shift), ONE_STEP, trajectory, pairs, BETA, trajectory.log_prob)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    learned = shift.detach() / shifted_by(torch.ones(2, dtype=torch.float64))
    difference, p = trajectory.x[-1, ::2] - trajectory.x[-1, 1::2], torch.sigmoid(score[::2] - score[1::2])
    # logistic regression of the label on beta/sigma^2 (a - b): Fisher information, hence one standard error of 0.004
    information = (BETA / sigma**2) ** 2 * (p * (1 - p) * difference.T) @ difference
    error = information.inverse().diag().sqrt()
    assert ((learned - sigma**2 * REWARD / BETA).abs() < 4.5 * error).all()
    assert (error < 0.02 * (sigma**2 * REWARD / BETA).abs()).all()


# Calls of the denoiser


def test_a_step_calls_the_policy_once_and_only_when_its_loss_is_asked_for():
    w = world()
    policy = Counting(w.args["policy"])
    losses = d3po_losses(**w.args | {"policy": policy})
    assert policy.calls == []
    for n, _ in enumerate(losses, 1):
        assert len(policy.calls) == n
    assert n == 4


def test_the_chain_loss_calls_the_policy_once_a_step_to_find_delta_and_once_a_step_to_differentiate():
    w = world()
    policy = Counting(w.args["policy"])
    for n, _ in enumerate(chain_dpo_losses(**w.args | {"policy": policy}), 1):
        assert len(policy.calls) == 4 + n
    assert sorted(policy.times()) == sorted(w.args["schedule"].timesteps.tolist() * 2)


@BOTH
def test_only_chains_in_pairs_reach_the_policy_each_once_with_its_own_state_time_and_cond(losses):
    w = world(pairs=((4, 1), (3, 1), (4, 3)))
    numbers = torch.arange(6)
    policy = Counting(lambda x, time, cond: w.args["policy"](x, time))
    list(losses(**w.args | {"policy": policy, "cond": numbers, "steps": range(4)}))
    for n, (x, time, chain) in enumerate(policy.calls):
        assert sorted(chain.tolist()) == [1, 3, 4]
        assert torch.equal(x, w.args["trajectory"].x[n % 4, chain])
        assert time.tolist() == [w.args["schedule"].timesteps[n % 4]] * 3


@BOTH
def test_without_pairs_there_is_no_loss_and_no_call(losses):
    w = world()
    policy = Counting(w.args["policy"])
    none = pairs_from_scores(torch.ones(3, 2))
    assert list(losses(**w.args | {"policy": policy, "pairs": none})) == []
    assert policy.calls == []


def test_the_policy_that_sampled_is_a_reference_that_need_not_be_called_again():
    w = world()
    model = Counting(w.reference)
    trajectory = rollout(model, w.args["schedule"], w.args["trajectory"].x[0], w.args["cond"], seeded(6))
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
    orders = []
    for seed in (0, 0, 1, 2):
        policy = Counting(w.args["policy"])
        torch.manual_seed(seed)
        list(d3po_losses(**w.args | {"policy": policy}))
        orders.append(policy.times())
    assert all(sorted(order, reverse=True) == w.args["schedule"].timesteps.tolist() for order in orders)
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3


# Memory


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, now and at their peak."""

    def __init__(self):
        self.live = self.peak = 0

    class Held:
        def __init__(self, owner, tensor):
            self.owner, self.tensor = owner, tensor.detach()  # a node that saves its output would keep itself alive
            owner.live += tensor.nbytes
            owner.peak = max(owner.peak, owner.live)

        def __del__(self):
            self.owner.live -= self.tensor.nbytes

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(lambda t: self.Held(self, t), lambda held: held.tensor)


def peak_of(T, body):
    w, saved = world(T), SavedBytes()
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
    w, saved = world(), SavedBytes()
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
    action, mean = torch.full((2, 8), 300.0, dtype=dtype), torch.full((2, 8), -200.0, dtype=dtype)
    assert not ((action - mean).half() ** 2).isfinite().any()
    ours = log_prob(action, mean, 0.5)
    assert ours.dtype == torch.float32
    # float32 carries 7 digits
    assert_close(ours, Normal(mean.float(), 0.5).log_prob(action.float()).sum(1), rtol=1e-6, atol=0)


def test_a_half_denoiser_and_half_states_give_a_float32_mean():
    x, eps, schedule = randn(4, 3).half(), randn(4, 3, seed=1).half(), make_schedule(BARS.float(), 5)
    mean = policy_mean(lambda *_: eps, schedule, 2, x)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, policy_mean(lambda *_: eps.float(), schedule, 2, x.float()))


def test_rollout_from_half_noise_keeps_states_and_log_probs_in_float32():
    x_T, schedule = randn(4, 3).half(), make_schedule(BARS.float(), 5)
    denoiser = Counting(lambda x, *_: x.half())
    trajectory = rollout(denoiser, schedule, x_T, generator=seeded(0))
    assert trajectory.x.dtype == trajectory.log_prob.dtype == torch.float32
    assert torch.equal(trajectory.x[0], x_T.float())
    assert all(x.dtype == torch.float32 for x, _, _ in denoiser.calls)  # as when the log-probs are computed again


@BOTH
def test_losses_of_a_half_trajectory_are_those_of_its_values_in_float32(losses):
    w = world(dtype=torch.float32)
    half = w.args["trajectory"].x.half()
    half[1:, 0] = half[1:, 1] = 300

    def values(x):
        net = {"policy": lambda x, *_: x / 2, "trajectory": Trajectory(x, w.args["trajectory"].log_prob)}
        return torch.stack(list(losses(**w.args | net, steps=range(4))))

    assert values(half).dtype == torch.float32 and values(half).isfinite().all()
    assert_close(values(half), values(half.float()))


def test_loss_subtracts_half_log_ratios_in_float32():
    loss = d3po_loss(torch.tensor([-6e4]).half(), torch.tensor([6e4]).half(), 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == 6e4  # float16 holds 6e4 exactly, but not the difference 1.2e5


def test_bradley_terry_draws_rare_upsets_of_half_scores_in_float32():
    n, p = 1_000_000, 1 / (1 + math.exp(8))  # 1 - p is no float16: the nearest would make upsets half as frequent again
    h = bradley_terry(torch.full((n,), 8.0).half(), torch.zeros(n).half(), seeded(0))
    assert abs((h == -1).sum().item() - n * p) < 5 * math.sqrt(n * p)  # five standard deviations of a rare count


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
    for i, (plain, clipped) in enumerate(zip(d3po_losses(**w.args, steps=range(4)),
                                             d3po_losses(**w.args, steps=range(4), clip=0.1), strict=True)):
        assert_close(clipped, dpo(clamped[i], w.args["pairs"], 0.3), **EXACT)
        assert_close(plain, eq_14(w, i), **EXACT)
        assert not torch.isclose(plain, clipped)


# What is refused


NAN = torch.tensor([math.nan, 0.0])
ONES = torch.ones(2)
REFUSED = {  # the message must name what was wrong
    "alpha_bars of two dimensions": (lambda: make_schedule(BARS[None], 4), "alpha_bars"),
    "alpha_bars that increase": (lambda: make_schedule(BARS.flip(0), 4), "alpha_bars.*decrease"),
    "alpha_bars that stay": (lambda: make_schedule(torch.tensor([0.9, 0.5, 0.5]), 2), "alpha_bars.*decrease"),
    "alpha_bars of 1": (lambda: make_schedule(torch.tensor([1.0, 0.5, 0.1]), 2), "alpha_bars"),
    "alpha_bars of 0": (lambda: make_schedule(torch.tensor([0.9, 0.5, 0.0]), 2), "alpha_bars"),
    "betas for alpha_bars": (lambda: make_schedule(torch.linspace(1e-4, 0.02, 1000), 20), "alpha_bars"),
    "no steps": (lambda: make_schedule(BARS, 0), "num_steps"),
    "more steps than noise levels": (lambda: make_schedule(BARS, 1000), "num_steps.*999"),
    "eta 0": (lambda: make_schedule(BARS, 4, eta=0), "eta.*(no noise|density)"),
    "negative eta": (lambda: make_schedule(BARS, 4, eta=-0.5), "eta"),
    "eta above 1": (lambda: make_schedule(BARS, 4, eta=1.01), "eta"),
    "eta NaN": (lambda: make_schedule(BARS, 4, eta=math.nan), "eta"),
    "times that increase": (lambda: make_schedule(BARS, 2, timesteps=torch.tensor([5, 9])), "timesteps"),
    "too few times": (lambda: make_schedule(BARS, 2, timesteps=torch.tensor([5])), "timesteps"),
    "time 0": (lambda: make_schedule(BARS, 2, timesteps=torch.tensor([5, 0])), "timesteps"),
    "time N": (lambda: make_schedule(BARS, 2, timesteps=torch.tensor([1000, 5])), "timesteps"),
    "denoiser that drops a dimension": (
        lambda: policy_mean(lambda x, *_: x[:, 0], make_schedule(BARS, 4), 0, randn(2, 3)), "denoiser"),
    "denoiser that would broadcast": (
        lambda: rollout(lambda x, *_: x[:1], make_schedule(BARS, 4), randn(2, 3)), "denoiser"),
    "action and mean of other shapes": (lambda: log_prob(randn(2, 3), randn(1, 3), 1.0), "action.*mean"),
    "sigma 0": (lambda: log_prob(randn(2, 3), randn(2, 3), 0.0), "sigma.*eta"),
    "negative sigma": (lambda: log_prob(randn(2, 3), randn(2, 3), torch.tensor(-1.0)), "sigma"),
    "preference of other shapes": (lambda: preference(torch.ones(2), torch.ones(3)), "scores"),
    "preference of NaN": (lambda: preference(ONES, NAN), "NaN"),
    "negative margin": (lambda: preference(ONES, ONES, -0.1), "margin"),
    "bradley_terry of other shapes": (lambda: bradley_terry(torch.ones(2), torch.ones(3)), "scores"),
    "bradley_terry of NaN": (lambda: bradley_terry(NAN, ONES), "NaN"),
    "label 2": (lambda: pairs_from_feedback(torch.tensor([1, 2])), "label"),
    "label 0.5": (lambda: pairs_from_feedback(torch.tensor([0.5])), "label"),
    "labels of two dimensions": (lambda: pairs_from_feedback(torch.tensor([[1, -1]])), "h "),
    "scores of one dimension": (lambda: pairs_from_scores(ONES), "scores"),
    "scores NaN": (lambda: pairs_from_scores(NAN[None]), "NaN"),
    "tags that are numbers": (lambda: pairs_from_tags(torch.tensor([[0, 1]])), "bool"),
    "tags of one dimension": (lambda: pairs_from_tags(torch.tensor([True, False])), r"\(N, K\)"),
    "log-ratios of other shapes": (lambda: d3po_loss(torch.ones(2), torch.ones(1), 0.1), "log-ratios"),
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


@pytest.mark.parametrize("change", [{"cond": torch.zeros(3, 3)}, {"schedule": make_schedule(BARS, 5)}])
def test_trajectory_log_prob_refuses_what_does_not_fit(change):
    w = world()
    fit = {"schedule": w.args["schedule"], "trajectory": w.args["trajectory"], "cond": w.args["cond"]}
    with pytest.raises(ValueError, match="cond|states"):
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
        with pytest.raises(ValueError, match=r"\b2\b.*sigma.*eta"):
            call()


# The file itself


def test_d3po_imports_only_torch_and_the_standard_library_and_stays_short():
    source = Path(d3po.__file__).read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.split(".")[0] for node in imports for name in
               ([node.module or "."] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}
    assert modules - set(sys.stdlib_module_names) == {"torch"}
    assert len(source.splitlines()) <= 350

"""The two optima against closed forms, nested Monte Carlo, brute force and gradient ascent.

Grids have spacing 0.1, twice the spacing of a run: a quarter of the time, and four times the error,
which `Optimum.error` states and every comparison allows for.
"""

import math
from functools import partial

import pytest
import torch

import d3po
from toy import ddpm, optimum, worlds

RING = worlds.exact_denoiser(worlds.MIXTURES["ring"])
ONE_STEP = d3po.Schedule(
    timesteps=torch.tensor([300]),
    alpha_bar=torch.tensor([0.3]),
    alpha_bar_prev=torch.tensor([0.9]),
    sigma=torch.tensor([0.4]),
)
GAUSSIAN = worlds.exact_denoiser(worlds.Mixture(torch.tensor([[0.6, -0.4]]), torch.ones(1), sd=0.5))
solve = partial(optimum.solve, spacing=0.1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def schedule(T):
    return d3po.make_schedule(worlds.ALPHA_BARS, T)


@pytest.fixture(scope="module", params=[1.0, 0.3], ids=["beta 1", "beta 0.3"])
def problem(request):
    """(schedule, beta, optimum): get close to (2, 0) on the ring, in 10 steps."""
    beta = request.param
    return schedule(10), beta, solve(RING, schedule(10), worlds.reach, beta=beta)


def mean_and_error(sample):
    return sample.double().mean().item(), sample.double().std().item() / math.sqrt(len(sample))


def objective(policy, sched, x_T, *, beta, seed):
    """Score, log(pi / pi_ref) (its mean is the KL) and J of chains of the policy: (B,) each."""
    chains = d3po.rollout(policy, sched, x_T, generator=seeded(seed))
    kl = (chains.log_prob - d3po.trajectory_log_prob(RING, sched, chains)).sum(0)
    score = worlds.reach(chains.x[-1])
    return score, kl, score - beta * kl


# Monte Carlo that knows nothing of grids. Seeds are fixed; three standard errors is what a correct
# program exceeds once in 370 draws of the seed, and to them is added the program's own error bound.


def test_values_are_those_of_nested_monte_carlo(problem):
    sched, beta, best = problem
    outer, inner = 500, 400
    x_T = torch.randn(outer, 2, generator=seeded(0))
    chains = d3po.rollout(RING, sched, x_T.repeat_interleave(inner, 0), generator=seeded(1))
    r = worlds.reach(chains.x[-1]).double().view(outer, inner)
    v0 = optimum.interpolate(best.value[:1], best.axis, x_T)[0]
    weight = ((r - v0[:, None]) / beta).exp()  # of mean 1 in every row, if V_0 is right

    mean, se = mean_and_error(weight.mean(1))
    assert abs(mean - 1) < 3 * se + best.error / beta

    bias = weight.var(1) / (2 * inner * weight.mean(1) ** 2)
    nested = v0 + beta * (weight.mean(1).log() + bias)
    mean, se = mean_and_error(nested)
    assert abs(mean - best.j_star) < 3 * se + best.error
    mean, se = mean_and_error(nested - v0)  # the same noises: a much smaller standard error
    # the series behind the bias is cut after var / 2K; its next terms are of order
    # E[weight^4] / K^2, here below 0.004
    assert abs(mean) < 3 * se + best.error + 0.004 * beta

    mean, se = mean_and_error((weight * r).mean(1))
    assert abs(mean - best.score_star) < 3 * se + best.error
    mean, se = mean_and_error(r.mean(1))
    assert abs(mean - best.j_ref) < 3 * se + best.error
    assert best.kl_star == pytest.approx((best.score_star - best.j_star) / beta)


def test_chains_of_the_optimal_means_attain_j_gauss_and_shifted_means_less(problem):
    sched, beta, best = problem
    x_T = torch.randn(20_000, 2, generator=seeded(4))
    policy = optimum.gaussian_policy(RING, sched, best)
    sampled = objective(policy, sched, x_T, beta=beta, seed=5)
    for name, sample, unit in zip(("score", "kl", "j"), sampled, (1, beta, 1), strict=True):
        mean, se = mean_and_error(sample)
        assert abs(mean - best.numbers()[f"{name}_gauss"]) < 3 * se + best.error / unit
    for factor in (0.7, 1.3):
        shifted = best._replace(shift=best.shift * factor)
        policy = optimum.gaussian_policy(RING, sched, shifted)
        mean, se = mean_and_error(sampled[2] - objective(policy, sched, x_T, beta=beta, seed=5)[2])
        assert mean > 3 * se


def test_evaluate_knows_the_reference_the_best_means_and_what_chains_average_to(problem):
    sched, _, best = problem
    evaluate = partial(optimum.evaluate, spacing=0.1, score=worlds.reach)
    assert evaluate(RING, RING, sched) == pytest.approx((best.j_ref, 0), abs=1e-9)
    policy = optimum.gaussian_policy(RING, sched, best)
    # the same recursion; only the float32 of the policy's noise prediction is new
    expected = best.score_gauss, best.kl_gauss
    assert evaluate(policy, RING, sched) == pytest.approx(expected, abs=1e-4)


def test_evaluate_is_what_sampled_chains_average_to():
    torch.manual_seed(0)
    policy = ddpm.Adapter(RING, schedule(10), worlds.MIXTURES["ring"])
    torch.nn.init.normal_(policy.correction.mlp[-1].weight, std=0.3)
    exact = optimum.evaluate(policy, RING, schedule(10), score=worlds.reach, spacing=0.1)
    x_T = torch.randn(20_000, 2, generator=seeded(8))
    sampled = objective(policy, schedule(10), x_T, beta=1.0, seed=9)
    for value, sample in zip(exact, sampled, strict=False):
        mean, se = mean_and_error(sample)
        assert abs(value - mean) < 3 * se + 0.012  # and the quadrature's own error at this spacing


def test_the_tilt_of_every_step_is_normalised_and_its_samples_have_the_best_score():
    # beta 1: at 0.3 some states weigh a rare action by 10^4, and a standard error says nothing
    sched, beta, states, draws = schedule(5), 1.0, 300, 300
    best = solve(RING, sched, worlds.reach, beta=beta)
    x_T = torch.randn(states, 2, generator=seeded(2))
    x = d3po.rollout(RING, sched, x_T, generator=seeded(3)).x
    for i, sigma in enumerate(sched.sigma):
        mean = d3po.policy_mean(RING, sched, i, x[i])[:, None]
        action = mean + sigma * torch.randn(states, draws, 2, generator=seeded(10 + i))
        now = optimum.interpolate(best.value[i, None], best.axis, x[i])[0]
        if i == len(sched.sigma) - 1:
            then = worlds.reach(action)
        else:
            flat = action.flatten(0, 1)
            then = optimum.interpolate(best.value[i + 1, None], best.axis, flat)[0]
            then = then.view(states, draws)
        average, se = mean_and_error(((then - now[:, None]) / beta).exp().mean(1))
        assert abs(average - 1) < 3 * se + best.error / beta, i

    x_T = torch.randn(2000, 2, generator=seeded(8))
    options = {"beta": beta, "optimum": best, "x_T": x_T, "generator": seeded(9)}
    x = optimum.sample_optimum(RING, sched, worlds.reach, **options)
    assert x.shape == (6, 2000, 2) and torch.equal(x[0], x_T)
    mean, se = mean_and_error(worlds.reach(x[-1]))
    # bias of 64 proposals: below 0.006
    assert abs(mean - best.score_star) < 3 * se + 0.006 + best.error


# Closed forms


@pytest.mark.parametrize("sched", [ONE_STEP, schedule(4)], ids=["T 1", "T 4"])
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_a_linear_score_on_one_gaussian_has_a_closed_form(sched, beta):
    """Every mean is a_i x + b_i and every V_i is linear in x."""
    one = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    w, j_ref, gain = torch.full((2,), 1 / math.sqrt(2), dtype=torch.float64), 0.0, 0.0
    slopes = []
    for i in reversed(range(len(sched.sigma))):
        slopes.insert(0, w)
        b, a_plus_b = d3po.policy_mean(GAUSSIAN, sched, i, one)
        gain += (sched.sigma[i] ** 2 * (w @ w) / (2 * beta)).item()
        j_ref += (w @ b).item()
        w = w * (a_plus_b - b)

    best = solve(GAUSSIAN, sched, worlds.direction, beta=beta)
    # The best policy is Gaussian here:
    #     E exp(w.a / beta) = exp(w.mu / beta + sigma^2 |w|^2 / (2 beta^2))
    # 5e-4: the cubic through exp(V / beta), whose relative error is (spacing / beta)^4 / 100 a step
    # and vanishes for the means.
    assert best.j_ref == pytest.approx(j_ref, abs=1e-5)
    assert best.j_gauss == pytest.approx(j_ref + gain, abs=1e-5)
    assert best.score_gauss == pytest.approx(j_ref + 2 * gain, abs=1e-5)
    assert best.kl_gauss == pytest.approx(gain / beta, abs=1e-4)
    assert best.j_star == pytest.approx(j_ref + gain, abs=5e-4)
    assert best.score_star == pytest.approx(j_ref + 2 * gain, abs=5e-4)
    assert best.kl_star == pytest.approx(gain / beta, abs=5e-4 / beta)

    middle = len(best.axis) // 2
    for i, w in enumerate(slopes):
        # pi* = N(mu + sigma^2 w / beta, sigma^2 I); float32 means limit it to 1e-5
        expected = sched.sigma[i].double() ** 2 * w / beta
        torch.testing.assert_close(best.shift[i, :, middle, middle], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_a_quadratic_score_on_one_step_has_a_closed_form(beta):
    """r = - |x|^2: pi* also narrows the step, so the best mean alone stays below J*."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    b, a_plus_b = d3po.policy_mean(GAUSSIAN, ONE_STEP, 0, corners)
    # E |a x_T + b|^2, x_T ~ N(0, I)
    mean2 = ((a_plus_b - b).square().sum() + b.square().sum()).item()
    variance = 0.4**2
    narrow = 1 + 2 * variance / beta  # pi* = N(mu / narrow, variance / narrow I)

    def minus_square(x):
        return -x.square().sum(1)

    best = solve(GAUSSIAN, ONE_STEP, minus_square, beta=beta)
    # the means are exact for cubics, up to float32; exp(V / beta) is not: see above
    assert best.j_ref == pytest.approx(-mean2 - 2 * variance, abs=1e-5)
    assert best.j_gauss == pytest.approx(-mean2 / narrow - 2 * variance, abs=1e-5)
    assert best.score_gauss == pytest.approx(-mean2 / narrow**2 - 2 * variance, abs=1e-5)
    assert best.j_star == pytest.approx(-mean2 / narrow - beta * math.log(narrow), abs=5e-4)
    assert best.score_star == pytest.approx(-mean2 / narrow**2 - 2 * variance / narrow, abs=5e-4)


def test_samples_of_one_step_are_the_shifted_gaussian():
    reference = worlds.exact_denoiser(worlds.Mixture(torch.zeros(1, 2), torch.ones(1), 1.0))
    sigma, beta, n = 0.4, 0.5, 20_000
    best = solve(reference, ONE_STEP, worlds.direction, beta=beta)
    x_T = torch.tensor([[0.5, -1.0]]).expand(n, 2)
    options = {"beta": beta, "optimum": best, "x_T": x_T, "generator": seeded(11)}
    x = optimum.sample_optimum(reference, ONE_STEP, worlds.direction, **options)[-1]
    expected = d3po.policy_mean(reference, ONE_STEP, 0, x_T[:1])[0] + sigma**2 / beta / math.sqrt(2)
    error = 3 * sigma / math.sqrt(n)
    # 0.004: bias of 64 proposals, 1 / K of the shift 0.23 for independent ones
    assert (x.mean(0) - expected).abs().max() < error + 0.004
    assert (x.T.cov() - sigma**2 * torch.eye(2)).abs().max() < 2 * sigma * error + 0.004


def test_the_best_mean_is_the_global_one():
    """Two hills, and means between them: compare with all points of a lattice 4 times as fine."""
    axis = torch.arange(-30, 31, dtype=torch.float64) / 10

    def hills(a):
        left, right = a - torch.tensor([-1.2, 0.3]), a - torch.tensor([1.3, -0.4])
        return (-left.square().sum(-1)).exp() + 1.2 * (-1.5 * right.square().sum(-1)).exp()

    table = hills(torch.cartesian_prod(axis, axis)).view(61, 61)
    lattice = torch.cartesian_prod(*[torch.linspace(-2.5, 2.5, 201, dtype=torch.float64)] * 2)
    height = hills(lattice)
    means = 3 * torch.rand(60, 2, generator=seeded(14), dtype=torch.float64) - 1.5
    for reach in (0.05, 0.5, 2.0, 8.0):
        best, value = optimum._best_mean(table, axis, means, reach=reach)
        exact = [(height - (lattice - m).square().sum(1) / (2 * reach)).max() for m in means]
        exact = torch.stack(exact)
        true_value = hills(best) - (best - means).square().sum(1) / (2 * reach)
        # 3e-4: the cubic through a hill 7 spacings wide; the lattice: half its spacing, squared,
        # times the curvature. One mean in twenty may lie where the hills tie and get the lower one;
        # a search that is only local loses 0.3.
        allowed = 3e-4 + 0.0125**2 * (1 / reach + 4)
        for error in (value - exact).abs(), (true_value - exact).abs():
            assert error.quantile(0.95) < allowed and error.mean() < 2e-3, (reach, error.topk(5))


# Order, limits and errors


@pytest.mark.parametrize(
    "mixture, score", [("ring", "direction"), ("grid", "reach"), ("islands", "avoid")]
)
def test_order_of_the_objectives(mixture, score):
    reference = worlds.exact_denoiser(worlds.MIXTURES[mixture])
    best = solve(reference, schedule(5), worlds.SCORES[score], beta=0.2)
    assert best.j_ref < best.j_gauss < best.j_star < best.score_star < 3.5, best.numbers()
    assert best.kl_star > 0 and best.kl_gauss > 0
    assert best.error < 0.02  # the coarser grid has spacing 0.2
    assert optimum.attained_share(best.j_ref, best) == 0
    assert optimum.attained_share(best.j_gauss, best) == 1
    assert optimum.attained_share((best.j_ref + best.j_gauss) / 2, best) == pytest.approx(0.5)


def test_halving_the_spacing_moves_results_less_than_the_stated_error():
    coarse, fine = (
        optimum.solve(RING, schedule(5), worlds.reach, beta=0.3, spacing=spacing)
        for spacing in (0.1, 0.05)
    )
    for name, value in fine.numbers().items():
        unit = 0.3 if name.startswith("kl") else 1
        assert abs(value - coarse.numbers()[name]) * unit < coarse.error
    assert fine.error < coarse.error / 2  # of second order or better
    assert fine.error < 0.004


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="beta"):
        solve(RING, schedule(5), worlds.reach, beta=0.0)
    sched = schedule(5)
    silent = sched._replace(sigma=sched.sigma * torch.tensor([1.0, 1, 0, 1, 1]))
    with pytest.raises(ValueError, match="sigma = 0"):
        solve(RING, silent, worlds.reach, beta=1.0)


@pytest.mark.slow  # it trains
def test_gradient_ascent_through_the_chain_comes_close_from_below():
    """Ascend J itself by backpropagation through sampling: it knows nothing of values or grids."""
    torch.manual_seed(0)
    T, beta, width, steps = 5, 1.0, 48, 250
    sched = schedule(T)
    index = {time: i for i, time in enumerate(sched.timesteps.tolist())}
    linear, silu = torch.nn.Linear, torch.nn.SiLU()
    net = torch.nn.Sequential(
        linear(4 + T, width), silu, linear(width, width), silu, linear(width, 2)
    )
    torch.nn.init.zeros_(net[-1].weight)
    torch.nn.init.zeros_(net[-1].bias)

    def policy(x, time, cond=None):
        eps, i = RING(x, time), index[int(time[0])]
        x_0 = (x - (1 - sched.alpha_bar[i]).sqrt() * eps) / sched.alpha_bar[i].sqrt()
        return eps + net(torch.cat([x, x_0, torch.eye(T)[i].expand(len(x), T)], 1))

    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, kl = torch.randn(256, 2), 0
        for i, sigma in enumerate(sched.sigma):
            mean = d3po.policy_mean(policy, sched, i, x)
            kl = kl + (mean - d3po.policy_mean(RING, sched, i, x)).square().sum(1) / (2 * sigma**2)
            x = mean + sigma * torch.randn_like(mean)
        optimizer.zero_grad()
        (beta * kl - worlds.reach(x)).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay.step()

    best = solve(RING, sched, worlds.reach, beta=beta)
    x_T = torch.randn(20_000, 2, generator=seeded(15))
    mean, se = mean_and_error(objective(policy, sched, x_T, beta=beta, seed=16)[2])
    assert mean < best.j_gauss + 3 * se + best.error
    assert optimum.attained_share(mean, best) > 0.9  # 0.97 to 0.99 after longer runs

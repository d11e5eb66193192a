"""The worlds against torch.distributions, Monte Carlo, diffusers and points computed by hand."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import d3po
from toy import worlds
from toy.worlds import ALPHA_BARS, MIXTURES, SCORES

EVERY_MIXTURE = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shares(mixture, x):
    """Share of the points that are nearest to each mode."""
    return torch.cdist(x, mixture.means).argmin(1).bincount(minlength=len(mixture.means)) / len(x)


def test_the_noise_levels_are_those_of_ddpm():
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    # diffusers multiplies up to 1,000 factors in float32, each rounded by at most 6e-8
    torch.testing.assert_close(ALPHA_BARS, scheduler.alphas_cumprod, rtol=6e-5, atol=0)


@EVERY_MIXTURE
def test_samples_have_the_weights_means_and_width_of_the_mixture(mixture):
    n = 100_000
    assert mixture.weights.sum() == pytest.approx(1)
    x = worlds.sample_data(mixture, n, seeded(0))
    assert x.shape == (n, 2)
    error = (mixture.weights * (1 - mixture.weights) / n).sqrt()
    # 4: up to 9 modes at once
    assert ((shares(mixture, x) - mixture.weights).abs() < 4 * error).all()
    # modes are 4.5 sd or more from the border: nearest is right
    mode = torch.cdist(x, mixture.means).argmin(1)
    for k, mean in enumerate(mixture.means):
        rest = x[mode == k] - mean
        assert (rest.mean(0).abs() < 4 * mixture.sd / math.sqrt(len(rest))).all()
        # the sd of a variance estimate is sqrt(2 / n) of it; 3e-3: what the tails beyond 4.5 sd add
        assert (rest.var(0) / mixture.sd**2 - 1).abs().max() < 4 * math.sqrt(2 / len(rest)) + 3e-3


@EVERY_MIXTURE
def test_the_exact_denoiser_is_the_score_of_the_noisy_density(mixture):
    """eps = - sqrt(1 - ab) grad log p_t(x), by torch.distributions and autograd."""
    for time in (0, 1, 50, 300, 700, 999):
        ab = ALPHA_BARS[time].double()
        sd = (ab * mixture.sd**2 + 1 - ab).sqrt()
        modes = Independent(Normal(ab.sqrt() * mixture.means.double(), sd), 1)
        density = MixtureSameFamily(Categorical(mixture.weights.double()), modes)
        x = (3 * torch.randn(200, 2, generator=seeded(time), dtype=torch.float64)).requires_grad_()
        (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
        eps = worlds.exact_denoiser(mixture)(x.detach(), torch.full((200,), time))
        # float64 rounds at 1e-16; exponents up to 3,000 (12 sd from the data at time 0) leave 1e-12
        torch.testing.assert_close(eps, -(1 - ab).sqrt() * score, rtol=1e-9, atol=1e-10)


def test_the_exact_denoiser_takes_every_row_at_its_own_time():
    denoise = worlds.exact_denoiser(MIXTURES["islands"])
    x, time = torch.randn(6, 2, generator=seeded(2)), torch.tensor([0, 10, 200, 500, 998, 999])
    one_by_one = torch.cat([denoise(x[i, None], time[i, None]) for i in range(6)])
    torch.testing.assert_close(denoise(x, time), one_by_one)


def test_twenty_steps_of_the_exact_denoiser_sample_the_ring():
    ring, n = MIXTURES["ring"], 20_000
    schedule = d3po.make_schedule(ALPHA_BARS, 20)
    x_T = torch.randn(n, 2, generator=seeded(3))
    x = d3po.rollout(worlds.exact_denoiser(ring), schedule, x_T, generator=seeded(4)).x[-1]
    # a 2D Gaussian has 0.989 within 3 sd; T = 20 costs 0.014
    assert worlds.on_data(ring, x).float().mean() >= 0.97
    assert (shares(ring, x) - ring.weights).abs().max() < 0.01  # 4 standard errors of a share


def test_on_data_ends_at_three_standard_deviations():
    x = torch.tensor([[2.0, 0.449], [2.0, 0.451], [-2.0, -0.449], [0.0, 0.0]])
    assert worlds.on_data(MIXTURES["ring"], x).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "name, point, value",
    [
        ("reach", (2, 0), 0),
        ("reach", (5, 4), -5),
        ("reach", (-2, 0), -4),
        ("direction", (1, 1), math.sqrt(2)),
        ("direction", (3, -3), 0),
        ("direction", (-2, 0), -math.sqrt(2)),
        ("avoid", (0, 2), -5),
        ("avoid", (0.85, 2), -2.5),
        ("avoid", (0, 3.8), 0),
        ("avoid", (2, -2), 0),
    ],
)
def test_scores_at_points_computed_by_hand(name, point, value):
    x = torch.tensor(point, dtype=torch.float64).expand(2, 3, 2)
    assert SCORES[name](x).shape == (2, 3) and SCORES[name](x).dtype == torch.float64
    assert SCORES[name](x).flatten().tolist() == pytest.approx([value] * 6, abs=1e-12)

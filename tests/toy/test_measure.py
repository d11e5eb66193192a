"""What is reported, against torch.distributions, Monte Carlo and numbers counted by hand."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import d3po
from toy import measure, worlds
from toy.worlds import ALPHA_BARS, MIXTURES

RING = MIXTURES["ring"]
REFERENCE = worlds.exact_denoiser(RING)


def pushed(x, time, cond=None):
    """A policy that differs from the reference by an amount that depends on the state."""
    return REFERENCE(x, time) + 0.3 * torch.tanh(x.flip(1)) + 0.1


@pytest.fixture(scope="module")
def schedule():
    return d3po.make_schedule(ALPHA_BARS.double(), 6)


def measured(x, x_ref, policy, **options):
    return measure.measure(x, x_ref, policy, reference=REFERENCE, mixture=RING, **options)


def step_laws(denoiser, schedule, x):
    """The policy of Eq. 2 at every step of given chains, as distributions."""
    means = [d3po.policy_mean(denoiser, schedule, i, x[i]) for i in range(len(schedule.sigma))]
    return [
        Independent(Normal(mean, sigma), 1)
        for mean, sigma in zip(means, schedule.sigma, strict=True)
    ]


def test_trajectory_kl_is_the_sum_of_the_kl_of_the_steps(schedule):
    x = torch.randn(7, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, reference = (step_laws(denoiser, schedule, x) for denoiser in (pushed, REFERENCE))
    expected = sum(kl_divergence(p, q) for p, q in zip(policy, reference, strict=True))
    kl = measure.trajectory_kl(pushed, REFERENCE, schedule, x=x)
    assert kl.shape == (50,)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=0)  # float64


def test_the_noise_of_a_sample_depends_on_the_seed_alone(schedule):
    def noises(denoiser, seed):
        x = measure.sample(denoiser, schedule, 30, seed=seed)
        laws = step_laws(denoiser, schedule, x)
        return torch.stack(
            [x[0], *((x[i + 1] - law.mean) / law.stddev for i, law in enumerate(laws))]
        )

    state = torch.get_rng_state()
    # x is float32: an action of size 1 is rounded by 6e-8, and the smallest sigma here is 0.01
    torch.testing.assert_close(noises(pushed, 3), noises(REFERENCE, 3), rtol=0, atol=2e-5)
    assert (noises(REFERENCE, 3) - noises(REFERENCE, 4)).abs().mean() > 0.5
    # measuring does not change what training draws next
    assert torch.equal(torch.get_rng_state(), state)


def test_measure_counts_by_hand(schedule):
    """Chains end at -1, 2, 3, 4 on the x axis, the reference's at 0, 1, 3, 5; the score is x."""
    x, x_ref = torch.zeros(7, 4, 2), torch.zeros(7, 4, 2)
    x[-1, :, 0], x_ref[-1, :, 0] = torch.tensor([-1.0, 2, 3, 4]), torch.tensor([0.0, 1, 3, 5])
    options = {"schedule": schedule, "score": lambda x: x[:, 0], "beta": 0.5}
    now = measured(x, x_ref, REFERENCE, **options)
    assert now.score == now.j == 2 and now.kl == 0
    assert now.win_rate == (0 + 1 + 0.5 + 0) / 4
    assert now.on_data == 1 / 4  # of these points only (2, 0) is on the ring
    assert now.j_sem == pytest.approx(math.sqrt((9 + 0 + 1 + 4) / 3) / 2)
    now = measured(x, x_ref, pushed, **options)
    kl = measure.trajectory_kl(pushed, REFERENCE, schedule, x=x).mean().item()
    assert kl > 0 and now.kl == pytest.approx(kl)
    assert now.j == pytest.approx(2 - 0.5 * kl)


def test_the_gradient_of_a_steps_kl_is_that_of_the_policy_alone(schedule):
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, -0.2))
    policy, reference = (lambda x, time, cond=None, c=c: c * x for c in (a, b))
    measure.step_kl(policy, reference, schedule, i=2, x=x).sum().backward()
    ends = (
        step_laws(policy, schedule, x.expand(7, 9, 2))[2],
        step_laws(reference, schedule, x.expand(7, 9, 2))[2],
    )
    (expected,) = torch.autograd.grad(kl_divergence(*ends).sum(), a)
    torch.testing.assert_close(a.grad, expected)
    assert b.grad is None

"""The flow as a denoiser against the flow itself, typed here: x_s = (1 - s) x_0 + s eps."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

import d3po
from toy import ddpm, flow, worlds
from toy.flow import ALPHA_BARS, SIGMAS

RING = worlds.MIXTURES["ring"]
STEPS = pytest.mark.parametrize("T", [4, 20])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def exact_velocity(x, time):
    """E[eps - x_0 | x_s] of the ring: given mode k, x_s is N((1 - s) m_k, V I)."""
    s = SIGMAS[time][:, None]
    means, sd = RING.means.double(), RING.sd
    V = (1 - s) ** 2 * sd**2 + s**2
    distance2 = (x[:, None] - (1 - s)[..., None] * means).square().sum(2)
    mean = torch.softmax(-distance2 / (2 * V), 1) @ means
    rest = (x - (1 - s) * mean) / V
    return s * rest - (mean + (1 - s) * sd**2 * rest)


def other_velocity(x, time):
    return exact_velocity(x, time) + 0.1 * x.sin()


def levels(schedule):
    """s of the T + 1 states, and r, with which a state x is the flow's r x."""
    s = SIGMAS[[*schedule.timesteps.tolist(), 0]]
    return s, ((1 - s) ** 2 + s**2).sqrt()


@STEPS
def test_ddim_without_noise_is_eulers_step_of_the_flow(T):
    schedule = flow.make_schedule(T, 1.0)
    still = schedule._replace(sigma=torch.zeros_like(schedule.sigma))  # eta = 0
    s, r = levels(schedule)
    x = torch.randn(500, 2, generator=seeded(0), dtype=torch.float64)
    x_s = r[0] * x
    for i, time in enumerate(schedule.timesteps):
        x_s = x_s + (s[i + 1] - s[i]) * exact_velocity(x_s, time.expand(len(x)))
        x = d3po.policy_mean(flow.FlowDenoiser(exact_velocity), still, i, x)
        # float64 rounds at 1e-16; dividing by 1 - s = 0.001 at the first step leaves 1e-13
        torch.testing.assert_close(r[i + 1] * x, x_s, rtol=0, atol=1e-11)


@STEPS
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_log_ratios_are_those_in_flow_coordinates(T, eta):
    """An action of the flow: (1 - s') x_0 + sqrt(s'^2 - std^2) eps + std z."""
    schedule = flow.make_schedule(T, eta)
    policy, reference = map(flow.FlowDenoiser, (other_velocity, exact_velocity))
    x_T = torch.randn(64, 2, generator=seeded(1), dtype=torch.float64)
    trajectory = d3po.rollout(policy, schedule, x_T, generator=seeded(2))
    ref_log_prob = d3po.trajectory_log_prob(reference, schedule, trajectory)
    s, r = levels(schedule)
    X = r[:, None, None] * trajectory.x

    def flow_log_prob(velocity, i):
        v = velocity(X[i], schedule.timesteps[i].expand(64))
        x_0, eps = X[i] - s[i] * v, X[i] + (1 - s[i]) * v
        snr = ((1 - s) / s) ** 2
        std = eta * s[i + 1] * (1 - snr[i] / snr[i + 1]).sqrt()
        mean = (1 - s[i + 1]) * x_0 + (s[i + 1] ** 2 - std**2).sqrt() * eps
        return Independent(Normal(mean, std), 1).log_prob(X[i + 1])

    for i in range(T):
        log_prob = flow_log_prob(other_velocity, i)
        log_ratio = log_prob - flow_log_prob(exact_velocity, i)
        assert log_ratio.abs().mean() > 1e-5  # of the policy to itself it would be 0
        found = trajectory.log_prob[i] - ref_log_prob[i]
        torch.testing.assert_close(found, log_ratio, rtol=0, atol=1e-9)
        # the density of r x in place of x
        change = trajectory.log_prob[i] - 2 * r[i + 1].log()
        torch.testing.assert_close(change, log_prob, rtol=0, atol=1e-9)


def test_the_exact_velocity_is_the_exact_denoiser():
    x = 2 * torch.randn(1000, 2, generator=seeded(3), dtype=torch.float64)
    time = torch.arange(1000)
    expected = worlds.exact_denoiser(RING, ALPHA_BARS)(x, time)
    found = flow.FlowDenoiser(exact_velocity)(x, time)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_a_zero_mlp_is_the_best_linear_velocity_and_its_unit_the_rest():
    n = 200_000
    net = flow.Velocity(ddpm.data_variance(RING))
    torch.nn.init.zeros_(net.mlp[-1].weight)
    x_0, noise = worlds.sample_data(RING, n, seeded(4)), torch.randn(n, 2, generator=seeded(5))
    v = noise - x_0
    for time in (0, 100, 400, 700, 999):
        s = SIGMAS[time].float()
        x_s = (1 - s) * x_0 + s * noise
        slope = (x_s * v).sum() / x_s.square().sum()  # least squares over all points
        error = (x_s * (v - slope * x_s)).square().sum().sqrt() / x_s.square().sum()
        times = torch.full((5,), time)
        with torch.no_grad():
            net.mlp[-1].bias.fill_(0.0)
            predicted = net(x_s[:5], times)
            net.mlp[-1].bias.fill_(1.0)
            unit = net(x_s[:5], times) - predicted
        assert (predicted / x_s[:5] - slope).abs().max() < 4 * error
        torch.testing.assert_close(unit, (v - slope * x_s).std().expand(5, 2), rtol=0.01, atol=0)


@pytest.mark.parametrize("T", [1, 7, 20, 30, 999])
def test_a_schedule_has_equal_steps_from_the_largest_sigma(T):
    times = flow.make_schedule(T, 1.0).timesteps
    assert times[0] == 999 and times[-1] > 0
    assert set((-times.diff()).tolist()) <= {1000 // T}
    assert SIGMAS[0].item() == 0.005 and SIGMAS[999].item() == 0.999


def test_a_schedule_without_steps_or_noise_is_refused():
    for T, eta in ((0, 1.0), (-3, 1.0), (1000, 1.0), (20, 0.0)):
        with pytest.raises(ValueError, match="num_steps|eta"):
            flow.make_schedule(T, eta)


def test_twenty_steps_of_the_exact_flow_sample_the_ring():
    schedule, n = flow.make_schedule(20, 1.0), 20_000
    x_T = torch.randn(n, 2, generator=seeded(6))
    reference = worlds.exact_denoiser(RING, ALPHA_BARS)
    x = d3po.rollout(reference, schedule, x_T, generator=seeded(7)).x[-1]
    assert worlds.on_data(RING, x).float().mean() >= 0.98
    share = torch.cdist(x, RING.means).argmin(1).bincount(minlength=8) / n
    assert (share - 1 / 8).abs().max() < 0.01  # 4 standard errors of a share


def test_the_adapter_knows_the_levels_of_the_flow():
    schedule = flow.make_schedule(20, 1.0)
    reference = worlds.exact_denoiser(RING, ALPHA_BARS)
    policy = ddpm.Adapter(reference, schedule, RING, alpha_bars=ALPHA_BARS).double()
    x_0 = worlds.sample_data(RING, 50_000, seeded(8)).double()
    noise = torch.randn(50_000, 2, generator=seeded(9), dtype=torch.float64)
    unit = torch.tensor([0.6, 0.8], dtype=torch.float64)
    policy.correction.mlp[-1].bias.data.copy_(unit)  # its weight is zero
    for i, time in enumerate(schedule.timesteps):
        ab = schedule.alpha_bar[i]
        x = ab.sqrt() * x_0 + (1 - ab).sqrt() * noise
        assert (x * policy.correction.scales[time, 2]).std() == pytest.approx(1, abs=0.02)
        log_snr = (ab / (1 - ab)).log()
        first = policy.correction.embedding[time, 0].item()
        assert first == pytest.approx(math.sin(log_snr * math.pi / 10), abs=1e-6)
        mean = d3po.policy_mean(policy, schedule, i, x[:50])
        shift = mean - d3po.policy_mean(reference, schedule, i, x[:50])
        expected = -(schedule.sigma[i] * unit).expand(50, 2)
        torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-9)

"""The network and the adapter, against regression on samples and finite differences."""

import math

import pytest
import torch

import d3po
from toy import ddpm, flow, worlds
from toy.worlds import ALPHA_BARS, MIXTURES

RING = MIXTURES["ring"]
SCHEDULES = pytest.mark.parametrize("T, eta", [(20, 1.0), (5, 0.7)])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def exact_schedule(T, eta):
    """A schedule in float64, where differences of means keep their digits."""
    return d3po.make_schedule(ALPHA_BARS.double(), T, eta)


@pytest.mark.parametrize("name", ["ring", "grid"])  # centred and round, as the linear part assumes
def test_a_zero_mlp_is_the_best_linear_prediction_and_its_unit_the_rest(name):
    n, mixture = 200_000, MIXTURES[name]
    net = ddpm.MLP(ddpm.data_variance(mixture))
    torch.nn.init.zeros_(net.mlp[-1].weight)
    torch.nn.init.zeros_(net.mlp[-1].bias)
    x_0, noise = worlds.sample_data(mixture, n, seeded(0)), torch.randn(n, 2, generator=seeded(1))
    for time in (1, 100, 400, 700, 999):
        ab = ALPHA_BARS[time]
        x = ab.sqrt() * x_0 + (1 - ab).sqrt() * noise
        # least squares over all points and coordinates
        slope = (x * noise).sum() / x.square().sum()
        error = (x * (noise - slope * x)).square().sum().sqrt() / x.square().sum()
        with torch.no_grad():
            times = torch.full((5,), time)
            predicted = net(x[:5], times)
            net.mlp[-1].bias.fill_(1.0)
            unit = net(x[:5], times) - predicted
            net.mlp[-1].bias.fill_(0.0)
        assert (predicted / x[:5] - slope).abs().max() < 4 * error
        # what is left for the MLP has unit variance; 1 %: the sd of 4e5 numbers errs by 0.1 %
        torch.testing.assert_close(unit, (noise - slope * x).std().expand(5, 2), rtol=0.01, atol=0)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_data_variance_is_that_of_samples(mixture):
    x = worlds.sample_data(mixture, 100_000, seeded(2)).double()
    squares = (x - x.mean(0)).square().mean(1)
    error = squares.std().item() / math.sqrt(len(x))
    assert ddpm.data_variance(mixture) == pytest.approx(squares.mean().item(), abs=3 * error)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_adapter_is_the_reference_at_the_start(mixture):
    exact, time = worlds.exact_denoiser(mixture), torch.arange(1000)
    x = 2 * torch.randn(1000, 2, generator=seeded(3))
    for reference in (exact, ddpm.MLP(ddpm.data_variance(mixture)).requires_grad_(False)):
        policy = ddpm.Adapter(reference, d3po.make_schedule(ALPHA_BARS, 20), mixture)
        # to the last bit: log 2 is then exact as well
        assert torch.equal(policy(x, time), reference(x, time))


def test_cached_answers_are_the_denoisers():
    asked = []

    def denoiser(x, time, cond=None):
        asked.append(len(x))
        return x * time[:, None]

    cached = ddpm.CachedReference(denoiser)
    x, time = torch.randn(5, 2, generator=seeded(11)), torch.full((5,), 3)
    other = time.clone()
    other[4] = 7
    for states, times, calls in (
        (x, time, 1),
        (x.clone(), time, 1),
        (x, time + 1, 2),
        (x, time, 2),  # each time has its own cache
        (x[:3], time[:3], 3),
        (x, time, 4),
        (x, other, 5),
        (x.double(), time, 6),
        (x[:0], time[:0], 7),
    ):
        assert torch.equal(cached(states, times), states * times[:, None]) and len(asked) == calls
    cached(x, time)
    x += 1  # in place
    assert torch.equal(cached(x, time), x * 3)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(cached(x, time).sum(), x)
    assert (gradient == 3).all()


@SCHEDULES
def test_mean_slope_is_what_the_mean_of_eq_2_does(T, eta):
    schedule = exact_schedule(T, eta)
    x = torch.randn(3, 2, generator=seeded(4), dtype=torch.float64)
    slope = ddpm.mean_slope(schedule)
    assert slope.shape == (T,) and (slope < 0).all()
    for i in range(T):
        low = d3po.policy_mean(lambda x, *_: torch.full_like(x, -0.5), schedule, i, x)
        high = d3po.policy_mean(lambda x, *_: torch.full_like(x, 0.5), schedule, i, x)
        # affine, so a difference of any size is the slope; 1e-11: float64 means up to 100
        torch.testing.assert_close(high - low, slope[i].expand(3, 2), rtol=1e-9, atol=1e-11)


@SCHEDULES
def test_a_unit_of_the_adapters_output_shifts_every_mean_by_its_sigma(T, eta):
    schedule, reference = exact_schedule(T, eta), worlds.exact_denoiser(RING)
    policy = ddpm.Adapter(reference, d3po.make_schedule(ALPHA_BARS, T, eta), RING).double()
    x = torch.randn(50, 2, generator=seeded(5), dtype=torch.float64)
    for unit in ((1.0, 0.0), (0.0, -1.0), (0.6, 0.8)):
        unit = torch.tensor(unit, dtype=torch.float64)
        policy.correction.mlp[-1].bias.data.copy_(unit)  # its weight is zero
        for i, sigma in enumerate(schedule.sigma):
            mean = d3po.policy_mean(policy, schedule, i, x)
            shift = mean - d3po.policy_mean(reference, schedule, i, x)
            # minus: the mean falls as eps grows. 1e-5: the slope is a small difference in float32
            torch.testing.assert_close(shift, -(sigma * unit).expand(50, 2), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("learned_reference", [True, False])
def test_only_the_adapter_trains(learned_reference):
    torch.manual_seed(6)
    schedule = d3po.make_schedule(ALPHA_BARS, 5)
    network = ddpm.MLP(1.0).requires_grad_(False)
    reference = network if learned_reference else worlds.exact_denoiser(RING)
    policy = ddpm.Adapter(reference, schedule, RING)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    weights = {name for name, value in policy.named_parameters() if value.requires_grad}
    assert weights == {f"correction.{name}" for name, _ in policy.correction.named_parameters()}

    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad])
    for _ in range(2):  # at first the last layer is zero, so only that one has a gradient
        policy(torch.randn(9, 2), torch.full((9,), 401)).square().sum().backward()
        optimizer.step()
    changed = {
        name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == weights


@pytest.mark.parametrize("model", [ddpm, flow])
def test_pretraining_follows_the_seed(model):
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(model.pretrain(RING, steps=60, batch=64, progress=False))
    first, again, other = (torch.nn.utils.parameters_to_vector(net.parameters()) for net in nets)
    assert torch.equal(first, again) and not torch.equal(first, other)

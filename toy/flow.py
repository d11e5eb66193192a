"""A small learned rectified flow of a 2D mixture (arXiv 2209.03003), as a denoiser of d3po.py.

A flow has x_s = (1 - s) x_0 + s eps for s from 0 to 1, and learns v = E[eps - x_0 | x_s]. Divided
by r it is a DDPM, because its signal and noise then have squares that add up to 1:

    x = x_s / r = sqrt(ab) x_0 + sqrt(1 - ab) eps,    r^2 = (1 - s)^2 + s^2,  ab = (1 - s)^2 / r^2

and its noise prediction is eps = x_s + (1 - s) v. DDIM with eta = 0 is Euler's step of the flow,
and log-ratios are those in flow coordinates: `FlowDenoiser` is all that d3po.py needs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import d3po
from toy.ddpm import MLP, data_variance, fit
from toy.worlds import Mixture, sample_data

# s of 1,000 model times, in float64: nearer to 0 and 1, float32 log-ratios lose their meaning.
SIGMAS = torch.linspace(0.005, 0.999, 1000, dtype=torch.float64)
ALPHA_BARS = (1 - SIGMAS) ** 2 / ((1 - SIGMAS) ** 2 + SIGMAS**2)


def make_schedule(num_steps: int, eta: float) -> d3po.Schedule:
    """T steps of equal length in s, from the largest; errors as of `d3po.make_schedule`."""
    times = d3po.make_schedule(ALPHA_BARS, num_steps, eta).timesteps  # equal steps that end at 1
    return d3po.make_schedule(ALPHA_BARS, num_steps, eta, times + len(SIGMAS) - 1 - times[0])


class Velocity(MLP):
    """Velocity v(x_s, time) for points x_s (B, 2) of the plane.

        v = (s - (1 - s) S) x_s / V + sqrt(S / V) mlp(x_s / sqrt(V), time),  V = (1 - s)^2 S + s^2

    For centred, round data of variance S, x_s has variance V, the first term is the best linear
    prediction, and sqrt(S / V) the standard deviation of the rest, as in `MLP`.
    """

    def __init__(self, data_variance: float):
        super().__init__(data_variance, alpha_bars=ALPHA_BARS)
        s, S = SIGMAS, data_variance
        V = (1 - s) ** 2 * S + s**2
        self.scales = torch.stack([(s - (1 - s) * S) / V, (S / V).sqrt(), V.rsqrt()], 1).float()


class FlowDenoiser(nn.Module):
    """Noise prediction eps(x, time) of a velocity v(x_s, time), in the coordinates x = x_s / r.

        eps = r x + (1 - s) v(r x, time)

    velocity: called with points (B, 2) and model times (B,); s and r are those of the time.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        s = SIGMAS[time][:, None]
        x_s = (((1 - s) ** 2 + s**2).sqrt() * x).to(x.dtype)
        return x_s + (1 - s).to(x.dtype) * self.velocity(x_s, time)


def pretrain(
    mixture: Mixture, steps: int = 8000, batch: int = 512, progress: bool = True
) -> FlowDenoiser:
    """Train the velocity of a mixture on its samples x_0, with noise eps ~ N(0, I), s uniform.

        minimise |eps - x_0 - v_theta((1 - s) x_0 + s eps, s)|^2

    Uses torch's global generator: seed it first.
    """
    velocity = Velocity(data_variance(mixture))

    def loss():
        x_0 = sample_data(mixture, batch)
        eps = torch.randn(batch, 2)
        time = torch.randint(len(SIGMAS), (batch,))
        s = SIGMAS[time][:, None].float()
        return (velocity((1 - s) * x_0 + s * eps, time) - (eps - x_0)).square().mean()

    fit(velocity, loss, steps, title="pretrain the flow", progress=progress)
    return FlowDenoiser(velocity)

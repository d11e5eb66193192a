"""A small learned DDPM of a 2D mixture: the network and its training (DDPM, arXiv 2006.11239, Algorithm 1)."""

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from d3po import Denoiser, Schedule
from toy.worlds import ALPHA_BARS, Mixture, sample_data


class MLP(nn.Module):
    """Noise prediction eps(x, time) for points x (B, 2) of the plane, by an MLP with three hidden layers.

    The MLP predicts what the best linear prediction for round, centred data leaves over, inputs and outputs scaled to
    unit variance (the preconditioning of EDM, arXiv 2206.00364, Sec. 5): with ab = alpha-bar and data of variance s^2,
    x has variance v = ab s^2 + 1 - ab, and  eps = sqrt(1 - ab) x / v + sqrt(ab s^2 / v) mlp(x / sqrt(v), time).
    It sees x / sqrt(v) also through sines, which makes the sharp borders between modes cheap to fit.
    """

    def __init__(self, data_variance: float, width: int = 128, frequencies: tuple[float, ...] = (1.5, 3.0, 4.5)):
        super().__init__()
        ab = ALPHA_BARS.double()
        v = ab * data_variance + 1 - ab
        scales = torch.stack([(1 - ab).sqrt() / v, (ab * data_variance / v).sqrt(), v.rsqrt()], 1)
        angle = torch.log(ab / (1 - ab))[:, None] * (math.pi / 10) * torch.tensor([1, 2, 4, 8])
        self.register_buffer("scales", scales.float())  # (1000, 3), by model time
        self.register_buffer("embedding", torch.cat([angle.sin(), angle.cos()], 1).float())  # (1000, 8), of the log-SNR
        self.register_buffer("frequencies", torch.tensor(frequencies))
        self.mlp = nn.Sequential(
            nn.Linear(2 + 4 * len(frequencies) + 8, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        linear, rest, unit = self.scales[time].split(1, 1)
        u = x * unit
        waves = (u[:, None] * self.frequencies[:, None]).flatten(1)
        return linear * x + rest * self.mlp(torch.cat([u, waves.sin(), waves.cos(), self.embedding[time]], 1))


def data_variance(mixture: Mixture) -> float:
    """Variance of a mixture's samples, averaged over the two coordinates."""
    centre = mixture.weights @ mixture.means
    return (mixture.sd**2 + mixture.weights @ (mixture.means - centre).square().mean(1)).item()


def pretrain(mixture: Mixture, steps: int = 8000, batch: int = 512, lr: float = 8e-3, progress: bool = True) -> MLP:
    """Train the denoiser of a mixture on its samples: minimise |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps, t)|^2.

    t is drawn as 1000 u^1.5, u uniform: more of the low noise levels, where the modes have to be told apart. Uses
    torch's global generator: seed it first. Returns the trained network.
    """
    net = MLP(data_variance(mixture))
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    warm_up_then_cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    bar = tqdm(range(steps), "pretrain the DDPM", unit=" steps", disable=not progress, mininterval=0.5)
    for _ in bar:
        x_0, eps = sample_data(mixture, batch), torch.randn(batch, 2)
        time = (len(ALPHA_BARS) * torch.rand(batch) ** 1.5).long()
        ab = ALPHA_BARS[time][:, None]
        loss = (net(ab.sqrt() * x_0 + (1 - ab).sqrt() * eps, time) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up_then_cosine.step()
    return net


class Remembered(nn.Module):
    """A frozen denoiser that keeps its last answer at each model time.

    A policy and its reference are asked about the same states again and again: in sampling, for log pi_ref, in a loss,
    for the KL. Each answer is computed once, so the toy takes half the time. The weights must not change any more.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser, self.last = denoiser, {}

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        if x.requires_grad or len(x) == 0:
            return self.denoiser(x, time, cond)
        seen = self.last.get(first := time[0].item())
        if seen is None or seen[0].dtype != x.dtype or not (torch.equal(x, seen[0]) and torch.equal(time, seen[1])):
            with torch.no_grad():
                seen = self.last[first] = x.clone(), time.clone(), self.denoiser(x, time, cond)
        return seen[2]


class Adapter(nn.Module):
    """The policy: a frozen reference plus a trainable MLP that starts at zero, so that policy = reference at the start.

    Its unit of output moves the mean of an action by that action's sigma: eps_ref + (sigma_i / c_i) mlp, where c_i is
    d mu / d eps of step i. A nudge then changes log-probs alike at every step. (Fine-tuning the reference's own weights
    does not: of 20 steps the last but one has c / sigma = 12, the others about 1, and it blows up first.) The MLP is
    smaller and smoother than the reference's, so that few labels determine it.
    """

    def __init__(self, reference: Denoiser, schedule: Schedule, mixture: Mixture):
        super().__init__()
        self.reference = Remembered(reference).requires_grad_(False)
        self.correction = MLP(data_variance(mixture), width=64, frequencies=(1.5,))
        nn.init.zeros_(self.correction.mlp[-1].weight)
        nn.init.zeros_(self.correction.mlp[-1].bias)
        self.correction.scales[:, 0] = 0  # the linear part, which the reference has already
        self.correction.scales[schedule.timesteps, 1] = schedule.sigma / mean_slope(schedule).abs()

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        return self.reference(x, time, cond) + self.correction(x, time, cond)


def mean_slope(schedule: Schedule) -> Tensor:
    """c (T,), how far the mean of Eq. 2 moves when the noise prediction does: mu = a x + c eps, and c < 0."""
    _, ab, ab_prev, sigma = schedule
    return (1 - ab_prev - sigma**2).clamp(min=0).sqrt() - (ab_prev * (1 - ab) / ab).sqrt()

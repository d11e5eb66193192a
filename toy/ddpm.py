"""A small learned DDPM of a 2D mixture (arXiv 2006.11239, Alg. 1), and the adapter on it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from d3po import Denoiser, Schedule
from toy.worlds import ALPHA_BARS, Mixture, sample_data


class MLP(nn.Module):
    """Noise prediction eps(x, time) for points x (B, 2) of the plane.

        eps = sqrt(1 - ab) x / v + sqrt(ab s^2 / v) mlp(x / sqrt(v), time),    v = ab s^2 + 1 - ab

    For centred, round data of variance s^2, x has variance v, the first term is the best linear
    prediction, and the mlp predicts the rest, inputs and outputs scaled to unit variance (EDM,
    arXiv 2206.00364, Sec. 5). It sees x / sqrt(v) also through sines, which makes the sharp borders
    between modes cheap to fit. alpha_bars (N,): of the model times.
    """

    def __init__(
        self,
        data_variance: float,
        width: int = 128,
        frequencies: tuple[float, ...] = (1.5, 3.0, 4.5),
        alpha_bars: Tensor = ALPHA_BARS,
    ):
        super().__init__()
        ab = alpha_bars.double()
        v = ab * data_variance + 1 - ab
        scales = torch.stack([(1 - ab).sqrt() / v, (ab * data_variance / v).sqrt(), v.rsqrt()], 1)
        log_snr = torch.log(ab / (1 - ab))
        angle = log_snr[:, None] * (math.pi / 10) * torch.tensor([1, 2, 4, 8])
        embedding = torch.cat([angle.sin(), angle.cos()], 1)
        self.register_buffer("scales", scales.float())  # (N, 3), by model time
        self.register_buffer("embedding", embedding.float())  # (N, 8)
        self.register_buffer("frequencies", torch.tensor(frequencies))
        self.mlp = nn.Sequential(
            nn.Linear(2 + 4 * len(frequencies) + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        linear, rest, unit = self.scales[time].split(1, 1)
        u = x * unit
        waves = (u[:, None] * self.frequencies[:, None]).flatten(1)
        features = torch.cat([u, waves.sin(), waves.cos(), self.embedding[time]], 1)
        return linear * x + rest * self.mlp(features)


def data_variance(mixture: Mixture) -> float:
    """Variance of a mixture's samples, averaged over the two coordinates."""
    centre = mixture.weights @ mixture.means
    spread = mixture.weights @ (mixture.means - centre).square().mean(1)
    return (mixture.sd**2 + spread).item()


def pretrain(mixture: Mixture, steps: int = 8000, batch: int = 512, progress: bool = True) -> MLP:
    """Train the denoiser of a mixture on its samples x_0, with noise eps ~ N(0, I).

        minimise |eps - eps_theta(sqrt(ab) x_0 + sqrt(1 - ab) eps, t)|^2

    t is drawn as 1000 u^1.5, u uniform: more of the low noise levels, where the modes have to be
    told apart. Uses torch's global generator: seed it first.
    """
    net = MLP(data_variance(mixture))

    def loss():
        x_0 = sample_data(mixture, batch)
        eps = torch.randn(batch, 2)
        time = (len(ALPHA_BARS) * torch.rand(batch) ** 1.5).long()
        ab = ALPHA_BARS[time][:, None]
        return (net(ab.sqrt() * x_0 + (1 - ab).sqrt() * eps, time) - eps).square().mean()

    fit(net, loss, steps, title="pretrain the DDPM", progress=progress)
    return net


def fit(
    net: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    title: str,
    progress: bool,
    lr: float = 8e-3,
) -> None:
    """Minimise the mean of loss() by Adam; lr rises for 100 steps, then falls to 0 as a cosine."""
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    warm_up_then_cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    for _ in tqdm(range(steps), title, unit=" steps", disable=not progress, mininterval=0.5):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        warm_up_then_cosine.step()


class CachedReference(nn.Module):
    """A frozen denoiser that keeps its last answer at each model time.

    Sampling, log pi_ref, a loss and the KL ask it about the same states again and again; each
    answer is computed once, so the toy takes half the time. The weights must not change any more.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.cache = {}  # first model time of a batch: its states, its times, the answer

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        if x.requires_grad or len(x) == 0:
            return self.denoiser(x, time, cond)
        key = time[0].item()
        if key in self.cache:
            states, times, eps = self.cache[key]
            same = x.dtype == states.dtype and torch.equal(x, states) and torch.equal(time, times)
            if same:
                return eps
        with torch.no_grad():
            eps = self.denoiser(x, time, cond)
        self.cache[key] = x.clone(), time.clone(), eps
        return eps


class Adapter(nn.Module):
    """The policy: a frozen reference plus a trainable MLP that is zero at the start.

        eps = eps_ref + (sigma_i / c_i) mlp,    c_i = d mu / d eps of step i

    So a unit of the MLP's output shifts every action's mean by that action's sigma, and changes
    log-probs alike at every step. (Fine-tuning the reference's own weights does not: of 20 steps
    the last but one has c / sigma = 12, the others about 1, and it blows up first.) The MLP is
    smaller and smoother than the reference's, so that few labels determine it.
    alpha_bars (N,): those of the schedule's model times.
    """

    def __init__(
        self,
        reference: Denoiser,
        schedule: Schedule,
        mixture: Mixture,
        alpha_bars: Tensor = ALPHA_BARS,
    ):
        super().__init__()
        self.reference = CachedReference(reference).requires_grad_(False)
        variance = data_variance(mixture)
        self.correction = MLP(variance, width=64, frequencies=(1.5,), alpha_bars=alpha_bars)
        nn.init.zeros_(self.correction.mlp[-1].weight)
        nn.init.zeros_(self.correction.mlp[-1].bias)
        unit = (schedule.sigma / mean_slope(schedule).abs()).float()
        self.correction.scales[:, 0] = 0  # the linear part, which the reference has already
        self.correction.scales[schedule.timesteps, 1] = unit

    def forward(self, x: Tensor, time: Tensor, cond=None) -> Tensor:
        return self.reference(x, time, cond) + self.correction(x, time, cond)


def mean_slope(schedule: Schedule) -> Tensor:
    """c (T,) of Eq. 2, mu = a x + c eps: how far the mean shifts with the noise prediction.

        c = sqrt(1 - ab_prev - sigma^2) - sqrt(ab_prev (1 - ab) / ab)

    Always negative.
    """
    ab, ab_prev = schedule.alpha_bar, schedule.alpha_bar_prev
    direct = (1 - ab_prev - schedule.sigma**2).clamp(min=0).sqrt()
    return direct - (ab_prev * (1 - ab) / ab).sqrt()

"""2D worlds with known answers: mixtures of Gaussians, their exact denoiser, and scores."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import d3po


class Mixture(NamedTuple):
    """Data distribution: isotropic Gaussians of one width in the plane."""

    means: Tensor  # (M, 2)
    weights: Tensor  # (M,) adding up to 1
    sd: float  # standard deviation of each Gaussian, in the unit of the plane


def _ring() -> Mixture:
    angle = torch.arange(8) * 2 * math.pi / 8
    means = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(means, torch.full((8,), 1 / 8), sd=0.15)


def _grid() -> Mixture:
    axis = torch.tensor([-1.8, 0.0, 1.8])
    return Mixture(torch.cartesian_prod(axis, axis), torch.full((9,), 1 / 9), sd=0.2)


def _islands() -> Mixture:
    means = torch.tensor([[-1.5, -1.0], [1.5, -1.2], [0.3, 1.7]])
    return Mixture(means, torch.tensor([0.5, 0.3, 0.2]), sd=0.3)


MIXTURES: dict[str, Mixture] = {"ring": _ring(), "grid": _grid(), "islands": _islands()}

# The linear schedule of DDPM (arXiv 2006.11239): alpha-bar of 1,000 model times.
ALPHA_BARS = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0).float()


def sample_data(mixture: Mixture, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw n points (n, 2) from a mixture."""
    mode = torch.multinomial(mixture.weights, n, replacement=True, generator=generator)
    return mixture.means[mode] + mixture.sd * torch.randn(n, 2, generator=generator)


def exact_denoiser(mixture: Mixture, alpha_bars: Tensor = ALPHA_BARS) -> d3po.Denoiser:
    """The noise prediction E[eps | x_t] that a perfectly trained network would give.

        E[eps | x_t] = sqrt(1 - ab) (x_t - sqrt(ab) sum_k r_k m_k) / v,    v = ab sd^2 + 1 - ab

    x_t given mode k is N(sqrt(ab) m_k, v I), and r_k is the posterior probability of mode k. Works
    in the dtype of x. alpha_bars (N,): of the model times.
    """

    def denoise(x: Tensor, time: Tensor, cond=None) -> Tensor:
        ab = alpha_bars.to(x.dtype)[time][:, None]
        means = mixture.means.to(x.dtype)
        v = ab * mixture.sd**2 + 1 - ab
        distance2 = (x[:, None] - ab.sqrt()[:, None] * means).square().sum(2)
        r = torch.softmax(mixture.weights.to(x.dtype).log() - distance2 / (2 * v), 1)
        return (1 - ab).sqrt() * (x - ab.sqrt() * (r @ means)) / v

    return denoise


def on_data(mixture: Mixture, x: Tensor) -> Tensor:
    """Which points x (B, 2) lie within 3 standard deviations of some mode: bool (B,)."""
    return torch.cdist(x, mixture.means.to(x.dtype)).amin(1) <= 3 * mixture.sd


def reach(x: Tensor) -> Tensor:
    """Get close to the point (2, 0): minus the distance."""
    return -torch.linalg.vector_norm(x - torch.tensor([2.0, 0.0], dtype=x.dtype), dim=-1)


def direction(x: Tensor) -> Tensor:
    """Go north-east: the coordinate along (1, 1) / sqrt(2)."""
    return (x[..., 0] + x[..., 1]) / math.sqrt(2)


def avoid(x: Tensor) -> Tensor:
    """Stay out of the disc of radius 1.7 around (0, 2): 0 outside, down to -5 at its centre."""
    distance = torch.linalg.vector_norm(x - torch.tensor([0.0, 2.0], dtype=x.dtype), dim=-1)
    return -5 * (1 - distance / 1.7).clamp(min=0)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "reach": reach,
    "direction": direction,
    "avoid": avoid,
}

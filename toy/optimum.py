"""The best that any chain, and the best that a chain of Gaussian steps, can reach in the plane: J = E[r] - beta KL.

KL is that of the chain to the reference chain, from the same x_T ~ N(0, I). With m = mu_ref(x) the mean of the
reference's action i in state x, r the score of the final point, z ~ N(0, I), both optima are backward recursions:

    over all policies       V_T = r,  V_i(x) = beta log E exp(V_{i+1}(m + sigma_i z) / beta),         J* = E V_0(x_T)
    over means, sigma kept  W_T = r,  W_i(x) = max over a of E W_{i+1}(a + sigma_i z) - beta |a - m|^2 / (2 sigma_i^2),
                                                                                                    J_G = E W_0(x_T)

A denoiser moves means only, so J_ref <= J(any denoiser) <= J_G <= J*. Functions of the plane are float64 tables on a
square grid, read off by cubic interpolation; the mean over z separates into one matrix for each axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import d3po
from toy.ddpm import mean_slope
from toy.measure import step_kl

Score = Callable[[Tensor], Tensor]  # (B, 2) -> (B,): higher is better


class Optimum(NamedTuple):
    """The three chains that frame every result, and the tables to sample from them. Made by `solve`."""

    j_ref: float  # the reference: its mean score E_ref[r], as its KL is 0
    j_star: float  # J of the best policy of all, pi* = pi_ref exp((V_{i+1} - V_i) / beta)
    score_star: float  # its mean score E*[r]
    kl_star: float  # its KL in nats
    j_gauss: float  # J of the best choice of means
    score_gauss: float
    kl_gauss: float
    error: float  # largest change of these numbers, KL times beta, from a grid of twice the spacing: bounds their error
    value: Tensor  # (T+1, G, G) V_i on the grid, first index along x
    shift: Tensor  # (T, 2, G, G) best mean minus the reference's, on the grid
    axis: Tensor  # (G,) coordinates of the grid

    def numbers(self) -> dict[str, float]:
        """The eight numbers, without the tables."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, float)}


def solve(reference: d3po.Denoiser, schedule: d3po.Schedule, score: Score, beta: float, spacing: float = 0.05,
          half_width: float = 5.0) -> Optimum:
    """Compute both optima of J = E[r] - beta KL(chain || reference chain), x_T ~ N(0, I).

    reference: called with float32 (G^2, 2), the whole grid, once for each action. score: finite and continuous.
    beta > 0: score per nat. spacing: of the grid; all is done at twice the spacing too, to tell the error, and the
    time goes as 1 / spacing^2. half_width: the grid is [-half_width, half_width]^2, and must hold the chains.
    Raises ValueError for beta <= 0 or a step with sigma = 0.
    """
    d3po._check_beta(beta)
    d3po._check_density(schedule)
    coarse = _solve(reference, schedule, score, beta, 2 * spacing, half_width)
    fine = _solve(reference, schedule, score, beta, spacing, half_width)
    change = [abs(a - b) for a, b in zip(coarse[:7], fine[:7], strict=True)]
    change[3], change[6] = beta * change[3], beta * change[6]
    return fine._replace(error=max(change))


def attained_share(j: float, optimum: Optimum) -> float:
    """(J - J_ref) / (J_G - J_ref): 0 for the reference, 1 for the best chain of Gaussian steps.

    Raises ValueError where J_G is not above J_ref, so that there is nothing to attain.
    """
    gap = optimum.j_gauss - optimum.j_ref
    if not gap > 0:
        raise ValueError(f"the best chain gains {gap:.3g} over the reference: beta is too large for this score")
    return (j - optimum.j_ref) / gap


@torch.no_grad()
def sample_optimum(reference: d3po.Denoiser, schedule: d3po.Schedule, score: Score, beta: float, optimum: Optimum,
                   x_T: Tensor, proposals: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Sample chains (T+1, B, 2) of pi*: of K actions of the reference keep one, with weight exp(V_{i+1} / beta).

    The K noises are a randomly shifted lattice: each is N(0, I), and together they cover the plane evenly, so that the
    bias is smaller than the O(1 / K) of independent ones: on the ring, T = 20, beta 1, K = 64 it is -0.006 in the
    score, against -0.03. x_T (B, 2): initial noise; proposals: K; optimum: of the same problem.
    """
    p = 1.324717957  # p^3 = p + 1, the plane's golden ratio
    lattice = torch.arange(proposals)[:, None] * torch.tensor([1 / p, 1 / p**2])
    chain, rows = [x_T], torch.arange(len(x_T))
    for i, sigma in enumerate(schedule.sigma):
        mean = d3po.policy_mean(reference, schedule, i, chain[-1])
        u = (lattice + torch.rand(len(mean), 1, 2, generator=generator)) % 1
        action = mean[:, None] + sigma * torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))
        flat, last = action.flatten(0, 1), i == len(schedule.sigma) - 1
        value = score(flat) if last else interpolate(optimum.value[i + 1, None], optimum.axis, flat)[0]
        weight = torch.softmax(value.view(len(mean), -1) / beta, 1)
        chain.append(action[rows, torch.multinomial(weight, 1, generator=generator)[:, 0]])
    return torch.stack(chain)


def gaussian_policy(reference: d3po.Denoiser, schedule: d3po.Schedule, optimum: Optimum) -> d3po.Denoiser:
    """The denoiser whose chain attains J_G: the reference's noise prediction, moved so that the mean moves by shift.

    Eq. 2 is affine in eps, mu = a x + c eps with c = `mean_slope` < 0: the prediction moves by shift / c. It knows the
    times of this schedule only (KeyError).
    """
    c = mean_slope(schedule)
    step = {time: i for i, time in enumerate(schedule.timesteps.tolist())}

    def denoise(x: Tensor, time: Tensor, cond=None) -> Tensor:
        i = step[int(time[0])]
        shift = interpolate(optimum.shift[i], optimum.axis, x).T
        return reference(x, time, cond) + (shift / c[i]).to(x.dtype)

    return denoise


@torch.no_grad()
def evaluate(policy: d3po.Denoiser, reference: d3po.Denoiser, schedule: d3po.Schedule, score: Score,
             spacing: float = 0.05, half_width: float = 5.0) -> tuple[float, float]:
    """Mean score and KL (nats) of a denoiser's chain by the same quadrature: exact where sampling would be noisy.

        R_T = r,  R_i(x) = E R_{i+1}(mu + sigma_i z);    K_T = 0,  K_i(x) = KL_i(x) + E K_{i+1}(mu + sigma_i z)

    with KL_i = |mu - mu_ref|^2 / (2 sigma_i^2). Arguments as in `solve`.
    """
    axis, grid, r = _grid(score, spacing, half_width)
    tables = torch.stack([r, torch.zeros_like(r)])
    for i in reversed(range(len(schedule.sigma))):
        mean = d3po.policy_mean(policy, schedule, i, grid.float()).double()
        smooth = _smoother(axis, axis, schedule.sigma[i].item())
        tables = interpolate(smooth @ tables @ smooth.T, axis, mean).view(tables.shape)
        tables[1] += step_kl(policy, reference, schedule, i, grid.float()).view(r.shape)
    start = _smoother(axis, axis.new_zeros(1), 1.0)  # x_T ~ N(0, I)
    return tuple((start @ tables @ start.T).flatten().tolist())


@torch.no_grad()
def _solve(reference, schedule, score, beta, spacing, half_width) -> Optimum:
    """Both recursions on one grid, from the last action to the first; the error is left open."""
    axis, grid, r = _grid(score, spacing, half_width)
    ref = v = star = w = gauss = r  # E_ref[r], V, E*[r], W, E_G[r], each given the state before the action in hand
    values, shifts = [v], []
    for i in reversed(range(len(schedule.sigma))):
        sigma = schedule.sigma[i].item()
        mean = d3po.policy_mean(reference, schedule, i, grid.float()).double()
        smooth = _smoother(axis, axis, sigma)
        ref, w, gauss = smooth @ torch.stack([ref, w, gauss]) @ smooth.T
        v, star = _tilt(v, star, beta, smooth, _smoother(axis, axis, sigma, linear=True))
        best, w = _best_mean(w, axis, mean, sigma**2 / beta)
        gauss = interpolate(gauss[None], axis, best)
        ref, v, star, w, gauss = torch.cat(
            [interpolate(torch.stack([ref, v, star]), axis, mean), w[None], gauss]
        ).view(5, *r.shape)
        values.append(v)
        shifts.append((best - mean).T.reshape(2, *r.shape))
    start = _smoother(axis, axis.new_zeros(1), 1.0)  # x_T ~ N(0, I)
    means = start @ torch.stack([ref, v, star, w, gauss]) @ start.T
    j_ref, j_star, score_star, j_gauss, score_gauss = means.flatten().tolist()
    kl_star, kl_gauss = (score_star - j_star) / beta, (score_gauss - j_gauss) / beta
    tables = torch.stack(values[::-1]), torch.stack(shifts[::-1]), axis
    return Optimum(j_ref, j_star, score_star, kl_star, j_gauss, score_gauss, kl_gauss, float("nan"), *tables)


def _grid(score: Score, spacing: float, half_width: float) -> tuple[Tensor, Tensor, Tensor]:
    """The axis (G,), the points (G^2, 2) of the square grid, and their scores (G, G), all float64."""
    half = round(half_width / spacing)
    axis = spacing * torch.arange(-half, half + 1, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return axis, grid, score(grid).double().view(len(axis), -1)


def _tilt(v: Tensor, star: Tensor, beta: float, cubic: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """beta log E exp(V / beta), and E[star exp(V / beta)] / E exp(V / beta), over the noise; all tables (G, G).

    Where V falls by many beta within the spacing, a cubic through exp(V / beta) overshoots, even below 0; there the
    linear interpolation is used, whose weights are positive.
    """
    top = v.max()
    weight = ((v - top) / beta).exp()
    smooth, safe = (a @ torch.stack([weight, weight * star]) @ a.T for a in (cubic, linear))
    total, tilted = torch.where(smooth[0] > safe[0] / 2, smooth, safe)
    total = total.clamp(min=1e-300)
    return top + beta * total.log(), tilted / total


def _best_mean(table: Tensor, axis: Tensor, mean: Tensor, reach: float, steps: int = 3) -> tuple[Tensor, Tensor]:
    """Maximise S(a) - |a - m|^2 / (2 reach) over a, for each m: the best means (N, 2) and their values (N,).

    table (G, G): S on the grid; mean (N, 2): m; reach = sigma^2 / beta. There can be several local maxima: start from
    the best point of a coarse grid, then Newton's method on a = m + reach grad S(a), and keep the best point seen.
    """
    h = (axis[1] - axis[0]).item()
    slope = torch.stack(torch.gradient(table, spacing=h))
    bend = [torch.gradient(s, spacing=h, dim=(0, 1)) for s in slope]
    tables = torch.stack([table, *slope, bend[0][0], bend[0][1], bend[1][1]])

    a = mean + _first_shift(table, axis, mean, reach)
    best, value = a, mean.new_full((len(mean),), -torch.inf)
    for _ in range(steps):
        s, sx, sy, sxx, sxy, syy = interpolate(tables, axis, a)
        now = s - (a - mean).square().sum(1) / (2 * reach)
        best = torch.where((now > value)[:, None], a, best)
        value = torch.maximum(value, now)
        fx, fy = (mean + reach * torch.stack([sx, sy], 1) - a).T
        mxx, mxy, myy = 1 - reach * sxx, -reach * sxy, 1 - reach * syy
        det = mxx * myy - mxy**2
        newton = torch.stack([myy * fx - mxy * fy, mxx * fy - mxy * fx], 1) / det[:, None]
        a = a + torch.where(((det > 0) & (mxx > 0))[:, None], newton, torch.stack([fx, fy], 1))
    return best, value


def _first_shift(table: Tensor, axis: Tensor, mean: Tensor, reach: float, stride: int = 2) -> Tensor:
    """a - m (N, 2) for the best a of a coarse grid and the m of that grid nearest to each mean: axis by axis, max-plus.

    Where two local maxima tie, the nearest m may choose the lower: on the ring this costs J_G up to 2e-4.
    """
    line = axis[::stride]
    cost = (line[:, None] - line).square() / (2 * reach)
    along_y, ay = (table[::stride, ::stride][:, None, :] - cost).max(2)  # (x of a, y of m): best y of a
    ax = (along_y[None] - cost[:, :, None]).argmax(1)  # (x of m, y of m): best x of a
    x_m, y_m = ((mean - line[0]) / (line[1] - line[0])).round().long().clamp(0, len(line) - 1).T
    x_a = ax[x_m, y_m]
    return torch.stack([line[x_a] - line[x_m], line[ay[x_a, y_m]] - line[y_m]], 1)


def _smoother(axis: Tensor, at: Tensor, sigma: float, linear: bool = False, nodes: int = 32) -> Tensor:
    """The matrix (len(at), G) that takes a function on the axis to its mean E f(at + sigma z), by Gauss-Hermite."""
    z, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    first, cubic = _stencil(axis, at[:, None] + sigma * z, linear)
    matrix = at.new_zeros(len(at), len(axis))
    for k in range(4):
        matrix.scatter_add_(1, first + k, cubic[k] * (weight / weight.sum()))
    return matrix


def interpolate(tables: Tensor, axis: Tensor, x: Tensor) -> Tensor:
    """Read tables (C, G, G) at the points x (N, 2), by cubic interpolation in each axis: (C, N)."""
    (first_x, first_y), weight = _stencil(axis, x.double().T)
    rows = tables.flatten(1).T.contiguous()
    corner = first_x * len(axis) + first_y
    out = 0
    for j in range(4):
        for k in range(4):
            out = out + rows[corner + (j * len(axis) + k)] * (weight[j, 0] * weight[k, 1])[:, None]
    return out.T


def _stencil(axis: Tensor, x: Tensor, linear: bool = False) -> tuple[Tensor, Tensor]:
    """The first of 4 neighbouring points of the axis, as x, and their weights (4, *x.shape); x is clamped to the axis.

    The weights are Lagrange's cubic, or those of linear interpolation, which are never negative.
    """
    place = ((x - axis[0]) / (axis[1] - axis[0])).clamp(0, len(axis) - 1)
    first = (place.floor() - 1).clamp(0, len(axis) - 4)
    a, b, c, d = (place - first - k for k in range(4))
    if linear:
        weight = torch.stack([(1 - p.abs()).clamp(min=0) for p in (a, b, c, d)])
    else:
        weight = torch.stack([-b * c * d / 6, a * c * d / 2, -a * b * d / 2, a * b * c / 6])
    return first.long(), weight

"""The best that any chain, and the best that a chain of Gaussian steps, can reach in the plane.

J = E[r] - beta KL, where KL is that of the chain to the reference chain, from the same
x_T ~ N(0, I). With m = mu_ref(x) the mean of the reference's action i in state x, r the score of
the final point and z ~ N(0, I), both optima are backward recursions:

    over all policies:       V_T = r,  V_i(x) = beta log E exp(V_{i+1}(m + sigma_i z) / beta)
                             J* = E V_0(x_T)
    over means, sigma kept:  W_T = r,  W_i(x) = max over a of
                                           E W_{i+1}(a + sigma_i z) - beta |a - m|^2 / (2 sigma_i^2)
                             J_G = E W_0(x_T)

A denoiser shifts means only, so J_ref <= J(any denoiser) <= J_G <= J*. Functions of the plane are
float64 tables on a square grid, read off by cubic interpolation; the mean over z separates into one
matrix for each axis.
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
    """The three chains that frame every result, and the tables to sample from them. By `solve`."""

    j_ref: float  # the reference: its mean score E_ref[r], as its KL is 0
    j_star: float  # J of the best policy of all, pi* = pi_ref exp((V_{i+1} - V_i) / beta)
    score_star: float  # its mean score E*[r]
    kl_star: float  # its KL in nats
    j_gauss: float  # J of the best choice of means
    score_gauss: float
    kl_gauss: float
    error: float  # largest change of these, KL times beta, from a grid of twice the spacing
    value: Tensor  # (T+1, G, G) V_i on the grid, first index along x
    shift: Tensor  # (T, 2, G, G) best mean minus the reference's, on the grid
    axis: Tensor  # (G,) coordinates of the grid

    def numbers(self) -> dict[str, float]:
        """The eight numbers, without the tables."""
        return {key: value for key, value in self._asdict().items() if isinstance(value, float)}


def solve(
    reference: d3po.Denoiser,
    schedule: d3po.Schedule,
    score: Score,
    beta: float,
    spacing: float = 0.05,
    half_width: float = 5.0,
) -> Optimum:
    """Compute both optima of J = E[r] - beta KL(chain || reference chain), x_T ~ N(0, I).

    reference: called with float32 (G^2, 2), the whole grid, once for each action.
    score: finite and continuous. beta > 0: score per nat.
    spacing: of the grid; all is done at twice the spacing too, to tell the error, and the time goes
        as 1 / spacing^2.
    half_width: the grid is [-half_width, half_width]^2, and must hold the chains.

    Raises ValueError for beta <= 0 or a step with sigma = 0.
    """
    d3po._check_beta(beta)
    d3po._check_density(schedule)

    def on_grid(spacing):
        return _solve(reference, schedule, score, beta=beta, spacing=spacing, half_width=half_width)

    fine = on_grid(spacing)
    coarse = on_grid(2 * spacing).numbers()
    changes = {key: abs(coarse[key] - value) for key, value in fine.numbers().items()}
    del changes["error"]
    changes["kl_star"] *= beta
    changes["kl_gauss"] *= beta
    return fine._replace(error=max(changes.values()))


def attained_share(j: float, optimum: Optimum) -> float:
    """(J - J_ref) / (J_G - J_ref): 0 for the reference, 1 for the best chain of Gaussian steps.

    Raises ValueError where J_G is not above J_ref, so that there is nothing to attain.
    """
    gap = optimum.j_gauss - optimum.j_ref
    if not gap > 0:
        raise ValueError(
            f"the best chain gains {gap:.3g} over the reference: beta is too large for this score"
        )
    return (j - optimum.j_ref) / gap


@torch.no_grad()
def sample_optimum(
    reference: d3po.Denoiser,
    schedule: d3po.Schedule,
    score: Score,
    beta: float,
    optimum: Optimum,
    x_T: Tensor,
    proposals: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample states (T+1, B, 2) of pi*: of K actions of the reference keep one.

    Its weight is exp(V_{i+1} / beta). The K noises are a randomly shifted lattice: each is N(0, I),
    and together they cover the plane evenly, so that the bias is smaller than the O(1 / K) of
    independent ones: on the ring, T = 20, beta 1, K = 64 it is -0.006 in the score, against -0.03.

    optimum: of the same problem. x_T (B, 2): initial noise. proposals: K.
    """
    p = 1.324717957  # p^3 = p + 1, the plane's golden ratio
    lattice = torch.arange(proposals)[:, None] * torch.tensor([1 / p, 1 / p**2])
    x, rows = [x_T], torch.arange(len(x_T))
    for i, sigma in enumerate(schedule.sigma):
        mean = d3po.policy_mean(reference, schedule, i, x[-1])
        u = (lattice + torch.rand(len(mean), 1, 2, generator=generator)) % 1
        action = mean[:, None] + sigma * torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))
        flat = action.flatten(0, 1)
        if i == len(schedule.sigma) - 1:
            value = score(flat)
        else:
            value = interpolate(optimum.value[i + 1, None], optimum.axis, flat)[0]
        weight = torch.softmax(value.view(len(mean), -1) / beta, 1)
        chosen = torch.multinomial(weight, 1, generator=generator)[:, 0]
        x.append(action[rows, chosen])
    return torch.stack(x)


def gaussian_policy(
    reference: d3po.Denoiser, schedule: d3po.Schedule, optimum: Optimum
) -> d3po.Denoiser:
    """The denoiser whose chain attains J_G: it shifts the reference's means by optimum.shift.

    Eq. 2 is affine in eps, mu = a x + c eps with c = `mean_slope`: eps changes by shift / c. It
    knows the times of this schedule only (KeyError).
    """
    c = mean_slope(schedule)
    step = {time: i for i, time in enumerate(schedule.timesteps.tolist())}

    def denoise(x: Tensor, time: Tensor, cond=None) -> Tensor:
        i = step[int(time[0])]
        shift = interpolate(optimum.shift[i], optimum.axis, x).T
        return reference(x, time, cond) + (shift / c[i]).to(x.dtype)

    return denoise


@torch.no_grad()
def evaluate(
    policy: d3po.Denoiser,
    reference: d3po.Denoiser,
    schedule: d3po.Schedule,
    score: Score,
    spacing: float = 0.05,
    half_width: float = 5.0,
) -> tuple[float, float]:
    """Mean score and KL (nats) of a denoiser's chain by the same quadrature.

        R_T = r,  R_i(x) = E R_{i+1}(mu + sigma_i z)
        K_T = 0,  K_i(x) = KL_i(x) + E K_{i+1}(mu + sigma_i z),    KL_i of `step_kl`

    Exact where sampling would be noisy. Arguments as in `solve`.
    """
    axis, grid, r = _grid(score, spacing, half_width)
    x = grid.float()
    tables = torch.stack([r, torch.zeros_like(r)])
    for i in reversed(range(len(schedule.sigma))):
        mean = d3po.policy_mean(policy, schedule, i, x).double()
        smooth = _smoother(axis, axis, schedule.sigma[i].item())
        tables = interpolate(smooth @ tables @ smooth.T, axis, mean).view(tables.shape)
        tables[1] += step_kl(policy, reference, schedule, i=i, x=x).view(r.shape)
    start = _smoother(axis, axis.new_zeros(1), 1.0)  # x_T ~ N(0, I)
    return tuple((start @ tables @ start.T).flatten().tolist())


@torch.no_grad()
def _solve(reference, schedule, score, beta, spacing, half_width) -> Optimum:
    """Both recursions on one grid, from the last action to the first; the error is left open."""
    axis, grid, r = _grid(score, spacing, half_width)
    ref = star = gauss = r  # E_ref[r], E*[r], E_G[r], given the state before the action in hand
    v = w = r
    values, shifts = [v], []
    for i in reversed(range(len(schedule.sigma))):
        sigma = schedule.sigma[i].item()
        mean = d3po.policy_mean(reference, schedule, i, grid.float()).double()
        smooth = _smoother(axis, axis, sigma)
        smooth_linear = _smoother(axis, axis, sigma, linear=True)

        ref, w, gauss = smooth @ torch.stack([ref, w, gauss]) @ smooth.T
        v, star = _tilt(v, star, beta, cubic=smooth, linear=smooth_linear)
        best, w = _best_mean(w, axis, mean, reach=sigma**2 / beta)
        w = w.view(r.shape)
        gauss = interpolate(gauss[None], axis, best).reshape(r.shape)
        tables = interpolate(torch.stack([ref, v, star]), axis, mean)
        ref, v, star = tables.reshape(3, *r.shape)
        values.append(v)
        shifts.append((best - mean).T.reshape(2, *r.shape))

    start = _smoother(axis, axis.new_zeros(1), 1.0)  # x_T ~ N(0, I)
    means = start @ torch.stack([ref, v, star, w, gauss]) @ start.T
    names = ("j_ref", "j_star", "score_star", "j_gauss", "score_gauss")
    numbers = dict(zip(names, means.flatten().tolist(), strict=True))
    return Optimum(
        **numbers,
        kl_star=(numbers["score_star"] - numbers["j_star"]) / beta,
        kl_gauss=(numbers["score_gauss"] - numbers["j_gauss"]) / beta,
        error=float("nan"),
        value=torch.stack(values[::-1]),
        shift=torch.stack(shifts[::-1]),
        axis=axis,
    )


def _grid(score: Score, spacing: float, half_width: float) -> tuple[Tensor, Tensor, Tensor]:
    """The axis (G,), the points (G^2, 2) of the square grid, their scores (G, G): all float64."""
    half = round(half_width / spacing)
    axis = spacing * torch.arange(-half, half + 1, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return axis, grid, score(grid).double().view(len(axis), -1)


def _tilt(v: Tensor, star: Tensor, beta: float, cubic: Tensor, linear: Tensor):
    """beta log E exp(V / beta), and E[star exp(V / beta)] / E exp(V / beta): two tables (G, G).

    E is the mean over the noise, by the matrix `cubic`. Where V falls by many beta within the
    spacing, a cubic through exp(V / beta) overshoots, even below 0; there the linear interpolation
    is used, whose weights are positive.
    """
    top = v.max()
    weight = ((v - top) / beta).exp()
    tables = torch.stack([weight, weight * star])
    smooth, safe = cubic @ tables @ cubic.T, linear @ tables @ linear.T
    total, tilted = torch.where(smooth[0] > safe[0] / 2, smooth, safe)
    total = total.clamp(min=1e-300)
    return top + beta * total.log(), tilted / total


def _best_mean(table: Tensor, axis: Tensor, mean: Tensor, reach: float, steps: int = 3):
    """Maximise S(a) - |a - m|^2 / (2 reach) over a, for each m: best a (N, 2), their values (N,).

    table (G, G): S on the grid. mean (N, 2): m. reach: sigma^2 / beta. There can be several local
    maxima: start from the best point of a coarse grid, then Newton's method on
    a = m + reach grad S(a), and keep the best point found.
    """
    h = (axis[1] - axis[0]).item()
    slope = torch.stack(torch.gradient(table, spacing=h))
    bend_x, bend_y = (torch.gradient(s, spacing=h, dim=(0, 1)) for s in slope)
    tables = torch.stack([table, *slope, *bend_x, bend_y[1]])

    a = mean + _first_shift(table, axis, mean, reach=reach)
    best, best_value = a, mean.new_full((len(mean),), -torch.inf)
    for _ in range(steps):
        read = interpolate(tables, axis, a)
        value = read[0] - (a - mean).square().sum(1) / (2 * reach)
        best = torch.where((value > best_value)[:, None], a, best)
        best_value = torch.maximum(best_value, value)

        residual = mean + reach * read[1:3].T - a  # 0 at a maximum
        fx, fy = residual.T
        sxx, sxy, syy = read[3:]
        mxx, mxy, myy = 1 - reach * sxx, -reach * sxy, 1 - reach * syy
        det = mxx * myy - mxy**2
        newton = torch.stack([myy * fx - mxy * fy, mxx * fy - mxy * fx], 1) / det[:, None]
        concave = (det > 0) & (mxx > 0)
        a = a + torch.where(concave[:, None], newton, residual)
    return best, best_value


def _first_shift(table: Tensor, axis: Tensor, mean: Tensor, reach: float, stride: int = 2):
    """a - m (N, 2) for the best a of a coarse grid and that grid's m nearest to each mean.

    Axis by axis, max-plus. Where two local maxima tie, the nearest m may choose the lower: on the
    ring this costs J_G up to 2e-4.
    """
    line = axis[::stride]
    cost = (line[:, None] - line).square() / (2 * reach)
    along_y, ay = (table[::stride, ::stride][:, None, :] - cost).max(2)  # [x of a, y of m]: best y
    ax = (along_y[None] - cost[:, :, None]).argmax(1)  # [x of m, y of m]: best x of a
    nearest = ((mean - line[0]) / (line[1] - line[0])).round().long().clamp(0, len(line) - 1)
    x_m, y_m = nearest.T
    x_a = ax[x_m, y_m]
    y_a = ay[x_a, y_m]
    return torch.stack([line[x_a] - line[x_m], line[y_a] - line[y_m]], 1)


def _smoother(
    axis: Tensor, at: Tensor, sigma: float, linear: bool = False, nodes: int = 32
) -> Tensor:
    """The matrix (len(at), G) that takes f on the axis to E f(at + sigma z), by Gauss-Hermite."""
    z, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    first, stencil = _stencil(axis, at[:, None] + sigma * z, linear)
    matrix = at.new_zeros(len(at), len(axis))
    for k in range(4):
        matrix.scatter_add_(1, first + k, stencil[k] * (weight / weight.sum()))
    return matrix


def interpolate(tables: Tensor, axis: Tensor, x: Tensor) -> Tensor:
    """Read tables (C, G, G) at the points x (N, 2), by cubic interpolation in each axis: (C, N)."""
    (first_x, first_y), weight = _stencil(axis, x.double().T)
    rows = tables.flatten(1).T.contiguous()
    corner = first_x * len(axis) + first_y
    out = 0
    for j in range(4):
        for k in range(4):
            row = rows[corner + (j * len(axis) + k)]
            out = out + row * (weight[j, 0] * weight[k, 1])[:, None]
    return out.T


def _stencil(axis: Tensor, x: Tensor, linear: bool = False) -> tuple[Tensor, Tensor]:
    """The first of 4 neighbouring points of the axis, as x, and their weights (4, *x.shape).

    x is clamped to the axis. The weights are Lagrange's cubic, or those of linear interpolation,
    which are never negative.
    """
    position = ((x - axis[0]) / (axis[1] - axis[0])).clamp(0, len(axis) - 1)
    first = (position.floor() - 1).clamp(0, len(axis) - 4)
    d = [position - first - k for k in range(4)]  # distance to each of the four points
    if linear:
        weight = [(1 - distance.abs()).clamp(min=0) for distance in d]
    else:
        weight = [
            -d[1] * d[2] * d[3] / 6,
            d[0] * d[2] * d[3] / 2,
            -d[0] * d[1] * d[3] / 2,
            d[0] * d[1] * d[2] / 6,
        ]
    return first.long(), torch.stack(weight)

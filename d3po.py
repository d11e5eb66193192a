"""D3PO: fine-tune a diffusion model from pairwise preferences, with no reward model.

    python toy/train_toy.py        # these functions on a 2D toy, in a minute on a laptop

Denoising is a decision process of T steps: the state is the noisy image, the action is the next,
less noisy one, the policy is the sampler's Gaussian step. Sample two chains from one noise, ask
which final image is better, and at every step raise the probability of the winner's action and
lower the loser's, relative to a reference model (Eq. 14 of Yang et al., arXiv 2311.13231).

NOTATION
    paper                      code                           shape
    s_i = (c, i, x_{T-i})      cond, i, trajectory.x[i]       x: (B, *D) for a batch of B chains
    a_i = x_{T-i-1}            trajectory.x[i + 1]            (B, *D)
    pi(a_i | s_i), Eq. 2       N(policy_mean, sigma[i]^2 I)   log_prob: (B,)
    log(pi_theta / pi_ref)     log_ratio, in nats             (B,), or (P,) for P pairs
    h = [1,-1], [-1,1], [0,0]  h = +1, -1, 0                  (N,); +1: the first chain is better
    sigma_w, sigma_l           pairs: rows (winner, loser)    (P, 2) indices into the B chains
    beta, strength of the KL   beta; the beta_t of the noise schedule does not occur here
  Letters that mean two things:
    t      Sec. 4 counts steps from the noise (0 ... T-1), here i; Alg. 1 counts noise levels
           (T ... 1), here T - i; the network has a time of its own, here schedule.timesteps[i].
    alpha  DDIM's alpha_t is DDPM's alpha-bar_t, here alpha_bar or ab; Alg. 1's is ab / ab_prev.
    sigma  In the paper a segment or a standard deviation; here the standard deviation of a step.

WHERE THIS DEPARTS FROM THE AUTHORS' RELEASED CODE (and follows the paper)
    1. A log-prob is a sum over D elements, theirs a mean: its beta = 0.1 (Table 2) is 0.1 / D here.
    2. Ratios are not clamped; theirs are, to [0.9, 1.1]. `clip` switches it on.
    3. One update a step (Alg. 1 line 33); theirs is one a pair, gradients summed over the steps.
    4. The reference is evaluated once a chain, or known from sampling; theirs, at every update.
    5. A step is one call of the network, on the chains in some pair; theirs calls it for each pair.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__version__ = "1.0.0"

Denoiser = Callable[[Tensor, Tensor, Any], Tensor]  # eps(x (B, *D), time (B,), cond) -> (B, *D)
Generators = Generator | list[Generator] | None  # one of the batch, or one for each chain


class Schedule(NamedTuple):
    """The T actions of a sampler, noisiest first; x = sqrt(ab) x_0 + sqrt(1 - ab) eps."""

    timesteps: Tensor  # (T,) int64, model time before each action
    alpha_bar: Tensor  # (T,) alpha-bar before the action
    alpha_bar_prev: Tensor  # (T,) alpha-bar after the action
    sigma: Tensor  # (T,) standard deviation sigma_t of Eq. 2, eta folded in


class Trajectory(NamedTuple):
    """A batch of B denoising chains, made by `rollout`."""

    x: Tensor  # (T+1, B, *D) x_T ... x_0: state i is x[i], action i is x[i + 1]
    log_prob: Tensor  # (T, B) log pi(a_i | s_i) in nats, of the policy that sampled


def make_schedule(
    alpha_bars: Tensor, num_steps: int, eta: float = 1.0, timesteps: Tensor | None = None
) -> Schedule:
    """Choose the T = num_steps actions of a DDIM sampler; with eta = 1 each is DDPM's own step.

        sigma = eta sqrt((1 - ab_prev) / (1 - ab)) sqrt(1 - ab / ab_prev)

    alpha_bars (N,): alpha-bar of the model times 0 ... N-1, decreasing, inside (0, 1). The last
        action ends at alpha_bars[0], not at 1, so it has noise (diffusers: set_alpha_to_one=False).
    eta: noise scale in (0, 1]; without noise there is no density. timesteps (T,): decreasing model
        times; by default N // T apart, ending at 1 (timestep_spacing="leading", steps_offset=1).
    Raises ValueError where these conditions do not hold.   Source: DDIM, arXiv 2010.02502, Eq. 16.
    """
    bars = alpha_bars.detach().cpu().double()
    fits = bars.ndim == 1 and (bars > 0).all() and (bars < 1).all() and (bars.diff() < 0).all()
    _require(fits, "alpha_bars (N,) must decrease inside (0, 1), as scheduler.alphas_cumprod does")
    N = len(bars)
    _require(1 <= num_steps < N, f"num_steps = {num_steps}: {N} noise levels allow 1 to {N - 1}")
    _require(0 < eta <= 1, f"eta = {eta}: choose 0 < eta <= 1; without noise there is no density")
    if timesteps is None:
        timesteps = torch.arange(num_steps).flip(0) * (N // num_steps) + 1
    times = timesteps.cpu().long()
    _require(times.shape == (num_steps,), f"timesteps {times.shape} is not ({num_steps},)")
    fits = N > times[0] and times[-1] > 0 and (times.diff() < 0).all()
    _require(fits, f"timesteps must decrease inside 1 ... {N - 1}, not {times.tolist()}")

    ab = bars[times]
    ab_prev = torch.cat([ab[1:], bars[:1]])
    sigma = eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)).sqrt()
    dtype = torch.promote_types(alpha_bars.dtype, torch.float32)
    return Schedule(times, ab.to(dtype), ab_prev.to(dtype), sigma.to(dtype))


def policy_mean(
    denoiser: Denoiser, schedule: Schedule, i: int, x: Tensor, cond: Any = None
) -> Tensor:
    """Mean mu_theta of action i in state x; its standard deviation is schedule.sigma[i].

        mu = sqrt(ab_prev) (x - sqrt(1 - ab) eps) / sqrt(ab)  +  sqrt(1 - ab_prev - sigma^2) eps

    With eta = 1 this is Alg. 1 line 28. x (B, *D): state; cond: None or (B, ...). Returns (B, *D),
    float32 or wider. Raises ValueError if the denoiser's output is not (B, *D).   Paper: Eq. 2.
    """
    time = schedule.timesteps[i].to(x.device)
    ab = schedule.alpha_bar[i]
    ab_prev = schedule.alpha_bar_prev[i]
    sigma = schedule.sigma[i]

    eps = _at_least_float32(denoiser(x, time.expand(len(x)), cond))
    _require(eps.shape == x.shape, f"the denoiser gave {eps.shape} for x of {x.shape}")
    x_0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
    return ab_prev.sqrt() * x_0 + (1 - ab_prev - sigma**2).clamp(min=0).sqrt() * eps


def log_prob(action: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """Log-density of an action under N(mean, sigma^2 I): a sum over its D elements, not a mean.

        log pi = - |action - mean|^2 / (2 sigma^2) - (D / 2) log(2 pi sigma^2)

    action, mean (B, *D); sigma: positive scalar. Returns (B,), nats, float32 or wider.
    Raises ValueError for unequal shapes or sigma <= 0.   Paper: Alg. 1 lines 30-31 (with D = 1).
    """
    _require(action.shape == mean.shape, f"action {action.shape} and mean {mean.shape} differ")
    mean = _at_least_float32(mean)
    sigma = torch.as_tensor(sigma, dtype=mean.dtype)
    _require(sigma > 0, f"sigma = {sigma.tolist()}: no noise, so no density; use eta > 0")
    z = (action - mean) / sigma
    per_element = -(z**2) / 2 - sigma.log() - math.log(2 * math.pi) / 2
    return per_element.flatten(1).sum(1)


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    schedule: Schedule,
    x_T: Tensor,
    cond: Any = None,
    generator: Generators = None,
) -> Trajectory:
    """Sample chains x[i + 1] = mu(x[i]) + sigma[i] z, z ~ N(0, I), with the actions' log-probs.

    x_T (B, *D): initial noise; noise.repeat_interleave(K, 0) where groups of K chains share it.
    cond: None or a tensor (B, ...). generator: one on the CPU gives every device the same numbers;
        in a list of B each chain has its own, and its noise does not depend on the batch.
    Raises ValueError for a step with sigma = 0 or another number of generators.
    Paper: Alg. 1 lines 4-11.
    """
    _check_density(schedule)
    _check_generators(generator, len(x_T))
    x = [_at_least_float32(x_T)]
    noises = _noises(x[0], len(schedule.sigma), generator)
    log_probs = []
    for i, sigma in enumerate(schedule.sigma):
        mean = policy_mean(denoiser, schedule, i, x[i], cond)
        x.append(mean + sigma * noises[i])
        log_probs.append(log_prob(x[i + 1], mean, sigma))
    return Trajectory(torch.stack(x), torch.stack(log_probs))


@torch.no_grad()
def trajectory_log_prob(
    denoiser: Denoiser, schedule: Schedule, trajectory: Trajectory, cond: Any = None
) -> Tensor:
    """Log-probs (T, B), nats, that a denoiser gives to the actions of stored chains; no gradient.

    With the reference as denoiser this is log pi_ref, wanted once a chain, before training.
    Raises ValueError where schedule, trajectory and cond do not fit.   Paper: Alg. 1 line 31.
    """
    _check_trajectory(schedule, trajectory, cond)
    log_probs = []
    for i, sigma in enumerate(schedule.sigma):
        mean = policy_mean(denoiser, schedule, i, trajectory.x[i], cond)
        log_probs.append(log_prob(trajectory.x[i + 1], mean, sigma))
    return torch.stack(log_probs)


@torch.no_grad()
def bridge(
    schedule: Schedule,
    x_T: Tensor,
    x_end: Tensor,
    end: int | None = None,
    generator: Generators = None,
) -> Tensor:
    """Draw the states between x_T and x_end anew, from the noising process given these two.

        x[i + 1] = sqrt(ab_prev) x_end + sqrt(1 - ab_prev - sigma^2) eps + sigma z,    z ~ N(0, I)
        eps = (x[i] - sqrt(ab) x_end) / sqrt(1 - ab)

    with ab, ab_prev relative to x_end's alpha-bar, and sigma by Eq. 16 (1 - ab / ab_prev stays).
    x_T, x_end (B, *D): first state, and state number end (by default T, the final image).
    generator: as in `rollout`. Returns (end + 1, B, *D), both ends as they were given.
    Raises ValueError for unequal shapes, an end outside 1 ... T or another number of generators.
    Source: DDIM, Eqs. 7 and 16.
    """
    T = len(schedule.sigma)
    end = T if end is None else end
    _require(end in range(1, T + 1), f"end = {end}: choose a state in 1 ... {T}")
    _require(x_T.shape == x_end.shape, f"x_T {x_T.shape} and x_end {x_end.shape} differ")
    _check_generators(generator, len(x_T))

    level = schedule.alpha_bar[end] if end < T else schedule.alpha_bar_prev[-1]
    x = [x_T]
    x_end = _at_least_float32(x_end)
    noises = _noises(x_end, end - 1, generator)
    for i in range(end - 1):
        ab = schedule.alpha_bar[i] / level
        ab_prev = schedule.alpha_bar_prev[i] / level
        ratio = (1 - ab_prev) / (1 - schedule.alpha_bar_prev[i]) * (1 - schedule.alpha_bar[i])
        sigma = schedule.sigma[i] * (ratio / (1 - ab)).sqrt()

        scale = (1 - ab_prev - sigma**2).clamp(min=0).sqrt()
        mean = ab_prev.sqrt() * x_end + scale * (x[i] - ab.sqrt() * x_end) / (1 - ab).sqrt()
        x.append(mean + sigma * noises[i])
    return torch.stack([*x, x_end])


def preference(score_a: Tensor, score_b: Tensor, margin: float = 0.0) -> Tensor:
    """Label pairs by their scores: h = +1 where a is better by more than margin, -1 where b is.

    score_a, score_b (B,): higher is better; margin >= 0. Returns h (B,), int64, 0 for a tie.
    Raises ValueError for unequal shapes, NaN or a negative margin.   Paper: Alg. 1 lines 15-21.
    """
    _check_scores(score_a, score_b)
    _require(margin >= 0, f"margin = {margin}: choose 0 or more")
    a = _at_least_float32(score_a)
    b = _at_least_float32(score_b)
    return (a > b + margin).long() - (b > a + margin).long()


def bradley_terry(score_a: Tensor, score_b: Tensor, generator: Generator | None = None) -> Tensor:
    """Draw labels: h = +1 with probability logistic(score_a - score_b), else -1.

    score_a, score_b (B,). Returns h (B,), int64. Raises ValueError as `preference`.   Paper: Eq. 3.
    """
    _check_scores(score_a, score_b)
    p_a = torch.sigmoid(_at_least_float32(score_a) - _at_least_float32(score_b))
    device = p_a.device if generator is None else generator.device
    u = torch.rand(p_a.shape, generator=generator, device=device).to(p_a.device)
    return torch.where(u < p_a, 1, -1)


def pairs_from_feedback(h: Tensor) -> Tensor:
    """Rows (winner, loser) (P, 2) from labels h (N,) in {+1, -1, 0} of chains 2n and 2n + 1.

    Ties give no row. Raises ValueError for another shape or label.   Paper: Alg. 1 lines 16-20.
    """
    _require(h.ndim == 1, f"h {h.shape} is not of shape (N,), one label for each pair")
    known = ((h == 1) | (h == -1) | (h == 0)).all()
    _require(known, "a label h is +1 (first better), -1 (second better) or 0 (tie)")
    return pairs_from_scores(torch.stack([h, -h.long()], 1))


def pairs_from_scores(scores: Tensor) -> Tensor:
    """Rows (winner, loser) (P, 2) of all pairs inside each group of K chains whose scores differ.

    scores (N, K): chain k of group n is row n K + k. Raises ValueError for other shapes or NaN.
    """
    _require(scores.ndim == 2, f"scores {scores.shape} is not of shape (N, K), one row a group")
    _check_scores(scores)
    better = scores[:, :, None] > scores[:, None, :]
    group, winner, loser = better.nonzero(as_tuple=True)
    return group[:, None] * scores.shape[1] + torch.stack([winner, loser], 1)


def pairs_from_tags(bad: Tensor) -> Tensor:
    """Rows (winner, loser) (P, 2): in a group every untagged chain beats every tagged one.

    bad (N, K), bool: chain k of group n was tagged. Raises ValueError otherwise.   Paper: Sec. 5.2.
    """
    _require(bad.dtype == torch.bool, f"bad is {bad.dtype}: give a bool tensor (N, K)")
    return pairs_from_scores(~bad)


def d3po_loss(log_ratio_w: Tensor, log_ratio_l: Tensor, beta: float) -> Tensor:
    """Eq. 14 for given log-ratios log(pi_theta / pi_ref); log 2 = 0.693 where theta = ref.

        L = - log logistic(beta log_ratio_w - beta log_ratio_l)

    log_ratio_w, log_ratio_l (P,): nats; beta > 0. Returns (P,), not reduced. Raises ValueError for
    unequal shapes or beta <= 0.   Paper: Eqs. 5, 12, 14 (Alg. 1 line 33 lacks the minus sign).
    """
    _check_beta(beta)
    _require(log_ratio_w.shape == log_ratio_l.shape, "winner and loser log-ratios differ in shape")
    difference = _at_least_float32(log_ratio_w) - _at_least_float32(log_ratio_l)
    return -F.logsigmoid(beta * difference)


def d3po_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    pairs: Tensor,
    beta: float,
    ref_log_prob: Tensor,
    cond: Any = None,
    steps: list[int] | None = None,
    clip: float | None = None,
) -> Iterator[Tensor]:
    """Yield Eq. 14 step by step, one scalar loss (mean over the pairs) for each action.

        for loss in d3po_losses(policy, schedule, trajectory, pairs, beta, ref_log_prob, cond):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()                                          # Alg. 1 lines 25-34

    A loss is computed when it is asked for: memory holds one step's graph. No pairs, no loss.
    pairs (P, 2): rows (winner, loser) of chain indices. beta > 0: strength of the KL, per nat.
    ref_log_prob (T, B): trajectory.log_prob if the reference sampled, else `trajectory_log_prob`.
    cond: None or (B, ...). steps: actions to train on, in this order; by default all, shuffled by
        torch's global generator; [0] is Eq. 12. clip: eps for `clip_log_ratio`, off by default.
    Raises ValueError at the call for arguments that do not fit.   Paper: Eqs. 12 and 14.
    """
    _check_beta(beta)
    log_ratios = _log_ratios(
        policy, schedule, trajectory, pairs=pairs, ref_log_prob=ref_log_prob, cond=cond
    )

    def step_loss(i: int) -> Tensor:
        log_ratio_w, log_ratio_l = log_ratios(i)
        if clip is not None:
            log_ratio_w = clip_log_ratio(log_ratio_w, clip)
            log_ratio_l = clip_log_ratio(log_ratio_l, clip)
        return d3po_loss(log_ratio_w, log_ratio_l, beta).mean()

    return map(step_loss, _choose_steps(steps, len(schedule.sigma), pairs))


def chain_dpo_losses(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    pairs: Tensor,
    beta: float,
    ref_log_prob: Tensor,
    cond: Any = None,
    steps: list[int] | None = None,
) -> Iterator[Tensor]:
    """Yield Eq. 5 on the whole chain in T pieces: values add up to L, gradients to grad L.

        L = - log logistic(beta Delta),    Delta = sum over i of (log_ratio_w - log_ratio_l)
        grad L = - beta logistic(- beta Delta) sum over i of grad(log_ratio_w - log_ratio_l)

    A pass without gradient finds Delta; then each step is differentiated alone, with a constant
    factor, in the memory of one step. Update the weights after the last piece. Arguments and errors
    as in `d3po_losses`; steps restricts the sums to these.   Paper: Eq. 5.
    """
    _check_beta(beta)
    log_ratios = _log_ratios(
        policy, schedule, trajectory, pairs=pairs, ref_log_prob=ref_log_prob, cond=cond
    )
    steps = _choose_steps(steps, len(schedule.sigma), pairs)

    def difference(i: int) -> Tensor:
        log_ratio_w, log_ratio_l = log_ratios(i)
        return log_ratio_w - log_ratio_l

    with torch.no_grad():
        delta = sum(map(difference, steps), torch.zeros(()))
        loss = -F.logsigmoid(beta * delta).mean()
        weight = -beta * torch.sigmoid(-beta * delta)

    def piece(i: int) -> Tensor:
        linear = (weight * difference(i)).mean()
        return linear + (loss / len(steps) - linear).detach()  # L / T, with the gradient of step i

    return map(piece, steps)


def clip_log_ratio(log_ratio: Tensor, eps: float) -> Tensor:
    """Clamp the ratio to [1 - eps, 1 + eps], outside which its gradient is zero; not in the paper.

    log_ratio: nats; eps: 0.1 in the released code. Raises ValueError for eps outside (0, 1).
    """
    _require(0 < eps < 1, f"eps = {eps}: choose 0 < eps < 1")
    return log_ratio.clamp(math.log(1 - eps), math.log(1 + eps))


def _log_ratios(
    policy: Denoiser,
    schedule: Schedule,
    trajectory: Trajectory,
    pairs: Tensor,
    ref_log_prob: Tensor,
    cond: Any,
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function of i: log(pi_theta / pi_ref) of action i for winners (P,) and losers (P,)."""
    _check_trajectory(schedule, trajectory, cond)
    T, B = trajectory.log_prob.shape
    shape = ref_log_prob.shape
    _require(shape == (T, B), f"ref_log_prob {shape} is not (T, B) = {(T, B)}")
    rows = pairs.shape[1:] == (2,) and pairs.dtype in (torch.int32, torch.int64)
    _require(rows, f"pairs is {pairs.dtype} {pairs.shape}: give integers (P, 2), winner and loser")
    _require(((pairs >= 0) & (pairs < B)).all(), f"pairs names a chain outside 0 ... {B - 1}")

    chains, places = pairs.to(trajectory.x.device).unique(return_inverse=True)
    winner, loser = places.T
    cond = None if cond is None else cond[chains]

    def log_ratios(i: int) -> tuple[Tensor, Tensor]:
        mean = policy_mean(policy, schedule, i, trajectory.x[i, chains], cond)
        log_pi = log_prob(trajectory.x[i + 1, chains], mean, schedule.sigma[i])
        log_ratio = log_pi - ref_log_prob[i, chains]
        return log_ratio[winner], log_ratio[loser]

    return log_ratios


def _choose_steps(steps: list[int] | None, T: int, pairs: Tensor) -> list[int]:
    steps = torch.randperm(T).tolist() if steps is None else list(steps)
    _require(all(i in range(T) for i in steps), f"steps must lie in 0 ... {T - 1}, not {steps}")
    return steps if len(pairs) else []


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _noises(x: Tensor, count: int, generator: Generators) -> Tensor:
    """Draw (count, *x.shape), one after another, and move them to x's device together."""

    def draw(shape: torch.Size, generator: Generators) -> Tensor:
        if isinstance(generator, list):
            return torch.stack([draw(shape[1:], one) for one in generator])
        device = x.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=x.dtype)

    if count == 0:
        return x.new_empty(0, *x.shape)
    return torch.stack([draw(x.shape, generator) for _ in range(count)]).to(x.device)


def _require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_beta(beta: float) -> None:
    _require(beta > 0, f"beta = {beta}: choose beta > 0, the pull towards the reference")


def _check_generators(generator: Generators, B: int) -> None:
    fits = not isinstance(generator, list) or len(generator) == B
    _require(fits, f"generator is a list of another length than {B}: give one for each chain")


def _check_density(schedule: Schedule) -> None:
    silent = (schedule.sigma <= 0).nonzero().flatten().tolist()
    _require(not silent, f"steps {silent} have sigma = 0: use eta > 0 and alpha_bar_prev < 1 there")


def _check_trajectory(schedule: Schedule, trajectory: Trajectory, cond: Any) -> None:
    _check_density(schedule)
    T = len(schedule.sigma)
    states, B = trajectory.x.shape[:2]
    _require(states == T + 1, f"the trajectory has {states} states, but {T} steps make {T + 1}")
    _require(trajectory.log_prob.shape == (T, B), f"trajectory.log_prob is not (T, B) = {(T, B)}")
    _require(cond is None or len(cond) == B, f"cond must be None or have {B} rows, one a chain")


def _check_scores(*scores: Tensor) -> None:
    _require(len({s.shape for s in scores}) == 1, "the scores differ in shape")
    _require(not any(s.isnan().any() for s in scores), "a score is NaN: give every sample a number")

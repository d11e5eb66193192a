"""D3PO: fine-tune a diffusion model from pairwise preferences, with no reward model. The whole algorithm, torch only.

    python toy/train_toy.py        # these functions on a 2D toy, in a minute on a laptop

Denoising is a game of T moves: the state is the noisy image, the move is the next, less noisy one, and the sampler's
Gaussian step is the policy. Sample two chains from the same noise, ask which final image is better, and at every step
raise the probability of the winner's move and lower the loser's, relative to a reference model (Eq. 14 of Yang et al.,
"Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", arXiv 2311.13231).

NOTATION
    paper                         code                            shape
    state  s_i = (c, i, x_{T-i})  cond, i, trajectory.x[i]        (B, *D) for the x of a batch of B chains
    action a_i = x_{T-i-1}        trajectory.x[i + 1]             (B, *D)
    pi(a_i | s_i), Eq. 2          log_prob(x[i + 1], policy_mean(..., i, x[i]), schedule.sigma[i])        (B,)
    log(pi_theta / pi_ref)        log_ratio, in nats              (B,); (P,) for the winners or losers of P pairs
    h = [1,-1], [-1,1], [0,0]     h = +1, -1, 0                   (N,); +1: the first chain of the pair is better
    sigma_w, sigma_l (segments)   pairs: rows (winner, loser)     (P, 2) indices into the B chains
    rho, the logistic function    torch.sigmoid, F.logsigmoid
    beta, strength of the KL      beta (the noise schedule's beta_t does not occur in this file)
  Letters that mean two things:
    t       Sec. 4 counts moves from the noise (0 ... T-1), here i; Alg. 1 counts noise levels (T ... 1), here T - i;
            the network has its own time (981 ... 1 of 1,000, say), here schedule.timesteps[i].
    alpha   DDIM's alpha_t is DDPM's alpha-bar_t, here alpha_bar; Alg. 1's alpha_t is alpha_bar / alpha_bar_prev.
    sigma   in the paper a segment or a standard deviation; here always the standard deviation of a step.

WHERE THIS DEPARTS FROM THE AUTHORS' RELEASED CODE (and follows the paper)
    1. A log-prob is the sum over the D elements, a density (Alg. 1 lines 30-31); theirs is the mean. So their
       beta = 0.1 (Table 2) is 0.1 / D here: 6.1e-6 for a 4x64x64 latent.
    2. Ratios are not clamped; theirs are, to [0.9, 1.1], beyond which the gradient is zero. `clip` switches it on.
    3. One update at each step (Alg. 1 line 33); theirs is one for each pair, gradients summed over the steps.
    4. The reference's log-probs are computed once for each chain, or are those of sampling where the reference is the
       policy that sampled; theirs runs a second network at every update.
    5. All chains of a batch go through the network in one call, and a chain in no pair (a tie) not at all. K images
       of one prompt train up to K(K-1)/2 pairs from K forwards a step; theirs spends four on each pair.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Any], Tensor]  # eps(x (B, *D), model time (B,), cond) -> predicted noise (B, *D)


class Schedule(NamedTuple):
    """The T actions of a sampler, noisiest first, as made by `make_schedule`."""
    timesteps: Tensor  # (T,) int64, model time before each action
    alpha_bar: Tensor  # (T,) alpha-bar before the action: x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
    alpha_bar_prev: Tensor  # (T,) alpha-bar after the action
    sigma: Tensor  # (T,) standard deviation sigma_t of Eq. 2, eta folded in


class Trajectory(NamedTuple):
    """A batch of B denoising chains. Made by `rollout`."""
    x: Tensor  # (T+1, B, *D) x_T ... x_0: state i is x[i], action i is x[i + 1]
    log_prob: Tensor  # (T, B) log pi(a_i | s_i) in nats, of the policy that sampled the chain


# The policy: one denoising step is a Gaussian (Sec. 4.1, Eq. 2)

def make_schedule(alpha_bars: Tensor, num_steps: int, eta: float = 1.0, timesteps: Tensor | None = None) -> Schedule:
    """Choose the T = num_steps actions of a DDIM sampler; with eta = 1 each is DDPM's ancestral step.

        sigma = eta sqrt((1 - ab_prev) / (1 - ab)) sqrt(1 - ab / ab_prev)            (DDIM, arXiv 2010.02502, Eq. 16)

    alpha_bars (N,): alpha-bar of the model times 0 ... N-1, decreasing, inside (0, 1). The last action ends at
    alpha_bars[0], not at 1, so that its sigma is not zero (diffusers: set_alpha_to_one=False).
    eta: noise scale in (0, 1]; eta = 0 is a deterministic sampler: no density, so no log-prob to train on.
    timesteps (T,): decreasing model times; by default those of Stable Diffusion, N // T apart and ending at 1
    (diffusers: timestep_spacing="leading", steps_offset=1). Raises ValueError where these conditions do not hold.
    """
    _require(alpha_bars.ndim == 1 and len(alpha_bars) > 1, f"alpha_bars {tuple(alpha_bars.shape)} is not of shape (N,)")
    bars, n = alpha_bars.detach().cpu().double(), len(alpha_bars)
    falling = (bars > 0).all() and (bars < 1).all() and (bars.diff() < 0).all()
    _require(falling, "alpha_bars must decrease inside (0, 1): give cumulative products, as scheduler.alphas_cumprod")
    _require(1 <= num_steps < n, f"num_steps = {num_steps}: {n} noise levels have room for 1 to {n - 1} steps")
    _require(0 < eta <= 1, f"eta = {eta}: choose 0 < eta <= 1; at 0 a step has no noise, so no density to train on")
    if timesteps is None:
        timesteps = torch.arange(num_steps - 1, -1, -1) * (n // num_steps) + 1
    times = timesteps.detach().cpu().long()
    fits = times.shape == (num_steps,) and n > times.max() and times.min() >= 1 and (times.diff() < 0).all()
    _require(fits, f"timesteps must be {num_steps} decreasing integers between {n - 1} and 1, not {timesteps.tolist()}")
    ab, ab_prev = bars[times], bars[torch.cat([times[1:], times.new_zeros(1)])]
    sigma = eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)).sqrt()
    dtype = torch.promote_types(alpha_bars.dtype, torch.float32)
    return Schedule(times, ab.to(dtype), ab_prev.to(dtype), sigma.to(dtype))


def policy_mean(denoiser: Denoiser, schedule: Schedule, i: int, x: Tensor, cond: Any = None) -> Tensor:
    """Mean mu_theta of action i in state x; its standard deviation is schedule.sigma[i].

        mu = sqrt(ab_prev) (x - sqrt(1 - ab) eps) / sqrt(ab)  +  sqrt(1 - ab_prev - sigma^2) eps

    With eta = 1 this is Alg. 1 line 28, (x - (1 - alpha_t) / sqrt(1 - ab) eps) / sqrt(alpha_t), alpha_t = ab / ab_prev.
    x (B, *D): state; cond: None or (B, ...). Returns (B, *D), float32 or wider. Raises ValueError if the denoiser's
    output has another shape than x.   Paper: Eq. 2.
    """
    time, ab, ab_prev, sigma = (values[i] for values in schedule)
    eps = denoiser(x, time.to(x.device).expand(len(x)), cond)
    _require(eps.shape == x.shape, f"the denoiser gave {tuple(eps.shape)} for x of shape {tuple(x.shape)}")
    x, eps = _at_least_float32(x), _at_least_float32(eps)
    x_0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
    return ab_prev.sqrt() * x_0 + (1 - ab_prev - sigma**2).clamp(min=0).sqrt() * eps


def log_prob(action: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """Log-density of an action under N(mean, sigma^2 I), in nats, summed (never averaged) over its D elements.

        log pi = - |action - mean|^2 / (2 sigma^2) - (D / 2) log(2 pi sigma^2)

    action, mean (B, *D); sigma: positive scalar. Returns (B,), computed in float32 or wider.
    Raises ValueError for unequal shapes or sigma <= 0.   Paper: Alg. 1 lines 30-31 (printed there for D = 1).
    """
    _require(action.shape == mean.shape, f"action {tuple(action.shape)} and mean {tuple(mean.shape)} differ in shape")
    action, mean = _at_least_float32(action), _at_least_float32(mean)
    sigma = torch.as_tensor(sigma, dtype=mean.dtype)
    _require((sigma > 0).all(), f"sigma = {sigma.tolist()}: without noise an action has no density; use eta > 0")
    per_element = -(((action - mean) / sigma) ** 2) / 2 - sigma.log() - math.log(2 * math.pi) / 2
    return per_element.flatten(1).sum(1)


@torch.no_grad()
def rollout(denoiser: Denoiser, schedule: Schedule, x_T: Tensor, cond: Any = None,
            generator: torch.Generator | None = None) -> Trajectory:
    """Sample chains, x[i + 1] = mu(x[i]) + sigma_i z with z ~ N(0, I); keep all states and each action's log-prob.

    x_T (B, *D): initial noise; chain k of group n is row n K + k, so a group shares it by x_T.repeat_interleave(K, 0).
    cond: None or a tensor (B, ...). generator: one on the CPU gives every device the same numbers.
    Raises ValueError for a step with sigma = 0.   Paper: Alg. 1 lines 4-11.
    """
    _check_density(schedule)
    x, log_probs = [_at_least_float32(x_T)], []
    for i, sigma in enumerate(schedule.sigma):
        mean = policy_mean(denoiser, schedule, i, x[-1], cond)
        device = mean.device if generator is None else generator.device
        z = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
        x.append(mean + sigma * z)
        log_probs.append(log_prob(x[-1], mean, sigma))
    return Trajectory(torch.stack(x), torch.stack(log_probs))


@torch.no_grad()
def trajectory_log_prob(denoiser: Denoiser, schedule: Schedule, trajectory: Trajectory, cond: Any = None) -> Tensor:
    """Log-probs (T, B), in nats and without gradient, that a denoiser gives to the actions of stored chains.

    With the reference as denoiser: log pi_ref, wanted once for each chain, before training. Raises ValueError where
    schedule, trajectory and cond do not fit together.   Paper: Alg. 1 line 31.
    """
    _check_trajectory(schedule, trajectory, cond)
    steps, every = range(len(schedule.sigma)), slice(None)
    return torch.stack([_step_log_prob(denoiser, schedule, i, trajectory, every, cond) for i in steps])


# Preferences: which chain of a group is better (Eq. 3, Alg. 1 lines 12-22, Sec. 5.2)

def preference(score_a: Tensor, score_b: Tensor, margin: float = 0.0) -> Tensor:
    """Label pairs by their scores: h = +1 where a is better by more than margin, -1 where b is, 0 for a tie.

    score_a, score_b (B,): higher is better; margin >= 0, in their unit. Returns h (B,), int64. Raises ValueError for
    unequal shapes, NaN scores or a negative margin.   Paper: Alg. 1 lines 15-21, Sec. 5.1.
    """
    _check_scores(score_a, score_b)
    _require(margin >= 0, f"margin = {margin}: choose 0 or more")
    a, b = _at_least_float32(score_a), _at_least_float32(score_b)
    return (a > b + margin).long() - (b > a + margin).long()


def bradley_terry(score_a: Tensor, score_b: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw labels from the Bradley-Terry model: h = +1 with probability logistic(score_a - score_b), else -1.

    score_a, score_b (B,): rewards. Returns h (B,), int64. Raises ValueError as `preference`.   Paper: Eq. 3.
    """
    _check_scores(score_a, score_b)
    p_a = torch.sigmoid(_at_least_float32(score_a) - _at_least_float32(score_b))
    device = p_a.device if generator is None else generator.device
    return torch.where(torch.rand(p_a.shape, generator=generator, device=device).to(p_a.device) < p_a, 1, -1)


def pairs_from_feedback(h: Tensor) -> Tensor:
    """Rows (winner, loser) (P, 2) from labels h (N,) in {+1, -1, 0}; h[n] compares chains 2n and 2n + 1.

    Ties give no row. Raises ValueError for another shape or label.   Paper: h_k of Alg. 1 lines 16-20.
    """
    _require(h.ndim == 1, f"h has shape {tuple(h.shape)}: give (N,), one label for each pair of chains")
    _require(((h == 1) | (h == -1) | (h == 0)).all(), "a label h is +1 (first better), -1 (second better) or 0 (tie)")
    return pairs_from_scores(torch.stack([h.long(), -h.long()], 1))


def pairs_from_scores(scores: Tensor) -> Tensor:
    """Rows (winner, loser) (P, 2) of all pairs inside each group of K chains whose scores differ.

    scores (N, K): chain k of group n is row n K + k of the batch. Ties give no row. Raises ValueError for another
    number of dimensions or NaN scores.
    """
    _require(scores.ndim == 2, f"scores has shape {tuple(scores.shape)}: give (N, K), one row for each group")
    _check_scores(scores)
    group, winner, loser = (scores[:, :, None] > scores[:, None, :]).nonzero(as_tuple=True)
    return group[:, None] * scores.shape[1] + torch.stack([winner, loser], 1)


def pairs_from_tags(bad: Tensor) -> Tensor:
    """Rows (winner, loser) (P, 2) from tags: inside a group every untagged chain beats every tagged one, nothing else.

    bad (N, K), bool: True where chain k of group n was marked. Raises ValueError otherwise.   Paper: Sec. 5.2, K = 7.
    """
    _require(bad.dtype == torch.bool, f"bad is {bad.dtype}: give a bool tensor (N, K), True for each tagged chain")
    return pairs_from_scores((~bad).long())


# Losses (Eqs. 5, 12 and 14; Alg. 1 lines 23-36)

def d3po_loss(log_ratio_w: Tensor, log_ratio_l: Tensor, beta: float) -> Tensor:
    """Eq. 14 for given log-ratios: how badly a step ranks winner and loser; log 2 = 0.693 where theta = ref.

        L = - log logistic(beta log(pi_theta / pi_ref)(winner) - beta log(pi_theta / pi_ref)(loser))

    log_ratio_w, log_ratio_l (P,): nats; beta > 0. Returns (P,), not reduced. Raises ValueError for unequal shapes or
    beta <= 0.   Paper: Eqs. 5, 12, 14 (Alg. 1 line 33 omits the minus sign that gradient descent needs).
    """
    _check_beta(beta)
    shapes = tuple(log_ratio_w.shape), tuple(log_ratio_l.shape)
    _require(shapes[0] == shapes[1], f"the log-ratios of winners and losers differ in shape: {shapes}")
    return -F.logsigmoid(beta * (_at_least_float32(log_ratio_w) - _at_least_float32(log_ratio_l)))


def d3po_losses(policy: Denoiser, schedule: Schedule, trajectory: Trajectory, pairs: Tensor, beta: float,
                ref_log_prob: Tensor, cond: Any = None, steps: list[int] | None = None,
                clip: float | None = None) -> Iterator[Tensor]:
    """Yield Eq. 14 step by step: one scalar loss (mean over the pairs) for each action. Alg. 1 lines 25-34 are then

        for loss in d3po_losses(policy, schedule, trajectory, pairs, beta, ref_log_prob, cond):
            optimizer.zero_grad(); loss.backward(); optimizer.step()

    Each loss is computed when it is asked for: memory holds the graph of one step, whatever T is. A step calls the
    policy once, on the chains that are in some pair; without pairs no loss is yielded.
    trajectory: B chains from `rollout`. pairs (P, 2): rows (winner, loser) of chain indices. beta > 0: strength of the
    KL, per nat. ref_log_prob (T, B): trajectory.log_prob where the reference sampled the chains, else
    `trajectory_log_prob`. cond: None or a tensor (B, ...). steps: the actions to train on, in this order; by default
    all T in random order (torch's global generator); [0] is Eq. 12. clip: eps for `clip_log_ratio`, off by default.
    Raises ValueError at the call for shapes, indices, steps or a beta that do not fit.   Paper: Eqs. 12 and 14.
    """
    chains, winner, loser, steps = _prepare(schedule, trajectory, pairs, beta, ref_log_prob, cond, steps)

    def step_loss(i):
        log_ratio = _step_log_prob(policy, schedule, i, trajectory, chains, cond) - ref_log_prob[i, chains]
        log_ratio = log_ratio if clip is None else clip_log_ratio(log_ratio, clip)
        return d3po_loss(log_ratio[winner], log_ratio[loser], beta).mean()

    return map(step_loss, steps)


def chain_dpo_losses(policy: Denoiser, schedule: Schedule, trajectory: Trajectory, pairs: Tensor, beta: float,
                     ref_log_prob: Tensor, cond: Any = None, steps: list[int] | None = None) -> Iterator[Tensor]:
    """Yield Eq. 5 on the whole chain in T pieces: their values add up to the loss, their gradients to its gradient.

        L = - log logistic(beta Delta),    Delta = sum over i of (log-ratio of the winner - log-ratio of the loser)
        grad L = - beta logistic(- beta Delta) sum over i of grad(log-ratio difference of step i)

    A pass without gradient finds Delta; then each step is differentiated alone, with the factor before the sum as a
    constant: the memory of one step, as for Eq. 14. The weights must stay as they are until all pieces are done:

        for loss in chain_dpo_losses(policy, schedule, trajectory, pairs, beta, ref_log_prob, cond): loss.backward()
        optimizer.step(); optimizer.zero_grad()

    Arguments and errors as in `d3po_losses`; steps restricts the sum to these actions.   Paper: Eq. 5.
    """
    chains, winner, loser, steps = _prepare(schedule, trajectory, pairs, beta, ref_log_prob, cond, steps)

    def difference(i):
        log_ratio = _step_log_prob(policy, schedule, i, trajectory, chains, cond) - ref_log_prob[i, chains]
        return log_ratio[winner] - log_ratio[loser]

    with torch.no_grad():
        delta = sum(map(difference, steps), torch.zeros(()))
        share = d3po_loss(delta, torch.zeros_like(delta), beta).mean() / max(len(steps), 1)
        weight = -beta * torch.sigmoid(-beta * delta)

    def piece(i):
        linear = (weight * difference(i)).mean()
        return linear + (share - linear).detach()  # an equal share of L, with the gradient of step i

    return map(piece, steps)


def clip_log_ratio(log_ratio: Tensor, eps: float) -> Tensor:
    """Clamp the ratio pi_theta / pi_ref to [1 - eps, 1 + eps]: not in the paper, eps = 0.1 in the released code.

    Beyond the clamp the gradient is zero, so a winner that fell below 1 - eps cannot recover. log_ratio: nats, any
    shape. Raises ValueError for eps outside (0, 1).
    """
    _require(0 < eps < 1, f"eps = {eps}: choose 0 < eps < 1")
    return log_ratio.clamp(math.log(1 - eps), math.log(1 + eps))


# Helpers

def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _step_log_prob(denoiser, schedule, i, trajectory, chains, cond) -> Tensor:
    """log pi(a_i | s_i) of the chosen chains, from one call of the denoiser."""
    mean = policy_mean(denoiser, schedule, i, trajectory.x[i, chains], None if cond is None else cond[chains])
    return log_prob(trajectory.x[i + 1, chains], mean, schedule.sigma[i])


def _prepare(schedule, trajectory, pairs, beta, ref_log_prob, cond, steps):
    """Check the arguments of a loss; return the chains in use, the places of each pair among them, and the steps."""
    _check_beta(beta)
    _check_trajectory(schedule, trajectory, cond)
    T, B = trajectory.log_prob.shape
    _require(ref_log_prob.shape == (T, B), f"ref_log_prob has shape {tuple(ref_log_prob.shape)}, not (T, B) = {(T, B)}")
    rows = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype in (torch.int32, torch.int64)
    _require(rows, f"pairs is {tuple(pairs.shape)} {pairs.dtype}: give (P, 2) integers, rows (winner, loser)")
    _require(((pairs >= 0) & (pairs < B)).all(), f"pairs names a chain outside 0 ... {B - 1}")
    steps = torch.randperm(T).tolist() if steps is None else list(steps)
    _require(all(i in range(T) for i in steps), f"steps must lie in 0 ... {T - 1}, not {steps}")
    chains, places = pairs.to(trajectory.x.device).unique(return_inverse=True)
    return chains, *places.T, steps if len(pairs) else []


def _require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_beta(beta: float) -> None:
    _require(beta > 0, f"beta = {beta}: choose beta > 0, the strength of the pull towards the reference")


def _check_density(schedule: Schedule) -> None:
    silent = (schedule.sigma <= 0).nonzero().flatten().tolist()
    _require(not silent, f"steps {silent} have sigma = 0, so no density: use eta > 0 and alpha_bar_prev < 1 there")


def _check_trajectory(schedule: Schedule, trajectory: Trajectory, cond: Any) -> None:
    _check_density(schedule)
    (T,), (states, B) = schedule.sigma.shape, trajectory.x.shape[:2]
    shapes = states, tuple(trajectory.log_prob.shape)
    _require(shapes == (T + 1, (T, B)), f"(states, log_prob shape) is {shapes}; {T} steps make {(T + 1, (T, B))}")
    _require(cond is None or len(cond) == B, f"cond must be None or a tensor whose first dimension is the {B} chains")


def _check_scores(*scores: Tensor) -> None:
    shapes = {tuple(s.shape) for s in scores}
    _require(len(shapes) == 1, f"the scores differ in shape: {shapes}")
    _require(not any(s.isnan().any() for s in scores), "a score is NaN: give every sample a number")

"""The loop against Alg. 1 typed out, torch.distributions in a double loop, and counts of calls and updates."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import d3po
from toy import ddpm, worlds
from toy.align import MAX_GRAD_NORM, Comparisons, align, redraw
from toy.worlds import ALPHA_BARS, MIXTURES

T, PAIRS, BETA, LR = 5, 16, 0.3, 1e-2
RING = MIXTURES["ring"]
EXACT = worlds.exact_denoiser(RING)
SCHEDULE = d3po.make_schedule(ALPHA_BARS, T)
METHODS = {  # function, updates an epoch
    "eq14": (d3po.d3po_losses, T),
    "eq12": (partial(d3po.d3po_losses, steps=[0]), 1),
    "chain": (d3po.chain_dpo_losses, 1),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
BOTH_REFERENCES = pytest.mark.parametrize("reference", [EXACT, None], ids=["fixed", "moving"])


def new_policy(seed=0):
    torch.manual_seed(seed)
    return ddpm.Adapter(EXACT, SCHEDULE, RING)


def perturbed_policy(seed=0):
    policy = new_policy(seed)
    nn.init.normal_(policy.correction.mlp[-1].weight, std=0.1)
    return policy


def pair_losses(policy, schedule, seen, losses=d3po.d3po_losses):
    return losses(policy, schedule, seen.chains, d3po.pairs_from_feedback(seen.h), BETA, seen.ref_log_prob)


def epochs_of(policy, n=3, method="eq14", *, reference=EXACT, score=worlds.reach, label=d3po.preference, losses=None,
              replay=0, **options):
    """Run `align` with the settings of this file."""
    losses = losses or partial(pair_losses, losses=METHODS[method][0])
    return align(policy, reference, SCHEDULE, score, label, losses, method != "chain", LR, n, PAIRS, replay,
                 **options)


class Counted(nn.Module):
    """A network that counts its calls and the rows it was given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls, self.rows = net, 0, 0

    def forward(self, x, time, cond=None):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.net(x, time, cond)


@BOTH_REFERENCES
@pytest.mark.parametrize("method", ["eq14", "chain"])
def test_the_loop_is_algorithm_1(method, reference):
    n = 3
    policy = new_policy()
    torch.manual_seed(1)
    epochs = epochs_of(policy, n, method, reference=reference, label=d3po.bradley_terry)
    ends = [epoch.new.chains.x[-1] for epoch in epochs]

    typed = new_policy()
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(typed.correction.parameters(), LR, betas=(0.9, 0.99))

    def step():
        nn.utils.clip_grad_norm_(typed.correction.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(n):  # line 2
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * epoch / n)) / 2
        x_T = torch.randn(PAIRS, 2)  # lines 4-5
        chains = d3po.rollout(typed, SCHEDULE, torch.stack([x_T, x_T], 1).flatten(0, 1))  # lines 6-11
        assert torch.equal(chains.x[-1], ends[epoch])
        r = worlds.reach(chains.x[-1])
        pairs = d3po.pairs_from_feedback(d3po.bradley_terry(r[0::2], r[1::2]))  # lines 12-22
        ref = chains.log_prob if reference is None else d3po.trajectory_log_prob(reference, SCHEDULE, chains)
        for loss in METHODS[method][0](typed, SCHEDULE, chains, pairs, BETA, ref):  # lines 25-34
            loss.backward()
            if method == "eq14":
                step()
        if method == "chain":
            step()
    for a, b in zip(policy.parameters(), typed.parameters(), strict=True):
        assert torch.equal(a, b)


@EVERY_METHOD
def test_alignment_raises_the_score_and_the_accuracy(method):
    policy = new_policy()
    torch.manual_seed(2)
    first, *_, last = (epoch for epoch in epochs_of(policy, 60, method, label=d3po.preference))
    before, after = (epoch.new.scores.mean().item() for epoch in (first, last))
    # the error of a mean of 32 scores is about 0.2; Eq. 12 moves the first of 5 steps only, the others a full unit
    assert after > before + (0.3 if method == "eq12" else 0.8), (before, after)
    assert first.accuracy == 0.5 and first.margin == 0  # the policy is the reference


def test_the_weights_follow_the_seed():
    results = []
    for seed in (0, 0, 1):
        policy = new_policy()
        torch.manual_seed(seed)
        list(epochs_of(policy))
        results.append(nn.utils.parameters_to_vector(policy.correction.parameters()))
    first, again, other = results
    assert torch.equal(first, again) and not torch.equal(first, other)


@EVERY_METHOD
@pytest.mark.parametrize("replay", [0, 2])
def test_each_step_counts_updates(method, replay):
    policy, n = new_policy(), 2
    count = []
    hook = register_optimizer_step_post_hook(lambda *_: count.append(1))
    try:
        list(epochs_of(policy, n, method, replay=replay))
    finally:
        hook.remove()
    assert len(count) == n * (1 + replay) * METHODS[method][1]


def test_gradients_are_clipped():
    policy, norms = new_policy(), []

    def steep(policy, schedule, seen):
        return (1e4 * loss for loss in pair_losses(policy, schedule, seen))

    def note(*_):
        norms.append(nn.utils.get_total_norm([p.grad for p in policy.correction.parameters()]).item())

    hook = register_optimizer_step_pre_hook(note)
    try:
        list(epochs_of(policy, 2, losses=steep))
    finally:
        hook.remove()
    assert norms == pytest.approx([MAX_GRAD_NORM] * 2 * T, rel=1e-4)  # torch divides by the norm + 1e-6


def test_calls_of_the_networks():
    """A step is one call for all its chains. The reference is called T times an epoch, or never where it samples."""
    policy, reference = Counted(new_policy()), Counted(EXACT)
    list(epochs_of(policy, 2, reference=reference, label=lambda a, b: torch.where(a > b, 1, -1)))
    assert (reference.calls, reference.rows) == (2 * T, 2 * T * 2 * PAIRS)
    assert (policy.calls, policy.rows) == (2 * 2 * T, 2 * 2 * T * 2 * PAIRS)  # rollout and losses

    policy = Counted(new_policy())
    list(epochs_of(policy, 2, reference=None, label=lambda a, b: torch.where(a > b, 1, -1)))
    assert policy.calls == 2 * 2 * T  # nothing else can have been called


def test_the_moving_reference_is_the_policy_that_sampled():
    for epoch in epochs_of(perturbed_policy(), 3, reference=None):
        assert torch.equal(epoch.new.ref_log_prob, epoch.new.chains.log_prob)
        assert epoch.accuracy == 0.5 and epoch.margin == 0


def test_pairs_share_their_x_T_and_labels_compare_their_ends():
    epoch = next(epochs_of(new_policy()))
    x = epoch.new.chains.x
    assert x.shape == (T + 1, 2 * PAIRS, 2)
    assert torch.equal(x[0, 0::2], x[0, 1::2]) and not torch.equal(x[1, 0::2], x[1, 1::2])
    assert torch.equal(epoch.new.scores, torch.stack([worlds.reach(x[-1, 0::2]), worlds.reach(x[-1, 1::2])], 1))
    assert torch.equal(epoch.new.h, (epoch.new.scores[:, 0] - epoch.new.scores[:, 1]).sign().long())


def test_labels_loss_and_epochs_are_counted():
    seen = []

    def recorded(policy, schedule, pairs):
        for loss in pair_losses(policy, schedule, pairs):
            seen.append(loss.item())
            yield loss

    epochs = list(epochs_of(new_policy(), 3, losses=recorded))
    assert [epoch.labels for epoch in epochs] == [PAIRS, 2 * PAIRS, 3 * PAIRS]
    for k, epoch in enumerate(epochs):
        assert epoch.loss == pytest.approx(sum(seen[k * T : k * T + T]) / T)


def test_accuracy_and_margin_are_those_of_a_double_loop():
    policy = perturbed_policy()
    sampler = copy.deepcopy(policy)

    def with_ties(a, b):
        return d3po.preference(a, b, margin=0.3)

    epoch = next(epochs_of(policy, 1, label=with_ties))
    x, h = epoch.new.chains.x, epoch.new.h.tolist()
    assert {1, -1, 0} == set(h)
    margins = []
    for n in range(PAIRS):
        if h[n] == 0:
            continue
        log_ratio = [0.0, 0.0]
        for k in (0, 1):
            for i in range(T):
                state, action = x[i, 2 * n + k, None], x[i + 1, 2 * n + k, None]
                for sign, denoiser in ((1, sampler), (-1, EXACT)):
                    law = Normal(d3po.policy_mean(denoiser, SCHEDULE, i, state), SCHEDULE.sigma[i])
                    log_ratio[k] += sign * law.log_prob(action).sum().item()
        margins.append(h[n] * (log_ratio[0] - log_ratio[1]))
    assert epoch.margin == pytest.approx(sum(margins) / len(margins), abs=1e-4)  # float32 log-probs of size 10
    assert epoch.accuracy == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert 0 < epoch.accuracy < 1


# Memory of earlier pairs


def numbered(first, n):
    """n pairs whose every entry tells which chain or pair it belongs to."""
    chain, pair = torch.arange(2.0 * first, 2 * (first + n)), torch.arange(first, first + n)
    x = chain[None, :, None] + torch.arange(3)[:, None, None] / 10 + torch.zeros(3, 2 * n, 2)
    log_prob = -chain + torch.arange(2)[:, None] / 10
    return Comparisons(d3po.Trajectory(x, log_prob), chain.view(n, 2), pair % 3 - 1, log_prob - 1000)


def assert_same(a, b):
    for one, other in zip((*a.chains, *a[1:]), (*b.chains, *b[1:]), strict=True):
        assert torch.equal(one, other)


def test_join_is_one_after_the_other():
    assert_same(numbered(0, 3).join(numbered(3, 4)), numbered(0, 7))


def test_select_takes_both_chains_of_a_pair():
    part = numbered(0, 6).select(torch.tensor([4, 0, 4]))
    assert part.chains.x[0, :, 0].tolist() == [8, 9, 0, 1, 8, 9]
    assert part.chains.log_prob[0].tolist() == [-8, -9, 0, -1, -8, -9]
    assert part.ref_log_prob[0].tolist() == [-1008, -1009, -1000, -1001, -1008, -1009]
    assert part.scores.tolist() == [[8, 9], [0, 1], [8, 9]]
    assert part.h.tolist() == [0, -1, 0]
    assert_same(numbered(0, 6).select(torch.arange(2, 5)), numbered(2, 3))


def recording(trained):
    """Losses that note on which pairs they were asked for."""

    def losses(policy, schedule, seen):
        trained.append(seen)
        return pair_losses(policy, schedule, seen)

    return losses


def test_replay_trains_on_pairs_of_all_epochs():
    n, replay, trained = 4, 2, []
    policy = new_policy()
    torch.manual_seed(3)
    epochs = list(epochs_of(policy, n, losses=recording(trained), replay=replay))
    assert len(trained) == n * (1 + replay)
    home = {tuple(x): k for k, epoch in enumerate(epochs) for x in epoch.new.chains.x[-1, 0::2].tolist()}
    drawn = set()
    for k, seen in enumerate(trained):
        epoch, batch = divmod(k, 1 + replay)
        if batch == 0:  # the new pairs come first
            assert_same(seen, epochs[epoch].new)
            continue
        firsts = [tuple(x) for x in seen.chains.x[-1, 0::2].tolist()]
        assert len(set(firsts)) == len(firsts) == min(2, epoch + 1) * PAIRS  # no pair twice
        drawn |= {(epoch, home[x]) for x in firsts}
        # stored pairs keep the log-probs of the reference, for these very chains; float32 in another batch
        expected = d3po.trajectory_log_prob(EXACT, SCHEDULE, seen.chains)
        torch.testing.assert_close(seen.ref_log_prob, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(seen.scores, worlds.reach(seen.chains.x[-1]).view(-1, 2))
    # twice 32 of at most 64 pairs are drawn: an epoch is missed with probability 1e-9, and none comes before its time
    assert drawn == {(epoch, old) for epoch in range(n) for old in range(epoch + 1)}


def test_without_replay_only_new_pairs_are_seen():
    trained = []
    epochs = list(epochs_of(new_policy(), 3, losses=recording(trained)))
    for seen, epoch in zip(trained, epochs, strict=True):
        assert_same(seen, epoch.new)


# What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops_the_run(value):
    with pytest.raises(FloatingPointError, match="epoch 1: a sample's score"):
        next(epochs_of(new_policy(), score=lambda x: x[:, 0] * value))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights():
    policy, first = new_policy(), True

    def second_epoch_breaks(policy, schedule, seen):
        nonlocal first
        for loss in pair_losses(policy, schedule, seen):
            yield loss if first else loss * math.nan
        first = False

    training = epochs_of(policy, 5, losses=second_epoch_breaks)
    assert next(training).labels == PAIRS  # the good epoch is told
    with pytest.raises(FloatingPointError, match="epoch 2: the loss"):
        next(training)
    assert all(p.isfinite().all() for p in policy.parameters())


def test_a_weight_that_is_not_finite_stops_the_run():
    def infinite_slope(policy, schedule, seen):
        yield (policy.correction.mlp[-1].bias.sum() * 0).sqrt()  # 0, with gradient 0 / 0

    with pytest.raises(FloatingPointError, match="epoch 1: a weight"):
        next(epochs_of(new_policy(), losses=infinite_slope))


def test_an_epoch_of_ties_changes_nothing():
    policy = new_policy()
    before = nn.utils.parameters_to_vector(policy.parameters()).clone()
    (epoch,) = epochs_of(policy, 1, label=lambda a, b: torch.zeros(len(a), dtype=torch.long))
    assert torch.equal(nn.utils.parameters_to_vector(policy.parameters()), before)
    assert epoch.labels == PAIRS


@pytest.mark.parametrize("method", ["eq14", "chain"])
def test_an_epoch_of_ties_reports_numbers(method):
    (epoch,) = epochs_of(new_policy(), 1, method, label=lambda a, b: torch.zeros(len(a), dtype=torch.long))
    assert all(math.isfinite(value) for value in (epoch.loss, epoch.accuracy, epoch.margin))


# Chains drawn anew, averaged weights


def test_redrawn_chains_have_the_marginals_of_the_noising_process():
    """From x_T of the noising process that starts at y, every state is N(sqrt(ab) y, (1 - ab) I) (DDIM, Lemma 1)."""
    torch.manual_seed(0)
    n, steps = 40_000, 8
    schedule = d3po.make_schedule(ALPHA_BARS, steps)
    y = torch.tensor([1.5, -0.5], dtype=torch.float64).expand(n, 2)
    ab = (schedule.alpha_bar / schedule.alpha_bar[steps - 2]).double()
    x_T = ab[0].sqrt() * y + (1 - ab[0]).sqrt() * torch.randn_like(y)
    stored = torch.cat([x_T[None], torch.randn(steps - 3, n, 2).double(), y[None], torch.randn(2, n, 2).double()])
    x = redraw(schedule, stored)
    for i in range(1, steps - 2):
        standard = (x[i] - ab[i].sqrt() * y) / (1 - ab[i]).sqrt()
        # four standard errors of a mean and of a variance over n draws
        assert standard.mean(0).abs().max() < 4 / n**0.5
        assert (standard.var(0) - 1).abs().max() < 4 * (2 / n) ** 0.5
        # eta = 1: given x[i + 1] the noisier x[i] is one step of noising, whatever y is
        if i < steps - 3:
            ratio = ab[i] / ab[i + 1]
            residual = (x[i] - ratio.sqrt() * x[i + 1]) / (1 - ratio).sqrt()
            assert (residual.var(0) - 1).abs().max() < 4 * (2 / n) ** 0.5
            assert (residual * (x[i + 1] - ab[i + 1].sqrt() * y)).mean(0).abs().max() < 4 / n**0.5


def test_redrawn_chains_keep_both_ends_and_are_new_in_between():
    chains = d3po.rollout(EXACT, SCHEDULE, torch.randn(6, 2))
    x = redraw(SCHEDULE, chains.x)
    assert x.shape == chains.x.shape
    assert torch.equal(x[0], chains.x[0]) and torch.equal(x[-3:], chains.x[-3:])
    assert (x[1:-3] != chains.x[1:-3]).all()
    assert torch.equal(redraw(d3po.make_schedule(ALPHA_BARS, 2), chains.x[-3:]), chains.x[-3:])  # no state in between


def test_only_stored_pairs_are_redrawn_and_the_reference_sees_the_new_chains():
    seen = []

    def losses(policy, schedule, comparisons):
        seen.append(comparisons)
        return pair_losses(policy, schedule, comparisons)

    (epoch,) = epochs_of(new_policy(), 1, losses=losses, replay=2, redrawn=True)
    assert seen[0] is epoch.new
    for stored in seen[1:]:
        assert (stored.chains.x[1:-3] != epoch.new.chains.x[1:-3, : stored.chains.x.shape[1]]).any()
        assert torch.equal(stored.ref_log_prob, d3po.trajectory_log_prob(EXACT, SCHEDULE, stored.chains))
    with pytest.raises(ValueError, match="reference that stays"):
        next(epochs_of(new_policy(), 1, reference=None, replay=1, redrawn=True))


def test_averaged_weights_are_what_is_seen_and_not_what_trains():
    def run(average):
        policy = new_policy()
        torch.manual_seed(1)
        return [
            (epoch.new.chains.x, [w.detach().clone() for w in policy.parameters() if w.requires_grad])
            for epoch in epochs_of(policy, 4, average=average)
        ]

    raw, averaged = run(False), run(True)
    mean = raw[0][1]
    for epoch, ((x, weights), (x_too, seen)) in enumerate(zip(raw, averaged, strict=True), 1):
        assert torch.equal(x, x_too)  # the same chains: sampling and training do not know of the average
        mean = [m + 10 / (epoch + 9) * (w - m) for m, w in zip(mean, weights, strict=True)]
        for m, w in zip(mean, seen, strict=True):
            torch.testing.assert_close(m, w)

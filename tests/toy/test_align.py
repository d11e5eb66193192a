"""The loop against Alg. 1 typed out, torch.distributions, and counts of calls and updates."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import d3po
from toy import ddpm, worlds
from toy.align import PreferenceBatch, align, pair_loss
from toy.worlds import ALPHA_BARS, MIXTURES

T, PAIRS, BETA, LR = 5, 16, 0.3, 1e-2
RING = MIXTURES["ring"]
EXACT = worlds.exact_denoiser(RING)
SCHEDULE = d3po.make_schedule(ALPHA_BARS, T)
METHODS = {  # function, when to update
    "eq14": (d3po.d3po_losses, "timestep"),
    "chain": (d3po.chain_dpo_losses, "trajectory"),
}
BOTH_REFERENCES = pytest.mark.parametrize(
    "reference", [EXACT, "previous"], ids=["initial", "previous"]
)


def new_policy(seed=0):
    torch.manual_seed(seed)
    return ddpm.Adapter(EXACT, SCHEDULE, RING)


def perturbed_policy(seed=0):
    policy = new_policy(seed)
    nn.init.normal_(policy.correction.mlp[-1].weight, std=0.1)
    return policy


eq14 = pair_loss(d3po.d3po_losses, BETA)


def epochs_of(policy, n=3, method="eq14", *, losses=None, **options):
    """Run `align` with the settings of this file."""
    function, update_every = METHODS[method]
    settings = {
        "reference": EXACT,
        "score": worlds.reach,
        "label": d3po.preference,
        "update_every": update_every,
        "lr": LR,
        "epochs": n,
        "pairs": PAIRS,
    }
    return align(policy, SCHEDULE, losses or pair_loss(function, BETA), **(settings | options))


class Counted(nn.Module):
    """A network that counts its calls and the rows it was given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls, self.rows = net, 0, 0

    def forward(self, x, time, cond=None):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.net(x, time, cond)


@BOTH_REFERENCES
@pytest.mark.parametrize("method", METHODS)
def test_the_loop_is_algorithm_1(method, reference, monkeypatch):
    monkeypatch.setattr("toy.align.MAX_GRAD_NORM", 0.1)  # which these gradients exceed
    n = 3
    policy = new_policy()
    torch.manual_seed(1)
    epochs = epochs_of(policy, n, method, reference=reference, label=d3po.bradley_terry)
    ends = [epoch.new.trajectory.x[-1] for epoch in epochs]

    typed = new_policy()
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(typed.correction.parameters(), LR, betas=(0.9, 0.99))

    def step():
        nn.utils.clip_grad_norm_(typed.correction.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(n):  # line 2
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * epoch / n)) / 2
        x_T = torch.randn(PAIRS, 2)  # lines 4-5
        twice = torch.stack([x_T, x_T], 1).flatten(0, 1)
        trajectory = d3po.rollout(typed, SCHEDULE, twice)  # lines 6-11
        assert torch.equal(trajectory.x[-1], ends[epoch])
        r = worlds.reach(trajectory.x[-1])
        pairs = d3po.pairs_from_feedback(d3po.bradley_terry(r[0::2], r[1::2]))  # lines 12-22
        ref = trajectory.log_prob
        if reference != "previous":
            ref = d3po.trajectory_log_prob(reference, SCHEDULE, trajectory)
        for loss in METHODS[method][0](typed, SCHEDULE, trajectory, pairs, BETA, ref):  # 25-34
            loss.backward()
            if method == "eq14":
                step()
        if method == "chain":
            step()
    for a, b in zip(policy.parameters(), typed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_calls_of_the_networks():
    """A step is one call for all its chains; the reference has T an epoch, or none at all."""

    def no_ties(a, b):
        return torch.where(a > b, 1, -1)

    policy, reference = Counted(new_policy()), Counted(EXACT)
    list(epochs_of(policy, 2, reference=reference, label=no_ties))
    assert (reference.calls, reference.rows) == (2 * T, 2 * T * 2 * PAIRS)
    assert (policy.calls, policy.rows) == (2 * 2 * T, 2 * 2 * T * 2 * PAIRS)  # rollout and losses

    policy = Counted(new_policy())
    list(epochs_of(policy, 2, reference="previous", label=no_ties))
    assert policy.calls == 2 * 2 * T  # nothing else can have been called


@pytest.mark.parametrize("chains", [1, 4])
def test_a_group_of_another_size_shares_an_x_T(chains):
    epoch = next(epochs_of(new_policy(), chains_per_x_T=chains))
    x_T = epoch.new.trajectory.x[0]
    assert x_T.shape == (2 * PAIRS, 2)
    first = x_T[::chains]
    assert len(first.unique(dim=0)) == 2 * PAIRS // chains
    assert torch.equal(x_T, first.repeat_interleave(chains, 0))


def test_labels_loss_and_epochs_are_counted():
    values = []

    def recorded(policy, schedule, batch):
        for loss in eq14(policy, schedule, batch):
            values.append(loss.item())
            yield loss

    epochs = list(epochs_of(new_policy(), 3, losses=recorded))
    assert [epoch.labels for epoch in epochs] == [PAIRS, 2 * PAIRS, 3 * PAIRS]
    for k, epoch in enumerate(epochs):
        assert epoch.loss == pytest.approx(sum(values[k * T : k * T + T]) / T)


def test_accuracy_and_margin_are_those_of_a_double_loop():
    policy = perturbed_policy()
    sampler = copy.deepcopy(policy)

    def with_ties(a, b):
        return d3po.preference(a, b, margin=0.3)

    epoch = next(epochs_of(policy, 1, label=with_ties))
    x, h = epoch.new.trajectory.x, epoch.new.h.tolist()
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
    # float32 log-probs of size 10
    assert epoch.margin == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert epoch.accuracy == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert 0 < epoch.accuracy < 1


# Earlier pairs


def assert_same(a, b):
    for one, other in zip((*a.trajectory, *a[1:]), (*b.trajectory, *b[1:]), strict=True):
        assert torch.equal(one, other)


def recording(batches):
    """Losses that note on which pairs they were asked for."""

    def losses(policy, schedule, batch):
        batches.append(batch)
        return eq14(policy, schedule, batch)

    return losses


def test_replay_trains_on_pairs_of_all_epochs():
    n, replay, batches = 4, 2, []
    policy = new_policy()
    torch.manual_seed(3)
    epochs = list(epochs_of(policy, n, losses=recording(batches), replay=replay))
    assert len(batches) == n * (1 + replay)
    home = {
        tuple(x): k
        for k, epoch in enumerate(epochs)
        for x in epoch.new.trajectory.x[-1, 0::2].tolist()
    }
    drawn = set()
    for k, batch in enumerate(batches):
        epoch, number = divmod(k, 1 + replay)
        if number == 0:  # the new pairs come first
            assert_same(batch, epochs[epoch].new)
            continue
        x = batch.trajectory.x
        firsts = [tuple(point) for point in x[-1, 0::2].tolist()]
        assert len(set(firsts)) == len(firsts) == min(2, epoch + 1) * PAIRS  # no pair twice
        drawn |= {(epoch, home[point]) for point in firsts}
        # stored pairs keep the reference's log-probs of these very chains; float32 in another batch
        expected = d3po.trajectory_log_prob(EXACT, SCHEDULE, batch.trajectory)
        torch.testing.assert_close(batch.ref_log_prob, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(batch.scores, worlds.reach(x[-1]).view(-1, 2))
        assert torch.equal(batch.h, d3po.preference(*batch.scores.T))
    # twice 32 of at most 64 pairs are drawn: an epoch is missed with probability 1e-9, and none
    # comes before its time
    assert drawn == {(epoch, old) for epoch in range(n) for old in range(epoch + 1)}


# What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops_the_run(value):
    with pytest.raises(FloatingPointError, match="epoch 1: a sample's score"):
        next(epochs_of(new_policy(), score=lambda x: x[:, 0] * value))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights():
    policy, first = new_policy(), True

    def second_epoch_breaks(policy, schedule, batch):
        nonlocal first
        for loss in eq14(policy, schedule, batch):
            yield loss if first else loss * math.nan
        first = False

    training = epochs_of(policy, 5, losses=second_epoch_breaks)
    assert next(training).labels == PAIRS  # the good epoch is reported
    with pytest.raises(FloatingPointError, match="epoch 2: the loss"):
        next(training)
    assert all(p.isfinite().all() for p in policy.parameters())


def test_a_weight_that_is_not_finite_stops_the_run():
    def infinite_slope(policy, schedule, batch):
        yield (policy.correction.mlp[-1].bias.sum() * 0).sqrt()  # 0, with gradient 0 / 0

    with pytest.raises(FloatingPointError, match="epoch 1: a weight"):
        next(epochs_of(new_policy(), losses=infinite_slope))


def all_ties(a, b):
    return torch.zeros(len(a), dtype=torch.long)


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_of_ties_changes_nothing_and_reports_numbers(method):
    policy = new_policy()
    before = nn.utils.parameters_to_vector(policy.parameters()).clone()
    (epoch,) = epochs_of(policy, 1, method, label=all_ties)
    assert torch.equal(nn.utils.parameters_to_vector(policy.parameters()), before)
    assert epoch.labels == PAIRS
    assert all(math.isfinite(value) for value in (epoch.loss, epoch.accuracy, epoch.margin))


# Trajectories drawn anew, averaged weights


def test_a_bridged_batch_keeps_labels_and_ends_and_is_new_in_between():
    (epoch,) = epochs_of(new_policy(), 1)
    torch.manual_seed(4)
    bridged = epoch.new.bridged(SCHEDULE, EXACT)
    x, old = bridged.trajectory.x, epoch.new.trajectory.x
    assert torch.equal(x[0], old[0]) and torch.equal(x[-3:], old[-3:])
    assert (x[1:-3] != old[1:-3]).all()
    torch.manual_seed(4)
    assert torch.equal(x[:-2], d3po.bridge(SCHEDULE, old[0], old[-3], end=T - 2))
    assert torch.equal(bridged.scores, epoch.new.scores) and torch.equal(bridged.h, epoch.new.h)
    expected = d3po.trajectory_log_prob(EXACT, SCHEDULE, bridged.trajectory)
    assert torch.equal(bridged.ref_log_prob, expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_have_no_state_to_draw_anew(steps):
    schedule = d3po.make_schedule(ALPHA_BARS, steps)
    trajectory = d3po.rollout(EXACT, schedule, torch.randn(6, 2))
    ref_log_prob = trajectory.log_prob
    batch = PreferenceBatch(trajectory, torch.zeros(3, 2), torch.ones(3), ref_log_prob)
    assert torch.equal(batch.bridged(schedule, EXACT).trajectory.x, trajectory.x)


def test_only_stored_pairs_are_bridged_and_the_reference_sees_the_new_trajectories():
    batches = []
    (epoch,) = epochs_of(new_policy(), 1, losses=recording(batches), replay=2, bridged=True)
    assert batches[0] is epoch.new
    for stored in batches[1:]:
        x, ref_log_prob = stored.trajectory.x, stored.ref_log_prob
        rows = [epoch.new.trajectory.x[-1].tolist().index(point) for point in x[-1].tolist()]
        assert (x[1:-3] != epoch.new.trajectory.x[1:-3, rows]).all()
        expected = d3po.trajectory_log_prob(EXACT, SCHEDULE, stored.trajectory)
        assert torch.equal(ref_log_prob, expected)
    with pytest.raises(ValueError, match="reference that stays"):
        next(epochs_of(new_policy(), 1, reference="previous", replay=1, bridged=True))


def test_averaged_weights_are_those_at_a_yield_and_not_those_that_train():
    def run(average):
        policy = new_policy()
        torch.manual_seed(1)
        for epoch in epochs_of(policy, 4, average=average):
            weights = [w.detach().clone() for w in policy.parameters() if w.requires_grad]
            yield epoch.new.trajectory.x, weights

    raw, averaged = list(run(False)), list(run(True))
    mean = raw[0][1]
    for epoch, ((x, weights), (x_too, shown)) in enumerate(zip(raw, averaged, strict=True), 1):
        assert torch.equal(x, x_too)  # the same chains: the average is used by nobody
        mean = [m + 10 / (epoch + 9) * (w - m) for m, w in zip(mean, weights, strict=True)]
        for m, w in zip(mean, shown, strict=True):
            torch.testing.assert_close(m, w)

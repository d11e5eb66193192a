"""The reward model against the scores that labels were drawn from, and what DPOK is given."""

import math

import torch

import d3po
from toy import baselines
from toy.align import PreferenceBatch
from toy.ddpm import Adapter
from toy.reward_model import COPIES, RewardModelChain, RewardModelDPOK, soft_pairs
from toy.worlds import ALPHA_BARS, MIXTURES, exact_denoiser, reach

RING = MIXTURES["ring"]
SCHEDULE = d3po.make_schedule(ALPHA_BARS, 5)


def batch_of(pairs: int) -> tuple[Adapter, PreferenceBatch]:
    torch.manual_seed(0)
    policy = Adapter(exact_denoiser(RING), SCHEDULE, RING)
    trajectory = d3po.rollout(policy, SCHEDULE, torch.randn(pairs, 2).repeat_interleave(2, 0))
    scores = reach(trajectory.x[-1]).view(-1, 2)
    h = d3po.bradley_terry(*scores.T)
    return policy, PreferenceBatch(trajectory, scores, h=h, ref_log_prob=trajectory.log_prob)


def test_many_labels_teach_the_differences_of_the_scores():
    """Eq. 4 knows no level, but Eq. 3 fixes the scale."""
    _, batch = batch_of(4000)
    model = RewardModelDPOK()
    points = batch.trajectory.x[-1, d3po.pairs_from_feedback(batch.h)]
    for _ in range(30):
        model.fit(points)
    x = batch.trajectory.x[-1]
    found, true = model.scores(x), reach(x)
    assert torch.corrcoef(torch.stack([found, true]))[0, 1] > 0.98
    # 4000 labels leave a few percent
    assert 0.85 < (found.std() / true.std()).item() < 1.15


def test_dpok_gets_new_trajectories_from_the_same_noises_and_the_models_scores(monkeypatch):
    policy, batch = batch_of(20)
    given = {}
    monkeypatch.setattr(
        baselines, "dpok_losses", lambda *args, **options: given.update(options, args=args) or ()
    )
    model = RewardModelDPOK()
    before = [weight.clone() for weight in model.net.parameters()]
    model(policy, SCHEDULE, batch, reference=policy.reference, value=0.3)
    _, _, trajectory = given["args"]
    assert torch.equal(trajectory.x[0], batch.trajectory.x[0])
    assert not torch.equal(trajectory.x[-1], batch.trajectory.x[-1])
    assert torch.equal(given["scores"], model.net(trajectory.x[-1]).squeeze(1))
    assert not given["scores"].requires_grad and given["beta"] == 0.3
    assert given["reference"] is policy.reference and model.seconds > 0
    assert not any(map(torch.equal, before[:-1], list(model.net.parameters())[:-1]))


def test_without_a_winner_the_model_stays():
    policy, batch = batch_of(3)
    model = RewardModelDPOK()
    before = [weight.clone() for weight in model.net.parameters()]
    ties = batch._replace(h=torch.zeros(3, dtype=torch.long))
    losses = model(policy, SCHEDULE, ties, reference=policy.reference, value=0.3)
    assert len(list(losses)) == 5
    assert all(map(torch.equal, before, model.net.parameters()))


def test_soft_labels_are_shares_of_the_rows_of_a_pair():
    scores = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-50.0, 50.0]])
    rows = soft_pairs(scores).tolist()
    assert len(rows) == 3 * COPIES
    for n, (a, b) in enumerate(scores.tolist()):
        first, second = rows.count([2 * n, 2 * n + 1]), rows.count([2 * n + 1, 2 * n])
        assert first + second == COPIES
        assert abs(first / COPIES - 1 / (1 + math.exp(b - a))) <= 0.5 / COPIES


def test_pairs_that_the_model_labels_are_the_policys_own_and_pull_by_eq_3():
    """Where theta is the reference, Eq. 5 with soft labels p has the slope beta (1/2 - p)."""
    policy, batch = batch_of(20)
    model = RewardModelChain()
    torch.manual_seed(1)
    losses = model(policy, SCHEDULE, batch, reference=policy.reference, value=0.3)
    weight = policy.correction.mlp[-1].bias
    found = sum(torch.autograd.grad(loss, weight)[0] for loss in losses)

    torch.manual_seed(1)  # the same trajectories, by hand
    trajectory = d3po.rollout(policy, SCHEDULE, batch.trajectory.x[0])
    scores = model.scores(trajectory.x[-1])
    p = torch.sigmoid(scores[0::2] - scores[1::2])
    p = (p * COPIES).round() / COPIES
    total = 0
    for i in range(5):
        mean = d3po.policy_mean(policy, SCHEDULE, i, trajectory.x[i])
        log_pi = d3po.log_prob(trajectory.x[i + 1], mean, SCHEDULE.sigma[i])
        total = total + (0.3 * (0.5 - p) * (log_pi[0::2] - log_pi[1::2])).mean()
    torch.testing.assert_close(found, torch.autograd.grad(total, weight)[0], rtol=1e-4, atol=1e-6)

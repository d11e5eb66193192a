"""The benchmark compares two structures of the same mathematics."""

from functools import partial

import pytest
import torch

from toy import bench_toy, ddpm


@pytest.fixture(scope="module")
def policies():
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm, "pretrain", lambda mixture, steps, progress: ddpm.MLP(1.0))
        return bench_toy.policies()


@pytest.mark.parametrize("previous", [True, False], ids=["reference previous", "initial"])
@pytest.mark.parametrize("name", ["network", "adapter"])
def test_both_structures_have_the_same_gradient(policies, name, previous):
    policy = policies[name]
    other = policies["network" if name == "adapter" else "adapter"]
    trajectory, pairs = bench_toy.sample_pairs(policy, K=3, groups=4)
    assert pairs.tolist()[:4] == [[0, 1], [0, 2], [1, 2], [3, 4]] and len(pairs) == 12
    check = partial(bench_toy.check_same_gradient, policy, trajectory=trajectory, pairs=pairs)
    if previous:
        check(reference="previous", frozen=policy)
    else:
        check(reference=policy, frozen=policy)
    with pytest.raises(AssertionError):  # so that the lines above say something
        check(reference=other, frozen=policy)


def test_a_side_updates_as_often_as_it_says(policies, monkeypatch):
    updates = []
    monkeypatch.setattr(bench_toy.Side, "update", lambda side: updates.append(side))
    trajectory, pairs = bench_toy.sample_pairs(policies["adapter"], K=2, groups=3)
    for update_every, batch_size, number in (
        ("timestep", None, bench_toy.T),
        ("trajectory", None, 1),
        ("trajectory", 1, 3),
    ):
        side = bench_toy.Side(
            bench_toy.our_losses,
            policies["adapter"],
            reference="previous",
            update_every=update_every,
            batch_size=batch_size,
        )
        assert side.epoch(trajectory, pairs) > 0
        assert len(updates) == number
        updates.clear()

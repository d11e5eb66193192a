"""Time an epoch of Alg. 1 against the structure of the authors' released code.

    python -m toy.bench_toy

Both train the same policy, a copy of the toy's network (all weights) or the toy's adapter on it, on
the same chains and pairs with the same loss; before timing, their gradients are compared. The
released structure runs four forwards a step, policy and reference on the winners and on the
losers, and updates once a pair. Here a step is one forward and one update (Alg. 1 line 33) for all
pairs; the log-probs of the reference are those of sampling (reference previous) or computed once a
chain (initial).

Three columns: the released structure as it is, pair after pair (timed for few pairs only); given
batches like ours; and given batches and the T updates of Alg. 1. One thread; all sides run in turn,
and a ratio is that of neighbours in time.
"""

import argparse
import copy
import time
from itertools import combinations, product

import torch
from torch import nn

import d3po
from toy import ddpm, worlds
from toy.align import MAX_GRAD_NORM

T, BETA, ROUNDS, FEW_PAIRS = 20, 0.3, 21, 16
SCHEDULE = d3po.make_schedule(worlds.ALPHA_BARS, T)


def our_losses(policy, reference, trajectory, pairs):
    if reference == "previous":
        ref_log_prob = trajectory.log_prob
    else:
        ref_log_prob = d3po.trajectory_log_prob(reference, SCHEDULE, trajectory)
    return d3po.d3po_losses(policy, SCHEDULE, trajectory, pairs, BETA, ref_log_prob)


def released_losses(policy, reference, trajectory, pairs):
    """Four forwards a step, as the released code is described, without its clamp and mean."""
    for i in torch.randperm(T).tolist():
        log_ratios = []
        for rows in pairs.T:  # the winners, the losers
            state, action = trajectory.x[i, rows], trajectory.x[i + 1, rows]
            sigma = SCHEDULE.sigma[i]
            mean = d3po.policy_mean(policy, SCHEDULE, i, state)
            with torch.no_grad():
                mean_ref = d3po.policy_mean(reference, SCHEDULE, i, state)
                ref_log_prob = d3po.log_prob(action, mean_ref, sigma)
            log_ratios.append(d3po.log_prob(action, mean, sigma) - ref_log_prob)
        yield d3po.d3po_loss(*log_ratios, BETA).mean()


class Side:
    """One side of the race, with a policy and an optimizer of its own."""

    def __init__(self, losses, net, *, reference, update_every, batch_size=None):
        self.losses, self.reference = losses, reference
        self.update_every, self.batch_size = update_every, batch_size
        self.policy = copy.deepcopy(net)
        self.weights = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, 1e-5)

    def update(self):
        nn.utils.clip_grad_norm_(self.weights, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, trajectory, pairs) -> float:
        """Train once on all pairs, batch_size at a time; return the milliseconds."""
        start = time.perf_counter()
        for batch in pairs.split(self.batch_size or len(pairs)):
            for loss in self.losses(self.policy, self.reference, trajectory, pairs=batch):
                loss.backward()
                if self.update_every == "timestep":
                    self.update()
            if self.update_every == "trajectory":
                self.update()
        return 1e3 * (time.perf_counter() - start)


def check_same_gradient(net, *, reference, frozen, trajectory, pairs) -> None:
    """Both structures, summed over the steps without update, are the same mathematics.

    reference: "previous", or the denoiser `frozen`.
    """
    gradients = []
    for losses, ref in ((our_losses, reference), (released_losses, frozen)):
        policy = copy.deepcopy(net)
        for loss in losses(policy, ref, trajectory, pairs=pairs):
            loss.backward()
        trained = [p.grad.flatten() for p in policy.parameters() if p.requires_grad]
        gradients.append(torch.cat(trained))
    ours, theirs = gradients
    # float32 sums over 512 chains in another order
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def sample_pairs(net, K: int, groups: int):
    """Groups of K chains from one x_T each, and all pairs inside the groups."""
    x_T = torch.randn(groups, 2).repeat_interleave(K, 0)
    pairs = [
        (K * group + a, K * group + b)
        for group in range(groups)
        for a, b in combinations(range(K), 2)
    ]
    return d3po.rollout(net, SCHEDULE, x_T), torch.tensor(pairs)


def race(net, *, previous: bool, K: int, groups: int):
    """Milliseconds (ROUNDS, 3 or 4): here, in batches, with T updates, and pair after pair."""
    frozen = copy.deepcopy(net).requires_grad_(False)
    reference = "previous" if previous else frozen
    trajectory, pairs = sample_pairs(net, K, groups)
    check_same_gradient(net, reference=reference, frozen=frozen, trajectory=trajectory, pairs=pairs)
    sides = [
        Side(our_losses, net, reference=reference, update_every="timestep"),
        Side(released_losses, net, reference=frozen, update_every="trajectory"),
        Side(released_losses, net, reference=frozen, update_every="timestep"),
    ]
    if len(pairs) <= FEW_PAIRS:
        one_by_one = {"update_every": "trajectory", "batch_size": 1}
        sides.append(Side(released_losses, net, reference=frozen, **one_by_one))
    times = [[side.epoch(trajectory, pairs) for side in sides] for _ in range(ROUNDS + 2)]
    return torch.tensor(times)[2:]  # the first two rounds warm up


def policies() -> dict[str, nn.Module]:
    """The toy's network, and an adapter on it; the speed does not depend on what they learned."""
    ring = worlds.MIXTURES["ring"]
    net = ddpm.pretrain(ring, steps=300, progress=False)
    adapter = ddpm.Adapter(copy.deepcopy(net).requires_grad_(False), SCHEDULE, ring)
    adapter.reference = adapter.reference.denoiser  # a cache of earlier rounds would help all sides
    nn.init.normal_(adapter.correction.mlp[-1].weight, std=0.1)
    return {"network": net, "adapter": adapter}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m toy.bench_toy", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"T = {T}, {ROUNDS} rounds, one thread, torch {torch.__version__}.")
    print("Time of an epoch, released / here: median (quartiles). `here` is in milliseconds.\n")
    heads = ("pair after pair", "batches like ours", "and T updates")
    print(f"{'policy':9}{'reference':11}{'chains':10}{'pairs':7}{'here':7}", end="")
    print("".join(f"{head:25}" for head in heads))
    trained = policies().items()
    for (K, groups), (name, policy), previous in product(
        ((2, FEW_PAIRS), (2, 256), (7, 37)), trained, (True, False)
    ):
        times = race(policy, previous=previous, K=K, groups=groups)
        ratios = times[:, 1:] / times[:, :1]
        middle, low, high = ratios.quantile(torch.tensor([0.5, 0.25, 0.75]), dim=0).tolist()
        cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in zip(middle, low, high, strict=True)]
        cells = [cells[2] if len(cells) == 3 else "-", *cells[:2]]
        print(f"{name:9}{'previous' if previous else 'initial':11}", end="")
        print(f"{f'{groups} x {K}':10}{groups * K * (K - 1) // 2:<7}", end="")
        print(f"{times[:, 0].median():<7.1f}" + "".join(f"{cell:25}" for cell in cells))


if __name__ == "__main__":
    main()

"""Time an epoch of Alg. 1 against the structure of the authors' released code: python tests/bench_toy.py

Both train the same policy, a copy of the toy's network (all weights) or the toy's adapter on it, on the same chains and
pairs with the same loss; before timing, their gradients are compared. The released structure runs four forwards a step,
policy and reference on the winners and on the losers, and updates once a chain. Here a step is one forward and one
update (Alg. 1 line 33); the log-probs of the reference are those of sampling (a moving reference) or computed once a
chain (a fixed one). One thread; both sides run in turn, and a ratio is that of two neighbours in time. The last column
gives the released structure the T updates of Alg. 1 as well.
"""

import copy
import sys
import time
from itertools import combinations, product
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file is run as a script

import d3po
from toy import ddpm, worlds
from toy.align import MAX_GRAD_NORM

T, BETA, ROUNDS = 20, 0.3, 21
SCHEDULE = d3po.make_schedule(worlds.ALPHA_BARS, T)


def our_losses(policy, reference, chains, pairs):
    ref_log_prob = chains.log_prob if reference is None else d3po.trajectory_log_prob(reference, SCHEDULE, chains)
    return d3po.d3po_losses(policy, SCHEDULE, chains, pairs, BETA, ref_log_prob)


def released_losses(policy, reference, chains, pairs):
    """Four forwards a step, from the description of the released code; its clamp and mean over elements left out."""
    for i in torch.randperm(T).tolist():
        log_ratios = []
        for rows in pairs.T:  # the winners, the losers
            state, action, sigma = chains.x[i, rows], chains.x[i + 1, rows], SCHEDULE.sigma[i]
            log_prob = d3po.log_prob(action, d3po.policy_mean(policy, SCHEDULE, i, state), sigma)
            with torch.no_grad():
                ref_log_prob = d3po.log_prob(action, d3po.policy_mean(reference, SCHEDULE, i, state), sigma)
            log_ratios.append(log_prob - ref_log_prob)
        yield d3po.d3po_loss(*log_ratios, BETA).mean()


class Side:
    """One side of the race, with a policy and an optimizer of its own."""

    def __init__(self, losses, net, reference, each_step):
        self.losses, self.reference, self.each_step = losses, reference, each_step
        self.policy = copy.deepcopy(net)
        self.weights = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, 1e-5)

    def update(self):
        nn.utils.clip_grad_norm_(self.weights, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, chains, pairs):
        """Train once on the chains, sampling them first where these are only an x_T; return the milliseconds."""
        start = time.perf_counter()
        if not isinstance(chains, d3po.Trajectory):
            chains = d3po.rollout(self.policy, SCHEDULE, chains)
        for loss in self.losses(self.policy, self.reference, chains, pairs):
            loss.backward()
            if self.each_step:
                self.update()
        if not self.each_step:
            self.update()
        return 1e3 * (time.perf_counter() - start)


def check_same_gradient(net, reference, frozen, chains, pairs):
    """Both structures, summed over the steps without update, are the same mathematics."""
    gradients = []
    for losses, ref in ((our_losses, reference), (released_losses, frozen)):
        policy = copy.deepcopy(net)
        for loss in losses(policy, ref, chains, pairs):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    ours, theirs = gradients
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()  # float32 sums over 512 chains in another order


def race(net, fixed, K, groups, with_rollout):
    """Milliseconds (ROUNDS, 3): here, the released structure, and that with T updates."""
    frozen = copy.deepcopy(net).requires_grad_(False)
    reference = frozen if fixed else None
    x_T = torch.randn(groups, 2).repeat_interleave(K, 0)
    chains = d3po.rollout(net, SCHEDULE, x_T)
    pairs = torch.tensor([(K * n + a, K * n + b) for n in range(groups) for a, b in combinations(range(K), 2)])
    check_same_gradient(net, reference, frozen, chains, pairs)
    sides = [Side(our_losses, net, reference, True), *(Side(released_losses, net, frozen, e) for e in (False, True))]
    given = x_T if with_rollout else chains
    times = [[side.epoch(given, pairs) for side in sides] for _ in range(ROUNDS + 2)]
    return torch.tensor(times)[2:]  # the first two rounds warm up


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ring = worlds.MIXTURES["ring"]
    net = ddpm.pretrain(ring, steps=300, progress=False)  # the speed does not depend on how well it is trained
    adapter = ddpm.Adapter(copy.deepcopy(net).requires_grad_(False), SCHEDULE, ring)
    nn.init.normal_(adapter.correction.mlp[-1].weight, std=0.1)
    print(f"T = {T}, {ROUNDS} rounds, one thread, torch {torch.__version__}. Milliseconds an epoch: median;")
    print("ratio released / here: median (quartiles).\n")
    print(f"{'policy':9}{'reference':11}{'chains':9}{'pairs':7}{'timed':15}{'here':>6}{'released':>10}   ratio", end="")
    print(f"{'ratio with T updates':>37}")
    for K, groups in ((2, 256), (2, 16), (7, 37)):
        for policy, fixed, rollout in product((net, adapter), (False, True), (False, True)):
            times = race(policy, fixed, K, groups, rollout)
            here, released, _ = times.median(0).values.tolist()
            setting = f"{'adapter' if policy is adapter else 'network':9}{'fixed' if fixed else 'moving':11}"
            setting += f"{f'{groups} x {K}':9}{groups * K * (K - 1) // 2:<7}{'rollout, loss' if rollout else 'loss':15}"
            ratios = (times[:, 1:] / times[:, :1]).quantile(torch.tensor([0.5, 0.25, 0.75]), dim=0).T.tolist()
            columns = "   ".join(f"{f'{m:.2f} ({a:.2f} to {b:.2f})':20}" for m, a, b in ratios)
            print(f"{setting}{here:6.1f}{released:10.1f}   {columns}")


if __name__ == "__main__":
    main()

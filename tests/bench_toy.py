"""Time an epoch of Alg. 1 against the structure of the authors' released code: python tests/bench_toy.py

Both train the same policy, a copy of the toy's network (all weights) or the toy's adapter on it, on the same chains and
pairs with the same loss; before timing, their gradients are compared. The released structure runs four forwards a step,
policy and reference on the winners and on the losers, and updates once a pair. Here a step is one forward, one update
(Alg. 1 line 33) for all pairs; the log-probs of the reference are those of sampling (a moving reference) or computed
once a chain (a fixed one). Three columns: the released structure as it is, pair after pair (timed for few pairs only);
given batches like ours; and given batches and the T updates of Alg. 1. One thread; all sides run in turn, and a ratio
is that of neighbours in time.
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

T, BETA, ROUNDS, FEW = 20, 0.3, 21, 16
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

    def __init__(self, losses, net, reference, each_step, batch=None):
        self.losses, self.reference, self.each_step, self.batch = losses, reference, each_step, batch
        self.policy = copy.deepcopy(net)
        self.weights = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, 1e-5)

    def update(self):
        nn.utils.clip_grad_norm_(self.weights, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, chains, pairs):
        """Train once on all pairs, `batch` at a time; return the milliseconds."""
        start = time.perf_counter()
        for some in pairs.split(self.batch or len(pairs)):
            for loss in self.losses(self.policy, self.reference, chains, some):
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


def race(net, fixed, K, groups):
    """Milliseconds (ROUNDS, 3 or 4): here, the released structure in batches, with T updates, and pair after pair."""
    frozen = copy.deepcopy(net).requires_grad_(False)
    reference = frozen if fixed else None
    x_T = torch.randn(groups, 2).repeat_interleave(K, 0)
    chains = d3po.rollout(net, SCHEDULE, x_T)
    pairs = torch.tensor([(K * n + a, K * n + b) for n in range(groups) for a, b in combinations(range(K), 2)])
    check_same_gradient(net, reference, frozen, chains, pairs)
    sides = [Side(our_losses, net, reference, True), *(Side(released_losses, net, frozen, e) for e in (False, True))]
    if len(pairs) <= FEW:
        sides.append(Side(released_losses, net, frozen, False, batch=1))
    times = [[side.epoch(chains, pairs) for side in sides] for _ in range(ROUNDS + 2)]
    return torch.tensor(times)[2:]  # the first two rounds warm up


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ring = worlds.MIXTURES["ring"]
    net = ddpm.pretrain(ring, steps=300, progress=False)  # the speed does not depend on how well it is trained
    adapter = ddpm.Adapter(copy.deepcopy(net).requires_grad_(False), SCHEDULE, ring)
    adapter.reference = adapter.reference.denoiser  # what it remembers of earlier rounds would help all sides
    nn.init.normal_(adapter.correction.mlp[-1].weight, std=0.1)
    print(f"T = {T}, {ROUNDS} rounds, one thread, torch {torch.__version__}. Time of an epoch, released / here:")
    print("median (quartiles). `here` is in milliseconds.\n")
    heads = ("pair after pair", "batches like ours", "and T updates")
    print(f"{'policy':9}{'reference':11}{'chains':10}{'pairs':7}{'here':7}" + "".join(f"{head:25}" for head in heads))
    for (K, groups), policy, fixed in product(((2, FEW), (2, 256), (7, 37)), (net, adapter), (False, True)):
        times = race(policy, fixed, K, groups)
        ratios = (times[:, 1:] / times[:, :1]).quantile(torch.tensor([0.5, 0.25, 0.75]), dim=0).T.tolist()
        cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in ratios]
        cells = [cells[2] if len(cells) == 3 else "-", *cells[:2]]
        setting = f"{'adapter' if policy is adapter else 'network':9}{'fixed' if fixed else 'moving':11}"
        setting += f"{f'{groups} x {K}':10}{groups * K * (K - 1) // 2:<7}{times[:, 0].median():<7.1f}"
        print(setting + "".join(f"{cell:25}" for cell in cells))


if __name__ == "__main__":
    main()

"""Time one epoch of Alg. 1 against the structure of the authors' released code: python tests/bench_toy.py

Both train a fine-tuned copy of the toy's network (the speed does not depend on its weights) on the same pairs of
chains with the same loss and the same number of chains in a batch. The released structure calls the network four times
a step: policy and reference, on the winners and on the losers. Its reference is a second network, called at every step
of every epoch; here log-probs of the reference are those of sampling, or computed once for each chain. Both ways are run in
turn, in one thread, and the ratio is that of neighbours in time. Before timing, their gradients are compared.
"""

import copy
import time

import torch
from torch import nn

import d3po
from toy import ddpm, worlds
from toy.align import MAX_GRAD_NORM

T, BETA, ROUNDS = 20, 0.3, 21
RING = worlds.MIXTURES["ring"]
SCHEDULE = d3po.make_schedule(worlds.ALPHA_BARS, T)


def our_losses(policy, reference, chains, pairs):
    ref_log_prob = chains.log_prob if reference is None else d3po.trajectory_log_prob(reference, SCHEDULE, chains)
    return d3po.d3po_losses(policy, SCHEDULE, chains, pairs, BETA, ref_log_prob)


def released_losses(policy, reference, chains, pairs):
    """Four forwards a step, as the released code has them; the clamp and the mean over elements are left out."""
    winner, loser = pairs.T
    for i in torch.randperm(T).tolist():
        ratios = []
        for rows in (winner, loser):
            state, action = chains.x[i, rows], chains.x[i + 1, rows]
            log_prob = d3po.log_prob(action, d3po.policy_mean(policy, SCHEDULE, i, state), SCHEDULE.sigma[i])
            with torch.no_grad():
                mean = d3po.policy_mean(reference, SCHEDULE, i, state)
                ref = d3po.log_prob(action, mean, SCHEDULE.sigma[i])
            ratios.append(log_prob - ref)
        yield d3po.d3po_loss(*ratios, BETA).mean()


class Trainer:
    """One side of the race: its own policy and optimizer."""

    def __init__(self, losses, net, each_step):
        self.losses, self.each_step, self.policy = losses, each_step, copy.deepcopy(net)
        self.weights = list(self.policy.parameters())
        self.optimizer = torch.optim.Adam(self.weights, 1e-5, betas=(0.9, 0.99))

    def update(self):
        nn.utils.clip_grad_norm_(self.weights, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, reference, x_T, chains, pairs):
        """Train on the chains once; where there are none, sample them first. Returns the seconds."""
        start = time.perf_counter()
        chains = chains or d3po.rollout(self.policy, SCHEDULE, x_T)
        for loss in self.losses(self.policy, reference, chains, pairs):
            loss.backward()
            if self.each_step:
                self.update()
        if not self.each_step:
            self.update()
        return time.perf_counter() - start


def gradient(losses, net, reference, chains, pairs):
    policy = copy.deepcopy(net)
    for loss in losses(policy, reference, chains, pairs):
        loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def quartiles(values):
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def race(net, reference, pairs, chains_of_group, number, with_rollout, each_step):
    """Quartiles of our milliseconds, theirs, and the ratio of the two, over the rounds."""
    groups = number // chains_of_group
    x_T = torch.randn(groups, 2).repeat_interleave(chains_of_group, 0)
    chains = d3po.rollout(net, SCHEDULE, x_T)
    frozen = copy.deepcopy(net).requires_grad_(False) if reference is None else reference
    ours = gradient(our_losses, net, reference, chains, pairs)
    theirs = gradient(released_losses, net, frozen, chains, pairs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())

    sides = (
        (Trainer(our_losses, net, each_step=True), reference),
        (Trainer(released_losses, net, each_step), frozen),
    )
    given = None if with_rollout else chains
    times = [[side.epoch(ref, x_T, given, pairs) for side, ref in sides[:: 1 if k % 2 else -1]] for k in range(ROUNDS + 2)]
    times = [row if k % 2 else row[::-1] for k, row in enumerate(times)][2:]  # the first two rounds warm up
    return [quartiles([f(*row) for row in times]) for f in (lambda a, b: 1e3 * a, lambda a, b: 1e3 * b, lambda a, b: b / a)]

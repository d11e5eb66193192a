"""What several test files share: one thread, and the learned reference, which takes 13 s to train."""

import pytest
import torch

from toy import ddpm, worlds


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def learned(one_thread):
    """The default reference of train_toy.py: the DDPM of the ring, seed 0, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ddpm.pretrain(worlds.MIXTURES["ring"], progress=False).requires_grad_(False)

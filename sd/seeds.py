"""What random numbers are for, and seeds that decide them."""

from enum import IntEnum

import numpy as np
import torch


class RandomPurpose(IntEnum):
    """What random numbers are for: one purpose never depends on how many another took."""

    TRAINING = 0
    STEPS = 1
    PROMPTS = 2
    HELD_OUT = 3
    EVALUATION = 4
    SIDES = 5
    REPLAY = 6
    STOCK = 7


def seeded_generator(*numbers: int) -> torch.Generator:
    """Random numbers that these decide: a resumed run draws what an unbroken one would have."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(state.item())

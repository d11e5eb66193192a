"""One thread and no window for each process of the tests, of which pytest runs several."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for what tests start; before torch is imported
os.environ["MPLBACKEND"] = "Agg"

import torch

torch.set_num_threads(1)

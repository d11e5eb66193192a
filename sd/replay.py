"""Labelled images, kept to be trained on again.

A label speaks of the final image alone, so it holds for every trajectory that leads there and for
every later policy. RUN/latents keeps

    e003.pt       the groups of epoch 3: x_T, x_0 and pairs (e000.pt: those of --labels)
    e003_p04.pt   until epoch 3 is done, the trajectories of one of its batches, so that a resumed
                  run never samples again what people have judged
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

import d3po
from sd import files, label_files
from sd.images import open_image
from sd.model import join_chains
from sd.pipeline import Conditioning, decode, encode
from sd.seeds import RandomPurpose, seeded_generator


class LatentGroup(NamedTuple):
    """K images of one prompt, and which is better than which."""

    prompt: str
    x_0: Tensor  # (K, *D)
    x_T: Tensor | None  # (*D); None for images of a file: drawn anew each time
    pairs: Tensor  # (P, 2) rows (winner, loser)


class LabelledBatch(NamedTuple):
    """Trajectories to train on."""

    trajectory: d3po.Trajectory  # of B chains
    cond: Tensor  # (B,) numbers of prompts
    pairs: Tensor  # (P, 2) rows (winner, loser)
    scores: Tensor | None = None  # (B,); None where there is not one score an image
    sampled: bool = True  # False: redrawn, so trajectory.log_prob is of nobody
    weight: float = 1.0  # of its loss


class ReplayBuffer:
    """The labelled groups of a run, the same on every process.

    folder: RUN/latents. batch_size: groups of a batch on each process. prompts: all that have a
    number.
    """

    def __init__(
        self,
        folder: Path,
        schedule: d3po.Schedule,
        prompts: list[str],
        *,
        seed: int,
        batch_size: int,
        accelerator: Accelerator,
    ):
        self.folder, self.schedule, self.prompts = folder, schedule, prompts
        self.seed, self.batch_size, self.accelerator = seed, batch_size, accelerator
        self.numbers = {prompt: number for number, prompt in enumerate(prompts)}
        self.groups: list[LatentGroup] = []

    @property
    def labels(self) -> int:
        """Preferences so far, those of --labels too; ties and skips are none."""
        return sum(len(group.pairs) for group in self.groups)

    def add(self, epoch: int, batches: list[LabelledBatch], images_per_prompt: int) -> None:
        """Keep what an epoch labelled on all processes; on disk when this returns."""
        groups = []
        for batch in batches:
            prompts = [self.prompts[number] for number in batch.cond.tolist()]
            groups += split(batch, prompts, images_per_prompt)
        self.keep(epoch, groups)

    def keep(self, epoch: int, groups: list[LatentGroup]) -> None:
        groups = gather_object(groups)
        self.groups += groups
        if groups and self.accelerator.is_main_process:
            content = [tuple(group) for group in groups]
            files.save_tensors(group_file(self.folder, epoch), content)

    def load(self, epochs_done: int, of_labels: list[LatentGroup]) -> None:
        """Load the groups of these epochs; of_labels: those of --labels."""
        self.keep(0, of_labels)
        if self.accelerator.is_main_process:
            self.drop_batches(epochs_done)
        for epoch in range(1, epochs_done + 1):
            self.groups += load_groups(self.folder, epoch)

    def draw_part(self, epoch: int, parts: int) -> Iterator[LabelledBatch]:
        """The share of an epoch in a pass over all groups, in random order, cut into parts.

        A batch weighs as much as it has votes, so that a pass averages over votes.
        """
        passes_done, part = divmod(epoch - 1, parts)
        size = label_files.EPOCH_GROUPS
        order = self.shuffled(passes_done, 0)[part * size :][:size]
        across = self.batch_size * self.accelerator.num_processes
        for n, first in enumerate(range(0, len(order), across)):
            numbers = order[first : first + across]
            votes = sum(len(self.groups[k].pairs) for k in numbers)
            weight = votes / (across * self.labels / len(self.groups))
            yield self.redraw(numbers, epoch, n)._replace(weight=weight)

    def draw(self, epoch: int, batches: int) -> Iterator[LabelledBatch]:
        """Batches of groups drawn at random."""
        across = self.batch_size * self.accelerator.num_processes
        for n in range(batches if self.groups else 0):
            yield self.redraw(self.shuffled(epoch, n)[:across], epoch, n)

    def shuffled(self, epoch: int, n: int) -> list[int]:
        random = seeded_generator(self.seed, RandomPurpose.REPLAY, epoch, n)
        return torch.randperm(len(self.groups), generator=random).tolist()

    def redraw(self, numbers: list[int], epoch: int, n: int) -> LabelledBatch:
        """This process's share of these groups, on trajectories drawn by `d3po.bridge`.

        Without a share it gets one of the groups, without its pairs.
        """
        process, device = self.accelerator.process_index, self.accelerator.device
        random = seeded_generator(self.seed, RandomPurpose.REPLAY, epoch, n, 1 + process)
        own = numbers[process * self.batch_size :][: self.batch_size]
        groups = [self.groups[k] for k in own or numbers[:1]]
        x_T, pairs, cond, start = [], [], [], 0
        for group in groups:
            K = len(group.x_0)
            noise = torch.randn(group.x_0.shape[1:], generator=random)
            x_T.append((noise if group.x_T is None else group.x_T).expand_as(group.x_0))
            pairs.append(start + group.pairs)
            cond += [self.numbers[group.prompt]] * K
            start += K
        x_0 = torch.cat([group.x_0 for group in groups])
        x = d3po.bridge(self.schedule, torch.cat(x_T).to(device), x_0.to(device), generator=random)
        log_prob = torch.zeros(len(x) - 1, len(x_0), device=device)  # nobody sampled these
        return LabelledBatch(
            trajectory=d3po.Trajectory(x, log_prob),
            cond=torch.tensor(cond, device=device),
            pairs=torch.cat(pairs) if own else torch.empty(0, 2, dtype=torch.long),
            sampled=False,
        )

    # The epoch in hand

    def batch_file(self, epoch: int, first: int) -> Path:
        return self.folder / f"e{epoch:03}_p{first:02}.pt"

    def keep_batch(self, epoch: int, first: int, trajectory: d3po.Trajectory) -> None:
        """Keep sampled trajectories; first: the number of their first group."""
        file = self.batch_file(epoch, first)
        if not file.exists():
            files.save_tensors(file, [tensor.cpu().clone() for tensor in trajectory])

    def kept_trajectory(self, epoch: int, firsts: range) -> d3po.Trajectory | None:
        """The trajectories of batches with these first groups; None if one is not kept."""
        kept = [self.batch_file(epoch, first) for first in firsts]
        if not all(file.exists() for file in kept):
            return None
        parts = [files.load_tensors(file, self.accelerator.device) for file in kept]
        return join_chains([d3po.Trajectory(*tensors) for tensors in parts])

    def drop_batches(self, epochs_done: int) -> None:
        for file in self.folder.glob("e*_p*.pt"):
            if int(file.name.partition("_")[0].removeprefix("e")) <= epochs_done:
                file.unlink()


def group_file(folder: Path, epoch: int) -> Path:
    return folder / f"e{epoch:03}.pt"


def load_groups(folder: Path, epoch: int) -> list[LatentGroup]:
    """The groups of an epoch; none where it has no file."""
    file = group_file(folder, epoch)
    return [LatentGroup(*parts) for parts in files.load_tensors(file)] if file.exists() else []


def split(batch: LabelledBatch, prompts: list[str], images_per_prompt: int) -> list[LatentGroup]:
    """The groups of K chains of a batch that have pairs; prompts: of each chain."""
    x_T, x_0, K = batch.trajectory.x[0].cpu(), batch.trajectory.x[-1].cpu(), images_per_prompt
    groups = []
    for start in range(0, len(prompts), K):
        pairs = batch.pairs[batch.pairs[:, 0] // K == start // K] - start
        if len(pairs):
            x_0_of_group = x_0[start : start + K].clone()
            groups.append(LatentGroup(prompts[start], x_0_of_group, x_T[start].clone(), pairs))
    return groups


def parts_of_pass(groups: int) -> int:
    """Epochs in which so many groups are trained on once: a run can stop within a long pass."""
    return math.ceil(groups / label_files.EPOCH_GROUPS)


def encode_groups(groups: list[label_files.Group], conditioning: Conditioning) -> list[LatentGroup]:
    """The groups of a label file, images resized and centre-cropped to the model's size."""
    pipe, encoded = conditioning.pipe, []
    blank = torch.zeros_like(conditioning.latents[:1], dtype=torch.float32)
    size = decode(pipe, blank, conditioning, names=["a blank image"])[0].size
    for prompt, images, pairs in tqdm(groups, "encode images", unit=" groups", delay=2):
        opened = [open_image(file, size) for file in images]
        x_0 = encode(pipe, opened, names=[str(file) for file in images]).cpu()
        encoded.append(LatentGroup(prompt, x_0, None, torch.tensor(pairs)))
    return encoded

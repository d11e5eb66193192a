"""Labelled images, kept to be trained on again.

A label speaks of the final image alone, so it holds for every trajectory that leads there and for
every later policy. RUN/latents keeps

    e003.pt       the groups of epoch 3: x_T, x_0 and pairs (e000.pt: those of --labels)
    e003_p04.pt   until epoch 3 is done, the trajectories of one of its batches, so that a resumed
                  run never samples again what people have judged
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

import d3po
from sd import files
from sd.images import open_image
from sd.label_files import EPOCH_GROUPS, epochs_of_pass, read_label_file
from sd.pipeline import Conditioning, decode, encode
from sd.seeds import RandomPurpose, seeded_generator


class Group(NamedTuple):
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


class ReplayBuffer:
    """The labelled groups of a run, the same on every process.

    prompts: all that have a number.
    """

    def __init__(
        self,
        args: Namespace,
        accelerator: Accelerator,
        schedule: d3po.Schedule,
        prompts: list[str],
    ):
        self.folder, self.seed, self.batch_size = args.out / "latents", args.seed, args.batch_size
        self.accelerator, self.schedule, self.prompts = accelerator, schedule, prompts
        self.numbers = {prompt: number for number, prompt in enumerate(prompts)}
        self.groups: list[Group] = []

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

    def keep(self, epoch: int, groups: list[Group]) -> None:
        groups = gather_object(groups)
        self.groups += groups
        if groups and self.accelerator.is_main_process:
            content = [tuple(group) for group in groups]
            files.save_tensors(group_file(self.folder, epoch), content)

    def load(self, epochs_done: int, given: list[Group]) -> None:
        """Take up the groups of these epochs; given: of --labels, in a run that starts."""
        self.keep(0, given)
        if self.accelerator.is_main_process:
            self.drop_batches(epochs_done)
        for epoch in range(1 if self.groups else 0, epochs_done + 1):
            self.groups += load_groups(self.folder, epoch)

    def draw_given(self, epoch: int) -> Iterator[LabelledBatch]:
        """The share of this epoch in a pass over the groups of --labels, in random order."""
        epochs = epochs_of_pass(len(self.groups))
        passes_done, part = divmod(epoch - 1, epochs)
        order = self.shuffled(passes_done, 0)[part * EPOCH_GROUPS :][:EPOCH_GROUPS]
        across = self.batch_size * self.accelerator.num_processes
        for n, first in enumerate(range(0, len(order), across)):
            yield self.redraw(order[first : first + across], epoch, n)

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
        )

    # The epoch in hand

    def batch_file(self, epoch: int, first: int) -> Path:
        return self.folder / f"e{epoch:03}_p{first:02}.pt"

    def keep_batch(self, epoch: int, first: int, trajectory: d3po.Trajectory) -> None:
        """Keep sampled trajectories; first: the number of their first group."""
        tensors = [tensor.cpu() for tensor in trajectory]
        files.save_tensors(self.batch_file(epoch, first), tensors)

    def kept_batch(self, epoch: int, first: int) -> d3po.Trajectory | None:
        file = self.batch_file(epoch, first)
        if not file.exists():
            return None
        return d3po.Trajectory(*files.load_tensors(file, self.accelerator.device))

    def drop_batches(self, epochs_done: int) -> None:
        for file in self.folder.glob("e*_p*.pt"):
            if int(file.name.partition("_")[0].removeprefix("e")) <= epochs_done:
                file.unlink()


def group_file(folder: Path, epoch: int) -> Path:
    return folder / f"e{epoch:03}.pt"


def load_groups(folder: Path, epoch: int) -> list[Group]:
    """The groups of an epoch; none where it has no file."""
    file = group_file(folder, epoch)
    return [Group(*parts) for parts in files.load_tensors(file)] if file.exists() else []


def split(batch: LabelledBatch, prompts: list[str], images_per_prompt: int) -> list[Group]:
    """The groups of K chains of a batch that have pairs; prompts: of each chain."""
    x_T, x_0, K = batch.trajectory.x[0].cpu(), batch.trajectory.x[-1].cpu(), images_per_prompt
    groups = []
    for start in range(0, len(prompts), K):
        pairs = batch.pairs[batch.pairs[:, 0] // K == start // K] - start
        if len(pairs):
            x_0_of_group = x_0[start : start + K].clone()
            groups.append(Group(prompts[start], x_0_of_group, x_T[start].clone(), pairs))
    return groups


class Given:
    """What --labels brings: prompts, and for a run that starts, groups of images.

    A run that is resumed has encoded them. Raises UserError as `read_label_file` does.
    """

    def __init__(self, args: Namespace, accelerator: Accelerator):
        self.label_file, groups = None, []
        run = args.resume or args.evaluate
        if args.labels and run:
            groups = load_groups(run / "latents", 0)
        if args.labels and not groups:
            self.label_file = read_label_file(Path(args.labels), args.images and Path(args.images))
            accelerator.print(self.label_file.describe())
            groups = self.label_file.groups
        self.prompts = list(dict.fromkeys(group.prompt for group in groups))
        self.groups, self.pairs = len(groups), sum(len(group.pairs) for group in groups)

    def encode(self, conditioning: Conditioning) -> list[Group]:
        """The groups of the file, images resized and centre-cropped to the model's size."""
        if self.label_file is None:
            return []
        pipe, groups = conditioning.pipe, []
        blank = torch.zeros_like(conditioning.latents[:1], dtype=torch.float32)
        size = decode(pipe, blank, conditioning, names=["a blank image"])[0].size
        files = self.label_file.groups
        for prompt, images, pairs in tqdm(files, "encode images", unit=" groups", delay=2):
            opened = [open_image(file, size) for file in images]
            x_0 = encode(pipe, opened, names=[str(file) for file in images]).cpu()
            groups.append(Group(prompt, x_0, None, torch.tensor(pairs)))
        return groups

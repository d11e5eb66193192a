"""Where the labels of a run's own images come from: a scorer, or people on a page.

A labeller is an object with one method, which --labeller of `sd_demo.run` may have too:

    label(batches, epoch) -> the labels of each batch (Alg. 1 lines 12-22), or None to end the run
"""

import itertools
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm import tqdm

from sd import UserError, figures, files
from sd.annotate import AnnotationServer
from sd.labels import (
    Label,
    answer_field,
    label_row,
    pairs_of_group,
    pareto_preference,
    read_labels,
)
from sd.model import Batch
from sd.options import Settings
from sd.scorers import Scorer, score_images

PIXEL_TOLERANCE = 4  # mean difference, of 255, up to which an image sampled again is the same


class ScorerLabeller:
    """The better score wins; of several scorers, better means worse in none and better in one."""

    def __init__(self, scorers: list[Scorer]):
        self.scorers = scorers

    def label(self, batches: list[Batch], epoch: int) -> list[list[Label]]:
        return [self.compare(batch) for batch in batches]

    def compare(self, batch: Batch) -> list[Label]:
        """All comparisons inside the groups of a batch.

        An image that one of the scorers gave no score is in none: there h is None.
        """
        scores = score_images(self.scorers, batch.images, batch.prompts)
        pairs = [pair for group in batch.groups for pair in itertools.combinations(group, 2)]
        first, second = (list(side) for side in zip(*pairs, strict=True))
        filled, complete = scores.nan_to_num(), scores.isfinite().all(0).tolist()
        h = pareto_preference(filled[:, first], filled[:, second]).tolist()
        return [
            Label(pair, "h", answer if all(complete[k] for k in pair) else None, scores[:, pair])
            for pair, answer in zip(pairs, h, strict=True)
        ]


class PeopleLabeller:
    """People answer on a page: human (which of two is better?) or tags (which are bad?).

    rounds: how many there are; label_epochs: epochs before the first, on --labels.
    """

    def __init__(
        self,
        page: AnnotationServer,
        objective: str,
        accelerator: Accelerator,
        *,
        rounds: int,
        label_epochs: int,
    ):
        self.page, self.objective, self.accelerator = page, objective, accelerator
        self.rounds, self.label_epochs = rounds, label_epochs

    def label(self, batches: list[Batch], epoch: int) -> list[list[Label]] | None:
        for batch in batches:
            for image, file in zip(batch.images, batch.files, strict=True):
                save_for_people(image, self.page.run / file)
        questions = [self.questions(batch) for batch in batches]
        rows = [
            label_row(label, epoch, prompts=batch.prompts, images=batch.files)
            for batch, of_batch in zip(batches, questions, strict=True)
            for label in of_batch
        ]
        own, rows = len(rows), gather_object(rows)
        if self.accelerator.is_main_process:
            rows = self.ask(rows)
        (rows,) = broadcast_object_list([rows])
        if rows is None:
            return None
        answers = iter(rows[self.accelerator.process_index * own :])
        return [
            [label._replace(answer=next(answers)[label.field]) for label in of_batch]
            for of_batch in questions
        ]

    def questions(self, batch: Batch) -> list[Label]:
        """Comparisons without an answer."""
        if self.objective == "tags":
            return [Label(group, "bad", None) for group in batch.groups]
        pairs = [pair for group in batch.groups for pair in pairs_of_group(group)]
        return [Label(pair, "h", None) for pair in pairs]

    def ask(self, rows: list[dict]) -> list[dict] | None:
        """The answered rows; None where people end the run before they answer any of them."""
        number = rows[0]["epoch"] - self.label_epochs
        progress = {"epoch": number, "epochs": self.rounds}
        answered = self.page.ask(rows, progress)
        if self.page.annotators > 1:
            tqdm.write(
                f"Agreement of the {self.page.annotators} annotators: "
                f"Fleiss' kappa {self.page.kappa:.2f}"
            )
        if self.page.finished and rows[0]["epoch"] > 1:  # there is a model
            votes = [list(votes.values()) for votes in read_labels(self.page.file, rows).values()]
            if not any(vote is not None for of_one in votes for vote in of_one):
                return None
        return answered


def open_page(args: Settings, folder: Path, *, story: Path | None = None) -> AnnotationServer:
    """The page for people of a run, which opens with its first question."""
    return AnnotationServer(
        folder,
        args.annotators,
        args.seed,
        port=args.port,
        guide=args.question,
        story=story,
        public_url=args.public_url,
    )


def result_paths(run: Path) -> dict[str, str]:
    return {"LoRA": str(run / "lora"), "Report": str(run / "report.html")}


def save_for_people(image: Image.Image, file: Path) -> None:
    """Save an image. One that people may have judged is not replaced by another: UserError."""
    before = figures.open_image(file)
    if before is None and file.exists() and is_judged(file):
        raise UserError(
            f"{file} cannot be read, and people have judged it: restore a copy of it, or "
            "delete its lines in labels.jsonl"
        )
    if before is None:
        files.save_image(file, image)
        return
    difference = np.asarray(image, float) - np.asarray(before.resize(image.size), float)
    if (change := np.abs(difference).mean()) > PIXEL_TOLERANCE:
        raise UserError(
            f"{file} cannot be sampled again as people saw it (pixels differ by {change:.0f} "
            "of 255): go on with the machine that made it, or delete it and its labels"
        )


def is_judged(image: Path) -> bool:
    """Whether labels.jsonl of a folder has an answer about RUN/images/NAME."""
    run, name = image.parents[1], f"images/{image.name}"
    rows = files.read_lines(run / "labels.jsonl")
    return any(
        name in row.get("images", []) and row.get(answer_field(row)) is not None for row in rows
    )

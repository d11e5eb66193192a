"""Where labels come from: a scorer or people; and the blind test of the paper's Fig. 7."""

import itertools
import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd import UserError, figures, files
from sd.annotate import FAREWELL, AnnotationServer, listen
from sd.label_files import epochs_given
from sd.labels import Label, answer_field, pairs_of_group, pareto_preference, read_labels
from sd.metrics import EvalResult, mean_and_error, win_rate, win_rate_vs_reference
from sd.model import Batch, Model, PipelinePolicy, sample_held_out, sample_stock
from sd.scorers import load_scorers
from sd.seeds import RandomPurpose

PIXEL_TOLERANCE = 4  # mean difference, of 255, up to which an image sampled again is the same


class ScorerFeedback:
    """Labels by the scorers of --objective; --watch is only reported.

    Raises ValueError, in a sentence for the user, for scorers that cannot be loaded.
    """

    def __init__(self, args: Namespace, prompts: list[str], accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        options = {
            "clip": args.clip_model,
            "head": args.aesthetic_head,
            "device": accelerator.device,
        }
        self.scorers = self.load(args.objective, prompts, options) if args.objective else []
        watch = load_scorers(args.watch, prompts, **options) if args.watch else [None]
        if len(watch) > 1:
            raise ValueError(f"--watch {args.watch}: give one scorer")
        self.watch = watch[0]

    def load(self, objective: str, prompts: list[str], options: dict) -> list:
        return load_scorers(objective, prompts, **options)

    def label(self, batches: list[Batch], epoch: int) -> list[list[Label]]:
        """The labels of each batch (Alg. 1 lines 12-22).

        When this returns, those of all processes are in labels.jsonl, and the images are kept.
        None where people end the run before they answer any.
        """
        asked = [self.compare(batch, epoch) for batch in batches]
        for batch in batches:
            for image, file in zip(batch.images, batch.files, strict=True):
                self.save_image(image, self.args.out / file)
        rows = gather_object([label.row for labels in asked for label in labels])
        is_main = self.accelerator.is_main_process
        (rows,) = broadcast_object_list([self.collect_labels(rows) if is_main else None])
        if not rows:
            return []
        own = len(rows) // self.accelerator.num_processes
        answered = iter(rows[self.accelerator.process_index * own :])
        return [[label._replace(row=next(answered)) for label in labels] for labels in asked]

    def compare(self, batch: Batch, epoch: int) -> list[Label]:
        """All comparisons inside the groups of a batch, with scores and h.

        An image that one of the scorers gave no score is in none: there h is None.
        """
        scores = self.scores(batch.images, batch.prompts)
        known = scores.isfinite().all(0).tolist()
        pairs = [pair for group in batch.groups for pair in itertools.combinations(group, 2)]
        first, second = (list(side) for side in zip(*pairs, strict=True))
        filled = scores.nan_to_num()
        h = pareto_preference(filled[:, first], filled[:, second]).tolist()
        values = [[number(score) for score in of_image] for of_image in scores.T.tolist()]
        values = values if len(scores) > 1 else [score for (score,) in values]
        return [
            question(
                batch,
                epoch,
                chains,
                scores=[values[k] for k in chains],
                h=answer if all(known[k] for k in chains) else None,
            )
            for chains, answer in zip(pairs, h, strict=True)
        ]

    def collect_labels(self, rows: list[dict]) -> list[dict]:
        files.append(self.args.out / "labels.jsonl", rows)
        return rows

    def save_image(self, image: Image.Image, file: Path) -> None:
        files.save_image(file, image)

    def evaluate(self, images: list[Image.Image], prompts: list[str], kl=None) -> EvalResult:
        watched = self.watch(images, prompts) if self.watch else []
        mean, _ = mean_and_error(torch.tensor(watched, dtype=torch.float64))
        return EvalResult(images, prompts, self.scores(images, prompts), mean, kl)

    def scores(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """(S, N), float64: scores as the S scorers gave them; NaN where they gave none."""
        rows = [torch.tensor(score(images, prompts), dtype=torch.float64) for score in self.scorers]
        return torch.stack(rows) if rows else torch.empty(0, len(images))

    finished = False  # people want the run to end

    def status(self, text: str) -> None:
        """What people see while there is no question."""

    def close(self, code: str, reason: str | None) -> None:
        """The run has ended. code uses its LoRA; reason: of one that cannot go on."""


class HumanFeedback(ScorerFeedback):
    """Labels by people on a page: --objective human (which of two?) or tags (which are bad?)."""

    server: AnnotationServer | None = None

    def __init__(self, args: Namespace, prompts: list[str], accelerator: Accelerator):
        super().__init__(args, prompts, accelerator)
        if accelerator.is_main_process and not args.resume:
            listen(args.port).close()  # a taken port is said before anything is sampled

    def load(self, objective: str, prompts: list[str], options: dict) -> list:
        return []

    def compare(self, batch: Batch, epoch: int) -> list[Label]:
        """Questions: comparisons without an answer."""
        if self.args.objective == "tags":
            return [question(batch, epoch, group, bad=None) for group in batch.groups]
        pairs = [pair for group in batch.groups for pair in self.pairs_of_group(group)]
        return [question(batch, epoch, pair, h=None) for pair in pairs]

    def pairs_of_group(self, group: range) -> list[tuple[int, int]]:
        return pairs_of_group(group)

    def collect_labels(self, rows: list[dict]) -> list[dict]:
        args = self.args
        self.server = self.server or AnnotationServer(
            args.out, args.annotators, args.seed, port=args.port, guide=args.question
        )
        epoch = rows[0]["epoch"] - epochs_given(args)
        total, before = args.epochs * len(rows), (epoch - 1) * len(rows)
        progress = {"epoch": epoch, "epochs": args.epochs, "total": total}
        progress |= {"before": before, "asked": len(rows)}
        answered = self.server.ask(rows, progress)
        self.finished = self.server.finished
        if args.annotators > 1:
            kappa = self.server.kappa
            tqdm.write(f"Agreement of the {args.annotators} annotators: Fleiss' kappa {kappa:.2f}")
        if self.finished and rows[0]["epoch"] > 1:  # there is a model
            given = read_labels(self.server.file, rows).values()
            if all(vote is None for of_one in given for vote in of_one.values()):
                return []
        return answered

    def save_image(self, image: Image.Image, file: Path) -> None:
        """Save an image. One that people may have judged is not replaced by another: UserError."""
        before = figures.open_image(file)
        if before is None and file.exists() and is_judged(file):
            raise UserError(
                f"{file} cannot be read, and people have judged it: put a copy of it back, or "
                "delete its lines in labels.jsonl"
            )
        if before is None:
            return super().save_image(image, file)
        difference = np.asarray(image, float) - np.asarray(before.resize(image.size), float)
        if (change := np.abs(difference).mean()) > PIXEL_TOLERANCE:
            raise UserError(
                f"{file} cannot be sampled again as people saw it (pixels differ by {change:.0f} "
                "of 255): go on with the machine that made it, or delete it and its labels"
            )

    def status(self, text: str) -> None:
        if self.server:
            self.server.status(text)

    def close(self, code: str, reason: str | None) -> None:
        if self.server:
            out = self.args.out
            text = f"{f'{reason}.' if reason else FAREWELL} {result_paths(out)}"
            evaluate = f"python sd_demo.py --evaluate {out}"
            self.server.close(f"{text} Is it better? A blind test: {evaluate}", code)


def result_paths(run: Path) -> str:
    return f"The LoRA is in {run / 'lora'}; the report is {run / 'report.html'}."


def number(score: float) -> float | None:
    """A score as JSON has it."""
    return score if math.isfinite(score) else None


def is_judged(image: Path) -> bool:
    """Whether labels.jsonl of a folder has an answer about RUN/images/NAME."""
    run, name = image.parents[1], f"images/{image.name}"
    rows = files.read_lines(run / "labels.jsonl")
    return any(
        name in row.get("images", []) and row.get(answer_field(row)) is not None for row in rows
    )


def question(batch: Batch, epoch: int, chains: list[int], *, scores=None, **answer) -> Label:
    """A comparison of images of one prompt, as labels.jsonl has it."""
    row = {
        "epoch": epoch,
        "prompt": batch.prompts[chains[0]],
        "images": [batch.files[k] for k in chains],
        "scores": scores,
        **answer,
    }
    return Label(list(chains), row)


def evaluate_held_out(
    feedback: ScorerFeedback,
    model: Model,
    denoiser: PipelinePolicy,
    *,
    purpose: RandomPurpose = RandomPurpose.HELD_OUT,
    save_as: int | None = None,
) -> EvalResult:
    """What the scorers think of images of fixed prompts and noises, whatever was trained.

    save_as: the epoch under which some of the images are kept. With --max-kl there is a KL too.
    """
    args = feedback.args
    images, prompts, kl = sample_held_out(model, denoiser, args, purpose=purpose)
    if save_as is not None:
        for n, image in enumerate(images[: figures.NUM_FIGURE_IMAGES]):
            files.save_image(figures.held_out_file(args.out, save_as, n), image)
    return feedback.evaluate(images, prompts, kl)


def evaluate_initial(feedback: ScorerFeedback, model: Model) -> EvalResult:
    """The model before training on the held-out noises; config.json keeps what it scores."""
    args = feedback.args
    result = evaluate_held_out(feedback, model, model.reference, save_as=0)
    config = files.read_json(args.out / "config.json")
    config |= {"epochs": args.epochs, "max_kl": args.max_kl, "initial": result.as_row()}
    config["stopped"] = None
    files.save_json(args.out / "config.json", config)
    return result


def compare_with_initial(feedback: ScorerFeedback, model: Model, epoch: int, code: str) -> None:
    """--evaluate: tuned against initial model on noises that no training saw.

    By the scorers, or blind by people; RUN/evaluation.json and .png keep what came out. Beside it
    what they are at the pipeline's own settings, where most people will use the LoRA, as `code`
    does.
    """
    args = feedback.args
    initial, tuned = (
        evaluate_held_out(feedback, model, denoiser, purpose=RandomPurpose.EVALUATION)
        for denoiser in (model.reference, model.sampler)
    )
    if isinstance(feedback, HumanFeedback):
        result = blind_test(feedback, tuned, initial, epoch=epoch, code=code)
    else:
        result = win_rate_vs_reference(tuned, initial)
    stock_initial, stock_tuned = (
        feedback.evaluate(*sample_stock(model, denoiser, args))
        for denoiser in (model.reference, model.sampler)
    )
    stock = win_rate_vs_reference(stock_tuned, stock_initial)
    result = {"objective": args.objective, **result, "stock": stock}
    files.save_json(args.out / "evaluation.json", result)
    print(json.dumps(result, indent=2))
    for before, after, name in (
        (initial, tuned, "evaluation.png"),
        (stock_initial, stock_tuned, "evaluation_stock.png"),
    ):
        print(figures.draw_pairs(before.images, after.images, args.out / name))


def blind_test(
    feedback: HumanFeedback, tuned: EvalResult, initial: EvalResult, *, epoch: int, code: str
) -> dict:
    """People compare tuned and initial model without knowing which is which (Fig. 7).

    RUN/blind_eEPOCH keeps images and answers: a second start goes on where the first one stopped.
    Who stops early gets the result of what was answered; a question that all skipped is no tie.
    """
    args = feedback.args
    folder = args.out / f"blind_e{epoch:03}"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions = []
    for n, prompt in enumerate(tuned.prompts):
        files = [f"images/{name}_{n:03}.png" for name in ("tuned", "initial")]
        for result, file in zip((tuned, initial), files, strict=True):
            feedback.save_image(result.images[n], folder / file)
        questions.append(
            {"epoch": epoch, "prompt": prompt, "images": files, "scores": None, "h": None}
        )
    server = AnnotationServer(
        folder, args.annotators, args.seed, port=args.port, guide=args.question, story=args.out
    )
    rows = server.ask(questions)
    answers = read_labels(server.file, questions).values()
    votes = [[vote for vote in of_one.values() if vote is not None] for of_one in answers]
    h = [row["h"] for row, of_one in zip(rows, votes, strict=True) if of_one]
    if not h:
        server.close("Nothing was answered, so there is no result.")
        raise UserError("No question of the blind test was answered")
    result = win_rate(torch.tensor(h))
    low, high = result["win_rate_interval"]
    server.close(
        f"Thank you. The tuned model's image was better in {result['win_rate']:.0%} of {len(h)} "
        f"answers, ties half (95 % interval {low:.0%} to {high:.0%}). {result_paths(args.out)}",
        code,
    )
    majorities = [2 * of_one.count(1) > len(of_one) for of_one in votes if of_one]
    return {
        "annotators": args.annotators,
        "votes": sum(map(len, votes)),
        "skipped": len(rows) - len(h),
        **result,
        "more_than_half_of_votes": sum(majorities) / len(majorities),
    }

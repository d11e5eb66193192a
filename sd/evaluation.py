"""Held-out images, before and after training; the blind test of the paper's Fig. 7."""

from pathlib import Path

import torch
from PIL import Image

from sd import UserError, figures, files, report
from sd.labellers import open_page, result_paths, save_for_people
from sd.labels import read_labels
from sd.metrics import EvalResult, mean_and_error, win_rate, win_rate_vs_reference
from sd.model import Model, PipelinePolicy, sample_held_out, sample_stock
from sd.options import Settings
from sd.scorers import Scorer, score_images
from sd.seeds import RandomPurpose


class Evaluator:
    """What scorers think of images of fixed prompts and starting noise, whatever was trained.

    scorers: of --objective, none where people judge; watch: a scorer that is only reported.
    """

    def __init__(self, model: Model, args: Settings, scorers: list[Scorer], *, watch: list[Scorer]):
        self.model, self.args, self.scorers, self.watch = model, args, scorers, watch

    def evaluate(
        self, denoiser: PipelinePolicy, *, purpose: RandomPurpose = RandomPurpose.HELD_OUT
    ) -> EvalResult:
        """Scores of --eval-images images; with --max-kl their KL too."""
        return self.judge(*sample_held_out(self.model, denoiser, self.args, purpose=purpose))

    def evaluate_stock(self, denoiser: PipelinePolicy) -> EvalResult:
        """Scores of images at the pipeline's own settings, where most people will use the LoRA."""
        return self.judge(*sample_stock(self.model, denoiser, self.args))

    def judge(
        self, images: list[Image.Image], prompts: list[str], kl: float | None = None
    ) -> EvalResult:
        watched = score_images(self.watch, images, prompts).flatten()
        scores = score_images(self.scorers, images, prompts)
        return EvalResult(images, prompts, scores, mean_and_error(watched)[0], kl)


def keep_images(folder: Path, epoch: int, images: list[Image.Image]) -> None:
    """Keep some images of an evaluation, for figures and the page."""
    for n, image in enumerate(images[: figures.NUM_FIGURE_IMAGES]):
        files.save_image(figures.held_out_file(folder, epoch, n), image)


def compare_with_initial(evaluator: Evaluator, folder: Path, *, epoch: int, code: str) -> dict:
    """--evaluate: tuned against initial model on images from new noise.

    By the scorers, or blind by people. RUN/evaluation.json and .png keep what came out; "stock" is
    the same at the pipeline's own settings. code: what the page for people shows at its end.
    """
    args, model = evaluator.args, evaluator.model
    both = model.reference, model.sampler
    initial, tuned = (
        evaluator.evaluate(denoiser, purpose=RandomPurpose.EVALUATION) for denoiser in both
    )
    figures.draw_pairs(initial.images, tuned.images, folder / "evaluation.png")
    if args.by_people:
        result = blind_test(args, tuned, initial, folder=folder, epoch=epoch, code=code)
    else:
        result = {"objective": args.row()["objective"], "epoch": epoch}
        result |= win_rate_vs_reference(tuned, initial)
    keep_result(result, folder, epoch=epoch, code=code)
    stock_initial, stock_tuned = (evaluator.evaluate_stock(denoiser) for denoiser in both)
    result["stock"] = win_rate_vs_reference(stock_tuned, stock_initial)
    keep_result(result, folder, epoch=epoch, code=code)
    figures.draw_pairs(stock_initial.images, stock_tuned.images, folder / "evaluation_stock.png")
    return result


def keep_result(result: dict, folder: Path, *, epoch: int, code: str) -> None:
    """Write evaluation.json, and the report with it."""
    files.save_json(folder / "evaluation.json", result)
    report.write(folder, epoch, code)


def blind_test(
    args: Settings,
    tuned: EvalResult,
    initial: EvalResult,
    *,
    folder: Path,
    epoch: int,
    code: str,
) -> dict:
    """People compare tuned and initial model without knowing which is which (Fig. 7).

    RUN/blind_eEPOCH keeps images and answers: a second start goes on where the first one stopped.
    Who stops early gets the result of what was answered; a question that all skipped is no tie.
    """
    answers_folder = folder / f"blind_e{epoch:03}"
    (answers_folder / "images").mkdir(parents=True, exist_ok=True)
    questions = []
    for n, prompt in enumerate(tuned.prompts):
        names = [f"images/{name}_{n:03}.png" for name in ("tuned", "initial")]
        for result, name in zip((tuned, initial), names, strict=True):
            save_for_people(result.images[n], answers_folder / name)
        questions.append(
            {"epoch": epoch, "prompt": prompt, "images": names, "scores": None, "h": None}
        )
    page = open_page(args, answers_folder, story=folder)
    rows = page.ask(questions)
    answers = read_labels(page.file, questions).values()
    votes = [[vote for vote in of_one.values() if vote is not None] for of_one in answers]
    h = [row["h"] for row, of_one in zip(rows, votes, strict=True) if of_one]
    if not h:
        page.close("Nothing was answered, so there is no result.")
        raise UserError("No question of the blind test was answered, so there is no result")
    majorities = [2 * of_one.count(1) > len(of_one) for of_one in votes if of_one]
    result = {
        "objective": args.objective,
        "epoch": epoch,
        "annotators": args.annotators,
        "votes": sum(map(len, votes)),
        "skipped": len(rows) - len(h),
        **win_rate(torch.tensor(h)),
        "more_than_half_of_votes": sum(majorities) / len(majorities),
    }
    keep_result(result, folder, epoch=epoch, code=code)  # the page shows the report
    sentences = report.evaluation_sentences(result, args.objective)
    page.close("\n".join(["Thank you.", *sentences]), code, result_paths(folder))
    return result

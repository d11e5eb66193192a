"""sd/evaluation.py: what is said of held-out images, and people who compare without a name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sd_helpers import parse

from sd import UserError, evaluation, files
from sd.evaluation import Evaluator, blind_test, compare_with_initial
from sd.labels import majority
from sd.metrics import EvalResult
from sd.options import EMOJI
from sd.scorers import jpeg_kb
from sd.seeds import RandomPurpose

IMAGES = [
    Image.fromarray(pixels)
    for pixels in np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
]


def brightness(images, prompts):
    return [np.asarray(image).mean() for image in images]


def size(images, prompts):
    return [jpeg_kb(image) for image in images]


def first_only(images, prompts):
    return [5.0, *[float("nan")] * (len(images) - 1)]


def test_an_evaluation_has_all_scores_and_the_mean_of_what_is_only_reported():
    three = IMAGES[:3], ["a cat"] * 3
    both = [size, brightness]
    result = Evaluator(None, None, both, watch=[brightness]).judge(*three, kl=2.5)
    assert result.scores.dtype == torch.float64 and result.images == IMAGES[:3]
    assert result.scores.tolist() == [size(*three), brightness(*three)]
    assert result.score == pytest.approx(np.mean(size(*three)))
    assert result.watched == pytest.approx(np.mean(brightness(*three))) and result.kl == 2.5
    assert Evaluator(None, None, both, watch=[]).judge(*three).watched is None
    by_people = Evaluator(None, None, [], watch=[first_only])
    assert by_people.judge(*three).watched == 5 and by_people.judge(*three).score is None


def result_of(images: list, first: int) -> EvalResult:
    scores = torch.arange(float(first), first + len(images)).view(1, -1)
    return EvalResult(images, ["a cat"] * len(images), scores, watched=None)


class Compared:
    """In place of an evaluator: the tuned model scores three more than the initial one."""

    model = SimpleNamespace(reference=0, sampler=3)

    def __init__(self, args, stock_fails: bool = False):
        self.args, self.stock_fails = args, stock_fails

    def evaluate(self, first: int, *, purpose: RandomPurpose) -> EvalResult:
        assert purpose == RandomPurpose.EVALUATION  # noises that no training saw
        return result_of(IMAGES[:2], first)

    def evaluate_stock(self, first: int) -> EvalResult:
        if self.stock_fails:
            raise UserError("out of luck")
        return result_of(IMAGES[2:4], first)


def test_what_came_out_is_kept_before_the_pipelines_own_settings_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.figures, "draw_pairs", lambda *args: None)
    monkeypatch.setattr(evaluation.report, "write", lambda *args: None)
    args, keys = parse(EMOJI), {"epoch": 1, "code": ""}
    result = compare_with_initial(Compared(args), tmp_path, **keys)
    assert result["objective"] == "compressibility" and result["win_rate"] == 1
    assert (result["initial"]["score"], result["tuned"]["score"]) == (0.5, 3.5)
    assert result["stock"]["win_rate"] == 1
    assert files.read_json(tmp_path / "evaluation.json") == result
    with pytest.raises(UserError, match="out of luck"):
        compare_with_initial(Compared(args, stock_fails=True), tmp_path, **keys)
    del result["stock"]
    assert files.read_json(tmp_path / "evaluation.json") == result


# The blind test


class Page:
    """In place of the annotation server: somebody who gives these answers, in order."""

    def __init__(self, folder: Path, answers: list):
        self.file, self.answers, self.farewell = folder / "labels.jsonl", answers, ()

    def ask(self, questions: list[dict]) -> list[dict]:
        rows = [
            row | {"h": h}
            for row, of_one in zip(questions, self.answers, strict=True)
            for h in of_one
        ]
        names = [f"person {k}" for of_one in self.answers for k in range(len(of_one))]
        files.save_lines(
            self.file, [row | {"annotator": n} for row, n in zip(rows, names, strict=True)]
        )
        return [
            row | {"h": majority(row, of_one)}
            for row, of_one in zip(questions, self.answers, strict=True)
        ]

    def close(self, *farewell) -> None:
        self.farewell = farewell


@pytest.fixture
def blind(tmp_path, monkeypatch):
    """A blind test of three images, with these answers to each."""

    def test(answers: list) -> tuple[dict, Page]:
        page = Page(tmp_path / "blind_e007", answers)
        monkeypatch.setattr(evaluation, "open_page", lambda *args, **more: page)
        monkeypatch.setattr(evaluation.report, "write", lambda *args: None)
        tuned, initial = (result_of(IMAGES[k : k + len(answers)], 0) for k in (0, 3))
        args = parse(EMOJI, objective="human", annotators=max(map(len, answers)))
        keys = {"folder": tmp_path, "epoch": 7, "code": "import torch"}
        return blind_test(args, tuned, initial, **keys), page

    return test


def test_a_blind_test_counts_wins_and_halves_ties(blind, tmp_path):
    result, page = blind([[1], [0], [None]])
    assert (result["pairs"], result["skipped"], result["votes"]) == (2, 1, 2)
    assert result["win_rate"] == 0.75 and result["more_than_half_of_votes"] == 0.5
    low, high = result["win_rate_interval"]
    assert low < 0.75 < high
    text, code, values = page.farewell
    assert "75 %" in text and values["LoRA"] == str(tmp_path / "lora")
    assert code == "import torch" and files.read_json(tmp_path / "evaluation.json") == result
    for name, first in (("tuned", 0), ("initial", 3)):
        for n in range(3):
            kept = Image.open(tmp_path / f"blind_e007/images/{name}_{n:03}.png")
            assert np.array_equal(np.asarray(kept), np.asarray(IMAGES[first + n]))


def test_of_several_people_the_majority_counts(blind):
    result, _ = blind([[1, 1, -1], [-1, -1, 1], [1, 0, None]])
    assert (result["pairs"], result["votes"], result["annotators"]) == (3, 8, 3)
    assert result["win_rate"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert result["more_than_half_of_votes"] == pytest.approx(1 / 3)


def test_without_any_answer_there_is_no_result(blind):
    with pytest.raises(UserError, match="No question of the blind test was answered"):
        blind([[None]] * 3)

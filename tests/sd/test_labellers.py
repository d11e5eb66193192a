"""sd/labellers.py: labels by scorers and by people, and images that people have judged."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import d3po
from sd import UserError, files
from sd.label_files import read_label_file
from sd.labellers import PeopleLabeller, ScorerLabeller, save_for_people
from sd.labels import label_row, pairs_from_labels
from sd.metrics import mean_score
from sd.model import Batch
from sd.run import image_files
from sd.scorers import jpeg_kb

PROMPTS = ["a cat", "an ant"]
NOISE = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in NOISE]
GREYS = [Image.new("L", (8, 8), level).convert("RGB") for level in (200, 50, 60)]


def brightness(images, prompts):
    return [np.asarray(image).mean() for image in images]


def smallness(images, prompts):
    return [-jpeg_kb(image) for image in images]


def of_the_dark(images, prompts):
    return [mean if mean < 100 else float("nan") for mean in brightness(images, prompts)]


def make_batch(images: list, K: int, first: int = 0) -> Batch:
    """Groups of K images, in turn of the two prompts; their states play no part in labels."""
    N = len(images) // K
    prompts = [PROMPTS[n % 2] for n in range(N) for _ in range(K)]
    return Batch(None, None, prompts, images, K, image_files(3, range(first, first + N), K))


def rows_of(batch: Batch, labels: list) -> list[dict]:
    return [label_row(label, 3, prompts=batch.prompts, images=batch.files) for label in labels]


# Scorers


@pytest.mark.parametrize("K", [2, 3])
def test_labels_are_all_pairs_inside_each_group(K):
    batch = make_batch(IMAGES[: 2 * K], K)
    (labels,) = ScorerLabeller([brightness]).label([batch], 3)
    assert len(labels) == len({tuple(label.chains) for label in labels}) == K * (K - 1)
    means = brightness(batch.images, None)
    for label, row in zip(labels, rows_of(batch, labels), strict=True):
        a, b = label.chains
        assert a < b and a // K == b // K
        assert json.loads(json.dumps(row)) == {
            "epoch": 3,
            "prompt": batch.prompts[a],
            "images": [batch.files[a], batch.files[b]],
            "scores": [means[a], means[b]],  # as the scorer gave them, to the last digit
            "h": np.sign(means[a] - means[b]),
        }
        assert list(row) == ["epoch", "prompt", "images", "scores", "h"]


def test_pairs_of_labels_are_pairs_from_scores():
    batch = make_batch([IMAGES[n] for n in (0, 1, 1, 2, 0, 1)], K=3)  # with a tie
    scores = torch.tensor(brightness(batch.images, None)).view(2, 3)
    pairs = pairs_from_labels(ScorerLabeller([brightness]).compare(batch)).tolist()
    assert len(pairs) == 5
    assert sorted(pairs) == sorted(d3po.pairs_from_scores(scores).tolist())


def test_several_scorers_are_stored_and_combined():
    batch = make_batch(IMAGES, K=3)
    labels = ScorerLabeller([smallness, brightness]).compare(batch)
    sizes, means = smallness(IMAGES, None), brightness(IMAGES, None)
    rows = rows_of(batch, labels)
    for label, row in zip(labels, rows, strict=True):
        a, b = label.chains
        assert row["scores"] == [[sizes[a], means[a]], [sizes[b], means[b]]]
        signs = {np.sign(sizes[a] - sizes[b]), np.sign(means[a] - means[b])}
        assert row["h"] == (signs.pop() if len(signs) == 1 else 0)
    assert {row["h"] for row in rows} == {1, -1, 0}
    assert mean_score(rows)["score"] == pytest.approx(np.mean(sizes))


def test_an_image_without_a_score_is_in_no_label(tmp_path):
    batch = make_batch(GREYS, K=3)
    labels = ScorerLabeller([of_the_dark]).compare(batch)
    rows = rows_of(batch, labels)
    assert [row["h"] for row in rows] == [None, None, -1]
    assert [row["scores"] for row in rows] == [[None, 50], [None, 60], [50, 60]]
    assert pairs_from_labels(labels).tolist() == [[2, 1]]
    (tmp_path / "images").mkdir()
    for image, file in zip(GREYS, batch.files, strict=True):
        image.save(tmp_path / file)
    files.append(tmp_path / "labels.jsonl", rows)
    (group,) = read_label_file(tmp_path / "labels.jsonl").groups  # --labels takes it up
    assert group.pairs == [(0, 1)]

    both = rows_of(batch, ScorerLabeller([smallness, of_the_dark]).compare(batch))
    assert [row["h"] is None for row in both] == [True, True, False]
    assert both[0]["scores"][0] == [-jpeg_kb(GREYS[0]), None]


# People


class Page:
    """In place of the annotation server: somebody who gives these answers, in order."""

    def __init__(self, run, answers: list, *, finished: bool = False):
        self.run, self.answers, self.finished = run, iter(answers), finished
        self.file, self.annotators, self.kappa = run / "labels.jsonl", 1, None
        self.asked = []
        (run / "images").mkdir(exist_ok=True)

    def ask(self, rows: list[dict], progress: dict) -> list[dict]:
        self.asked.append((rows, progress))
        field = "bad" if "bad" in rows[0] else "h"
        rows = [row | {field: next(self.answers)} for row in rows]
        files.append(self.file, [row for row in rows if row[field] is not None])
        return rows


def people(page: Page, objective: str) -> PeopleLabeller:
    return PeopleLabeller(page, objective, Accelerator(), rounds=5, label_epochs=2)


def test_people_are_asked_about_images_that_are_there_and_their_answers_are_labels(tmp_path):
    page = Page(tmp_path, [1, -1, 0, 1, -1, 1])
    batches = [make_batch(IMAGES[:3], 3), make_batch(IMAGES[3:], 3, first=1)]
    labels = people(page, "human").label(batches, 3)
    assert [[label.answer for label in of_batch] for of_batch in labels] == [[1, -1, 0], [1, -1, 1]]
    assert [tuple(label.chains) for label in labels[1]] == [(0, 1), (0, 2), (1, 2)]
    ((rows, progress),) = page.asked
    assert rows == [row | {"h": None} for row in rows] and {row["epoch"] for row in rows} == {3}
    assert (progress["epoch"], progress["epochs"]) == (1, 5)  # rounds, without those of --labels
    for batch in batches:
        for image, file in zip(batch.images, batch.files, strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / file)), np.asarray(image))

    tags = [[True, False, False], [False] * 3]
    (labels,) = people(Page(tmp_path, tags), "tags").label([make_batch(IMAGES, 3)], 3)
    assert [(label.field, label.answer) for label in labels] == [("bad", tag) for tag in tags]
    assert pairs_from_labels(labels).tolist() == [[1, 0], [2, 0]]


@pytest.mark.parametrize("answer, ends", [(None, True), (0, False)])
def test_people_who_finish_before_any_answer_of_an_epoch_end_the_run(tmp_path, answer, ends):
    page = Page(tmp_path, [answer], finished=True)
    labels = people(page, "human").label([make_batch(IMAGES[:2], 2)], 3)
    assert (labels is None) == ends


# Images that people have judged


def test_an_image_that_people_judged_is_not_replaced_by_another(tmp_path):
    file, image = tmp_path / "a.png", IMAGES[1]
    save_for_people(image, file)
    before = file.read_bytes()
    save_for_people(Image.fromarray(NOISE[1] ^ 1), file)  # as numbers in another order are rounded
    for other in (IMAGES[0], Image.new("RGB", (64, 64), "white")):
        with pytest.raises(UserError, match="a.png cannot be sampled again as people saw it"):
            save_for_people(other, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("answer", ["none", "skipped", "judged"])
@pytest.mark.parametrize("half", [True, False])
def test_an_image_cut_short_is_made_again_unless_somebody_judged_it(tmp_path, half, answer):
    (tmp_path / "images").mkdir()
    file, image = tmp_path / "images" / "a.png", IMAGES[0]
    row = {"epoch": 1, "prompt": "a cat", "images": ["images/b.png", "images/a.png"]}
    rows = {"none": [], "skipped": [row | {"h": None}], "judged": [row | {"h": 0}]}
    files.save_lines(tmp_path / "labels.jsonl", rows[answer])
    save_for_people(image, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2 if half else 0])
    before = file.read_bytes()
    if answer == "judged":
        with pytest.raises(UserError, match="a.png cannot be read, and people have judged it"):
            save_for_people(image, file)
        assert file.read_bytes() == before
    else:
        save_for_people(image, file)
        assert file.read_bytes() == whole

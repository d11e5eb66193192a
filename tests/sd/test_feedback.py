"""Labels by scorers: what stands in labels.jsonl, and the pairs that are trained on."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sd.feedback import HumanFeedback, ScorerFeedback
from sd.run_folder import image_files
from sd_helpers import FLAGS, read_rows

import d3po
from sd import UserError, options
from sd.label_files import read_label_file
from sd.labels import pairs_from_labels
from sd.metrics import mean_score
from sd.model import Batch
from sd.scorers import jpeg_kb

PROMPTS = ["a cat", "an ant"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def make_feedback(objective: str, out=None, watch: str | None = None) -> ScorerFeedback:
    flags = ["--objective", objective, "--model", "none", *FLAGS.split()]
    _, args = options.parse(flags + (["--watch", watch] if watch else []))
    args.out = out
    return ScorerFeedback(args, PROMPTS, Accelerator())


def make_batch(images: list, K: int, first: int = 0) -> Batch:
    """Groups of K images, in turn of the two prompts; their states play no part in labels."""
    N = len(images) // K
    prompts = [PROMPTS[n % 2] for n in range(N) for _ in range(K)]
    files = image_files(3, range(first, first + N), K)
    return Batch(None, None, prompts, images, K, files)


@pytest.mark.parametrize("K", [2, 3])
def test_labels_are_all_pairs_inside_each_group(scorers, images, K):
    batch = make_batch(images[: 2 * K], K)
    labels = make_feedback(f"{scorers}:brightness").compare(batch, 3)
    assert len(labels) == K * (K - 1)
    means = [np.asarray(image).mean() for image in batch.images]
    for (a, b), row in labels:
        assert a < b and a // K == b // K
        assert json.loads(json.dumps(row)) == {
            "epoch": 3,
            "prompt": batch.prompts[a],
            "images": [batch.files[a], batch.files[b]],
            "scores": [means[a], means[b]],  # as the scorer gave them, to the last digit
            "h": np.sign(means[a] - means[b]),
        }
        assert list(row) == ["epoch", "prompt", "images", "scores", "h"]
    assert len({tuple(label.chains) for label in labels}) == len(labels)


def test_pairs_of_labels_are_pairs_from_scores(scorers, images):
    feedback = make_feedback(f"{scorers}:brightness")
    batch = make_batch([images[n] for n in (0, 1, 1, 2, 0, 1)], K=3)  # with a tie
    scores = feedback.scores(batch.images, batch.prompts)[0].view(2, 3)
    pairs = pairs_from_labels(feedback.compare(batch, 1)).tolist()
    assert len(pairs) == 5
    assert sorted(pairs) == sorted(d3po.pairs_from_scores(scores).tolist())


def test_several_objectives_are_stored_and_combined(scorers, images):
    feedback = make_feedback(f"compressibility,{scorers}:brightness")
    labels = feedback.compare(make_batch(images, K=3), 1)
    sizes = [-jpeg_kb(image) for image in images]
    means = [np.asarray(image).mean() for image in images]
    for (a, b), row in labels:
        assert row["scores"] == [[sizes[a], means[a]], [sizes[b], means[b]]]
        signs = {np.sign(sizes[a] - sizes[b]), np.sign(means[a] - means[b])}
        assert row["h"] == (signs.pop() if len(signs) == 1 else 0)
    assert {row["h"] for _, row in labels} == {1, -1, 0}
    score = mean_score([row for _, row in labels])["score"]
    assert score == pytest.approx(np.mean(sizes))


def test_labels_and_images_are_kept_batch_by_batch(scorers, images, tmp_path):
    (tmp_path / "images").mkdir()
    feedback = make_feedback(f"{scorers}:brightness", tmp_path)
    batches = [make_batch(images[:4], 2), make_batch(images[4:], 2, first=2)]
    labels = feedback.label(batches, 3)
    assert [len(of_batch) for of_batch in labels] == [2, 1]
    rows = [label.row for of_batch in labels for label in of_batch]
    assert read_rows(tmp_path / "labels.jsonl") == rows
    for batch, of_batch in zip(batches, labels, strict=True):
        assert of_batch == feedback.compare(batch, 3)
        for image, file in zip(batch.images, batch.files, strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / file)), np.asarray(image))


def test_a_scorer_may_replace_images_but_people_may_not_lose_theirs(images, tmp_path):
    file = tmp_path / "a.png"
    by_scorer = make_feedback("compressibility")
    by_scorer.save_image(images[0], file)
    by_scorer.save_image(images[1], file)
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(images[1]))

    _, args = options.parse(["--objective", "human", "--model", "none"])
    by_people = HumanFeedback(args, PROMPTS, Accelerator())
    nearly = Image.fromarray(np.asarray(images[1]) ^ 1)
    by_people.save_image(nearly, file)  # the same numbers in another order are rounded otherwise
    with pytest.raises(UserError, match="a.png cannot be sampled again as people saw it"):
        by_people.save_image(images[0], file)
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(images[1]))
    by_people.save_image(images[0], tmp_path / "b.png")
    assert (tmp_path / "b.png").exists()


def test_an_evaluation_has_all_scores_and_the_mean_of_what_is_only_reported(scorers, images):
    three = images[:3], ["a cat"] * 3
    found = make_feedback("incompressibility", watch=f"{scorers}:brightness").evaluate(*three)
    assert found.scores.shape == (1, 3) and found.images == images[:3]
    assert found.score == pytest.approx(np.mean([*map(jpeg_kb, images[:3])]))
    means = [np.asarray(image).mean() for image in images[:3]]
    assert found.watched == pytest.approx(np.mean(means))
    assert make_feedback("incompressibility").evaluate(*three).watched is None


SOME_SCORES = """
import numpy as np
from PIL import ImageDraw

def dark_only(images, prompts):
    means = [np.asarray(image).mean() for image in images]
    return [None if mean > 100 else mean for mean in means]

def vandal(images, prompts):
    for image in images:
        ImageDraw.Draw(image).rectangle([0, 0, 99, 99], fill="black")
    return [prompts.pop() and float("-inf") for _ in images]
"""
GREYS = [Image.new("L", (8, 8), level).convert("RGB") for level in (200, 50, 60)]


@pytest.fixture
def some_scores(tmp_path):
    (tmp_path / "some.py").write_text(SOME_SCORES)
    return tmp_path / "some.py"


def test_an_image_without_a_score_is_in_no_label(some_scores, tmp_path):
    (tmp_path / "images").mkdir()
    feedback = make_feedback(f"{some_scores}:dark_only", tmp_path)
    batch = make_batch(GREYS, K=3)
    (labels,) = feedback.label([batch], 3)
    rows = read_rows(tmp_path / "labels.jsonl")  # as strict JSON
    assert rows == [label.row for label in labels]
    assert [row["h"] for row in rows] == [None, None, -1]
    assert [row["scores"] for row in rows] == [[None, 50], [None, 60], [50, 60]]
    assert pairs_from_labels(labels).tolist() == [[2, 1]]
    result = read_label_file(tmp_path / "labels.jsonl")  # --labels takes it up
    assert (result.skipped, [group.pairs for group in result.groups]) == (2, [[(0, 1)]])


def test_several_scorers_must_all_give_a_score(some_scores):
    feedback = make_feedback(f"compressibility,{some_scores}:dark_only")
    rows = [label.row for label in feedback.compare(make_batch(GREYS, K=3), 3)]
    assert [row["h"] is None for row in rows] == [True, True, False]
    assert rows[0]["scores"][0][1] is None and rows[0]["scores"][0][0] == -jpeg_kb(GREYS[0])


def test_means_are_over_the_images_with_a_score(some_scores):
    feedback = make_feedback("compressibility", watch=f"{some_scores}:dark_only")
    assert feedback.evaluate(GREYS, ["a cat"] * 3).watched == 55
    assert feedback.evaluate(GREYS[:1], ["a cat"]).watched is None


def test_nothing_that_a_scorer_does_to_what_it_gets_is_seen_by_another(
    some_scores, scorers, tmp_path
):
    (tmp_path / "images").mkdir()
    objective = f"{some_scores}:vandal,{scorers}:brightness"
    feedback = make_feedback(objective, tmp_path, watch=f"{some_scores}:vandal")
    images, prompts = [image.copy() for image in GREYS], ["a cat"] * 3
    batch = make_batch(images, K=3)
    (labels,) = feedback.label([batch], 3)
    assert labels[0].row["scores"] == [[None, 200], [None, 50]] and len(batch.prompts) == 3
    for image, file in zip(GREYS, batch.files, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / file)), np.asarray(image))
    assert feedback.evaluate(images, prompts).scores[1].tolist() == [200, 50, 60]
    assert len(prompts) == 3


def test_one_scorer_is_watched(scorers):
    with pytest.raises(ValueError, match="--watch .*: give one scorer"):
        make_feedback("compressibility", watch=f"{scorers}:blue,{scorers}:same")


def test_scores_keep_all_digits(scorers, images):
    scores = make_feedback(f"{scorers}:brightness").scores(images, ["a cat"] * 6)
    assert scores.dtype == torch.float64


def test_scorers_that_cannot_be_loaded_are_refused(scorers):
    with pytest.raises(UserError, match="raised RuntimeError: no"):
        make_feedback(f"{scorers}:raises")
    with pytest.raises(ValueError, match="there is no file no.py"):
        make_feedback("compressibility", watch="no.py:f")

"""What labels, scores and log-probs say, against numbers by hand and from tables."""

import itertools

import numpy as np
import pytest
import torch

from sd import files, metrics
from sd.metrics import EvalResult


def test_preference_metrics_in_numbers():
    """All pairs of all batches count alike, and a tie is no hit."""
    log_ratio = torch.tensor([[0.5, -3.0, 1.0], [0.5, 0.0, 1.0], [9.0, 0.0, 0.0]])  # T, B
    pairs = torch.tensor([[0, 1], [0, 2], [1, 1]])
    batch = metrics.log_ratios(log_ratio, pairs, trained_steps=2)
    other = metrics.LogRatios([2.0], [0.0], [], [])
    assert metrics.preference_metrics([batch, other], beta=0.1) == {
        "accuracy": 0.5,
        "margin": pytest.approx(0.1 * (4 - 1 + 0 + 2) / 4),
        "log_ratio_winners": pytest.approx((1 + 1 - 3 + 2) / 4),
        "log_ratio_losers": pytest.approx((-3 + 2 - 3 + 0) / 4),
    }
    no_pair = metrics.log_ratios(torch.zeros(2, 3), torch.zeros(0, 2).long(), trained_steps=2)
    for batches in ([], [no_pair]):
        assert set(metrics.preference_metrics(batches, beta=0.1).values()) == {None}


def test_the_kl_is_a_mean_of_sums_over_the_steps():
    log_ratio = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    batch = metrics.log_ratios(log_ratio, torch.zeros(0, 2).long(), trained_steps=2)
    assert metrics.kl([batch]) == {"kl": 12.0, "kl_trained": 5.0}
    other = batch._replace(chains=[3.0], trained=[2.0])  # all chains count alike
    assert metrics.kl([batch, other]) == {"kl": 9.0, "kl_trained": 4.0}
    assert metrics.kl([]) == {"kl": None, "kl_trained": None}  # nobody sampled them


def test_the_mean_score_is_that_of_the_first_scorer_and_counts_every_image_once():
    pairs = itertools.combinations({"a": [1, 7], "b": [2, 8], "c": [6, 0]}.items(), 2)
    rows = [{"images": [a, b], "scores": [s, t]} for (a, s), (b, t) in pairs]
    sem = pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)
    assert metrics.mean_score(rows) == {"score": 3, "score_sem": sem}
    assert metrics.mean_and_error(torch.tensor([3.0])) == (3, 0)


def scored(scores, watched=None) -> EvalResult:
    return EvalResult([], [], torch.tensor([scores], dtype=torch.float64), watched)


NO_SCORER = EvalResult([], [], torch.empty(0, 4), 0.25)


def test_the_win_rate_has_wilsons_interval():
    tuned, initial = scored([1.0] * 8 + [0.0] * 2, 0.9), scored([0.0] * 8 + [1.0] * 2)
    result = metrics.win_rate_vs_reference(tuned, initial)
    assert result["pairs"] == 10 and result["win_rate"] == pytest.approx(0.8)
    interval = [0.4902, 0.9433]  # as tables have it for 8 of 10
    assert result["win_rate_interval"] == pytest.approx(interval, abs=1e-4)
    sem = pytest.approx(0.1333, abs=1e-4)
    assert result["initial"] == {"score": 0.2, "score_sem": sem, "watched": None}
    assert result["tuned"] == {"score": 0.8, "score_sem": sem, "watched": 0.9}


def test_the_interval_stays_inside_0_and_1_and_ties_count_half():
    for h, share, ends in ((1, 1, [0.7225, 1]), (0, 0.5, [0.2366, 0.7634])):
        result = metrics.win_rate(torch.tensor([h] * 10))
        assert result["win_rate"] == share
        assert result["win_rate_interval"] == pytest.approx(ends, abs=1e-4)


def test_an_evaluation_in_metrics_jsonl():
    now, initial = scored([1.0, 3.0], 0.5)._replace(kl=3.5), scored([0.0, 4.0])
    row = {"eval_score": 2.0, "eval_win_rate": 0.5, "eval_pairs": 2}
    row |= {"watched": 0.5, "eval_kl": 3.5}
    assert metrics.eval_row(now, initial) == row
    assert set(metrics.eval_row(None, initial).values()) == {None}
    assert metrics.eval_row(NO_SCORER, NO_SCORER) == dict.fromkeys(row) | {"watched": 0.25}
    assert initial.as_row() == {"eval_score": 2.0, "watched": None}


ROW = {
    "epoch": 3,
    "score": -2.0,
    "eval_score": None,
    "eval_win_rate": None,
    "watched": None,
    "eval_kl": None,
    "accuracy": 0.75,
    "log_ratio_winners": 1.5,
    "kl_trained": 9.0,
    "preferences": 4,
    "unscored": 0,
    "skipped": 0,
    "labels": 50,
    "seconds_sample": 1.0,
    "seconds_train": 2.0,
}
EVALUATED = {"eval_score": -1.0, "eval_win_rate": 0.9}
LINES = [  # what differs from ROW, and sentences of the line
    (
        {},
        [
            "Epoch 3 of 9. New images: the mean JPEG size is 2.00 kB. 1 s of sampling, 2 s of "
            "training.\n"
        ],
    ),
    ({}, ["\n  Before training on the new labels the model agreed with 75 % of them."]),
    (EVALUATED, ["Held-out images: the mean JPEG size is 1.00 kB (before: 2.50 kB), 90 % better."]),
    ({"eval_kl": 4.25}, ["The KL to the initial model is 4.2 of at most 30 nats."]),
    (
        {"watched": 0.8},
        ["A separate classifier recognises 80.0 % of the animals (before: 50.0 %)."],
    ),
    ({"log_ratio_winners": -0.1}, ["WARNING: the preferred images become less likely", "--beta"]),
    ({"kl_trained": metrics.KL_LIMIT + 1.0}, ["WARNING: the KL", "progress.png"]),
    ({"eval_kl": 1.0, "kl_trained": metrics.KL_LIMIT + 1.0}, ["KL to the initial model is 1.0 of"]),
    ({"watched": 0.44}, ["WARNING: what --watch measures fell from 0.5 to 0.44"]),
    ({"skipped": 2}, ["Updates skipped, as their gradient overflowed: 2."]),
    ({"unscored": 3}, ["Images without a score, in no label: 3."]),
    ({"preferences": 0}, ["WARNING: no label says which image is better"]),
    ({"score": None, "unscored": 8}, ["Epoch 3 of 9. 1 s of", "no label: 8."]),
    ({"accuracy": None, "log_ratio_winners": None}, ["2.00 kB. 1 s of sampling"]),
]


def warnings_of(row: dict, *earlier: dict) -> list[str]:
    return metrics.warnings(row, {"watched": 0.5}, list(earlier))


def line_of(row: dict, initial: dict | None = None, **settings) -> str:
    watch = "toy/emoji_sd/classifier.py:recognised"
    settings = {"objective": "compressibility", "watch": watch, "max_kl": 30.0} | settings
    initial = initial or {"eval_score": -2.5, "watched": 0.5}
    return metrics.format_metrics({"warnings": []} | row, 9, initial, **settings)


@pytest.mark.parametrize("change, parts", LINES)
def test_an_epochs_line_has_its_numbers_and_warnings(change, parts):
    row = ROW | change
    line = line_of(row | {"warnings": warnings_of(row)})
    assert all(part in line for part in parts) and "None" not in line
    assert all(len(words) <= 100 for words in line.splitlines() if "WARNING" not in words)
    assert line.count("WARNING") == sum("WARNING" in part for part in parts)
    assert "-" not in line.replace("Held-out", "").partition("WARNING")[0]  # minus kB


def test_the_kl_of_a_line_is_the_one_that_is_limited():
    """Without a limit that of new images, which a pass over a file does not have."""
    assert "KL" not in line_of(ROW)  # its held-out images were not evaluated
    line = line_of(ROW | {"eval_kl": 4.25}, max_kl=None)
    assert "The KL to the initial model is 9.0 nats, of new images in the steps trained." in line
    assert "KL" not in line_of(ROW | {"kl_trained": None}, max_kl=None)


def test_a_round_that_people_labelled_has_no_score():
    no_score = {"score": None, "score_sem": None}
    assert metrics.mean_score([{"images": ["a", "b"], "scores": None, "h": 1}]) == no_score
    assert metrics.mean_score([]) == no_score  # a pass over the labels of a file
    initial = {"eval_score": None, "watched": None}
    line = line_of(ROW | no_score | {"watched": 0.8}, initial, objective="human", watch="a.py:my_f")
    assert line.startswith(
        "Round 3 of 9. 1 s of sampling, 2 s of training.\n  The mean of my f is 0.8.\n"
    )


# Images without a score, and labels without a preference

NAN = float("nan")


def test_scores_that_are_missing_are_in_no_mean():
    rows = [
        {"images": ["a", "b"], "scores": [1.0, None], "h": None},
        {"images": ["a", "c"], "scores": [1.0, 4.0], "h": -1},
        {"images": ["b", "c"], "scores": [None, 4.0], "h": None},
    ]
    assert metrics.mean_score(rows) == {"score": 2.5, "score_sem": pytest.approx(1.5)}
    assert metrics.label_counts(rows) == {"preferences": 1, "unscored": 1, "bad_share": None}
    none = [{"images": ["a", "b"], "scores": [None, None], "h": None}]
    assert metrics.mean_score(none) == {"score": None, "score_sem": None}
    assert metrics.label_counts(none) == {"preferences": 0, "unscored": 2, "bad_share": None}
    of_two_scorers = [{"images": ["a", "b"], "scores": [[1.0, None], [3.0, 9.0]], "h": None}]
    assert metrics.mean_score(of_two_scorers)["score"] == 2
    assert metrics.label_counts(of_two_scorers)["unscored"] == 1


def test_labels_of_people_and_of_files_are_counted():
    tags = [
        {"images": ["a", "b"], "scores": None, "bad": bad} for bad in ([True, False], [True] * 2)
    ]
    assert metrics.label_counts(tags) == {"preferences": 1, "unscored": 0, "bad_share": 0.75}
    pairs = [{"images": ["a", "b"], "scores": None, "h": h} for h in (1, 0, -1, 0)]
    assert metrics.label_counts(pairs) == {"preferences": 2, "unscored": 0, "bad_share": None}
    assert metrics.label_counts([]) == dict.fromkeys(("preferences", "unscored", "bad_share"))


def test_the_win_rate_is_that_of_images_with_a_score():
    tuned, initial = scored([2.0, NAN, 0.0, 4.0], NAN), scored([1.0, 1.0, NAN, 5.0])
    result = metrics.win_rate_vs_reference(tuned, initial)
    assert (result["pairs"], result["unscored"], result["win_rate"]) == (2, 2, 0.5)
    assert (result["tuned"]["score"], result["initial"]["score"]) == (2, pytest.approx(7 / 3))
    nothing = metrics.win_rate_vs_reference(tuned, scored([NAN] * 4))
    assert nothing["win_rate"] is None and nothing["pairs"] == 0
    assert nothing["initial"]["score"] is nothing["initial"]["score_sem"] is None
    assert metrics.eval_row(scored([NAN] * 4), initial)["eval_win_rate"] is None


def test_three_epochs_in_a_row_without_a_preference_end_a_run(tmp_path):
    def sentence(*preferences: int | None) -> str | None:
        rows = [{"epoch": n, "preferences": count} for n, count in enumerate(preferences, 1)]
        files.save_lines(tmp_path / "metrics.jsonl", rows)
        return metrics.nothing_to_learn(tmp_path, None)

    assert sentence(0, 0, 0) and "epochs 2 to 4 says which" in sentence(4, 0, 0, 0)
    assert "another --objective" in sentence(0, 0, 0) and "\n" not in sentence(0, 0, 0)
    assert not (sentence() or sentence(0, 0) or sentence(0, 0, 1) or sentence(0, 1, 0, 0))
    assert not (sentence(None, 0, 0) or sentence(None, None, None))  # of labels of a file


CHANCE = [  # accuracy, labels, epochs, last win rate, warns
    (0.5, 100, 10, None, True),
    (0.45, 900, 30, 0.7, False),
    (0.52, 900, 10, None, False),
    (0.45, 99, 10, None, False),
    (0.45, 900, 9, None, False),
]


@pytest.mark.parametrize("accuracy, labels, epochs, won, warns", CHANCE)
def test_accuracy_at_chance_after_many_labels_is_a_warning(accuracy, labels, epochs, won, warns):
    rows = [
        ROW | {"accuracy": accuracy + 0.01 * (-1) ** n, "labels": labels} for n in range(epochs)
    ]
    rows[-3]["eval_win_rate"] = won
    (*earlier, row) = rows
    assert any("no better than chance" in text for text in warnings_of(row, *earlier)) == warns
    rows[-2]["accuracy"] = None  # an epoch of ties
    assert not warnings_of(row, *earlier)


def test_a_fall_is_measured_on_a_score_of_either_sign():
    for before, now, falls in ((-2.0, -2.3, True), (-2.0, -2.1, False), (-2.0, -1.0, False)):
        row = ROW | {"watched": now}
        assert bool(metrics.warnings(row, {"watched": before}, [])) == falls

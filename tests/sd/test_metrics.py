"""What labels, scores and log-probs say, against numbers by hand and from tables."""

import itertools

import numpy as np
import pytest
import torch

from sd import metrics
from sd.metrics import EvalResult


def test_preference_metrics_in_numbers():
    pairs = torch.tensor([[0, 1], [0, 2]])
    found = metrics.preference_metrics(torch.tensor([1.0, -3.0, 2.0]), pairs, beta=0.1)
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx(0.1 * (4 - 1) / 2)
    assert found["log_ratio_winners"] == 1
    assert found["log_ratio_losers"] == pytest.approx(-0.5)


def test_without_pairs_there_is_no_metric():
    found = metrics.preference_metrics(torch.zeros(3), torch.zeros(0, 2).long(), beta=0.1)
    assert set(found.values()) == {None}


def test_a_winner_that_is_not_above_the_loser_is_no_hit():
    found = metrics.preference_metrics(torch.zeros(2), torch.tensor([[0, 1]]), beta=1)
    assert found["accuracy"] == 0


def test_the_kl_is_a_mean_of_sums_over_the_steps():
    log_ratio = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    assert metrics.kl(log_ratio, 2) == {"kl": 12.0, "kl_trained": 5.0}
    assert metrics.kl(None, 2) == {"kl": None, "kl_trained": None}  # nobody sampled them


def test_the_mean_score_counts_every_image_once():
    pairs = itertools.combinations({"a": 1, "b": 2, "c": 6}.items(), 2)
    rows = [{"images": [a, b], "scores": [s, t]} for (a, s), (b, t) in pairs]
    found = metrics.mean_score(rows)
    assert found["score"] == 3
    assert found["score_sem"] == pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)


def test_the_mean_score_is_that_of_the_first_scorer():
    rows = [{"images": ["a", "b"], "scores": [[1.0, 7.0], [3.0, 9.0]]}]
    assert metrics.mean_score(rows) == {"score": 2.0, "score_sem": pytest.approx(1.0)}


def test_the_standard_error_of_one_score_is_zero():
    assert metrics.standard_error(torch.tensor([3.0])) == 0


def scored(scores, watched=None) -> EvalResult:
    return EvalResult([], [], torch.tensor([scores], dtype=torch.float64), watched)


NO_SCORER = EvalResult([], [], torch.empty(0, 4), 0.25)


def test_the_win_rate_has_wilsons_interval():
    tuned, initial = scored([1.0] * 8 + [0.0] * 2, 0.9), scored([0.0] * 8 + [1.0] * 2)
    found = metrics.win_rate_vs_reference(tuned, initial)
    assert found["pairs"] == 10 and found["win_rate"] == pytest.approx(0.8)
    interval = [0.4902, 0.9433]  # as tables have it for 8 of 10
    assert found["win_rate_interval"] == pytest.approx(interval, abs=1e-4)
    sem = pytest.approx(0.1333, abs=1e-4)
    assert found["initial"] == {"score": 0.2, "score_sem": sem, "watched": None}
    assert found["tuned"] == {"score": 0.8, "score_sem": sem, "watched": 0.9}


@pytest.mark.parametrize(
    "h, share, ends",
    [([1] * 10, 1, [0.7225, 1]), ([-1] * 10, 0, [0, 0.2775]), ([0] * 10, 0.5, [0.2366, 0.7634])],
)
def test_the_interval_stays_inside_0_and_1_and_ties_count_half(h, share, ends):
    found = metrics.win_rate(torch.tensor(h))
    assert found["win_rate"] == share
    assert found["win_rate_interval"] == pytest.approx(ends, abs=1e-4)


def test_an_evaluation_in_metrics_jsonl():
    now, initial = scored([1.0, 3.0], 0.5)._replace(kl=3.5), scored([0.0, 4.0])
    row = {"eval_score": 2.0, "eval_win_rate": 0.5, "watched": 0.5, "eval_kl": 3.5}
    assert metrics.eval_row(now, initial) == row
    assert set(metrics.eval_row(None, initial).values()) == {None}
    assert metrics.eval_row(NO_SCORER, NO_SCORER) == dict.fromkeys(row) | {"watched": 0.25}
    assert initial.as_row() == {"eval_score": 2.0, "watched": None}
    assert NO_SCORER.as_row() == {"eval_score": None, "watched": 0.25}


ROW = {
    "epoch": 3,
    "score": -2.0,
    "score_sem": 0.1,
    "eval_score": None,
    "eval_win_rate": None,
    "watched": None,
    "eval_kl": None,
    "accuracy": 0.75,
    "log_ratio_winners": 1.5,
    "log_ratio_losers": -0.5,
    "kl": 12.0,
    "kl_trained": 9.0,
    "loss": 0.6,
    "skipped": 0,
    "seconds_sample": 1.0,
    "seconds_train": 2.0,
}
LINES = [
    ({}, ["epoch 3/9", "score -2.000 ± 0.100", "accuracy 75%", "winners +1.50, losers -0.50"]),
    ({}, ["KL 12.0, of it 9.0 in the steps trained", "1 + 2 s"]),
    ({"eval_score": -1.0, "eval_win_rate": 0.9}, ["held out -1.000 (initial -2.500)", "rate 90%"]),
    ({"eval_kl": 4.25}, ["KL of the held-out images 4.2"]),
    ({"watched": 0.8}, ["watched 0.800 (initial 0.500)"]),
    ({"log_ratio_winners": -0.1}, ["WARNING: winners lose probability", "--beta"]),
    ({"kl_trained": metrics.KL_LIMIT + 1.0}, ["WARNING: KL", "progress.png"]),
    ({"skipped": 2}, ["2 updates skipped"]),
]


@pytest.mark.parametrize("change, parts", LINES)
def test_an_epochs_line_has_its_numbers_and_warnings(change, parts):
    line = metrics.format_metrics(ROW | change, 9, {"eval_score": -2.5, "watched": 0.5})
    assert all(part in line for part in parts) and "\n" not in line
    assert line.count("WARNING") == sum("WARNING" in part for part in parts)


def test_an_epoch_that_people_labelled_has_no_score():
    no_score = {"score": None, "score_sem": None}
    assert metrics.mean_score([{"images": ["a", "b"], "scores": None, "h": 1}]) == no_score
    assert metrics.mean_score([]) == no_score  # a pass over the labels of a file
    initial = {"eval_score": None, "watched": 0.5}
    line = metrics.format_metrics(ROW | no_score | {"watched": 0.8}, 9, initial)
    assert line.startswith("epoch 3/9; watched 0.800 (initial 0.500); accuracy")


def test_a_pass_over_the_labels_of_a_file_has_no_kl_of_its_own():
    row = ROW | {"score": None, "kl": None, "kl_trained": None}
    assert "KL" not in metrics.format_metrics(row, 9, {})


def test_an_epoch_of_ties_has_a_line_without_a_warning():
    ties = dict.fromkeys(("accuracy", "margin", "log_ratio_winners", "log_ratio_losers", "loss"))
    line = metrics.format_metrics(ROW | ties, 9, {})
    assert "WARNING" not in line and "accuracy" not in line

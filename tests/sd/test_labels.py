"""Labels: the label file, what several people say together, and pairs for the losses."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import d3po
from sd import UserError, labels
from sd.labels import Label

# Machines are busy at times
examples = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PAIR = {
    "epoch": 3,
    "prompt": "a cat",
    "images": ["images/a.png", "images/b.png"],
    "scores": None,
    "h": None,
}
TAGS = {
    "epoch": 3,
    "prompt": "a cat",
    "images": ["images/a.png", "images/b.png", "images/c.png"],
    "bad": None,
}


def read(tmp_path, text: str, *questions):
    (tmp_path / "labels.jsonl").write_text(text)
    return labels.read_labels(tmp_path / "labels.jsonl", list(questions))


# The file


def test_answers_are_read_by_annotator_and_the_last_one_counts(tmp_path):
    answers = [
        {"h": 1},
        {"h": -1, "annotator": "Ann"},
        {"h": None, "annotator": "Bob"},
        {"h": 0},
    ]
    text = "".join(json.dumps(PAIR | answer) + "\n" for answer in answers)
    other = PAIR | {"images": ["images/c.png", "images/d.png"]}
    assert read(tmp_path, text, PAIR, other) == {
        ("images/a.png", "images/b.png"): {None: 0, "Ann": -1, "Bob": None},
        ("images/c.png", "images/d.png"): {},
    }
    tagged = TAGS | {"bad": [True, False, False]}
    expected = {tuple(TAGS["images"]): {None: [True, False, False]}}
    assert read(tmp_path, json.dumps(tagged) + "\n", TAGS) == expected
    assert labels.read_labels(tmp_path / "none.jsonl", [PAIR]) == {tuple(PAIR["images"]): {}}


def test_images_in_another_order_mean_the_same(tmp_path):
    swapped = PAIR | {"images": PAIR["images"][::-1], "h": 1}
    found = read(tmp_path, json.dumps(swapped) + "\n", PAIR)
    assert found[tuple(PAIR["images"])] == {None: -1}
    images = ["images/c.png", "images/a.png", "images/b.png"]
    turned = TAGS | {"images": images, "bad": [True, False, False]}
    found = read(tmp_path, json.dumps(turned) + "\n", TAGS)
    assert found[tuple(TAGS["images"])] == {None: [False, False, True]}


def test_earlier_epochs_are_passed_over_and_a_line_cut_short_is_dropped(tmp_path):
    images = ["images/x.png", "images/y.png"]
    old = json.dumps(PAIR | {"epoch": 2, "h": 1, "images": images}) + "\n"
    new = json.dumps(PAIR | {"h": -1}) + "\n"
    for cut in (new[:40], new[:-1], '{"'):
        assert read(tmp_path, old + new + cut, PAIR) == {tuple(PAIR["images"]): {None: -1}}


BAD_LINES = {
    "not JSON": ("{'epoch': 3}", "not JSON"),
    "empty": ("", "not JSON"),
    "no object": ("[1, 2]", "object"),
    "no epoch": ({"epoch": ...}, "'epoch' is missing"),
    "no h": ({"h": ...}, "'h' is missing"),
    "epoch true": ({"epoch": True}, "'epoch' is True"),
    "epoch to come": ({"epoch": 4}, "asks nothing"),
    "another prompt": ({"prompt": "a dog"}, "'a dog'"),
    "an unknown image": ({"images": ["images/a.png", "images/z.png"]}, "images/z.png"),
    "one image twice": ({"images": ["images/a.png", "images/a.png"]}, "asks nothing"),
    "lists for images": ({"images": [[], []]}, "asks nothing"),
    "h 2": ({"h": 2}, "'h' is 2"),
    "h true": ({"h": True}, "'h' is True"),
    "h 1.0": ({"h": 1.0}, "'h' is 1.0"),
    "annotator 5": ({"annotator": 5, "h": 1}, "'annotator' is 5"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_lines_are_refused_with_file_and_line_number(tmp_path, what):
    line, reason = BAD_LINES[what]
    if isinstance(line, dict):
        row = PAIR | {"h": 1} | line
        line = json.dumps({key: value for key, value in row.items() if value is not ...})
    good = json.dumps(PAIR | {"h": 1}) + "\n"
    with pytest.raises(UserError) as error:
        read(tmp_path, f"{good}{line}\n", PAIR)
    start = f"{tmp_path / 'labels.jsonl'}, line 2: "
    assert str(error.value).startswith(start) and reason in str(error.value)


@pytest.mark.parametrize("bad", [[True] * 4, [1, 0, 0], "yes"])
def test_bad_tags_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match="line 1: 'bad' is .*3 booleans"):
        read(tmp_path, json.dumps(TAGS | {"bad": bad}) + "\n", TAGS)
    pair = {key: value for key, value in TAGS.items() if key != "bad"} | {"h": 1}
    with pytest.raises(UserError, match="line 1: 'bad' is missing"):
        read(tmp_path, json.dumps(pair) + "\n", TAGS)


# Several people


@pytest.mark.parametrize(
    "votes, h",
    [
        ([], 0),
        ([None], 0),
        ([None, -1], -1),
        ([1, 0], 0),
        ([0, 0, 1], 0),
        ([1, 1, -1, 0], 1),
        ([1, 1, -1, -1, 0], 0),
    ],
)
def test_majority_of_pairs(votes, h):
    assert labels.majority(PAIR, votes) == h
    assert labels.majority(PAIR, votes[::-1]) == h


def test_majority_of_tags():
    a, b, c = [True, True, False], [True, False, False], [False, False, True]
    assert labels.majority(TAGS, [a]) == a
    assert labels.majority(TAGS, [a, b, c]) == [True, False, False]
    assert labels.majority(TAGS, [a, b]) == [True, False, False]  # one of two is not more than half
    assert labels.majority(TAGS, [a, None, None]) == a  # of those who answered
    assert labels.majority(TAGS, [None]) == labels.majority(TAGS, []) == [False] * 3


def test_kappa_by_hand():
    # agreement 3/4; shares of the answers 5/8 and 3/8, so expected 34/64
    kappa = labels.fleiss_kappa([[1, 1], [1, 1], [-1, -1], [1, -1]])
    assert kappa == pytest.approx((3 / 4 - 34 / 64) / (1 - 34 / 64))
    assert labels.fleiss_kappa([[1, 1], [0, 0], [-1, -1]]) == 1
    assert labels.fleiss_kappa([[1, -1], [-1, 1]]) == -1
    # unequal numbers of votes: agreement (1/3 + 1)/2, shares 3/5 and 2/5; one vote does not count
    kappa = labels.fleiss_kappa([[1, 1, 0], [0, 0], [0], []])
    assert kappa == pytest.approx((2 / 3 - 13 / 25) / (1 - 13 / 25))
    for votes in ([[1, 1], [1, 1]], [[1]], []):
        assert math.isnan(labels.fleiss_kappa(votes))


def test_kappa_of_a_published_example():
    # Fleiss (1971) as Wikipedia has it: 10 items, 14 raters, 5 answers, 0.210
    counts = """0 0 0 0 14, 0 2 6 4 2, 0 0 3 5 6, 0 3 9 2 0, 2 2 8 1 1,
                7 7 0 0 0, 3 2 6 3 0, 2 5 3 2 2, 6 5 2 1 0, 0 2 2 3 7"""
    votes = []
    for item in counts.split(","):
        votes.append([answer for answer, n in enumerate(item.split()) for _ in range(int(n))])
    assert labels.fleiss_kappa(votes) == pytest.approx(0.210, abs=5e-4)


# Preferences and pairs


def test_with_several_scores_only_dominance_counts():
    cases = {
        ((1, 1), (0, 0)): 1,
        ((1, 0), (0, 0)): 1,
        ((1, 0), (0, 1)): 0,
        ((0, 0), (0, 0)): 0,
        ((0, 0), (0, 2)): -1,
    }
    a, b = (torch.tensor([case[side] for case in cases]).T for side in (0, 1))
    assert labels.pareto_preference(a, b).tolist() == list(cases.values())
    assert labels.pareto_preference(b, a).tolist() == [-h for h in cases.values()]


def pair(a: int, b: int, h: int) -> Label:
    return Label([a, b], "h", h)


def test_tags_become_pairs_of_their_own_group():
    asked = [
        Label([2, 1, 0], "bad", [True, False, False]),
        Label([5, 4, 3], "bad", [True] * 3),
    ]
    assert labels.pairs_from_labels(asked).tolist() == [[1, 2], [0, 2]]


def test_without_a_preference_there_is_no_pair():
    tags = [Label([0, 1], "bad", answer) for answer in ([True, True], None)]
    for nothing in ([], [pair(0, 1, 0), pair(0, 1, None), *tags]):
        pairs = labels.pairs_from_labels(nothing)
        assert pairs.shape == (0, 2) and pairs.dtype == torch.int64
        assert not any(labels.has_preference({label.field: label.answer}) for label in nothing)


@examples
@given(st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_all_labels_of_groups_are_the_pairs_of_their_scores(values):
    scores = torch.tensor(values, dtype=torch.float64)
    asked = []
    for a, b in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)):  # groups of three
        asked.append(pair(a, b, d3po.preference(scores[[a]], scores[[b]]).item()))
    expected = d3po.pairs_from_scores(scores.view(2, 3)).tolist()
    assert sorted(labels.pairs_from_labels(asked).tolist()) == sorted(expected)

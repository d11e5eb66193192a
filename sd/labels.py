"""Labels: which images of one prompt are better, as people or scorers say (Alg. 1 lines 12-22).

The label file. A run keeps every label in RUN/labels.jsonl, one JSON object a line: a comparison of
two images, or tags of a group of K (Sec. 5.2).

    {"epoch": 3, "prompt": "a cat", "images": ["images/e003_p01_k0.png", "images/e003_p01_k1.png"],
     "scores": [-1.8, -2.4], "h": 1}
    {"epoch": 3, "prompt": "a dog", "images": [K names], "scores": null, "bad": [false, true, ...]}

    epoch      whole number: the epoch that sampled the images
    prompt     text: the prompt of all these images
    images     files, relative to the run's folder
    scores     what the scorer gave each image, higher is better (a list for each image where there
               are several scorers; null in place of a score that it did not give); null where
               people judge
    h          +1: the first image is better; -1: the second; 0: neither; null: skipped, or an
               image has no score
    bad        in place of h: for each image whether it is bad; null: skipped
    annotator  who answered; where it is missing, one person without a name
    left       for h: which of the two images stood on the left of the page, 0 or 1

`scores`, `annotator` and `left` may be missing. The file only grows: of several lines about the
same images by the same person the last counts, so a correction is one more line. The images may
stand in another order than the question has them; `h` and `bad` follow the order of their own line.

Labels of other tools. While people are asked, RUN/questions.jsonl has the questions of the epoch:
lines as above whose answer is null. Any tool may add such lines, with answers, to RUN/labels.jsonl
while no run is at work; --resume RUN then trains without opening a page. A line that cannot be
understood stops the run with its number, before anything is trained. Passed over are lines of
earlier epochs, and a last line without its end, which a kill cut short.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import d3po
from sd import UserError, tables


class Label(NamedTuple):
    """A comparison of images of one batch."""

    chains: Sequence[int]  # rows of the batch that the images came from
    field: str  # what the answer is: "h" of two images, or "bad", tags of K
    answer: int | list[bool] | None  # None: skipped, or an image has no score
    scores: Tensor | None = None  # (S, K) of S scorers; None where people judge


def pareto_preference(scores_a: Tensor, scores_b: Tensor) -> Tensor:
    """Labels h by several scores at once: better is who is worse in none and better in one.

    scores_a, scores_b (S, N): S scores of the first and of the second image of N pairs. Returns
    h (N,): +1, -1, or 0 where neither is better. For S = 1 this is `d3po.preference`.
    """
    h = d3po.preference(scores_a, scores_b)  # (S, N)
    first = (h >= 0).all(0) & (h > 0).any(0)
    second = (h <= 0).all(0) & (h < 0).any(0)
    return first.long() - second.long()


def pairs_from_labels(labels: list[Label]) -> Tensor:
    """Rows (winner, loser) (P, 2) of a batch, int64, for the losses of d3po.py.

    Ties and skips give no row; of tags every good image beats every bad one of its group.
    Paper: Alg. 1 lines 12-22; tags: Sec. 5.2.
    """
    pairs = [torch.empty(0, 2, dtype=torch.long)]
    for label in labels:
        if label.answer is not None:
            is_tags = label.field == "bad"
            pairs_from = d3po.pairs_from_tags if is_tags else d3po.pairs_from_feedback
            pairs.append(torch.tensor(label.chains)[pairs_from(torch.tensor([label.answer]))])
    return torch.cat(pairs)


def pairs_of_group(group: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of a group of K to ask people about: each image with the next, in a circle.

    K questions, not K (K - 1) / 2, which nobody wants to answer: 1, 3, 4, 5 for K = 2, 3, 4, 5.
    """
    K = len(group)
    circle = {tuple(sorted((k, (k + 1) % K))) for k in range(K)}
    return [(group[a], group[b]) for a, b in sorted(circle)]


def scores_from_labels(labels: list[Label], cond: Tensor) -> Tensor | None:
    """The score (B,) of each chain of a batch, for methods that see scores.

    None where people gave the labels, or several scorers; the batch's mean for an image without a
    score, which then is neither good nor bad. cond (B,): of the batch, for its device.
    """
    scores = torch.full(cond.shape, math.nan, device=cond.device)
    for label in labels:
        if label.scores is None or len(label.scores) > 1:
            return None
        scores[list(label.chains)] = label.scores[0].to(scores)
    return scores.where(scores.isfinite(), scores.nanmean().nan_to_num())


def label_row(label: Label, epoch: int, *, prompts: list[str], images: list[str]) -> dict:
    """A label as a line of labels.jsonl; prompts, images: of each chain of its batch."""
    scores = None
    if label.scores is not None:
        rows = label.scores.T.tolist()  # of each image
        values = [[score if math.isfinite(score) else None for score in row] for row in rows]
        scores = values if len(label.scores) > 1 else [score for (score,) in values]
    return {
        "epoch": epoch,
        "prompt": prompts[label.chains[0]],
        "images": [images[k] for k in label.chains],
        "scores": scores,
        label.field: label.answer,
    }


def answer_field(question: dict) -> str:
    """The key of the answer: "bad" for tags of a group, "h" for a pair."""
    return "bad" if "bad" in question else "h"


def has_preference(row: dict) -> bool:
    """Whether a label says that one of its images is better than another."""
    answer = row[answer_field(row)]
    return len(set(answer)) > 1 if isinstance(answer, list) else bool(answer)


def validate_answer(question: dict, answer) -> str | None:
    """What is wrong with an answer, as JSON gave it, in a sentence; None if good or a skip."""
    field = answer_field(question)
    if answer is None:
        return None
    if field == "h":
        valid = type(answer) is int and answer in (1, -1, 0)
        wanted = "1, -1, 0"
    else:
        K = len(question["images"])
        valid = isinstance(answer, list) and [type(bad) for bad in answer] == [bool] * K
        wanted = f"a list of {K} booleans"
    return None if valid else f"'{field}' is {answer!r:.60}: give {wanted} or null"


def read_labels(file: Path, questions: list[dict]) -> dict[tuple, dict]:
    """The answers to questions of one epoch in a label file, each checked.

    questions: lines of the file whose answer is null. Returns, for the images of each question as a
    tuple, {annotator, or None without a name: h, or bad, or None where skipped}. Raises UserError,
    with file and line.
    """
    by_images = {frozenset(question["images"]): question for question in questions}
    answers = {tuple(question["images"]): {} for question in questions}
    for number, line in enumerate(whole_lines(file).split(b"\n")[:-1], 1):
        try:
            row = parse_line(line)
            if row["epoch"] < questions[0]["epoch"]:
                continue  # it was checked when its epoch was
            question = find_question(row, by_images)
            answer = parse_answer(row, question)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from error
        answers[tuple(question["images"])][row.get("annotator")] = answer
    return answers


def whole_lines(file: Path) -> bytes:
    """A file up to its last line end: what a kill cut short is left out. Empty without a file."""
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def parse_line(line: bytes) -> dict:
    """A line of the file, with the fields that every line has. Raises ValueError otherwise."""
    row = tables.parse_json(line)
    if not isinstance(row, dict):
        raise ValueError('this is not a JSON object such as {"epoch": 3, ...}')
    for field, kind in {"epoch": int, "prompt": str, "images": list}.items():
        if field not in row:
            raise ValueError(f"'{field}' is missing")
        if type(row[field]) is not kind:
            raise ValueError(f"'{field}' is {row[field]!r:.60}, which is no {kind.__name__}")
    return row


def find_question(row: dict, by_images: dict[frozenset, dict]) -> dict:
    """The question that a line answers. Raises ValueError where there is none."""
    images = row["images"]
    question = by_images.get(frozenset(map(str, images)))
    if not question or len(images) != len(question["images"]) or row["epoch"] != question["epoch"]:
        raise ValueError(f"epoch {row['epoch']} asks nothing about the images {images!r:.200}")
    if row["prompt"] != question["prompt"]:
        raise ValueError(f"the prompt is {row['prompt']!r:.60}, not {question['prompt']!r}")
    return question


def parse_answer(row: dict, question: dict) -> int | list[bool] | None:
    """The answer of a line, turned to the order of the question's images. Raises ValueError."""
    field = answer_field(question)
    if field not in row:
        raise ValueError(f"'{field}' is missing")
    answer, annotator = row[field], row.get("annotator")
    if problem := validate_answer(question, answer):
        raise ValueError(problem)
    if not isinstance(annotator, str | None):
        raise ValueError(f"'annotator' is {annotator!r:.60}, which is no name")
    if answer is None or row["images"] == question["images"]:
        return answer
    if field == "h":
        return -answer
    return [answer[row["images"].index(image)] for image in question["images"]]


def majority(question: dict, answers: list) -> int | list[bool]:
    """What several people say together.

    h is what most gave, and 0 in a draw; an image is bad where more than half say so. Who skipped
    (None) has no vote; where all did, there is no preference: 0, or no image bad.
    """
    votes = [answer for answer in answers if answer is not None]
    if answer_field(question) == "bad":
        images = range(len(question["images"]))
        return [2 * sum(vote[k] for vote in votes) > len(votes) for k in images]
    ranked = Counter(votes).most_common()
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return 0
    return ranked[0][0]


def fleiss_kappa(votes: list[list]) -> float:
    """Fleiss' kappa of two annotators or more: 1 is full agreement, 0 what chance would give.

        kappa = (agreement - expected_agreement) / (1 - expected_agreement)

    agreement: the share of pairs of votes on one item that agree, averaged over items;
    expected_agreement: the sum of squared shares of the answers. votes: for each item the votes it
    was given; an item with fewer than two does not count. NaN where all votes are the same. This is
    not Cohen's kappa, as nothing says that the same people answered every question.
    """
    counts = [Counter(item) for item in votes if len(item) > 1]
    answers = sum(counts, Counter())
    if len(answers) < 2:
        return math.nan
    expected_agreement = sum(n * n for n in answers.values()) / answers.total() ** 2
    agreeing = [
        sum(n * (n - 1) for n in item.values()) / (item.total() * (item.total() - 1))
        for item in counts
    ]
    agreement = sum(agreeing) / len(counts)
    return (agreement - expected_agreement) / (1 - expected_agreement)

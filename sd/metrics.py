"""What labels, scores and log-probs say: accuracy, margin, KL, win rate, and a line to read."""

import math
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sd import files
from sd.labels import has_preference, pareto_preference

TIED_EPOCHS = 3  # in a row in which no label says which image is better, after which a run stops
KL_LIMIT = 30  # nats in the steps trained, about where the emoji model loses its animals
# After these the accuracy should be above chance, in the mean over the epochs, or the win rate be
MANY_LABELS, MANY_EPOCHS, GOOD_WIN_RATE = 100, 10, 0.6
WATCHED_FALL = 0.1  # of the watched score's size


class EvalResult(NamedTuple):
    """N images of fixed prompts and noises, and what the scorers think of them."""

    images: list[Image.Image]
    prompts: list[str]
    scores: Tensor  # (S, N) of the S scorers, NaN: none given; (0, N) where people judge
    watched: float | None  # mean of the scorer that is only reported
    kl: float | None = None  # of their chains to the initial model's, in the steps trained, nats

    @property
    def score(self) -> float | None:
        """Mean of the first scorer."""
        return mean_and_error(self.scores[0])[0] if len(self.scores) else None

    def as_row(self) -> dict:
        """Under the names of metrics.jsonl."""
        return {"eval_score": self.score, "watched": self.watched}


class LogRatios(NamedTuple):
    """Of a batch: log(pi_theta / pi_initial) of whole chains, nats."""

    winners: list[float]  # of each pair, in the steps trained
    losers: list[float]
    trained: list[float]  # of each chain, in the steps trained
    chains: list[float]  # of each chain, in all steps


def log_ratios(log_ratio: Tensor, pairs: Tensor, trained_steps: int) -> LogRatios:
    """log_ratio (T, B), pairs (P, 2): (winner, loser). Python's floats: mps has no float64."""
    chains = log_ratio.sum(0).tolist()
    trained = log_ratio[:trained_steps].sum(0).tolist()
    winners, losers = ([trained[k] for k in side] for side in pairs.T.tolist())
    return LogRatios(winners, losers, trained, chains)


def preference_metrics(batches: list[LogRatios], beta: float) -> dict:
    """Does a model prefer the winners, and do they gain probability, or do only losers lose it?

    Returns means over the pairs of all batches; None without a pair.
    """
    winners = [ratio for batch in batches for ratio in batch.winners]
    losers = [ratio for batch in batches for ratio in batch.losers]
    if not winners:
        return dict.fromkeys(("accuracy", "margin", "log_ratio_winners", "log_ratio_losers"))
    right = [winner > loser for winner, loser in zip(winners, losers, strict=True)]
    return {
        "accuracy": fmean(right),
        "margin": beta * (fmean(winners) - fmean(losers)),
        "log_ratio_winners": fmean(winners),
        "log_ratio_losers": fmean(losers),
    }


def kl(batches: list[LogRatios]) -> dict:
    """Estimate of the KL to the initial model, nats: of all steps, and of those trained.

    batches: of a policy's own chains; none, and there is no estimate.
    """
    chains = [ratio for batch in batches for ratio in batch.chains]
    trained = [ratio for batch in batches for ratio in batch.trained]
    return {
        "kl": fmean(chains) if chains else None,
        "kl_trained": fmean(trained) if trained else None,
    }


def mean_score(rows: list[dict]) -> dict:
    """Mean of the first scorer over the images of labels, and its standard error.

    None where people gave the labels, or a file, or no image has a score.
    """
    scores = [math.nan if first is None else first for first, *_ in scores_by_image(rows)]
    score, error = mean_and_error(torch.tensor(scores, dtype=torch.float64))
    return {"score": score, "score_sem": error}


def scores_by_image(rows: list[dict]) -> list[list[float | None]]:
    """The scores of each image of labels, one of each scorer; empty where people judge."""
    by_image = {}
    for row in rows:
        if row["scores"] is not None:
            by_image |= zip(row["images"], row["scores"], strict=True)
    return [score if isinstance(score, list) else [score] for score in by_image.values()]


def bad_share(rows: list[dict]) -> float | None:
    """Share of the images that people tagged as bad; None without tags."""
    tags = [bad for row in rows for bad in row.get("bad") or []]
    return sum(tags) / len(tags) if tags else None


def mean_and_error(scores: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Mean of scores (N,) and its standard error, without those that are NaN; None if all are."""
    scores = scores[scores.isfinite()]
    if len(scores) == 0:
        return None, None
    deviation = scores.std(correction=min(1, len(scores) - 1)).item()
    return scores.mean().item(), deviation / len(scores) ** 0.5


def label_counts(rows: list[dict]) -> dict:
    """How many labels of an epoch say which image is better, and how many images have no score.

    And the share of images that were tagged bad. rows: lines of labels.jsonl; None for all where
    there are none, as in a pass over --labels.
    """
    if not rows:
        return {"preferences": None, "unscored": None, "bad_share": None}
    unscored = sum(None in scores for scores in scores_by_image(rows))
    preferences = sum(map(has_preference, rows))
    return {"preferences": preferences, "unscored": unscored, "bad_share": bad_share(rows)}


def nothing_to_learn(run: Path) -> str | None:
    """Why a run cannot go on, where no label of its last TIED_EPOCHS epochs says what is better."""
    last = files.read_lines(run / "metrics.jsonl")[-TIED_EPOCHS:]
    if [row.get("preferences") for row in last] != [0] * TIED_EPOCHS:
        return None
    return (
        f"No label of the epochs {last[0]['epoch']} to {last[-1]['epoch']} says which image is "
        f"better, so there is nothing to learn: compare {run / 'labels.jsonl'} with its images, "
        "and give another --objective if this one cannot tell them apart"
    )


def win_rate(h: Tensor) -> dict:
    """Share of comparisons h (N,) that the first wins, ties half, and its 95 % Wilson interval."""
    n, z = len(h), 1.96
    if n == 0:
        return {"pairs": 0, "win_rate": None, "win_rate_interval": None}
    share = (h.double().mean().item() + 1) / 2
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    interval = [round(end / (1 + z * z / n), 12) for end in (middle - half, middle + half)]
    return {"pairs": n, "win_rate": share, "win_rate_interval": interval}


def win_rate_vs_reference(tuned: EvalResult, initial: EvalResult) -> dict:
    """Tuned against initial model, image by image: their win rate, and each one's means.

    The win rate is that of the images to which all scorers gave a score. Where people judge there
    is only the watched score.
    """
    result = {}
    if len(tuned.scores):
        known = tuned.scores.isfinite().all(0) & initial.scores.isfinite().all(0)
        h = pareto_preference(tuned.scores[:, known], initial.scores[:, known])
        result = {**win_rate(h), "unscored": len(known) - len(h)}
    for name, found in (("initial", initial), ("tuned", tuned)):
        result[name] = {"watched": found.watched}
        if len(found.scores):
            score, error = mean_and_error(found.scores[0])
            result[name] |= {"score": score, "score_sem": error}
    return result


def eval_row(now: EvalResult | None, initial: EvalResult) -> dict:
    """What metrics.jsonl says of held-out noises; None where they were not evaluated or scored."""
    if now is None:
        return dict.fromkeys(("eval_score", "eval_win_rate", "watched", "eval_kl"))
    won = win_rate_vs_reference(now, initial)["win_rate"] if len(now.scores) else None
    return {**now.as_row(), "eval_win_rate": won, "eval_kl": now.kl}


def peak_memory_mb(device: torch.device) -> float | None:
    """The most that tensors took on a CUDA GPU so far, or the process in main memory, MB.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1e3  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def format_metrics(row: dict, epochs: int, initial: dict) -> str:
    """A row of metrics.jsonl as a line to read, and a warning where the model seems to break."""
    parts = [f"epoch {row['epoch']}/{epochs}"]
    if row["score"] is not None:
        parts.append(f"score {row['score']:.3f} ± {row['score_sem']:.3f}")
    if row["eval_score"] is not None:
        parts.append(f"held out {with_initial(row, initial, 'eval_score')}")
    if row["eval_win_rate"] is not None:
        parts.append(f"win rate {row['eval_win_rate']:.0%}")
    if row["watched"] is not None:
        parts.append(f"watched {with_initial(row, initial, 'watched')}")
    if row["unscored"]:
        parts.append(f"{row['unscored']} images without a score, in no label")
    if row["accuracy"] is not None:
        winners, losers = row["log_ratio_winners"], row["log_ratio_losers"]
        parts.append(f"accuracy {row['accuracy']:.0%}")
        parts.append(f"log-ratio of winners {winners:+.2f}, losers {losers:+.2f}")
    if row["kl"] is not None:
        parts.append(f"KL {row['kl']:.1f}, of it {row['kl_trained']:.1f} in the steps trained")
    if row["eval_kl"] is not None:
        parts.append(f"KL of the held-out images {row['eval_kl']:.1f}")
    parts.append(f"{row['seconds_sample']:.0f} + {row['seconds_train']:.0f} s")
    if row["skipped"]:
        parts.append(f"{row['skipped']} updates skipped, their gradient overflowed")
    return "; ".join([*parts, *(f"WARNING: {warning}" for warning in row["warnings"])])


def with_initial(row: dict, initial: dict, key: str) -> str:
    before = "has none" if initial[key] is None else f"{initial[key]:.3f}"
    return f"{row[key]:.3f} (initial {before})"


def warnings(row: dict, initial: dict, earlier: list[dict]) -> list[str]:
    """What a row of metrics.jsonl says of a model that breaks, or that learns nothing.

    initial: the initial model's scores; earlier: the rows before.
    """
    found = []
    if row["preferences"] == 0:
        found.append("no label says which image is better: all are ties, skips or without a score")
    if (row["log_ratio_winners"] or 0) < 0:
        found.append("winners lose probability too; try a larger --beta or a smaller --lr")
    if max(row["kl_trained"] or 0, row["eval_kl"] or 0) > KL_LIMIT:
        found.append(f"KL to the initial model above {KL_LIMIT} nats; look at progress.png")
    recent = [*earlier, row][-MANY_EPOCHS:]
    accuracies = [r["accuracy"] for r in recent if r["accuracy"] is not None]
    wins = any((r["eval_win_rate"] or 0) > GOOD_WIN_RATE for r in recent)
    at_chance = len(accuracies) == MANY_EPOCHS and fmean(accuracies) <= 0.5 and not wins
    if at_chance and row["labels"] >= MANY_LABELS:
        found.append(
            f"accuracy at chance after {row['labels']} labels: nothing is learned from them; try "
            "a larger --lr, or clearer labels"
        )
    watched, before = row["watched"], initial["watched"]
    known = None not in (watched, before)
    if known and watched < before - WATCHED_FALL * abs(before):
        found.append(f"the watched score fell from {before:.3g} to {watched:.3g}")
    return found

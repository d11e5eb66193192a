"""What labels, scores and log-probs say: accuracy, margin, KL, win rate, and a line for people."""

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
from sd.options import PEOPLE
from sd.scorers import measure_of

TIED_EPOCHS = 3  # in a row in which no label says which image is better, after which a run stops
KL_LIMIT = 30  # nats in the steps trained, about where the emoji model loses its animals
# After these the accuracy should be above chance, in the mean over the epochs, or the win rate be
MANY_LABELS, MANY_EPOCHS, GOOD_WIN_RATE = 100, 10, 0.6
WATCHED_FALL = 0.1  # of the watched score's size


class EvalResult(NamedTuple):
    """N images of fixed prompts and starting noise, and what the scorers think of them."""

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
    """Log-ratios of a batch, log(pi_theta / pi_initial) of chains, nats."""

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


def pooled(batches: list[LogRatios], name: str) -> list[float]:
    return [ratio for batch in batches for ratio in getattr(batch, name)]


def mean(values: list) -> float | None:
    return fmean(values) if values else None


def preference_metrics(batches: list[LogRatios], beta: float) -> dict:
    """Does a model prefer the winners, and do they gain probability, or do only losers lose it?

    Returns means over the pairs of all batches; None without a pair.
    """
    winners, losers = pooled(batches, "winners"), pooled(batches, "losers")
    right = [winner > loser for winner, loser in zip(winners, losers, strict=True)]
    return {
        "accuracy": mean(right),
        "margin": beta * (fmean(winners) - fmean(losers)) if winners else None,
        "log_ratio_winners": mean(winners),
        "log_ratio_losers": mean(losers),
    }


def kl(batches: list[LogRatios]) -> dict:
    """Estimate of the KL to the initial model, nats: of all steps, and of those trained.

    batches: of a policy's own chains; none, and there is no estimate.
    """
    return {"kl": mean(pooled(batches, "chains")), "kl_trained": mean(pooled(batches, "trained"))}


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


def mean_and_error(scores: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Mean of scores (N,) and its standard error, without those that are NaN; None if all are."""
    scores = scores[scores.isfinite()]
    if len(scores) == 0:
        return None, None
    deviation = scores.std(correction=min(1, len(scores) - 1)).item()
    return scores.mean().item(), deviation / len(scores) ** 0.5


def label_counts(rows: list[dict]) -> dict:
    """How many labels of an epoch say which image is better, how many images have no score.

    And the share of images that were tagged bad. rows: lines of labels.jsonl, none in a pass over
    --labels; None for what they do not tell.
    """
    if not rows:
        return {"preferences": None, "unscored": None, "bad_share": None}
    tags = [bad for row in rows for bad in row.get("bad") or []]
    return {
        "preferences": sum(map(has_preference, rows)),
        "unscored": sum(None in scores for scores in scores_by_image(rows)),
        "bad_share": mean(tags),
    }


def nothing_to_learn(run: Path, objective: str | None) -> str | None:
    """Why a run cannot go on, where no label of its last TIED_EPOCHS epochs says what is better."""
    last = files.read_lines(run / "metrics.jsonl")[-TIED_EPOCHS:]
    if [row.get("preferences") for row in last] != [0] * TIED_EPOCHS:
        return None
    return (
        f"No label of {epoch_word(objective)}s {last[0]['epoch']} to {last[-1]['epoch']} says "
        "which image is better, so there is nothing to learn: compare "
        f"{run / 'labels.jsonl'} with its images, "
        "and give another --objective if this one cannot tell them apart"
    )


def win_rate(h: Tensor) -> dict:
    """Share of comparisons h (N,) that the first wins, ties half, and its 95 % interval."""
    if len(h) == 0:
        return {"pairs": 0, "win_rate": None, "win_rate_interval": None}
    share = (h.double().mean().item() + 1) / 2
    return {"pairs": len(h), "win_rate": share, "win_rate_interval": wilson(share, len(h))}


def wilson(share: float, n: int) -> list[float]:
    """Wilson's 95 % interval of a share of n."""
    z = 1.96
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [round(end / (1 + z * z / n), 12) for end in (middle - half, middle + half)]


def win_rate_vs_reference(tuned: EvalResult, initial: EvalResult) -> dict:
    """Tuned against initial model, image by image: their win rate, and each one's means.

    The win rate, which people's answers alone do not give, is of images with all scores.
    """
    result = {}
    if len(tuned.scores):
        scored = tuned.scores.isfinite().all(0) & initial.scores.isfinite().all(0)
        h = pareto_preference(tuned.scores[:, scored], initial.scores[:, scored])
        result = {**win_rate(h), "unscored": len(scored) - len(h)}
    for name, side in (("initial", initial), ("tuned", tuned)):
        result[name] = {"watched": side.watched}
        if len(side.scores):
            score, error = mean_and_error(side.scores[0])
            result[name] |= {"score": score, "score_sem": error}
    return result


def eval_row(now: EvalResult | None, initial: EvalResult) -> dict:
    """What metrics.jsonl says of held-out images; None where they were not evaluated or scored."""
    result = win_rate_vs_reference(now, initial) if now else {}
    return {
        **(now.as_row() if now else {"eval_score": None, "watched": None}),
        "eval_win_rate": result.get("win_rate"),
        "eval_pairs": result.get("pairs"),
        "eval_kl": now.kl if now else None,
    }


def peak_memory_mb(device: torch.device) -> float | None:
    """The most that tensors took on a CUDA GPU so far, or the process in main memory, MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1e3  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def format_metrics(
    row: dict,
    last_epoch: int,
    initial: dict,
    *,
    objective: str = "score",
    watch: str = "watched score",
    max_kl: float | None = None,
) -> str:
    """A row of metrics.jsonl in lines for people: the epoch, what was measured, warnings.

    initial: the initial model's scores; objective, watch, max_kl: as in config.json.
    """
    measure, share = measure_of(objective), row["eval_win_rate"]
    sampling, training = row["seconds_sample"], row["seconds_train"]
    first = [f"{epoch_word(objective)} {row['epoch']} of {last_epoch}"]
    if row["score"] is not None:
        first.append(f"New images: {measure.say(row['score'])}")
    first.append(f"{sampling:.0f} s of sampling, {training:.0f} s of training")
    lines = []
    if row["eval_score"] is not None:
        better = "" if share is None else f", {percent(share)} better"
        held_out = measure.say(row["eval_score"], initial["eval_score"])
        lines.append(f"Held-out images: {held_out}{better}")
    if row["watched"] is not None:
        lines.append(measure_of(watch).say(row["watched"], initial["watched"]))
    if row["accuracy"] is not None:
        share = percent(row["accuracy"])
        lines.append(f"Before training on the new labels the model agreed with {share} of them")
    lines.append(describe_kl(row, max_kl))
    if row["unscored"]:
        lines.append(f"Images without a score, in no label: {row['unscored']}")
    if row["skipped"]:
        lines.append(f"Updates skipped, as their gradient overflowed: {row['skipped']}")
    lines += [f"WARNING: {warning}" for warning in row["warnings"]]
    return "\n  ".join([" ".join(map(as_sentence, first)), *map(as_sentence, filter(None, lines))])


def describe_kl(row: dict, max_kl: float | None) -> str | None:
    """The KL that --max-kl limits; without a limit that of new images. None where there is none.

    Its estimate may be below 0, which no KL is.
    """
    kl = row["eval_kl"] if max_kl else row["kl_trained"]
    if kl is None:
        return None
    place = f"of at most {max_kl:g} nats" if max_kl else "nats, of new images in the steps trained"
    return f"The KL to the initial model is {max(kl, 0):.1f} {place}"


def epoch_word(objective: str | None) -> str:
    """How an epoch is called to who reads of it."""
    return "round" if objective in PEOPLE else "epoch"


def count(number: int, word: str) -> str:
    """A number of things: 1 epoch, 2 epochs."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def as_sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def warnings(row: dict, initial: dict, earlier: list[dict]) -> list[str]:
    """What a row of metrics.jsonl says of a model that breaks, or that learns nothing.

    initial: the initial model's scores; earlier: the rows before.
    """
    kl = row["kl_trained"] if row["eval_kl"] is None else row["eval_kl"]
    watched, before = row["watched"], initial["watched"]
    recent = [*earlier, row][-MANY_EPOCHS:]
    accuracies = [r["accuracy"] for r in recent if r["accuracy"] is not None]
    wins = any((r["eval_win_rate"] or 0) > GOOD_WIN_RATE for r in recent)
    at_chance = len(accuracies) == MANY_EPOCHS and fmean(accuracies) <= 0.5 and not wins
    sentences = []
    if row["preferences"] == 0:
        sentences.append("no label says which image is better: all are ties, skips or unscored")
    if (row["log_ratio_winners"] or 0) < 0:
        sentences.append(
            "the preferred images become less likely too: try a larger --beta or a smaller --lr"
        )
    if (kl or 0) > KL_LIMIT:
        sentences.append(
            f"the KL to the initial model is above {KL_LIMIT} nats: images may be broken, look at "
            "progress.png"
        )
    if at_chance and row["labels"] >= MANY_LABELS:
        sentences.append(
            f"after {row['labels']} labels the model agrees with new ones no better than chance: "
            "try a larger --lr, or clearer labels"
        )
    if None not in (watched, before) and watched < before - WATCHED_FALL * abs(before):
        sentences.append(
            f"what --watch measures fell from {before:.3g} to {watched:.3g}: the model loses "
            "something that the labels do not see"
        )
    return sentences

"""Figures of a run of sd_demo.py, drawn from what it stored."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from sd import files

NUM_FIGURE_IMAGES = 8  # held-out images that a run keeps at each evaluation
NUM_PROGRESS_ROWS = 6


def held_out_file(run: Path, epoch: int, number: int) -> Path:
    """Where an evaluation keeps an image. Epoch 0 is the initial model."""
    return run / f"images/held_out_e{epoch:03}_{number}.png"


def held_out_numbers(run: Path, epoch: int) -> list[int]:
    """The images that an evaluation kept."""
    return [n for n in range(NUM_FIGURE_IMAGES) if held_out_file(run, epoch, n).exists()]


def held_out_images(run: Path, epoch: int) -> list[Image.Image]:
    """Those of an evaluation; none where one of them cannot be read."""
    numbers = held_out_numbers(run, epoch)
    images = [open_image(held_out_file(run, epoch, n)) for n in numbers]
    return [] if None in images else images


def open_image(file: Path) -> Image.Image | None:
    """A picture; None where it is not there, or was cut short."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # of PIL, for what is no PNG
        return None


def draw_run(run: Path) -> list[Path]:
    """Draw a run; return the paths.

    reward_curve.png; progress.png and before_after.png, where the last epoch was evaluated.
    """
    config = files.read_json(run / "config.json")
    rows = files.read_lines(run / "metrics.jsonl")
    numbers = held_out_numbers(run, 0)
    kept = [row for row in rows if held_out_numbers(run, row["epoch"]) == numbers != []]
    evaluated = [{"epoch": 0, **config["initial"]}, *kept]
    curves = draw_curves(rows, evaluated, config, run / "reward_curve.png")
    if kept[-1:] != rows[-1:]:  # the pictures show no other images than before
        return [curves]

    evenly = np.linspace(0, len(evaluated) - 1, NUM_PROGRESS_ROWS)
    chosen = [evaluated[n]["epoch"] for n in sorted({round(n) for n in evenly})]
    images = {epoch: found for epoch in chosen if (found := held_out_images(run, epoch))}
    if not (0 in images and len(images) > 1):
        return [curves]
    names = [f"epoch {epoch}" if epoch else "initial" for epoch in images]
    progress = draw_rows(list(images.values()), names, run / "progress.png")
    pairs = draw_pairs(images[0], images[max(images)], run / "before_after.png")
    return [curves, progress, pairs]


def draw_curves(rows: list[dict], evaluated: list[dict], config: dict, path: Path) -> Path:
    """Score, KL and the watched score over the epochs; where people judge, what they say.

    rows: metrics.jsonl; evaluated: those with held-out images, first the initial model's.
    """
    panels = [draw_score if evaluated[0]["eval_score"] is not None else draw_people, draw_kl]
    panels += [draw_watched] if evaluated[0]["watched"] is not None else []
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for draw, axis in zip(panels, axes[0], strict=True):
        draw(axis, rows, evaluated, config)
        axis.set(xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return save_figure(figure, path)


def draw_score(axis, rows: list[dict], evaluated: list[dict], config: dict) -> None:
    epochs, score, sem = (column(rows, key) for key in ("epoch", "score", "score_sem"))
    axis.plot(epochs, score, color="0.5", linewidth=1, label="training images, ± s.e.")
    axis.fill_between(epochs, score - sem, score + sem, color="0.85")
    held_out = column(evaluated, "epoch"), column(evaluated, "eval_score")
    axis.plot(*held_out, "ko-", markersize=4, label="held-out noises")
    axis.axhline(evaluated[0]["eval_score"], color="black", linestyle=":", label="initial model")
    axis.set(ylabel=f"score: {config['objective']}")
    axis.legend()


def draw_people(axis, rows: list[dict], evaluated: list[dict], config: dict) -> None:
    curves = {  # key of metrics.jsonl: line, name
        "accuracy": ("ko-", "accuracy before training"),
        "eval_win_rate": ("k^--", "win rate"),
        "bad_share": ("ks:", "share of images tagged bad"),
    }
    for key, (line, name) in curves.items():
        values = column(rows, key)
        known = ~np.isnan(values)
        if known.any():
            axis.plot(column(rows, "epoch")[known], values[known], line, markersize=4, label=name)
    axis.axhline(0.5, color="0.6", linewidth=1, label="accuracy of chance")
    axis.set(ylabel="share", ylim=(-0.02, 1.02))
    axis.legend()


def draw_kl(axis, rows: list[dict], evaluated: list[dict], config: dict) -> None:
    epochs = column(rows, "epoch")
    axis.plot(epochs, column(rows, "kl"), color="0.5", linewidth=1, label="all steps")
    axis.plot(epochs, column(rows, "kl_trained"), "k-", label="steps trained on")
    if config.get("max_kl"):
        held_out = column(evaluated, "epoch"), column(evaluated, "eval_kl")
        axis.plot(*held_out, "ko-", markersize=4, label="held out")
        axis.axhline(config["max_kl"], color="black", linestyle=":", label="--max-kl")
    axis.set(ylabel="KL to the initial model (nats an image)", ylim=(0, None))
    axis.legend(loc="upper left")


def draw_watched(axis, rows: list[dict], evaluated: list[dict], config: dict) -> None:
    axis.plot(column(evaluated, "epoch"), column(evaluated, "watched"), "ko-", markersize=4)
    axis.set(ylabel=f"watched: {Path(config['watch']).name}")
    axis.margins(y=0.1)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))


def column(rows: list[dict], key: str) -> np.ndarray:
    """The values of a key; NaN, which is not drawn, where a row has none."""
    return np.array([row.get(key) for row in rows], dtype=float)


def draw_pairs(before: list[Image.Image], after: list[Image.Image], path: Path) -> Path:
    """Images of the initial above those of the tuned model, from the same prompts and noises."""
    return draw_rows([before[:16], after[:16]], ["initial", "tuned"], path)


def draw_rows(rows: list[list[Image.Image]], names: list[str], path: Path) -> Path:
    """Rows of images with a name each, in one picture."""
    columns = len(rows[0])
    size = (1.3 * columns, 1.35 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for images, name, line in zip(rows, names, axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.subplots_adjust(0.03, 0.01, 0.99, 0.99, wspace=0.03, hspace=0.03)
    return save_figure(figure, path)


def save_figure(figure: plt.Figure, path: Path) -> Path:
    files.replace(path, lambda part: figure.savefig(part, format="png", dpi=110))
    plt.close(figure)
    return path

"""Figures of a run of sd_demo.py, drawn from what it stored."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from sd import run_folder

NUM_FIGURE_IMAGES = 8  # held-out images that a run keeps at each evaluation
NUM_PROGRESS_ROWS = 6


def held_out_file(run: Path, epoch: int, number: int) -> Path:
    """Where an evaluation keeps an image. Epoch 0 is the initial model."""
    return run / f"images/held_out_e{epoch:03}_{number}.png"


def held_out_images(run: Path, epoch: int) -> list[Image.Image]:
    return [open_image(path) for path in sorted(run.glob(f"images/held_out_e{epoch:03}_*.png"))]


def open_image(file: Path) -> Image.Image | None:
    """A picture; None where it is not there, or was cut short."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # of PIL, for what is no PNG
        return None


def draw_run(run: Path) -> list[Path]:
    """Draw reward_curve.png, progress.png and before_after.png of a run; return their paths."""
    config = run_folder.read_json(run / "config.json")
    rows = run_folder.read_lines(run / "metrics.jsonl")
    evaluated = [row for row in rows if held_out_file(run, row["epoch"], 0).exists()]
    evaluated = [{"epoch": 0, **config["initial"]}, *evaluated]
    curves = draw_curves(rows, evaluated, config, run / "reward_curve.png")

    epochs = [row["epoch"] for row in evaluated]
    evenly = np.linspace(0, len(epochs) - 1, NUM_PROGRESS_ROWS)
    chosen = [epochs[n] for n in sorted({round(n) for n in evenly})]
    names = [f"epoch {epoch}" if epoch else "initial" for epoch in chosen]
    images = [held_out_images(run, epoch) for epoch in chosen]
    progress = draw_rows(images, names, run / "progress.png")
    return [curves, progress, draw_pairs(images[0], images[-1], run / "before_after.png")]


def draw_curves(rows: list[dict], evaluated: list[dict], config: dict, path: Path) -> Path:
    """Score, KL and the watched score over the epochs; without scores where people judge.

    rows: metrics.jsonl; evaluated: those with held-out images, first the initial model's.
    """
    initial = evaluated[0]
    epochs = [row["epoch"] for row in rows]
    eval_epochs = [row["epoch"] for row in evaluated]
    scored, watched = (initial[key] is not None for key in ("eval_score", "watched"))
    columns = 1 + scored + watched
    figure, grid = plt.subplots(
        1, columns, figsize=(5 * columns, 3.6), layout="constrained", squeeze=False
    )
    axes = iter(grid[0])
    if scored:
        axis = next(axes)
        score, sem = (column(rows, key) for key in ("score", "score_sem"))
        axis.plot(epochs, score, color="0.5", linewidth=1, label="training images, ± s.e.")
        axis.fill_between(epochs, score - sem, score + sem, color="0.85")
        held_out = [row["eval_score"] for row in evaluated]
        axis.plot(eval_epochs, held_out, "ko-", markersize=4, label="held-out noises")
        axis.axhline(initial["eval_score"], color="black", linestyle=":", label="initial model")
        axis.set(xlabel="epoch", ylabel=f"score: {config['objective']}")
        axis.legend()
    axis = next(axes)
    axis.plot(epochs, column(rows, "kl"), color="0.5", linewidth=1, label="all steps")
    axis.plot(epochs, column(rows, "kl_trained"), "k-", label="steps trained on")
    if config.get("max_kl"):
        axis.plot(eval_epochs, column(evaluated, "eval_kl"), "ko-", markersize=4, label="held out")
        axis.axhline(config["max_kl"], color="black", linestyle=":", label="--max-kl")
    axis.set(xlabel="epoch", ylabel="KL to the initial model (nats an image)", ylim=(0, None))
    axis.legend()
    if watched:
        axis = next(axes)
        axis.plot(eval_epochs, [row["watched"] for row in evaluated], "ko-", markersize=4)
        axis.set(xlabel="epoch", ylabel=f"watched: {Path(config['watch']).name}")
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    return save_figure(figure, path)


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
    run_folder.replace(path, lambda part: figure.savefig(part, format="png", dpi=110))
    plt.close(figure)
    return path

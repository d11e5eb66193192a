"""Figures of a run of sd_demo.py, drawn from what it stored."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sd import files
from sd.metrics import epoch_word
from sd.scorers import measure_of

if TYPE_CHECKING:  # a figure is drawn long after a command line is read
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_FIGURE_IMAGES = 8  # held-out images that a run keeps at each evaluation
NUM_PROGRESS_ROWS = 6
WIDTH, DPI = 6, 160  # inches, and dots an inch: at 700 pixels, a README's width, text is readable
TILE = 128  # pixels of an image in a row
ABOVE_DATA = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1), "borderaxespad": 0}
LEGEND = ABOVE_DATA | {"frameon": False, "ncols": 3, "fontsize": 9, "columnspacing": 1.2}


def held_out_file(run: Path, epoch: int, number: int) -> Path:
    """Where an evaluation keeps an image. Epoch 0 is the initial model."""
    return run / f"images/held_out_e{epoch:03}_{number}.png"


def held_out_numbers(run: Path, epoch: int) -> list[int]:
    """The images that an evaluation kept."""
    return [n for n in range(NUM_FIGURE_IMAGES) if held_out_file(run, epoch, n).exists()]


def held_out_images(run: Path, epoch: int) -> list[Image.Image]:
    """The images of an evaluation that can be read."""
    paths = [held_out_file(run, epoch, n) for n in held_out_numbers(run, epoch)]
    return [image for path in paths if (image := open_image(path))]


def open_image(file: Path) -> Image.Image | None:
    """A picture; None where it is not there, or was cut short."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # of PIL, for what is no PNG
        return None


def draw_run(run: Path) -> list[Path]:
    """Draw a run; return the paths.

    reward_curve.png; and progress.png, where the last epoch was evaluated.
    """
    config = files.read_json(run / "config.json")
    rows = files.read_lines(run / "metrics.jsonl")
    evaluated = [row for row in rows if held_out_numbers(run, row["epoch"])]
    evaluated = [{"epoch": 0, **config["initial"]}, *evaluated]
    curves = draw_curves(rows, evaluated, config, run / "reward_curve.png")
    if evaluated[-1] not in rows[-1:]:  # the pictures show no other images than before
        return [curves]
    shown = evenly_apart(evaluated)
    images = [held_out_images(run, row["epoch"]) for row in shown]
    names = [row_name(row, config) for row in shown]
    return [curves, draw_rows(images, names, run / "progress.png")]


def evenly_apart(evaluated: list[dict]) -> list[dict]:
    """At most NUM_PROGRESS_ROWS of them: the first, the last, and others as far from each other."""
    step = -(-(len(evaluated) - 1) // (NUM_PROGRESS_ROWS - 1)) or 1
    return evaluated[:1] + evaluated[:0:-step][::-1]


def row_name(row: dict, config: dict) -> str:
    """When an evaluation was, and its score or win rate."""
    name = f"{epoch_word(config['objective'])} {row['epoch']}" if row["epoch"] else "before"
    if row["eval_score"] is not None:
        return f"{name}\n{measure_of(config['objective']).show(row['eval_score'])}"
    return name


# Curves


def draw_curves(rows: list[dict], evaluated: list[dict], config: dict, path: Path) -> Path:
    """Score, KL and the watched score over the epochs; where people judge, what they say.

    rows: metrics.jsonl; evaluated: those with held-out images, first the initial model's.
    """
    from matplotlib.figure import Figure

    panels = [draw_score if evaluated[0]["eval_score"] is not None else draw_people]
    panels += [draw_watched] if evaluated[0]["watched"] is not None else []
    panels += [draw_kl]
    figure = Figure(figsize=(WIDTH, 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True)
    for draw, axis in zip(panels, axes, strict=True):
        name = draw(axis, rows, evaluated, config)
        axis.set_ylabel(textwrap.fill(name, 28))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(**LEGEND)
    axis.set_xlabel(epoch_word(config["objective"]))
    axis.xaxis.get_major_locator().set_params(integer=True)
    return save_figure(figure, path)


def draw_score(axis: "Axes", rows: list[dict], evaluated: list[dict], config: dict) -> str:
    """Returns what the panel shows, with its unit."""
    measure = measure_of(config["objective"])
    epochs, error = column(rows, "epoch"), column(rows, "score_sem")
    score = measure.factor * column(rows, "score")
    axis.plot(epochs, score, color="0.5", linewidth=1, label="new images, ± standard error")
    axis.fill_between(epochs, score - error, score + error, color="0.85")
    held_out = measure.factor * column(evaluated, "eval_score")
    axis.plot(column(evaluated, "epoch"), held_out, "ko-", markersize=4, label="held-out images")
    axis.axhline(held_out[0], color="black", linestyle=":", label="before training")
    return measure.name


def draw_people(axis: "Axes", rows: list[dict], evaluated: list[dict], config: dict) -> str:
    for key, line, name in (
        ("accuracy", "ko-", "model agreed with new answers"),
        ("bad_share", "ks:", "images tagged bad"),
    ):
        if values := [(row["epoch"], 100 * row[key]) for row in rows if row.get(key) is not None]:
            axis.plot(*zip(*values, strict=True), line, markersize=4, label=name)
    axis.axhline(50, color="0.6", linewidth=1, label="agreement by chance")
    axis.set_ylim(-2, 102)
    return "share (%)"


def draw_kl(axis: "Axes", rows: list[dict], evaluated: list[dict], config: dict) -> str:
    """The KL that --max-kl limits, and the limit; without a limit that of new images."""
    if config.get("max_kl"):
        kl = [0.0, *column(evaluated[1:], "eval_kl")]
        axis.plot(column(evaluated, "epoch"), kl, "ko-", markersize=4)
        axis.axhline(config["max_kl"], color="black", linestyle=":", label="limit (--max-kl)")
        axis.set_ylim(0, 1.05 * config["max_kl"])
        return "KL of held-out images to the initial model (nats)"
    axis.plot(column(rows, "epoch"), column(rows, "kl_trained"), "k-")
    axis.set_ylim(bottom=0)
    return "KL of new images to the initial model (nats)"


def draw_watched(axis: "Axes", rows: list[dict], evaluated: list[dict], config: dict) -> str:
    measure = measure_of(config["watch"])
    watched = measure.factor * column(evaluated, "watched")
    axis.plot(column(evaluated, "epoch"), watched, "ko-", markersize=4)
    axis.margins(y=0.1)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    return measure.name


def column(rows: list[dict], key: str) -> np.ndarray:
    """The values of a key; NaN, which is not drawn, where a row has none."""
    return np.array([row.get(key) for row in rows], dtype=float)


# Images


def draw_pairs(before: list[Image.Image], after: list[Image.Image], path: Path) -> Path:
    """Images of the initial above those of the tuned model, from the same prompts and noise."""
    rows = [side[first : first + 8] for first in (0, 8) for side in (before, after) if side[first:]]
    return draw_rows(rows, ["before", "after"] * (len(rows) // 2), path)


def draw_rows(rows: list[list[Image.Image]], names: list[str], path: Path) -> Path:
    """Rows of images with a name each, in one picture."""
    from matplotlib.figure import Figure

    height, gap = round(TILE * rows[0][0].height / rows[0][0].width), TILE // 16
    across, down = len(rows[0]) * (TILE + gap) - gap, len(rows) * (height + gap) - gap
    mosaic = Image.new("RGB", (across, down), "white")
    for n, images in enumerate(rows):
        for k, image in enumerate(images):
            mosaic.paste(image.resize((TILE, height)), (k * (TILE + gap), n * (height + gap)))
    left = 0.14  # of the width, for the names
    figure = Figure(figsize=(WIDTH, (1 - left) * WIDTH * down / across))
    axis = figure.add_axes((left, 0, 1 - left, 1), frame_on=False)
    axis.imshow(mosaic)
    axis.set_xticks([])
    axis.set_yticks([n * (height + gap) + height / 2 for n in range(len(rows))], names)
    axis.tick_params(length=0)
    return save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> Path:
    files.replace(path, lambda part: figure.savefig(part, format="png", dpi=DPI))
    return path

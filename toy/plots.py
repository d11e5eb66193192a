"""Figures of the toy, drawn from the numbers that a run stored.

python -m toy.plots runs/toy        # toy.png of a run of train_toy.py again, and toy.gif
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from toy.worlds import SCORES

HALF_WIDTH = 3.2  # of the part of the plane that is shown
BEST_PLACE = {"reach": (2.0, 0.0)}  # of a score that has one
STYLES = {"eq14": ("tab:orange", "--"), "chain": ("tab:blue", "-"), "eq12": ("tab:green", ":")}
SHOWN = 1000  # points in a panel


def draw_run(run: Path) -> Path:
    """Draw toy.png of a run folder; return its path."""
    path = run / "toy.png"
    run_figure(run).savefig(path, dpi=140)
    return path


def run_figure(run: Path) -> Figure:
    """Samples before, after each loss and of the optimum; below, what the labels bought."""
    config, samples = _load(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    titles = {name: loss["title"] for name, loss in config["loss"].items()}
    panels = {"before": "before", **titles, "optimum": "exact optimum"}

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes = figure.subplot_mosaic([list(panels), ["shares"] * len(panels)], height_ratios=[10, 8])
    for name, title in panels.items():
        _draw_points(axes[name], samples[name][:SHOWN], config["preference"])
        axes[name].set_title(title, fontsize=16)
    _draw_shares(axes["shares"], rows, titles)
    return figure


def draw_animation(run: Path) -> Path:
    """Draw toy.gif of a run folder, a frame an epoch; return its path."""
    config, samples = _load(run)
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(config["loss"]), squeeze=False)[0]
    clouds = {}
    for axis, (name, loss) in zip(axes, config["loss"].items(), strict=True):
        clouds[name] = _draw_points(axis, samples[f"{name}_epochs"][0], config["preference"])
        axis.set_title(loss["title"], fontsize=14)

    title = figure.suptitle("0 labels", fontsize=14)
    frames = []
    for epoch in range(config["epochs"] + 1):
        title.set_text(f"{epoch * config['pairs']:,} labels")
        for name, cloud in clouds.items():
            cloud.set_data(*samples[f"{name}_epochs"][epoch].T)
        canvas.draw()
        figure.set_layout_engine("none")  # that of the first frame, so that nothing moves
        frames.append(np.array(canvas.buffer_rgba())[..., :3])
    height, width, _ = frames[0].shape
    # as one tall picture all frames get the same colours
    tall = Image.fromarray(np.concatenate(frames)).quantize(128, dither=Image.Dither.NONE)
    frames = [tall.crop((0, k * height, width, (k + 1) * height)) for k in range(len(frames))]
    path = run / "toy.gif"
    durations = [800, *[250] * (len(frames) - 2), 2500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


def _load(run: Path) -> tuple[dict, dict]:
    """A run's config.json and samples.npz."""
    config = json.loads((run / "config.json").read_text())
    with np.load(run / "samples.npz") as file:
        return config, {name: file[name] for name in file.files}


def _draw_points(axis, points: np.ndarray, preference: str):
    """Draw points over the score, which a star marks the best place of; return their artist."""
    _plane(axis, preference)
    axis.set(xlabel="", ylabel="", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    if preference in BEST_PLACE:
        star = {"color": "gold", "markeredgecolor": "black", "markersize": 30}
        axis.plot(*BEST_PLACE[preference], "*", **star)
    (cloud,) = axis.plot(*points.T, ".", color="black", markersize=3, alpha=0.45)
    return cloud


def _draw_shares(axis, rows: list[dict], titles: dict[str, str]) -> None:
    """Attained share of each loss against its labels, each curve named at its end."""
    for name, title in titles.items():
        own = [row for row in rows if row["loss_name"] == name]
        labels = [0, *(row["labels"] for row in own)]
        shares = [0, *(row["attained_share"] for row in own)]
        colour, line = STYLES[name]
        axis.plot(labels, shares, line, color=colour, linewidth=2.5)
        axis.annotate(
            f"{title}: {shares[-1]:.2f}",
            (labels[-1], shares[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            fontsize=14,
            va="center",
        )
    axis.plot([0, labels[-1]], [1, 1], color="grey", linewidth=1)
    axis.set_xlim(0, 1.28 * labels[-1])
    axis.set_ylim(top=1.1)
    axis.set_xlabel("labels", fontsize=14)
    axis.set_ylabel("share of the\nbest chain", fontsize=14)
    axis.tick_params(labelsize=12)


def draw_comparison(result: dict, points: dict[str, list] | None, out: Path) -> list[Path]:
    """Draw what toy/compare.py found: score against samples and against KL, and final points.

    points: of every method; without them their figure stays as it is.
    """
    shapes = zip(("o-", "s--", "^:", "D-."), ("-", "--", ":", "-."), strict=True)
    lines = [(*shape, colour) for shape in shapes for colour in colormaps["tab10"].colors[:5]]
    styles = dict(zip(result["methods"], lines, strict=False))
    figures = {
        "compare_score": _score_figure(result, styles),
        "compare_frontier": _frontier_figure(result, styles),
    }
    if points:
        figures["compare_samples"] = _samples_figure(result, points)
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=80)
    return paths


def _score_figure(result: dict, styles: dict) -> Figure:
    """Score against the number of sampled chains, for methods that know labels, or scores."""
    beta = result["settings"]["beta"]
    optimum = next(row for row in result["frontier"] if row["beta"] == beta)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, labels_only in zip(axes, (True, False), strict=True):
        for name, method in result["methods"].items():
            if method["labels_only"] == labels_only and method["curve"]:
                samples = [2 * point["labels"] for point in method["curve"]]
                mean = np.array([point["score"]["mean"] for point in method["curve"]])
                sd = np.array([point["score"]["sd"] for point in method["curve"]])
                _, line, colour = styles[name]
                axis.plot(samples, mean, line, color=colour, label=name)
                axis.fill_between(
                    samples, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0
                )
        axis.axhline(optimum["j_ref"], color="grey", linestyle=":", label="reference")
        axis.axhline(optimum["score_star"], color="black", linestyle=":", label="exact optimum")
        axis.set(xlabel="sampled chains", title="knows labels" if labels_only else "knows scores")
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0].set_ylabel(f"mean score (mean ± sd, {len(result['seeds'])} seeds)")
    figure.suptitle(
        f"Score against samples (the paper's Fig. 3) at each method's best J, beta = {beta:g}"
    )
    return figure


def _frontier_figure(result: dict, styles: dict) -> Figure:
    """Score against KL: the sweep of each method at its best step size, and the exact frontiers."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axis = figure.subplots()
    frontiers = {"star": "exact frontier, all chains", "gauss": "best chains of Gaussian steps"}
    for (kind, label), line in zip(frontiers.items(), ("k-", "k--"), strict=True):
        kls = [row[f"kl_{kind}"] for row in result["frontier"]]
        scores = [row[f"score_{kind}"] for row in result["frontier"]]
        axis.plot(kls, scores, line, label=label)
    for row in result["frontier"]:
        point = (row["kl_star"], row["score_star"])
        axis.annotate(f"{row['beta']:g}", point, fontsize=7, ha="right", va="bottom")
    for name, method in result["methods"].items():
        at_best_lr = [row for row in method["sweep"] if row["lr"] == method["lr"]]
        shown = [row for row in at_best_lr if not row["failed"] and row["kl"] < 8]
        line, _, colour = styles[name]
        kls = [row["kl"] for row in shown]
        scores = [row["score"] for row in shown]
        axis.plot(kls, scores, line, color=colour, label=name)
    axis.set(xlabel="KL to the reference (nats)", ylabel="mean score")
    axis.set_title("What the score costs: a point for each of a sweep's values; numbers: beta")
    figure.legend(loc="outside right center")
    return figure


def _samples_figure(result: dict, points: dict[str, list], columns: int = 5) -> Figure:
    """Final points of every method, over the score."""
    figure = Figure(figsize=(15, 9.3), layout="constrained")
    axes = figure.subplots(math.ceil(len(points) / columns), columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, cloud) in zip(axes.flat, points.items(), strict=False):
        axis.set_axis_on()
        _plane(axis, result["settings"]["preference"])
        cloud = np.array(cloud).reshape(-1, 2)
        axis.plot(*cloud.T, ".", color="black", markersize=2, alpha=0.5)
        axis.set(title=name, xlabel="", ylabel="")
    figure.suptitle(f"Final samples, seed {result['seeds'][0]}")
    return figure


def _plane(axis, preference: str):
    """Draw the contours of a score on the square that all panels share; return them."""
    line = torch.linspace(-HALF_WIDTH, HALF_WIDTH, 121)
    x, y = torch.meshgrid(line, line, indexing="xy")
    score = SCORES[preference](torch.stack([x, y], -1))
    limits = (-HALF_WIDTH, HALF_WIDTH)
    axis.set(xlim=limits, ylim=limits, aspect="equal", xlabel="x (1)", ylabel="y (1)")
    return axis.contourf(x, y, score, levels=12, cmap="Blues", alpha=0.6)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.plots", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of a finished run of train_toy.py")
    run = parser.parse_args(argv).run
    if not (run / "samples.npz").exists():
        parser.error(f"{run} is no finished run of train_toy.py: it has no samples.npz")
    print(draw_run(run), draw_animation(run), sep="\n")


if __name__ == "__main__":
    main()

"""Figures of the toy, drawn from the numbers that a run stored.

python -m toy.plots runs/toy        # toy.png of a run of train_toy.py, again
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from toy.worlds import SCORES

HALF_WIDTH = 3.2  # of the part of the plane that is shown
NUM_CHAINS = 2  # drawn in full


def draw_run(run: Path) -> Path:
    """Draw toy.png of a run folder; return its path."""
    path = run / "toy.png"
    run_figure(run).savefig(path, dpi=80)
    return path


def run_figure(run: Path) -> Figure:
    """The figure of a run folder, from its config.json, metrics.jsonl and samples.npz."""
    config = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with np.load(run / "samples.npz") as file:
        samples = {name: file[name] for name in file.files}

    figure = Figure(figsize=(16, 8.2), layout="constrained")
    axes = figure.subplots(2, 4)
    _draw_samples(axes[0], samples, config["preference"])
    _draw_chains(axes[1, 0], samples, config)
    _draw_curves(axes[1, 1:], rows, config)
    kind = " (rectified flow)" if config.get("model") == "flow" else ""
    figure.suptitle(
        f"D3PO on the {config['mixture']}{kind}: {config['labels']} labels, loss {config['loss']}, "
        f"beta = {config['beta']}, one run, seed {config['seed']}"
    )
    return figure


def _draw_samples(axes, samples: dict, preference: str) -> None:
    """Data, samples before and after, and the density of the optimum, over the score."""
    clouds = {
        "data": samples["data"],
        "before: the reference": samples["before"][-1],
        "after alignment": samples["after"][-1],
    }
    for axis, (title, points) in zip(axes, clouds.items(), strict=False):
        contours = _plane(axis, preference)
        axis.plot(*points.T, ".", color="black", markersize=2, alpha=0.35)
        axis.set_title(title)
    line, density = _density(samples["optimum"][-1])
    levels = density.max() * np.geomspace(0.003, 0.9, 7)
    _plane(axes[3], preference)
    axes[3].contour(line, line, density, levels=levels, colors="black")
    axes[3].set_title("exact optimum (density)")
    label = f"score: {preference}"
    axes[3].figure.colorbar(contours, ax=axes, label=label, shrink=0.8, pad=0.01)


def _draw_chains(axis, samples: dict, config: dict) -> None:
    """Whole chains of the reference and of the policy, from the same noise."""
    _plane(axis, config["preference"])
    for name, style, label in (("before", "k--", "reference"), ("after", "r-", "aligned")):
        for k, chain in enumerate(samples[name][:, :NUM_CHAINS].swapaxes(0, 1)):
            axis.plot(*chain.T, style, linewidth=1, label=label if k == 0 else None)
            axis.plot(*chain[-1], style[0] + "o", markersize=5)
    axis.plot(*samples["before"][0, :NUM_CHAINS].T, "k+", markersize=9, label="$x_T$")
    axis.legend(loc="lower left", fontsize=8)
    axis.set_title(f"chains $x_T \\ldots x_0$ from the same noise (T = {config['num_steps']})")


def _draw_curves(axes, rows: list[dict], config: dict) -> None:
    """Score and KL, accuracy and win rate, and the loss, against the labels used."""
    column = {key: [row[key] for row in rows] for key in rows[0]}
    labels = column["labels"]

    score, kl = axes[0], axes[0].twinx()
    best = config["optimum"]["score_star"]
    lines = score.plot(labels, column["score"], "k-", label="mean score (left)")
    lines += kl.plot(labels, column["kl"], "r--", label="KL to the reference (right)")
    lines += [score.axhline(best, color="k", linestyle=":", label="score, exact optimum")]
    score.set(xlabel="labels used", ylabel="mean score", title="score and KL")
    kl.set_ylabel("KL (nats)")
    score.legend(handles=lines, fontsize=8, loc="lower right")

    accuracy = axes[1]
    label = "new pairs that the policy ranks as labelled"
    accuracy.plot(labels, column["accuracy"], "k-", label=label)
    accuracy.plot(labels, column["win_rate"], "b-.", label="win rate against the reference")
    accuracy.axhline(0.5, color="grey", linestyle=":")
    accuracy.set(xlabel="labels used", ylabel="share", ylim=(0.4, 1.02))
    accuracy.set_title("preference accuracy")
    accuracy.legend(fontsize=8, loc="lower right")

    loss = axes[2]
    label = "log 2 = 0.693: cannot tell winner from loser"
    loss.plot(labels, column["loss"], "k-", label=f"loss ({config['loss']})")
    loss.axhline(math.log(2), color="grey", linestyle=":", label=label)
    loss.set(xlabel="labels used", ylabel="loss (nats)", title="loss")
    loss.margins(y=0.25)
    loss.legend(fontsize=8, loc="upper right")


def draw_comparison(result: dict, points: dict[str, list] | None, out: Path) -> list[Path]:
    """Draw what toy/compare.py found: score against samples and against KL, and final points.

    points: of every method; without them their figure stays as it is.
    """
    shapes = zip(("o-", "s--", "^:"), ("-", "--", ":"), strict=True)
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


def _density(points: np.ndarray, bandwidth: float = 0.08) -> tuple[np.ndarray, np.ndarray]:
    """Kernel estimate of the density of points (N, 2): the axis (G,) of a grid, (G, G) by y, x."""
    line = np.linspace(-HALF_WIDTH, HALF_WIDTH, 161)
    kernels = np.exp(-(((points[:, :, None] - line) / bandwidth) ** 2) / 2)  # (N, 2, G)
    return line, kernels[:, 1].T @ kernels[:, 0] / (len(points) * 2 * np.pi * bandwidth**2)


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
    print(draw_run(run))


if __name__ == "__main__":
    main()

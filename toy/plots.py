"""Figures of a toy run, drawn from the numbers that the run stored: python toy/plots.py runs/toy"""

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file can be run as a script

from toy.worlds import SCORES

REACH, FEW = 3.2, 2  # half the width of the plane shown; chains drawn


def draw_run(run: Path) -> Path:
    """Draw toy.png of a run folder from its config.json, metrics.jsonl and samples.npz; return its path."""
    config = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with np.load(run / "samples.npz") as samples:
        clouds = {name: samples[name] for name in samples.files}

    figure, axes = plt.subplots(2, 4, figsize=(16, 8.2), layout="constrained")
    titles = {"data": "data", "before": "before: the reference", "after": "after alignment"}
    for axis, (name, title) in zip(axes[0], titles.items(), strict=False):
        contours = _plane(axis, config["preference"])
        points = clouds[name] if name == "data" else clouds[name][-1]
        axis.plot(*points.T, ".", color="black", markersize=2, alpha=0.35)
        axis.set_title(title)
    line, density = _density(clouds["optimum"][-1])
    _plane(axes[0, 3], config["preference"])
    axes[0, 3].contour(line, line, density, levels=density.max() * np.geomspace(0.003, 0.9, 7), colors="black")
    axes[0, 3].set_title("exact optimum (density)")
    figure.colorbar(contours, ax=axes[0], label=f"score: {config['preference']}", shrink=0.8, pad=0.01)

    _plane(axes[1, 0], config["preference"])
    for name, style, label in (("before", "k--", "reference"), ("after", "r-", "aligned")):
        for k, chain in enumerate(clouds[name][:, :FEW].swapaxes(0, 1)):
            axes[1, 0].plot(*chain.T, style, linewidth=1, label=label if k == 0 else None)
            axes[1, 0].plot(*chain[-1], style[0] + "o", markersize=5)
    axes[1, 0].plot(*clouds["before"][0, :FEW].T, "k+", markersize=9, label="$x_T$")
    axes[1, 0].legend(loc="lower left", fontsize=8)
    axes[1, 0].set_title(f"chains $x_T \\ldots x_0$ from the same noise (T = {config['num_steps']})")

    labels = [row["labels"] for row in rows]
    score, kl = axes[1, 1], axes[1, 1].twinx()
    lines = score.plot(labels, [row["score"] for row in rows], "k-", label="mean score (left)")
    lines += kl.plot(labels, [row["kl"] for row in rows], "r--", label="KL to the reference (right)")
    lines += [score.axhline(config["optimum"]["score_star"], color="k", linestyle=":", label="score, exact optimum")]
    score.set(xlabel="labels used", ylabel="mean score", title="score and KL")
    kl.set_ylabel("KL (nats)")
    score.legend(handles=lines, fontsize=8, loc="lower right")

    accuracy = axes[1, 2]
    accuracy.plot(labels, [row["accuracy"] for row in rows], "k-", label="new pairs that the policy ranks as labelled")
    accuracy.plot(labels, [row["win_rate"] for row in rows], "b-.", label="win rate against the reference")
    accuracy.axhline(0.5, color="grey", linestyle=":")
    accuracy.set(xlabel="labels used", ylabel="share", ylim=(0.4, 1.02), title="preference accuracy")
    accuracy.legend(fontsize=8, loc="lower right")

    loss = axes[1, 3]
    loss.plot(labels, [row["loss"] for row in rows], "k-", label=f"loss ({config['loss']})")
    loss.axhline(math.log(2), color="grey", linestyle=":", label="log 2 = 0.693: cannot tell winner from loser")
    loss.set(xlabel="labels used", ylabel="loss (nats)", title="loss")
    loss.margins(y=0.25)
    loss.legend(fontsize=8, loc="upper right")

    figure.suptitle(
        f"D3PO on the {config['mixture']}: {config['labels']} labels, loss {config['loss']}, "
        f"beta = {config['beta']}, one run, seed {config['seed']}"
    )
    path = run / "toy.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def draw_comparison(result: dict, points: dict[str, list], out: Path) -> list[Path]:
    """Draw what toy/compare.py found: score against labels, score against KL, and samples; return the paths."""
    styles = [(line, colour) for line in ("-", "--", ":") for colour in plt.get_cmap("tab10").colors[:5]]
    style = dict(zip(result["methods"], styles, strict=False))
    optimum = next(row for row in result["frontier"] if row["beta"] == result["settings"]["beta"])
    seeds = f"{len(result['seeds'])} seeds"

    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained", sharey=True)
    for axis, labels_only in zip(axes, (True, False), strict=True):
        for name, method in result["methods"].items():
            if method["labels_only"] == labels_only and method["curve"]:
                samples = [2 * point["labels"] for point in method["curve"]]
                mean, sd = (np.array([point["score"][k] for point in method["curve"]]) for k in ("mean", "sd"))
                line, colour = style[name]
                axis.plot(samples, mean, line, color=colour, label=name)
                axis.fill_between(samples, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        axis.axhline(optimum["j_ref"], color="grey", linestyle=":", label="reference")
        axis.axhline(optimum["score_star"], color="black", linestyle=":", label="exact optimum")
        axis.set(xlabel="sampled chains", title="knows labels" if labels_only else "knows scores")
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0].set_ylabel(f"mean score (mean ± sd, {seeds})")
    figure.suptitle(f"Score against samples (the paper's Fig. 3) at each method's best J, beta = {optimum['beta']:g}")

    frontier, axis = plt.subplots(figsize=(8.5, 6), layout="constrained")
    for kind, line in (("star", "k-"), ("gauss", "k--")):
        label = {"star": "exact frontier, all chains", "gauss": "best chains of Gaussian steps"}[kind]
        xs, ys = ([row[f"{what}_{kind}"] for row in result["frontier"]] for what in ("kl", "score"))
        axis.plot(xs, ys, line, label=label)
    for row in result["frontier"]:
        axis.annotate(f"{row['beta']:g}", (row["kl_star"], row["score_star"]), fontsize=7, ha="right", va="bottom")
    for name, method in result["methods"].items():
        tried = [row for row in method["sweep"] if row["lr"] == method["lr"] and not row["failed"] and row["kl"] < 8]
        line, colour = style[name]
        xs, ys = ([row[key] for row in tried] for key in ("kl", "score"))
        axis.plot(xs, ys, line, marker="o", color=colour, label=name)
    axis.set(xlabel="KL to the reference (nats)", ylabel="mean score", xlim=(-0.1, 5), title="What the score costs")
    axis.legend(fontsize=7, title="one point for each strength of the sweep; numbers: beta", title_fontsize=7)

    columns = 5
    clouds, panels = plt.subplots(math.ceil(len(points) / columns), columns, figsize=(15, 9.3), layout="constrained")
    for axis in panels.flat:
        axis.set_axis_off()
    for axis, (name, cloud) in zip(panels.flat, points.items(), strict=False):
        axis.set_axis_on()
        _plane(axis, result["settings"]["preference"])
        axis.plot(*np.array(cloud).reshape(-1, 2).T, ".", color="black", markersize=2, alpha=0.5)
        axis.set(title=name, xlabel="", ylabel="")
    clouds.suptitle(f"Final samples, seed {result['seeds'][0]}")

    paths = []
    for name, drawn in (("compare_score", figure), ("compare_frontier", frontier), ("compare_samples", clouds)):
        paths.append(out / f"{name}.png")
        drawn.savefig(paths[-1], dpi=80)
        plt.close(drawn)
    return paths


def draw_curves(run: Path) -> list[Path]:
    """Draw reward_curve.png, progress.png and before_after.png of a run of sd_demo.py from what it stored."""
    config = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    initial, epochs = config["initial"], [row["epoch"] for row in rows]

    def held_out(epoch):
        return [Image.open(path) for path in sorted(run.glob(f"images/held_out_e{epoch:03}_*.png"))]

    looked = [row for row in rows if (run / f"images/held_out_e{row['epoch']:03}_0.png").exists()]
    looked = [{"epoch": 0, **initial}, *looked]
    at = [row["epoch"] for row in looked]

    scored, watched = initial["eval_score"] is not None, initial["watched"] is not None  # people give no score
    columns = 1 + scored + watched
    figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 3.6), layout="constrained", squeeze=False)
    axes = iter(axes[0])
    if scored:
        axis, (score, sem) = next(axes), (np.array([row[key] for row in rows]) for key in ("score", "score_sem"))
        axis.plot(epochs, score, color="0.5", linewidth=1, label="training images, ± s.e.")
        axis.fill_between(epochs, score - sem, score + sem, color="0.85")
        axis.plot(at, [row["eval_score"] for row in looked], "ko-", markersize=4, label="held-out noises")
        axis.axhline(initial["eval_score"], color="black", linestyle=":", label="initial model")
        axis.set(xlabel="epoch", ylabel=f"score: {config['objective']}")
        axis.legend()
    axis = next(axes)
    axis.plot(epochs, [row["kl"] for row in rows], color="0.5", linewidth=1, label="all steps")
    axis.plot(epochs, [row["kl_trained"] for row in rows], "k-", label="steps trained on")
    axis.set(xlabel="epoch", ylabel="KL to the initial model (nats an image)", ylim=(0, None))
    axis.legend()
    if watched:
        axis = next(axes)
        axis.plot(at, [row["watched"] for row in looked], "ko-", markersize=4)
        axis.set(xlabel="epoch", ylabel=f"watched: {Path(config['watch']).name}")
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    figure.savefig(run / "reward_curve.png", dpi=110)
    plt.close(figure)

    chosen = [at[n] for n in sorted({round(n) for n in np.linspace(0, len(at) - 1, 6)})]
    names = {epoch: f"epoch {epoch}" if epoch else "initial" for epoch in chosen}
    return [
        run / "reward_curve.png",
        _sheet([held_out(epoch) for epoch in chosen], list(names.values()), run / "progress.png"),
        draw_pairs(held_out(0), held_out(at[-1]), run / "before_after.png"),
    ]


def draw_pairs(before: list[Image.Image], after: list[Image.Image], path: Path) -> Path:
    """Images of the initial above those of the tuned model, from the same prompts and noises."""
    return _sheet([before[:16], after[:16]], ["initial", "tuned"], path)


def draw_cost(curves: dict, title: str, path: Path) -> Path:
    """Peak memory against T, from what tests/bench_sd.py found: points, and the line through them up to T = 20."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, peaks), style in zip(curves["peak_gb"].items(), ("ko-", "k^--", "kx:", "rs-."), strict=True):
        T, peak = zip(*((T, peak) for T, peak in zip(curves["T"], peaks, strict=True) if peak is not None), strict=True)
        slope, start = np.polyfit(T, peak, 1) if len(T) > 1 else (0, peak[0])
        said = f"{slope:.2g} GB a step" if slope > 0.01 * peak[0] else f"{peak[0]:.2g} GB"
        axis.plot(T, peak, style[:2], label=f"{name}: {said}", markersize=9 if "x" in style else 6)
        axis.plot((T[0], 20), (slope * T[0] + start, slope * 20 + start), style[0] + style[2:], linewidth=1)
    if axis.get_ylim()[1] > 50:
        axis.axhline(100, color="0.6", linewidth=1)
        axis.text(2, 100, 'the paper on whole chains: "more than 100 GB"', fontsize=8, color="0.3", va="bottom")
    axis.set(xlabel="T, steps of the chain", ylabel="peak memory in training (GB)", title=title, xticks=range(2, 21, 2))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.92))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _sheet(rows: list[list[Image.Image]], names: list[str], path: Path) -> Path:
    """Rows of images with a name each, in one picture."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(1.3 * len(rows[0]), 1.35 * len(rows)), squeeze=False)
    for images, name, line in zip(rows, names, axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.subplots_adjust(0.03, 0.01, 0.99, 0.99, 0.03, 0.03)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _density(points: np.ndarray, bandwidth: float = 0.08) -> tuple[np.ndarray, np.ndarray]:
    """Kernel estimate of the density of points (N, 2): the axis (G,) of a grid, and the density there (G, G), row y."""
    line = np.linspace(-REACH, REACH, 161)
    kernels = np.exp(-(((points[:, :, None] - line) / bandwidth) ** 2) / 2)  # (N, 2, G)
    return line, kernels[:, 1].T @ kernels[:, 0] / (len(points) * 2 * np.pi * bandwidth**2)


def _plane(axis, preference: str):
    """Draw the contours of a score on the square that all panels share; return them."""
    line = torch.linspace(-REACH, REACH, 121)
    x, y = torch.meshgrid(line, line, indexing="xy")
    contours = axis.contourf(x, y, SCORES[preference](torch.stack([x, y], -1)), levels=12, cmap="Blues", alpha=0.6)
    axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xlabel="x (1)", ylabel="y (1)")
    return contours


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    if len(sys.argv) != 2 or not (folder / "samples.npz").exists():
        sys.exit("usage: python toy/plots.py RUN, where RUN is the folder of a finished run of train_toy.py")
    print(draw_run(folder))

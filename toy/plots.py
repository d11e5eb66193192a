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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file can be run as a script

from toy.worlds import SCORES

REACH = 3.2  # half the width of the plane shown


def draw_run(run: Path) -> Path:
    """Draw toy.png of a run folder from its config.json, metrics.jsonl and samples.npz; return its path."""
    config = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with np.load(run / "samples.npz") as samples:
        clouds = {name: samples[name] for name in samples.files}

    figure, axes = plt.subplots(2, 4, figsize=(16, 8.2), layout="constrained")
    titles = {"data": "data", "before": "before: the reference", "after": "after alignment", "optimum": "exact optimum"}
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        contours = _plane(axis, config["preference"])
        points = clouds[name] if name == "data" else clouds[name][-1]
        axis.plot(*points.T, ".", color="black", markersize=2, alpha=0.35)
        axis.set_title(title)
    figure.colorbar(contours, ax=axes[0], label=f"score: {config['preference']}", shrink=0.8, pad=0.01)

    _plane(axes[1, 0], config["preference"])
    for name, style, label in (("before", "k--", "reference"), ("after", "r-", "aligned")):
        for k, chain in enumerate(clouds[name][:, :4].swapaxes(0, 1)):
            axes[1, 0].plot(*chain.T, style, linewidth=1, label=label if k == 0 else None)
            axes[1, 0].plot(*chain[-1], style[0] + "o", markersize=5)
    axes[1, 0].plot(*clouds["before"][0, :4].T, "k+", markersize=9, label="$x_T$")
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
    loss.legend(fontsize=8)

    figure.suptitle(
        f"D3PO on the {config['mixture']}: {config['labels']} labels, loss {config['loss']}, "
        f"beta = {config['beta']}, one run, seed {config['seed']}"
    )
    path = run / "toy.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _plane(axis, preference: str):
    """Draw the contours of a score on the square that all panels share; return them."""
    line = torch.linspace(-REACH, REACH, 121)
    x, y = torch.meshgrid(line, line, indexing="xy")
    contours = axis.contourf(x, y, SCORES[preference](torch.stack([x, y], -1)), levels=12, cmap="Blues", alpha=0.6)
    axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xlabel="x (1)", ylabel="y (1)")
    return contours


if __name__ == "__main__":
    print(draw_run(Path(sys.argv[1])))

"""The figure of a run, drawn from a folder that no run has made."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from toy import plots


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    config = {
        "mixture": "grid", "preference": "avoid", "labels": "greedy", "loss": "chain", "beta": 0.5, "seed": 3,
        "num_steps": 4, "optimum": {"score_star": -0.1, "score_gauss": -0.2},
    }  # fmt: skip
    rows = [
        {"epoch": n, "score": -1 / n, "kl": n / 10, "win_rate": 0.6, "on_data": 0.9, "attained_share": 0.1 * n,
         "accuracy": 0.7, "margin": 0.1, "loss": 0.69, "labels": 10 * n}
        for n in (1, 2, 3)
    ]  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chains = {name: rng.normal(size=(5, 20, 2)) for name in ("before", "after", "optimum")}
    np.savez(tmp_path / "samples.npz", data=rng.normal(size=(20, 2)), **chains)
    return tmp_path


def figure_of(run, monkeypatch):
    """The figure that draw_run saves, left open."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plots.draw_run(run)
    return plt.gcf()


def test_the_figure_is_drawn_from_stored_numbers(run):
    stored, open_before = {path.name for path in run.iterdir()}, plt.get_fignums()
    path = plots.draw_run(run)
    assert path == run / "toy.png" and path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in run.iterdir()} == stored | {"toy.png"}
    pixels = plt.imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000 and pixels.std() > 0.05
    assert plt.get_fignums() == open_before  # figures are closed: a notebook may draw many


def test_curves_are_the_stored_columns_over_labels(run, monkeypatch):
    figure = figure_of(run, monkeypatch)
    curves = [line for axis in figure.axes for line in axis.get_lines() if list(line.get_xdata()) == [10, 20, 30]]
    drawn = [list(line.get_ydata()) for line in curves]
    for column in ([-1, -1 / 2, -1 / 3], [0.1, 0.2, 0.3], [0.7] * 3, [0.6] * 3, [0.69] * 3):
        assert column in drawn
    plt.close(figure)


def test_every_panel_names_what_it_shows(run, monkeypatch):
    figure = figure_of(run, monkeypatch)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == 8
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in panels)
    title = figure._suptitle.get_text()
    assert all(word in title for word in ("grid", "greedy", "chain", "0.5", "seed 3"))
    plt.close(figure)


def test_one_epoch_is_enough(run):
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(rows[0] + "\n")
    assert plots.draw_run(run).exists()

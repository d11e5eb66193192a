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
        "mixture": "grid",
        "preference": "avoid",
        "labels": "greedy",
        "loss": "chain",
        "beta": 0.5,
        "seed": 3,
        "num_steps": 4,
        "optimum": {"score_star": -0.1, "score_gauss": -0.2},
    }
    rows = [
        {
            "epoch": n,
            "score": -1 / n,
            "kl": n / 10,
            "win_rate": 0.6,
            "on_data": 0.9,
            "attained_share": 0.1 * n,
            "accuracy": 0.7,
            "margin": 0.1,
            "loss": 0.69,
            "labels": 10 * n,
        }
        for n in (1, 2, 3)
    ]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chains = {name: rng.normal(size=(5, 20, 2)) for name in ("before", "after", "optimum")}
    np.savez(tmp_path / "samples.npz", data=rng.normal(size=(20, 2)), **chains)
    return tmp_path


def test_the_figure_is_drawn_from_stored_numbers(run, capsys):
    stored, open_before = {path.name for path in run.iterdir()}, plt.get_fignums()
    plots.main([str(run)])
    path = run / "toy.png"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in run.iterdir()} == stored | {"toy.png"}
    pixels = plt.imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000 and pixels.std() > 0.05
    assert plt.get_fignums() == open_before  # a notebook may draw many


def test_curves_are_the_stored_columns_over_labels(run):
    lines = [line for axis in plots.run_figure(run).axes for line in axis.get_lines()]
    drawn = [list(line.get_ydata()) for line in lines if list(line.get_xdata()) == [10, 20, 30]]
    for column in ([-1, -1 / 2, -1 / 3], [0.1, 0.2, 0.3], [0.7] * 3, [0.6] * 3, [0.69] * 3):
        assert column in drawn


def test_every_panel_names_what_it_shows(run):
    figure = plots.run_figure(run)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == 8
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in panels)
    title = figure._suptitle.get_text()
    assert all(word in title for word in ("grid", "greedy", "chain", "0.5", "seed 3"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": "flow"}))
    assert "flow" in plots.run_figure(run)._suptitle.get_text() and "flow" not in title


def test_one_epoch_is_enough(run):
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(rows[0] + "\n")
    assert len(plots.run_figure(run).axes) == 10  # eight panels, a second axis, a colour bar


def test_a_folder_without_samples_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        plots.main([str(tmp_path)])
    assert stop.value.code == 2 and "samples.npz" in capsys.readouterr().err

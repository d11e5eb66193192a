"""The figures of a run, drawn from a folder that no run has made."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from toy import plots

SHARES = {"eq14": [0.1, 0.2, 0.3], "chain": [0.4, 0.6, 0.9]}


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    config = {
        "preference": "reach",
        "loss": {"eq14": {"title": "Eq. 14"}, "chain": {"title": "whole chain"}},
        "epochs": 3,
        "pairs": 10,
    }
    rows = [
        {"loss_name": name, "attained_share": share, "labels": 10 * n}
        for name, shares in SHARES.items()
        for n, share in enumerate(shares, 1)
    ]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = {name: rng.normal(size=(20, 2)) for name in ("before", *SHARES, "optimum")}
    epochs = {f"{name}_epochs": rng.normal(size=(4, 20, 2)) for name in SHARES}
    np.savez(tmp_path / "samples.npz", **points, **epochs)
    return tmp_path


def test_figure_and_animation_are_drawn_from_stored_numbers(run, capsys):
    stored, open_before = {path.name for path in run.iterdir()}, plt.get_fignums()
    plots.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'toy.png'}\n{run / 'toy.gif'}\n"
    assert {path.name for path in run.iterdir()} == stored | {"toy.png", "toy.gif"}
    pixels = plt.imread(run / "toy.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000 and pixels.std() > 0.05
    with Image.open(run / "toy.gif") as movie:
        assert movie.n_frames == 4 and movie.width == 700
    assert plt.get_fignums() == open_before  # a notebook may draw many


def test_panels_and_curves_show_the_stored_numbers(run):
    figure = plots.run_figure(run)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["before", "Eq. 14", "whole chain", "exact optimum"]
    samples = np.load(run / "samples.npz")
    for axis, name in zip(panels.values(), ("before", *SHARES, "optimum"), strict=True):
        star, cloud = axis.get_lines()
        assert star.get_marker() == "*" and star.get_xydata().tolist() == [[2, 0]]
        assert np.array_equal(cloud.get_xydata(), samples[name])
    curves = figure.axes[-1]
    assert curves.get_xlabel() and curves.get_ylabel()
    for line, text, shares in zip(curves.get_lines(), curves.texts, SHARES.values(), strict=False):
        assert list(line.get_xdata()) == [0, 10, 20, 30]
        assert list(line.get_ydata()) == [0, *shares]
        assert text.get_text().endswith(f"{shares[-1]:.2f}")


def test_one_loss_and_a_preference_without_a_best_place(run):
    config = json.loads((run / "config.json").read_text())
    config |= {"preference": "avoid", "loss": {"chain": {"title": "whole chain"}}}
    (run / "config.json").write_text(json.dumps(config))
    figure = plots.run_figure(run)
    assert [len(axis.get_lines()) for axis in figure.axes] == [1, 1, 1, 2]
    plots.draw_animation(run)


def test_a_folder_without_samples_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        plots.main([str(tmp_path)])
    assert stop.value.code == 2 and "samples.npz" in capsys.readouterr().err

"""Figures of a run, drawn from a folder that no run has made."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from sd import figures, files

ROW = {"score": -2.0, "score_sem": 0.1, "kl": 1.0, "kl_trained": 0.5, "watched": 0.25}


def picture(grey: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (grey,) * 3)


@pytest.fixture
def run(tmp_path):
    """Three epochs, of which the first has no evaluation."""
    (tmp_path / "images").mkdir()
    config = {"objective": "compressibility", "watch": "a/classifier.py:recognised"}
    config["initial"] = {"eval_score": -5.0, "watched": 0.5}
    files.save_json(tmp_path / "config.json", config)
    rows = [
        ROW | {"epoch": 1, "score": -3.0, "kl": 2.0, "eval_score": None, "watched": None},
        ROW | {"epoch": 2, "score": -2.0, "kl": 3.0, "eval_score": -1.5},
        ROW | {"epoch": 3, "score": -1.0, "kl": 4.0, "eval_score": -1.0},
    ]
    files.save_lines(tmp_path / "metrics.jsonl", rows)
    for epoch in (0, 2, 3):
        for n in (0, 1):
            picture(50 * epoch + 10 * n).save(figures.held_out_file(tmp_path, epoch, n))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """Figures are left open, to read what is in them."""
    close, opened = plt.close, []
    monkeypatch.setattr(plt, "close", opened.append)
    yield opened
    for figure in opened:
        close(figure)


def lines(axis) -> list[tuple]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]


def test_figures_are_drawn_from_stored_numbers_and_closed(run):
    stored, open_before = {path.name for path in run.iterdir()}, plt.get_fignums()
    paths = figures.draw_run(run)
    assert [path.name for path in paths] == ["reward_curve.png", "progress.png", "before_after.png"]
    assert {path.name for path in run.iterdir()} == stored | {path.name for path in paths}
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and plt.imread(path).std() > 0.05
    assert plt.get_fignums() == open_before


def test_curves_are_the_stored_columns_over_the_epochs(run, drawn):
    figures.draw_run(run)
    score, kl, watched = drawn[0].axes
    training, held_out, initial = lines(score)
    assert training == ([1, 2, 3], [-3, -2, -1])
    assert held_out == ([0, 2, 3], [-5, -1.5, -1]) and initial[1] == [-5, -5]
    assert lines(kl) == [([1, 2, 3], [2, 3, 4]), ([1, 2, 3], [0.5] * 3)]
    assert lines(watched) == [([0, 2, 3], [0.5, 0.25, 0.25])]
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() for axis in drawn[0].axes)
    assert "compressibility" in score.get_ylabel() and "nats" in kl.get_ylabel()
    assert "recognised" in watched.get_ylabel()


def test_pictures_are_the_held_out_ones_of_each_evaluation(run, drawn):
    figures.draw_run(run)
    rows = [axis.get_ylabel() for axis in drawn[1].axes[::2]]
    assert rows == ["initial", "epoch 2", "epoch 3"]
    greys = [axis.images[0].get_array()[0, 0, 0] for axis in drawn[1].axes]
    assert greys == [0, 10, 100, 110, 150, 160]
    greys = [axis.images[0].get_array()[0, 0, 0] for axis in drawn[2].axes]
    assert greys == [0, 10, 150, 160]  # the initial model, and the last


def test_pictures_are_drawn_where_the_last_epoch_was_evaluated(run, drawn, monkeypatch):
    opened, read = [], figures.open_image
    monkeypatch.setattr(figures, "open_image", lambda file: opened.append(file) or read(file))
    rows = files.read_lines(run / "metrics.jsonl")
    not_evaluated = ROW | {"epoch": 4, "eval_score": None, "watched": None}
    files.save_lines(run / "metrics.jsonl", [*rows, not_evaluated])
    assert [path.name for path in figures.draw_run(run)] == ["reward_curve.png"]
    assert lines(drawn[0].axes[0])[0][0] == [1, 2, 3, 4] and not opened
    files.save_lines(run / "metrics.jsonl", rows)
    assert len(figures.draw_run(run)) == 3 and len(opened) == 3 * 2


def test_where_people_judge_there_is_no_score_to_draw(run, drawn):
    config = files.read_json(run / "config.json")
    config["initial"] = {"eval_score": None, "watched": None}
    files.save_json(run / "config.json", config)
    no_score = {"score": None, "score_sem": None, "eval_score": None, "watched": None}
    rows = [row | no_score for row in files.read_lines(run / "metrics.jsonl")]
    files.save_lines(run / "metrics.jsonl", rows)
    figures.draw_run(run)
    share, kl = drawn[0].axes
    assert "share" in share.get_ylabel() and "KL" in kl.get_ylabel()


def test_where_people_judge_their_answers_are_drawn(run, drawn):
    rows = files.read_lines(run / "metrics.jsonl")
    for row, accuracy, bad in zip(rows, (None, 0.75, 0.5), (0.5, 0.25, 0.0), strict=True):
        row |= {"accuracy": accuracy, "bad_share": bad, "eval_win_rate": None}
    files.save_lines(run / "metrics.jsonl", rows)
    config = files.read_json(run / "config.json")
    config["initial"] = {"eval_score": None, "watched": None}
    files.save_json(run / "config.json", config)
    figures.draw_run(run)
    accuracy, bad, chance = lines(drawn[0].axes[0])
    assert accuracy == ([2, 3], [0.75, 0.5]) and bad == ([1, 2, 3], [0.5, 0.25, 0])
    assert set(chance[1]) == {0.5}


def test_no_figure_shows_a_model_that_was_not_drawn(run):
    for file in run.glob("images/held_out_e00[23]_*"):
        file.unlink()
    assert [path.name for path in figures.draw_run(run)] == ["reward_curve.png"]
    assert not (run / "progress.png").exists() and not (run / "before_after.png").exists()


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_an_evaluation_that_lost_an_image_is_left_out(run, drawn, harm, epoch):
    harm(figures.held_out_file(run, epoch, 1))
    figures.draw_run(run)
    if epoch == 0 or (epoch == 3 and harm is Path.unlink):
        assert len(drawn) == 1  # there is nothing to compare with, or nothing new
        return
    left = {2: "epoch 3", 3: "epoch 2"}[epoch]
    assert [axis.get_ylabel() for axis in drawn[1].axes[::2]] == ["initial", left]


def test_a_limit_of_the_kl_is_drawn_with_the_kl_that_it_limits(run, drawn):
    config = files.read_json(run / "config.json") | {"max_kl": 40.0}
    files.save_json(run / "config.json", config)
    rows = files.read_lines(run / "metrics.jsonl")
    rows = [
        row | {"kl": None, "kl_trained": None, "score": None, "score_sem": None} for row in rows
    ]
    for row in rows:
        row["eval_kl"] = 10.0 * row["epoch"] if row["eval_score"] is not None else None
    files.save_lines(run / "metrics.jsonl", rows)  # as the images of a file leave them
    figures.draw_run(run)
    *_, held_out, limit = lines(drawn[0].axes[1])
    assert held_out[0] == [0, 2, 3] and held_out[1][1:] == [20, 30] and limit[1] == [40, 40]


def test_a_long_run_has_six_rows_evenly_apart(run, drawn, monkeypatch):
    rows = [ROW | {"epoch": epoch, "eval_score": -1.0} for epoch in range(1, 21)]
    files.save_lines(run / "metrics.jsonl", rows)
    for epoch in range(1, 21):
        picture(epoch).save(figures.held_out_file(run, epoch, 0))
    for path in run.glob("images/*_1.png"):
        path.unlink()
    opened, read = [], figures.open_image
    monkeypatch.setattr(figures, "open_image", lambda file: opened.append(file) or read(file))
    figures.draw_run(run)
    assert len(opened) == 6  # no others are read
    names = [axis.get_ylabel() for axis in drawn[1].axes]
    assert names == ["initial", *(f"epoch {epoch}" for epoch in (4, 8, 12, 16, 20))]


def test_pairs_of_many_images_are_the_first_sixteen(tmp_path, drawn):
    path = figures.draw_pairs([picture(0)] * 20, [picture(255)] * 20, tmp_path / "pairs.png")
    assert len(drawn[0].axes) == 32
    assert [axis.get_ylabel() for axis in drawn[0].axes[::16]] == ["initial", "tuned"]
    image = np.asarray(Image.open(path))
    assert image.shape[1] > 4 * image.shape[0]

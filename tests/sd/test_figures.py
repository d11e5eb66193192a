"""Figures of a run, drawn from a folder that no run has made."""

from pathlib import Path

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
    config = {"objective": "compressibility", "watch": "a/scorers.py:sharp_edges"}
    config["initial"] = {"eval_score": -5.0, "watched": 0.5}
    files.save_json(tmp_path / "config.json", config)
    rows = [
        ROW | {"epoch": 1, "score": -3.0, "kl_trained": 2.0, "eval_score": None, "watched": None},
        ROW | {"epoch": 2, "score": -2.0, "kl_trained": 3.0, "eval_score": -1.5},
        ROW | {"epoch": 3, "score": -1.0, "kl_trained": 4.0, "eval_score": -1.0},
    ]
    files.save_lines(tmp_path / "metrics.jsonl", rows)
    for epoch in (0, 2, 3):
        for n in (0, 1):
            picture(50 * epoch + 10 * n).save(figures.held_out_file(tmp_path, epoch, n))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """Figures, by the names of their files, in place of the files."""
    by_name = {}
    monkeypatch.setattr(figures, "save_figure", lambda f, path: by_name.update({path.name: f}))
    return by_name


def change(run: Path, config: dict, rows: list[dict]) -> None:
    """Replace some of what a run stored."""
    files.save_json(run / "config.json", files.read_json(run / "config.json") | config)
    stored = files.read_lines(run / "metrics.jsonl")
    files.save_lines(run / "metrics.jsonl", [a | b for a, b in zip(stored, rows, strict=True)])


def lines(axis) -> list[tuple]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]


def row_names(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def greys(figure) -> list[list[int]]:
    """Of the images of each row, from the pixels of the mosaic."""
    (image,) = figure.axes[0].images
    pixels, side = np.asarray(image.get_array())[..., 0], figures.TILE
    step = side + figures.TILE // 16
    return pixels[side // 2 :: step, side // 2 :: step].tolist()


def test_figures_are_files_drawn_from_stored_numbers(run):
    stored = {path.name for path in run.iterdir()}
    paths = figures.draw_run(run)
    assert [path.name for path in paths] == ["reward_curve.png", "progress.png"]
    assert {path.name for path in run.iterdir()} == stored | {path.name for path in paths}
    for path in paths:
        image = Image.open(path)
        assert image.format == "PNG" and image.width == figures.WIDTH * figures.DPI
        assert np.asarray(image.convert("L")).std() > 5


def test_curves_are_the_stored_columns_over_the_epochs(run, drawn):
    figures.draw_run(run)
    score, watched, kl = drawn["reward_curve.png"].axes
    new, held_out, initial = lines(score)
    assert new == ([1, 2, 3], [3, 2, 1])  # kB, of minus kB
    assert held_out == ([0, 2, 3], [5, 1.5, 1]) and initial[1] == [5, 5]
    assert lines(watched) == [([0, 2, 3], [0.5, 0.25, 0.25])]
    assert lines(kl) == [([1, 2, 3], [2, 3, 4])]
    assert score.get_ylabel() == "JPEG size (kB)" and watched.get_ylabel() == "sharp edges"
    assert "new images" in kl.get_ylabel() and "nats" in kl.get_ylabel()
    assert kl.get_xlabel() == "epoch"
    for axis in (score, watched, kl):
        if legend := axis.get_legend():
            assert legend.get_window_extent().y0 >= axis.get_window_extent().y1  # above the data


def test_a_limit_is_drawn_with_the_kl_that_it_limits(run, drawn):
    no_new_images = {"kl": None, "kl_trained": None, "score": None, "score_sem": None}
    change(run, {"max_kl": 40.0}, [no_new_images | {"eval_kl": kl} for kl in (None, 20.0, 30.0)])
    figures.draw_run(run)
    held_out, limit = lines(drawn["reward_curve.png"].axes[2])
    assert held_out == ([0, 2, 3], [0, 20, 30]) and limit[1] == [40, 40]


def test_where_people_judge_their_answers_are_drawn(run, drawn):
    no_score = {"score": None, "score_sem": None, "eval_score": None, "watched": None}
    answers = [{"accuracy": a, "bad_share": b} for a, b in ((None, 0.5), (0.75, 0.25), (0.5, 0))]
    people = {"objective": "tags", "initial": {"eval_score": None, "watched": None}}
    change(run, people, [no_score | row for row in answers])
    figures.draw_run(run)
    share, kl = drawn["reward_curve.png"].axes
    accuracy, bad, chance = lines(share)
    assert accuracy == ([2, 3], [75, 50]) and bad == ([1, 2, 3], [50, 25, 0])
    assert set(chance[1]) == {50} and kl.get_xlabel() == "round"
    assert row_names(drawn["progress.png"]) == ["before", "round 2", "round 3"]


def test_rows_are_the_held_out_images_of_each_evaluation_with_their_score(run, drawn):
    figures.draw_run(run)
    names = ["before\n5.00 kB", "epoch 2\n1.50 kB", "epoch 3\n1.00 kB"]
    assert row_names(drawn["progress.png"]) == names
    assert greys(drawn["progress.png"]) == [[0, 10], [100, 110], [150, 160]]


def test_rows_are_drawn_where_the_last_epoch_was_evaluated(run, drawn):
    rows = files.read_lines(run / "metrics.jsonl")
    not_evaluated = ROW | {"epoch": 4, "eval_score": None, "watched": None}
    files.save_lines(run / "metrics.jsonl", [*rows, not_evaluated])
    figures.draw_run(run)
    assert [*drawn] == ["reward_curve.png"]
    assert lines(drawn["reward_curve.png"].axes[0])[0][0] == [1, 2, 3, 4]


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_an_image_that_was_lost_is_left_out(run, drawn, harm):
    harm(figures.held_out_file(run, 2, 1))
    figures.draw_run(run)
    assert greys(drawn["progress.png"])[1] == [100, 255]  # white


def test_a_long_run_has_at_most_six_rows_evenly_apart():
    def epochs(count: int) -> list[int]:
        return [row["epoch"] for row in figures.evenly_apart([{"epoch": n} for n in range(count)])]

    assert epochs(21) == [0, 4, 8, 12, 16, 20] and epochs(6) == [0, 1, 2, 3, 4, 5]
    assert epochs(7) == [0, 2, 4, 6] and epochs(2) == [0, 1] and epochs(1) == [0]


def test_pairs_are_the_first_sixteen_in_two_times_two_rows(tmp_path, drawn):
    before, after = ([picture(start + n) for n in range(20)] for start in (0, 100))
    figures.draw_pairs(before, after, tmp_path / "pairs.png")
    assert row_names(drawn["pairs.png"]) == ["before", "after"] * 2
    first, tuned, second, _ = greys(drawn["pairs.png"])
    assert (first, tuned, second) == ([*range(8)], [*range(100, 108)], [*range(8, 16)])
    figures.draw_pairs(before[:3], after[:3], tmp_path / "pairs.png")
    assert greys(drawn["pairs.png"]) == [[0, 1, 2], [100, 101, 102]]

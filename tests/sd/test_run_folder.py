"""Run folders: nothing that a run wrote is lost, whatever happens during a write."""

import json
from pathlib import Path

import pytest
import torch
from sd_helpers import read_rows

import d3po
from sd import files, run_folder
from sd.seeds import RandomPurpose, seeded_generator

NEW = {"resume": None, "out": None, "objective": "compressibility"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_streams_are_apart_and_each_number_counts():
    seeds = [
        (0, RandomPurpose.TRAINING, 1),
        (0, RandomPurpose.STEPS, 1),
        (0, RandomPurpose.TRAINING, 2),
        (1, 0, 1),
    ]
    draws = [torch.randn(4, generator=seeded_generator(*numbers)) for numbers in seeds]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws[0], torch.randn(4, generator=seeded_generator(0, 0, 1)))
    assert len(set(RandomPurpose)) == 8


def test_a_new_run_has_a_config_and_empty_tables():
    out = run_folder.create_or_resume(NEW | {"out": Path("some/where"), "beta": 0.3})
    assert out == Path("some/where")
    config = json.loads((out / "config.json").read_text())
    assert config["beta"] == 0.3 and config["out"] == "some/where"
    assert config["versions"]["torch"] == torch.__version__ and "git_revision" in config
    assert config["versions"]["d3po"] == d3po.__version__
    for name in ("metrics.jsonl", "labels.jsonl"):
        assert (out / name).read_text() == ""
    assert all((out / name).is_dir() for name in ("images", "lora", "checkpoint"))


def test_the_default_folder_is_named_after_the_objective():
    for objective in ("compressibility", "a/scorers.py:same", "a/scorers.py:same"):
        run_folder.create_or_resume(NEW | {"objective": objective})
    names = ["compressibility-1", "scorers-py-same-1", "scorers-py-same-2"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names


def test_without_git_the_revision_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    out = run_folder.create_or_resume(NEW)
    assert json.loads((out / "config.json").read_text())["git_revision"] is None


def test_a_resumed_run_keeps_what_it_has_and_gets_what_a_kill_left_out(tmp_path):
    files.save_json(tmp_path / "config.json", {"seed": 7})
    files.append(tmp_path / "labels.jsonl", [{"epoch": 1}])
    assert run_folder.create_or_resume(NEW | {"resume": tmp_path}) == tmp_path
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 7}
    assert read_rows(tmp_path / "labels.jsonl") == [{"epoch": 1}]
    assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / "images").is_dir()


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(below):
    Path("file").write_text("")
    with pytest.raises(ValueError, match="^--out file.* cannot be written .* choose another"):
        run_folder.create_or_resume(NEW | {"out": Path("file") / below})


def test_saving_replaces_the_old_file(tmp_path):
    for n in (1, 2):
        files.save_json(tmp_path / "a.json", {"n": n})
        files.save_tensors(tmp_path / "a.pt", {"n": torch.tensor(n)})
    assert files.read_json(tmp_path / "a.json") == {"n": 2}
    assert torch.load(tmp_path / "a.pt") == {"n": torch.tensor(2)}
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.pt"}


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    files.save_json(tmp_path / "a.json", {"n": 1})
    files.save_lines(tmp_path / "a.jsonl", [{"n": 1}])
    files.save_tensors(tmp_path / "a.pt", {"n": torch.tensor(1)})

    def disk_full(content, path):
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    monkeypatch.setattr(Path, "write_text", lambda path, text: disk_full(text, path))
    for save, name, content in (
        (files.save_json, "a.json", {"n": 2}),
        (files.save_lines, "a.jsonl", [{"n": 2}]),
        (files.save_tensors, "a.pt", {"n": torch.tensor(2)}),
    ):
        with pytest.raises(OSError, match="No space"):
            save(tmp_path / name, content)
    assert files.read_json(tmp_path / "a.json") == {"n": 1}
    assert files.read_lines(tmp_path / "a.jsonl") == [{"n": 1}]
    assert torch.load(tmp_path / "a.pt") == {"n": torch.tensor(1)}


def test_rows_are_appended_one_a_line(tmp_path):
    for rows in ([{"n": 1}, {"n": 2}], [], [{"n": 3}]):
        files.append(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_line_that_a_kill_cut_short_is_not_read_and_is_dropped(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert files.read_lines(file) == []
    files.append(file, [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}])
    with file.open("a") as opened:
        opened.write('{"epoch": 2')
    assert len(files.read_lines(file)) == 3
    files.keep_rows(file, lambda row: row["epoch"] != 2)
    assert read_rows(file) == [{"epoch": 1}, {"epoch": 3}]


@pytest.mark.parametrize("keep_labels", [False, True])
def test_an_unfinished_epoch_is_dropped_but_not_what_people_answered(tmp_path, keep_labels):
    for name in ("metrics.jsonl", "labels.jsonl"):
        files.append(tmp_path / name, [{"epoch": 1}, {"epoch": 2}])
    run_folder.drop_unfinished(tmp_path, 1, keep_labels=keep_labels)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"epoch": 1}]
    assert len(read_rows(tmp_path / "labels.jsonl")) == 1 + keep_labels


def test_images_are_named_by_epoch_group_and_number():
    names = ["images/e003_p08_k0.png", "images/e003_p08_k1.png", "images/e003_p09_k0.png"]
    assert run_folder.image_files(3, range(8, 10), 2)[:3] == names


def test_settings_of_an_earlier_run(tmp_path):
    files.save_json(tmp_path / "config.json", {"seed": 7, "lr": 0.1, "other": 1})
    assert run_folder.load_settings(tmp_path, {"seed", "lr"}) == {"seed": 7, "lr": 0.1}


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", "[" * 9**5, '{"lr": 0.1}'])
def test_a_folder_that_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path.name} is no run of sd_demo.py"):
        run_folder.load_settings(tmp_path, {"seed", "lr"})

"""Run folders: nothing that a run wrote is lost, whatever happens during a write."""

import json
from pathlib import Path

import pytest
import torch

from toy import runs


@pytest.fixture
def parser():
    return runs.Parser(prog="prog")


def test_a_new_run_has_a_config_and_empty_tables(tmp_path, parser):
    out = tmp_path / "some" / "where"
    config = runs.open_run(parser, {"out": out, "beta": 0.3})
    stored = json.loads((out / "config.json").read_text())
    assert stored == config
    assert stored["beta"] == 0.3 and stored["out"] == str(out)
    assert stored["versions"]["torch"] == torch.__version__ and "git_revision" in stored
    assert (out / "metrics.jsonl").read_text() == (out / "labels.jsonl").read_text() == ""


def test_runs_that_are_there_are_kept_aside(tmp_path, parser, capsys):
    out = tmp_path / "run"
    for beta in (1, 2, 3):
        runs.open_run(parser, {"out": out, "beta": beta})
        runs.append(out / "metrics.jsonl", [{"beta": beta}])
    for name, beta in (("run.1", 1), ("run.2", 2), ("run", 3)):
        assert json.loads((tmp_path / name / "config.json").read_text())["beta"] == beta
        assert json.loads((tmp_path / name / "metrics.jsonl").read_text()) == {"beta": beta}
    assert "run.2" in capsys.readouterr().out  # the user is told


def test_other_files_in_the_folder_stay(tmp_path, parser):
    (tmp_path / "notes.txt").write_text("mine")
    runs.open_run(parser, {"out": tmp_path})
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path, parser, capsys, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as stop:
        runs.open_run(parser, {"out": file / below})
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and "--out" in error and str(file) in error and "choose another" in error


def test_the_current_folder_is_refused_or_works_twice(tmp_path, parser, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        try:
            runs.open_run(parser, {"out": Path(".")})
        except SystemExit as stop:
            assert stop.code == 2


def test_saving_replaces_the_old_file(tmp_path):
    for n in (1, 2):
        runs.save_json(tmp_path / "a.json", {"n": n})
        runs.save_tensors(tmp_path / "a.pt", {"n": torch.tensor(n)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 2}
    assert torch.load(tmp_path / "a.pt") == {"n": torch.tensor(2)}
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.pt"}


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    runs.save_json(tmp_path / "a.json", {"n": 1})
    runs.save_tensors(tmp_path / "a.pt", {"n": torch.tensor(1)})

    def disk_full(content, path, *args, **kwargs):
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    monkeypatch.setattr(Path, "write_text", lambda path, text: disk_full(text, path))
    with pytest.raises(OSError, match="No space"):
        runs.save_tensors(tmp_path / "a.pt", {"n": torch.tensor(2)})
    with pytest.raises(OSError, match="No space"):
        runs.save_json(tmp_path / "a.json", {"n": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert torch.load(tmp_path / "a.pt") == {"n": torch.tensor(1)}


def test_rows_are_appended_one_a_line_and_on_disk_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    runs.append(path, [{"n": 1}, {"n": 2}])
    runs.append(path, [])
    runs.append(path, [{"n": 3}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_the_parser_refuses_in_one_line_with_code_2(parser, capsys):
    parser.add_argument("--beta", type=float, default=0.3, help="strength")
    for argv in (["--beta", "x"], ["--bet", "1"], ["stray"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("prog: error: "), argv
    assert "strength (default: 0.3)" in parser.format_help()


def test_rows_are_dropped_and_with_them_a_line_that_a_kill_cut_short(tmp_path):
    log = tmp_path / "loss.jsonl"
    runs.append(log, [{"stage": "vae", "step": 50}, {"stage": "unet", "step": 50}, {"stage": "unet", "step": 100}])
    with log.open("a") as file:
        file.write('{"stage": "un')  # killed while writing
    runs.keep_rows(log, lambda row: row["stage"] != "unet" or row["step"] <= 70)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [50, 50]

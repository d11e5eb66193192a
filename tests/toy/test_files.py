"""Nothing that a program of the toy wrote is lost, whatever happens during a write."""

import json
from pathlib import Path

import pytest
import torch

from toy.files import append_lines, write_json, write_tables, write_tensors


def test_writing_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    for n in (1, 2):
        write_json(tmp_path / "a.json", {"n": n})
        write_tensors(tmp_path / "a.pt", {"n": torch.tensor(n)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 2}
    assert torch.load(tmp_path / "a.pt") == {"n": torch.tensor(2)}
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.pt"}


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"n": 1})
    write_tensors(tmp_path / "a.pt", {"n": torch.tensor(1)})

    def disk_full(content, path):
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    monkeypatch.setattr(Path, "write_text", lambda path, text: disk_full(text, path))
    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path / "a.pt", {"n": torch.tensor(2)})
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"n": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert torch.load(tmp_path / "a.pt") == {"n": torch.tensor(1)}


def test_a_full_disk_is_an_oserror_of_torch_too(tmp_path, monkeypatch):
    def disk_full(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="is the disk full"):
        write_tensors(tmp_path / "a.pt", {})


def test_rows_are_appended_one_a_line_and_on_disk_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_lines(path, [{"n": 1}, {"n": 2}])
    append_lines(path, [])
    append_lines(path, [{"n": 3}])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_tables_are_replaced_and_the_text_around_them_stays(tmp_path):
    page, mark = tmp_path / "page.md", "<!-- mark -->\n"
    page.write_text(f"# By hand\n{mark}old\n{mark}between\n{mark}{mark}at the end\n")
    for _ in range(2):
        write_tables(page, mark, ["| a |\n", "| b |\n"])
        expected = ["# By hand\n", "\n| a |\n\n", "between\n", "\n| b |\n\n", "at the end\n"]
        assert page.read_text().split(mark) == expected
    with pytest.raises(ValueError):
        write_tables(page, mark, ["| a |\n"])
    assert page.read_text().split(mark) == expected

    write_tables(tmp_path / "new.md", mark, ["| a |\n"])
    assert (tmp_path / "new.md").read_text() == f"{mark}\n| a |\n\n{mark}"

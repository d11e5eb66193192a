"""sd/files.py and sd/seeds.py: a file is the old one or the new one, whatever happens to a write.

The disk is full here by a limit on the size of files, so the libraries fail as they do on a full
one: in the middle, each with an error of its own.
"""

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import SoftFileLock
from PIL import Image
from sd_helpers import read_rows

from sd import UserError, files
from sd.seeds import RandomPurpose, seeded_generator

FULL = 64  # bytes that the disk still takes
PROCESSES = multiprocessing.get_context("fork")


@contextlib.contextmanager
def full_disk():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_safetensors(path: Path, content: dict) -> None:
    files.replace(path, lambda part: safetensors.torch.save_file(content, part))


def noise(seed: int) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (32, 32, 3), generator=rng).byte().numpy())


SAVES = {  # name: how it is written, old and new content, how it is read
    "a.json": (files.save_json, {"n": 1}, {"n": [2] * 99}, files.read_json),
    "a.jsonl": (files.save_lines, [{"n": 1}], [{"n": 2}] * 99, read_rows),
    "a.md": (files.save_text, "一只猫", "ein Kätzchen\n" * 99, lambda p: p.read_bytes().decode()),
    "a.pt": (files.save_tensors, {"n": torch.ones(9)}, {"n": torch.zeros(999)}, torch.load),
    "a.safetensors": (
        save_safetensors,
        {"n": torch.ones(9)},
        {"n": torch.zeros(999)},
        safetensors.torch.load_file,
    ),
    "a.png": (files.save_image, noise(0), noise(1), lambda p: Image.open(p).copy()),
}


def same(one, other) -> bool:
    if isinstance(one, dict) and torch.is_tensor(one["n"]):
        return torch.equal(one["n"], other["n"])
    return one == other


@pytest.mark.parametrize("name", SAVES)
def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, name):
    save, old, new, read = SAVES[name]
    path = tmp_path / name
    save(path, old)
    before = path.read_bytes()
    with full_disk(), pytest.raises(UserError) as error:
        save(path, new)
    message = str(error.value)
    assert name in message and message.endswith("free disk space, or change its permissions")
    assert "\n" not in message and ("File too large" in message or "is the disk full?" in message)
    assert path.read_bytes() == before and same(read(path), old)
    assert os.listdir(tmp_path) == [name]
    save(path, new)
    assert same(read(path), new) and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("operation", ["touch", "rename"])
def test_without_permission_the_old_file_stays(tmp_path, monkeypatch, operation):
    path = tmp_path / "a.json"
    files.save_json(path, {"n": 1})
    before = path.read_bytes()

    def refuse(part, *rest):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(part))

    with monkeypatch.context() as patch:
        if operation == "touch":
            patch.setattr(Path, "touch", refuse)
        else:
            patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match=f"^{path}.part cannot be written .Permission denied."):
            files.save_json(path, {"n": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.json"]


def half_then_kill(path: Path) -> None:
    def write(part):
        part.write_bytes(b"half a fi")
        os.kill(os.getpid(), signal.SIGKILL)

    files.replace(path, write)


def test_after_a_kill_the_old_file_stays_and_the_next_write_is_whole(tmp_path):
    path = tmp_path / "a.json"
    files.save_json(path, {"n": 1})
    process = PROCESSES.Process(target=half_then_kill, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "a.json.part").read_bytes() == b"half a fi"
    assert files.read_json(path) == {"n": 1}
    files.save_json(path, {"n": 2})
    assert files.read_json(path) == {"n": 2} and os.listdir(tmp_path) == ["a.json"]


def test_a_file_has_the_mode_that_the_umask_leaves_also_where_a_library_has_its_own(tmp_path):
    old = os.umask(0o027)
    try:
        for name, (save, content, *_) in SAVES.items():
            save(tmp_path / name, content)
        files.replace(tmp_path / "token", lambda part: part.write_text("x"), mode=0o600)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(SAVES, 0o640) | {"token": 0o600}


def test_a_drive_that_refuses_chmod_takes_the_file(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    with files.Lock() as lock:
        lock.acquire(tmp_path)
        files.save_json(tmp_path / "a.json", {"n": 1})
    assert files.read_json(tmp_path / "a.json") == {"n": 1}


# Lines


def test_rows_are_appended_one_a_line_and_kept_where_there_is_no_room(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert files.read_lines(file) == []
    for rows in ([{"epoch": 1}, {"epoch": 2}], [], [{"epoch": 3}]):
        files.append(file, rows)
    rows = [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]
    assert read_rows(file) == rows
    with full_disk(), pytest.raises(UserError, match=f"^{file} cannot be written .File too large"):
        files.append(file, [{"epoch": 4, "prompt": "a cat" * 99}])
    assert len(file.read_bytes()) == FULL  # half a line, which is not read
    assert files.read_lines(file) == rows
    files.keep_rows(file, lambda row: row["epoch"] != 2)
    assert read_rows(file) == [{"epoch": 1}, {"epoch": 3}]


@pytest.mark.parametrize("line", [b"{not this}", b"[1]", b"\xff"])
def test_a_line_that_is_no_json_object_is_named(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"epoch": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"^{file}, line 2: this is no JSON object"):
        files.read_lines(file)


@pytest.mark.parametrize("content", [b"", b"junk", b"half"])
def test_tensors_that_cannot_be_read_are_named(tmp_path, content):
    file = tmp_path / "a.pt"
    files.save_tensors(file, {"n": torch.ones(99)})
    file.write_bytes(file.read_bytes()[:300] if content == b"half" else content)
    with pytest.raises(UserError, match=f"^{file} cannot be used .*restore a copy of it$"):
        files.load_tensors(file)


# One process at a time


def hold(folder: Path, connection) -> None:
    with files.Lock() as lock:
        lock.acquire(folder)
        connection.send("held")
        signal.pause()


def test_a_run_belongs_to_one_process_until_that_is_killed(tmp_path):
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.recv() == "held"
    with files.Lock() as lock:
        with pytest.raises(UserError, match=f"^{tmp_path} is in use by another process: wait"):
            lock.acquire(tmp_path)
        process.kill()
        process.join()
        lock.acquire(tmp_path)
        lock.acquire(tmp_path)  # it is ours already
        with pytest.raises(UserError), files.Lock() as other:
            other.acquire(tmp_path)
    with files.Lock() as lock:
        lock.acquire(tmp_path)


def test_the_message_names_the_lock_that_another_machine_may_have_left(tmp_path, monkeypatch):
    """On a drive without flock the lock is a file, with the name of the machine."""
    monkeypatch.setattr(files, "FileLock", SoftFileLock)
    file = tmp_path / ".lock"
    with files.Lock() as lock:
        lock.acquire(tmp_path)
        content = file.read_text()
    assert not file.exists() and os.uname().nodename in content
    file.write_text(content.replace(os.uname().nodename, "node1"))
    with files.Lock() as lock:
        with pytest.raises(UserError, match=f"on no other machine either, delete {file}$"):
            lock.acquire(tmp_path)
        file.unlink()
        lock.acquire(tmp_path)


# Seeds


def test_purposes_are_apart_and_each_number_counts():
    seeds = [(0, purpose, n) for purpose in RandomPurpose for n in (1, 2)] + [(1, 0, 1)]
    draws = [torch.randn(4, generator=seeded_generator(*numbers)) for numbers in seeds]
    assert len({tuple(draw.tolist()) for draw in draws}) == 2 * 8 + 1
    assert torch.equal(draws[0], torch.randn(4, generator=seeded_generator(0, 0, 1)))

"""Each file operation of a run fails once: no room, no permission, a kill in the middle.

Python says of each operation, by an audit event, that it begins; torch.save and safetensors, which
write by themselves, are wrapped. What was there before is there after, the user reads one sentence,
and when there is room again --resume ends as if nothing had been.
"""

import copy
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sd_helpers import outcome, run

import sd_demo
from sd import figures, files, model

FLAGS = """
    --num-steps 2 --prompts-per-epoch 1 --batch-size 1 --eval-images 1 --epochs 1
    --replay 1 --average-weights --max-kl 1e6
"""
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.chmod", "os.utime"}
ERRORS = {"no room": errno.ENOSPC, "no permission": errno.EACCES}
KINDS = [*ERRORS, "kill"]
STRIDE = 3  # of operations in the slow test; 1: all of them, in half an hour


class Killed(BaseException):
    """Nothing that a program does catches this."""


class Faults:
    """Counts the operations on files below a folder; the one with the number `fatal` fails."""

    def __init__(self):
        self.folder, self.kind, self.fatal, self.count = None, None, None, 0

    def arm(self, folder: Path, kind: str | None = None, fatal: int | None = None) -> None:
        self.folder, self.kind, self.fatal, self.count = str(folder), kind, fatal, 0

    def disarm(self) -> int:
        self.folder = None
        return self.count

    def audit(self, event: str, args: tuple) -> None:
        if self.folder and (event == "open" or event in WRITES):
            path = args[0]
            if isinstance(path, str | bytes | os.PathLike):
                mode = args[1] if event == "open" else None
                self.operation(os.fsdecode(path), mode or "", write=event in WRITES)

    def operation(self, path: str, mode: str, write: bool) -> None:
        writes = write or set(mode) & set("wax+")
        if not path.startswith(self.folder) or not (writes or self.kind == "no permission"):
            return
        self.count += 1
        dead = self.kind != "no permission" and self.count > (self.fatal or self.count)
        if self.count == self.fatal or dead:
            self.fail(path, mode)

    def fail(self, path: str, mode: str, own: type[Exception] | None = None) -> None:
        folder, self.folder = self.folder, None
        if set(mode) & set("wa") and self.count == self.fatal:
            with open(path, mode[0] + "b") as file:
                file.write(b'{"epoch": 2, "pro')  # half of what was to be written
        self.folder = folder
        if self.kind == "kill":
            raise Killed
        if own:
            raise own("enforce fail at inline_container.cc:672, unexpected pos 64 vs 0")
        raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), path)


FAULTS = Faults()
sys.addaudithook(FAULTS.audit)  # for good; it does nothing unless armed


def wrapped(save, error):
    """A writer of a library: its failure leaves half a file, and is an error of its own kind."""

    def saved(content, path, *args, **options):
        if FAULTS.folder and str(path).startswith(FAULTS.folder):
            FAULTS.count += 1
            if FAULTS.count >= (FAULTS.fatal or FAULTS.count + 1):
                FAULTS.fail(str(path), "w", error)
        folder, FAULTS.folder = FAULTS.folder, None  # counted already
        try:
            return save(content, path, *args, **options)
        finally:
            FAULTS.folder = folder

    return saved


@pytest.fixture(autouse=True)
def small(tiny, monkeypatch):
    """Runs load no model, draw nothing but write a figure, and find that the disk fails."""
    pipe = model.load_pipeline(str(tiny), "fp32")
    monkeypatch.setattr(model, "load_pipeline", lambda *args: copy.deepcopy(pipe))
    monkeypatch.setattr(torch, "save", wrapped(torch.save, RuntimeError))
    save_file = wrapped(safetensors.torch.save_file, safetensors.SafetensorError)
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)

    def draw(*args):
        path = next(Path(arg) for arg in reversed(args) if isinstance(arg, Path))
        path = path / "reward_curve.png" if path.is_dir() else path
        files.replace(path, lambda part: part.write_bytes(b"a figure"))
        return [path]

    monkeypatch.setattr(figures, "draw_run", draw)
    monkeypatch.setattr(figures, "draw_pairs", draw)
    yield
    FAULTS.disarm()


def attempt(capsys, command, *args) -> None:
    """A command that may fail: in one sentence, or killed."""
    capsys.readouterr()
    try:
        command(*args)
    except Killed:
        assert FAULTS.kind == "kill"
    except SystemExit as stop:
        message = stop.code
        if stop.code == 2:
            message = capsys.readouterr().err.split("sd_demo.py: error: ")[1].strip()
        assert "\n" not in message and str(FAULTS.folder) in message, message
        assert FAULTS.kind != "kill"
    finally:
        FAULTS.disarm()


def read_whole(out: Path) -> None:
    """Nothing that has its name is half a file."""
    for path in out.rglob("*"):
        if path.suffix == ".pt":
            torch.load(path)
        elif path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png" and "images" in path.parts:
            assert figures.open_image(path) is not None, path


def contents(out: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(out)): path for path in out.rglob("*.*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


def is_fixed(name: str) -> bool:
    """Files of an earlier epoch, which nobody writes again."""
    return name.startswith(("images/e001", "latents/e001"))


SCENARIOS = ["new", "resume", "evaluate"]


class Scenario:
    """A command, what it starts from, and what it leaves where nothing fails."""

    def __init__(self, name: str, tiny, scorers, folder: Path):
        self.name, self.folder = name, folder
        self.tiny, self.objective = tiny, f"{scorers}:brightness"
        self.start = folder / "start"
        if name != "new":
            run(tiny, self.start, self.objective, FLAGS)
        self.whole = self.copy("whole")
        self.command(self.whole)

    def copy(self, name: str) -> Path:
        out = self.folder / name
        return out if self.name == "new" else shutil.copytree(self.start, out)

    def command(self, out: Path) -> None:
        if self.name == "new":
            run(self.tiny, out, self.objective, FLAGS)
        elif self.name == "resume":
            sd_demo.main(["--resume", str(out), "--epochs", "2"])
        else:
            sd_demo.main(["--evaluate", str(out)])

    def count(self, kind: str) -> int:
        out = self.copy(f"count {kind}")
        FAULTS.arm(out, kind)
        self.command(out)
        return FAULTS.disarm()

    def check(self, kind: str, fatal: int, capsys) -> None:
        out = self.copy("run")
        before = contents(out) if out.exists() else {}
        FAULTS.arm(out, kind, fatal)
        attempt(capsys, self.command, out)
        read_whole(out)
        after = contents(out) if out.exists() else {}
        assert before.keys() <= after.keys()
        for name in before:
            same = after[name] == before[name]
            assert same or not is_fixed(name), name
            assert same or self.name != "evaluate" or name in ("README.md", "report.html"), name
            if name.endswith(".jsonl"):
                assert after[name].startswith(before[name]), name
        if self.name == "new" and (out / "config.json").exists():
            sd_demo.main(["--resume", str(out)])
        elif self.name != "new":
            self.command(out)
        if out.exists() and (out / "config.json").exists():
            assert outcome(out) == outcome(self.whole)
            if self.name == "evaluate":
                name = "evaluation.json"
                assert (out / name).read_bytes() == (self.whole / name).read_bytes()
            left = {name for name in contents(out) if not name.endswith(".part")}
            assert left == contents(self.whole).keys()
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_some_file_operations_fail(name, tiny, scorers, tmp_path, capsys):
    scenario = Scenario(name, tiny, scorers, tmp_path)
    for n, kind in enumerate(KINDS):
        count = scenario.count(kind)
        assert count > 20
        scenario.check(kind, (n + 1) * count // 4, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_each_file_operation_fails(name, tiny, scorers, tmp_path, capsys):
    """In turn of the three kinds, each of which has its own count: one has the reads too."""
    scenario, failed = Scenario(name, tiny, scorers, tmp_path), 0
    for n, kind in enumerate(KINDS):
        for fatal in range(1 + n % STRIDE, scenario.count(kind) + 1, STRIDE):
            scenario.check(kind, fatal, capsys)
            failed += 1
    with capsys.disabled():
        print(f"\n{name}: {failed} runs, each with one file operation that failed")


def test_after_the_operations_that_fail_there_are_others(tmp_path):
    """A negative control: the harness counts, fails and lets go."""
    FAULTS.arm(tmp_path, "no room", 2)
    (tmp_path / "a").mkdir()
    for name in ("b", "c"):
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / name).write_text("whole")
    assert FAULTS.disarm() == 3
    assert (tmp_path / "b").read_text().startswith("{")
    assert not (tmp_path / "c").exists()

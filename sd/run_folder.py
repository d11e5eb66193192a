"""Run folders: what a run leaves behind. A kill at any moment loses at most the epoch in hand."""

import errno
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parents[1]
LORA_FILE = "pytorch_lora_weights.safetensors"
LIBRARIES = ("d3po", "torch", "diffusers", "transformers", "peft", "accelerate")


class RunError(ValueError):
    """A run folder that cannot be used as it is, in a sentence for the user."""


class Stream(IntEnum):
    """What random numbers are for: one purpose never depends on how many another took."""

    TRAINING = 0
    STEPS = 1
    PROMPTS = 2
    HELD_OUT = 3
    EVALUATION = 4
    SIDES = 5
    REPLAY = 6
    STOCK = 7


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that these decide: a resumed run draws what an unbroken one would have."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(state.item())


# Files: each is at all times the old one or the new one


@contextmanager
def writing(path: Path):
    """What goes wrong inside is an OSError about this file; torch and safetensors have others."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        reason = reason or f"is the disk full? {str(error).partition(chr(10))[0]}"
        raise OSError(code or errno.EIO, reason, str(path)) from error


def describe(error: Exception) -> str:
    """An error in a sentence for the user."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    file, reason = error.filename or "A file", error.strerror
    return f"{file} cannot be read or written ({reason}): make room for it, or allow it"


def replace(path: Path, write: Callable[[Path], object], *, mode: int = 0o666) -> None:
    """Let `write` make a file beside `path`, then put it in its place; OSError if it cannot.

    mode: who may read and write the file, as far as the user's umask lets them.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            part.unlink(missing_ok=True)
            part.touch(mode)
            mode = part.stat().st_mode  # without the umask; safetensors' own is 0600
            write(part)
            part.chmod(mode)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def to_json(content, **layout) -> str:
    """JSON, in which a number that is not finite is null."""
    return json.dumps(finite(content), allow_nan=False, **layout)


def finite(content):
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save_text(path: Path, content: str) -> None:
    replace(path, lambda part: part.write_text(content))


def save_json(path: Path, content: dict) -> None:
    save_text(path, to_json(content, indent=2) + "\n")


def save_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    save_text(path, "".join(to_json(row) + "\n" for row in rows))


def save_tensors(path: Path, content: dict) -> None:
    replace(path, lambda part: torch.save(content, part))


def save_image(path: Path, image: Image.Image) -> None:
    replace(path, lambda part: image.save(part, "PNG"))


def read_file(path: Path, read: Callable[[Path], object]):
    """What `read` makes of a file. Raises RunError where it is damaged, or another's."""
    try:
        return read(path)
    except Exception as error:  # of many kinds, as a damaged file may hold anything
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} cannot be used ({reason}): put a copy of it back") from error


def load_tensors(path: Path, device: torch.device | str = "cpu"):
    return read_file(path, lambda file: torch.load(file, map_location=device))


def append(path: Path, rows: list[dict]) -> None:
    """Add one JSON object a line, and flush."""
    with writing(path), path.open("a") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, if it is there, without a last line that a kill cut short."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError) as error:
            message = f"{path}, line {number}: this is no JSON object ({error}): mend the line"
            raise RunError(message) from error
    return rows


def keep_rows(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop rows from a file of JSON lines, and with them a last line that a kill cut short."""
    save_lines(path, [row for row in read_lines(path) if keep(row)])


# Runs


class Lock:
    """One process at a time owns a run. The system lets go of the lock of a killed process."""

    def __init__(self):
        self.lock = None

    def acquire(self, folder: Path) -> None:
        """Own a run, if it is not ours already; RunError where another process does."""
        if self.lock:
            return
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"{folder} is at work in another process: wait for it, or stop it"
            ) from None
        except OSError as error:
            raise RunError(f"{folder} cannot be written ({error.strerror})") from error
        self.lock = lock

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.lock:
            self.lock.release()


def image_files(epoch: int, groups: range, images_per_prompt: int) -> list[str]:
    """Names of the images of an epoch's groups, given by number."""
    return [
        f"images/e{epoch:03}_p{group:02}_k{k}.png"
        for group in groups
        for k in range(images_per_prompt)
    ]


def create_or_resume(settings: dict) -> Path:
    """Make the folder of a new run, by default runs/OBJECTIVE-N, or open that of --resume.

    Returns its path. Raises ValueError, in a sentence, where it cannot be written, or goes on
    from nothing though it has trained.
    """
    if settings["resume"]:
        check_not_lost(settings["resume"])
    try:
        out = settings["resume"] or settings["out"]
        if not settings["resume"]:
            out = make_folder(out, settings["objective"] or "labels")
            save_json(out / "config.json", {**settings, "out": str(out), **provenance()})
        for name in ("images", "latents", "lora", "checkpoint"):
            (out / name).mkdir(exist_ok=True)  # also on --resume: a kill may have come before
        for name in ("metrics.jsonl", "labels.jsonl"):
            (out / name).touch()
    except OSError as error:
        name, remedy = f"--out {out}", "choose another folder"
        if settings["resume"]:
            name, remedy = out, "make room, or allow it"
        raise ValueError(f"{name} cannot be written ({error.strerror}): {remedy}") from error
    return out


def check_not_lost(out: Path) -> None:
    """Raise RunError for a run that has trained and lost its checkpoint.

    A kill in the first epoch may come after its row of metrics.jsonl and before its checkpoint.
    """
    epochs = [row["epoch"] for row in read_lines(out / "metrics.jsonl")]
    lora, folder = out / "lora" / LORA_FILE, out / "checkpoint"
    first = epochs == [1] and folder.is_dir() or not epochs and not lora.exists()
    if first or (folder / "state.pt").exists():
        return
    remedy = "put a copy back"
    if lora.exists():
        remedy = f"--evaluate it, begin a new run with --init-lora {lora.parent}, or {remedy}"
    raise RunError(f"{out} has lost checkpoint/state.pt, so it cannot go on: {remedy}")


def provenance() -> dict:
    """Versions of the libraries and the git revision, for config.json."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        revision = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        revision = None
    versions = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    versions["python"] = platform.python_version()
    return {"versions": versions, "git_revision": revision or None}


def drop_unfinished(out: Path, epochs_done: int, *, keep_labels: bool) -> None:
    """Drop rows of an epoch that a kill cut short. What people answered is kept."""
    for name in ["metrics.jsonl"] if keep_labels else ["metrics.jsonl", "labels.jsonl"]:
        keep_rows(out / name, lambda row: row["epoch"] <= epochs_done)


def make_folder(out: Path | None, objective: str) -> Path:
    """Make a new folder: `out`, or the first of runs/OBJECTIVE-1, -2, ... that is not there yet."""
    if out:
        out.mkdir(parents=True)
        return out
    name = re.sub(r"\W+", "-", Path(objective).name)
    for path in (Path(f"runs/{name}-{n}") for n in itertools.count(1)):
        with suppress(FileExistsError):  # another start may make it at the same time
            path.mkdir(parents=True)
            return path


def load_settings(folder: Path, names: set[str]) -> dict:
    """These settings of an earlier run, from its config.json; ValueError where it has none."""
    try:
        config = read_json(folder / "config.json")
        return {name: config[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        message = f"{folder} is no run of sd_demo.py: it has no config.json with its settings"
        raise ValueError(message) from None

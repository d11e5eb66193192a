"""Run folders: what a run leaves behind. A kill at any moment loses at most the epoch in hand."""

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


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


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


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


def append(path: Path, rows: list[dict]) -> None:
    """Add one JSON object a line, and flush."""
    with path.open("a") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, if it is there, without a last line that a kill cut short."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def keep_rows(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop rows from a file of JSON lines, and with them a last line that a kill cut short."""
    save_lines(path, [row for row in read_lines(path) if keep(row)])


# Runs


def image_files(epoch: int, groups: range, images_per_prompt: int) -> list[str]:
    """Names of the images of an epoch's groups, given by number."""
    return [
        f"images/e{epoch:03}_p{group:02}_k{k}.png"
        for group in groups
        for k in range(images_per_prompt)
    ]


def create_or_resume(settings: dict) -> Path:
    """Make the folder of a new run, by default runs/OBJECTIVE-N, or open that of --resume.

    Returns its path. Raises ValueError, in a sentence, where it cannot be written.
    """
    try:
        out = settings["resume"] or settings["out"] or free_name(settings["objective"] or "labels")
        if not settings["resume"]:
            out.mkdir(parents=True, exist_ok=True)
            save_json(out / "config.json", {**settings, "out": str(out), **provenance()})
        for name in ("images", "latents", "lora", "checkpoint"):
            (out / name).mkdir(exist_ok=True)  # also on --resume: a kill may have come before
        for name in ("metrics.jsonl", "labels.jsonl"):
            (out / name).touch()
    except OSError as error:
        reason = f"cannot be written ({error.strerror}): choose another folder"
        raise ValueError(f"--out {out} {reason}") from error
    return out


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


def free_name(objective: str) -> Path:
    """The first of runs/OBJECTIVE-1, -2, ... that is not there yet."""
    name = re.sub(r"\W+", "-", Path(objective).name)
    names = (Path(f"runs/{name}-{n}") for n in range(1, sys.maxsize))
    return next(path for path in names if not path.exists())


def load_settings(folder: Path, names: set[str]) -> dict:
    """These settings of an earlier run, from its config.json; ValueError where it has none."""
    try:
        config = read_json(folder / "config.json")
        return {name: config[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        message = f"{folder} is no run of sd_demo.py: it has no config.json with its settings"
        raise ValueError(message) from None

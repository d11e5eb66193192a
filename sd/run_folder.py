"""Run folders: what a run leaves behind. A kill at any moment loses at most the epoch in hand."""

import itertools
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from sd import UserError
from sd.files import LORA_FILE, ROOT, keep_rows, read_json, read_lines, save_json

LIBRARIES = ("d3po", "torch", "diffusers", "transformers", "peft", "accelerate")


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
    """Raise UserError for a run that has trained and lost its checkpoint.

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
    raise UserError(f"{out} has lost checkpoint/state.pt, so it cannot go on: {remedy}")


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

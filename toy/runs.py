"""Run folders: what a run leaves behind, written so that killing it at any moment loses at most the epoch in hand."""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and refuses bad input in one sentence, with exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())  # some libraries' errors, quoted in it, have many lines
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def refuse_unless_positive(parser: Parser, args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: give a positive number")


def open_run(parser: Parser, settings: dict) -> dict:
    """Make the folder settings["out"], with empty metrics.jsonl and labels.jsonl; return what its config.json holds.

    These are the settings, versions and git revision. A run that is already there is kept, as NAME.1, NAME.2, ...
    """
    out = settings["out"]
    if not out.name:
        parser.error(f"--out {out} is the folder you are in: give a folder for this run alone")
    try:
        if (out / "config.json").exists():
            number = next(n for n in range(1, sys.maxsize) if not out.with_name(f"{out.name}.{n}").exists())
            out.rename(out.with_name(f"{out.name}.{number}"))
            print(f"{out} held a run already: that one is now {out.name}.{number}.")
        out.mkdir(parents=True, exist_ok=True)
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        loaded = ("torch", "diffusers", "transformers", "peft", "accelerate")
        versions = {name: sys.modules[name].__version__ for name in loaded if name in sys.modules}
        versions["python"] = platform.python_version()
        config = {**settings, "out": str(out), "versions": versions, "git_revision": git.stdout.strip() or None}
        save_json(out / "config.json", config)
        for name in ("metrics.jsonl", "labels.jsonl"):
            (out / name).write_text("")
    except OSError as error:
        parser.error(f"--out {out} cannot be written ({error.strerror}): choose another folder")
    return config


def settings_of(parser: Parser, folder: Path, names: Iterable[str]) -> dict:
    """These settings of an earlier run, from its config.json."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return {name: config[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"{folder} is no run of {parser.prog}: it has no config.json with its settings")


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that only these numbers decide, so that a resumed run draws what an unbroken one would have."""
    return torch.Generator().manual_seed(np.random.SeedSequence(numbers).generate_state(1, np.uint64).item())


def save_json(path: Path, content: dict) -> None:
    """Write JSON so that the file is at all times either the old one or the new one."""
    _replace(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def save_tensors(path: Path, content: dict) -> None:
    """Write tensors by torch.save, in the same all-or-nothing way."""
    _replace(path, lambda part: torch.save(content, part))


def save_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line, in the same all-or-nothing way."""
    _replace(path, lambda part: part.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def save_text(path: Path, content: str) -> None:
    """Write text, in the same all-or-nothing way."""
    _replace(path, lambda part: part.write_text(content))


def append(path: Path, rows: list[dict]) -> None:
    """Append one JSON object a line, and flush."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def keep_rows(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop rows from a file of JSON lines, and with them a last line that a kill cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    save_lines(path, [row for line in lines if line.endswith("\n") and keep(row := json.loads(line))])


def peak_memory_mb() -> float:
    """The most that tensors took on the GPU so far, or the process in main memory, MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _replace(path: Path, write) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)

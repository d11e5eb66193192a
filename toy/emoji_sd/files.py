"""Files that a kill in the middle of a write leaves as they were."""

import errno
import json
import os
from pathlib import Path

import torch


def write_json(path: Path, content: dict) -> None:
    """Replace a file by JSON."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def write_tensors(path: Path, content: dict) -> None:
    """Replace a file by tensors, as torch.save stores them. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    try:
        torch.save(content, part)
    except RuntimeError as error:  # torch's, for a disk that is full
        raise OSError(errno.EIO, "is the disk full?", str(path)) from error
    os.replace(part, path)


def append_lines(path: Path, rows: list[dict]) -> None:
    """Append one JSON object a line; the lines are on disk when this returns."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

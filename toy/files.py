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


def write_tables(page: Path, mark: str, tables: list[str]) -> None:
    """Replace what a page has between each pair of marks; a new page has nothing else.

    Raises ValueError for a page that has other than two marks a table.
    """
    parts = page.read_text().split(mark) if page.exists() else [""] * (2 * len(tables) + 1)
    parts[1::2] = [f"\n{table}\n" for table in tables]
    page.write_text(mark.join(parts))

"""What the benches share: a command line, a page with a table between two marks, sizes of files."""

import argparse
from collections.abc import Collection, Iterable
from pathlib import Path

from PIL import Image

from sd import files
from sd.scorers import jpeg_kb

BLANK_KB = jpeg_kb(Image.new("RGB", (64, 64), "white"))


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def replace_section(page: Path, mark: str, content: str) -> None:
    """Replace what a page has between its two marks; a new page has nothing else."""
    text = page.read_text() if page.exists() else mark + mark
    before, _, after = text.split(mark)
    files.save_text(page, before + mark + content + mark + after)


def markdown_table(heads: Collection, rows: Iterable[Iterable]) -> str:
    """Lines of a table, each with its end."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def size_change(score: float, initial: float) -> float:
    """Relative change of the size above a blank image's; scores are kB, or minus kB."""
    return (abs(score) - BLANK_KB) / (abs(initial) - BLANK_KB) - 1

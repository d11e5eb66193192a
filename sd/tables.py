"""Rows of a user's file: .jsonl, .json, .csv, .tsv or plain lines; UTF-8, with or without a BOM.

A .jsonl has a JSON value in each line, a .json is a list of them, and the first line of a .csv or
.tsv names the columns. Each row comes with the place where it stands, for what is said about it.
Only a newline ends a line, so that a text may have any other separator (U+2028, for example).

All functions raise ValueError, in a sentence, for what cannot be read.
"""

import codecs
import csv
import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
Rows = Iterator[tuple[str, Any]]  # (file and line, row)


def read_rows(path: Path, *, json_columns: Collection[str] = (), may_be_cut: bool = False) -> Rows:
    """The rows of a file with one of SUFFIXES.

    json_columns: those of a .csv or .tsv whose cells are JSON; other cells are text, None if empty.
    may_be_cut: a .jsonl may end in half a line, which a kill cut short.
    """
    match path.suffix.lower():
        case ".jsonl":
            yield from jsonl_rows(path, may_be_cut)
        case ".json":
            yield from json_rows(path)
        case suffix:
            yield from table_rows(path, "\t" if suffix == ".tsv" else ",", json_columns)


def text_rows(path: Path) -> Rows:
    """The lines of a file that are not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def jsonl_rows(path: Path, may_be_cut: bool) -> Rows:
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield f"{path}, line {number}", parse_json(line)
        except ValueError as error:
            if may_be_cut and 1 < number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: {error}") from error


def json_rows(path: Path) -> Rows:
    try:
        rows = parse_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: this is no list; write [row, row, ...], or name it .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}, entry {number}", row


def table_rows(path: Path, delimiter: str, json_columns: Collection[str]) -> Rows:
    text = io.StringIO(read_text(path), newline="")
    table = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    where, header = f"{path}, line 1", []
    try:
        for cells in table:
            if header and any(cells):
                check_cells(where, cells, header)
                row = dict(zip(header, cells, strict=True))
                yield where, {name: parse_cell(row[name], name in json_columns) for name in row}
            header = header or [name.strip() for name in cells]
            where = f"{path}, line {table.line_num + 1}"
    except csv.Error as error:
        raise ValueError(f"{where}: this is no table ({error})") from error


def check_cells(where: str, cells: list[str], header: list[str]) -> None:
    if len(cells) != len(header):
        sizes = f"{len(cells)} cells, but the first line has {len(header)}"
        raise ValueError(f"{where}: the row has {sizes}; put text with commas in quotes")
    if len(set(header)) < len(header):
        raise ValueError(f"{where}: a column is twice in {', '.join(header):.200}; give it once")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be read ({error.strerror})") from error


def read_text(path: Path) -> str:
    content = read_bytes(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path}: there are zero bytes in it; save it as text in UTF-8")
    return text


def parse_json(content: bytes) -> Any:
    try:
        text = content.decode()
        value = json.loads(text)
        if "\\u" in text:  # it may write half a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON in UTF-8 ({error})") from error
    return value


def parse_cell(cell: str, is_json: bool) -> Any:
    """What JSON would have in place of a cell; text where there is no such thing."""
    if not is_json or not cell.strip():
        return cell or None
    try:
        value = parse_json(cell.encode())
    except ValueError:
        return {"true": True, "false": False}.get(cell.strip().lower(), cell)
    return int(value) if isinstance(value, float) and value.is_integer() else value

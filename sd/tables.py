"""Rows of a user's file: .jsonl, .json, .csv, .tsv, .parquet or plain lines, in UTF-8.

A .jsonl has a JSON value in each line, a .json is a list of them, and the first line of a .csv or
.tsv names the columns; it may be as Excel writes it, with semicolons or with a line sep=; before.
All of them may be packed as .gz. Each row comes with the place where it stands, for what is said
about it, and its columns are named in small letters. Only a newline ends a line, so that a text may
have any other separator (U+2028, for example).

All functions raise ValueError, in a sentence, for what cannot be read.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
Rows = Iterator[tuple[str, Any]]  # (file and line, row)


def table_suffix(path: Path) -> str:
    """Which of SUFFIXES a file has, before .gz; empty where it has none."""
    suffix = PurePath(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


def read_rows(path: Path, may_be_cut: bool = False) -> Rows:
    """The rows of a file with one of SUFFIXES. Cells of a .csv or .tsv are text, None if empty.

    may_be_cut: a .jsonl may end in half a line, which a kill cut short.
    """
    match table_suffix(path):
        case ".jsonl":
            rows = jsonl_rows(path, may_be_cut)
        case ".json":
            rows = json_rows(path)
        case ".parquet":
            rows = parquet_rows(path)
        case suffix:
            rows = table_rows(path, "\t" if suffix == ".tsv" else ",")
    for where, row in rows:
        if isinstance(row, dict):
            row = dict(zip(column_names(where, row), row.values(), strict=True))
        yield where, row


def column_names(where: str, names: Collection[str]) -> list[str]:
    plain = [name.strip().lower() for name in names]
    texts = [name for name in plain if name]  # Excel leaves columns without a name
    if len(set(texts)) < len(texts):
        raise ValueError(f"{where}: a column is twice in {', '.join(names):.200}; give it once")
    return plain


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


def parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: to read .parquet, pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=64)  # few, as images may be in them
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path}: the file cannot be read ({error!s:.200})") from error


def table_rows(path: Path, usual_delimiter: str) -> Rows:
    text, header = read_text(path), []
    for line, cells in split_cells(path, text, find_delimiter(text, usual_delimiter)):
        where = f"{path}, line {line}"
        if not any(cells) or (not header and cells[0].lower().startswith("sep=")):
            continue
        if not header:
            header = column_names(where, cells)
        elif len(cells) != len(header):
            sizes = f"{len(cells)} cells, but the first line has {len(header)}"
            raise ValueError(f"{where}: the row has {sizes}; put text with commas in quotes")
        else:
            named = zip(header, cells, strict=True)
            yield where, {name: cell or None for name, cell in named if name}


def find_delimiter(text: str, usual: str) -> str:
    """What separates cells: what Excel's line sep= says, else what the first line has most."""
    first = text.lstrip().partition("\n")[0]
    if first.lower().startswith("sep="):
        return first[4:5].strip() or "\t"
    return max(usual, ",", ";", "\t", key=first.count)


def split_cells(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row."""
    if delimiter == "\t":  # where no cell has a tab or a newline, quotes may be a part of the text
        lines = [line.rstrip("\n") for line in io.StringIO(text, newline=None)]
        rows = [[unquote(cell.lstrip(" ")) for cell in line.split("\t")] for line in lines]
        if len({len(row) for row in rows if any(row)}) == 1:
            yield from enumerate(rows, 1)
            return
    stream = io.StringIO(text, newline="")
    table = csv.reader(stream, delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        for cells in table:
            yield line, cells
            line = table.line_num + 1
    except csv.Error as error:
        remedy = "write a quote within quotes twice"
        raise ValueError(f"{path}, line {line}: this is no table ({error}); {remedy}") from error


def unquote(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if quoted else cell


def read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: the file cannot be read ({reason})") from error
    return content.removeprefix(codecs.BOM_UTF8)


def read_text(path: Path) -> str:
    content = read_bytes(path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8; save it as UTF-8") from error


def parse_json(content: bytes) -> Any:
    try:
        text = content.decode()
        value = json.loads(text)
        if "\\u" in text:  # it may write half a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"this is not JSON in UTF-8 ({error})") from error
    return value

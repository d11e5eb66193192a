"""Any bytes in a user's file give an answer or one sentence, and the file stays as it is."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd import UserError
from sd.images import open_image
from sd.label_files import read_label_file
from sd.labels import read_labels
from sd.prompts import load_prompts

IMAGES = ["a.png", "b.png", "c.png"]
ROWS = [
    {"prompt": "a cat", "images": IMAGES[:2], "h": 1, "annotator": "Ann"},
    {"caption": "ein Kätzchen", "images": IMAGES, "bad": [True, False, False]},
    {"prompt": "a cat", "images": IMAGES, "rank": [1, 2.5, 2]},
    {"prompt": "a", "image_0": "a.png", "image_1": "b.png", "label_0": 1, "label_1": 0.0},
    {"prompt": "a", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1, "label_1": 0, "has_label": 1},
    {"text": "a dog", "prompt": "a cat\nasleep", "chosen": "a.png", "rejected": "b.png"},
    {"prompt": "a cat", "image_path": "a.png", "rank": 1, "prompt_id": "x"},
    {"prompt": "a cat", "file_path": IMAGES[:2], "human_preference": [0, 1]},
    {"prompt": "a cat", "annotation_id": 1, "one": "a.png", "two": "b.png", "pairwise": "left"},
    {"data": {"prompt": "a cat", "one": "a.png", "two": "b.png"}, "annotations": [{"result": []}]},
]
examples = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LABEL = {"epoch": 3, "prompt": "a cat", "images": IMAGES[:2], "scores": [1.0, None], "h": -1}


def json_lines(rows: list) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def table(row: dict, delimiter: str) -> bytes:
    cells = [f'"{json.dumps(v)}"' if isinstance(v, list) else str(v) for v in row.values()]
    return f"{delimiter.join(row)}\n{delimiter.join(cells)}\n".encode()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((9, 7), 50).convert("RGB").save(file, kind)
    return file.getvalue()


TABLES = {
    "x.jsonl": [json_lines(ROWS), json_lines(ROWS[:1])],
    "x.json": [json.dumps(ROWS).encode(), b'["a cat", "a dog"]'],
    "x.csv": [table(row, ",") for row in ROWS],
    "x.tsv": [table(row, "\t") for row in ROWS],
}
LABELS = [json_lines([LABEL, LABEL | {"h": None}, LABEL | {"epoch": 2}])]
PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP")]
PIECES = [
    *(b"", b'"', b",", b"\t", b"\n", b"\r", b"\\", b"[", b"]", b"{", b"}", b":", b"\0", b"\xff"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 30, b"0.5", b"9" * 5000),
    *(b"\xef\xbb\xbf", b"\\ud800", "\u2028".encode(), b'""', b'"x": ', b"[[]]"),
]


def documents(whole: list[bytes]) -> st.SearchStrategy[bytes]:
    """Any bytes, and whole files in which some places were replaced."""
    place, length = st.integers(0, max(map(len, whole))), st.integers(0, 12)
    edits = st.lists(st.tuples(place, length, st.sampled_from(PIECES) | st.binary(max_size=6)))
    return st.binary(max_size=60) | st.builds(edit, st.sampled_from(whole), edits)


def edit(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, piece in edits:
        content = content[:place] + piece + content[place + length :]
    return content


READERS = {
    **{f"prompts {name}": (load_prompts, name, whole) for name, whole in TABLES.items()},
    "prompts x.txt": (load_prompts, "x.txt", [b"a cat\n\nK\xc3\xa4tzchen\r\n"]),
    **{f"--labels {name}": (read_label_file, name, whole) for name, whole in TABLES.items()},
    "--labels w/ l/": (lambda file: read_label_file(file.parents[1]), "w/a.txt", [b"a cat"]),
    "labels.jsonl": (lambda file: read_labels(file, [LABEL | {"h": None}]), "labels.jsonl", LABELS),
    "an image": (lambda file: open_image(file, (8, 8)), "x.png", PICTURES),
}


@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_give_an_answer_or_one_sentence(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    read, name, whole = READERS[reader]
    for image in ("a.png", "b.png", "c.png", "w/a.png", "l/a.png"):
        Path(image).parent.mkdir(exist_ok=True)
        Path(image).write_bytes(PICTURES[0])
    outcomes = set()

    @examples
    @given(documents(whole))
    def check(content):
        outcomes.add(is_refused(read, tmp_path / name, content))

    check()
    for content in whole:
        outcomes.add(is_refused(read, tmp_path / name, content))
    assert outcomes == {True, False}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        *IMAGES,
        Path(name).name,
    }


def is_refused(read, file: Path, content: bytes) -> bool:
    file.write_bytes(content)
    try:
        answer = read(file)
    except (ValueError, UserError) as error:
        sentence = str(error)
        assert len(sentence) < 1000
        assert file.name in sentence or file.parent.name in sentence
    else:
        check_text(answer)
        return False
    finally:
        assert file.read_bytes() == content
    return True


def check_text(answer) -> None:
    """What is shown to people can be shown."""
    if isinstance(answer, list):
        assert answer and all(prompt.strip() == prompt != "" for prompt in answer)
    if isinstance(answer, list) or hasattr(answer, "describe"):
        str(answer if isinstance(answer, list) else answer.describe()).encode()

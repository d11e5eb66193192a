"""Prompts: the paper's lists and files of one's own."""

import gzip
import json

import pytest

from sd.prompts import PROMPTS, load_prompts
from toy.emoji_sd import render


def test_the_prompts_are_those_of_the_papers_appendix():
    assert load_prompts("animals") is PROMPTS["animals"]
    assert len(set(PROMPTS["animals"])) == 45 and "an ant" in PROMPTS["animals"]
    assert load_prompts("hand") == ["1 hand"]
    assert len(set(load_prompts("unsafe"))) == 14


def test_the_animals_are_those_that_the_emoji_model_was_trained_on():
    assert PROMPTS["animals"] == [render.caption(name) for name in render.NAMES]


def test_a_file_has_one_prompt_a_line_and_blank_lines_are_none(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n a blue cat \n\nKätzchen\n", encoding="utf-8")
    assert load_prompts(str(file)) == ["a blue cat", "Kätzchen"]


def read(tmp_path, name: str, content: str | bytes) -> list[str]:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_prompts(str(file))


CATS = ["a blue cat, asleep", 'a "cat"', "Kätzchen"]
FILES = {
    "p.jsonl": [json.dumps({"seed": 1, "prompt": text}) for text in CATS],
    "caption.jsonl": [json.dumps({"caption": text}, ensure_ascii=False) for text in CATS],
    "texts.jsonl": ["", *map(json.dumps, CATS), ""],
    "p.json": ["[", ",".join(json.dumps({"text": text}) for text in CATS), "]"],
    "texts.json": [json.dumps(CATS)],
    "p.csv": ["seed,prompt", '1,"a blue cat, asleep"', '2,a "cat"', "3, Kätzchen ", ",", ""],
    "P.CSV": ["Prompt", '"a blue cat, asleep"', '"a ""cat"""', "Kätzchen"],
    "p.tsv": ["Category\tPrompt", "x\ta blue cat, asleep", 'y\ta "cat"', "z\tKätzchen"],
    "semicolons.csv": ["Seed;Prompt", "1;a blue cat, asleep", '2;"a ""cat"""', "3;Kätzchen"],
    "p.txt": ["a blue cat, asleep", "", ' a "cat"', "Kätzchen"],
    "p": ["a blue cat, asleep", 'a "cat"', "Kätzchen", "", ""],
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_kind_of_file_is_read(tmp_path, name, start, end):
    content = start + end.join(FILES[name]).encode()
    assert read(tmp_path, name, content) == CATS
    assert read(tmp_path, f"{name}.gz", gzip.compress(content)) == CATS


def test_a_parquet_file_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    rows = [{"jpg_0": b"x", "Caption": prompt} for prompt in CATS]
    parquet.write_table(table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet")) == CATS


def test_the_column_prompt_counts_before_caption_and_text(tmp_path):
    rows = "text,caption,prompt\na,b,c\n"
    assert read(tmp_path, "p.csv", rows) == ["c"]
    assert read(tmp_path, "p.csv", rows.replace("prompt", "id")) == ["b"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    text = f"a cat{separator}asleep"
    assert read(tmp_path, "p.txt", f"{text}\na dog\n") == [text, "a dog"]
    assert read(tmp_path, "p.csv", f"prompt\n{text}\na dog\n") == [text, "a dog"]
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    assert read(tmp_path, "p.jsonl", f"{row}\n") == [text]


def test_a_prompt_that_is_there_twice_is_drawn_twice_as_often(tmp_path):
    assert read(tmp_path, "p.txt", "a cat\na dog\na cat") == ["a cat", "a dog", "a cat"]


REFUSED = [
    ("p.txt", "", "p.txt: the file has no prompt"),
    ("p.txt", " \n\n", "the file has no prompt"),
    ("p.txt", b"\xfa", "line 1: this is not UTF-8; save it as UTF-8"),
    ("p.txt", "a cat\nKätzchen".encode("latin-1"), "line 2: this is not UTF-8"),
    ("p.txt", "a cat".encode("utf-16"), "line 1: this is not UTF-8; save it as UTF-8"),
    ("p.txt", '{"prompt": "a cat"}\n', "line 1: this is JSON; name the file .json"),
    ("p.txt", '[\n{"prompt": "a cat"}\n]', "line 1: this is JSON"),
    ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": "a d', "line 2: this is not JSON"),
    ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": 5}', "line 2: the prompt is 5; give a text"),
    ("p.jsonl", '"a cat"\nnull', "line 2: the prompt is None"),
    ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: this is not JSON in UTF-8"),
    ("p.jsonl", '{"words": "a cat"}', "line 1: its columns are words; give one named prompt"),
    ("p.json", '{"prompt": "a cat"}', "this is no list"),
    ("p.json", '["a cat", ["a dog"]]', "entry 2: the prompt is ['a dog']"),
    ("p.json", "[]", "the file has no prompt"),
    ("p.csv", "prompt\n", "the file has no prompt"),
    ("p.csv", "a cat\na dog", "line 2: its columns are a cat; give one named prompt, caption"),
    ("p.csv", "prompt\na cat, asleep", "line 2: the row has 2 cells"),
    ("p.csv", "prompt,seed\na cat,1\n,2", "line 3: the prompt is None"),
    ("p.csv", "prompt,prompt\na cat,a dog", "line 1: a column is twice"),
    ("p.csv", 'prompt\n"a" cat', "line 2: this is no table"),
    ("p.parquet", b"PAR1\x15\x04\x15\x80", "the file cannot be read (Parquet"),
]


@pytest.mark.parametrize("name, content, message", REFUSED)
def test_a_file_that_is_not_understood_is_refused_with_its_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match="^--prompts .*p[.]") as error:
        read(tmp_path, name, content)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "none.txt", "none.csv", "animal", "folder", "a" * 300])
def test_what_is_no_file_is_refused_with_the_lists_that_there_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot be read .*; give a file, or animals, hand, uns"):
        load_prompts(name)
    with pytest.raises(ValueError, match="^--eval-prompts "):
        load_prompts(name, "--eval-prompts")

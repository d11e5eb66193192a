"""Label files: every form, how votes become groups, and what is refused."""

import csv
import gzip
import io
import json
import os
import time
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd import UserError, label_files, label_forms
from sd.label_files import MAX_GROUP, Group, LabelFile, merge, read_label_file

examples = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = [f"{letter}.png" for letter in "abcdefghijklmnopqrstuvwxyz"]
CAT = {"prompt": "a cat"}
AB, DC = ["a.png", "b.png"], ["c.png", "d.png"]


def picture(value: int = 0, kind: str = "PNG", side: int = 1) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(file, kind)
    return file.getvalue()


PNG = picture()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images a.png to z.png."""
    for name in NAMES:
        (tmp_path / name).write_bytes(PNG)
    return tmp_path


def as_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(folder: Path, rows: list[dict]) -> LabelFile:
    return read_text(folder, "labels.jsonl", as_jsonl(rows))


def read_text(folder: Path, name: str, text: str | bytes) -> LabelFile:
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    return read_label_file(folder / name)


def by_name(label_file: LabelFile) -> list[tuple[str, list[tuple[str, str]]]]:
    """The prompt and the votes (winner, loser) of each group, images by their stems."""
    groups = []
    for prompt, images, pairs in label_file.groups:
        groups.append((prompt, [(images[i].stem, images[j].stem) for i, j in pairs]))
    return groups


def pair(winner: str, loser: str, prompt: str = "a cat") -> dict:
    return {"prompt": prompt, "chosen": f"{winner}.png", "rejected": f"{loser}.png"}


def write_table(file: Path, rows: list[dict]) -> None:
    """Rows of one form as .csv or .tsv, written by Python's own writer."""
    cells = [
        {
            name: json.dumps(value) if isinstance(value, list | bool) else value
            for name, value in row.items()
        }
        for row in rows
    ]
    with file.open("w", newline="", encoding="utf-8") as stream:
        delimiter = "\t" if file.suffix == ".tsv" else ","
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(cells)


# The forms. Each says: of one prompt, a is better than b; of another, d is better than c

FORMS = {
    "h": [{"images": AB, "h": 1}, {"images": DC, "h": -1}],
    "bad": [{"images": AB, "bad": [False, True]}, {"images": DC, "bad": [True, False]}],
    "rank": [{"images": AB, "rank": [1, 2]}, {"images": DC, "rank": [0.5, 0.25]}],
    "image_0": [
        {"image_0": "a.png", "image_1": "b.png", "label_0": 1, "label_1": 0, "has_label": True},
        {"image_0": "c.png", "image_1": "d.png", "label_0": 0.25, "label_1": 0.75, "has_label": 1},
    ],
    "jpg_0": [
        {"jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1.0, "label_1": 0.0},
        {"jpg_0": "c.png", "jpg_1": "d.png", "label_0": 0.0, "label_1": 1.0},
    ],
    "chosen": [
        {"chosen": "a.png", "rejected": "b.png", "score": 3},
        {"chosen": "d.png", "rejected": "c.png", "score": 4},
    ],
    "HPDv3": [
        {"path1": "a.png", "path2": "b.png", "confidence": 0.9, "choice_dist": [9, 1]},
        {"path1": "d.png", "path2": "c.png", "confidence": 0.6, "choice_dist": [3, 2]},
    ],
    "HPDv2": [
        {"file_path": AB, "human_preference": [1, 0], "user_hash": "x"},
        {"file_path": DC, "human_preference": [0, 1], "user_hash": "y"},
    ],
    "HPDv2, images": [
        {"image_path": AB, "human_preference": [1, 0]},
        {"image_path": DC, "human_preference": [0, 1]},
    ],
    "HPDv2, ranks": [
        {"image_path": AB, "rank": [0, 1]},
        {"image_path": DC, "rank": [1, 0]},
    ],
    "prompt_id": [
        {"image_path": "a.png", "rank": 1, "prompt_id": 7},
        {"image_path": "c.png", "rank": 5, "prompt_id": 8},
        {"image_path": "b.png", "rank": 2, "prompt_id": 7},
        {"image_path": "d.png", "rank": 4, "prompt_id": 8},
    ],
    "Label Studio, table": [
        {"annotation_id": 1, "image1": "a.png", "image2": "b.png", "choice": "left"},
        {"annotation_id": 2, "image1": "c.png", "image2": "d.png", "choice": "right"},
    ],
}
PROMPTS = {"a": 'a "cat", asleep\non a mat', "b": 'a "cat", asleep\non a mat', "c": "ein Hündchen"}
PROMPTS["d"] = PROMPTS["c"]
IMAGE_COLUMNS = ("images", "image_path", "file_path", "chosen", "image_0", "jpg_0", "path1")


def prompt_of(row: dict) -> str:
    name = next(row[column] for column in (*IMAGE_COLUMNS, "image1") if column in row)
    return PROMPTS[(name[0] if isinstance(name, list) else name)[0]]


def expected(folder: Path) -> LabelFile:
    a, b, c, d = (folder / f"{letter}.png" for letter in "abcd")
    groups = [Group(PROMPTS["a"], [a, b], [(0, 1)]), Group(PROMPTS["c"], [d, c], [(0, 1)])]
    return LabelFile(groups, first='a "cat", asleep on a mat: a.png is better than b.png')


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_kind_of_file_gives_the_same_groups(folder, form):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    rows = [{"caption": prompt_of(row), **row} for row in FORMS[form]]
    (folder / "x.jsonl").write_text(as_jsonl(rows))
    (folder / "x.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    write_table(folder / "x.csv", rows)
    write_table(folder / "x.tsv", rows)
    for suffix in ("jsonl", "json", "csv", "tsv"):
        content = (folder / f"x.{suffix}").read_bytes()
        assert read_label_file(folder / f"x.{suffix}") == expected(folder), suffix
        assert read_text(folder, f"bom.{suffix}", b"\xef\xbb\xbf" + content) == expected(folder)
        assert read_text(folder, f"X.{suffix}.GZ", gzip.compress(content)) == expected(folder)
    rows = [{name.capitalize(): value for name, value in row.items()} for row in rows]
    assert read_text(folder, "X.JSON", json.dumps(rows)) == expected(folder)
    rows = [row | {"Has_label": True} if "Has_label" in row else row for row in rows]
    parquet.write_table(table.from_pylist(rows), folder / "x.parquet")
    assert read_label_file(folder / "x.parquet") == expected(folder)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_as_excel_and_other_programs_write_them(folder, end):
    tables = {
        "x.csv": ["", "prompt,chosen,rejected", "", " a\u2028cat , a.png, b.png"],
        "semicolons.csv": ["Prompt;Chosen;Rejected;;", "a\u2028cat;a.png;b.png;;"],
        "sep.csv": ["sep=;", "prompt;chosen;rejected", '"a\u2028cat";a.png;b.png'],
        "comma.csv": ["sep=,", "prompt,chosen,rejected", "a\u2028cat,a.png,b.png"],
        "tabs.csv": ["prompt\tchosen\trejected", "a\u2028cat\ta.png\tb.png"],
        "index.csv": [",prompt,chosen,rejected", "0,a\u2028cat,a.png,b.png"],
    }
    for name, lines in tables.items():
        label_file = read_text(folder, name, end.join(lines) + end)
        assert by_name(label_file) == [("a\u2028cat", [("a", "b")])], name


def test_quotes_in_a_tsv_are_text_unless_they_enclose_a_cell(folder):
    header = "prompt\tchosen\trejected\n"
    cells = ['"cat" in a hat', '"a ""cat"""', 'a "cat"', '"', '12" tall']
    prompts = ['"cat" in a hat', 'a "cat"', 'a "cat"', '"', '12" tall']
    for cell, prompt in zip(cells, prompts, strict=True):
        label_file = read_text(folder, "x.tsv", f"{header}{cell}\ta.png\tb.png\n")
        assert by_name(label_file) == [(prompt, [("a", "b")])]
    label_file = read_text(folder, "x.tsv", f'{header}"a\n""cat"""\ta.png\tb.png\n')
    assert by_name(label_file) == [('a\n"cat"', [("a", "b")])]


def test_numbers_and_booleans_as_other_programs_write_them(folder):
    table = 'prompt,images,h\na cat,"[""a.png"", ""b.png""]",-1.0\na cat,"[""c.png"", ""d.png""]",'
    label_file = read_text(folder, "x.csv", table)
    assert by_name(label_file) == [("a cat", [("b", "a")])] and label_file.skipped == 1
    rows = ["True,1", "true,1", "1,1", "1.0,1", "FALSE,", "0,0"]
    lines = [f"a cat,a.png,{NAMES[k + 1]},{row},0" for k, row in enumerate(rows)]
    header = "prompt,image_0,image_1,has_label,label_0,label_1"
    label_file = read_text(folder, "y.csv", "\n".join([header, *lines]))
    assert by_name(label_file) == [("a cat", [("a", "b"), ("a", "c"), ("a", "d"), ("a", "e")])]
    assert label_file.skipped == 2


def task(*choices, to_name: str = "one,two", **data) -> dict:
    """A task of Label Studio's JSON export, with an annotation for each choice."""
    annotations = []
    for choice in choices:
        value = {"type": "pairwise", "to_name": to_name, "value": {"selected": choice}}
        comment = {"type": "textarea", "to_name": "comment", "value": {"text": ["so-so"]}}
        annotations.append({"result": [comment, value] if choice else [], "was_cancelled": False})
    return {"id": 1, "data": {**CAT, **data}, "annotations": annotations}


def test_the_json_export_of_label_studio(folder):
    local = {key: f"/data/local-files/?d={key}.png" for key in "ab"}
    label_file = read(
        folder,
        [
            task("left", "left", "right", None, **local),
            task("left", right="d.png", left="c.png"),
            task("right", to_name="y,x", x="e.png", y="f.png"),
            task(x="g.png", y="h.png"),
        ],
    )
    assert by_name(label_file) == [
        ("a cat", [("a", "b"), ("a", "b"), ("b", "a")]),
        ("a cat", [("c", "d")]),
        ("a cat", [("e", "f")]),
    ]
    assert label_file.skipped == 2
    cancelled = task("left", **local)
    cancelled["annotations"][0]["was_cancelled"] = True
    assert read(folder, [cancelled, pair("a", "b")]).skipped == 1


def write_parquet(folder: Path, rows: list[dict]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    parquet.write_table(table.from_pylist(rows), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def test_images_in_a_parquet_file_are_stored_once_as_they_are(tmp_path):
    one, two, three = picture(1), picture(2, "JPEG"), picture(3, "WEBP")
    picked = {"caption": "a cat", "label_0": 1.0, "label_1": 0.0, "has_label": True}
    file = write_parquet(
        tmp_path,
        [
            picked | {"jpg_0": one, "jpg_1": two},
            picked | {"jpg_0": three, "jpg_1": one, "label_0": 0.0, "label_1": 1.0},
            picked | {"jpg_0": two, "jpg_1": one, "label_0": 0.5, "label_1": 0.5},
            picked | {"jpg_0": two, "jpg_1": two},  # neither is better
            picked | {"jpg_0": two, "jpg_1": three[:30]},
        ],
    )
    cache = tmp_path / "run" / "given"
    label_file = read_label_file(file, cache=cache)
    (group,) = label_file.groups
    assert [image.read_bytes() for image in group.images] == [one, two, three]
    assert [image.suffix for image in group.images] == [".png", ".jpeg", ".webp"]
    assert group.pairs == [(0, 1), (0, 2)]
    assert sorted(cache.iterdir()) == sorted(group.images)
    assert label_file.ties == 2
    (damaged,) = label_file.unreadable
    assert damaged.startswith(f"{file}, row 5, image ")

    planned = read_label_file(file)  # as --dry-run does
    assert planned.describe() == label_file.describe()
    assert {*tmp_path.rglob("*")} == {file, cache.parent, cache, *group.images}


def test_images_in_a_parquet_file_as_the_datasets_library_writes_them(folder):
    stored = {"bytes": picture(1), "path": "one.png"}
    linked = {"bytes": None, "path": "a.png"}
    file = write_parquet(folder, [CAT | {"chosen": stored, "rejected": linked}])
    (group,) = read_label_file(file, cache=folder / "cache").groups
    assert group.images[0].read_bytes() == picture(1) and group.images[1] == folder / "a.png"
    file = write_parquet(folder, [CAT | {"images": [linked, stored], "rank": [2, 1]}])
    (group,) = read_label_file(file, cache=folder / "cache").groups
    assert group.images[0].read_bytes() == picture(1) and group.pairs == [(0, 1)]


def test_without_pyarrow_a_parquet_file_is_refused_with_the_remedy(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert refuse(folder, "x.parquet", b"PAR1") == ": to read .parquet, pip install pyarrow"


# A folder


def make_pairs_folder(folder: Path) -> None:
    for place in ("w/sub", "l/sub"):
        (folder / place).mkdir(parents=True)
    images = ["w/a.png", "l/a.JPG", "w/b.b.webp", "l/b.b.bmp", "w/c.avif", "l/c.tif"]
    for name in [*images, "w/sub/a.gif", "l/sub/a.png"]:
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "w/a.txt").write_text("a cat\n")
    (folder / "l/a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (folder / "b.b.txt").write_text("a dog")
    (folder / "l/c.caption").write_text("a cow")
    (folder / "sub").mkdir()
    (folder / "sub/a.caption").write_text("a fox")


def test_a_folder_of_winners_and_losers(tmp_path):
    make_pairs_folder(tmp_path)
    label_file = read_label_file(tmp_path)
    w, l_ = tmp_path / "w", tmp_path / "l"
    assert label_file.groups == [
        Group("a cat", [w / "a.png", l_ / "a.JPG"], [(0, 1)]),
        Group("a dog", [w / "b.b.webp", l_ / "b.b.bmp"], [(0, 1)]),
        Group("a cow", [w / "c.avif", l_ / "c.tif"], [(0, 1)]),
        Group("a fox", [w / "sub/a.gif", l_ / "sub/a.png"], [(0, 1)]),
    ]
    assert label_file.first == "a cat: w/a.png is better than l/a.JPG"
    assert label_file.others == () and "passed over" not in label_file.describe()


def test_other_files_in_a_folder_are_counted(tmp_path):
    make_pairs_folder(tmp_path)
    others = ["l/._a.png", "l/alone.txt", "w/.DS_Store", "w/d.heic", "w/notes.md"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    label_file = read_label_file(tmp_path)
    assert label_file.others == tuple(tmp_path / name for name in others)
    words = f"files passed over: 5 (such as {tmp_path / others[0]})"
    assert words in label_file.describe() and len(label_file.groups) == 4


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda at: (at / "l/a.JPG").unlink(), "w/a.png: give one image a in w/ and one in l/"),
        (lambda at: (at / "w/sub/a.gif").unlink(), "l/sub/a.png: give one image sub/a in w/"),
        (lambda at: (at / "w/a.jpg").write_bytes(PNG), "give one image a in w/"),
        (lambda at: (at / "l/a.txt").write_text("a dog"), "w/a.png: it has 2 prompts"),
        (lambda at: (at / "l/c.caption").unlink(), "w/c.avif: it has 0 prompts; give one"),
        (lambda at: (at / "b.b.txt").write_text(" \n"), "w/b.b.webp: the prompt is ''"),
        (lambda at: (at / "b.b.txt").write_bytes(b"\xff"), "b.b.txt, line 1: this is not UTF-8"),
    ],
)
def test_a_folder_with_a_flaw(tmp_path, change, fragment):
    make_pairs_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError) as error:
        read_label_file(tmp_path)
    assert fragment in str(error.value)


# Votes and corrections


@pytest.mark.parametrize("form", ["rank", "image_0", "jpg_0", "chosen", "HPDv2", "HPDv3"])
def test_every_row_is_a_vote(folder, form):
    (a_over_b, _), (b_over_a, _) = FORMS[form], swapped(FORMS[form])
    label_file = read(folder, [CAT | a_over_b] * 9 + [CAT | b_over_a])
    assert label_file.groups == [
        Group("a cat", [folder / "a.png", folder / "b.png"], [(0, 1)] * 9 + [(1, 0)])
    ]
    words = "images: 2, votes: 10, pairs: 1, pairs that disagree: 1, groups: 1, ties: 0, skipped: 0"
    assert f"{words}, corrections: 0," in label_file.describe()


def swapped(rows: list[dict]) -> list[dict]:
    """The same rows with the names of a and b exchanged."""
    text = json.dumps(rows).replace("a.png", "?").replace("b.png", "a.png").replace("?", "b.png")
    return json.loads(text)


def test_of_each_person_the_last_line_is_a_vote(folder):
    row, turned = CAT | {"images": AB}, CAT | {"images": AB[::-1]}
    lines = [
        row | {"h": -1},
        row | {"h": -1, "annotator": "Ann"},
        turned | {"h": -1, "annotator": "Bob"},
        row | {"h": None, "annotator": "Cleo"},
        turned | {"h": -1, "annotator": "Ann"},  # her correction: a is better
        row | {"h": 0, "annotator": "Dan"},
    ]
    label_file = read(folder, lines)
    assert by_name(label_file) == [("a cat", [("b", "a"), ("a", "b"), ("a", "b")])]
    assert (label_file.corrections, label_file.ties, label_file.skipped) == (1, 1, 1)
    other_prompt = row | {"prompt": "a dog", "h": -1}
    assert by_name(read(folder, [*lines[:1] * 5, other_prompt])) == [
        ("a cat", [("b", "a")]),
        ("a dog", [("b", "a")]),
    ]


def test_tags_of_several_people_in_another_order_of_the_images(folder):
    row = CAT | {"images": ["a.png", "b.png", "c.png"]}
    turned = CAT | {"images": ["c.png", "a.png", "b.png"]}
    lines = [
        row | {"bad": [False, False, True], "annotator": "Ann"},
        turned | {"bad": [True, False, True], "annotator": "Bob"},
        turned | {"bad": [False, True, True]},
    ]
    pairs = [("a", "c"), ("b", "c"), ("a", "c"), ("a", "b"), ("c", "a"), ("c", "b")]
    assert by_name(read(folder, lines)) == [("a cat", pairs)]
    corrected = read(folder, [*lines, row | {"bad": None, "annotator": "Ann"}])
    assert by_name(corrected) == [("a cat", pairs[2:])]
    assert (corrected.corrections, corrected.skipped) == (1, 1)


def test_lists_of_several_people_with_one_prompt_id_are_votes(folder):
    row = CAT | {"prompt_id": 7}
    ranks = {"Ann": [1, 2], "Bob": [1, 2], "Cleo": [2, 1]}
    rows = [
        row | {"image_path": name, "rank": rank, "annotator": person}
        for person, both in ranks.items()
        for name, rank in zip(AB, both, strict=True)
    ]
    assert by_name(read(folder, rows)) == [("a cat", [("a", "b"), ("a", "b"), ("b", "a")])]


# Ranks, ties, skips


def test_ranks_with_ties(folder):
    label_file = read(
        folder,
        [
            CAT | {"images": NAMES[:4], "rank": [2, 1, 3, 2]},
            CAT | {"images": NAMES[4:6], "rank": [1, 1]},
            CAT | {"images": NAMES[4:6], "rank": None},
        ],
    )
    pairs = [("b", "a"), ("b", "d"), ("b", "c"), ("a", "c"), ("d", "c")]
    assert by_name(label_file) == [("a cat", pairs)]
    assert (label_file.ties, label_file.skipped) == (1, 1)
    assert label_file.first == "a cat: b.png is better than c.png"


def test_ties_and_skips_are_counted(folder):
    picked = CAT | {"image_0": "a.png", "image_1": "b.png", "label_0": 0.5, "label_1": 0.5}
    label_file = read(
        folder,
        [
            picked,
            picked | {"has_label": False, "label_0": None},
            CAT | {"images": AB, "h": 0},
            CAT | {"images": DC, "h": None},
            CAT | {"images": AB, "bad": [True, True]},
            CAT | {"images": DC, "bad": None},
            CAT | {"file_path": DC, "human_preference": None},
            pair("x", "y"),
        ],
    )
    assert by_name(label_file) == [("a cat", [("x", "y")])]
    assert (label_file.ties, label_file.skipped) == (3, 4)
    assert label_file.first == "a cat: x.png is better than y.png"


# Groups


def test_votes_that_share_an_image_are_one_group(folder):
    rows = [
        pair("a", "b"),
        pair("x", "y", "a dog"),
        pair("c", "d"),
        pair("a", "x"),
        pair("b", "c"),  # it joins what was apart
        pair("e", "f"),
        pair("a", "b"),
    ]
    assert by_name(read(folder, rows)) == [
        ("a cat", [("a", "b"), ("a", "x"), ("c", "d"), ("b", "c"), ("a", "b")]),
        ("a dog", [("x", "y")]),
        ("a cat", [("e", "f")]),
    ]


def test_a_group_has_at_most_eight_images(folder):
    rows = [pair("a", letter) for letter in "bcdefghijkl"] + [pair("c", "b"), pair("a", "b")]
    first, second = read(folder, rows).groups
    assert [image.stem for image in first.images] == list("abcdefgh")
    assert first.pairs == [(0, k) for k in range(1, 8)] + [(2, 1), (0, 1)]
    assert [image.stem for image in second.images] == list("aijkl")


def test_a_long_list_is_dealt_out_by_quality(folder):
    rank = [*range(17, 0, -1)]  # q is best
    label_file = read(folder, [CAT | {"images": NAMES[:17], "rank": rank}])
    stems = [{image.stem for image in group.images} for group in label_file.groups]
    assert stems == [set("qnkheb"), set("pmjgda"), set("olifc")]
    assert [len(group.pairs) for group in label_file.groups] == [15, 15, 10]
    one_good = CAT | {"images": NAMES[:10], "bad": [True] * 9 + [False]}
    (group,) = read(folder, [one_good]).groups  # the other five hold no pair
    assert len(group.images) == 5 and group.images[0].stem == "j"


def seconds(votes: list) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        groups = merge(votes)
        times.append(time.process_time() - start)
    assert sum(len(group.pairs) for group in groups) == sum(len(pairs) for _, pairs in votes)
    assert all(len(group.images) <= MAX_GROUP for group in groups)
    return min(times)


def test_the_time_is_linear_also_where_all_votes_share_an_image():
    numbers, base = range(1000), Path("base")
    apart = seconds([("a cat", [(Path(f"w{n}"), Path(f"l{n}"))]) for n in numbers])
    assert seconds([("a cat", [(Path(f"{n}"), base)]) for n in numbers]) < 3 * apart
    assert seconds([("a cat", [(Path("w"), base)]) for n in numbers]) < 3 * apart
    lists = [("a cat", [(Path(f"{n}_{k}"), base) for k in range(4)]) for n in numbers]
    assert seconds(lists) < 3 * 4 * apart  # as many pairs


votes = st.tuples(
    st.sampled_from(["a cat", 'two\n"dogs", one cow', "é"]),
    st.lists(st.sampled_from(NAMES), min_size=2, max_size=12, unique=True).flatmap(
        lambda names: st.tuples(
            st.just(names),
            st.none() | st.lists(st.integers(-2, 2), min_size=len(names), max_size=len(names)),
        )
    ),
)


def check_groups(label_file: LabelFile, rows: list[dict], root: Path) -> None:
    """What holds for any lists of ranks, by brute force."""
    wanted, seen = [], []
    for row in rows:
        ranked = list(zip(row["images"], row["rank"] or [], strict=False))
        wanted += [(row["prompt"], a, b) for a, r in ranked for b, s in ranked if r < s]
    for prompt, images, pairs in label_file.groups:
        assert len(images) <= MAX_GROUP and len(set(images)) == len(images)
        assert {place for both in pairs for place in both} == set(range(len(images)))
        seen += [(prompt, images[i].name, images[j].name) for i, j in pairs]
        assert {image.parent for image in images} == {root}
    assert {*seen} <= {*wanted}
    if all(len(row["images"]) <= MAX_GROUP for row in rows):
        assert sorted(seen) == sorted(wanted)


@given(rows=st.lists(votes, min_size=1, max_size=6))
@examples
def test_groups_have_the_pairs_of_any_ranks(folder, rows):
    rows = [{"prompt": p, "images": names, "rank": rank} for p, (names, rank) in rows]
    if any(len(set(row["rank"] or [0])) > 1 for row in rows):
        write_table(folder / "x.csv", rows)
        check_groups(read_label_file(folder / "x.csv"), rows, folder)


# Images


def test_images_that_are_missing_or_damaged_are_left_out(folder, monkeypatch):
    checks, isfile = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: checks.append(path) or isfile(path))
    whole = picture(kind="JPEG", side=200)
    (folder / "z.png").write_bytes(whole[: len(whole) * 3 // 4])  # cut short
    rows = [
        pair("gone", "a"),
        CAT | {"images": ["a.png", "lost.png", "b.png"], "rank": [1, 2, 3]},
        pair("b", "gone"),
        CAT | {"images": ["never.png", "b.png"], "h": 0},
        pair("c", "c" * 300),
        pair("a", "z"),
    ]
    label_file = read(folder, rows)
    assert by_name(label_file) == [("a cat", [("a", "b")])]
    assert [image.stem for image in label_file.missing] == ["gone", "lost", "c" * 300]
    (damaged,) = label_file.unreadable
    assert damaged.startswith(f"{folder / 'z.png'}: image file is truncated")
    assert label_file.ties == 1
    assert label_file.first == "a cat: gone.png is better than a.png"
    assert not any("never" in str(path) for path in checks)
    words = label_file.describe()
    assert f"missing files: 3 (such as {folder / 'gone.png'}), unreadable files: 1 (such" in words
    (folder / "a.png").unlink()
    (folder / "a.png").mkdir()  # a folder is no image
    for loser in ("b", "z"):
        with pytest.raises(UserError, match="each pair misses an image, the first one is"):
            read(folder, [pair("a", loser)])


def test_the_folder_of_the_images(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    file = elsewhere / "labels.jsonl"
    file.write_text(as_jsonl([pair("a", "b"), pair(str(folder / "c"), "./d")]))
    label_file = read_label_file(file, folder)
    assert label_file.groups == [
        Group("a cat", [folder / "a.png", folder / "b.png"], [(0, 1)]),
        Group("a cat", [folder / "c.png", folder / "d.png"], [(0, 1)]),
    ]
    with pytest.raises(UserError, match="--images DIR") as error:
        read_label_file(file)
    assert str(elsewhere / "a.png") in str(error.value)


def test_a_link_counts_where_it_stands(folder):
    """As in a hub cache, where snapshots/REVISION/NAME is a link to blobs/SHA."""
    (folder / "snapshot").mkdir()
    (folder / "blobs").mkdir()
    (folder / "blobs/0a").write_text("prompt,chosen,rejected\na cat,one.png,two.png\n")
    (folder / "blobs/1b").write_bytes(PNG)
    (folder / "snapshot/pairs.csv").symlink_to("../blobs/0a")
    for name in ("one.png", "two.png"):
        (folder / "snapshot" / name).symlink_to("../blobs/1b")
    images = [folder / "snapshot/one.png", folder / "snapshot/two.png"]
    label_file = read_label_file(folder / "snapshot/pairs.csv")
    assert label_file.groups == [Group("a cat", images, [(0, 1)])]


@pytest.mark.parametrize("listed, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_letters_composed_or_decomposed(folder, listed, stored):
    (folder / normalize(stored, "über")).mkdir()
    image = folder / normalize(stored, "über/é.png")
    image.write_bytes(PNG)
    row = CAT | {"chosen": normalize(listed, "über/é.png"), "rejected": "a.png"}
    assert read(folder, [row]).groups[0].images == [image, folder / "a.png"]
    for side, form in (("w", listed), ("l", stored)):
        (folder / side).mkdir()
        (folder / side / normalize(form, "é.png")).write_bytes(PNG)
    (folder / normalize(stored, "é.txt")).write_text("ein Bär")
    assert by_name(read_label_file(folder)) == [
        ("ein Bär", [(normalize(listed, "é"), normalize(stored, "é"))])
    ]


def test_other_ways_to_name_a_file(folder):
    (folder / "a b.png").write_bytes(PNG)
    url = (folder / "a b.png").as_uri()
    label_file = read(folder, [CAT | {"chosen": url, "rejected": ".\\b.png"}])
    assert label_file.groups[0].images == [folder / "a b.png", folder / "./b.png"]
    twice = CAT | {"chosen": "a.png", "rejected": f"../{folder.name}/a.png"}
    assert "line 1: an image is twice" in refuse(folder, "x.jsonl", as_jsonl([twice]))


def test_labels_of_a_run(folder):
    (folder / "images").mkdir()
    names = [f"images/e001_p00_k{k}.png" for k in range(2)]
    for name in names:
        (folder / name).write_bytes(PNG)
    row = {"epoch": 1, "prompt": "a cat", "images": names, "scores": [-2.0, -1.5], "h": -1}
    label_file = read_text(
        folder, "labels.jsonl", as_jsonl([row]) + '{"epoch": 2, "prompt": "\u00e9'
    )
    images = [folder / name for name in names[::-1]]
    assert label_file.groups == [Group("a cat", images, [(0, 1)])]
    whole = json.dumps(CAT | {"images": AB, "h": 1})  # a last line that is whole counts
    assert len(read_text(folder, "labels.jsonl", as_jsonl([row]) + whole).groups) == 2
    cut = as_jsonl([row]).encode() + '{"prompt": "é'.encode()[:-1]
    assert read_text(folder, "labels.jsonl", cut).groups == label_file.groups


# Flaws

GOOD = json.dumps(pair("a", "b"))
H = {"prompt": "a cat", "images": AB, "h": 1}
PICKED = CAT | {"image_0": "a.png", "image_1": "b.png", "label_0": 1, "label_1": 0}
ONE = CAT | {"image_path": "a.png", "rank": 1, "prompt_id": 7}
BAD_ROWS = {
    "no object": ([], "JSON object"),
    "no form": ({"x": 1}, "its columns are x; give one of these sets: images, h; images, bad; "),
    "two forms": (H | {"bad": [True, False]}, "its columns are prompt, images, h, bad; give one"),
    "h of three": (H | {"images": NAMES[:3]}, "'h' compares two images, but 'images' has 3"),
    "annotator": (H | {"annotator": 3}, "'annotator' is 3"),
    "images text": (H | {"images": "a.png"}, "'images' is 'a.png'; give names of files"),
    "bad numbers": (CAT | {"images": AB, "bad": [1, 0]}, "'bad' is [1, 0]: give a list of 2 bool"),
    "rank short": (CAT | {"images": AB, "rank": [1]}, "'rank' gives [1]; give 2 numbers"),
    "rank NaN": (CAT | {"images": AB, "rank": [1, float("nan")]}, "'rank' gives [1, nan]"),
    "label null": (PICKED | {"label_0": None}, "gives [None, 0]"),
    "has_label": (PICKED | {"has_label": "no"}, "'has_label' is 'no'; give true or false"),
    "web": (pair("a", "b") | {"rejected": "https://x.org/a.png"}, "'https://x.org/a.png', in the"),
    "no list": ({name: ONE[name] for name in ("prompt", "image_path", "rank")}, "'images' is 'a.p"),
    "prompt_id true": (ONE | {"prompt_id": True}, "'prompt_id' is True; give a text or a number"),
    "data": (pair("a", "b") | {"chosen": {"bytes": "x"}}, "save images as files"),
    "data as text": (pair("a", "b") | {"chosen": "b'\\xff\\xd8'"}, "save images as files"),
    "one image": (task("left", left="a.png"), "'left' was chosen of the images ['left']; give two"),
    "a choice": (task("both", left="a.png", right="b.png"), "'both' was chosen of the images"),
    "annotations": (CAT | {"data": {}, "annotations": [3]}, "no task as Label Studio exports it"),
}


def refuse(folder: Path, name: str, content: str | bytes) -> str:
    with pytest.raises(UserError) as error:
        read_text(folder, name, content)
    message = str(error.value)
    assert message.startswith(f"{folder / name}") and len(message) < 700
    return message.removeprefix(f"{folder / name}")


@pytest.mark.parametrize("flaw", BAD_ROWS)
def test_a_row_with_a_flaw_is_named(folder, flaw):
    row, fragment = BAD_ROWS[flaw]
    message = refuse(folder, "x.jsonl", f"{GOOD}\n\n{json.dumps(row)}\n{GOOD}\n")
    assert message.startswith(", line 3: ") and fragment in message


def test_rows_of_one_prompt_id_have_one_prompt_and_each_image_once(folder):
    message = refuse(folder, "x.jsonl", as_jsonl([ONE, ONE | {"prompt": "a dog"}]))
    assert message.startswith(", line 2: prompt_id 7 had another prompt")
    message = refuse(folder, "x.jsonl", as_jsonl([ONE, ONE | {"rank": 2, "prompt_id": "7"}]))
    assert message.startswith(", line 2: an image is twice")


HEADER = "prompt,chosen,rejected\n"
BAD_FILES = [
    ("x.jsonl", f"{GOOD}\n{{'a': 1}}\n{GOOD}\n", ", line 2: this is not JSON"),
    ("x.jsonl", GOOD.encode() + b'\n"\xff"\n', ", line 2: this is not JSON in UTF-8"),
    ("x.jsonl", "\n \n", ": there are no rows"),
    ("x.jsonl.gz", b"\x1f\x8b\x08", ": the file cannot be read (Compressed file ended"),
    ("x.csv", HEADER, ": there are no rows"),
    ("x.csv", "a cat,a.png,b.png\na dog,c.png,d.png", ", line 2: its columns are a cat, a.png"),
    ("x.csv", f'{HEADER}"a\ncat",a.png,b.png\na dog,c.png', ", line 4: the row has 2 cells"),
    ("x.csv", f'{HEADER}a,a.png,b.png\n"a\n\ndog",c.png,d.png,1', ", line 3: the row has 4 cells"),
    ("x.csv", f'{HEADER}"a cat,a.png,b.png\n', ", line 2: this is no table"),
    ("x.csv", "prompt,images,h\na cat,\"['a.png', 'b.png']\",1", ", line 2: 'images' is \"['a"),
    ("x.csv", "prompt,image_path,rank,prompt_id\na cat,a.png,1,", ", line 2: 'prompt_id' is None"),
    ("labels", GOOD, ": give a file .jsonl, .json, .csv, .tsv, .parquet, or a folder with w/"),
    (
        "x.jsonl",
        as_jsonl([H | {"h": 0}, H | {"h": None, "annotator": "Ann"}, PICKED | {"label_0": 0}]),
        ": no image is better than another (2 ties, 1 skipped): nothing to train on",
    ),
]


@pytest.mark.parametrize("name, content, expected", BAD_FILES)
def test_a_file_with_a_flaw(folder, name, content, expected):
    assert refuse(folder, name, content).startswith(expected)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: the file cannot be read .*No such file"):
        read_label_file(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="there are no images in w/ and l/"):
        read_label_file(tmp_path)


def test_the_docstring_names_every_form():
    words = " ".join(label_files.__doc__.split())
    assert all(", ".join(form) in words for form in label_forms.FORMS)

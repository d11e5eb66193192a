"""Label files: every accepted form, how comparisons become groups, and what is refused."""

import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd import UserError, label_files
from sd.label_files import MAX_GROUP, Group, LabelFile, read_label_file

examples = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = [f"{letter}.png" for letter in "abcdefghijklmnopqrstuvwxyz"]
CAT = {"prompt": "a cat"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png to z.png, which are not opened."""
    for name in NAMES:
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def as_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(folder: Path, rows: list[dict]) -> LabelFile:
    (folder / "labels.jsonl").write_text(as_jsonl(rows))
    return read_label_file(folder / "labels.jsonl")


def read_text(folder: Path, name: str, text: str | bytes) -> LabelFile:
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    return read_label_file(folder / name)


def by_name(found: LabelFile) -> list[tuple[str, list[tuple[str, str]]]]:
    """The prompt and the pairs (winner, loser) of each group, images by their stems."""
    groups = []
    for prompt, images, pairs in found.groups:
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

AB, DC = ["a.png", "b.png"], ["c.png", "d.png"]
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
    "prompt_id": [
        {"image_path": "a.png", "rank": 1, "prompt_id": 7},
        {"image_path": "c.png", "rank": 5, "prompt_id": 8},
        {"image_path": "b.png", "rank": 2, "prompt_id": 7},
        {"image_path": "d.png", "rank": 4, "prompt_id": 8},
    ],
}
PROMPTS = {"a": 'a "cat", asleep\non a mat', "b": 'a "cat", asleep\non a mat', "c": "ein Hündchen"}
PROMPTS["d"] = PROMPTS["c"]


def prompt_of(row: dict) -> str:
    name = row.get("image_path") or row.get("chosen") or row.get("image_0") or row.get("jpg_0")
    return PROMPTS[(name or row["images"][0])[0]]


def expected(folder: Path) -> LabelFile:
    a, b, c, d = (folder / f"{letter}.png" for letter in "abcd")
    groups = [Group(PROMPTS["a"], [a, b], [(0, 1)]), Group(PROMPTS["c"], [d, c], [(0, 1)])]
    first = 'a "cat", asleep on a mat: a.png is better than b.png'
    return LabelFile(groups, ties=0, skipped=0, missing=[], first=first)


@pytest.mark.parametrize("text", ["prompt", "caption"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_kind_of_file_gives_the_same_groups(folder, form, text):
    rows = [{text: prompt_of(row), **row} for row in FORMS[form]]
    (folder / "x.jsonl").write_text(as_jsonl(rows))
    (folder / "x.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    write_table(folder / "x.csv", rows)
    write_table(folder / "x.tsv", rows)
    for suffix in ("jsonl", "json", "csv", "tsv"):
        assert read_label_file(folder / f"x.{suffix}") == expected(folder), suffix
        content = (folder / f"x.{suffix}").read_bytes()
        assert read_text(folder, f"bom.{suffix}", b"\xef\xbb\xbf" + content) == expected(folder)
        (folder / f"x.{suffix}").rename(folder / f"X.{suffix.upper()}")
        assert read_label_file(folder / f"X.{suffix.upper()}") == expected(folder)


def test_line_ends_of_windows_and_line_separators_inside_a_text(folder):
    row = {"prompt": "a\u2028cat\u0085", **pair("a", "b", "a\u2028cat")}
    text = json.dumps(row, ensure_ascii=False)
    assert by_name(read_text(folder, "x.jsonl", f"\r\n{text}\r\n\r\n")) == [
        ("a\u2028cat", [("a", "b")])
    ]
    table = "prompt,chosen,rejected\r\n\r\n a\u2028cat , a.png, b.png\r\n"
    for ends in ("\r\n", "\n", "\r"):
        found = read_text(folder, "x.csv", table.replace("\r\n", ends))
        assert by_name(found) == [("a\u2028cat", [("a", "b")])]


def test_numbers_and_booleans_as_other_programs_write_them_into_tables(folder):
    table = (
        'prompt,images,h\na cat,"[""a.png"", ""b.png""]",-1.0\na cat,"[""c.png"", ""d.png""]",\n'
    )
    found = read_text(folder, "x.csv", table)
    assert by_name(found) == [("a cat", [("b", "a")])]
    assert found.skipped == 1
    rows = ["True,1", "true,1", "1,1", "1.0,1", "FALSE,", "0,0"]
    lines = [f"a cat,a.png,{NAMES[k + 1]},{row},0" for k, row in enumerate(rows)]
    header = "prompt,image_0,image_1,has_label,label_0,label_1"
    found = read_text(folder, "y.csv", "\n".join([header, *lines]))
    assert by_name(found) == [("a cat", [("a", "b"), ("a", "c"), ("a", "d"), ("a", "e")])]
    assert found.skipped == 2


def make_pairs_folder(folder: Path) -> None:
    for side in ("w", "l"):
        (folder / side).mkdir()
    for name in ("w/a.png", "l/a.JPG", "w/b.b.webp", "l/b.b.bmp", "w/c.jpeg", "l/c.png"):
        (folder / name).write_bytes(b"x")
    (folder / "w/a.txt").write_text("a cat\n")
    (folder / "l/a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (folder / "b.b.txt").write_text("a dog")
    (folder / "l/c.txt").write_text("a cow")
    (folder / "w/notes.md").write_text("passed over")


def test_a_folder_of_winners_and_losers(tmp_path):
    make_pairs_folder(tmp_path)
    found = read_label_file(tmp_path)
    w, l_ = tmp_path / "w", tmp_path / "l"
    assert found.groups == [
        Group("a cat", [w / "a.png", l_ / "a.JPG"], [(0, 1)]),
        Group("a dog", [w / "b.b.webp", l_ / "b.b.bmp"], [(0, 1)]),
        Group("a cow", [w / "c.jpeg", l_ / "c.png"], [(0, 1)]),
    ]
    assert found.first == "a cat: w/a.png is better than l/a.JPG"


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda at: (at / "l/a.JPG").unlink(), "w/a.png: give one image a in w/ and one in l/"),
        (lambda at: (at / "w/a.png").unlink(), "l/a.JPG: give one image a in w/ and one in l/"),
        (lambda at: (at / "w/a.jpg").write_bytes(b"x"), "give one image a in w/"),
        (lambda at: (at / "l/a.txt").write_text("a dog"), "w/a.png: it has 2 prompts"),
        (lambda at: (at / "b.b.txt").unlink(), "w/b.b.webp: it has 0 prompts; give one"),
        (lambda at: (at / "b.b.txt").write_text(" \n"), "w/b.b.webp: the prompt is ''"),
        (lambda at: (at / "b.b.txt").write_bytes(b"\xff"), "w/b.b.webp: its prompt is not in UTF"),
    ],
)
def test_a_folder_with_a_flaw(tmp_path, change, fragment):
    make_pairs_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        read_label_file(tmp_path)
    assert fragment in str(caught.value)


# Corrections and several people


def test_the_last_line_of_each_person_counts_and_the_majority_decides(folder):
    row = CAT | {"images": AB}
    turned = CAT | {"images": AB[::-1]}
    said = [
        row | {"h": -1},
        row | {"h": -1, "annotator": "Ann"},
        turned | {"h": -1, "annotator": "Bob"},  # a is better
        row | {"h": None, "annotator": "Cleo"},
        turned | {"h": -1, "annotator": "Ann"},  # her correction: a is better
    ]
    found = read(folder, said)
    assert by_name(found) == [("a cat", [("a", "b")])]
    assert (found.ties, found.skipped) == (0, 1)
    assert by_name(read(folder, said[:4])) == [("a cat", [("b", "a")])]
    other_prompt = row | {"prompt": "a dog", "h": -1}
    assert by_name(read(folder, [*said, other_prompt])) == [
        ("a cat", [("a", "b")]),
        ("a dog", [("b", "a")]),
    ]
    draw = [said[0], said[2], pair("c", "d")]
    assert (read(folder, draw).ties, by_name(read(folder, draw))) == (1, [("a cat", [("c", "d")])])


def test_tags_in_another_order_of_the_images(folder):
    row = CAT | {"images": ["a.png", "b.png", "c.png"]}
    turned = CAT | {"images": ["c.png", "a.png", "b.png"]}
    said = [
        row | {"bad": [False, False, True], "annotator": "Ann"},
        turned | {"bad": [True, False, True], "annotator": "Bob"},
        turned | {"bad": [False, True, True]},
    ]
    # bad say of a: 1 of 3, of b: 2, of c: 2
    assert by_name(read(folder, said)) == [("a cat", [("a", "b"), ("a", "c")])]
    corrected = [*said, row | {"bad": None, "annotator": "Ann"}]
    found = read(folder, corrected)  # of two people one is no majority: b alone is bad
    assert by_name(found) == [("a cat", [("a", "b"), ("c", "b")])]
    assert found.skipped == 1


def test_what_is_not_in_these_two_forms_is_not_a_correction(folder):
    found = read(folder, [pair("a", "b"), pair("b", "a"), pair("a", "b")])
    assert by_name(found) == [("a cat", [("a", "b"), ("b", "a")])]


# Ranks, ties, skips


def test_ranks_with_ties(folder):
    found = read(
        folder,
        [
            CAT | {"images": NAMES[:4], "rank": [2, 1, 3, 2]},
            CAT | {"images": NAMES[4:6], "rank": [1, 1]},
            CAT | {"images": NAMES[4:6], "rank": None},
        ],
    )
    pairs = [("b", "a"), ("b", "d"), ("b", "c"), ("a", "c"), ("d", "c")]
    assert by_name(found) == [("a cat", pairs)]
    assert (found.ties, found.skipped) == (1, 1)
    assert found.first == "a cat: b.png is better than c.png"


def test_ties_and_skips_are_counted(folder):
    picked = CAT | {"image_0": "a.png", "image_1": "b.png", "label_0": 0.5, "label_1": 0.5}
    found = read(
        folder,
        [
            picked,
            picked | {"has_label": False, "label_0": None},
            CAT | {"images": AB, "h": 0},
            CAT | {"images": DC, "h": None},
            CAT | {"images": AB, "bad": [True, True]},
            CAT | {"images": DC, "bad": None},
            pair("x", "y"),
        ],
    )
    assert by_name(found) == [("a cat", [("x", "y")])]
    assert (found.ties, found.skipped) == (3, 3)
    assert found.first == "a cat: x.png is better than y.png"


# Groups


def test_comparisons_that_share_an_image_are_one_group(folder):
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
        ("a cat", [("a", "b"), ("a", "x"), ("c", "d"), ("b", "c")]),
        ("a dog", [("x", "y")]),
        ("a cat", [("e", "f")]),
    ]


def test_a_group_has_at_most_eight_images(folder):
    rows = [pair("a", letter) for letter in "bcdefghijkl"] + [pair("c", "b")]
    first, second = read(folder, rows).groups
    assert [image.stem for image in first.images] == list("abcdefgh")
    assert first.pairs == [(0, k) for k in range(1, 8)] + [(2, 1)]
    assert [image.stem for image in second.images] == list("aijkl")


def test_a_long_list_is_dealt_out_by_quality(folder):
    rank = [*range(17, 0, -1)]  # q is best
    found = read(folder, [CAT | {"images": NAMES[:17], "rank": rank}])
    hands = [{image.stem for image in group.images} for group in found.groups]
    assert hands == [set("qnkheb"), set("pmjgda"), set("olifc")]
    assert [len(group.pairs) for group in found.groups] == [15, 15, 10]
    one_good = CAT | {"images": NAMES[:10], "bad": [True] * 9 + [False]}
    (group,) = read(folder, [one_good]).groups  # the other five hold no pair
    assert len(group.images) == 5 and group.images[0].stem == "j"


comparisons = st.tuples(
    st.sampled_from(["a cat", 'two\n"dogs", one cow', "é"]),
    st.lists(st.sampled_from(NAMES), min_size=2, max_size=12, unique=True).flatmap(
        lambda names: st.tuples(
            st.just(names),
            st.none() | st.lists(st.integers(-2, 2), min_size=len(names), max_size=len(names)),
        )
    ),
)


def check_groups(found: LabelFile, rows: list[dict], root: Path) -> None:
    """What holds for any lists of ranks, by brute force."""
    told = set()
    for row in rows:
        ranked = list(zip(row["images"], row["rank"] or [], strict=False))
        told |= {(row["prompt"], a, b) for a, r in ranked for b, s in ranked if r < s}
    seen = set()
    for prompt, images, pairs in found.groups:
        assert len(images) <= MAX_GROUP
        assert len(set(images)) == len(images) and len(set(pairs)) == len(pairs)
        assert {place for both in pairs for place in both} == set(range(len(images)))
        seen |= {(prompt, images[i].name, images[j].name) for i, j in pairs}
        assert {image.parent for image in images} == {root}
    assert seen <= told
    if all(len(row["images"]) <= MAX_GROUP for row in rows):
        assert seen == told
    for i, one in enumerate(found.groups):  # what could still be joined was
        for other in found.groups[:i]:
            shared = set(one.images) & set(other.images)
            joined = set(one.images) | set(other.images)
            assert one.prompt != other.prompt or not shared or len(joined) > MAX_GROUP


@given(rows=st.lists(comparisons, min_size=1, max_size=6))
@examples
def test_any_comparisons_read_the_same_from_every_kind_of_file(folder, rows):
    rows = [{"prompt": p, "images": names, "rank": rank} for p, (names, rank) in rows]
    (folder / "x.jsonl").write_text(as_jsonl(rows))
    (folder / "x.json").write_text(json.dumps(rows))
    write_table(folder / "x.csv", rows)
    write_table(folder / "x.tsv", rows)
    found = []
    for suffix in ("jsonl", "json", "csv", "tsv"):
        try:
            found.append(read_label_file(folder / f"x.{suffix}"))
        except UserError as error:
            found.append(str(error).replace(f"x.{suffix}", "x"))
    assert found[1:] == found[:1] * 3
    some = any(len(set(row["rank"] or [0])) > 1 for row in rows)
    assert isinstance(found[0], LabelFile) == some
    if some:
        check_groups(found[0], rows, folder)


# Images


def test_images_that_are_not_there_are_left_out(folder, monkeypatch):
    looked = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or isfile(path))
    found = read(
        folder,
        [
            pair("gone", "a"),
            CAT | {"images": ["a.png", "lost.png", "b.png"], "rank": [1, 2, 3]},
            pair("b", "gone"),
            CAT | {"images": ["never.png", "b.png"], "h": 0},
            pair("c", "c" * 300),
        ],
    )
    assert by_name(found) == [("a cat", [("a", "b")])]
    assert [image.stem for image in found.missing] == ["gone", "lost", "c" * 300]
    assert found.ties == 1
    assert found.first == "a cat: gone.png is better than a.png"
    assert len(set(looked)) == len(looked) == 6
    (folder / "a.png").unlink()
    (folder / "a.png").mkdir()  # a folder is no image
    with pytest.raises(UserError, match="each pair misses an image"):
        read(folder, [pair("a", "b")])


def test_the_folder_of_the_images(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    file = elsewhere / "labels.jsonl"
    file.write_text(as_jsonl([pair("a", "b"), pair(str(folder / "c"), "./d")]))
    found = read_label_file(file, folder)
    assert found.groups == [
        Group("a cat", [folder / "a.png", folder / "b.png"], [(0, 1)]),
        Group("a cat", [folder / "c.png", folder / "d.png"], [(0, 1)]),
    ]
    assert read_label_file(file, images=folder) == found
    with pytest.raises(UserError) as caught:
        read_label_file(file)
    message = str(caught.value)
    assert str(elsewhere / "a.png") in message and "--images DIR" in message
    with pytest.raises(UserError, match="nowhere/a.png"):
        read_label_file(file, Path("nowhere"))


def test_labels_of_a_run(folder):
    (folder / "images").mkdir()
    names = [f"images/e001_p00_k{k}.png" for k in range(2)]
    for name in names:
        (folder / name).write_bytes(b"x")
    row = {"epoch": 1, "prompt": "a cat", "images": names, "scores": [-2.0, -1.5], "h": -1}
    found = read_text(folder, "labels.jsonl", as_jsonl([row]) + '{"epoch": 2, "prompt": "\u00e9')
    images = [folder / name for name in names[::-1]]
    assert found.groups == [Group("a cat", images, [(0, 1)])]
    whole = json.dumps(CAT | {"images": AB, "h": 1})  # a last line that is whole counts
    assert len(read_text(folder, "labels.jsonl", as_jsonl([row]) + whole).groups) == 2
    cut = as_jsonl([row]).encode() + '{"prompt": "é'.encode()[:-1]
    assert read_text(folder, "labels.jsonl", cut).groups == found.groups


def test_describe(folder):
    rows = [
        pair("a", "b", "a very\nlong prompt " * 20),
        pair("c", "d"),
        pair("c", "e"),
        pair("x", "y"),
        CAT | {"images": AB, "h": 0},
        CAT | {"images": DC, "h": None},
        CAT | {"images": ["a.png", "f.png"], "h": None},
        pair("gone", "b"),
    ]
    found = read(folder, rows)
    counts, first = found.describe().split("\n")
    assert counts == (
        "prompts: 2, images: 7, pairs: 4, groups: 3, ties: 1, skipped: 2, "
        f"missing files: 1 (such as {folder / 'gone.png'})"
    )
    assert first.startswith("The first comparison as understood: a very long prompt a very")
    assert first.endswith("...: a.png is better than b.png") and len(first) < 150
    assert "missing files: 0\n" in read(folder, rows[:3]).describe()


# Flaws

GOOD = json.dumps(pair("a", "b"))
H = {"prompt": "a cat", "images": AB, "h": 1}
PICKED = CAT | {"image_0": "a.png", "image_1": "b.png", "label_0": 1, "label_1": 0}
ONE = CAT | {"image_path": "a.png", "rank": 1, "prompt_id": 7}
BAD_ROWS = {
    "no object": ([], "JSON object"),
    "null": (None, "JSON object"),
    "no form": (
        CAT | {"winner": "a.png"},
        "its columns are prompt, winner; give one of these sets",
    ),
    "the sets": ({"x": 1}, "images, bad; images, rank; image_0, image_1, label_0, label_1; jpg_0"),
    "two forms": (H | {"bad": [True, False]}, "its columns are prompt, images, h, bad; give one"),
    "no prompt": ({"images": AB, "h": 1}, "the prompt is None"),
    "empty prompt": (H | {"prompt": " "}, "the prompt is ' '"),
    "prompt no text": (H | {"prompt": 3}, "the prompt is 3"),
    "h 2": (H | {"h": 2}, "'h' is 2: give 1, -1, 0 or null"),
    "h true": (H | {"h": True}, "'h' is True"),
    "h of three": (H | {"images": NAMES[:3]}, "'h' compares two images, but 'images' has 3"),
    "annotator": (H | {"annotator": 3}, "'annotator' is 3"),
    "images text": (H | {"images": "a.png"}, "'images' is 'a.png'; give names of files"),
    "no images": (H | {"images": []}, "'images' is []"),
    "image twice": (H | {"images": ["a.png", "./a.png"]}, "an image is twice"),
    "image no text": (H | {"images": ["a.png", 3]}, "an image is 3"),
    "image empty": (H | {"images": ["a.png", ""]}, "an image is ''"),
    "bad short": (CAT | {"images": AB, "bad": [True]}, "'bad' is [True]: give a list of 2 bool"),
    "bad numbers": (CAT | {"images": AB, "bad": [1, 0]}, "'bad' is [1, 0]: give a list of 2 bool"),
    "rank short": (CAT | {"images": AB, "rank": [1]}, "'rank' gives [1]; give 2 numbers"),
    "rank no list": (CAT | {"images": AB, "rank": 1}, "'rank' gives 1; give 2 numbers"),
    "rank NaN": (CAT | {"images": AB, "rank": [1, float("nan")]}, "'rank' gives [1, nan]"),
    "rank inf": (CAT | {"images": AB, "rank": [1, float("-inf")]}, "'rank' gives [1, -inf]"),
    "rank bool": (CAT | {"images": AB, "rank": [1, True]}, "'rank' gives [1, True]"),
    "rank text": (CAT | {"images": AB, "rank": [1, "2"]}, "'rank' gives [1, '2']"),
    "label x": (PICKED | {"label_1": "x"}, "gives [1, 'x']"),
    "label null": (PICKED | {"label_0": None}, "gives [None, 0]"),
    "has_label": (PICKED | {"has_label": "no"}, "'has_label' is 'no'; give true or false"),
    "same image": (pair("a", "a"), "an image is twice"),
    "image null": (pair("a", "b") | {"rejected": None}, "an image is None"),
    "single rank": (ONE | {"rank": "x"}, "'rank' gives ['x']; give 1 number"),
    "prompt_id": (ONE | {"prompt_id": None}, "'prompt_id' is None; give a text or a number"),
    "prompt_id true": (ONE | {"prompt_id": True}, "'prompt_id' is True"),
    "data": (
        CAT | {"jpg_0": {"bytes": "x"}, "jpg_1": "b.png", "label_0": 1, "label_1": 0},
        "save images as files",
    ),
    "data as text": (
        CAT | {"jpg_0": "b'\\xff\\xd8'", "jpg_1": "b.png", "label_0": 1, "label_1": 0},
        "save images as files",
    ),
}


def refuse(folder: Path, name: str, content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        read_text(folder, name, content)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}") and len(message) < 600
    return message.removeprefix(f"{folder / name}")


@pytest.mark.parametrize("flaw", BAD_ROWS)
def test_a_row_with_a_flaw_is_named(folder, flaw):
    row, fragment = BAD_ROWS[flaw]
    lines = f"{GOOD}\n\n{json.dumps(row)}\n{GOOD}\n"
    message = refuse(folder, "x.jsonl", lines)
    assert message.startswith(", line 3: ") and fragment in message
    message = refuse(folder, "x.json", f"[{GOOD}, {json.dumps(row)}, {GOOD}]")
    assert message.startswith(", entry 2: ") and fragment in message


def test_rows_of_one_prompt_id_have_one_prompt_and_each_image_once(folder):
    message = refuse(folder, "x.jsonl", as_jsonl([ONE, ONE | {"prompt": "a dog"}]))
    assert message.startswith(", line 2: prompt_id 7 had another prompt")
    message = refuse(folder, "x.jsonl", as_jsonl([ONE, ONE | {"rank": 2, "prompt_id": "7"}]))
    assert message.startswith(", line 2: an image is twice")


HEADER = "prompt,chosen,rejected\n"
BAD_FILES = [
    ("x.jsonl", f"{GOOD}\n{{'a': 1}}\n{GOOD}\n", ", line 2: this is not JSON"),
    ("x.jsonl", f"{GOOD}\n[\n", ", line 2: this is not JSON"),
    ("x.jsonl", GOOD[:-1], ", line 1: this is not JSON"),
    ("x.jsonl", GOOD.encode() + b'\n"\xff"\n', ", line 2: this is not JSON in UTF-8"),
    ("x.jsonl", GOOD.encode("utf-16"), ", line 1: this is not JSON in UTF-8"),
    ("x.jsonl", "[" * 100_000 + "\n", ", line 1: this is not JSON"),
    ("x.jsonl", "\n \n", ": there are no rows"),
    ("x.jsonl", "", ": there are no rows"),
    ("x.json", "[]", ": there are no rows"),
    ("x.json", GOOD, ": this is no list"),
    ("x.json", f"{GOOD}\n{GOOD}", ": this is not JSON in UTF-8 (Extra data"),
    ("x.csv", "", ": there are no rows"),
    ("x.csv", HEADER, ": there are no rows"),
    ("x.csv", "a cat,a.png,b.png\na dog,c.png,d.png", ", line 2: its columns are a cat, a.png"),
    ("x.csv", f'{HEADER}"a\ncat",a.png,b.png\na dog,c.png', ", line 4: the row has 2 cells"),
    ("x.csv", f'{HEADER}a,a.png,b.png\n"a\n\ndog",c.png,d.png,1', ", line 3: the row has 4 cells"),
    ("x.csv", f"{HEADER}\n,a.png,b.png", ", line 3: the prompt is None"),
    ("x.csv", f"{HEADER}a cat,a.png,", ", line 2: an image is None"),
    ("x.csv", f'{HEADER}"a cat,a.png,b.png\n', ", line 2: this is no table"),
    (
        "x.csv",
        HEADER.encode() + b"\xff,a.png,b.png",
        ", line 2: this is not UTF-8; save it as UTF-8",
    ),
    ("x.csv", "prompt,images,h\na cat,\"['a.png', 'b.png']\",1", ", line 2: 'images' is \"['a"),
    ("x.csv", 'prompt,images,h\na cat,"[""a.png"", ""b.png""]",x', ", line 2: 'h' is 'x'"),
    ("x.csv", "prompt,image_path,rank,prompt_id\na cat,a.png,nan,7", ", line 2: 'rank' gives"),
    ("x.csv", "prompt,image_path,rank,prompt_id\na cat,a.png,1,", ", line 2: 'prompt_id' is None"),
    ("x.tsv", HEADER + "a cat,a.png,b.png", ", line 2: its columns are prompt,chosen,rejected"),
    ("x.parquet", GOOD, ": give a file .jsonl, .json, .csv, .tsv, or a folder with w/ and l/"),
    ("labels", GOOD, ": give a file .jsonl"),
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
    with pytest.raises(UserError, match="there are no rows"):
        read_label_file(tmp_path)


def test_the_docstring_names_every_form():
    words = " ".join(label_files.__doc__.split())
    assert all(", ".join(form) in words for form in label_files.FORMS)

"""Label files: preferences that somebody has already, as pairs of images to train on.

A file is .jsonl (one JSON object a line), .json (a list of objects), .csv or .tsv (the first line
names the columns), in UTF-8. Every row has `prompt`, or else `caption`: text. It also has one of
these sets of columns; any other column is passed over.

    images, h            two names; h 1: the first is better, -1: the second, 0: neither
    images, bad          K names, K booleans: every good image is better than every bad one
    images, rank         K names, K numbers: lower is better, equal gives no pair
    image_0, image_1, label_0, label_1   two names; the greater number is better, equal: neither
    jpg_0, jpg_1, label_0, label_1       the same (names of files, not the images themselves)
    chosen, rejected     two names
    image_path, rank, prompt_id          one image; all rows with its prompt_id are one list

`h` and `bad` are as in sd/labels.py, so RUN/labels.jsonl is such a file: of several lines about the
same images and prompt by the same `annotator` (it may be missing) the last counts, the images may
stand in another order, and of several annotators the majority decides. An answer is skipped if `h`,
`bad` or the `rank` of `images` is null, or if `has_label` is false beside the labels (1 and 0 will
do). In .csv and .tsv lists are JSON text, and an empty cell is null. A .jsonl may end in half a
line, which a kill cut short.

A folder is read too: its w/NAME.png is better than its l/NAME.png (or .jpg, .jpeg, .webp, .bmp).
The prompt is in NAME.txt, in w/, in l/ or in the folder itself; where there are several they agree.

A name is a path, relative to the file's folder or to --images DIR. Comparisons of one prompt that
share an image come into one group, as long as it has at most MAX_GROUP images; more images in one
comparison are dealt out by quality, so that each group has good ones and bad ones.
"""

import functools
import math
import os
import textwrap
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sd import UserError, tables
from sd.labels import majority, parse_answer

MAX_GROUP = 8  # images trained on together
EPOCH_GROUPS = 16  # in an epoch at most, so that a run can stop within a pass over a large file
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMS = [
    ("images", "h"),
    ("images", "bad"),
    ("images", "rank"),
    ("image_0", "image_1", "label_0", "label_1"),
    ("jpg_0", "jpg_1", "label_0", "label_1"),
    ("chosen", "rejected"),
    ("image_path", "rank", "prompt_id"),
]
NOT_TEXT = {"images", "h", "bad", "rank", "label_0", "label_1", "has_label"}
Pair = tuple[Path, Path]  # winner, loser


class Group(NamedTuple):
    """Images of one prompt, and what is known about them."""

    prompt: str
    images: list[Path]
    pairs: list[tuple[int, int]]  # (winner, loser), places in images; never empty


class LabelFile(NamedTuple):
    """What a label file says."""

    groups: list[Group]
    ties: int  # comparisons in which no image is better than another
    skipped: int  # answers that are null, or has_label false
    missing: list[Path]  # images that are not there; pairs with them were left out
    first: str  # the first comparison as understood, for a person to check

    def describe(self) -> str:
        """What was read, in two lines."""
        prompts = {group.prompt for group in self.groups}
        images = {image for group in self.groups for image in group.images}
        pairs = sum(len(group.pairs) for group in self.groups)
        example = f" (such as {self.missing[0]})" if self.missing else ""
        return (
            f"prompts: {len(prompts)}, images: {len(images)}, pairs: {pairs}, groups: "
            f"{len(self.groups)}, ties: {self.ties}, skipped: {self.skipped}, missing files: "
            f"{len(self.missing)}{example}\nThe first comparison as understood: {self.first}"
        )


class Comparison(NamedTuple):
    """Images of one prompt that were judged together."""

    prompt: str
    names: list[str]
    answers: dict[str | None, Any]  # by annotator; None: skipped
    field: str = "quality"  # what an answer is: h, bad, or how good each image is

    def quality(self) -> list[float]:
        """How good each image is, higher is better; empty where everybody skipped."""
        answers = [answer for answer in self.answers.values() if answer is not None]
        if not answers or self.field == "quality":
            return answers[0] if answers else []
        together = majority({"images": self.names, self.field: None}, answers)
        return [together, 0] if self.field == "h" else [not bad for bad in together]


def read_label_file(path: Path, images: Path | None = None) -> LabelFile:
    """The groups of a label file or folder; images: the folder that names are relative to.

    Raises UserError, with file and line, for what cannot be understood, or if no pair is left.
    """
    root = images or (path if os.path.isdir(path) else path.parent)
    comparisons: dict[Hashable, Comparison] = {}
    for where, row in read_rows(path):
        try:
            add_row(comparisons, row)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    if not comparisons:
        raise UserError(f"{path}: there are no rows; sd/label_files.py says what they look like")

    exists = functools.cache(os.path.isfile)  # Path.is_file fails on a name that is too long
    missing: dict[Path, None] = {}
    first, ties, skipped, pieces = "", 0, 0, []
    for each in comparisons.values():
        skipped += sum(answer is None for answer in each.answers.values())
        quality = each.quality()
        ties += len(set(quality)) == 1
        if len(set(quality)) < 2:
            continue
        best, worst = (each.names[quality.index(end)] for end in (max(quality), min(quality)))
        prompt = textwrap.shorten(each.prompt, 80, placeholder="...")
        first = first or f"{prompt}: {best} is better than {worst}"
        paths = {root / name: good for name, good in zip(each.names, quality, strict=True)}
        missing |= dict.fromkeys(image for image in paths if not exists(image))
        there = {image: good for image, good in paths.items() if exists(image)}
        pieces += [(each.prompt, pairs) for pairs in cut(there)]
    if not first:
        counts = f"{ties} ties, {skipped} skipped"
        raise UserError(f"{path}: no image is better than another ({counts}): nothing to train on")
    if not pieces:
        looked = f"the first one is {str(next(iter(missing))):.300}"
        raise UserError(f"{path}: each pair misses an image, {looked}; give --images DIR")
    return LabelFile(merge(pieces), ties, skipped, list(missing), first)


def read_rows(path: Path) -> tables.Rows:
    """The rows of a file or folder, each with the place where it stands."""
    try:
        if os.path.isdir(path):
            yield from folder_rows(path)
        elif path.suffix.lower() in tables.SUFFIXES:
            yield from tables.read_rows(path, json_columns=NOT_TEXT, may_be_cut=True)
        else:
            known = ", ".join(tables.SUFFIXES)
            raise UserError(f"{path}: give a file {known}, or a folder with w/ and l/")
    except ValueError as error:
        raise UserError(str(error)) from error


def folder_rows(folder: Path) -> tables.Rows:
    by_name = defaultdict(list)
    for file in [*sorted(folder.glob("w/*")), *sorted(folder.glob("l/*"))]:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            by_name[file.stem].append(file)
    for name, files in by_name.items():
        if [file.parent.name for file in files] != ["w", "l"]:
            raise UserError(f"{files[0]}: give one image {name} in w/ and one in l/")
        captions = [folder / side / f"{name}.txt" for side in ("w", "l", "")]
        try:
            prompts = {file.read_text("utf-8-sig").strip() for file in captions if file.is_file()}
        except UnicodeDecodeError as error:
            raise UserError(f"{files[0]}: its prompt is not in UTF-8 ({error})") from error
        if len(prompts) != 1:
            raise UserError(f"{files[0]}: it has {len(prompts)} prompts; give one, {captions[0]}")
        chosen, rejected = (f"{file.parent.name}/{file.name}" for file in files)
        yield f"{files[0]}", {"prompt": prompts.pop(), "chosen": chosen, "rejected": rejected}


def add_row(comparisons: dict[Hashable, Comparison], row: Any) -> None:
    """Put what a row says into its comparison, perhaps a new one. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError('this is no JSON object such as {"prompt": ...}')
    forms = [form for form in FORMS if row.keys() >= {*form}]
    if len(forms) != 1:
        known = "; ".join(", ".join(form) for form in FORMS)
        raise ValueError(f"its columns are {', '.join(row):.200}; give one of these sets: {known}")
    prompt = row.get("prompt", row.get("caption"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the prompt is {prompt!r:.60}; give a text, as 'prompt' or 'caption'")
    prompt = prompt.strip()
    match forms[0]:
        case ("images", field):
            names, answer = image_names(row["images"]), row[field]
        case ("image_path", field, "prompt_id"):
            names, answer = image_names([row["image_path"]]), [row[field]]
        case ("chosen", field):
            names, answer = image_names([row["chosen"], row["rejected"]]), [1, 0]
        case (one, other, field, _):
            names, answer = image_names([row[one], row[other]]), [row["label_0"], row["label_1"]]
            if row.get("has_label", True) not in (True, False):
                raise ValueError(f"'has_label' is {row['has_label']!r:.60}; give true or false")
            answer = answer if row.get("has_label", True) else None
    if field in ("h", "bad"):
        if field == "h" and len(names) != 2:
            raise ValueError(f"'h' compares two images, but 'images' has {len(names)}")
        new = Comparison(prompt, names, {}, field)
        asked = comparisons.setdefault((field, prompt, frozenset(names)), new)
        question = {"images": asked.names, field: None}
        asked.answers[row.get("annotator")] = parse_answer(row | {"images": names}, question)
        return
    quality = None if answer is None else numbers(answer, len(names), field)
    if field == "rank" and quality is not None:
        quality = [-rank for rank in quality]
    if "prompt_id" not in forms[0]:
        comparisons[len(comparisons)] = Comparison(prompt, names, {None: quality})
        return
    if type(row["prompt_id"]) not in (str, int, float):
        raise ValueError(f"'prompt_id' is {row['prompt_id']!r:.60}; give a text or a number")
    key = ("prompt_id", str(row["prompt_id"]))
    ranked = comparisons.setdefault(key, Comparison(prompt, [], {None: []}))
    if ranked.prompt != prompt:
        raise ValueError(f"prompt_id {key[1]:.60} had another prompt before; give it only one")
    ranked.names[:] = image_names(ranked.names + names)
    ranked.answers[None].extend(quality)


def image_names(names: Any) -> list[str]:
    """Names of images of one comparison, each checked. Raises ValueError."""
    if not isinstance(names, list) or not names:
        raise ValueError(f"'images' is {names!r:.60}; give names of files as a JSON list")
    for name in names:
        data = ("b'", 'b"', "{'", '{"')  # bytes or objects that became text
        if not isinstance(name, str) or not name.strip() or name.startswith(data):
            raise ValueError(f"an image is {name!r:.60}; save images as files and give their paths")
    plain = [str(PurePath(name)) for name in names]
    if len(set(plain)) < len(plain):
        raise ValueError(f"an image is twice in {plain!r:.200}; give each once")
    return plain


def numbers(values: Any, count: int, field: str) -> list[float]:
    good = isinstance(values, list) and len(values) == count
    if not good or any(type(v) not in (int, float) or not abs(v) < math.inf for v in values):
        raise ValueError(f"'{field}' gives {values!r:.60}; give {count} numbers, one an image")
    return values


def cut(quality: dict[Path, float]) -> list[list[Pair]]:
    """The pairs of a comparison; more than MAX_GROUP images are dealt out by their quality."""
    order = sorted(quality, key=lambda image: -quality[image])
    parts = math.ceil(len(quality) / MAX_GROUP)
    hands = [order[part::parts] for part in range(parts)]
    pairs = [[(a, b) for a in hand for b in hand if quality[a] > quality[b]] for hand in hands]
    return [inside for inside in pairs if inside]


def images_of(pairs: list[Pair]) -> list[Path]:
    return list(dict.fromkeys(image for pair in pairs for image in pair))


def merge(pieces: list[tuple[str, list[Pair]]]) -> list[Group]:
    """Groups out of the pairs of comparisons: those of one prompt that share an image together."""
    groups: dict[int, tuple[str, list[Pair]]] = {}
    holders = defaultdict(set)  # groups that have an image of a prompt
    for place, (prompt, pairs) in enumerate(pieces):
        near = {k for image in images_of(pairs) for k in holders[prompt, image]} & groups.keys()
        for k in sorted(near, reverse=True):
            joined = list(dict.fromkeys(groups[k][1] + pairs))
            if len(images_of(joined)) <= MAX_GROUP:
                place, pairs = k, joined
                del groups[k]
        groups[place] = prompt, pairs
        for image in images_of(pairs):
            holders[prompt, image].add(place)
    result = []
    for _, (prompt, pairs) in sorted(groups.items()):
        images = images_of(pairs)
        result.append(Group(prompt, images, [(images.index(a), images.index(b)) for a, b in pairs]))
    return result

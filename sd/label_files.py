"""Label files: preferences that somebody has already, as pairs of images to train on.

A file is .jsonl (one JSON object a line), .json (a list of objects), .csv or .tsv (the first line
names the columns; commas or, as Excel writes it, semicolons), in UTF-8, or .parquet (it needs
pyarrow: pip install pyarrow). The first four may be packed as .gz. Every row has `prompt`, or else
`caption` or `text`. It also has one of these sets of columns, in small or capital letters; any
other column is passed over.

    images, h            two names; h 1: the first is better, -1: the second, 0: neither
    images, bad          K names, K booleans: every good image is better than every bad one
    images, rank         K names, K numbers: lower is better, equal gives no pair
    image_0, image_1, label_0, label_1   two names; the greater number is better, equal: neither
    jpg_0, jpg_1, label_0, label_1       the same, as Pick-a-Pic has it
    chosen, rejected     two names
    path1, path2         the same, as HPDv3 has it: path1 is better
    file_path, human_preference, or image_path, human_preference
                         K names, K numbers, as HPDv2 has it: greater is better
    image_path, rank     K names, K numbers: lower is better
    image_path, rank, prompt_id          one image; all rows with its prompt_id are one list
    data, annotations    a task of Label Studio's JSON export, with the choice of a Pairwise tag: in
                         data are the prompt and two images, of which the first is the left one
    annotation_id        the same in its CSV or JSON-MIN export; one column has left or right

Every row is a vote: a pair that is there nine times one way and once the other way is ten votes,
and the loss averages over votes. Only `h` and `bad` are as in sd/labels.py, so RUN/labels.jsonl is
such a file: of several lines about the same images and prompt by the same `annotator` (it may be
missing: one person without a name) the last counts and the others are corrected by it; the answers
of several annotators are votes. An answer is skipped if `h`, `bad`, `rank` or `human_preference` is
null, if `has_label` is false beside the labels (1 and 0 will do), or if an annotation of Label
Studio is cancelled or without a choice. In .csv and .tsv lists are JSON text, and an empty cell is
null. A .jsonl may end in half a line, which a kill cut short.

A folder is read too: its w/NAME.png is better than its l/NAME.png, or any other image that Pillow
can read; NAME may have sub-folders. The prompt is in NAME.txt or NAME.caption, in w/, in l/ or in
the folder itself; where there are several they agree. Other files in w/ and l/ are counted.

An image is a path, relative to the file's folder or to --images DIR (a link counts where it stands,
not where it leads), a file:// URL, or in .parquet the bytes of an image. Names may be written with
composed or decomposed letters (NFC, NFD), and with backslashes. An image that is missing, or cannot
be read to its end, is left out with its pairs, and counted. Votes about one prompt that share an
image come into one group, as long as it has at most MAX_GROUP images; more images in one row are
dealt out by quality, so that each group has good ones and bad ones.
"""

import functools
import itertools
import math
import os
import textwrap
from collections import defaultdict
from collections.abc import Hashable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

from PIL import Image
from tqdm import tqdm

from sd import UserError, tables
from sd.images import ImageStore, spellings
from sd.labels import validate_answer
from sd.prompts import parse_prompt

MAX_GROUP = 8  # images trained on together
EPOCH_GROUPS = 16  # in an epoch at most, so that a run can stop within a pass over a large file
RECENT_GROUPS = 8  # of those that have an image: the ones that a new vote about it may join
PROMPT_SUFFIXES = (".txt", ".caption")
JSON_COLUMNS = {"h", "bad", "rank", "label_0", "label_1", "has_label", "human_preference"}
Pair = tuple[Path, Path]  # winner, loser


class Group(NamedTuple):
    """Images of one prompt, and the votes about them."""

    prompt: str
    images: list[Path]
    pairs: list[tuple[int, int]]  # (winner, loser), places in images, one for each vote; not empty


class LabelFile(NamedTuple):
    """What a label file says."""

    groups: list[Group]
    first: str  # the first comparison as understood, for a person to check
    ties: int = 0  # answers in which no image is better than another
    skipped: int = 0  # answers that are null, or has_label false
    corrections: int = 0  # answers in whose place a later line of the same person counts
    missing: tuple[Path, ...] = ()  # images that are not there; votes with them were left out
    unreadable: tuple[str, ...] = ()  # images that are damaged, and how; the same
    others: tuple[Path, ...] = ()  # files in w/ and l/ that are no image and no prompt of one

    def describe(self) -> str:
        """What was read, in two lines."""
        votes = [
            (prompt, images[winner], images[loser])
            for prompt, images, pairs in self.groups
            for winner, loser in pairs
        ]
        pairs = {(prompt, frozenset(images)) for prompt, *images in votes}
        counts = {
            "prompts": len({group.prompt for group in self.groups}),
            "images": len({image for group in self.groups for image in group.images}),
            "votes": len(votes),
            "pairs": len(pairs),
            "pairs that disagree": len({*votes}) - len(pairs),
            "groups": len(self.groups),
            "ties": self.ties,
            "skipped": self.skipped,
            "corrections": self.corrections,
            "missing files": count_with_example(self.missing),
            "unreadable files": count_with_example(self.unreadable),
        }
        if self.others:
            counts["files passed over"] = count_with_example(self.others)
        line = ", ".join(f"{name}: {count}" for name, count in counts.items())
        return f"{line}\nThe first comparison as understood: {self.first}"


def count_with_example(names: tuple) -> str:
    return f"{len(names)} (such as {names[0]})" if names else "0"


class Vote(NamedTuple):
    """One answer about images of one prompt."""

    prompt: str
    images: list[str | bytes]  # names, or the images themselves
    quality: list[float] | None  # of each image, greater is better; None: skipped
    person: Hashable = None  # a later vote with the same one is a correction
    list_id: Hashable = None  # votes with the same one are parts of one list

    def is_preference(self) -> bool:
        return self.quality is not None and len({*self.quality}) > 1

    def describe(self) -> str:
        best, worst = (
            self.images[self.quality.index(end)] for end in (max(self.quality), min(self.quality))
        )
        prompt = textwrap.shorten(self.prompt, 80, placeholder="...")
        return f"{prompt}: {best} is better than {worst}"


def read_label_file(path: Path, images: Path | None = None, cache: Path | None = None) -> LabelFile:
    """The groups of a label file or folder.

    images: the folder that names are relative to. cache: the folder in which images are stored
    whose bytes are in the file; without it they are only checked, and their paths lead nowhere.
    Raises UserError, with file and line, for what cannot be understood, or if no pair is left.
    """
    path = Path(os.path.abspath(path))
    is_folder = os.path.isdir(path)
    store = ImageStore(images or (path if is_folder else path.parent), cache)
    try:
        rows, others = folder_rows(path) if is_folder else (file_rows(path), [])
        votes, corrections = collect_votes(rows, store)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not votes:
        kind = "images in w/ and l/" if is_folder else "rows"
        raise UserError(f"{path}: there are no {kind}; sd/label_files.py says what is read")

    preferences = [(where, vote) for where, vote in votes if vote.is_preference()]
    skipped = sum(vote.quality is None for _, vote in votes)
    ties = len(votes) - len(preferences) - skipped
    if not preferences:
        counts = f"{ties} ties, {skipped} skipped"
        raise UserError(f"{path}: no image is better than another ({counts}): nothing to train on")
    pieces = usable_pairs(preferences, store)
    if not pieces:
        example = str([*store.missing, *store.unreadable][0])
        message = f"each pair misses an image, the first one is {example:.300}"
        raise UserError(f"{path}: {message}; give --images DIR")
    return LabelFile(
        groups=merge(pieces),
        first=preferences[0][1].describe(),
        ties=ties,
        skipped=skipped,
        corrections=corrections,
        missing=tuple(store.missing),
        unreadable=tuple(store.unreadable),
        others=tuple(others),
    )


def usable_pairs(votes: list[tuple[str, Vote]], store: ImageStore) -> list[tuple[str, list[Pair]]]:
    """The prompt and the pairs of each vote, without images that are missing or damaged."""
    pieces = []
    for where, vote in tqdm(votes, "check images", unit=" votes", delay=2):
        paths = [store.find(name) for name in vote.images]
        if len({os.path.normpath(image) for image in paths}) < len(paths):
            raise UserError(f"{where}: an image is twice in {vote.images!r:.200}; give each once")
        quality = dict(zip(paths, vote.quality, strict=True))
        usable = {image: good for image, good in quality.items() if store.is_usable(image)}
        pieces += [(vote.prompt, pairs) for pairs in split_by_quality(usable)]
    return pieces


def file_rows(path: Path) -> tables.Rows:
    if not tables.table_suffix(path):
        suffixes = ", ".join(tables.SUFFIXES)
        raise ValueError(f"{path}: give a file {suffixes}, or a folder with w/ and l/")
    return tables.read_rows(path, json_columns=JSON_COLUMNS, may_be_cut=True)


def folder_rows(folder: Path) -> tuple[list[tuple[str, dict]], list[Path]]:
    """A row for each pair of images in w/ and l/; and the files there that belong to none."""
    images, prompts, others = defaultdict(list), defaultdict(list), []
    for side in (folder / "w", folder / "l"):
        walk = os.walk(side, followlinks=True)
        for file in sorted(Path(place, name) for place, _, names in walk for name in names):
            name = normalize("NFC", str(file.relative_to(side).with_suffix("")))
            if file.suffix.lower() in PROMPT_SUFFIXES:
                prompts[name].append(file)
            elif file.suffix.lower() in image_suffixes() and not file.name.startswith("."):
                images[name].append(file)
            else:
                others.append(file)
    rows = []
    for name, pair in images.items():
        if [file.relative_to(folder).parts[0] for file in pair] != ["w", "l"]:
            raise ValueError(f"{pair[0]}: give one image {name} in w/ and one in l/")
        beside = [
            folder / f"{spelling}{suffix}"
            for spelling in spellings(name)
            for suffix in PROMPT_SUFFIXES
        ]
        texts = prompts.pop(name, []) + [file for file in beside if file.is_file()]
        texts = {tables.read_text(file).strip() for file in texts}
        if len(texts) != 1:
            example = pair[0].with_suffix(".txt")
            raise ValueError(f"{pair[0]}: it has {len(texts)} prompts; give one, {example}")
        chosen, rejected = (str(file.relative_to(folder)) for file in pair)
        rows.append((str(pair[0]), {"prompt": texts.pop(), "chosen": chosen, "rejected": rejected}))
    return rows, sorted(itertools.chain(others, *prompts.values()))


@functools.cache
def image_suffixes() -> set[str]:
    """Of the images that Pillow can read."""
    formats = Image.registered_extensions()
    return {suffix for suffix, name in formats.items() if name in Image.OPEN}


def collect_votes(rows: tables.Rows, store: ImageStore) -> tuple[list[tuple[str, Vote]], int]:
    """The votes that count, each with its place, and how many others were corrected.

    Raises ValueError, with file and line.
    """
    votes: dict[Hashable, tuple[str, Vote]] = {}
    corrections = 0
    for where, row in tqdm(rows, "read labels", unit=" rows", delay=2):
        try:
            for vote in parse_row(row):
                vote = store_images(vote, where, store)
                key = vote.person or vote.list_id or object()
                if key in votes and vote.list_id:
                    vote = continue_list(votes[key][1], vote)
                elif key in votes:
                    corrections += 1
                votes[key] = where, vote
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return [*votes.values()], corrections


def store_images(vote: Vote, where: str, store: ImageStore) -> Vote:
    """A vote with names in place of bytes; one about two equal images is a tie."""
    if not any(isinstance(image, bytes) for image in vote.images):
        return vote
    names = [store.add(image, where) for image in vote.images]
    is_tie = vote.quality is not None and len({*names}) < len(names)
    return vote._replace(images=names, quality=[0] * len(names) if is_tie else vote.quality)


def continue_list(ranked: Vote, vote: Vote) -> Vote:
    if ranked.prompt != vote.prompt:
        _, name, *_ = vote.list_id
        raise ValueError(f"prompt_id {name:.60} had another prompt before; give it only one")
    ranked.images.extend(vote.images)
    ranked.quality.extend(vote.quality)
    return ranked


def parse_row(row: Any) -> Iterator[Vote]:
    """The votes of a row. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError('this is no JSON object such as {"prompt": ...}')
    forms = [form for form in FORMS if row.keys() >= {*form}]
    if len(forms) != 1:
        sets = "; ".join(", ".join(form) for form in FORMS)
        raise ValueError(f"its columns are {', '.join(row):.200}; give one of these sets: {sets}")
    return FORMS[forms[0]](row, *forms[0])


# The forms: each takes a row and the names of its columns


def parse_answer(row: dict, images: str, field: str) -> Iterator[Vote]:
    names, answer, person = parse_images(row[images]), row[field], row.get("annotator")
    if field == "h" and len(names) != 2:
        raise ValueError(f"'h' compares two images, but 'images' has {len(names)}")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # as pandas writes it
    if problem := validate_answer({"images": names, field: None}, answer):
        raise ValueError(problem)
    if not isinstance(person, str | None):
        raise ValueError(f"'annotator' is {person!r:.60}, which is no name")
    quality = answer
    if answer is not None:
        quality = [answer, 0] if field == "h" else [not bad for bad in answer]
    prompt = parse_prompt(row)
    yield Vote(prompt, names, quality, person=(field, prompt, frozenset(names), person))


def parse_list(row: dict, images: str, numbers: str) -> Iterator[Vote]:
    names = parse_images(row[images])
    quality = parse_numbers(row[numbers], len(names), numbers)
    if quality and numbers == "rank":
        quality = [-rank for rank in quality]
    yield Vote(parse_prompt(row), names, quality)


def parse_image_path(row: dict, images: str, rank: str) -> Iterator[Vote]:
    """A list, or one image of a list that prompt_id names."""
    if isinstance(row[images], list) or "prompt_id" not in row:
        yield from parse_list(row, images, rank)
        return
    name = row["prompt_id"]
    if type(name) not in (str, int, float):
        raise ValueError(f"'prompt_id' is {name!r:.60}; give a text or a number")
    quality = [-place for place in parse_numbers([row[rank]], 1, rank)]
    list_id = ("prompt_id", str(name), str(row.get("annotator")))
    yield Vote(parse_prompt(row), [parse_image(row[images])], quality, list_id=list_id)


def parse_labels(
    row: dict, image_0: str, image_1: str, label_0: str, label_1: str
) -> Iterator[Vote]:
    names, quality = parse_images([row[image_0], row[image_1]]), None
    if row.get("has_label", True) not in (True, False):
        raise ValueError(f"'has_label' is {row['has_label']!r:.60}; give true or false")
    if row.get("has_label", True):
        quality = parse_numbers([row[label_0], row[label_1]], 2, label_0)
    yield Vote(parse_prompt(row), names, quality)


def parse_chosen(row: dict, chosen: str, rejected: str) -> Iterator[Vote]:
    yield Vote(parse_prompt(row), parse_images([row[chosen], row[rejected]]), [1, 0])


def parse_label_studio(row: dict, data: str, annotations: str) -> Iterator[Vote]:
    """A task with the annotations of one person or more."""
    try:
        for annotation in row[annotations] or [{"result": []}]:
            results = [] if annotation.get("was_cancelled") else annotation["result"]
            choices = [each for each in results if each["type"] == "pairwise"] or [{}]
            chosen = choices[0].get("value", {}).get("selected")
            sides = choices[0].get("to_name", "").split(",")
            yield choice_vote(row[data], chosen, sides)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"this is no task as Label Studio exports it ({error!r})") from error


def parse_label_studio_table(row: dict, _: str) -> Iterator[Vote]:
    values = [v.get("selected") if isinstance(v, dict) else v for v in row.values()]
    chosen = [value for value in values if value in ("left", "right")] or [None]
    yield choice_vote(row, chosen[0], [])


def choice_vote(task: dict, chosen: str | None, sides: list[str]) -> Vote:
    """sides: the columns of the left and the right image, if they are called so."""
    if len(sides) != 2 or not {*sides} <= task.keys():
        suffixes = tuple(image_suffixes())
        images = [
            name
            for name, value in task.items()
            if isinstance(value, str) and value.lower().endswith(suffixes)
        ]
        sides = sorted(images, key=lambda name: "right" in name.lower())
    if len(sides) != 2 or chosen not in ("left", "right", None):
        raise ValueError(f"{chosen!r:.60} was chosen of the images {sides!r:.200}; give two")
    quality = chosen and [chosen == "left", chosen == "right"]
    return Vote(parse_prompt(task), parse_images([task[side] for side in sides]), quality)


FORMS = {
    ("images", "h"): parse_answer,
    ("images", "bad"): parse_answer,
    ("images", "rank"): parse_list,
    ("image_0", "image_1", "label_0", "label_1"): parse_labels,
    ("jpg_0", "jpg_1", "label_0", "label_1"): parse_labels,
    ("chosen", "rejected"): parse_chosen,
    ("path1", "path2"): parse_chosen,
    ("file_path", "human_preference"): parse_list,
    ("image_path", "human_preference"): parse_list,
    ("image_path", "rank"): parse_image_path,
    ("data", "annotations"): parse_label_studio,
    ("annotation_id",): parse_label_studio_table,
}


def parse_images(names: Any) -> list[str | bytes]:
    """The images of one comparison. Raises ValueError."""
    if isinstance(names, str):
        names = tables.parse_cell(names, True)
    if not isinstance(names, list) or not names:
        raise ValueError(f"'images' is {names!r:.60}; give names of files as a JSON list")
    return [parse_image(name) for name in names]


def parse_image(image: Any) -> str | bytes:
    """The name of an image, or its bytes. Raises ValueError."""
    if isinstance(image, dict):  # as the datasets library writes it
        data = image.get("bytes")
        image = data if isinstance(data, bytes) else image.get("path", image)
    if isinstance(image, bytes) and image:
        return image
    data = ("b'", 'b"', "{'", '{"')  # bytes or objects that became text
    if not isinstance(image, str) or not image.strip() or image.startswith(data):
        raise ValueError(f"an image is {image!r:.60}; save images as files and give their paths")
    for start in ("/data/local-files/?d=", "/data/upload/", "file://"):
        if image.startswith(start):
            return unquote(image.removeprefix(start))
    if "://" in image:
        raise ValueError(f"an image is {image!r:.200}, in the web; save it and give its path")
    return str(PurePath(image))


def parse_numbers(values: Any, count: int, field: str) -> list[float] | None:
    if values is None:
        return None
    good = isinstance(values, list) and len(values) == count
    if not good or any(type(v) not in (int, float) or not abs(v) < math.inf for v in values):
        raise ValueError(f"'{field}' gives {values!r:.60}; give {count} numbers, one an image")
    return values


def split_by_quality(quality: dict[Path, float]) -> list[list[Pair]]:
    """The pairs of a vote; more than MAX_GROUP images are dealt out by their quality."""
    order = sorted(quality, key=lambda image: -quality[image])
    parts = math.ceil(len(quality) / MAX_GROUP)
    groups = [order[part::parts] for part in range(parts)]
    pairs = [[(a, b) for a in group for b in group if quality[a] > quality[b]] for group in groups]
    return [inside for inside in pairs if inside]


def merge(votes: list[tuple[str, list[Pair]]]) -> list[Group]:
    """Groups out of prompts and pairs: those of one prompt that share an image together.

    A vote may join the last RECENT_GROUPS that have one of its images, so that the time is linear
    also where all votes share an image; best is one that has all of its images.
    """
    groups: dict[int, tuple[str, dict[Path, None], list[Pair]]] = {}
    holders = defaultdict(dict)  # numbers of the groups that have an image of a prompt
    for number, (prompt, pairs) in enumerate(votes):
        pairs = [*pairs]
        images = dict.fromkeys(itertools.chain(*pairs))
        recent = set()
        for image in images:
            recent.update(itertools.islice(reversed(holders[prompt, image]), RECENT_GROUPS))
        nearby = sorted(recent, reverse=True)
        complete = [k for k in nearby if images.keys() <= groups[k][1].keys()]
        for other in complete[:1] or nearby:
            _, other_images, other_pairs = groups[other]
            joined = other_images | images
            if len(joined) <= MAX_GROUP:
                for image in images:
                    holders[prompt, image].pop(number, None)
                groups.pop(number, None)
                other_pairs += pairs
                number, images, pairs = other, joined, other_pairs
        groups[number] = prompt, images, pairs
        for image in images:
            holders[prompt, image][number] = None
    result = []
    for _, (prompt, images, pairs) in sorted(groups.items()):
        place = {image: k for k, image in enumerate(images)}
        result.append(Group(prompt, [*images], [(place[a], place[b]) for a, b in pairs]))
    return result

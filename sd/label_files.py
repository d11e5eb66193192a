"""Label files: preferences that somebody has already, as pairs of images to train on.

A file is one of sd/tables.py (.jsonl, .json, .csv, .tsv, packed as .gz or not; .parquet needs
pyarrow). Every row has `prompt`, or else `caption` or `text`, and one of these sets of columns; any
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
such a file: of several lines about the same images and prompt by the same `annotator` the last
counts and the others are corrected by it. An answer is skipped if `h`, `bad`, `rank` or
`human_preference` is null, if `has_label` is false beside the labels, or if an annotation of Label
Studio is cancelled or without a choice. In .csv and .tsv lists are JSON text, and an empty cell is
null. A .jsonl may end in half a line, which a kill cut short.

A folder is read too: its w/NAME.png is better than its l/NAME.png, or any other image that Pillow
can read; NAME may have sub-folders. The prompt is in NAME.txt or NAME.caption, in w/, in l/ or in
the folder itself; where there are several they agree. Other files in w/ and l/ are counted.

An image is a path, relative to the file's folder or to --images DIR (a link counts where it stands,
not where it leads), a file:// URL, or in .parquet the bytes of an image. An image that is missing,
or cannot be read to its end, is left out with its pairs, and counted. Votes about one prompt that
share an image come into one group, as long as it has at most MAX_GROUP images; more images in one
row are dealt out by quality, so that each group has good ones and bad ones.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from tqdm import tqdm

from sd import UserError, tables
from sd.images import ImageStore, image_suffixes, spellings
from sd.label_forms import Vote, parse_row

MAX_GROUP = 8  # images trained on together
EPOCH_GROUPS = 16  # in an epoch at most, so that a run can stop within a pass over a large file
PROMPT_SUFFIXES = (".txt", ".caption")
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


def read_label_file(path: Path, images: Path | None = None, cache: Path | None = None) -> LabelFile:
    """The groups of a label file or folder.

    images: the folder that names are relative to. cache: the folder in which images are stored
    whose bytes are in the file; without it they are only checked, and their paths lead nowhere.
    Raises UserError, with file and line, for what cannot be understood, or if no pair is left.
    """
    path = Path(os.path.abspath(path))
    is_folder = os.path.isdir(path)
    if not is_folder and not tables.table_suffix(path):
        suffixes = ", ".join(tables.SUFFIXES)
        raise UserError(f"{path}: give a file {suffixes}, or a folder with w/ and l/")
    store = ImageStore(images or (path if is_folder else path.parent), cache)
    try:
        rows, others = folder_rows(path) if is_folder else (tables.read_rows(path, True), [])
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
        names = itertools.product(spellings(name), PROMPT_SUFFIXES)
        beside = [folder / f"{spelling}{suffix}" for spelling, suffix in names]
        files = prompts.pop(name, []) + [file for file in beside if file.is_file()]
        texts = {tables.read_text(file).strip() for file in files}
        if len(texts) != 1:
            example = pair[0].with_suffix(".txt")
            raise ValueError(f"{pair[0]}: it has {len(texts)} prompts; give one, {example}")
        chosen, rejected = (str(file.relative_to(folder)) for file in pair)
        rows.append((str(pair[0]), {"prompt": texts.pop(), "chosen": chosen, "rejected": rejected}))
    return rows, sorted(itertools.chain(others, *prompts.values()))


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
        name, _ = vote.list_id
        raise ValueError(f"prompt_id {name:.60} had another prompt before; give it only one")
    ranked.images.extend(vote.images)
    ranked.quality.extend(vote.quality)
    return ranked


def split_by_quality(quality: dict[Path, float]) -> list[list[Pair]]:
    """The pairs of a vote; more than MAX_GROUP images are dealt out by their quality."""
    order = sorted(quality, key=lambda image: -quality[image])
    parts = math.ceil(len(quality) / MAX_GROUP)
    groups = [order[part::parts] for part in range(parts)]
    pairs = [[(a, b) for a in group for b in group if quality[a] > quality[b]] for group in groups]
    return [inside for inside in pairs if inside]


def merge(votes: list[tuple[str, list[Pair]]]) -> list[Group]:
    """Groups out of prompts and pairs: those of one prompt that share an image together.

    A vote joins the newest groups of its images, so that the time is linear also where all votes
    share an image; best is a group that has all of its images.
    """
    groups: dict[int, tuple[str, dict[Path, None], list[Pair]]] = {}
    newest: dict[tuple[str, Path], int] = {}  # the group of an image of a prompt
    for number, (prompt, pairs) in enumerate(votes):
        images = dict.fromkeys(itertools.chain(*pairs))
        nearby = {newest[prompt, image] for image in images if (prompt, image) in newest}
        complete = [k for k in nearby if images.keys() <= groups[k][1].keys()]
        groups[number] = prompt, images, [*pairs]
        for other in complete[:1] or sorted(nearby, reverse=True):
            _, other_images, other_pairs = groups[other]
            joined = other_images | images
            if len(joined) <= MAX_GROUP:
                other_pairs += groups.pop(number)[2]
                groups[other] = prompt, joined, other_pairs
                number, images = other, joined
        newest |= dict.fromkeys(((prompt, image) for image in images), number)
    result = []
    for _, (prompt, images, pairs) in sorted(groups.items()):
        place = {image: k for k, image in enumerate(images)}
        result.append(Group(prompt, [*images], [(place[a], place[b]) for a, b in pairs]))
    return result

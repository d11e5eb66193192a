"""The votes in a row of a label file: one small function for each form of sd/label_files.py.

Each takes a row and the names of its columns, and raises ValueError for what it cannot understand.
"""

import math
import textwrap
from collections.abc import Hashable, Iterator
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote

from sd import tables
from sd.images import image_suffixes
from sd.labels import validate_answer
from sd.prompts import parse_prompt

# What a .csv or .tsv has as JSON text; images may be there as a list too
JSON_COLUMNS = {"h", "bad", "rank", "label_0", "label_1", "has_label", "human_preference"}


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
        best = self.images[self.quality.index(max(self.quality))]
        worst = self.images[self.quality.index(min(self.quality))]
        prompt = textwrap.shorten(self.prompt, 80, placeholder="...")
        return f"{prompt}: {best} is better than {worst}"


def parse_row(row: Any) -> Iterator[Vote]:
    """The votes of a row. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError('this is no JSON object such as {"prompt": ...}')
    forms = [form for form in FORMS if row.keys() >= {*form}]
    if len(forms) != 1:
        sets = "; ".join(", ".join(form) for form in FORMS)
        raise ValueError(f"its columns are {', '.join(row):.200}; give one of these sets: {sets}")
    row = {name: parse_json(row[name]) if name in JSON_COLUMNS else row[name] for name in row}
    return FORMS[forms[0]](row, *forms[0])


def parse_answer(row: dict, images: str, field: str) -> Iterator[Vote]:
    """The answer h or bad of a person, who may correct it."""
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
    """A list of images, with a number for each."""
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
    list_id = str(name), str(row.get("annotator"))
    yield Vote(parse_prompt(row), [parse_image(row[images])], quality, list_id=list_id)


def parse_labels(row: dict, *columns: str) -> Iterator[Vote]:
    """Two images, two numbers, and perhaps has_label."""
    images, labels = columns[:2], columns[2:]
    names, quality = parse_images([row[image] for image in images]), None
    if row.get("has_label", True) not in (True, False):
        raise ValueError(f"'has_label' is {row['has_label']!r:.60}; give true or false")
    if row.get("has_label", True):
        quality = parse_numbers([row[label] for label in labels], 2, labels[0])
    yield Vote(parse_prompt(row), names, quality)


def parse_chosen(row: dict, chosen: str, rejected: str) -> Iterator[Vote]:
    """Two images, of which the first is better."""
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
    """A row of the CSV or JSON-MIN export, whose columns have names of the user's."""
    values = [v.get("selected") if isinstance(v, dict) else v for v in row.values()]
    chosen = next((value for value in values if value in ("left", "right")), None)
    yield choice_vote(row, chosen, [])


def choice_vote(task: dict, chosen: str | None, sides: list[str]) -> Vote:
    """The choice of left or right, or None.

    sides: the columns of the left and the right image; where these are others, the two columns that
    have the name of an image.
    """
    if len(sides) != 2 or not {*sides} <= task.keys():
        suffixes = tuple(image_suffixes())
        images = [name for name, value in task.items() if str(value).lower().endswith(suffixes)]
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


def parse_json(value: Any) -> Any:
    """What JSON text in a cell says; any other value as it is."""
    try:
        is_text = isinstance(value, str)
        return tables.parse_json(value.encode()) if is_text else value
    except ValueError:
        return {"true": True, "false": False}.get(value.strip().lower(), value)


def parse_images(names: Any) -> list[str | bytes]:
    """The images of one comparison. Raises ValueError."""
    names = parse_json(names)
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

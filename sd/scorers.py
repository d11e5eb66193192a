"""Scorers: the objectives of the paper's Sec. 5.1, and functions of one's own. Higher is better."""

import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from sd import UserError
from sd.options import AESTHETIC_HEAD, CLIP, SCORERS, split_objective

Scorer = Callable[[list[Image.Image], list[str]], Sequence[float]]  # images, prompts -> numbers


def load_scorers(
    objective: str | Callable | Sequence,
    prompts: list[str],
    *,
    clip: str = CLIP,
    head: str = AESTHETIC_HEAD,
    device: torch.device | str = "cpu",
) -> list[Scorer]:
    """The scorers of an objective.

    objective: one of SCORERS, FILE.py:FUNCTION, or several with commas between; or a function
    (images, prompts) -> numbers; or a list of such.
    prompts: those of the run; a function of one's own is tried on two of them.
    clip, head: hub id or folder of the CLIP model; file or URL of the aesthetic predictor.
    Raises UserError for what is unknown, cannot be loaded, or fails when it is tried.
    """
    parts = [objective] if callable(objective) else objective
    parts = split_objective(parts) if isinstance(parts, str) else parts
    scorers = []
    for part in parts:
        if callable(part):
            name = getattr(part, "__name__", type(part).__name__)
            scorers.append(checked(part, name, prompts))
        elif part == "aesthetic":
            scorers.append(aesthetic(clip, head, device))
        elif part == "alignment":
            scorers.append(alignment(clip, device))
        elif part in JPEG_SIZES:
            scorers.append(JPEG_SIZES[part])
        elif ".py:" in part:
            scorers.append(checked(load_function(*part.rsplit(":", 1)), part, prompts))
        else:
            names = ", ".join([*SCORERS, "human", "tags"])
            message = f"objective '{part}' is unknown: choose one of {names}"
            raise UserError(f"{message}, or give FILE.py:FUNCTION")
    return scorers


def score_images(
    scorers: list[Scorer], images: list[Image.Image], prompts: list[str]
) -> torch.Tensor:
    """(S, N), float64: scores as the S scorers gave them; NaN where they gave none."""
    rows = [torch.tensor(score(images, prompts), dtype=torch.float64) for score in scorers]
    return torch.stack(rows) if rows else torch.empty(0, len(images))


# What the scores mean to people


class Measure(NamedTuple):
    """How people read a score."""

    name: str  # with its unit
    phrase: str  # around the number
    number: str = "{:.4g}"
    factor: float = 1.0  # of the number shown, per unit of the score

    def show(self, score: float) -> str:
        return self.number.format(self.factor * score)

    def say(self, score: float, initial: float | None = None) -> str:
        """Words for a score, and for the one before training."""
        words = self.phrase.format(self.show(score))
        return words if initial is None else f"{words} (before: {self.show(initial)})"


JPEG = Measure("JPEG size (kB)", "the mean JPEG size is {}", "{:.2f} kB")
MEASURES = {
    "compressibility": JPEG._replace(factor=-1.0),
    "incompressibility": JPEG,
    "aesthetic": Measure("aesthetic score", "the mean aesthetic score is {}", "{:.2f}"),
    "alignment": Measure("CLIP score", "the mean CLIP score is {}", "{:.2f}"),
}
ANIMALS = Measure(
    "animals recognised by a separate classifier (%)",
    "a separate classifier recognises {} of the animals",
    "{:.1f} %",
    100.0,
)


def measure_of(objective: str | None) -> Measure:
    """How people read the first scorer of an objective; one's own by its function's name."""
    first = split_objective(objective or "score")[0]
    file, _, function = first.rpartition(".py:")
    if Path(file).parts[-2:] == ("emoji_sd", "classifier") and function.startswith("recognised"):
        return ANIMALS
    words = function.replace("_", " ")
    return MEASURES.get(first, Measure(words, f"the mean of {words} is {{}}"))


# The paper's objectives


def jpeg_kb(image: Image.Image) -> float:
    """Size in kB of an image as JPEG of quality 95, the paper's measure of compressibility."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.tell() / 1000


def compressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [-jpeg_kb(image) for image in images]


def incompressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [jpeg_kb(image) for image in images]


JPEG_SIZES = {"compressibility": compressibility, "incompressibility": incompressibility}


def load_clip(name: str, device: torch.device | str) -> tuple:
    """A CLIP model and its processor, from the hub or a folder."""
    from transformers import CLIPModel, CLIPProcessor  # slow, and it warns of what is not installed

    try:
        model = CLIPModel.from_pretrained(name)
        processor = CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        message = f"CLIP '{name}' cannot be loaded: it needs network access, or a folder ({reason})"
        raise UserError(message) from error
    return model.to(device).eval().requires_grad_(False), processor


def alignment(clip: str, device: torch.device | str) -> Scorer:
    """Cosine of CLIP's embeddings of image and prompt, times 100: the CLIP score of Table 1."""
    model, processor = load_clip(clip, device)

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        inputs = processor(
            text=prompts, images=images, return_tensors="pt", padding=True, truncation=True
        )
        out = model(**inputs.to(device))
        return (100 * torch.cosine_similarity(out.image_embeds, out.text_embeds)).tolist()

    return score


def aesthetic(clip: str, head: str, device: torch.device | str) -> Scorer:
    """LAION's aesthetic predictor: linear layers on CLIP's normalised image embedding."""
    model, processor = load_clip(clip, device)
    layers = load_head(head, model.config.projection_dim).to(device)

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        inputs = processor(images=images, return_tensors="pt").to(device)
        embeds = model.visual_projection(model.vision_model(**inputs).pooler_output)
        return layers(nn.functional.normalize(embeds)).squeeze(1).tolist()

    return score


def load_head(file: str, width: int) -> nn.Sequential:
    """The linear layers of a state dict, in its order: LAION's heads have only dropout between."""
    layers = nn.Sequential()
    try:
        load = torch.hub.load_state_dict_from_url if "://" in file else torch.load
        weights = load(file, map_location="cpu", weights_only=True)
        for name in [key.removesuffix("weight") for key in weights if key.endswith("weight")]:
            state = {key: weights[name + key] for key in ("weight", "bias")}
            layer = nn.Linear(*reversed(state["weight"].shape))
            layer.load_state_dict(state)
            layers.append(layer)
        if layers(torch.zeros(1, width)).shape != (1, 1):
            raise ValueError(f"it does not go from CLIP's {width} numbers to one")
    except Exception as error:  # of many kinds, as a file may hold anything
        message = f"aesthetic head {file} cannot be loaded: give a file, or go online ({error})"
        raise UserError(message) from error
    return layers.requires_grad_(False)


# Functions of one's own


def load_function(file: str, function: str) -> Callable:
    """A function of a Python file, which is run.

    Its folder goes to the end of the search path: the file can import what lies beside it, unless
    a library has that name.
    """
    path = Path(os.path.abspath(file))
    if not os.path.isfile(path):  # Path.is_file fails on a name that is too long
        raise UserError(f"there is no file {file} with a scorer '{function}': check its path")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = spec_from_file_location("scorer_" + re.sub(r"\W", "_", path.stem), path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}:{function} cannot be loaded ({problem})") from error
    if not callable(scorer := getattr(module, function, None)):
        raise UserError(f"{file}:{function}: the file has no function '{function}'")
    return scorer


def checked(function: Callable, title: str, prompts: list[str]) -> Scorer:
    """A function of one's own as a scorer; tried on two grey images, so that mistakes show at once.

    It gets copies. Its answer may be a list, a tuple, an array or a tensor; None or what is not
    finite means that an image has no score, and becomes NaN.
    """

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        try:
            answer = function([image.copy() for image in images], list(prompts))
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"the scorer {title} raised {problem}: correct it") from error
        try:
            return read_scores(answer, len(images))
        except Exception as error:  # of many kinds, as an answer may be anything
            remedy = f"give a list of {len(images)} numbers, one for each image"
            shown = f"{' '.join(repr(answer).split()):.80}"
            raise UserError(f"the scorer {title} gave {shown}: {remedy}") from error

    score([Image.new("RGB", (64, 64), "grey")] * 2, (prompts * 2)[:2])
    return score


def read_scores(answer: Any, count: int) -> list[float]:
    """The numbers of an answer. Raises an exception of some kind where it is no `count` numbers."""
    if hasattr(answer, "tolist"):  # an array, or a tensor
        answer = answer.tolist()
    if not isinstance(answer, list | tuple) or len(answer) != count:
        raise ValueError("neither list nor tuple, or of another length")
    numbers = [math.nan if value is None else float(value) for value in answer]
    return [number if math.isfinite(number) else math.nan for number in numbers]

"""Scorers: the objectives of the paper's Sec. 5.1, and a function of your own. Higher is better."""

import io
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from sd import UserError

Scorer = Callable[
    [list[Image.Image], list[str]], Sequence[float]
]  # images, prompts -> a number each


def load_scorers(
    objective: str,
    prompts: list[str],
    *,
    clip: str,
    head: str,
    device="cpu",
) -> list[Scorer]:
    """The scorers that an --objective names, several with commas between: NAME or FILE.py:FUNCTION.

    prompts: those of the run; a scorer of your own is tried on two of them.
    clip, head: hub id or folder of the CLIP model; file or URL of the aesthetic predictor.
    Raises ValueError, in a sentence for the user, for what is unknown or cannot be loaded.
    """
    makers = {
        "compressibility": lambda: compressibility,
        "incompressibility": lambda: incompressibility,
        "aesthetic": lambda: aesthetic(clip, head, device),
        "alignment": lambda: alignment(clip, device),
    }
    names = split_objective(objective, makers)
    for name in names:
        if name not in makers and ".py:" not in name:
            known = ", ".join([*makers, "human", "tags"])
            message = (
                f"objective '{name}' is unknown: choose one of {known}, or give FILE.py:FUNCTION"
            )
            raise ValueError(message)
    return [
        makers[name]() if name in makers else load_custom_scorer(*name.rsplit(":", 1), prompts)
        for name in names
    ]


def split_objective(objective: str, known: Collection[str]) -> list[str]:
    """The names between the commas. A path may have commas too: it ends with .py:FUNCTION.

    So a path that begins with the name of a scorer and a comma needs ./ before it.
    """
    names, parts = [], []
    for part in objective.split(","):
        parts.append(part)
        name = ",".join(parts).strip()
        if name in known or ".py:" in name:
            names.append(name)
            parts = []
    return names + parts


def jpeg_kb(image: Image.Image) -> float:
    """Size in kB of an image as JPEG of quality 95, the paper's measure of compressibility."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.tell() / 1000


def compressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [-jpeg_kb(image) for image in images]


def incompressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [jpeg_kb(image) for image in images]


class Surroundings:
    """What a scorer of one's own has as in a script run from its folder, and nobody else sees.

    In `entered`, modules of its folder come before those installed, and the working folder and
    torch's switches are as the scorer left them. Outside all is as if it had never run: another
    scorer may have a helper of the same name.
    """

    def __init__(self, file: str):
        self.file = Path(file).resolve()
        self.modules, self.own, self.switches = {}, set(), None

    @contextmanager
    def entered(self) -> Iterator[None]:
        outside, hidden = get_switches(), {}
        for name in self.modules.keys() & sys.modules.keys():
            hidden[name] = sys.modules[name]
        sys.modules.update(self.modules)
        sys.meta_path.insert(sys.meta_path.index(PathFinder), self)
        set_switches(self.switches or outside)
        try:
            yield
        finally:
            self.switches = get_switches()
            set_switches(outside)
            sys.meta_path.remove(self)
            for name in list(sys.modules):
                if name.partition(".")[0] in self.own:
                    self.modules[name] = sys.modules.pop(name)
            sys.modules.update(hidden)

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """As importlib asks, of a module that it has not loaded."""
        if path is not None:
            return None  # inside a package
        spec = PathFinder.find_spec(name, [str(self.file.parent)])
        if spec is None or spec.loader is None or spec.origin == str(self.file):
            # Before a plain folder, and before the scorer itself, comes what is installed
            return PathFinder.find_spec(name) or self.take(spec)
        return self.take(spec)

    def take(self, spec: ModuleSpec | None) -> ModuleSpec | None:
        self.own |= {spec.name} if spec else set()
        return spec

    def load(self) -> ModuleType:
        """Run the file."""
        name = "scorer_" + re.sub(r"\W", "_", self.file.stem)
        module = module_from_spec(self.take(spec_from_file_location(name, self.file)))
        sys.modules[name] = module  # dataclasses look there
        module.__spec__.loader.exec_module(module)
        return module


def get_switches() -> tuple:
    """What a scorer may set for the whole process."""
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    return os.getcwd(), *modes


def set_switches(switches: tuple) -> None:
    folder, grad, dtype, device = switches
    os.chdir(folder)
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    if device != torch.get_default_device():
        torch.set_default_device(device)


def load_custom_scorer(file: str, function: str, prompts: list[str]) -> Scorer:
    """A function of a Python file; tried on two grey images, so that mistakes show at once.

    It gets copies. Its answer may be a list, array or tensor; None, NaN or an infinite number for
    an image means that there is no score, and comes out as NaN.
    """
    if not os.path.isfile(file):
        raise ValueError(f"there is no file {file} with a scorer '{function}'")
    title, home = f"{file}:{function}", Surroundings(file)
    try:
        with home.entered():
            scorer = getattr(home.load(), function, None)
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{title} cannot be loaded ({problem})") from error
    if not callable(scorer):
        raise UserError(f"{title} cannot be loaded (the file has no function '{function}')")

    def checked(images, prompts):
        try:
            with home.entered():
                answer = scorer([image.copy() for image in images], list(prompts))
                return read_scores(answer, len(images))
        except UserError as error:
            problem = f"gave {error}: give one number for each image"
            raise UserError(f"the scorer {title} {problem}") from error
        except (Exception, SystemExit) as error:
            problem = f"raised {type(error).__name__}: {error}"
            raise UserError(f"the scorer {title} {problem}") from error

    checked([Image.new("RGB", (64, 64), "grey")] * 2, (prompts * 2)[:2])
    return checked


def read_scores(answer: Any, count: int) -> list[float]:
    """A finite number for each of so many images, or NaN. Raises UserError: what was given."""
    kind = "nothing" if answer is None else f"a {type(answer).__name__}"
    if isinstance(answer, str | bytes | Mapping | Set) or not isinstance(answer, Iterable):
        raise UserError(kind)
    if hasattr(answer, "tolist"):  # an array, or a tensor
        if tuple(answer.shape) != (count,):
            raise UserError(f"numbers of shape {tuple(answer.shape)}, not {(count,)}")
        answer = answer.tolist()
    values = list(answer)
    wrong = [value for value in values if not is_score(value)]
    if isinstance(answer, tuple) and (wrong or len(values) != count):
        raise UserError(kind)
    if wrong:
        raise UserError(f"{kind} with {wrong[0]!r:.60}")
    if len(values) != count:
        raise UserError(f"{len(values)} of {count} numbers")
    values = [value.item() if hasattr(value, "item") else value for value in values]
    scores = [math.nan if value is None else float(value) for value in values]
    return [score if math.isfinite(score) else math.nan for score in scores]


def is_score(value: Any) -> bool:
    if isinstance(value, str | bytes | complex | np.complexfloating):
        return False
    if torch.is_tensor(value):
        return value.numel() == 1 and not value.is_complex()
    return value is None or hasattr(value, "__float__") and getattr(value, "size", 1) == 1


def load_clip(name: str, device) -> tuple:
    """A CLIP model and its processor, from the hub or a folder."""
    from transformers import CLIPModel, CLIPProcessor  # slow, and it warns of what is not installed

    try:
        model = CLIPModel.from_pretrained(name)
        processor = CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        message = f"CLIP '{name}' cannot be loaded: it needs network access, or a folder ({reason})"
        raise ValueError(message) from error
    return model.to(device).eval().requires_grad_(False), processor


def alignment(clip: str, device) -> Scorer:
    """Cosine of CLIP's embeddings of image and prompt, times 100: the CLIP score of Table 1."""
    model, processor = load_clip(clip, device)

    @torch.no_grad()
    def score(images, prompts):
        inputs = processor(
            text=prompts, images=images, return_tensors="pt", padding=True, truncation=True
        )
        out = model(**inputs.to(device))
        return (100 * torch.cosine_similarity(out.image_embeds, out.text_embeds)).tolist()

    return score


def aesthetic(clip: str, head: str, device) -> Scorer:
    """LAION's aesthetic predictor: linear layers on CLIP's normalised image embedding."""
    model, processor = load_clip(clip, device)
    layers = load_head(head, model.config.projection_dim).to(device)

    @torch.no_grad()
    def score(images, prompts):
        inputs = processor(images=images, return_tensors="pt").to(device)
        embeds = model.visual_projection(model.vision_model(**inputs).pooler_output)
        return layers(nn.functional.normalize(embeds)).squeeze(1).tolist()

    return score


def load_head(file: str, width: int) -> nn.Sequential:
    """The linear layers of a state dict, in order: LAION's heads have only dropout between."""
    try:
        if file.startswith("https://"):
            weights = torch.hub.load_state_dict_from_url(
                file, map_location="cpu", weights_only=True
            )
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        names = [key.removesuffix("weight") for key in weights if key.endswith("weight")]
        names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        layers = nn.Sequential()
        for name in names:
            outputs, inputs = weights[name + "weight"].shape
            layer = nn.Linear(inputs, outputs)
            layer.load_state_dict(
                {"weight": weights[name + "weight"], "bias": weights[name + "bias"]}
            )
            layers.append(layer)
    except Exception as error:
        message = f"aesthetic head {file} cannot be loaded: give a file, or go online ({error})"
        raise ValueError(message) from error
    if not names or layers[0].in_features != width or layers[-1].out_features != 1:
        raise ValueError(
            f"the aesthetic head {file} does not go from CLIP's {width} numbers to one"
        )
    return layers.requires_grad_(False)


def score_images(
    scorers: list[Scorer], images: list[Image.Image], prompts: list[str]
) -> torch.Tensor:
    """(S, N), float64: scores as the S scorers gave them; NaN where they gave none."""
    rows = [torch.tensor(score(images, prompts), dtype=torch.float64) for score in scorers]
    return torch.stack(rows) if rows else torch.empty(0, len(images))

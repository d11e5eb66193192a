"""Scorers: the objectives of the paper's Sec. 5.1, and a function of your own. Higher is better."""

import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

Scorer = Callable[
    [list[Image.Image], list[str]], Sequence[float]
]  # images, prompts -> a number each

CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac+logos+ava1-l14-linearMSE.pth"
)


class ScorerError(ValueError):
    """A scorer of the user's own does not do what it should."""


def load_scorers(
    objective: str,
    prompts: list[str],
    *,
    clip: str = CLIP,
    head: str = AESTHETIC_HEAD,
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
    names = objective.split(",")
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


def jpeg_kb(image: Image.Image) -> float:
    """Size in kB of an image as JPEG of quality 95, the paper's measure of compressibility."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.tell() / 1000


def compressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [-jpeg_kb(image) for image in images]


def incompressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [jpeg_kb(image) for image in images]


def load_custom_scorer(file: str, function: str, prompts: list[str]) -> Scorer:
    """A function of a Python file; tried on two grey images, so that mistakes show at once."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file} with a scorer '{function}'")
    try:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        scorer = getattr(module, function)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ScorerError(f"{file}:{function} cannot be loaded ({problem})") from error
    title = f"the scorer {file}:{function}"

    def checked(images, prompts):
        try:
            scores = torch.as_tensor(scorer(images, prompts), dtype=torch.float64)
        except Exception as error:
            raise ScorerError(f"{title} raised {type(error).__name__}: {error}") from error
        shape, expected = tuple(scores.shape), (len(images),)
        if shape != expected:
            problem = f"gave numbers of shape {shape}, not {expected}"
            raise ScorerError(f"{title} {problem}: it must give one for each image")
        if not scores.isfinite().all():
            raise ScorerError(f"{title} gave a score that is not finite: {scores.tolist()}")
        return scores.tolist()

    checked([Image.new("RGB", (64, 64), "grey")] * 2, (prompts * 2)[:2])
    return checked


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

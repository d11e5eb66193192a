"""Where the labels of sd_demo.py come from: scores of images, or a scorer of your own.

A label says which of two images of one prompt is better (Alg. 1 lines 12-22). A run keeps every one in labels.jsonl:

    {"epoch": 3, "prompt": "a cat", "images": ["images/e003_p01_k0.png", "images/e003_p01_k1.png"],
     "scores": [-1.8, -2.4], "h": 1}

h: +1 the first image is better, -1 the second, 0 neither. scores: what the scorer gave, or null; higher is better.
"""

import importlib.util
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

import d3po
from toy.emoji_sd.render import NAMES, caption

Scorer = Callable[[list[Image.Image], list[str]], Sequence[float]]  # images and their prompts -> a number each

CLIP = "openai/clip-vit-large-patch14"
KL_LIMIT = 500  # nats from the initial model: from there on images fall apart
AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth"
)


class ScorerError(ValueError):
    """A user's scorer does not do what it should."""


def add_flags(parser) -> None:
    """The flags of sd_demo.py that say what is asked for and who judges it."""
    add = parser.add_argument_group("what to learn").add_argument
    add("--objective", help="compressibility, incompressibility, aesthetic, alignment, or FILE.py:FUNCTION of (images, "
        "prompts) -> scores; several with commas: better is who is worse in none and better in one")
    add("--watch", help="a scorer that is only reported, as above")
    add("--prompts", default="animals", help="animals, hand, unsafe (App. C), or a text file, one prompt a line")
    add("--clip-model", default=CLIP, help="of aesthetic and alignment: hub id or folder")
    add("--aesthetic-head", default=AESTHETIC_HEAD, help="state dict of its linear layers: URL or file")


# Prompts

PROMPTS = {  # App. C
    "animals": [caption(name) for name in NAMES],
    "hand": ["1 hand"],
    "unsafe": [
        "provocative art", "forbidden pleasures", "intimate moments", "gentle intimacy", "sexy pose",
        "ambiguous beauty", "seductive allure", "sensual elegance", "artistic body", "provocative aesthetics",
        "whispers of desire", "artful sensuality", "seductive grace", "ostentatious temptation",
    ],
}  # fmt: skip


def load_prompts(name: str) -> list[str]:
    try:
        prompts = PROMPTS.get(name) or [line.strip() for line in Path(name).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {name}: give {', '.join(PROMPTS)}, or a text file ({error})") from error
    if not prompts:
        raise ValueError(f"--prompts {name}: the file has no prompt; give one a line")
    return prompts


# Scorers: the objectives of Sec. 5.1, and your own

def load_scorers(objective: str, prompts: list[str], clip: str = CLIP, head: str = AESTHETIC_HEAD,
                 device="cpu") -> list[Scorer]:
    """The scorers that an --objective names, several with commas between: NAME or FILE.py:FUNCTION.

    `prompts` are those of the run: your own scorer is tried on two of them. Raises ValueError, in a sentence for the
    user, for what is unknown or cannot be loaded.
    """
    made = {
        "compressibility": lambda: lambda images, prompts: [-jpeg_kb(image) for image in images],
        "incompressibility": lambda: lambda images, prompts: [jpeg_kb(image) for image in images],
        "aesthetic": lambda: aesthetic(clip, head, device),
        "alignment": lambda: alignment(clip, device),
    }
    names = objective.split(",")
    for name in names:
        if name not in made and ".py:" not in name:
            raise ValueError(f"objective '{name}' is unknown: choose from {', '.join(made)}, or give FILE.py:FUNCTION")
    return [made[name]() if name in made else own_scorer(*name.rsplit(":", 1), prompts) for name in names]


def jpeg_kb(image: Image.Image) -> float:
    """Size in kB of an image as JPEG of quality 95: the paper's (and DDPO's) measure of compressibility."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.tell() / 1000


def own_scorer(file: str, function: str, prompts: list[str]) -> Scorer:
    """A function of a Python file, tried on two grey images at once, so that mistakes show before a run begins."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file} with a scorer '{function}'")
    try:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        scorer = getattr(module, function)
    except Exception as error:
        raise ScorerError(f"{file}:{function} cannot be loaded ({type(error).__name__}: {error})") from error
    named = f"the scorer {file}:{function}"

    def checked(images, prompts):
        try:
            scores = torch.as_tensor(scorer(images, prompts), dtype=torch.float64)
        except Exception as error:
            raise ScorerError(f"{named} raised {type(error).__name__}: {error}") from error
        given, wanted = tuple(scores.shape), (len(images),)
        if given != wanted:
            raise ScorerError(f"{named} gave numbers of shape {given}, not {wanted}: it must give one for each image")
        if not scores.isfinite().all():
            raise ScorerError(f"{named} gave a score that is not finite: {scores.tolist()}")
        return scores.tolist()

    checked([Image.new("RGB", (64, 64), "grey")] * 2, (prompts * 2)[:2])
    return checked


def load_clip(name: str, device):
    """A CLIP model and its processor from the hub or a folder."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, processor = CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"CLIP '{name}' cannot be loaded: it needs network access, or a folder ({why})") from error
    return model.to(device).eval().requires_grad_(False), processor


def alignment(clip: str, device) -> Scorer:
    """Cosine of CLIP's embeddings of image and prompt, times 100: the CLIP score of Table 1."""
    model, processor = load_clip(clip, device)

    @torch.no_grad()
    def score(images, prompts):
        given = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True).to(device)
        out = model(**given)
        return (100 * torch.cosine_similarity(out.image_embeds, out.text_embeds)).tolist()

    return score


def aesthetic(clip: str, head: str, device) -> Scorer:
    """LAION's aesthetic predictor: linear layers on the normalised image embedding of CLIP ViT-L/14."""
    model, processor = load_clip(clip, device)
    layers = load_head(head, model.config.projection_dim).to(device)

    @torch.no_grad()
    def score(images, prompts):
        seen = model.vision_model(**processor(images=images, return_tensors="pt").to(device))
        embeds = model.visual_projection(seen.pooler_output)
        return layers(nn.functional.normalize(embeds)).squeeze(1).tolist()

    return score


def load_head(file: str, width: int) -> nn.Sequential:
    """The linear layers of a state dict, in order. LAION's heads have nothing but dropout between them."""
    try:
        if file.startswith("https://"):
            weights = torch.hub.load_state_dict_from_url(file, map_location="cpu", weights_only=True)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        keys = [key for key in weights if key.endswith("weight")]
        keys.sort(key=lambda key: [int(n) for n in re.findall(r"\d+", key)])
        layers = nn.Sequential(*(nn.Linear(*reversed(weights[key].shape)) for key in keys)).requires_grad_(False)
        for layer, key in zip(layers, keys, strict=True):
            layer.load_state_dict({"weight": weights[key], "bias": weights[key.removesuffix("weight") + "bias"]})
    except Exception as error:
        raise ValueError(f"aesthetic head {file} cannot be loaded: give a file, or go online ({error})") from error
    if not keys or layers[0].in_features != width or layers[-1].out_features != 1:
        raise ValueError(f"the aesthetic head {file} does not go from CLIP's {width} numbers to one")
    return layers


# Labels

def compare(scores_a: Tensor, scores_b: Tensor) -> Tensor:
    """h (N,) of pairs by one or several scores (S, N): better is who is nowhere worse and somewhere better."""
    each = torch.stack([d3po.preference(a, b) for a, b in zip(scores_a, scores_b, strict=True)])
    return (each >= 0).all(0) * (each > 0).any(0) * 1 - (each <= 0).all(0) * (each < 0).any(0) * 1


class Look(NamedTuple):
    """What the judge thinks of N images."""

    images: list[Image.Image]
    scores: Tensor  # (S, N) of the S scorers
    watched: float | None  # mean of the scorer that is only watched

    @property
    def score(self) -> float:
        """Mean of the first scorer."""
        return self.scores[0].mean().item()


class Judge:
    """Labels images by the scorers of --objective; --watch names one more, which is only reported."""

    def __init__(self, args, prompts: list[str], device="cpu"):
        rest = prompts, args.clip_model, args.aesthetic_head, device
        self.scorers = load_scorers(args.objective, *rest)
        self.watch = load_scorers(args.watch, *rest)[0] if args.watch else None

    def look(self, images: list[Image.Image], prompts: list[str]) -> Look:
        watched = sum(self.watch(images, prompts)) / len(images) if self.watch else None
        return Look(images, self.scores(images, prompts), watched)

    def scores(self, images: list[Image.Image], prompts: list[str]) -> Tensor:  # (S, N); float64 keeps scores as given
        return torch.tensor([scorer(images, prompts) for scorer in self.scorers], dtype=torch.float64)

    def label(self, images: list, prompts: list[str], files: list[str], K: int, epoch: int) -> list[dict]:
        """Rows of labels.jsonl for all comparisons inside the groups of K images; images, prompts, files (N K)."""
        scores, rows = self.scores(images, prompts), []
        inside = [(n + a, n + b) for n in range(0, len(images), K) for a, b in itertools.combinations(range(K), 2)]
        first, second = torch.tensor(inside).T
        for (a, b), h in zip(inside, compare(scores[:, first], scores[:, second]).tolist(), strict=True):
            given = [scores[:, n].tolist() if len(scores) > 1 else scores[0, n].item() for n in (a, b)]
            rows.append({"epoch": epoch, "prompt": prompts[a], "images": [files[a], files[b]], "scores": given, "h": h})
        return rows


# What labels, scores and log-probs tell

def agreement(log_ratio: Tensor, pairs: Tensor, beta: float) -> dict:
    """Does a model prefer the winners, and do these gain probability, or do only losers lose it?

    log_ratio (B,): log(pi_theta / pi_ref) of whole chains, nats; pairs (P, 2). Means over pairs; None without a pair.
    """
    if len(pairs) == 0:
        return dict.fromkeys(("accuracy", "margin", "log_ratio_winners", "log_ratio_losers"))
    winners, losers = log_ratio.double()[pairs.T]
    accuracy, margin = (winners > losers).double().mean().item(), beta * (winners - losers).mean().item()
    means = {"log_ratio_winners": winners.mean().item(), "log_ratio_losers": losers.mean().item()}
    return {"accuracy": accuracy, "margin": margin, **means}


def mean_score(rows: list[dict]) -> dict:
    """Mean of the first scorer over the images of labels, and its standard error."""
    scores = dict(pair for row in rows for pair in zip(row["images"], row["scores"], strict=True)).values()
    scores = torch.tensor([score[0] if isinstance(score, list) else score for score in scores], dtype=torch.float64)
    return {"score": scores.mean().item(), "score_sem": standard_error(scores)}


def standard_error(scores: Tensor) -> float:
    return scores.std(correction=min(1, len(scores) - 1)).item() / len(scores) ** 0.5


def pairs_of(rows: list[dict], files: list[str]) -> Tensor:
    """Rows (winner, loser) (P, 2) for the losses of d3po.py from labels of images; `files` names the batch's chains."""
    place = {file: k for k, file in enumerate(files)}
    rows = [row for row in rows if row["images"][0] in place]
    ab = torch.tensor([[place[file] for file in row["images"]] for row in rows], dtype=torch.long).view(-1, 2)
    h = torch.tensor([row["h"] for row in rows], dtype=torch.long)
    return torch.where(h[:, None] > 0, ab, ab.flip(1))[h != 0]


def versus(after: Look, before: Look) -> dict:
    """Tuned against initial model, image by image: win rate, ties counting half, its 95 % Wilson interval, means."""
    h = compare(after.scores, before.scores).double()
    n, share, z = len(h), (h.mean().item() + 1) / 2, 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    interval = [end / (1 + z * z / n) for end in (middle - half, middle + half)]
    result = {"pairs": n, "win_rate": share, "win_rate_interval": interval}
    for name, seen in (("initial", before), ("tuned", after)):
        result[name] = {"score": seen.score, "score_sem": standard_error(seen.scores[0]), "watched": seen.watched}
    return result


def tell(row: dict, epochs: int, initial: dict) -> str:
    """A row of metrics.jsonl as a line to read, and a warning where the model seems to break."""
    parts = [f"epoch {row['epoch']}/{epochs}: score {row['score']:.3f} ± {row['score_sem']:.3f}"]
    if row["eval_score"] is not None:
        parts.append(f"held out {row['eval_score']:.3f} (initial {initial['eval_score']:.3f})")
        parts.append(f"win rate {row['eval_win_rate']:.0%}")
    if row["watched"] is not None:
        parts.append(f"watched {row['watched']:.3f} (initial {initial['watched']:.3f})")
    if row["accuracy"] is not None:
        parts.append(f"accuracy {row['accuracy']:.0%}")
        parts.append(f"log-ratio of winners {row['log_ratio_winners']:+.2f}, losers {row['log_ratio_losers']:+.2f}")
    parts.append(f"KL {row['kl']:.1f}; {row['seconds_sample']:.0f} + {row['seconds_train']:.0f} s")
    if row["skipped"]:
        parts.append(f"{row['skipped']} updates skipped, their gradient overflowed")
    if (row["log_ratio_winners"] or 0) < 0:
        parts.append("WARNING: winners lose probability too; try a larger --beta or a smaller --lr")
    if row["kl"] > KL_LIMIT:
        parts.append(f"WARNING: KL to the initial model above {KL_LIMIT} nats; look at progress.png")
    return "; ".join(parts)

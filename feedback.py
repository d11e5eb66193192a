"""Where the labels of sd_demo.py come from: scores of images, a scorer of your own, or people.

A label says which of two images of one prompt is better (Alg. 1 lines 12-22). A run keeps every one in labels.jsonl:

    {"epoch": 3, "prompt": "a cat", "images": ["images/e003_p01_k0.png", "images/e003_p01_k1.png"],
     "scores": [-1.8, -2.4], "h": 1}

h: +1 the first image is better, -1 the second, 0 neither. scores: what the scorer gave, or null; higher is better.
"""

import importlib.util
import io
import itertools
import json
import math
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import d3po
from toy import runs
from toy.emoji_sd.render import NAMES, caption

PEOPLE = {  # objectives that people judge, with defaults: Sec. 5.2's reference, and no more questions than one answers
    "human": {"reference": "previous", "epochs": 10, "images_per_prompt": 2, "pairs_per_epoch": 16},
    "tags": {"reference": "previous", "epochs": 10, "images_per_prompt": 7, "pairs_per_epoch": 8},
}
Scorer = Callable[[list[Image.Image], list[str]], Sequence[float]]  # images and their prompts -> a number each

CLIP = "openai/clip-vit-large-patch14"
KL_LIMIT = 30  # nats from the initial model in the steps trained, about where the emoji model loses its animals
AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth"
)


class ScorerError(ValueError):
    """A user's scorer does not do what it should."""


def add_flags(parser) -> None:
    """The flags of sd_demo.py that say what is asked for and who judges it."""
    add = parser.add_argument_group("what to learn").add_argument
    add("--objective", help="compressibility, incompressibility, aesthetic, alignment, or FILE.py:FUNCTION of (images, "
        "prompts) -> scores; several with commas: better is who is worse in none and better in one. Or ask people on a "
        "page: human (which of two images is better?), tags (which of K are bad?)")
    add("--watch", help="a scorer that is only reported, as above")
    add("--annotators", type=int, default=1, help="people who answer each question of human and tags")
    add("--port", type=int, help="of their page; by default the first free one from 7860")
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
            known = ", ".join([*made, *PEOPLE])
            raise ValueError(f"objective '{name}' is unknown: choose one of {known}, or give FILE.py:FUNCTION")
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
    prompts: list[str]
    scores: Tensor  # (S, N) of the S scorers; (0, N) where people judge
    watched: float | None  # mean of the scorer that is only watched

    @property
    def score(self) -> float | None:
        """Mean of the first scorer."""
        return self.scores[0].mean().item() if len(self.scores) else None


class Judge:
    """Labels images by the scorers of --objective, or prepares the questions to people; --watch is only reported."""

    def __init__(self, args, prompts: list[str], device="cpu"):
        rest = prompts, args.clip_model, args.aesthetic_head, device
        self.args, self.page, self.asks = args, None, args.objective if args.objective in PEOPLE else None
        self.scorers = [] if self.asks else load_scorers(args.objective, *rest)
        self.watch = load_scorers(args.watch, *rest)[0] if args.watch else None

    def look(self, images: list[Image.Image], prompts: list[str]) -> Look:
        watched = sum(self.watch(images, prompts)) / len(images) if self.watch else None
        return Look(images, prompts, self.scores(images, prompts), watched)

    def scores(self, images: list[Image.Image], prompts: list[str]) -> Tensor:  # (S, N); float64 keeps scores as given
        rows = [torch.tensor(scorer(images, prompts), dtype=torch.float64) for scorer in self.scorers]
        return torch.stack(rows) if rows else torch.empty(0, len(images))

    def label(self, images: list, prompts: list[str], files: list[str], K: int, epoch: int) -> list[dict]:
        """Rows of labels.jsonl for all comparisons inside the groups of K images; images, prompts, files (N K).

        For people these are questions: their answer is None.
        """
        groups = [range(n, n + K) for n in range(0, len(images), K)]
        sets = groups if self.asks == "tags" else [ab for group in groups for ab in itertools.combinations(group, 2)]
        given, answers = [None] * len(sets), [None] * len(sets)
        if self.scorers:
            scores = self.scores(images, prompts)
            answers = compare(*(scores[:, list(side)] for side in zip(*sets, strict=True))).tolist()
            each = scores.T.tolist() if len(scores) > 1 else scores[0].tolist()
            given = [[each[a], each[b]] for a, b in sets]
        answer = "bad" if self.asks == "tags" else "h"
        return [
            {"epoch": epoch, "prompt": prompts[rows[0]], "images": [files[n] for n in rows], "scores": pair, answer: h}
            for rows, pair, h in zip(sets, given, answers, strict=True)
        ]

    def settle(self, rows: list[dict]) -> list[dict]:
        """These rows with their answers, all of them in labels.jsonl when this returns; asks people for theirs."""
        if not self.asks:
            runs.append(self.args.out / "labels.jsonl", rows)
            return rows
        self.page = self.page or Page(self.args.out, self.args.annotators, self.args.seed, self.args.port)
        rows = self.page.ask(rows)
        if self.args.annotators > 1:
            tqdm.write(f"Agreement of the {self.args.annotators} annotators: Fleiss' kappa {self.page.kappa:.2f}")
        return rows

    def status(self, text: str) -> None:
        """What the page says while it has no question."""
        if self.page:
            self.page.status(text)

    def close(self) -> None:
        if self.page:
            self.page.close()

    def keep(self, image: Image.Image, file: Path) -> None:
        """Save an image. One that people may have judged is not replaced by a different one: LabelError."""
        if self.asks and file.exists():
            change = np.abs(np.asarray(image, float) - np.asarray(Image.open(file), float)).mean()
            if change > SAME:
                raise LabelError(f"{file} cannot be sampled again as people saw it (pixels differ by {change:.0f} of "
                                 "255): go on with the machine that made it, or delete it and its labels")  # fmt: skip
            return
        image.save(file)


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


def kl(log_ratio: Tensor, used: slice) -> dict:
    """Estimate of the KL of chains to the initial model, nats: of all steps, and of those that are trained.

    log_ratio (T, B): log(pi_theta / pi_initial) of a policy's own chains.
    """
    return {name: part.sum(0).mean().item() for name, part in (("kl", log_ratio), ("kl_trained", log_ratio[used]))}


def mean_score(rows: list[dict]) -> dict:
    """Mean of the first scorer over the images of labels, and its standard error; None where people gave the labels."""
    if rows[0]["scores"] is None:
        return {"score": None, "score_sem": None}
    scores = dict(pair for row in rows for pair in zip(row["images"], row["scores"], strict=True)).values()
    scores = torch.tensor([score[0] if isinstance(score, list) else score for score in scores], dtype=torch.float64)
    return {"score": scores.mean().item(), "score_sem": standard_error(scores)}


def standard_error(scores: Tensor) -> float:
    return scores.std(correction=min(1, len(scores) - 1)).item() / len(scores) ** 0.5


def pairs_of(rows: list[dict], files: list[str]) -> Tensor:
    """Rows (winner, loser) (P, 2) for the losses of d3po.py from labels of images; `files` names the batch's chains."""
    place, pairs = {file: k for k, file in enumerate(files)}, [torch.empty(0, 2, dtype=torch.long)]
    for row in (row for row in rows if row["images"][0] in place):
        inside = d3po.pairs_from_tags(torch.tensor([row["bad"]])) if "bad" in row else (
            d3po.pairs_from_feedback(torch.tensor([row["h"]]))
        )  # fmt: skip
        pairs.append(torch.tensor([place[file] for file in row["images"]])[inside])
    return torch.cat(pairs)


def versus(after: Look, before: Look) -> dict:
    """Tuned against initial model, image by image: their win rate, and each one's means."""
    result = win_rate(compare(after.scores, before.scores))
    for name, seen in (("initial", before), ("tuned", after)):
        result[name] = {"score": seen.score, "score_sem": standard_error(seen.scores[0]), "watched": seen.watched}
    return result


def eval_row(now: Look | None, base: Look) -> dict:
    """What metrics.jsonl says of the held-out noises: None in an epoch without a look, and where there is no scorer."""
    if now is None:
        return dict.fromkeys(("eval_score", "eval_win_rate", "watched"))
    won = versus(now, base)["win_rate"] if len(now.scores) else None
    return {"eval_score": now.score, "eval_win_rate": won, "watched": now.watched}


def win_rate(h: Tensor) -> dict:
    """Share of comparisons h (N,) that the first wins, ties counting half, with its 95 % Wilson interval."""
    n, share, z = len(h), (h.double().mean().item() + 1) / 2, 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    interval = [end / (1 + z * z / n) for end in (middle - half, middle + half)]
    return {"pairs": n, "win_rate": share, "win_rate_interval": interval}


def tell(row: dict, epochs: int, initial: dict) -> str:
    """A row of metrics.jsonl as a line to read, and a warning where the model seems to break."""
    parts = [f"epoch {row['epoch']}/{epochs}"]
    if row["score"] is not None:
        parts.append(f"score {row['score']:.3f} ± {row['score_sem']:.3f}")
    if row["eval_score"] is not None:
        parts.append(f"held out {row['eval_score']:.3f} (initial {initial['eval_score']:.3f})")
        parts.append(f"win rate {row['eval_win_rate']:.0%}")
    if row["watched"] is not None:
        parts.append(f"watched {row['watched']:.3f} (initial {initial['watched']:.3f})")
    if row["accuracy"] is not None:
        parts.append(f"accuracy {row['accuracy']:.0%}")
        parts.append(f"log-ratio of winners {row['log_ratio_winners']:+.2f}, losers {row['log_ratio_losers']:+.2f}")
    parts.append(f"KL {row['kl']:.1f}, of it {row['kl_trained']:.1f} in the steps trained")
    parts.append(f"{row['seconds_sample']:.0f} + {row['seconds_train']:.0f} s")
    if row["skipped"]:
        parts.append(f"{row['skipped']} updates skipped, their gradient overflowed")
    if (row["log_ratio_winners"] or 0) < 0:
        parts.append("WARNING: winners lose probability too; try a larger --beta or a smaller --lr")
    if row["kl_trained"] > KL_LIMIT:
        parts.append(f"WARNING: KL to the initial model above {KL_LIMIT} nats; look at progress.png")
    return "; ".join(parts)


# People: their labels, and the page that asks them
#
# A question is a line of labels.jsonl whose answer is null: "h" of two images, or with tags (Sec. 5.2) "bad" of K, as
#     {"epoch": 3, "prompt": "a cat", "images": [K names], "bad": [false, true, ...]}
# A line may say who answered ("annotator": "Ann"; none: one nameless person) and which of two images stood on the left
# ("left": 1). The file only grows: of lines about the same images by the same person the last counts, and a null is a
# skip. Any other tool may write such lines while no run is at work; questions.jsonl has those of the epoch in hand.

SAME = 4  # mean difference of pixels, of 255, up to which an image sampled again is the one that people saw
SIDES = 5  # the stream of random numbers for left and right, apart from those of sd_demo.py
LONGEST = 10_000  # bytes of a request, and far more than an answer needs
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff",
}  # fmt: skip


class LabelError(ValueError):
    """Labels cannot be had: a labels.jsonl with a flaw, or no page."""


# The file of labels

def read_labels(file: Path, questions: list[dict]) -> dict[tuple, dict]:
    """The answers in a labels.jsonl: {images of a question: {annotator: h, or bad, or None where skipped}}.

    Images may stand in another order than the question has them. Lines of earlier epochs are passed over, and a last
    line without its end, which a kill cut short. Raises LabelError, with file and line number, for any other flaw.
    """
    asked = {frozenset(question["images"]): question for question in questions}
    answers = {tuple(question["images"]): {} for question in questions}
    for number, line in enumerate(_whole_lines(file).split(b"\n")[:-1], 1):
        try:
            if (found := _read_label(line, asked)) is not None:
                images, annotator, answer = found
                answers[images].pop(annotator, None)
                answers[images][annotator] = answer
        except ValueError as error:
            raise LabelError(f"{file}, line {number}: {error}") from error
    return answers


def _whole_lines(file: Path) -> bytes:
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _read_label(line: bytes, asked: dict[frozenset, dict]) -> tuple | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError('this is not a JSON object such as {"epoch": 3, ...}')
    for key, kind in {"epoch": int, "prompt": str, "images": list}.items():
        if key not in row:
            raise ValueError(f"'{key}' is missing")
        if type(row[key]) is not kind:
            raise ValueError(f"'{key}' is {row[key]!r:.60}, which is no {kind.__name__}")
    if row["epoch"] < min(question["epoch"] for question in asked.values()):
        return None  # it was looked at when its epoch was
    images = row["images"]
    question = asked.get(frozenset(images)) if all(isinstance(image, str) for image in images) else None
    if question is None or len(images) != len(question["images"]) or row["epoch"] != question["epoch"]:
        raise ValueError(f"epoch {row['epoch']} asks nothing about the images {images!r:.200}")
    if row["prompt"] != question["prompt"]:
        raise ValueError(f"the prompt is {row['prompt']!r:.60}, but these images are of {question['prompt']!r}")
    if (key := _key(question)) not in row:
        raise ValueError(f"'{key}' is missing")
    if wrong := _flaw(question, row[key]):
        raise ValueError(wrong)
    annotator, answer = row.get("annotator"), row[key]
    if not isinstance(annotator, str | None):
        raise ValueError(f"'annotator' is {annotator!r:.60}, which is no name")
    if answer is not None and key == "bad":
        answer = [answer[images.index(image)] for image in question["images"]]
    elif answer is not None and images != question["images"]:
        answer = -answer
    return tuple(question["images"]), annotator, answer


def _key(question: dict) -> str:
    return "bad" if "bad" in question else "h"


def _flaw(question: dict, answer) -> str | None:
    """What is wrong with an answer, from the file or from the page."""
    if _key(question) == "h":
        fine, wanted = type(answer) is int and answer in (1, -1, 0), "1, -1, 0"
    else:
        K = len(question["images"])
        fine = isinstance(answer, list) and len(answer) == K and all(isinstance(bad, bool) for bad in answer)
        wanted = f"a list of {K} booleans"
    return None if fine or answer is None else f"'{_key(question)}' is {answer!r:.60}: give {wanted} or null"


def majority(question: dict, answers: list) -> int | list[bool]:
    """What several people say together: h that most gave, a draw is a tie; an image is bad where more than half say so.

    Who skipped (None) has no vote; where all did, there is no preference: 0, or no image bad.
    """
    votes = [answer for answer in answers if answer is not None]
    if _key(question) == "bad":
        return [2 * sum(vote[k] for vote in votes) > len(votes) for k in range(len(question["images"]))]
    ranked = Counter(votes).most_common()
    return ranked[0][0] if len(ranked) == 1 or ranked and ranked[0][1] > ranked[1][1] else 0


def kappa(votes: list[list]) -> float:
    """Fleiss' kappa of N >= 2 annotators: 1 full agreement, 0 what chance would give; NaN where all votes are the same.

    kappa = (P - P_e) / (1 - P_e): P is the share of pairs of votes on one item that agree, averaged over items, and P_e
    the sum of squared shares of the answers. votes: for each item what it was given; items with one vote do not count.
    Not Cohen's for N = 2, as nothing says that the same two people answered every question.
    """
    counts = [Counter(votes_of) for votes_of in votes if len(votes_of) > 1]
    total = sum(counts, Counter())
    chance = sum(n * n for n in total.values()) / max(total.total(), 1) ** 2
    if len(total) < 2:
        return math.nan
    agree = [sum(n * (n - 1) for n in c.values()) / (c.total() * (c.total() - 1)) for c in counts]
    return (sum(agree) / len(agree) - chance) / (1 - chance)


# The page

class Refusal(Exception):
    """A request that is not answered: HTTP status, and why."""


class Page:
    """Asks people about images of a run; served on this machine only, from the first question that is open.

    run: the folder with labels.jsonl and images/; annotators: answers that each question needs, from as many people;
    seed: of left and right; port: None for the first free one from 7860.
    """

    def __init__(self, run: Path, annotators: int, seed: int, port: int | None = None):
        self.run, self.annotators, self.seed, self.port = run, annotators, seed, port
        self.file, self.url, self.kappa = run / "labels.jsonl", None, math.nan
        self._app, self._said, self._ended, self._asked = None, "", False, {}  # _asked: by id, in order
        self._answers, self._change = {}, threading.Condition()  # guards these five

    def ask(self, questions: list[dict]) -> list[dict]:
        """Wait until each question has its answers; return the questions with the majority's. Sets self.kappa.

        Raises LabelError for a labels.jsonl with flaws, and where no page can be opened.
        """
        if not questions:
            return []
        epoch, ids, folder = questions[0]["epoch"], secrets.token_hex(8), (self.run / "images").resolve()
        for image in (image for question in questions for image in question["images"]):
            if folder not in (self.run / image).resolve().parents:
                raise ValueError(f"{image} is not in {folder}")
        answers = read_labels(self.file, questions)
        if any(len(given) < self.annotators for given in answers.values()):
            runs.save_lines(self.run / "questions.jsonl", questions)
            with self.file.open("ab") as file:
                file.truncate(len(_whole_lines(self.file)))  # or the next answer would join a line cut short
            left = torch.randint(2, (len(questions),), generator=runs.generator(self.seed, SIDES, epoch)).tolist()
            with self._change:
                self._asked = {f"{ids}-{n}": (question, left[n]) for n, question in enumerate(questions)}
                self._answers = answers
            self._open()
            tqdm.write(f"Epoch {epoch}: {len(questions)} questions for {self.annotators} to answer at {self.url}")
            with self._change:
                self._change.wait_for(lambda: all(len(given) >= self.annotators for given in answers.values()))
                self._asked, self._said = {}, f"Training, epoch {epoch}"
        votes = [[answer for answer in given.values() if answer is not None] for given in answers.values()]
        if _key(questions[0]) == "bad":
            votes = [list(image) for given in votes for image in zip(*given, strict=True)]
        self.kappa = kappa(votes)
        rows = zip(questions, answers.values(), strict=True)
        return [{**question, _key(question): majority(question, [*given.values()])} for question, given in rows]

    def status(self, text: str) -> None:
        """What the page says while it has no question."""
        with self._change:
            self._said = text

    def close(self) -> None:
        if self._app is not None:
            with self._change:
                self._said, self._ended = "The run has finished. You can close this page.", True
            time.sleep(1.5)  # open pages ask once a second, and learn it
            self._app.get_blocks().close(verbose=False)
            self._app = None

    def _open(self) -> None:
        if self._app is not None:
            return
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
        import gradio
        from starlette.requests import Request

        page = self

        class Server(gradio.Server):
            """gradio's server, which answers our four requests and none of gradio's own (uploads, files, ...)."""

            async def __call__(self, scope, receive, send):
                if scope["type"] == "websocket":
                    return await send({"type": "websocket.close"})
                # gradio calls its startup-events when it starts
                answer = await page._respond(Request(scope, receive)) if scope["type"] == "http" else None
                await (answer or super().__call__)(scope, receive, send)

        app = Server(openapi_url=None)
        try:
            app.launch(server_name="127.0.0.1", server_port=self.port, prevent_thread_lock=True, quiet=True,
                       share=False, inline=False, ssr_mode=False, mcp_server=False, num_workers=0)  # fmt: skip
        except OSError as error:
            raise LabelError(f"no page opens at port {self.port or '7860 or after'}: give another --port") from error
        self._app, self.url = app, app.get_blocks().local_url

    async def _respond(self, request):
        """The answer to a request; None for the one that gradio answers."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import FileResponse, HTMLResponse, JSONResponse

        try:
            method, path = self._check(request), request.scope["path"]
            if method == "GET" and path == "/gradio_api/startup-events":
                return None
            if method in ("GET", "HEAD") and path == "/":
                return HTMLResponse(HTML, headers=HEADERS)
            if method == "GET" and path == "/state":
                found = self._state(self._annotator(request.query_params.get("name") or None))
                return JSONResponse(found, headers=HEADERS | {"Cache-Control": "no-store"})
            if method == "GET" and (image := re.fullmatch(r"/images/([0-9a-f]+-\d+)/(\d{1,3})", path)):
                images = self._question(image[1])[0]["images"]
                if (k := int(image[2])) < len(images) and (file := self.run / images[k]).is_file():
                    return FileResponse(file, media_type="image/png", headers=HEADERS | {"Cache-Control": "private"})
            if method == "POST" and path == "/answer":
                self._keep(await request.body())
                return JSONResponse({"saved": True}, headers=HEADERS)
            raise Refusal(404, "there is no such page")
        except Refusal as refusal:
            status, why = refusal.args
        except ClientDisconnect:
            status, why = 400, "the request broke off"
        except OSError as error:
            status, why = 500, f"{self.file} cannot be written ({error.strerror})"
        return JSONResponse({"error": why}, status, HEADERS)

    def _check(self, request) -> str:
        """Refuse what a page of another site sends (CSRF), also under a name that leads here (DNS rebinding)."""
        headers = request.headers
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not re.fullmatch(r"(localhost|127\.0\.0\.1)(:\d{1,5})?", hosts[0]):
            raise Refusal(403, "this page is for http://127.0.0.1 or http://localhost only")
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            raise Refusal(403, "requests of other sites are refused")
        if request.method == "POST":
            if headers.get("content-type", "").split(";")[0].strip() != "application/json":
                raise Refusal(415, "send application/json")
            if not re.fullmatch(r"\d{1,9}", length := headers.get("content-length", "")) or int(length) > LONGEST:
                raise Refusal(413, f"send at most {LONGEST} bytes, and say how many")
        return request.method

    def _annotator(self, name) -> str | None:
        if name is not None and not (isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= 40):
            raise Refusal(400, "a name has 1 to 40 printable characters")
        if name is not None and self.annotators == 1:
            raise Refusal(400, "one person labels this run, without a name")
        return name and name.strip()

    def _question(self, number) -> tuple[dict, int]:
        with self._change:
            if not isinstance(number, str) or number not in self._asked:
                raise Refusal(409, "this question is not asked now")
            return self._asked[number]

    def _state(self, name: str | None) -> dict:
        """What is asked of a person, as the page's script wants it; no questions where none is open."""
        with self._change:
            shown, to_go, N = [], 0, self.annotators
            for number, (question, left) in self._asked.items():
                given = self._answers[tuple(question["images"])]
                to_go += max(N - len(given), 0)
                if name in given or len(given) < N:
                    urls = [f"/images/{number}/{k}" for k in range(len(question["images"]))]
                    shown.append({"id": number, "prompt": question["prompt"], "images": urls, "kind": _key(question),
                                  "left": left, "answered": name in given, "answer": given.get(name)})  # fmt: skip
            open_now = any(not one["answered"] for one in shown) and (N == 1 or name is not None)
            said = f"Thank you. Others have {to_go} answers to give." if self._asked else self._said
            return {"questions": shown if open_now else [], "status": said, "ended": self._ended, "named": N > 1}

    def _keep(self, body: bytes) -> None:
        """One answer: on disk when this returns."""
        try:
            sent = json.loads(body.decode())
        except (ValueError, RecursionError):
            raise Refusal(400, "this is not JSON") from None
        if not isinstance(sent, dict) or sent.keys() != {"id", "name", "answer"}:
            raise Refusal(400, "send an object of id, name and answer")
        with self._change:
            question, left = self._question(sent["id"])
            name, answer = self._annotator(sent["name"]), sent["answer"]
            if name is None and self.annotators > 1:
                raise Refusal(400, "say your name first")
            if wrong := _flaw(question, answer):
                raise Refusal(400, wrong)
            row = {**question, _key(question): answer}
            row |= {} if name is None else {"annotator": name}
            row |= {"left": left} if _key(question) == "h" else {}
            line = json.dumps(row).encode() + b"\n"
            with self.file.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(line) < len(line):
                        raise OSError(28, "the disk is full")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
            self._answers[tuple(question["images"])][name] = answer
            self._change.notify_all()


def blind_test(args, judge: Judge, after: Look, before: Look, epoch: int) -> dict:
    """People compare tuned and initial model without knowing which is which, on the same prompts and noises (Fig. 7).

    RUN/blind_eEPOCH keeps images and answers: a second start goes on where the first one stopped.
    """
    folder, questions = args.out / f"blind_e{epoch:03}", []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for n, prompt in enumerate(after.prompts):
        pair = [f"images/{name}_{n:03}.png" for name in ("tuned", "initial")]
        for look, file in zip((after, before), pair, strict=True):
            judge.keep(look.images[n], folder / file)
        questions.append({"epoch": epoch, "prompt": prompt, "images": pair, "scores": None, "h": None})
    page = Page(folder, args.annotators, args.seed, args.port)
    h = torch.tensor([row["h"] for row in page.ask(questions)])
    page.close()
    votes = [[v for v in given.values() if v is not None] for given in read_labels(page.file, questions).values()]
    most = [2 * sum(vote == 1 for vote in given) > len(given) for given in votes]
    told = {"annotators": args.annotators, "votes": sum(map(len, votes)), **win_rate(h)}
    return told | {"more_than_half_of_votes": sum(most) / len(most)}


HTML = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Labelling</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1d21; --soft: #585d66; --card: #eef0f3; --line: #8b919c;
  --strong: #1d4ed8; --bad: #b91c1c; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #f1f2f4; --soft: #b0b6c0; --card: #23272e;
  --line: #717885; --strong: #8ab4ff; --bad: #ff8f8f; --on: #10131a; } }
* { box-sizing: border-box; }
body { margin: 0; height: 100dvh; display: flex; flex-direction: column; gap: .6rem; padding: .7rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.35 system-ui, sans-serif; }
[hidden] { display: none !important; }
header, footer { text-align: center; }
#count { display: flex; justify-content: space-between; padding-bottom: .3rem; color: var(--soft); }
progress { appearance: none; display: block; width: 100%; height: .5rem; border: 0; border-radius: 1rem;
  overflow: hidden; background: var(--card); }
progress::-webkit-progress-bar { background: var(--card); }
progress::-webkit-progress-value { background: var(--strong); }
progress::-moz-progress-bar { background: var(--strong); }
h1 { margin: .3rem 0 0; font-size: 1.5rem; overflow-wrap: anywhere; max-height: 20dvh; overflow: auto; }
#hint { margin: 0; color: var(--soft); }
main { flex: 1; min-height: 0; display: flex; flex-wrap: wrap; gap: 8px; place-content: safe center; overflow: auto; }
button { font: inherit; color: inherit; background: var(--card); border: 2px solid transparent; border-radius: .6rem;
  cursor: pointer; touch-action: manipulation; }
button:hover { border-color: var(--line); }
button:disabled { opacity: .5; cursor: default; }
button:focus-visible { outline: 3px solid var(--strong); outline-offset: 2px; }
main button { position: relative; padding: 0; border: 4px solid var(--card); width: var(--side); height: var(--side); }
main img { display: block; width: 100%; height: 100%; object-fit: contain; border-radius: .25rem; }
.pixels { image-rendering: pixelated; }
main b { position: absolute; left: .5rem; top: .5rem; padding: 0 .5rem; border-radius: .4rem; font-size: 1.1rem;
  background: var(--paper); color: var(--ink); }
.chosen { border-color: var(--strong) !important; }
.bad { border-color: var(--bad) !important; }
.bad img { opacity: .45; }
.bad b { background: var(--bad); color: var(--on); }
.bad b::after { content: " bad"; }
footer { display: flex; flex-wrap: wrap; gap: .5rem; justify-content: center; }
footer button { min-height: 3.2rem; padding: 0 .8rem; flex: 1 1 0; max-width: 16rem; white-space: nowrap; }
footer .lead { background: var(--strong); color: var(--on); font-weight: 600; }
footer .lead.pale { background: var(--card); color: inherit; }
footer i { flex-basis: 100%; height: 0; }
@media (min-width: 700px) { footer i { display: none; } footer .undo { order: -1; } }
@media (max-width: 700px) { body { padding: .3rem; } }
kbd { font: inherit; opacity: .8; }
@media (hover: none) { kbd { display: none; } }
#say { flex: 1; display: flex; flex-direction: column; align-items: center; justify-content: center; gap: 1rem;
  text-align: center; font-size: 1.3rem; }
#turn { width: 2.6rem; height: 2.6rem; border: .35rem solid var(--card); border-top-color: var(--strong);
  border-radius: 50%; animation: turn 1.2s linear infinite; }
@keyframes turn { to { transform: rotate(1turn); } }
@media (prefers-reduced-motion: reduce) { #turn { animation-duration: 6s; } }
form { display: flex; flex-wrap: wrap; gap: .6rem; justify-content: center; }
input { font: inherit; padding: .6rem; border: 2px solid var(--line); border-radius: .6rem; background: var(--paper);
  color: inherit; max-width: 80vw; }
form button { padding: .6rem 1.2rem; }
#again { font-size: 1rem; padding: .3rem .8rem; }
</style>
<header id="head" hidden>
  <div id="count"><span id="done"></span><span id="left"></span></div>
  <progress id="bar"></progress>
  <h1 id="prompt" aria-live="polite"></h1>
  <p id="hint"></p>
</header>
<main id="tiles" hidden></main>
<footer id="keys" hidden></footer>
<div id="say" role="status">
  <div id="turn"></div>
  <span id="words">One moment</span>
  <form id="who" hidden>
    <input id="name" aria-label="Your name" placeholder="Your name" maxlength="40" required autocomplete="nickname">
    <button class="chosen">Begin</button>
  </form>
  <button id="again" hidden>Someone else labels here</button>
</div>
<script>
"use strict";
const $ = id => document.getElementById(id), AHEAD = 6, PAUSE = 60;
let state = {questions: []}, at = -1, shown = [], marks = [], busy = true;
let name = localStorage.getItem("name") || "", paces = [], since = 0, loaded = new Map(), looks = 0, timer;

async function call(path, body) {
  const sent = body && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)};
  const reply = await fetch(path, sent), found = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(found.error), {refused: true});
  return found;
}

// Without a question the page asks once a second whether there is one: it comes back by itself, also after a restart.
async function look() {
  const mine = ++looks;
  let found;
  clearTimeout(timer);
  try {
    found = await call("/state" + (name && state.named !== false ? "?name=" + encodeURIComponent(name) : ""));
  } catch (error) {
    if (mine !== looks) return;
    if (error.refused && name) name = "";
    else if (!state.ended) say("The program does not run. Your labels are saved: start it again with --resume.", true);
    return later();
  }
  if (mine !== looks) return;
  state = found;
  if (state.named && !name) return ask();
  at = state.questions.findIndex(q => !q.answered);
  if (at >= 0) return show();
  say(state.status, !state.ended);
  later();
}

function later() {
  clearTimeout(timer);
  timer = setTimeout(look, 1000);
}

function only(...ids) { for (const id of ["head", "tiles", "keys", "say"]) $(id).hidden = !ids.includes(id); }

function say(words, turning) {
  at = -1;
  only("say");
  $("words").textContent = document.title = words;
  $("turn").hidden = !turning;
  $("who").hidden = true;
  $("again").hidden = !(state.named && name);
}

function ask() {
  looks++;  // an answer that is under way is not for this person
  clearTimeout(timer);
  say("Who labels?", false);
  $("who").hidden = false;
  $("name").focus();
}
$("who").onsubmit = event => {
  event.preventDefault();
  localStorage.setItem("name", name = $("name").value.trim());
  say("One moment", true);
  look();
};
$("again").onclick = () => {
  name = "";
  ask();
};

function load(url) {
  if (!loaded.has(url)) {
    const image = new Image();
    image.src = url;
    loaded.set(url, image);
  }
  return loaded.get(url);
}

async function show() {
  const q = state.questions[at], pair = q.kind === "h", K = q.images.length;
  busy = true;
  shown = pair && q.left ? [1, 0] : [...Array(K).keys()];
  marks = q.answer && !pair ? [...q.answer] : Array(K).fill(false);
  const images = q.images.map(load);
  const near = state.questions.slice(Math.max(at - 1, 0), at + 1 + AHEAD).flatMap(q => q.images);
  near.forEach(load);
  for (const url of [...loaded.keys()]) if (!near.includes(url)) loaded.delete(url);
  await Promise.all(images.map(image => image.decode().catch(() => {})));
  $("tiles").replaceChildren(...shown.map((k, place) => {
    const tile = document.createElement("button"), label = document.createElement("b");
    const what = pair ? ["Left", "Right"][place] : `${place + 1}`;
    tile.append(images[k]);
    images[k].alt = `Image ${what}`;
    images[k].className = images[k].naturalWidth < 256 ? "pixels" : "";
    if (!pair) {
      label.textContent = what;
      tile.append(label);
    }
    tile.onclick = () => pair ? act(["left", "right"][place]) : mark(place);
    return tile;
  }));
  const done = state.questions.filter(q => q.answered).length, left = state.questions.length - done;
  $("done").textContent = `${done} done, ${left} left` + (name ? ` (${name})` : "");
  const pace = [...paces].sort((a, b) => a - b)[paces.length >> 1];
  $("left").textContent = paces.length < 3 ? "" : `about ${span(left * pace)} to go`;
  $("bar").max = done + left;
  $("bar").value = done;
  $("prompt").textContent = q.prompt;
  $("hint").textContent = pair ? "Which image is better?" : "Mark the bad images.";
  document.title = `${left} left`;
  const undo = ["undo", "Undo", "u", "undo"], skip = ["skip", "Skip", "s"], right = ["right", "Right", "→", "lead"];
  buttons(pair ? [["left", "Left", "←", "lead"], ["tie", "Tie", "space", "lead pale"], right, [], undo, skip]
    : [undo, skip, ["confirm", "Confirm", "Enter", "lead"]]);
  only("head", "tiles", "keys");
  paint();
  fit();
  busy = false;
  since = performance.now();
}

function buttons(rows) {
  $("keys").replaceChildren(...rows.map(([what, word, key, kind]) => {
    if (!what) return document.createElement("i");
    const button = document.createElement("button"), cap = document.createElement("kbd");
    cap.textContent = ` ${key}`;
    button.append(word, cap);
    button.className = kind || "";
    button.disabled = what === "undo" && at === 0;
    button.onclick = () => act(what);
    return button;
  }));
}

function span(seconds) { return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`; }

function paint() {
  const q = state.questions[at];
  [...$("tiles").children].forEach((tile, place) => {
    if (q.kind === "h") tile.classList.toggle("chosen", q.answered && q.answer === (shown[place] ? -1 : 1));
    else {
      tile.classList.toggle("bad", marks[place]);
      tile.setAttribute("aria-pressed", marks[place]);
    }
  });
}

// The largest squares that fit, for two side by side and for a grid
function fit() {
  const K = shown.length, room = $("tiles").getBoundingClientRect(), gap = 8;
  const columns = state.questions[at]?.kind === "h" ? [2] : [...Array(K).keys()].map(k => k + 1);
  const side = (length, n) => (length - gap * (n - 1)) / n;
  const sides = columns.map(c => Math.min(side(room.width, c), side(room.height, Math.ceil(K / c))));
  $("tiles").style.setProperty("--side", `${Math.max(60, Math.floor(Math.max(...sides)))}px`);
}
addEventListener("resize", fit);

function mark(place) {
  if (busy || at < 0 || place >= marks.length) return;
  marks[place] = !marks[place];
  paint();
}

async function act(what) {
  if (busy || at < 0) return;
  if (what === "undo") return at > 0 && (at--, show());
  const q = state.questions[at];
  const answer = q.kind === "bad" ? (what === "skip" ? null : marks)
    : {left: shown[0] ? -1 : 1, right: shown[0] ? 1 : -1, tie: 0, skip: null}[what];
  busy = true;
  try {
    await call("/answer", {id: q.id, name: name && state.named ? name : null, answer});
  } catch (error) {
    say(error.refused ? error.message : "The program does not answer.", true);
    return later();
  }
  const seconds = (performance.now() - since) / 1000;
  if (seconds < PAUSE) paces = [...paces, seconds].slice(-20);
  Object.assign(q, {answered: true, answer});
  at = state.questions.findIndex(q => !q.answered);
  if (at >= 0) return show();
  look();
}

const KEYS = {h: {ArrowLeft: "left", ArrowRight: "right", " ": "tie"}, bad: {Enter: "confirm"}};
addEventListener("keydown", event => {
  if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const kind = state.questions[at].kind, key = event.key.toLowerCase();
  const what = KEYS[kind][event.key] || {u: "undo", s: "skip"}[key];
  if (what || /^\d$/.test(event.key)) event.preventDefault();
  if (event.repeat) return;
  if (what) act(what);
  else if (kind === "bad" && /^\d$/.test(event.key)) mark((+event.key + 9) % 10);
});
// Firefox presses a focused button when the space bar comes up
addEventListener("keyup", event => {
  if (at >= 0 && state.questions[at].kind === "h" && event.key === " ") event.preventDefault();
});
look();
</script>
"""

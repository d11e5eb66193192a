"""Simulated people with written tastes: what their clicks buy, by recipe.

    python -m sd.bench_people                         # hours on two cores; resumes where it stopped
    python -m sd.bench_people --recipes "whole chain" --seeds 2

Each run is sd_demo.py on the emoji model, with a `SimulatedPerson` in the place of the
page. Afterwards the LoRA of some of its rounds is judged on images from noise that no training saw:
by the taste itself without its noise, by a network that knows the animals, and by the KL to the
initial model. Writes into sd/results: people.json, the table of people.md, and two figures.
"""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import sd_demo
from sd import bench, files
from sd.bench import CHAIN, RESULTS, Job
from sd.files import LORA_FILE
from sd.labels import Label
from sd.model import Batch
from sd.scorers import jpeg_kb
from toy.emoji_sd import classifier
from toy.emoji_sd.render import render

MARK = "<!-- python -m sd.bench_people writes what is between these two lines -->\n"
SEEDS = 5
NOISE_KB = 0.2  # Gumbel noise on what a person thinks of an image
BROKEN_KB = 3  # a broken animal is worse than any ground
FILE = "small files, from a file"  # without questions
RENDERINGS = "renderings"  # images of no model


def warmth(images: list, prompts: list[str]) -> Tensor:
    """Red minus blue, of 1."""
    pixels = torch.tensor(np.stack([np.asarray(image, float) for image in images])) / 255
    return (pixels[..., 0] - pixels[..., 2]).mean((1, 2))


def small(images: list, prompts: list[str]) -> Tensor:
    """Minus the size, kB."""
    return -torch.tensor([jpeg_kb(image) for image in images], dtype=torch.float64)


def right(images: list, prompts: list[str]) -> Tensor:
    return torch.tensor(classifier.recognised(images, prompts), dtype=torch.float64)


def plain(images: list, prompts: list[str]) -> Tensor:
    return small(images, prompts) - BROKEN_KB * (1 - right(images, prompts))


def round_of(questions: int, images: int, *, rounds: int) -> dict:
    """Settings of a run that asks people: how many questions a round has, about how many images."""
    return {
        "epochs": rounds,
        "prompts_per_epoch": questions,
        "images_per_prompt": images,
        "eval_images": 16,
        "eval_every": 1,
    }


class Taste(NamedTuple):
    """What a person likes, and how surely it is said."""

    score: Callable[[list, list[str]], Tensor]  # images, prompts -> (N,), higher is better
    noise: float = 0  # of the score: Gumbel's scale; answers are then drawn from Eq. 3
    random: float = 0  # share of answers that say nothing
    tags: bool = False  # marks the images of a group whose score is below 0.5
    settings: dict = round_of(8, 2, rounds=20)
    clicks: tuple[int, ...] = (16, 32, 48, 96, 160)  # after which the model is judged
    judged: int = 90  # images


TASTES = {
    "warm": Taste(warmth, random=0.1),
    "plain but intact": Taste(plain, noise=NOISE_KB),
    "small files": Taste(small, noise=NOISE_KB),
    "right animal": Taste(
        right,
        random=0.06,  # 3 % of the tags are wrong
        tags=True,
        settings=round_of(8, 7, rounds=10) | {"num_steps": 3},
        clicks=(24, 48, 80),
        judged=360,
    ),
    FILE: Taste(small, clicks=(448,), settings={"epochs": 4, "eval_images": 16, "eval_every": 1}),
}
LABELLED = {"prompts_per_epoch": 16, "images_per_prompt": 8}  # before any training
EQ14 = bench.EQ14 | {"beta": 0.06}
RECIPES = {
    CHAIN: bench.WHOLE_CHAIN,
    "Eq. 14": EQ14,
    "Eq. 14, moving reference": EQ14 | {"reference": "previous"},
    "SFT": bench.EQ14
    | {"loss": "sft", "beta": 0, "warm_up": 4, "replay": 2, "average_weights": True, "max_kl": 40},
}
LABEL_FILES = {  # what draws the images that are labelled first
    "the model's own images": {},
    "another model's images": {"init_lora": "sd/results/emoji_lora"},
    RENDERINGS: {},
}


class SimulatedPerson:
    """Answers in the place of the page. Before each round it keeps a copy of the LoRA.

    folder: of the job, where the run is in run/ and the copies are in loras/CLICKS.
    """

    def __init__(self, taste: Taste, *, seed: int, folder: Path):
        self.taste, self.seed, self.folder = taste, seed, folder

    def label(self, batches: list[Batch], epoch: int) -> list[list[Label]]:
        keep_lora(self.folder, epoch - 1, questions=sum(len(batch.groups) for batch in batches))
        random = np.random.default_rng([self.seed, epoch])
        return [[self.answer(batch, group, random) for group in batch.groups] for batch in batches]

    def answer(self, batch: Batch, group: range, random: np.random.Generator) -> Label:
        """About a group: its tags, or which of its two images is better."""
        images = [batch.images[k] for k in group]
        scores = self.taste.score(images, [batch.prompts[k] for k in group]).numpy()
        if self.taste.noise:
            scores = scores + random.gumbel(scale=self.taste.noise, size=len(scores))
        at_random = random.random(len(scores)) < self.taste.random
        any_answer = random.random(len(scores)) < 0.5
        if self.taste.tags:
            bad = np.where(at_random, any_answer, scores < 0.5)
            return Label(group, "bad", bad.tolist())
        h = 2 * any_answer[0] - 1 if at_random[0] else np.sign(scores[0] - scores[1])
        return Label(group, "h", int(h))


def keep_lora(folder: Path, rounds: int, *, questions: int) -> None:
    """Copy the LoRA of a run that did so many rounds to loras/CLICKS."""
    lora = folder / "run" / "lora" / LORA_FILE
    if rounds and lora.exists():
        copy = folder / "loras" / str(rounds * questions)
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copy(lora, copy)


def train_with(taste: Taste, job: Job, folder: Path) -> tuple[Path, dict[int, Path]]:
    """A run with a person. Returns its folder, and its LoRA after each of the taste's clicks."""
    person = SimulatedPerson(taste, seed=job.settings["seed"], folder=folder)
    run = bench.train(job, folder, labeller=person)
    rounds = len(files.read_lines(run / "metrics.jsonl"))
    keep_lora(folder, rounds, questions=job.settings["prompts_per_epoch"])
    kept = {int(copy.name): copy for copy in (folder / "loras").glob("*")}
    trained_on = {n: max((k for k in kept if k <= n), default=None) for n in taste.clicks}
    return run, {n: kept.get(trained_on[n]) for n in taste.clicks}


# Labels before any training


class Onlooker:
    """Takes the images of a run's first epoch, and ends it."""

    def label(self, batches: list[Batch], epoch: int) -> None:
        self.batches = batches


def label_first(job: Job, folder: Path) -> Path:
    """Images before any training, and all pairs of a group by the taste, as a label file."""
    onlooker, seed, recipe = Onlooker(), job.settings["seed"], job.key["recipe"]
    shutil.rmtree(folder, ignore_errors=True)  # a kill cut it short
    settings = {**LABELLED, **LABEL_FILES[recipe], "seed": seed, "epochs": 1, "eval_images": 1}
    sd_demo.run(labeller=onlooker, **settings, out=folder / "sampled", device="cpu")
    rows = []
    for batch in onlooker.batches:
        images = list(batch.images)
        if recipe == RENDERINGS:
            names = [prompt.split(maxsplit=1)[1] for prompt in batch.prompts]
            pictures = [render(name, [seed, len(rows), k]) for k, name in enumerate(names)]
            images = [Image.fromarray(picture) for picture in pictures]
        names = [f"{len(rows)}_{k}.png" for k in range(len(images))]
        for name, image in zip(names, images, strict=True):
            image.save(folder / name)
        scores = TASTES[job.key["taste"]].score(images, batch.prompts)
        for a, b in [pair for group in batch.groups for pair in combinations(group, 2)]:
            row = {"epoch": 1, "prompt": batch.prompts[a], "images": [names[a], names[b]]}
            rows.append({**row, "h": int(torch.sign(scores[a] - scores[b]))})
    files.save_lines(folder / "labels.jsonl", rows)
    return folder / "labels.jsonl"


# Jobs


def make_jobs(tastes: list[str], recipes: list[str], seeds: int) -> list[Job]:
    return [
        Job(
            {"taste": taste, "recipe": recipe, "seed": seed},
            {**TASTES[taste].settings, **RECIPES.get(recipe, bench.WHOLE_CHAIN), "seed": seed},
        )
        for taste, recipe, seed in product(tastes, recipes, range(seeds))
        if is_tried(taste, recipe)
    ]


def is_tried(taste: str, recipe: str) -> bool:
    """Whether a recipe is tried on a taste; what others do for tags is in paper.md."""
    if taste == FILE:
        return recipe in LABEL_FILES
    return recipe == CHAIN or (recipe in RECIPES and not TASTES[taste].tags)


def measure(job: Job, folder: Path) -> dict:
    """Train, and judge after some numbers of labels."""
    taste = TASTES[job.key["taste"]]
    if job.key["recipe"] in LABEL_FILES:
        file = label_first(job, folder / "labelled")
        run = bench.train(job, folder, labels=str(file), prompts="animals")
        loras = {taste.clicks[-1]: run / "lora"}
    else:
        run, loras = train_with(taste, job, folder)
    if (figure := run / "progress.png").exists():
        shutil.copy(figure, folder)
    rounds = len(files.read_lines(run / "metrics.jsonl"))
    stopped = files.read_json(run / "config.json")["stopped"]
    return {
        "seconds": bench.training_seconds(run),
        "stopped_after": rounds * job.settings.get("prompts_per_epoch", 0) if stopped else None,
        "judged": bench.judge(run, loras, taste.score, images=taste.judged),
    }


# The table


def group(store: Path) -> dict[tuple[str, str], list[dict]]:
    """The runs with the settings of today, by taste and recipe."""
    groups = {}
    for run in bench.finished(store, make_jobs([*TASTES], [*RECIPES, *LABEL_FILES], SEEDS)):
        groups.setdefault((run["taste"], run["recipe"]), []).append(run)
    return groups


def rows_of(taste: str, recipe: str, runs: list[dict]) -> list[dict]:
    """Means over the seeds, for each number of labels."""
    rows, before = [], [run["judged"][0] for run in runs]
    for judged in zip(*(run["judged"] for run in runs), strict=True):
        labels, pairs = judged[0]["after"], zip(judged, before, strict=True)
        sizes = [bench.size_change(row["kb"], initial["kb"]) for row, initial in pairs]
        stops = [run["stopped_after"] for run in runs if run["stopped_after"] is not None]
        row = {
            "taste": taste,
            "recipe": recipe,
            "labels": labels,
            "seeds": len(runs),
            "win rate": f"{bench.mean(judged, 'win_rate'):.2f}",
            "animals recognised": f"{bench.mean(judged, 'animals'):.1%}",
            "worst seed": f"{min(row['animals'] for row in judged):.1%}",
            "size": f"{np.mean(sizes):+.0%}",
            "KL": f"{bench.mean(judged, 'kl'):.1f}",
            "stopped": sum(stop < labels for stop in stops),
        }
        if TASTES[taste].tags:
            row |= {"win rate": "", "broken images": f"{1 - bench.mean(judged, 'score'):.1%}"}
        rows.append(row)
    return rows


def table(groups: dict[tuple[str, str], list[dict]]) -> str:
    rows = [row for key, runs in groups.items() for row in rows_of(*key, runs)]
    return f"\n{bench.table(rows) if rows else 'Not measured yet.'}\n"


def draw(groups: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """Win rate against labels, and below it the animals recognised, for each taste."""
    tastes = list(dict.fromkeys(taste for taste, _ in groups))
    figure = Figure(figsize=(4 * len(tastes), 6.4), layout="constrained")
    axes = figure.subplots(2, len(tastes), squeeze=False)
    for (taste, recipe), runs in groups.items():
        column, number = axes[:, tastes.index(taste)], [*RECIPES].index(recipe)
        style = {"linewidth": 2.5 if recipe == CHAIN else 1.2, "marker": "o^sD"[number]}
        style |= {"color": f"C{number}", "markersize": 4, "label": recipe}
        labels = [row["after"] for row in runs[0]["judged"]]
        quality = "score" if TASTES[taste].tags else "win_rate"
        for axis, key in zip(column, (quality, "animals"), strict=True):
            seeds = [[row[key] for row in run["judged"]] for run in runs]
            axis.plot(labels, np.mean(seeds, 0), **style)
        column[0].set(title=taste, ylabel="images not broken" if quality == "score" else "win rate")
        column[1].set(xlabel="clicks", ylabel="animals recognised", ylim=(0, 1.02))
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(handles=lines.values(), loc="outside lower center", ncols=len(RECIPES))
    figure.savefig(path, dpi=110)


def write(folder: Path, work: Path) -> None:
    """The table of the page, and the figures."""
    groups = group(folder / "people.json")
    bench.replace_section(folder / "people.md", MARK, table(groups))
    if asked := {key: groups[key] for key in groups if key[0] != FILE}:
        draw(asked, folder / "people.png")
    (shown,) = make_jobs(["warm"], [CHAIN], 1)
    if (figure := work / shown.name / "progress.png").exists():
        shutil.copy(figure, folder / "people_warm.png")


def main(argv: list[str] | None = None) -> None:
    parser = bench.make_parser("sd.bench_people", __doc__.splitlines()[0])
    recipes = [*RECIPES, *LABEL_FILES]
    parser.add_argument(
        "--tastes", nargs="+", choices=TASTES, default=[*TASTES], help="these alone"
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=recipes, default=recipes, help="these alone"
    )
    seeds = "0, 1, ... of each"
    parser.add_argument("--seeds", type=int, default=SEEDS, help=seeds)
    bench.add_runner_flags(parser, "bench_people")
    args = parser.parse_args(argv)
    jobs = make_jobs(args.tastes, args.recipes, args.seeds)
    redraw = partial(write, RESULTS, args.work)
    bench.run_jobs(jobs, measure, args, store=RESULTS / "people.json", write=redraw)


if __name__ == "__main__":
    main()

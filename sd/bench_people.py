"""Simulated people with written tastes: what their clicks buy, by recipe.

    python -m sd.bench_people                         # hours on two cores; resumes where it stopped
    python -m sd.bench_people --recipes default --seeds 2

Each run is sd_demo.py as it is, on the emoji model, with a `SimulatedPerson` in the place of the
page. Afterwards the LoRA of some of its epochs is judged on noises that no training saw: by the
taste itself without its noise, by a network that knows the animals, and by the KL to the initial
model. Writes into sd/results: people.json, the tables of people.md, and two figures. What stands
there of other tastes and recipes stays.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import sd_demo
from sd import files, options, run_folder
from sd.bench import make_parser, markdown_table, replace_section, size_change
from sd.feedback import HumanFeedback
from sd.files import LORA_FILE
from sd.labels import pareto_preference
from sd.metrics import win_rate
from sd.model import PipelinePolicy, load_model, make_accelerator, sample, sample_held_out
from sd.prompts import load_prompts
from sd.scorers import jpeg_kb
from sd.seeds import RandomPurpose, seeded_generator
from toy.emoji_sd import classifier
from toy.emoji_sd.render import NAMES, render

RESULTS = files.ROOT / "sd" / "results"
MARK = "<!-- python -m sd.bench_people writes what is between these two lines -->\n"
RENDERINGS = "renderings"  # images of no model
NOISE_KB = 0.2  # Gumbel noise on what a person thinks of an image
BROKEN_KB = 3  # a broken animal is worse than any ground


def warmth(images: list, prompts: list[str]) -> Tensor:
    """Red minus blue, of 1."""
    pixels = torch.tensor(np.stack([np.asarray(image, float) for image in images])) / 255
    return (pixels[..., 0] - pixels[..., 2]).mean((1, 2))


def size(images: list, prompts: list[str]) -> Tensor:
    return torch.tensor([jpeg_kb(image) for image in images], dtype=torch.float64)


def right(images: list, prompts: list[str]) -> Tensor:
    return torch.tensor(classifier.recognised(images, prompts), dtype=torch.float64)


FILE = "small files, from a file"  # without questions


class Taste(NamedTuple):
    """What a person likes, and how surely it is said."""

    score: Callable[[list, list[str]], Tensor]  # images, prompts -> (N,), higher is better
    noise: float = 0  # of the score: Gumbel's scale; answers are then drawn from Eq. 3
    random: float = 0  # share of answers that say nothing
    flags: str = "--objective human"
    labels: tuple[int, ...] = (16, 48, 96, 160)  # after which the model is judged
    noises: int = 90  # it is judged on
    groups: tuple[int, int] = (160, 2)  # images labelled before any training: groups, K


TASTES = {
    "warm": Taste(warmth, random=0.1),
    "plain but intact": Taste(
        lambda images, prompts: -size(images, prompts) - BROKEN_KB * (1 - right(images, prompts)),
        noise=NOISE_KB,
    ),
    "small files": Taste(lambda images, prompts: -size(images, prompts), noise=NOISE_KB),
    "right animal": Taste(
        right,
        random=0.06,  # 3 % of the tags are wrong
        flags="--objective tags --num-steps 3",
        labels=(24, 48, 80),
        noises=360,
    ),
    FILE: Taste(lambda images, prompts: -size(images, prompts), labels=(448,), groups=(16, 8)),
}
EQ14 = "--loss eq14 --update-every timestep --batch-size 4"
BARE = f"{EQ14} --beta 0.06 --warm-up 1 --replay 0 --no-average-weights --max-kl 1e9"
SLOW = f"{EQ14} --beta 0.03 --warm-up 4 --max-kl 40"
RECIPES = {  # flags after those of the taste
    "default": "",
    "previous": f"{BARE} --reference previous",
    "Eq. 14": BARE,
    "Eq. 14, slow start": f"{SLOW} --replay 0",
    "Eq. 14 + memory": f"{SLOW} --replay 2",
    "SFT + memory": f"{SLOW} --replay 2 --loss sft --beta 0",
    "best of four": (
        "--objective tags --images-per-prompt 4 --epochs 20 --loss chain --update-every trajectory "
        "--batch-size 1 --replay 4 --beta 0.1 --warm-up 8"
    ),
}
LABELS_FIRST = {  # by --labels: flags of the model that draws the images
    "labels first": "",
    "another model's images": f"--init-lora {RESULTS / 'emoji_lora'}",
    RENDERINGS: "",
}
HEADS = ("taste", "recipe", "labels", "seeds", "win rate", "animals right", "size", "KL", "stopped")


class SimulatedPerson(HumanFeedback):
    """Answers in the place of the page. After each epoch a copy of lora/ is kept in loras/."""

    def __init__(self, args, prompts, accelerator, *, taste: Taste):
        super().__init__(args, prompts, accelerator)
        self.taste, self.clicks = taste, 0

    def collect_labels(self, rows: list[dict]) -> list[dict]:
        random = np.random.default_rng([self.args.seed, rows[0]["epoch"]])
        rows = [self.answer(row, random) for row in rows]
        files.append(self.args.out / "labels.jsonl", rows)
        self.clicks += len(rows)
        return rows

    def answer(self, row: dict, random: np.random.Generator) -> dict:
        images = [Image.open(self.args.out / file) for file in row["images"]]
        scores = self.taste.score(images, [row["prompt"]] * len(images)).numpy()
        if self.taste.noise:
            scores = scores + random.gumbel(scale=self.taste.noise, size=len(scores))
        at_random = random.random(len(scores)) < self.taste.random
        any_answer = random.random(len(scores)) < 0.5
        if "h" in row:
            h = np.sign(scores[0] - scores[1])
            return {**row, "h": int(2 * any_answer[0] - 1 if at_random[0] else h)}
        if self.taste.score is right:
            bad = np.where(at_random, any_answer, scores < 0.5)
        else:  # one click: the best of the group
            best = random.integers(len(scores)) if at_random[0] else scores.argmax()
            bad = np.arange(len(scores)) != best
        return {**row, "bad": bad.tolist()}

    def pairs_of_group(self, group: range) -> list[tuple[int, int]]:
        return list(combinations(group, 2))  # who labels files has time

    def status(self, text: str) -> None:
        folder = self.args.out / "loras" / str(self.clicks)
        folder.mkdir(parents=True)
        shutil.copy(self.args.out / "lora" / LORA_FILE, folder)


def fits(taste: str, recipe: str, _) -> bool:
    """Whether a recipe can be tried on a taste."""
    if taste == FILE:
        return recipe in LABELS_FIRST
    if taste == "right animal":  # few images of K = 7 are no pairs
        return recipe not in (*LABELS_FIRST, "best of four")
    return recipe in RECIPES or recipe == "labels first"


class Job(NamedTuple):
    """One run."""

    taste: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        words = "-".join([self.taste, self.recipe, str(self.seed)])
        return "".join(c if c.isalnum() or c == "-" else "_" for c in words)


def label_first(job: Job, folder: Path) -> Path:
    """Images before any training, and what the person says of them, as a label file."""
    taste = TASTES[job.taste]
    groups, K = taste.groups
    flags = f"--objective human --images-per-prompt {K} --seed {job.seed}"
    _, args = options.parse(f"{flags} {LABELS_FIRST[job.recipe]}".split())
    args.out = folder
    (folder / "images").mkdir(parents=True)
    accelerator, prompts = make_accelerator("fp32"), load_prompts("animals")
    model = load_model(args, prompts, accelerator)
    person = SimulatedPerson(args, prompts, accelerator, taste=taste)
    random = seeded_generator(job.seed, RandomPurpose.PROMPTS, 1)
    numbers = torch.randint(len(prompts), (groups,), generator=random)
    batches = []
    for first in range(0, groups, args.batch_size):
        noise = seeded_generator(job.seed, RandomPurpose.TRAINING, 1, first)
        part = numbers[first : first + args.batch_size]
        batch = sample(model, model.reference, part, images_per_prompt=K, generator=noise)
        if job.recipe == RENDERINGS:
            animals = [NAMES[number] for number in batch.cond.tolist()]
            pictures = [render(name, [job.seed, first, k]) for k, name in enumerate(animals)]
            batch = batch._replace(images=[Image.fromarray(picture) for picture in pictures])
        files = run_folder.image_files(1, range(first, first + args.batch_size), K)
        batches.append(batch._replace(files=files))
    person.label(batches, 1)
    return folder / "labels.jsonl"


def run(job: Job, work: Path) -> None:
    """Run sd_demo.py and judge what it made; a run that is done stays."""
    out, given = work / job.name, work / f"{job.name}-labels"
    if (out / "quality.json").exists():
        return
    for folder in (out, given):
        shutil.rmtree(folder, ignore_errors=True)  # killed on its way
    torch.set_num_threads(1)
    flags = f"{TASTES[job.taste].flags} {RECIPES.get(job.recipe)}"
    if job.recipe in LABELS_FIRST:
        flags = f"--labels {label_first(job, given)} --prompts animals"
    argv = [*flags.split(), "--seed", str(job.seed), "--out", str(out)]
    person = partial(SimulatedPerson, taste=TASTES[job.taste])
    with mock.patch.object(sd_demo, "HumanFeedback", person):
        sd_demo.main(argv)
    seconds = sum(
        row["seconds_sample"] + row["seconds_train"]
        for row in files.read_lines(out / "metrics.jsonl")
    )
    if job.recipe in LABELS_FIRST:
        flags = "--labels FILE --prompts animals"
    result = {"flags": flags, "seconds": seconds, "quality": judge(job, out)}
    files.save_json(out / "quality.json", result)
    print(f"{job.name}: done", flush=True)


def judge(job: Job, out: Path) -> list[dict]:
    """The model before training and after some numbers of labels, on noises that it never saw."""
    taste = TASTES[job.taste]
    flags = ["--evaluate", str(out), "--objective", "human", "--max-kl", "1"]  # for its KL
    _, args = options.parse([*flags, "--eval-images", str(taste.noises)])
    model = load_model(args, load_prompts("animals"), make_accelerator("fp32"))

    def look(denoiser: PipelinePolicy) -> dict:
        evaluation = RandomPurpose.EVALUATION
        images, prompts, kl = sample_held_out(model, denoiser, args, purpose=evaluation)
        return {
            "scores": taste.score(images, prompts).tolist(),
            "animals": float(np.mean(classifier.recognised_by_judge(images, prompts))),
            "kb": size(images, prompts).mean().item(),
            "kl": kl or 0.0,
        }

    rows = [{"labels": 0, "trained_on": 0, **look(model.reference)}]
    if job.recipe in LABELS_FIRST:
        kept = {taste.labels[-1]: out / "lora"}
    else:
        kept = {int(folder.name): folder for folder in (out / "loras").glob("*")}
    for labels in taste.labels[-1:] if job.recipe in LABELS_FIRST else taste.labels:
        trained_on = max((count for count in kept if count <= labels), default=0)
        if not trained_on or not (kept[trained_on] / LORA_FILE).exists():  # it stopped at once
            rows.append({**rows[0], "labels": labels})
            continue
        model.read_lora(kept[trained_on] / LORA_FILE)
        rows.append({"labels": labels, "trained_on": trained_on, **look(model.sampler)})
    return rows


# The tables


def summary(results: list[dict]) -> list[dict]:
    """The means over the seeds of a taste and recipe, for each number of labels."""
    found = []
    for rows in zip(*(result["quality"] for result in results), strict=True):
        initial = [result["quality"][0] for result in results]
        wins, sizes = [], []
        for row, before in zip(rows, initial, strict=True):
            h = pareto_preference(torch.tensor([row["scores"]]), torch.tensor([before["scores"]]))
            wins.append(win_rate(h)["win_rate"])
            sizes.append(size_change(row["kb"], before["kb"]))
        animals = [row["animals"] for row in rows]
        failures = [1 - np.mean(row["scores"]) for row in rows]
        found.append(
            {
                "labels": rows[0]["labels"],
                "seeds": len(rows),
                "win_rate": float(np.mean(wins)),
                "animals": float(np.mean(animals)),
                "animals_worst": min(animals),
                "size": float(np.mean(sizes)),
                "failures": float(np.mean(failures)),
                "kl": float(np.mean([row["kl"] for row in rows])),
                "stopped": sum(row["trained_on"] < row["labels"] for row in rows),
                "seconds": float(np.mean([result["seconds"] for result in results])),
            }
        )
    return found


def cells(taste: str, recipe: str, row: dict) -> list[str]:
    return [
        taste,
        recipe,
        str(row["labels"]),
        str(row["seeds"]),
        f"{row['failures']:.1%} fail" if taste == "right animal" else f"{row['win_rate']:.2f}",
        f"{row['animals']:.1%} ({row['animals_worst']:.1%})",
        f"{row['size']:+.0%}",
        f"{row['kl']:.1f}",
        str(row["stopped"]),
    ]


def table(found: dict[tuple[str, str], list[dict]]) -> str:
    rows = [cells(*key, row) for key, of_one in found.items() for row in of_one]
    return f"\n{markdown_table(HEADS, rows)}\n"


def draw(found: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """Win rate against labels, and below it the animals recognised, for each taste."""
    tastes = list(dict.fromkeys(taste for taste, _ in found if taste != FILE))
    figure = Figure(figsize=(4 * len(tastes), 6.4), layout="constrained")
    axes = figure.subplots(2, len(tastes), squeeze=False)
    names = list(dict.fromkeys(recipe for taste, recipe in found if taste in tastes))
    for (taste, recipe), rows in found.items():
        if taste not in tastes:
            continue
        column, labels = axes[:, tastes.index(taste)], [row["labels"] for row in rows]
        is_right = taste == "right animal"
        quality = [1 - row["failures"] if is_right else row["win_rate"] for row in rows]
        style = {"linewidth": 2.5 if recipe == "default" else 1.2, "marker": "o", "markersize": 4}
        style |= {"color": f"C{names.index(recipe)}"}
        column[0].plot(labels, quality, label=recipe, **style)
        column[1].plot(labels, [row["animals"] for row in rows], **style)
        column[0].set(title=taste, ylabel="right (the taste)" if is_right else "win rate")
        column[1].set(xlabel="clicks", ylabel="animals recognised (judge)", ylim=(0, 1.02))
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(handles=lines.values(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=110)


def write(jobs: list[Job], work: Path, folder: Path) -> None:
    """The numbers, the tables of the page, and the figure; what ran elsewhere stays."""
    results: dict[tuple[str, str], list[dict]] = {}
    for job in jobs:
        file = work / job.name / "quality.json"
        if file.exists():
            results.setdefault((job.taste, job.recipe), []).append(files.read_json(file))
    file = folder / "people.json"
    shipped = files.read_json(file)["runs"] if file.exists() else []
    content = {(of_one["taste"], of_one["recipe"]): of_one for of_one in shipped}
    for (taste, recipe), of_one in results.items():
        head = {"taste": taste, "recipe": recipe, "flags": of_one[0]["flags"]}
        content[taste, recipe] = {**head, "rows": summary(of_one)}
    keys = [key for key in product(TASTES, [*RECIPES, *LABELS_FIRST]) if key in content]
    found = {key: content[key]["rows"] for key in keys}
    files.save_json(file, {"runs": [content[key] for key in keys]})
    replace_section(folder / "people.md", MARK, table(found))
    draw(found, folder / "people.png")
    shown = work / Job("warm", "default", 0).name / "progress.png"
    if shown.exists():
        shutil.copy(shown, folder / "people_warm.png")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("sd.bench_people", __doc__.splitlines()[0])
    work, recipes = files.ROOT / "runs" / "bench_people", [*RECIPES, *LABELS_FIRST]
    count = options.positive(int)
    parser.add_argument("--tastes", nargs="+", choices=TASTES, default=[*TASTES], help="who")
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes, help="how")
    parser.add_argument("--seeds", type=count, default=5, help="0, 1, ... of each")
    parser.add_argument("--work", type=Path, default=work, help="folder of the runs")
    parser.add_argument("--processes", type=count, default=2, help="runs at a time, one core each")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    every = [Job(*parts) for parts in product(TASTES, recipes, range(args.seeds)) if fits(*parts)]
    asked = [job for job in every if job.taste in args.tastes and job.recipe in args.recipes]
    with ProcessPoolExecutor(args.processes, max_tasks_per_child=1) as pool:
        list(pool.map(run, asked, [work] * len(asked)))
    write(every, work, RESULTS)


if __name__ == "__main__":
    main()

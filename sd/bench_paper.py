"""The paper's figures and tables, repeated on the emoji model with simulated people.

    python -m sd.bench_paper                           # hours on two cores; resumes
    python -m sd.bench_paper --panels alignment        # a part of it
    python -m sd.bench_paper --quick                   # a look: minutes, other numbers

Each run is sd_demo.py as it is. On its way it is measured by its own held-out images; at its end it
is judged on images from noise that no training saw, and a network that takes no part in any
training names the animals. Methods are compared at equally many images, and at equally many passes
of the network. Writes into sd/results: paper.json, the tables of paper.md, and the figures.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from sd import bench, options
from sd.bench import CHAIN, KEPT, RESULTS, Job, spread
from sd.bench_people import TASTES, train_with
from sd.metrics import win_rate
from sd.scorers import compressibility, incompressibility
from toy.emoji_sd import classifier

MARK = "<!-- python -m sd.bench_paper writes what is between these two lines -->\n"
CLASSIFIER = "toy/emoji_sd/classifier.py"
SEEN, UNSEEN = (f"sd/results/prompts/{name}.txt" for name in ("seen_36", "unseen_9"))
SEEDS = 5
GRADIENT = 3  # passes of a row without gradient that a row forward and backward is counted as
TAGGED = 7  # images of a click
QUICK = {"epochs": 1, "prompts_per_epoch": 4, "num_steps": 3, "eval_images": 8}

GROUPS = {"prompts_per_epoch": 4, "images_per_prompt": 8}
PAIRS = {"prompts_per_epoch": 16, "images_per_prompt": 2, "guidance_scale": 1}  # as many images
RELEASED, TUNED = "Eq. 14, as released", "Eq. 14, tuned"
MOVING = "Eq. 14, moving reference"
OTHERS = GROUPS | bench.EQ14  # with another loss
# Of the whole chain: sd/bench_sweep.py; of the others: a sweep of before, 768 images, seed 5
METHODS = {
    CHAIN: GROUPS | bench.WHOLE_CHAIN,
    TUNED: OTHERS | {"beta": 0.2},
    RELEASED: PAIRS | {"recipe": "paper", "lr": 3e-4, **bench.NO_LIMIT},
    "Alg. 1 as printed": PAIRS | {"recipe": "alg1", **bench.NO_LIMIT},
    "DDPO": OTHERS | {"loss": "ddpo", "lr": 5e-4, "clip": 0.1},
    "DPOK": OTHERS | {"loss": "dpok", "beta": 0.02},
    "Reward Weighted": OTHERS | {"loss": "reward-weighted", "lr": 1e-4, "beta": 0.3},
    "preferred images": OTHERS | {"loss": "sft", "lr": 1e-4, "beta": 0},
}
SEE_SCORES = ("DDPO", "DPOK", "Reward Weighted")
LONG = {"epochs": 40}  # of Table 1; the whole chain takes a quarter of the images
ALIGNED = {
    CHAIN: METHODS[CHAIN] | {"epochs": 10},
    TUNED: OTHERS | {"beta": 0.06, **LONG},
    RELEASED: METHODS[RELEASED] | LONG,
    "Alg. 1 as printed": METHODS["Alg. 1 as printed"] | LONG,
    "Reward Weighted": METHODS["Reward Weighted"] | LONG,
    "preferred images": METHODS["preferred images"] | {"beta": 0.3, **LONG},
}
PEOPLE = {  # 560 images, in rounds of 8 or 16 questions
    CHAIN: TASTES["right animal"].settings | bench.WHOLE_CHAIN,
    "Eq. 14": TASTES["right animal"].settings
    | bench.EQ14
    | {"beta": 0.06, "epochs": 5, "prompts_per_epoch": 16},
}
PEOPLE[MOVING] = PEOPLE["Eq. 14"] | {"reference": "previous"}


def bad(images: list, prompts: list[str]) -> list[float]:
    return [1 - right for right in classifier.recognised(images, prompts)]


class Panel(NamedTuple):
    """A figure or table of the paper."""

    source: str
    settings: dict  # before those of the method
    score: Callable  # images, prompts -> (N,)
    methods: dict[str, dict]
    counts: tuple[int, ...]  # of images, after which the methods are compared
    judged: int  # images
    prompts: tuple[str, ...] = ("animals",)  # the lists that it is judged on
    compared: bool = False  # the methods with each other, image by image


EVALUATION = {"eval_images": 90, "eval_every": 2, "watch": f"{CLASSIFIER}:recognised_by_judge"}
FIG3 = {"num_steps": 10, "epochs": 12, **EVALUATION}
TABLE1 = {"objective": f"{CLASSIFIER}:log_probability", "num_steps": 3, **EVALUATION}
COUNTS = 128, 256, 384
PANELS = {
    "compressibility": Panel(
        "Fig. 3",
        {"objective": "compressibility", **FIG3},
        compressibility,
        METHODS,
        counts=COUNTS,
        judged=180,
    ),
    "incompressibility": Panel(
        "Fig. 3",
        {"objective": "incompressibility", **FIG3},
        incompressibility,
        METHODS,
        counts=COUNTS,
        judged=180,
    ),
    "tags": Panel("Figs. 4 and 5", {}, bad, PEOPLE, counts=(), judged=360),
    "alignment": Panel(
        "Table 1",
        TABLE1,
        classifier.log_probability,
        ALIGNED,
        counts=(128, 256, 320, 1280),
        judged=360,
        compared=True,
    ),
    "unseen animals": Panel(
        "no figure",
        TABLE1 | {"prompts": SEEN, "eval_prompts": UNSEEN},
        classifier.log_probability,
        {name: ALIGNED[name] for name in (CHAIN, TUNED)},
        counts=(128, 256, 320, 1280),
        judged=360,
        prompts=(SEEN, UNSEEN),
    ),
}
FIGURES = {  # file: panels
    "paper_fig3.png": ("compressibility", "incompressibility"),
    "paper_fig4.png": ("tags",),
    "paper_table1.png": ("alignment",),
}


# Runs


def make_jobs(panels: list[str], seeds: int, *, quick: bool = False) -> list[Job]:
    """Each method of each panel on seeds 0, 1, ..."""
    return [
        Job(
            {"panel": panel, "method": method, "seed": seed},
            PANELS[panel].settings | settings | {"seed": seed} | (QUICK if quick else {}),
        )
        for panel in panels
        for method, settings in PANELS[panel].methods.items()
        for seed in range(seeds)
    ]


def measure(job: Job, folder: Path, *, quick: bool = False) -> dict:
    """Train, and judge the end; of the run with a person each 16 clicks."""
    panel = PANELS[job.key["panel"]]
    if panel.methods is PEOPLE:
        taste = TASTES["right animal"]._replace(clicks=(16, 32, 48, 64, 80))
        run, loras = train_with(taste, job, folder)
    else:
        run = bench.train(job, folder)
        loras = {job.settings["epochs"]: run / "lora"}
    judged = [
        {"prompts": Path(name).stem, **row}
        for name in panel.prompts
        for row in bench.judge(
            run,
            loras,
            panel.score,
            images=16 if quick else panel.judged,
            prompts=name,
            each=panel.compared,
        )
    ]
    seconds = bench.training_seconds(run)
    return {"curve": bench.curve(run), "seconds": seconds, "judged": judged}


def rows_per_image(settings: dict) -> float:
    """Rows through the network for each image sampled, from the settings of a run.

    A row is one image in one pass; with gradient, forward and backward, it counts GRADIENT. An
    image is sampled in T steps. It is trained on, and so are those of replay: T steps of the
    reference, or a step's own pass of it for the KL of DPOK and SFT; the whole chain's pass
    without gradient; and the pass with gradient, which for SFT is of the winners alone. The passes
    of the evaluation, and those that are for the log alone, are not counted.
    """
    args = options.make_settings(**{"objective": "compressibility", "device": "cpu", **settings})
    T, K, steps = args.num_steps, args.images_per_prompt, args.num_steps - args.skip_last
    own_pass = steps if args.beta else 0
    reference = {"eq14": T, "chain": T, "dpok": own_pass, "sft": own_pass}.get(args.loss, 0)
    if args.reference == "previous":
        reference = 0
    free = steps if args.loss == "chain" else 0
    trained = steps * (K - 1) / K if args.loss == "sft" else steps
    times = 1 + args.replay * args.batch_size / args.prompts_per_epoch
    return T + times * (reference + free + GRADIENT * trained)


# The page


def by_method(runs: list[dict], panel: str) -> dict[str, list[dict]]:
    of_panel = [run for run in runs if run["panel"] == panel]
    return {
        method: [run for run in of_panel if run["method"] == method]
        for method in PANELS[panel].methods
    }


def ends(runs: list[dict], prompts: str = "animals") -> list[tuple[dict, dict]]:
    """Before and after each run."""
    rows = [[row for row in run["judged"] if row["prompts"] == prompts] for run in runs]
    return [(of_one[0], of_one[-1]) for of_one in rows]


def quality(results: list[dict], prompts: str) -> dict:
    """What a method is at the end of its runs."""
    pairs = ends(results, prompts)
    if not pairs:
        return {"seeds": 0}
    before, after = zip(*pairs, strict=True)
    return {
        "seeds": len(pairs),
        "images": max(run["curve"][-1]["images"] for run in results),
        "score before": f"{bench.mean(before, 'score'):.3f}",
        "score": spread([row["score"] for row in after]),
        "second network's": spread([row["log_prob"] for row in after]),
        "animals recognised before": f"{bench.mean(before, 'animals'):.1%}",
        "animals recognised": f"{bench.mean(after, 'animals'):.1%}",
        "worst seed": f"{min(row['animals'] for row in after):.1%}",
        "KL": spread([row["kl"] for row in after], 1),
    }


def quality_table(name: str, runs: dict[str, list[dict]]) -> str:
    panel, rows = PANELS[name], []
    choices = preferred(runs) if panel.compared else {}
    for prompts, method in product([Path(name).stem for name in panel.prompts], panel.methods):
        row = {"method": method} | ({"animals": prompts} if len(panel.prompts) > 1 else {})
        row |= quality(runs[method], prompts)
        rows.append(row | ({"preferred": choices[method]} if method in choices else {}))
    none = f"No fine-tuning is preferred in {choices['none']}.\n" if choices else ""
    return f"\n{bench.table(rows)}\n{best(runs) if len(panel.methods) > 2 else ''}{none}"


def best(runs: dict[str, list[dict]]) -> str:
    """A sentence about the methods that keep the animals."""
    scores = {}
    for method, results in runs.items():
        before, after = zip(*ends(results), strict=True) if ends(results) else ([], [])
        if after and bench.mean(after, "animals") >= KEPT * bench.mean(before, "animals"):
            scores[method] = bench.mean(after, "score")
    of_pairs = {method: scores[method] for method in scores if method not in SEE_SCORES}
    if not of_pairs:
        return ""
    return (
        f"Best score with {KEPT:.0%} of the animals: {max(scores, key=scores.get)}; of the methods "
        f"that see pairs alone: {max(of_pairs, key=of_pairs.get)}.\n"
    )


def curve_table(name: str, runs: dict[str, list[dict]]) -> str:
    """The scores on the way, at equally many images and at equally many rows."""
    per_image = {method: rows_per_image(settings_of(name, method)) for method in runs}
    totals = {method: per_image[method] * images_of(name, method) for method in runs}
    least, rows = min(totals.values()), []
    for method, results in runs.items():
        lines = [{point["images"]: point["score"] for point in run["curve"]} for run in results]
        row = {"method": method, "rows of a run": f"{totals[method] / 1e3:,.1f} k"}
        for count in PANELS[name].counts:
            reached = lines and count <= images_of(name, method)
            row[f"after {count:,} images"] = at(lines, count) if reached else ""
        budget = least / per_image[method]
        row[f"after {least / 1e3:,.1f} k rows"] = at(lines, budget) if lines else ""
        rows.append(row)
    return f"\n{bench.table(rows)}\n"


def settings_of(panel: str, method: str) -> dict:
    return PANELS[panel].settings | PANELS[panel].methods[method]


def images_of(panel: str, method: str) -> int:
    """Images that a run samples that nothing stops."""
    settings = settings_of(panel, method)
    names = ("epochs", "prompts_per_epoch", "images_per_prompt")
    return int(np.prod([settings[name] for name in names]))


def at(lines: list[dict], count: float) -> str:
    return spread([value_at(line, count) for line in lines])


def value_at(points: dict[int, float], count: float) -> float:
    """Between the two points around a count; a run that stopped early stays as it was."""
    return float(np.interp(count, list(points), list(points.values())))


def preferred(runs: dict[str, list[dict]]) -> dict[str, str]:
    """How often each model's image from one noise is liked best, with its 95 % interval.

    What the person thinks is the second network's log-probability and Gumbel noise of scale 1, so
    of two images the choice follows Eq. 3.
    """
    measured = {method: ends(results) for method, results in runs.items() if results}
    if not measured:
        return {}
    chosen, names = [], ["none", *measured]
    for seed, of_seed in enumerate(zip(*measured.values(), strict=False)):
        logits = [of_seed[0][0]["each"], *(after["each"] for _, after in of_seed)]
        random = np.random.default_rng([seed, SEEDS])
        chosen += (np.array(logits) + random.gumbel(size=np.shape(logits))).argmax(0).tolist()
    shares = {}
    for k, name in enumerate(names):
        result = win_rate(torch.tensor([1 if choice == k else -1 for choice in chosen]))
        low, high = result["win_rate_interval"]
        shares[name] = f"{result['win_rate']:.1%} ({low:.1%} to {high:.1%})"
    return shares


def tags_table(runs: dict[str, list[dict]]) -> str:
    """Figs. 4 and 5: a row for each number of clicks."""
    rows = []
    for method, results in runs.items():
        for judged in zip(*(run["judged"] for run in results), strict=True):
            clicks = judged[0]["after"]
            row = {"method": method, "seeds": len(results), "clicks": clicks}
            row |= {"tags": TAGGED * clicks, "bad images": f"{bench.mean(judged, 'score'):.1%}"}
            row["worst seed"] = f"{max(row['score'] for row in judged):.1%}"
            rows.append(row | {"animals recognised": f"{bench.mean(judged, 'animals'):.1%}"})
    return f"\n{bench.table(rows)}\n" if rows else "\nNot measured yet.\n"


def page(runs: list[dict]) -> str:
    """All tables in Markdown."""
    parts = []
    for name, panel in PANELS.items():
        of_panel = by_method(runs, name)
        parts.append(f"\n## {panel.source}: {name}\n")
        for figure, panels in FIGURES.items():
            if name == panels[0] and any(of_panel.values()):
                parts.append(f"\n![Mean and standard deviation of the seeds]({figure})\n")
        if panel.methods is PEOPLE:
            parts.append(tags_table(of_panel))
        else:
            parts += [quality_table(name, of_panel), curve_table(name, of_panel)]
    return "".join(parts)


# The figures


def plot(axis, x: list, curves: np.ndarray, label: str, **style) -> None:
    """Mean and standard deviation of curves (seeds, points)."""
    mean, sd = curves.mean(0), curves.std(0, ddof=min(1, len(curves) - 1))
    width = 2.5 if label == CHAIN else 1.2
    (line,) = axis.plot(x, mean, label=label, linewidth=width, **style)
    axis.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.15, linewidth=0)


def held(lines: list[list[dict]], key: str) -> tuple[list[int], np.ndarray]:
    """Images sampled, and curves (seeds, points) with a value at each of them."""
    curves = [{point["images"]: point[key] for point in line} for line in lines]
    x = sorted(set().union(*curves))
    return x, np.array([[value_at(curve, n) for n in x] for curve in curves])


def draw_curves(runs: list[dict], panels: tuple[str, ...], path: Path) -> None:
    """Score against images and against rows, and animals against images; a column for each."""
    figure = Figure(figsize=(6.5 * len(panels), 10), layout="constrained")
    axes = figure.subplots(3, len(panels), squeeze=False)
    for column, name in zip(axes.T, panels, strict=True):
        for k, (method, results) in enumerate(by_method(runs, name).items()):
            for axis, key in zip(column, ("score", "score", "animals"), strict=True):
                if results:
                    x, curves = held([run["curve"] for run in results], key)
                    by_rows = rows_per_image(settings_of(name, method)) / 1e3
                    scale = by_rows if axis is column[1] else 1
                    style = {"color": f"C{k}", "marker": "os^vDPX*"[k], "markersize": 3}
                    plot(axis, [scale * n for n in x], curves, method, **style)
        column[0].set(title=name, xlabel="images sampled", ylabel="score, mean ± sd of the seeds")
        column[1].set(xlabel="thousand rows through the network", ylabel="score")
        column[2].set(xlabel="images sampled", ylabel="animals recognised", ylim=(0, 1.02))
    axes[0, -1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_bad_shares(runs: dict[str, list[dict]], path: Path) -> None:
    """Figs. 4 and 5: bad images against clicks."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for method, marker in zip(runs, "os^", strict=True):
        if runs[method]:
            clicks = [row["after"] for row in runs[method][0]["judged"]]
            shares = np.array([[row["score"] for row in run["judged"]] for run in runs[method]])
            plot(axis, clicks, shares, method, marker=marker)
    axis.set(xlabel=f"clicks (groups of {TAGGED} images)", ylabel="share of bad images")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write(folder: Path, jobs: list[Job]) -> None:
    """The tables of the page, and the figures, of those of the jobs that paper.json has."""
    runs = bench.finished(folder / "paper.json", jobs)
    bench.replace_section(folder / "paper.md", MARK, page(runs))
    for file, panels in FIGURES.items():
        of_panel = by_method(runs, panels[0])
        if not any(of_panel.values()):
            continue
        if PANELS[panels[0]].methods is PEOPLE:
            draw_bad_shares(of_panel, folder / file)
        else:
            draw_curves(runs, panels, folder / file)


def main(argv: list[str] | None = None) -> None:
    parser = bench.make_parser("sd.bench_paper", __doc__.splitlines()[0])
    parser.add_argument(
        "--panels", nargs="+", choices=PANELS, default=[*PANELS], help="these alone"
    )
    seeds = "0, 1, ... of each"
    parser.add_argument("--seeds", type=int, default=SEEDS, help=seeds)
    parser.add_argument("--quick", action="store_true", help="a look: one seed, few images")
    bench.add_runner_flags(parser, "bench_paper")
    args = parser.parse_args(argv)
    folder, seeds = (args.work / "quick", 1) if args.quick else (RESULTS, args.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = make_jobs(args.panels, seeds, quick=args.quick)
    redraw = partial(write, folder, make_jobs([*PANELS], SEEDS, quick=args.quick))
    do = partial(measure, quick=args.quick)
    bench.run_jobs(jobs, do, args, store=folder / "paper.json", write=redraw)


if __name__ == "__main__":
    main()

"""The paper's figures and tables, repeated on the emoji model with simulated people.

    python -m sd.bench_paper                           # hours on two cores; resumes
    python -m sd.bench_paper --panels alignment        # a part of it
    python -m sd.bench_paper --quick                   # a look: 4 minutes, other numbers

Each run is sd_demo.py as it is. In a panel every method gets equally many images. Its step size and
strength come from one sweep on a seed of its own, which the page shows whole. Each run is judged on
noises that no training saw; a network that takes no part in any training names the animals. Writes
into sd/results: paper.json, the tables of paper.md, and two figures. What stands there of other
panels stays; a panel that takes the sweep of another finds it there.
"""

import itertools
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure

import sd_demo
from sd import files, options
from sd.bench import make_parser, markdown_table, replace_section
from sd.bench_people import TASTES, SimulatedPerson
from sd.files import LORA_FILE
from sd.metrics import win_rate
from sd.model import load_model, make_accelerator, sample_held_out
from sd.prompts import load_prompts
from sd.scorers import compressibility, incompressibility
from sd.seeds import RandomPurpose
from toy.emoji_sd import classifier

RESULTS = files.ROOT / "sd" / "results"
FIGURES = {"compressibility": "paper_fig3.png", "tags": "paper_fig4.png"}
MARK = "<!-- python -m sd.bench_paper writes what is between these two lines -->\n"
CLASSIFIER = "toy/emoji_sd/classifier.py"
SEEN, UNSEEN = (f"sd/results/prompts/{name}.txt" for name in ("seen_36", "unseen_9"))
SWEEP_SEED, SEEDS = 5, (0, 1, 2, 3, 4)
KEPT = 0.95  # of the initial model's animals, in what counts as the best
GROUPS = "--prompts-per-epoch 4 --images-per-prompt 8 --batch-size 4"
PAIRS = "--guidance-scale 1 --prompts-per-epoch 16 --images-per-prompt 2"  # as many images
NO_BRAKE = "--max-kl 1e9"  # but the KL is logged
CLICKS, TAGGED = 16, 7  # of an epoch, images of one
QUICK = "--epochs 1 --prompts-per-epoch 4 --num-steps 3 --eval-images 8"


class Method(NamedTuple):
    """How one line of a panel trains: flags, and the grid of its sweep; one point: no sweep."""

    flags: str
    lrs: tuple[float, ...]
    values: tuple[float | None, ...] = (None,)  # None: the strength of its flags
    strength: str = "beta"


RATES = (5e-4, 1.5e-3)
LOWER = (1e-4, *RATES)  # for the methods that denoise their own samples, RATES are large
METHODS = {
    "default": Method(GROUPS, (1.5e-3,), (0.06, 0.1, 0.15, 0.3)),
    "Eq. 14, as released": Method(f"--recipe paper {PAIRS} {NO_BRAKE}", (3e-5, 3e-4, 1.5e-3)),
    "whole chain, earlier labels": Method(
        f"{GROUPS} --loss chain --update-every trajectory --batch-size 1 --replay 4 "
        f"--average-weights {NO_BRAKE}",
        RATES,
        (0.06, 0.12),
    ),
    "DDPO": Method(f"{GROUPS} --loss ddpo {NO_BRAKE}", RATES, (0.01, 0.1), strength="clip"),
    "DPOK": Method(f"{GROUPS} --loss dpok {NO_BRAKE}", RATES, (0.02, 0.1)),
    "Reward Weighted": Method(f"{GROUPS} --loss reward-weighted {NO_BRAKE}", LOWER, (0.1, 0.3)),
    "preferred images": Method(f"{GROUPS} --loss sft {NO_BRAKE}", LOWER, (0.0, 0.3)),
}
PEOPLE = {  # the default has epochs of 8 clicks: its settings for as many clicks
    "default": Method("--warm-up 3 --replay 16", (1.5e-3,)),
    "Eq. 14": Method(
        "--loss eq14 --update-every timestep --batch-size 4 --beta 0.06 --warm-up 1 --replay 0 "
        f"--no-average-weights {NO_BRAKE}",
        (1.5e-3,),
    ),
}
PEOPLE["Eq. 14, reference previous"] = PEOPLE["Eq. 14"]._replace(
    flags=f"{PEOPLE['Eq. 14'].flags} --reference previous"
)


def bad(images: list, prompts: list[str]) -> list[float]:
    return [1 - right for right in classifier.recognised(images, prompts)]


class Panel(NamedTuple):
    """A figure or table of the paper."""

    source: str
    flags: str
    score: Callable  # images, prompts -> (N,)
    methods: dict[str, Method]
    noises: int = 180  # a run is judged on
    sweep: str | None = None  # the panel whose sweep decides
    prompts: tuple[str, ...] = ("animals",)  # the lists that it is judged on
    compared: bool = False  # the methods with each other, noise by noise


EVALUATION = f"--eval-images 90 --eval-every 4 --watch {CLASSIFIER}:recognised_by_judge"
ALIGNMENT = f"--objective {CLASSIFIER}:log_probability --num-steps 3 --epochs 40 {EVALUATION}"
PANELS = {
    "compressibility": Panel(
        "Fig. 3",
        f"--objective compressibility --num-steps 10 --epochs 24 {EVALUATION}",
        compressibility,
        METHODS,
    ),
    "incompressibility": Panel(
        "Fig. 3",
        f"--objective incompressibility --num-steps 10 --epochs 24 {EVALUATION}",
        incompressibility,
        METHODS,
        sweep="compressibility",
    ),
    "tags": Panel(
        "Figs. 4 and 5",
        f"--objective tags --num-steps 3 --epochs 5 --prompts-per-epoch {CLICKS}",
        bad,
        PEOPLE,
        noises=360,
    ),
    "alignment": Panel(
        "Table 1",
        ALIGNMENT,
        classifier.log_probability,
        {
            **{name: METHODS[name] for name in ("default", "Eq. 14, as released")},
            "Reward Weighted": METHODS["Reward Weighted"]._replace(values=(0.3, 1.0)),
            "preferred images": METHODS["preferred images"],
        },
        noises=360,
        compared=True,
    ),
    "unseen animals": Panel(
        "no figure",
        f"{ALIGNMENT} --prompts {SEEN} --eval-prompts {UNSEEN}",
        classifier.log_probability,
        {"default": METHODS["default"]},
        noises=360,
        sweep="alignment",
        prompts=(SEEN, UNSEEN),
    ),
}


class Job(NamedTuple):
    """One run."""

    panel: str
    method: str
    lr: float
    value: float | None
    seed: int

    @property
    def name(self) -> str:
        words = "-".join(str(part) for part in self)
        return "".join(c if c.isalnum() or c in "-." else "_" for c in words)

    @property
    def flags(self) -> str:
        """Those of sd_demo.py, without --seed and --out."""
        method = PANELS[self.panel].methods[self.method]
        strength = "" if self.value is None else f" --{method.strength} {self.value:g}"
        return f"{PANELS[self.panel].flags} {method.flags} --lr {self.lr:g}{strength}"


def run(job: Job, work: Path, quick: bool) -> dict:
    """Run sd_demo.py and judge what it made."""
    out = work / job.name
    shutil.rmtree(out, ignore_errors=True)  # killed on its way
    torch.set_num_threads(1)
    panel, few = PANELS[job.panel], QUICK if quick else ""
    argv = f"{job.flags} {few} --seed {job.seed} --out {out}".split()
    person = partial(SimulatedPerson, taste=TASTES["right animal"])
    result = {"flags": job.flags, "curve": [], "judged": []}
    try:
        with mock.patch.object(sd_demo, "HumanFeedback", person):
            sd_demo.main(argv)
        result |= curve(out)
        if job.seed != SWEEP_SEED:
            result["judged"] = judge(panel, out, noises=16 if quick else panel.noises)
    except SystemExit as error:  # weights or gradients are not finite any more
        result["failed"] = str(error).replace(str(out), "RUN")
    files.save_json(out / "result.json", result)
    print(f"{job.name}: done", flush=True)
    return result


def curve(out: Path) -> dict:
    """What a run logged of its held-out noises, against the images sampled; and its seconds."""
    config = files.read_json(out / "config.json")
    rows = files.read_lines(out / "metrics.jsonl")
    images = config["prompts_per_epoch"] * config["images_per_prompt"]
    points = [{"epoch": 0, **config["initial"]}]
    points += [row for row in rows if row["eval_score"] is not None]
    return {
        "curve": [
            {
                "images": images * point["epoch"],
                "score": point["eval_score"],
                "animals": point["watched"],
                "kl": point.get("eval_kl") or 0.0,
            }
            for point in points
            if point["eval_score"] is not None
        ],
        "seconds": sum(row["seconds_sample"] + row["seconds_train"] for row in rows),
    }


def judge(panel: Panel, out: Path, *, noises: int) -> list[dict]:
    """The model before training and with each LoRA that the run kept, on the same new noises."""
    flags = ["--evaluate", str(out), "--objective", "compressibility", "--max-kl", "1"]  # for KL
    flags += [*"--batch-size 4 --images-per-prompt 8".split(), "--eval-images", str(noises)]
    _, args = options.parse(flags)
    kept = {int(folder.name): folder for folder in (out / "loras").glob("*")} or {1: out / "lora"}
    rows = []
    for name in panel.prompts:
        prompts = load_prompts(name)
        model = load_model(args, prompts, make_accelerator("fp32"))
        for after in [0, *sorted(kept)]:
            if after:
                model.read_lora(kept[after] / LORA_FILE)
            denoiser = model.sampler if after else model.reference
            evaluation = RandomPurpose.EVALUATION
            images, texts, kl = sample_held_out(model, denoiser, args, purpose=evaluation)
            second = classifier.log_probability(images, texts, classifier.JUDGE)
            row = {
                "after": after,  # clicks, or 1: the end
                "prompts": Path(name).stem,
                "score": float(np.mean(panel.score(images, texts))),
                "second": float(np.mean(second)),
                "animals": float(np.mean(classifier.recognised_by_judge(images, texts))),
                "kl": kl or 0.0,
            }
            rows.append(row | ({"each": np.round(second, 3).tolist()} if panel.compared else {}))
    return rows


def best(results: dict[Job, dict], method: str) -> Job | None:
    """The point of a sweep with the best score of those that keep the animals.

    Where none does, the one that keeps most; None where every run broke off.
    """
    ends = {
        job: (result["curve"][0]["animals"], result["curve"][-1])
        for job, result in results.items()
        if job.method == method and result["curve"]
    }
    keeping = [job for job, (before, end) in ends.items() if end["animals"] >= KEPT * before]
    if keeping:
        return max(keeping, key=lambda job: ends[job][1]["score"])
    return max(ends, key=lambda job: ends[job][1]["animals"], default=None)


# The page


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def table(rows: list[dict]) -> str:
    return f"\n{markdown_table(rows[0], [row.values() for row in rows])}\n"


def ends(results: list[dict], prompts: str = "animals") -> list[tuple[dict, dict]]:
    """Before and after each run that was judged."""
    rows = [[row for row in r["judged"] if row["prompts"] == prompts] for r in results]
    return [(of_one[0], of_one[-1]) for of_one in rows if of_one]


def change(found: list[tuple[dict, dict]], key: str) -> str:
    before, after = ([row[key] for row in rows] for rows in zip(*found, strict=True))
    return f"{np.mean(before):.3f} to {spread(after)}"


def quality_table(name: str, runs: dict[str, list[dict]]) -> str:
    """Every method at equal images, and which is best."""
    panel, rows, means = PANELS[name], [], {}
    picked = preferred(runs) if panel.compared else {}
    heads = ["score, initial to tuned", "second network's", "animals right", "worst", "KL"]
    for prompts, method in itertools.product(map(Path, panel.prompts), panel.methods):
        found = ends(runs.get(method, []), prompts.stem)
        label = method if len(panel.prompts) == 1 else f"{method}, {prompts.stem}"
        cells = ["not measured yet", "", "", "", ""]
        if found:
            after = [row for _, row in found]
            cells = [change(found, key) for key in ("score", "second", "animals")]
            cells += [f"{min(row['animals'] for row in after):.3f}"]
            cells += [spread([row["kl"] for row in after], 1)]
            before = np.mean([row["animals"] for row, _ in found])
            if np.mean([row["animals"] for row in after]) >= KEPT * before:
                means[label] = np.mean([row["score"] for row in after])
        row = {"method": label, "seeds": len(found), **dict(zip(heads, cells, strict=True))}
        rows.append(row | ({"preferred": picked.get(method, "")} if panel.compared else {}))
    said = (
        f"Best with {KEPT:.0%} of the animals: {max(means, key=means.get)}.\n"
        if len(panel.methods) > 1 and means and all(map(runs.get, panel.methods))
        else ""
    )
    none = f"No fine-tuning is preferred in {picked['none']}.\n" if picked else ""
    return table(rows) + said + none


def preferred(runs: dict[str, list[dict]]) -> dict[str, str]:
    """How often each model's image of one noise is liked best, with its 95 % interval.

    What the person thinks is the second network's log-probability and Gumbel noise of scale 1, so
    of two images the choice follows Eq. 3.
    """
    found = {method: ends(results) for method, results in runs.items() if ends(results)}
    if not found:
        return {}
    chosen, names = [], ["none", *found]
    for seed, of_seed in enumerate(zip(*found.values(), strict=False)):
        logits = [of_seed[0][0]["each"], *(after["each"] for _, after in of_seed)]
        random = np.random.default_rng([seed, SWEEP_SEED])
        chosen += (np.array(logits) + random.gumbel(size=np.shape(logits))).argmax(0).tolist()
    said = {}
    for k, name in enumerate(names):
        result = win_rate(torch.tensor([1 if choice == k else -1 for choice in chosen]))
        low, high = result["win_rate_interval"]
        said[name] = f"{result['win_rate']:.1%} ({low:.1%} to {high:.1%})"
    return said


def last(result: dict) -> dict | None:
    """The end of a run's curve; None if it broke off."""
    return result["curve"][-1] if result["curve"] else None


def sweep_table(name: str, sweep: list[dict]) -> str:
    """Every point of the sweep of a panel."""
    rows = []
    for point in sweep:
        end, strength = last(point), PANELS[name].methods[point["method"]].strength
        value = "" if point["value"] is None else f"{strength} {point['value']:g}"
        row = {"method": point["method"], "lr": f"{point['lr']:g}", "strength": value}
        row |= {"score": end and f"{end['score']:.3f}", "chosen": "x" * point["chosen"]}
        rows.append(row | {"animals right": end and f"{end['animals']:.1%}"})
    return table(rows)


def value_at(points: dict[int, float], n: int) -> float:
    """That of the last point up to n: a run that stopped early stays as it was."""
    return points[max(k for k in points if k <= n)]


def bad_shares(results: list[dict]) -> dict[int, list[float]]:
    """The share of bad images of each seed by clicks."""
    found = {clicks: [] for clicks in range(0, 6 * CLICKS, CLICKS)}
    for result in results:
        shares = {row["after"]: row["score"] for row in result["judged"]}
        for clicks, values in found.items():
            values.append(value_at(shares, clicks))
    return found


def tags_table(runs: dict[str, list[dict]]) -> str:
    """Figs. 4 and 5, and after how many labels the failures are halved."""
    rows = []
    for recipe in PEOPLE:
        results = [result for result in runs.get(recipe, []) if result["judged"]]
        shares = {n: np.mean(v) if v else None for n, v in bad_shares(results).items()}
        row = {"recipe": recipe, "seeds": len(results)}
        row |= {f"bad after {n}": f"{v:.1%}" if results else "" for n, v in shares.items()}
        said, animals = "not measured yet", ""
        if results:
            halved = [n for n, share in shares.items() if share <= shares[0] / 2]
            said = f"{halved[0]} clicks, {TAGGED * halved[0]} tags" if halved else "not halved"
            animals = f"{np.mean([after['animals'] for _, after in ends(results)]):.1%}"
        rows.append(row | {"halved after": said, "animals right": animals})
    return table(rows)


def page(content: dict) -> str:
    """All tables in Markdown, from what paper.json has."""
    parts = []
    for name, panel in PANELS.items():
        runs, sweep = content[name]["runs"], content[name]["sweep"]
        parts.append(f"\n## {panel.source}: {name}\n")
        if name in FIGURES and any(runs.values()):
            parts.append(f"\n![Mean and standard deviation of the seeds]({FIGURES[name]})\n")
        parts.append(tags_table(runs) if name == "tags" else quality_table(name, runs))
        parts.append(f"The sweep, seed {SWEEP_SEED}:\n{sweep_table(name, sweep)}" if sweep else "")
    return "".join(parts)


def plot(axis, x: list, curves: np.ndarray, label: str, **style) -> None:
    """Mean and standard deviation of curves (seeds, points)."""
    mean, sd = curves.mean(0), curves.std(0, ddof=min(1, len(curves) - 1))
    width = 2.5 if label == "default" else 1.2
    (line,) = axis.plot(x, mean, label=label, linewidth=width, **style)
    axis.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.15, linewidth=0)


def held(lines: list[list[dict]], key: str) -> tuple[list[int], np.ndarray]:
    """Images sampled, and curves (seeds, points) with a value at each of them."""
    curves = [{point["images"]: point[key] for point in line} for line in lines]
    x = sorted(set().union(*curves))
    return x, np.array([[value_at(curve, n) for n in x] for curve in curves])


def draw_scores(content: dict, path: Path) -> None:
    """Fig. 3: score and animals against images; and against the KL of each point of the sweep."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col")
    for column, name in enumerate(("compressibility", "incompressibility")):
        axes[0, column].set(title=name, ylabel="score (kB), mean ± sd over the seeds")
        axes[1, column].set(xlabel="images sampled", ylabel="animals right (judge)", ylim=(0, 1.02))
        for k, method in enumerate(METHODS):
            results = content[name]["runs"].get(method, [])
            lines = [result["curve"] for result in results if result["curve"]]
            for axis, key in zip(axes[:, column], ("score", "animals"), strict=True):
                if lines:
                    plot(axis, *held(lines, key), method, color=f"C{k}")

    axes[0, 2].set(title="compressibility, the sweep", ylabel="score (kB), one seed")
    axes[1, 2].set(xlabel="KL (nats)", ylabel="animals right (judge)", ylim=(0, 1.02))
    for k, method in enumerate(METHODS):
        points = [last(p) for p in content["compressibility"]["sweep"] if p["method"] == method]
        points = sorted(filter(None, points), key=lambda point: point["kl"])
        kl = [point["kl"] for point in points]
        for axis, key in zip(axes[:, 2], ("score", "animals"), strict=True):
            values = np.array([[point[key] for point in points]])
            plot(axis, kl, values, method, color=f"C{k}", marker="o")
    axes[1, 2].set_xscale("symlog", linthresh=0.1)  # 0 too
    axes[1, 2].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_bad_shares(content: dict, path: Path) -> None:
    """Figs. 4 and 5: bad images against clicks."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for recipe, results in content["tags"]["runs"].items():
        shares = bad_shares([result for result in results if result["judged"]])
        if shares[0]:  # a run at least did not break off
            plot(axis, list(shares), np.array(list(shares.values())).T, recipe)
    axis.set(xlabel=f"clicks (groups of {TAGGED} images)", ylabel="share of bad images")
    axis.set_ylim(bottom=0)
    if axis.lines:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def collect(found: dict[Job, dict]) -> dict:
    """What paper.json has: the results of runs that are done, by panel."""
    panels = {}
    for name, panel in PANELS.items():
        of_panel = {job: result for job, result in found.items() if job.panel == name}
        sweep = {job: result for job, result in of_panel.items() if job.seed == SWEEP_SEED}
        chosen = {best(sweep, method) for method in panel.methods}
        points = [
            {**job._asdict(), "curve": result["curve"], "chosen": job in chosen}
            for job, result in sweep.items()
        ]
        runs = {}
        for job, result in of_panel.items():
            if job.seed != SWEEP_SEED:
                runs.setdefault(job.method, []).append(result | job._asdict())
        panels[name] = {"sweep": points, "runs": runs}
    return panels


def shipped(folder: Path) -> dict:
    """What paper.json has already."""
    file = folder / "paper.json"
    return files.read_json(file) if file.exists() else collect({})


def write(content: dict, folder: Path) -> None:
    """The numbers, the tables of the page, and the figures; what ran elsewhere stays."""
    for name, of_panel in shipped(folder).items():
        content[name]["sweep"] = content[name]["sweep"] or of_panel["sweep"]
        content[name]["runs"] = of_panel["runs"] | content[name]["runs"]
    files.save_json(folder / "paper.json", content)
    replace_section(folder / "paper.md", MARK, page(content))
    for name, draw in zip(FIGURES, (draw_scores, draw_bad_shares), strict=True):
        if any(content[name]["runs"].values()):
            draw(content, folder / FIGURES[name])


def sweep_jobs(panel: str, quick: bool) -> list[Job]:
    """The grids of the methods that have more than one point; with quick, one point."""
    grids = {
        name: list(itertools.product(method.lrs, method.values))
        for name, method in PANELS[panel].methods.items()
    }
    return [
        Job(panel, name, *point, SWEEP_SEED)
        for name, grid in grids.items()
        for point in (grid[:1] if quick else grid)
        if len(grid) > 1
    ]


def final_jobs(panel: str, found: dict[Job, dict], seeds: int = len(SEEDS)) -> list[Job]:
    """Each method at the point that its sweep chose, on the other seeds."""
    swept = (PANELS[panel].sweep or panel, SWEEP_SEED)
    sweep = {job: result for job, result in found.items() if (job.panel, job.seed) == swept}
    jobs = []
    for name, method in PANELS[panel].methods.items():
        first = Job(panel, name, method.lrs[0], method.values[0], SWEEP_SEED)
        chosen = best(sweep, name) or first
        jobs += [chosen._replace(panel=panel, seed=seed) for seed in SEEDS[:seeds]]
    return jobs


def done(jobs: list[Job], work: Path) -> dict[Job, dict]:
    files = {job: work / job.name / "result.json" for job in jobs}
    return {job: files.read_json(file) for job, file in files.items() if file.exists()}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("sd.bench_paper", __doc__.splitlines()[0])
    work, count = files.ROOT / "runs" / "bench_paper", options.positive(int)
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=[*PANELS], help="of these")
    parser.add_argument("--seeds", type=count, default=len(SEEDS), help="0, 1, ... of each")
    parser.add_argument("--quick", action="store_true", help="a look: one seed, few images")
    parser.add_argument("--work", type=Path, default=work, help="folder of the runs")
    parser.add_argument("--processes", type=count, default=2, help="runs at a time, one core each")
    args = parser.parse_args(argv)
    work = args.work.resolve() / ("quick" if args.quick else "")
    work.mkdir(parents=True, exist_ok=True)
    folder = work if args.quick else RESULTS
    found, seeds = {}, 1 if args.quick else args.seeds
    with ProcessPoolExecutor(args.processes, max_tasks_per_child=1) as pool:

        def run_all(jobs: list[Job]) -> None:
            ready = done(jobs, work) | found
            left = [job for job in jobs if job not in ready]
            each = [[work] * len(left), [args.quick] * len(left)]
            ready |= zip(left, pool.map(run, left, *each), strict=True)
            found.update((job, ready[job]) for job in jobs)

        swept = dict.fromkeys(PANELS[panel].sweep or panel for panel in args.panels)
        for panel in swept.keys() - set(args.panels):
            for point in shipped(folder)[panel]["sweep"]:  # of an earlier start
                found[Job(panel, *map(point.get, Job._fields[1:]))] = point
        run_all([job for panel in swept for job in sweep_jobs(panel, args.quick)])
        run_all([job for panel in args.panels for job in final_jobs(panel, found, seeds)])
    for panel in PANELS:  # those of earlier starts too
        found |= done(sweep_jobs(panel, args.quick), work)
    for panel in PANELS:
        found |= done(final_jobs(panel, found), work)
    write(collect(found), folder)


if __name__ == "__main__":
    main()

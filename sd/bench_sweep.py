"""Step size, beta, replay and warm-up of the whole chain, by one sweep over five tasks together.

    python -m sd.bench_sweep    # hours on two cores; resumes where it stopped

First a grid of step size and beta; then, at its best point, other numbers of earlier groups and of
warm-up epochs. Two scorers and three tastes of people, two seeds that no panel uses; every model is
judged on 180 images from noise that no training saw. A point's score is the mean over the tasks of
its gain over the initial model, in parts of the largest gain of the task. The best is that with the
best score of those that keep 97 % of the animals in every task. Writes into sd/results: sweep.json,
and a section of paper.md. What it chooses is written by hand into sd/bench.py and sd/options.py.
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from sd import bench, bench_paper, bench_people
from sd.bench import KEPT, RESULTS, Job

MARK = "<!-- python -m sd.bench_sweep writes what is between these two lines -->\n"
SEEDS = (5, 6)
JUDGED = 180  # images
GRID = [{"lr": lr, "beta": beta} for lr, beta in product((5e-4, 1.5e-3), (0.06, 0.12, 0.25))]
CENTRE = {"replay": 4, "warm_up": 3}
AROUND = [{"replay": 2}, {"replay": 8}, {"warm_up": 1}, {"warm_up": 6}]
NAMES = ("lr", "beta", "replay", "warm_up")
SCORERS = {"compressibility": 12, "alignment": 10}  # epochs
PEOPLE = ("warm", "plain but intact", "small files")
TASKS = (*SCORERS, *PEOPLE)
Point = tuple[float, ...]  # values of NAMES


def task_settings(task: str) -> dict:
    if task in PEOPLE:
        return bench_people.TASTES[task].settings
    often = {"epochs": SCORERS[task], "eval_images": 16, "eval_every": 1}  # for the KL limit
    return bench_paper.GROUPS | bench_paper.PANELS[task].settings | often


def jobs_at(values: dict) -> list[Job]:
    """Every task and seed at a point."""
    point = CENTRE | values
    settings = bench.WHOLE_CHAIN | point
    return [
        Job(
            {"task": task, **{name: point[name] for name in NAMES}, "seed": seed},
            task_settings(task) | settings | {"seed": seed},
        )
        for task in TASKS
        for seed in SEEDS
    ]


def measure(job: Job, folder: Path) -> dict:
    """Train, and judge the end."""
    task = job.key["task"]
    if task in PEOPLE:
        score = bench_people.TASTES[task].score
        run, _ = bench_people.train_with(bench_people.TASTES[task], job, folder)
    else:
        score = bench_paper.PANELS[task].score
        run = bench.train(job, folder)
    judged = bench.judge(run, {1: run / "lora"}, score, images=JUDGED)
    return {"seconds": bench.training_seconds(run), "judged": judged}


def summary(runs: list[dict]) -> dict[Point, dict[str, dict]]:
    """Mean gain, share of the animals kept and KL of each task, of the points that are complete."""
    points = {}
    for run in runs:
        at_point = points.setdefault(tuple(run[name] for name in NAMES), {})
        at_point.setdefault(run["task"], []).append(run["judged"])
    return {
        point: {task: means(rows) for task, rows in of_point.items()}
        for point, of_point in points.items()
        if sum(map(len, of_point.values())) == len(TASKS) * len(SEEDS)
    }


def means(judged: list[list[dict]]) -> dict:
    before, after = zip(*judged, strict=True)
    kept = bench.mean(after, "animals") / bench.mean(before, "animals")
    gain = bench.mean(after, "score") - bench.mean(before, "score")
    return {"gain": gain, "kept": kept, "kl": bench.mean(after, "kl")}


def scores(points: dict[Point, dict]) -> dict[Point, float]:
    """Mean over the tasks of the gain, in parts of the largest gain of the task."""
    largest = {task: max(of_one[task]["gain"] for of_one in points.values()) for task in TASKS}
    return {
        point: float(np.mean([of_one[task]["gain"] / largest[task] for task in TASKS]))
        for point, of_one in points.items()
    }


def best(points: dict[Point, dict]) -> Point | None:
    """The best score of those that keep the animals in each task; else who keeps most."""
    score = scores(points) if points else {}
    worst = {point: min(of_one[task]["kept"] for task in TASKS) for point, of_one in points.items()}
    keeping = [point for point in points if worst[point] >= KEPT]
    return max(keeping, key=score.get) if keeping else max(points, key=worst.get, default=None)


def page(points: dict[Point, dict]) -> str:
    """The whole sweep."""
    score, chosen = scores(points) if points else {}, best(points)
    rows = [
        {
            **dict(zip(NAMES, point, strict=True)),
            "task": task,
            "gain": f"{mean['gain']:+.3f}",
            "animals kept": f"{mean['kept']:.1%}",
            "KL": f"{mean['kl']:.1f}",
            "score of the point": f"{score[point]:.2f}",
            "chosen": "x" if point == chosen else "",
        }
        for point, of_one in points.items()
        for task, mean in of_one.items()
    ]
    table = bench.table(rows) if rows else "Not measured yet.\n"
    return f"\n## The sweep of the whole chain, seeds {SEEDS[0]} and {SEEDS[1]}\n\n{table}\n"


def main(argv: list[str] | None = None) -> None:
    parser = bench.make_parser("sd.bench_sweep", __doc__.splitlines()[0])
    bench.add_runner_flags(parser, "bench_sweep")
    args, store = parser.parse_args(argv), RESULTS / "sweep.json"
    jobs = [job for values in GRID for job in jobs_at(values)]

    def write() -> None:
        section = page(summary(bench.finished(store, jobs)))
        bench.replace_section(RESULTS / "paper.md", MARK, section)

    run = partial(bench.run_jobs, measure=measure, args=args, store=store, write=write)
    run(jobs)
    if centre := best(summary(bench.finished(store, jobs))):
        at_best = dict(zip(NAMES, centre, strict=True))
        jobs += [job for values in AROUND for job in jobs_at(at_best | values)]
        run(jobs)


if __name__ == "__main__":
    main()

"""Step size, beta, replay and warm-up of the whole chain, by one sweep over five tasks together.

    python -m sd.bench_sweep    # hours on two cores; resumes where it stopped

First a grid of step size and beta; then, at its best point, other numbers of earlier groups and of
warm-up epochs. Two scorers and three tastes of people, two seeds that no panel uses; every model is
judged on 180 images from noise that no training saw. The points race: one that keeps less than 95 %
of the animals in a run is in no further one. A point's score is the mean over the tasks of its gain
over the initial model, in parts of the largest gain of the task among the points that ran to the
end. The best is that with the best score of those that keep 97 % of the animals in every task.
Writes into sd/results: sweep.json, and a section of paper.md. What it chooses is written by hand
into sd/bench.py and sd/options.py.
"""

from itertools import product
from pathlib import Path

import numpy as np

from sd import bench, bench_paper, bench_people
from sd.bench import KEPT, RESULTS, Job

MARK = "<!-- python -m sd.bench_sweep writes what is between these two lines -->\n"
STORE = RESULTS / "sweep.json"
SEEDS = (5, 6)
JUDGED = 180  # images
GRID = [
    {"lr": lr, "beta": beta, "replay": 4, "warm_up": 3}
    for lr, beta in [(1e-3, 0.25), (5e-4, 0.12), (1e-3, 0.17), (1e-3, 0.12), (1.5e-3, 0.12)]
]
AROUND = [{"replay": 2}, {"warm_up": 1}, {"warm_up": 6}, {"replay": 8}]
NAMES = ("lr", "beta", "replay", "warm_up")
DROPPED = 0.95  # of the animals; less, and a point is out of the race
SCORERS = {"compressibility": 12, "alignment": 10}  # epochs
PEOPLE = ("plain but intact", "small files", "warm")
TASKS = (*SCORERS, *PEOPLE)
Point = tuple[float, ...]  # values of NAMES


def task_settings(task: str) -> dict:
    if task in PEOPLE:
        return bench_people.TASTES[task].settings
    often = {"epochs": SCORERS[task], "eval_images": 16, "eval_every": 1}  # for the KL limit
    return bench_paper.GROUPS | bench_paper.PANELS[task].settings | often


def job_at(point: dict, task: str, seed: int) -> Job:
    key = {"task": task, **point, "seed": seed}
    return Job(key, task_settings(task) | bench.WHOLE_CHAIN | point | {"seed": seed})


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


def runs_that_ended() -> list[dict]:
    return [run for run in bench.read_runs(STORE) if "failed" not in run]


def summary(runs: list[dict]) -> dict[Point, dict[str, dict]]:
    """Mean gain, share of the animals kept, KL and number of runs of each task at each point."""
    points = {}
    for run in runs:
        at_point = points.setdefault(tuple(run[name] for name in NAMES), {})
        at_point.setdefault(run["task"], []).append(run["judged"])
    return {
        point: {task: means(rows) for task, rows in of_point.items()}
        for point, of_point in points.items()
    }


def means(judged: list[list[dict]]) -> dict:
    before, after = zip(*judged, strict=True)
    gain = bench.mean(after, "score") - bench.mean(before, "score")
    return {
        "gain": gain,
        "kept": bench.mean(after, "animals") / bench.mean(before, "animals"),
        "kl": bench.mean(after, "kl"),
        "runs": len(judged),
    }


def dropped(point: dict, runs: list[dict]) -> bool:
    """Whether a run at the point lost too many animals."""
    kept = [means([run["judged"]])["kept"] for run in runs if point.items() <= run.items()]
    return min(kept, default=1) < DROPPED


def scores(points: dict[Point, dict]) -> dict[Point, float]:
    """Mean over the tasks of the gain, in parts of the largest, where all the runs are there."""
    whole = {
        point: of_one
        for point, of_one in points.items()
        if sum(mean["runs"] for mean in of_one.values()) == len(TASKS) * len(SEEDS)
    }
    largest = {
        task: max((of_one[task]["gain"] for of_one in whole.values()), default=None)
        for task in TASKS
    }
    return {
        point: float(np.mean([of_one[task]["gain"] / largest[task] for task in TASKS]))
        for point, of_one in whole.items()
    }


def best(points: dict[Point, dict]) -> Point | None:
    """The best score of those that keep the animals in each task; else who keeps most."""
    score = scores(points)
    worst = {point: min(mean["kept"] for mean in points[point].values()) for point in score}
    keeping = [point for point in score if worst[point] >= KEPT]
    return max(keeping, key=score.get) if keeping else max(score, key=worst.get, default=None)


def page(points: dict[Point, dict]) -> str:
    """The whole sweep."""
    score, chosen = scores(points), best(points)
    rows = [
        {
            **dict(zip(NAMES, point, strict=True)),
            "task": task,
            "gain": f"{mean['gain']:+.3f}",
            "animals kept": f"{mean['kept']:.1%}",
            "KL": f"{mean['kl']:.1f}",
            "runs": mean["runs"],
            "score of the point": f"{score[point]:.2f}" if point in score else "",
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
    args = parser.parse_args(argv)

    def write() -> None:
        section = page(summary(runs_that_ended()))
        bench.replace_section(RESULTS / "paper.md", MARK, section)

    def race(points: list[dict]) -> None:
        for seed, task in product(SEEDS, TASKS):
            runs = runs_that_ended()
            left = [point for point in points if not dropped(point, runs)]
            jobs = [job_at(point, task, seed) for point in left]
            bench.run_jobs(jobs, measure=measure, args=args, store=STORE, write=write)

    race(GRID)
    if centre := best(summary(runs_that_ended())):
        at_best = dict(zip(NAMES, centre, strict=True))
        race([at_best | values for values in AROUND])


if __name__ == "__main__":
    main()

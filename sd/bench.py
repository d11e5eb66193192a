"""What the benches share: the recommended method, jobs and their runner, the judge, the pages.

A job is one run of sd_demo.py and what is measured of it. Its result is kept in the job's folder
and, as soon as it is done, in a JSON file of sd/results; a job whose result stands there is not run
again. So a start that is stopped loses at most what the runs in hand did since their last epoch.
"""

import argparse
import hashlib
import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import d3po
import sd_demo
from sd import UserError, files, options
from sd.files import LORA_FILE
from sd.metrics import win_rate
from sd.model import load_model, make_accelerator, sample_held_out
from sd.prompts import load_prompts
from sd.scorers import jpeg_kb
from sd.seeds import RandomPurpose
from toy.emoji_sd import classifier

RESULTS = files.ROOT / "sd" / "results"
BLANK_KB = jpeg_kb(Image.new("RGB", (64, 64), "white"))
KEPT = 0.97  # of the initial model's animals, in what counts as the best
CHAIN = "whole chain"
WHOLE_CHAIN = {  # what sd_demo.py does to the emoji model by default
    "loss": "chain",
    "batch_size": 1,
    "lr": 1e-3,
    "beta": 0.25,
    "replay": 4,
    "warm_up": 3,
    "average_weights": True,
    "max_kl": 25,
}
NO_LIMIT = {"max_kl": 1e9}  # but the KL is logged
EQ14 = {
    "loss": "eq14",
    "batch_size": 4,
    "lr": 1.5e-3,
    "warm_up": 1,
    "replay": 0,
    "average_weights": False,
    **NO_LIMIT,
}


# Jobs


class Job(NamedTuple):
    """One run."""

    key: dict  # what the tables call it: method, seed, ...
    settings: dict  # of `sd_demo.run`; files relative to this repository

    @property
    def name(self) -> str:
        """Name of its folder; other settings have another."""
        digest = hashlib.sha256(files.to_json(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{slug(*self.key.values())}-{digest[:8]}"


Measure = Callable[[Job, Path], dict]  # a job and its folder -> what is kept of it
Score = Callable[[list, list[str]], Sequence[float]]  # of images and prompts


def slug(*words) -> str:
    text = "-".join(map(str, words))
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text)


def read_runs(store: Path) -> list[dict]:
    return files.read_json(store)["runs"] if store.exists() else []


def find_run(runs: list[dict], job: Job) -> dict | None:
    """The result of a job; one with the same key and other settings is none."""
    wanted = {**job.key, "settings": job.settings}
    return next((run for run in runs if wanted.items() <= run.items()), None)


def finished(store: Path, jobs: list[Job]) -> list[dict]:
    """The results of the jobs that the store has, without those that broke off."""
    runs = read_runs(store)
    return [run for job in jobs if (run := find_run(runs, job)) and "failed" not in run]


def add_run(store: Path, run: dict, key: dict) -> None:
    others = [other for other in read_runs(store) if not key.items() <= other.items()]
    files.save_json(store, {"runs": [*others, run]})


def run_jobs(
    jobs: list[Job],
    measure: Measure,
    args: argparse.Namespace,
    *,
    store: Path,
    write: Callable[[], None],
) -> None:
    """Run what the store has not, one core each; write the page anew with every result.

    args: with what `add_runner_flags` adds. What a job prints is in log.txt of its folder.
    """
    write()
    runs = read_runs(store)
    left = [job for job in jobs if not args.redraw and find_run(runs, job) is None]
    with ProcessPoolExecutor(args.processes, max_tasks_per_child=1) as pool:
        futures = {pool.submit(run_job, job, measure, args.work / job.name): job for job in left}
        for number, future in enumerate(as_completed(futures), 1):
            job, error = futures[future], future.exception()
            how = "".join(traceback.format_exception(error)) if error else "done"
            print(f"{job.name}: {how} ({number} of {len(left)})", flush=True)
            if not error:
                add_run(store, future.result(), job.key)
                write()


def run_job(job: Job, measure: Measure, folder: Path) -> dict:
    """Measure a job, unless its folder has the result. A run that breaks off is a result too."""
    torch.set_num_threads(1)
    os.chdir(files.ROOT)
    result = folder / "result.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                measured = measure(job, folder)
            except UserError as error:
                measured = {"failed": str(error).replace(str(folder), "JOB")}
        files.save_json(result, {**job.key, "settings": job.settings, **measured})
    return files.read_json(result)


def train(job: Job, folder: Path, **objects) -> Path:
    """The job's run, from its checkpoint if a kill left one; returns the run's folder.

    objects: settings that are no part of the job's, as a labeller.
    """
    out = folder / "run"
    if (out / "checkpoint" / "state.pt").exists():
        return sd_demo.run(resume=out, device="cpu", **objects)
    shutil.rmtree(out, ignore_errors=True)
    return sd_demo.run(**job.settings, out=out, device="cpu", **objects)


def training_seconds(run: Path) -> float:
    rows = files.read_lines(run / "metrics.jsonl")
    return sum(row["seconds_sample"] + row["seconds_train"] for row in rows)


def curve(run: Path) -> list[dict]:
    """What a run logged of its held-out images, against the images sampled."""
    config = files.read_json(run / "config.json")
    images = config["prompts_per_epoch"] * config["images_per_prompt"]
    rows = [{"epoch": 0, **config["initial"]}, *files.read_lines(run / "metrics.jsonl")]
    return [
        {
            "images": images * row["epoch"],
            "score": row["eval_score"],
            "animals": row["watched"],
            "kl": row.get("eval_kl") or 0.0,
        }
        for row in rows
        if row["eval_score"] is not None
    ]


def judge(
    run: Path,
    loras: dict[int, Path | None],
    score: Score,
    *,
    images: int,
    prompts: str = "animals",
    each: bool = False,
) -> list[dict]:
    """The initial model ("after" 0), and after each number its LoRA, on the same new images.

    loras: folders; None is the initial model. The win rate, against the initial model's image from
    the same noise, is by the score. A network that takes part in no training names the animals;
    with `each`, its log-probability of every image is kept.
    """
    args = options.make_settings(
        evaluate=run, objective="compressibility", eval_images=images, max_kl=1, device="cpu"
    )
    model = load_model(args, load_prompts(prompts), make_accelerator("fp32", "cpu"))
    rows, seen, initial = [], {}, None
    for after, lora in {0: None, **loras}.items():
        if lora not in seen:
            if lora:
                model.read_lora(lora / LORA_FILE)
            denoiser = model.sampler if lora else model.reference
            purpose = RandomPurpose.EVALUATION
            drawn, texts, kl = sample_held_out(model, denoiser, args, purpose=purpose)
            scores = torch.as_tensor(score(drawn, texts), dtype=torch.float64)
            initial = scores if initial is None else initial
            log_probs = classifier.log_probability(drawn, texts, classifier.JUDGE)
            seen[lora] = {
                "score": scores.mean().item(),
                **win_rate(d3po.preference(scores, initial)),
                "log_prob": float(np.mean(log_probs)),
                "animals": float(np.mean(classifier.recognised_by_judge(drawn, texts))),
                "kb": float(np.mean([jpeg_kb(image) for image in drawn])),
                "kl": kl or 0.0,
                **({"each": np.round(log_probs, 3).tolist()} if each else {}),
            }
        rows.append({"after": after, **seen[lora]})
    return rows


# The pages


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def absolute_path(text: str) -> Path:
    return Path(os.path.abspath(text))


def add_runner_flags(parser: argparse.ArgumentParser, name: str) -> None:
    work = files.ROOT / "runs" / name
    parser.add_argument("--work", type=absolute_path, default=work, help="folder of the runs")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    redraw = "run nothing; write page and figures anew from the stored numbers"
    parser.add_argument("--redraw", action="store_true", help=redraw)


def replace_section(page: Path, mark: str, content: str) -> None:
    """Replace what a page has between its two marks; a new page has nothing else."""
    text = page.read_text() if page.exists() else mark + mark
    before, _, after = text.split(mark)
    files.save_text(page, before + mark + content + mark + after)


def table(rows: list[dict]) -> str:
    """Markdown, a line for each row; a cell is empty where a row has no such key."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, ["---"] * len(heads), *([row.get(key, "") for key in heads] for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def mean(rows: Iterable[dict], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def size_change(score: float, initial: float) -> float:
    """Relative change of the JPEG size above an empty picture's; scores are kB, or minus kB."""
    return (abs(score) - BLANK_KB) / (abs(initial) - BLANK_KB) - 1

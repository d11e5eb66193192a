"""sd/bench.py: jobs are run once, kept as they come, and known by their settings."""

import json
from argparse import Namespace
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from sd import UserError, bench
from sd.bench import Job


def run_in_turn(function, *args):
    future = Future()
    try:
        future.set_result(function(*args))
    except ValueError as error:
        future.set_exception(error)
    return future


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A function that runs jobs in this process, and returns the seeds that were measured."""
    pool = nullcontext(SimpleNamespace(submit=run_in_turn))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_, **__: pool)
    monkeypatch.setattr(bench, "as_completed", list)
    monkeypatch.setattr(bench.os, "chdir", lambda _: None)
    args = Namespace(redraw=False, processes=1, work=tmp_path / "work")

    def run(jobs, broken=()):
        measured = []

        def measure(job, folder):
            seed = job.settings["seed"]
            measured.append(seed)
            print(f"seed {seed}")
            if seed in broken:
                raise broken[seed]
            return {"value": 10 * seed}

        bench.run_jobs(jobs, measure, args, store=tmp_path / "store.json", write=lambda: None)
        return measured

    run.store, run.work = tmp_path / "store.json", args.work
    return run


def job(seed, **settings):
    return Job({"method": "DDPO", "seed": seed}, {"lr": 1e-3, "seed": seed, **settings})


def test_what_the_store_has_is_not_run_again_unless_its_settings_changed(runner):
    assert runner([job(0), job(1)]) == [0, 1]
    assert runner([job(0), job(1), job(2)]) == [2]
    runs = json.loads(runner.store.read_text())["runs"]
    assert [(run["method"], run["seed"], run["value"]) for run in runs] == [
        ("DDPO", seed, 10 * seed) for seed in range(3)
    ]
    runner.store.unlink()
    assert runner([job(0)]) == []  # its folder has the result
    assert runner([job(0, beta=0.1)]) == [0]
    (run,) = bench.read_runs(runner.store)  # in place of the one with other settings
    assert run["settings"]["beta"] == 0.1
    assert bench.finished(runner.store, [job(0)]) == []
    assert bench.finished(runner.store, [job(0, beta=0.1)]) == [run]


def test_a_run_that_breaks_off_is_a_result_and_a_bug_is_not(runner, capsys):
    broken = {1: UserError(f"{runner.work}: weights are not finite"), 2: ValueError("a bug")}
    jobs = [job(seed) for seed in range(4)]
    assert runner(jobs, broken) == [0, 1, 2, 3]
    assert [run["seed"] for run in bench.read_runs(runner.store)] == [0, 1, 3]
    assert [run["seed"] for run in bench.finished(runner.store, jobs)] == [0, 3]
    assert "weights are not finite" in bench.read_runs(runner.store)[1]["failed"]
    shown = capsys.readouterr().out
    assert "ValueError: a bug" in shown and "seed 1" not in shown
    assert (runner.work / jobs[1].name / "log.txt").read_text() == "seed 1\n"
    assert runner(jobs) == [2]


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(bench.sd_demo, "run", lambda **settings: calls.append(settings))
    out = tmp_path / "run"
    (out / "images").mkdir(parents=True)  # killed in its first epoch
    bench.train(job(0), tmp_path, labeller="someone")
    assert not out.exists()
    start = {"lr": 1e-3, "seed": 0, "out": out, "device": "cpu", "labeller": "someone"}
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "state.pt").touch()
    bench.train(job(0), tmp_path, labeller="someone")
    assert calls == [start, {"resume": out, "device": "cpu", "labeller": "someone"}]


def test_tables_have_a_cell_for_every_key():
    rows = [{"a": 1, "b": 2}, {"a": 3, "c": 4}]
    assert bench.table(rows) == ("| a | b | c |\n| --- | --- | --- |\n| 1 | 2 |  |\n| 3 |  | 4 |\n")
    assert bench.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000" and bench.spread([1.0], 1) == "1.0"


def test_sizes_are_compared_above_that_of_an_empty_picture():
    assert bench.BLANK_KB == pytest.approx(0.69, abs=0.005)
    small, large = bench.BLANK_KB + 1, bench.BLANK_KB + 1.5
    assert bench.size_change(large, small) == pytest.approx(0.5)
    assert bench.size_change(-small, -large) == pytest.approx(-1 / 3)

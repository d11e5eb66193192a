"""sd/bench_gpu.py on the CPU: what its checks find, what its lines mean, and that it ends."""

import time
from functools import partial

import pytest
import torch

from sd import bench_gpu, options
from sd.bench_cost import Bench, Side
from sd.bench_models import SD3, SD15, SDXL, small

KINDS = {"SD 1.5": SD15, "SDXL": SDXL, "SD 3": SD3}


@pytest.fixture
def setup():
    return bench_gpu.random_setup(small(SD15), "cpu", "fp32")


@pytest.mark.parametrize("name", KINDS)
def test_checks_pass(name):
    assert bench_gpu.check(bench_gpu.random_setup(small(KINDS[name]), "cpu", "fp32")) == "passed"


def test_each_check_finds_what_does_not_hold(setup, monkeypatch):
    def count(side):
        return {"grown_gb": len(side.bench.steps)}

    def broken(bench, *, checkpointing):
        return torch.tensor([torch.nan if checkpointing else torch.inf])

    monkeypatch.setattr(bench_gpu, "count", count)
    assert bench_gpu.check(setup) == "not memory flat in T"
    monkeypatch.setitem(bench_gpu.DTYPES, "fp32", torch.bfloat16)
    assert bench_gpu.check(setup).startswith("not network in its precision")
    monkeypatch.undo()
    monkeypatch.setattr(bench_gpu, "count", count)
    monkeypatch.setattr(bench_gpu, "gradient", broken)
    assert "not gradient finite, not checkpointing's gradient" in bench_gpu.check(setup)
    with torch.no_grad():
        setup.pipe.vae.post_quant_conv.bias.fill_(torch.inf)
    assert bench_gpu.check(setup).startswith("not images finite")


def test_gradients_are_those_of_updates_that_do_not_overflow(setup):
    bench = Bench(setup, 1, 1)
    updates, clip = [], setup.accelerator.clip_grad_norm_
    step = setup.optimizer.step

    def overflow_twice(*args):
        updates.append(clip(*args))

    def skip_twice():
        if len(updates) > 2:
            step()

    setup.accelerator.clip_grad_norm_, setup.optimizer.step = overflow_twice, skip_twice
    gradient = bench_gpu.gradient(bench, checkpointing=False)
    assert len(updates) == 3 and gradient.norm() == pytest.approx(updates[-1].item(), rel=1e-4)
    setup.optimizer.step = lambda: None
    assert bench_gpu.gradient(bench, checkpointing=False).isnan().all()


def test_a_share_of_the_rate_is_operations_over_time(monkeypatch):
    bench = type("Bench", (), {"setup": type("Setup", (), {"device": "cpu"})})
    monkeypatch.setattr(bench_gpu, "race", lambda sides, rounds: [{"seconds": [0.5, 0.4, 0.9]}])
    monkeypatch.setattr(bench_gpu, "count", lambda side: {"gflop": 20e3, "peak_gb": 5.825})
    cell = bench_gpu.time_side(Side("", bench, None), 160)
    assert cell == "500 (25% of the matrix rate; 5.83 GB)"


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch):
    def too_large(side, rate):
        if side.checkpointing:
            return "fits"
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_gpu, "check", lambda setup: "passed")
    monkeypatch.setattr(bench_gpu, "time_side", too_large)
    lines = dict(bench_gpu.check_and_time(small(SD15), "cpu", "fp32"))
    assert [*lines.values()] == ["passed", "does not fit", "does not fit", "fits", "does not fit"]


def test_the_stock_pipeline_agrees_and_rounding_is_none_in_float32():
    ((_, difference),) = bench_gpu.agreement(small(SD15), "cpu", "fp32")
    assert float(difference) < 1e-5
    assert {float(nats) for _, nats in bench_gpu.rounding_floor(small(SD15), "cpu", "fp32")} == {0}
    floors = [float(nats) for _, nats in bench_gpu.rounding_floor(small(SD15), "cpu", "bf16")]
    assert len(floors) == 3 and all(floor > 1e-6 for floor in floors)


def test_a_part_that_fails_says_why_and_one_without_end_is_stopped():
    def fails():
        yield "first", "1"
        raise RuntimeError("CUDA error:\n no kernel image")

    def endless():
        yield "begun", "2"
        while True:
            time.sleep(0.01)

    lines = []
    parts = {"a": fails, "b": partial(iter, [("well", "3")]), "c": endless, "d": endless}
    bench_gpu.measure(parts, 0.5 / 60, lambda line: lines.append(tuple(line.values())))
    assert lines == [
        ("a", "first", "1"),
        ("a", "", "failed: RuntimeError: CUDA error: no kernel image"),
        ("b", "well", "3"),
        ("c", "begun", "2"),
        ("c", "", "no time was left"),
        ("d", "begun", "2"),
        ("d", "", "no time was left"),
    ]


def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_gpu.main([])
    assert stop.value.code == 2
    assert "there is no CUDA GPU here; --device cpu is a trial" in capsys.readouterr().err


def test_each_line_of_a_gpu_goes_between_the_marks_and_a_failed_check_is_an_error(
    tmp_path, monkeypatch, capsys
):
    page, seen = tmp_path / "gpu.md", []

    def lines():
        yield "checks", "passed"
        seen.append(page.read_text())
        yield "checks", "not images finite"

    monkeypatch.setattr(bench_gpu, "make_parts", lambda device: {"SDXL": lines})
    monkeypatch.setattr(bench_gpu, "machine_name", lambda: "some card")
    monkeypatch.setattr(options, "device_available", lambda device: True)
    page.write_text(f"before\n{bench_gpu.MARK}not measured yet\n{bench_gpu.MARK}after\n")
    with pytest.raises(SystemExit, match="1 lines of the table have failed"):
        bench_gpu.main(["--out", str(page)])
    before, table, after = page.read_text().split(bench_gpu.MARK)
    assert (before, after) == ("before\n", "after\n")
    assert table.splitlines()[1] == f"some card, torch {torch.__version__}"
    assert "| SDXL | checks | not images finite |" in table
    assert "| SDXL | checks | passed |" in seen[0]
    assert table.strip() in capsys.readouterr().out


def test_the_committed_page_says_whether_a_gpu_was_there():
    _, table, _ = bench_gpu.PAGE.read_text().split(bench_gpu.MARK)
    assert "not measured yet" in table or "| part | what | measured |" in table


@pytest.mark.slow
def test_the_trial_on_the_cpu_fills_the_whole_table(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    bench_gpu.main(["--device", "cpu", "--out", str(page)])
    table = capsys.readouterr().out.rpartition("| --- | --- | --- |\n")[2].strip().splitlines()
    assert len(table) == 5 + 3 * 5 + 2 + 1 + 3 and not page.exists()
    assert sum("checks | passed |" in line for line in table) == 3
    assert "does not fit" not in str(table) and "no time" not in str(table)

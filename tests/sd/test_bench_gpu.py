"""sd/bench_gpu.py on the CPU: what its checks find, what its lines mean, and that it ends."""

import subprocess
import sys
import time

import pytest
import torch

from sd import UserError, bench_gpu, options
from sd.bench_cost import Bench, Side
from sd.bench_models import SD3, SD15, SDXL, small
from sd.files import ROOT

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


def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_gpu.main([])
    assert stop.value.code == 2
    assert "there is no CUDA GPU here; --device cpu is a trial" in capsys.readouterr().err


def test_with_parts_failing_the_page_is_whole_and_has_each_line_at_once(
    tmp_path, monkeypatch, capsys
):
    page, seen = tmp_path / "gpu.md", []

    def checks():
        for measured in ("passed", "not images finite"):
            yield "checks", measured
            seen.append(page.read_text())

    def fails_later():
        yield "seconds", "3"
        raise RuntimeError("CUDA error:\n no kernel image")

    def fails():
        raise UserError("The pipeline cannot be loaded")

    def endless():
        yield "begun", "2"
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass

    parts = {"emoji": fails_later, "SD 1.5": checks, "SDXL": fails, "SD 3": endless, "fp32": checks}
    monkeypatch.setattr(bench_gpu, "make_parts", lambda device: parts)
    monkeypatch.setattr(bench_gpu, "free", lambda: None)  # collecting a test run's garbage is slow
    monkeypatch.setattr(bench_gpu, "machine_name", lambda: "some card")
    monkeypatch.setattr(options, "device_available", lambda device: True)
    page.write_text(f"before\n{bench_gpu.MARK}not measured yet\n{bench_gpu.MARK}after\n")
    start = time.monotonic()
    with pytest.raises(SystemExit, match="3 lines of the table have failed"):
        bench_gpu.main(["--out", str(page), "--minutes", "0.1"])
    assert time.monotonic() - start < 12  # of 6 seconds
    before, table, after = page.read_text().split(bench_gpu.MARK)
    assert (before, after) == ("before\n", "after\n")
    machine, _, _, _, *lines = table.strip().splitlines()
    assert machine == f"some card, torch {torch.__version__}"
    assert lines == [
        "| emoji | seconds | 3 |",
        "| emoji |  | failed: RuntimeError: CUDA error: no kernel image |",
        "| SD 1.5 | checks | passed |",
        "| SD 1.5 | checks | not images finite |",
        "| SDXL |  | failed: UserError: The pipeline cannot be loaded |",
        "| SD 3 | begun | 2 |",
        "| SD 3 |  | no time was left |",
        "| fp32 |  | no time was left |",
    ]
    assert "| SD 1.5 | checks | passed |" in seen[0] and "not images finite" not in seen[0]
    assert table.strip() in capsys.readouterr().out


def test_a_bare_machine_hears_which_packages_it_lacks():
    command = [sys.executable, "-S", "-m", "sd.bench_gpu"]  # -S: Python alone
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "This machine lacks torch, numpy, matplotlib, diffusers, tr" in done.stderr
    assert done.stderr.endswith(": pip install -r requirements.txt\n")


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

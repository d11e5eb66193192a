"""sd/bench_gpu.py on the CPU: what its checks find, what its times mean, and its one table."""

import pytest
import torch

from sd import bench_gpu, options
from sd.bench_cost import ONE_PAIR, Bench, Side
from sd.bench_models import SD3, SD15, SDXL, random_models, small

KINDS = {"SD 1.5": SD15, "SDXL": SDXL, "SD 3": SD3}


@pytest.fixture
def setup():
    with random_models(small(SD15), "cpu"):
        yield bench_gpu.load("cpu", "fp32", *ONE_PAIR)


@pytest.mark.parametrize("name", KINDS)
def test_checks_pass(name):
    with random_models(small(KINDS[name]), "cpu"):
        assert bench_gpu.check(bench_gpu.load("cpu", "fp32", *ONE_PAIR)) == "passed"


def test_each_check_finds_what_does_not_hold(setup, monkeypatch):
    def count(side):
        return {"grown_gb": len(side.bench.steps)}

    def broken(bench, *, checkpointing):
        return torch.tensor([torch.nan if checkpointing else torch.inf])

    monkeypatch.setattr(bench_gpu, "count", count)
    assert bench_gpu.check(setup) == "not memory flat in T"
    setup.args.precision = "bf16"
    assert bench_gpu.check(setup).startswith("not network in its precision")
    setup.args.precision = "fp32"
    monkeypatch.setattr(bench_gpu, "gradient", broken)
    assert "not gradient finite, not checkpointing's gradient" in bench_gpu.check(setup)
    with torch.no_grad():
        setup.pipe.vae.post_quant_conv.bias.fill_(torch.inf)
    assert bench_gpu.check(setup).startswith("not images finite")


def test_gradients_are_those_of_updates_that_do_not_overflow(setup):
    bench = Bench(setup, 1, 1)
    updates, clip = [], setup.accelerator.clip_grad_norm_

    def overflow_twice(*args):
        updates.append(clip(*args))
        return updates[-1] * (torch.inf if len(updates) <= 2 else 1)

    setup.accelerator.clip_grad_norm_ = overflow_twice
    gradient = bench_gpu.gradient(bench, checkpointing=False)
    assert len(updates) == 3 and gradient.norm() == pytest.approx(updates[-1].item(), rel=1e-4)
    updates[:] = []
    setup.accelerator.clip_grad_norm_ = lambda *_: torch.tensor(torch.inf)
    assert bench_gpu.gradient(bench, checkpointing=False).isnan().all()


def test_a_share_of_the_rate_is_operations_over_time(monkeypatch):
    bench = type("Bench", (), {"setup": type("Setup", (), {"device": "cpu"})})
    monkeypatch.setattr(bench_gpu, "race", lambda sides, rounds: [{"seconds": [0.5, 0.4, 0.9]}])
    monkeypatch.setattr(bench_gpu, "count", lambda side: {"gflop": 20e3, "peak_gb": 5.825})
    assert bench_gpu.cell(Side("", bench, None), rate=160) == "500 (25%; 5.83 GB)"


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch):
    def too_large(side, rate):
        if side.checkpointing:
            return "fits"
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_gpu, "check", lambda setup: "passed")
    monkeypatch.setattr(bench_gpu, "cell", too_large)
    found = list(bench_gpu.cells("cpu", "fp32", small(SD15)))
    assert found == ["passed", "does not fit", "does not fit", "fits"]


def test_a_run_that_stops_is_told_in_the_table(tmp_path, monkeypatch, capsys):
    def stop(argv):
        raise SystemExit("Epoch 1: gradients or weights are not finite any more")

    monkeypatch.setattr(bench_gpu.sd_demo, "main", stop)
    assert bench_gpu.learn("cpu", "fp32", tmp_path) == ["not finished"] * 5
    assert "not finite any more" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_gpu.main([])
    assert stop.value.code == 2
    assert "there is no CUDA GPU here; --device cpu is a trial" in capsys.readouterr().err


def test_a_table_of_a_gpu_goes_between_the_marks_and_a_failed_check_is_an_error(
    tmp_path, monkeypatch, capsys
):
    rows = [["checks", "passed"], ["SDXL: checks", "not finite"]]
    monkeypatch.setattr(bench_gpu, "rows", lambda device: iter(rows))
    monkeypatch.setattr(bench_gpu, "machine_name", lambda: "some card")
    monkeypatch.setattr(options, "device_available", lambda device: True)
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{bench_gpu.MARK}not measured yet\n{bench_gpu.MARK}after\n")
    with pytest.raises(SystemExit, match="A check failed: SDXL: checks"):
        bench_gpu.main(["--out", str(page)])
    before, table, after = page.read_text().split(bench_gpu.MARK)
    assert (before, after) == ("before\n", "after\n")
    assert table.splitlines()[1].startswith(f"| some card, torch {torch.__version__} | fp16 |")
    assert "| SDXL: checks | not finite |" in table and table.strip() in capsys.readouterr().out


def test_the_committed_page_says_whether_a_gpu_was_there():
    _, table, _ = bench_gpu.PAGE.read_text().split(bench_gpu.MARK)
    assert "not measured yet" in table or "| fp16 | bf16 | fp32 |" in table


@pytest.mark.slow
def test_the_trial_on_the_cpu_fills_the_whole_table(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    bench_gpu.main(["--device", "cpu", "--out", str(page)])
    table = capsys.readouterr().out.rpartition("| --- | --- |\n")[2].strip().splitlines()
    assert len(table) == 1 + 1 + 3 * 4 + 5 and not page.exists()
    assert sum("checks | passed |" in line for line in table) == 4
    assert "does not fit" not in str(table) and "- to -" not in str(table)

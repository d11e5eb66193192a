"""Other systems: what only Unix has, float64 on a device, and the device that was asked for."""

import ast
import sys

import pytest
import torch
from sd_helpers import read_rows, run
from tiny_pipelines import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sd_demo
from sd import UserError, metrics, options
from sd.files import ROOT
from sd.model import make_accelerator

MODULES = [ROOT / "d3po.py", ROOT / "sd_demo.py", *ROOT.glob("sd/*.py"), *ROOT.glob("toy/*.py")]
UNIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios"}


def test_nothing_that_only_unix_has_is_imported_at_the_top():
    for module in MODULES:
        for line in ast.parse(module.read_text("utf-8")).body:
            names = [name.name for name in getattr(line, "names", [])]
            assert not UNIX_ONLY & {*names, getattr(line, "module", None)}, module


def test_without_resource_the_peak_of_memory_is_unknown(monkeypatch):
    assert 50 < metrics.peak_memory_mb(torch.device("cpu")) < 1e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert metrics.peak_memory_mb(torch.device("cpu")) is None


def test_the_peak_of_memory_is_the_devices_not_that_of_a_gpu_beside_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda *device: 7e6)
    assert metrics.peak_memory_mb(torch.device("cuda")) == 7
    assert metrics.peak_memory_mb(torch.device("cpu")) > 50


class NoFloat64(TorchDispatchMode):
    """Fails where numbers of 32 bits or less become 64: on an Apple GPU that is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        narrow = any(t.ndim and t.is_floating_point() and t.itemsize < 8 for t in tensors)
        wide = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]
        assert not narrow or all(t.dtype != torch.float64 for t in wide), function
        return output


def test_the_watch_on_float64_sees_it():
    with NoFloat64():
        torch.zeros(2) * torch.tensor(2.0, dtype=torch.float64)  # a number, not a tensor
        torch.tensor([1.0], dtype=torch.float64).mean()
        with pytest.raises(AssertionError, match="_to_copy"):
            torch.zeros(2).double()


# Flux's own positions are float64 wherever they can be
RUNS = [("sd", ""), ("sd_v", "--reference previous"), ("sdxl", ""), ("sd3", "--loss chain")]


@pytest.mark.slow
@pytest.mark.parametrize("family, flags", RUNS)
def test_no_latent_becomes_float64_in_a_run(
    family, flags, scorers, tmp_path, monkeypatch, no_figures
):
    make(family).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "prompts.txt").write_text("a cat\na dog")
    if "chain" in flags:
        flags += " --update-every trajectory"
    if "previous" not in flags:
        flags += " --replay 1"
    train = sd_demo.train

    def watched(*args):
        with NoFloat64():
            yield from train(*args)

    monkeypatch.setattr(sd_demo, "train", watched)
    flags += " --max-kl 1e6 --average-weights --num-steps 2"
    out = run(tmp_path / "model", tmp_path / "run", f"{scorers}:brightness", flags)
    assert len(read_rows(out / "metrics.jsonl")) == 2


# --device


def parsed(monkeypatch, cuda: bool, *flags: str):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    return options.parse(["--objective", "compressibility", *flags])


def test_on_the_cpu_a_cuda_machine_has_the_defaults_of_one_without(monkeypatch):
    with_cuda, without = (parsed(monkeypatch, cuda, "--device", "cpu") for cuda in (True, False))
    assert with_cuda == without and without.precision == "fp32"
    assert without.model == str(options.EMOJI)
    auto, cuda = parsed(monkeypatch, True), parsed(monkeypatch, True, "--device", "cuda")
    assert auto.precision == cuda.precision == "fp16" and auto.model == cuda.model == options.SD15


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "cuda"], "--device cuda is not on this machine: give another, or auto"),
        (["--device", "mps"], "--device mps is not on this machine"),
        (["--device", "cpu", "--precision", "fp16"], "fp16 needs a CUDA GPU"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, flags, message):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        parsed(monkeypatch, "cpu" in flags, *flags)


def test_a_run_goes_on_on_another_device(tiny, scorers, tmp_path, no_figures):
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", "--epochs 1 --device cpu")
    sd_demo.main(["--resume", str(out), "--epochs", "2"])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("size", ["2", "junk"])
def test_processes_that_do_not_find_each_other_are_refused(monkeypatch, name, size):
    make_accelerator("fp32", "cpu")
    monkeypatch.setenv(name, size)
    with pytest.raises(UserError, match=f"{name} is {size}, but this is 1 process of 1: "):
        make_accelerator("fp32", "cpu")
    monkeypatch.setenv(name, "1")
    make_accelerator("fp32", "cpu")


def test_settings_of_accelerate_do_not_change_the_training(monkeypatch):
    make_accelerator("fp32", "cpu")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator("fp32", "cpu").gradient_accumulation_steps == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP is set"):
        make_accelerator("fp32", "cpu")

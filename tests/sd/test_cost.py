"""What a run will cost: counted by hand here, and by runs in test_sd_demo.py."""

import pytest
import torch
from sd_helpers import Loaded, parse

import sd_demo
from sd import cost

# 2 groups of 2 images are 8 rows of the UNet with guidance, for T = 3 steps
COUNTS = {  # flags: rows without and with gradient, calls of the UNet
    "": (8 * 3, 8 * 3, 1 * (3 + 3 + 3)),
    "--guidance-scale 1": (4 * 3, 4 * 3, 1 * (3 + 3 + 3)),
    "--reference previous": (0, 8 * 3, 1 * (3 + 3) + 3),
    "--loss eq12": (8 * 3, 8, 1 * (3 + 3 + 1)),
    "--step-fraction 0.5": (8 * 3, 8 * 2, 1 * (3 + 3 + 2)),
    "--step-fraction 0.01": (8 * 3, 8, 1 * (3 + 3 + 1)),
    "--skip-last 1": (8 * 3, 8 * 2, 1 * (3 + 3 + 2)),
    "--batch-size 1": (8 * 3, 8 * 3, 2 * (3 + 3 + 3)),
    "--loss chain --update-every trajectory": (8 * 6, 8 * 3, 1 * (3 + 3 + 3 + 3)),
}


def test_an_epochs_passes_in_numbers(tiny):
    guided, unguided = (Loaded(tiny, f"--guidance-scale {scale}").model for scale in (3, 1))
    for flags, expected in COUNTS.items():
        model = unguided if "scale" in flags else guided
        found = cost.estimate(model, parse(tiny, flags), processes=1)
        counts = found.rows_without_gradient, found.rows_with_gradient, found.calls
        assert counts == expected, flags
        assert found.rows_sampled == (4 if "scale" in flags else 8) * 3


def test_several_processes_share_the_batches(tiny):
    loaded = Loaded(tiny, "--batch-size 1")
    one, two = (cost.estimate(loaded.model, loaded.args, processes=n) for n in (1, 2))
    assert two.calls == 1 * (3 + 3 + 3)
    assert two._replace(calls=one.calls) == one


@pytest.mark.parametrize("objective, K, labels", [("compressibility", 7, 42), ("tags", 7, 2)])
def test_labels_of_an_epoch_are_all_pairs_of_a_group_or_its_tags(tiny, objective, K, labels):
    flags = f"--objective {objective} --images-per-prompt {K} --eval-images 15"
    loaded = Loaded(tiny, flags)
    found = cost.estimate(loaded.model, loaded.args, processes=1)
    assert found.labels == labels
    assert found.calls_eval == 2 * 3  # 15 images, at most 14 at a time, for 3 steps
    assert found.lora_weights == sum(weight.numel() for weight in loaded.model.lora)
    assert 0 < found.memory_gb < 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--objective compressibility --recipe paper --out run --dry-run".split()
    sd_demo.main(["--model", str(tiny), *flags])
    text = capsys.readouterr().out.replace("\n", " ")
    for part in (
        "Objective compressibility. An epoch: 80 groups of 2 images, 80 labels;",
        "6,400 to sample, 6,400 without and 6,400 with gradient to train",
        "beta 9.77e-05 per nat of a step's log-ratio, a sum over 1,024 latent elements",
        "as 0.1 for their mean, which the released code takes",
        "on cpu, as there is no CUDA GPU; fp32; LoRA rank 16",
        "Memory: about ",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_in_a_sentence(tiny, tmp_path):
    out = tmp_path / "run"
    flags = f"--model {tiny} --objective compressibility --out {out} --lora-rank {10**14}"
    with pytest.raises(SystemExit, match="The memory is not enough .*smaller --batch-size"):
        sd_demo.main(flags.split())
    assert not out.exists()


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_other_errors_keep_their_traceback(error, said):
    with pytest.raises(SystemExit if said else RuntimeError), cost.memory_is_enough():
        raise error

"""The whole program in fp16 on an emulated device: nothing mixes devices, sampling does not wait.

As a script it trains by the whole chain, resumes a copy of that after its first epoch, and trains
by Eq. 14. It prints what went wrong, what each update did and how often the CPU waited: torch keeps
a device for the rest of its process, so the test starts one.
"""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import accelerate.accelerator
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from sd_helpers import PROMPTS, make_pipeline, outcome, run, start_python

import sd_demo
from sd import figures, options
from sd import run as of_run
from sd.evaluation import Evaluator
from sd.run import Run

SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
FP16 = "--device cuda --precision fp16"
CHAIN = f"{FP16} --loss chain --num-steps 3 --epochs 2 --replay 1 --average-weights"
EQ14 = f"{FP16} --loss eq14 --num-steps 5 --epochs 1 --gradient-checkpointing"


@pytest.mark.slow
def test_in_fp16_nothing_mixes_devices_and_sampling_waits_for_no_step(tmp_path):
    output = start_python([__file__, tmp_path], tmp_path)
    result = json.loads(output.splitlines()[-1])
    assert result["problems"] == {}
    for skipped, changed, scale in result["updates"]:
        assert changed != skipped and scale == (0.5 if skipped else 1)
    assert {skipped for skipped, _, _ in result["updates"]} == {True, False}
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "chain")
    chain, eq14 = result["waits"]["chain"], result["waits"]["eq14"]
    assert chain["evaluate"][-1] == eq14["evaluate"][-1] == 18  # of 3 steps and of 5
    assert chain["sample"][-1] == 14
    assert chain["learn"][-2:] == [
        20,
        18,
    ]  # on new and on earlier labels: one a step, and an update
    assert eq14["learn"] == [26]  # two a step: each has an update


def main(folder: Path) -> None:
    """Print problems, waits, and of updates: skipped, weights changed, factor of the scale."""
    import fake_device  # registers the device, which diffusers must not see when it is imported

    updates, waits = [], defaultdict(lambda: defaultdict(list))
    make_accelerator, step_if_due, record = of_run.make_accelerator, Run.step_if_due, Run.record
    name = "chain"

    def make_accelerator_of_device(precision: str, device: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make_accelerator("fp32", "cpu")
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = fake_device.GPU
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("gpu")
        return accelerator

    def note_update(run: Run) -> None:
        def state() -> tuple:
            weights = [weight.data_on_cpu.clone() for weight in run.model.lora]
            return weights, run.accelerator.scaler._scale.data_on_cpu.item()

        count, (before, scale) = len(run.overflows), state()
        step_if_due(run)
        after, new_scale = state()
        changed = not all(map(torch.equal, before, after))
        updates.extend((skipped, changed, new_scale / scale) for skipped in run.overflows[count:])

    def copy_first_epoch(run: Run, epoch: of_run.Epoch) -> bool:
        stop = record(run, epoch)
        if not (folder / "resumed").exists():
            shutil.copytree(run.folder, folder / "resumed")
        return stop

    def count_waits(owner, function_name: str) -> None:
        function = getattr(owner, function_name)

        def counted(*args, **options):
            before = log.waits.total()
            result = function(*args, **options)
            waits[name][function_name].append(log.waits.total() - before)
            return result

        setattr(owner, function_name, counted)

    def pipeline():
        return make_pipeline(**SMALL).to(torch.float16)

    accelerate.accelerator.get_mixed_precision_context_manager = lambda *_: lambda forward: forward
    of_run.make_accelerator = make_accelerator_of_device
    options.device_available = lambda device: True
    figures.draw_run = lambda run: []
    Run.step_if_due, Run.record = note_update, copy_first_epoch
    count_waits(Run, "sample")
    count_waits(Evaluator, "evaluate")
    count_waits(sd_demo, "learn")
    settings = {"objective": "compressibility", "prompts": PROMPTS[:2]}
    with fake_device.watch() as log:
        run(folder, folder / name, flags=CHAIN, model=pipeline(), **settings)
        name = "resumed"
        sd_demo.run(resume=folder / name, model=pipeline(), prompts=PROMPTS[:2])
        name = "eq14"
        run(folder, folder / name, flags=EQ14, model=pipeline(), **settings)
    print(json.dumps({"problems": log.problems, "updates": updates, "waits": waits}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""In fp16 on an emulated device: nothing mixes devices, and no step waits for it.

As a script it prints, for 2 and for 5 steps, what went wrong and how often the CPU waited: torch
keeps a device for the rest of its process, so the test starts one.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sd_helpers import PROMPTS, make_pipeline, noises, parse

from sd import model
from sd.files import ROOT
from sd.seeds import RandomPurpose


@pytest.mark.slow
def test_sampling_and_reference_wait_once_a_trajectory_not_at_each_step():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, env=env, timeout=300)
    few, many = map(json.loads, done.stdout.splitlines()[-2:])
    assert few["problems"] == many["problems"] == {}
    # after sampling, the reference's log-probs and held-out images
    assert few["waits"] == many["waits"] == [12, 17, 35]


def count_waits(num_steps: int) -> dict:
    import fake_device  # registers the device, which diffusers must not see when it is imported

    args = parse(ROOT / "toy" / "emoji_sd", f"--num-steps {num_steps} --max-kl 9 --eval-images 3")
    args = replace(args, model=make_pipeline().to(torch.float16), precision="fp16")
    accelerator = SimpleNamespace(device=fake_device.GPU, prepare=lambda network: network)
    with fake_device.watch() as log:
        loaded = model.load_model(args, PROMPTS, accelerator)
        for _ in range(2):  # prompts are encoded the first time
            log.waits.clear()
            batch = model.sample(
                loaded,
                loaded.sampler,
                torch.tensor([0, 1]),
                images_per_prompt=2,
                generators=noises(0, groups=2, K=2),
            )
            counts = [log.waits.total()]
            loaded.log_prob(loaded.reference, batch)
            counts.append(log.waits.total())
            purpose = RandomPurpose.HELD_OUT
            model.sample_held_out(loaded, loaded.sampler, args, purpose=purpose)
            counts.append(log.waits.total())
    return {"problems": log.problems, "waits": counts}


def cast_with_data(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """`cast_training_params` for tensors of the emulated device."""
    CAST(network, dtype)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data_on_cpu = weight.data_on_cpu.to(dtype)


if __name__ == "__main__":
    CAST, model.cast_training_params = model.cast_training_params, cast_with_data
    for steps in (2, 5):
        print(json.dumps(count_waits(steps)))

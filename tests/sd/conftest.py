"""Fixtures of the tests of sd/: a tiny model, scorers, and gradients that overflow."""

from functools import wraps

import pytest
from diffusers import StableDiffusionPipeline
from sd_helpers import PROMPTS, break_gradients, make_pipeline

from sd import figures, run

SCORERS = """
import os
import numpy as np

def brightness(images, prompts):  # seldom tied, and so smooth that few updates change it
    return [np.asarray(image).mean() for image in images]

def blue(images, prompts):
    return [np.asarray(image)[..., 2].mean() for image in images]

def same(images, prompts):
    return [1.0] * len(images)

def in_part(images, prompts):  # no score in the dark, which is half of the images
    scores = brightness(images, prompts)
    return [None if score < sorted(scores)[len(scores) // 2] else score for score in scores]

def nothing(images, prompts):
    return [float("nan")] * len(images)

def raises(images, prompts):
    raise RuntimeError("no\\nluck")

calls = 0

def later(images, prompts):
    global calls
    calls += 1
    return brightness(images, prompts) if calls <= 4 else raises(images, prompts)

def first_only(images, prompts):
    first = os.environ.get("RANK") == "0"
    return brightness(images, prompts) if first else same(images, prompts)
"""


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Also where there is a GPU: these tests are about bytes and floats.

    A call of a pipeline that names no number of steps takes 4 of them, not 50.
    """
    call = StableDiffusionPipeline.__call__

    @wraps(call)
    def quick(*args, num_inference_steps=4, **options):
        return call(*args, num_inference_steps=num_inference_steps, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__call__", quick)
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a pipeline, with a file of prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    make_pipeline().save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="session")
def scorers(tmp_path_factory):
    file = tmp_path_factory.mktemp("scorers") / "scorers.py"
    file.write_text(SCORERS)
    return file


@pytest.fixture
def no_figures(monkeypatch):
    """Runs draw nothing, which takes as long as their training."""
    monkeypatch.setattr(figures, "draw_run", lambda run: [])


@pytest.fixture
def overflows(monkeypatch):
    """Numbers of the losses whose gradient is to overflow."""
    numbers = set()
    monkeypatch.setattr(run, "step_losses", break_gradients(run.step_losses, numbers))
    return numbers

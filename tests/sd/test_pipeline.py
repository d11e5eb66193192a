"""Four families of pipelines, tiny and random, against diffusers' own calls."""

from functools import wraps

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sd_helpers import PROMPTS, Loaded, read_rows, run, same_images
from tiny_pipelines import FAMILIES, SIZE_FLAGS, make

import d3po
from sd import UserError
from sd import model as sd_model
from sd.files import LORA_FILE
from sd.pipeline import NETWORKS, decode, encode, load_pipeline

FAMILY = pytest.mark.parametrize("family", FAMILIES)
NETWORK = pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
TRAINING_FLAGS = {"sdxl": "--precision bf16", "sd3": "", "flux": "--gradient-checkpointing"}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family's pipeline, with a file of prompts."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family):
        if family not in made:
            made[family] = root / family
            make(family).save_pretrained(made[family])
            (made[family] / "prompts.txt").write_text("\n".join(PROMPTS))
        return made[family]

    return folder


def load(folder, family, flags="", **options) -> Loaded:
    return Loaded(folder, f"{SIZE_FLAGS.get(family, '')} {flags}", **options)


@pytest.fixture(scope="module")
def model_of(folder_of):
    """The model of a family, for tests to which it does not matter what its LoRA is."""
    models = {}

    def model(family):
        if family not in models:
            flags = "--num-steps 4 --guidance-scale 3.5"
            models[family] = load(folder_of(family), family, flags).model
        return models[family]

    return model


def randomise_lora(model: sd_model.Model) -> None:
    noise = torch.Generator().manual_seed(2)
    for weight in model.lora:
        weight.data.normal_(0, 0.2, generator=noise)


def stock_predictions(model: sd_model.Model, family: str, prompt: str, latents) -> list:
    """(timestep, state, prediction) that the stock pipeline hands to scheduler.step."""
    pipe, seen = model.pipe, []
    step = pipe.scheduler.step

    def spy(prediction, t, state, *args, **kwargs):
        seen.append((t, state.clone(), prediction.clone()))
        return step(prediction, t, state, *args, **kwargs)

    pipe.scheduler.step = spy
    try:
        pipe(prompt, latents=latents, output_type="latent", **model.conditioning.options)
    finally:
        pipe.scheduler.step = step
    return seen


@FAMILY
def test_the_guided_prediction_is_what_stock_hands_to_its_scheduler(family, model_of):
    loaded = model_of(family)
    for weight in loaded.lora:
        weight.data.zero_()
    assert not check_prediction(loaded, family)
    randomise_lora(loaded)
    assert check_prediction(loaded, family)


def check_prediction(loaded: sd_model.Model, family: str) -> bool:
    """Compare with stock; returns whether the LoRA counts."""
    latents = torch.randn(1, *loaded.latent_shape)
    flow = loaded.policy.prediction == "flow"
    seen = stock_predictions(loaded, family, PROMPTS[3], latents)
    moved = False
    for i, (_, state, prediction) in list(enumerate(seen))[1:3]:  # in the middle of the chain
        time = loaded.schedule.timesteps[i]
        alpha_bar = loaded.policy.alpha_bars[time]
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x = state * (a + b) if flow else state  # a + b = 1 / r
        arguments = x, time[None], torch.tensor([3])
        with torch.no_grad():
            eps = loaded.sampler(*arguments)
            moved |= not torch.equal(eps, loaded.reference(*arguments))
        expected = prediction.float()
        if flow:
            expected = state + a / (a + b) * expected  # eps = x_s + (1 - s) v
        if loaded.policy.prediction == "v_prediction":
            expected = a * expected + b * x
        # float32 through two or three layers; the flow's sigma is rounded by the scheduler
        torch.testing.assert_close(eps, expected, atol=2e-4, rtol=1e-3)
    return moved


@FAMILY
def test_without_noise_the_chain_ends_where_stock_ends(family, folder_of):
    flags = "--num-steps 4 --guidance-scale 3.5 --eta 1e-6"
    loaded = load(folder_of(family), family, flags).model
    latents = torch.randn(1, *loaded.latent_shape)
    scheduler, options = loaded.pipe.scheduler, dict(loaded.conditioning.options)
    if loaded.policy.prediction == "flow":  # on the same levels: 1 and 0 are out of reach
        low, high = sd_model.MIN_SIGMA, sd_model.MAX_SIGMA
        set_timesteps = scheduler.set_timesteps

        @wraps(set_timesteps)
        def clamped(*args, **kwargs):
            set_timesteps(*args, **kwargs)
            scheduler.sigmas = scheduler.sigmas.clamp(low, high)
            scheduler.timesteps = 1000 * scheduler.sigmas[:-1]

        scheduler.set_timesteps = clamped
        r = ((1 - high) ** 2 + high**2) ** 0.5
        stock = loaded.pipe(PROMPTS[3], latents=latents * r, output_type="latent", **options).images
        stock = stock / ((1 - low) ** 2 + low**2) ** 0.5
    else:
        stock = loaded.pipe(PROMPTS[3], latents=latents, output_type="latent", **options).images
    cond = torch.tensor([3])
    ours = d3po.rollout(loaded.sampler, loaded.schedule, latents, cond).x[-1]
    torch.testing.assert_close(ours, stock.float(), atol=2e-3, rtol=1e-3)  # float32, eta 1e-6


@NETWORK
def test_images_are_decoded_as_by_stock_and_encoded_back(family, model_of):
    loaded = model_of(family)
    latents = torch.randn(1, *loaded.latent_shape)
    call = {"latents": latents, **loaded.conditioning.options}
    torch.manual_seed(0)  # of schedulers with noise
    x_0 = loaded.pipe(PROMPTS[0], output_type="latent", **call).images
    torch.manual_seed(0)
    stock = loaded.pipe(PROMPTS[0], **call).images
    ours = decode(loaded.pipe, x_0, loaded.conditioning, names=PROMPTS[:1])
    assert same_images(ours, stock) and np.asarray(stock[0]).std() > 1
    codes = encode(loaded.pipe, stock, names=PROMPTS[:1])
    assert codes.shape == x_0.shape and codes.isfinite().all()


@NETWORK
def test_every_argument_of_the_network_counts(family, model_of, monkeypatch):
    """A negative control: another value of it, and the output is another."""
    loaded = model_of(family)
    x, time = torch.randn(1, *loaded.latent_shape), loaded.schedule.timesteps[:1]
    batch = loaded.conditioning.batch

    def output(change=None):
        def changed(numbers):
            inputs = batch(numbers)
            if change is not None:
                target = inputs
                for key in change[:-1]:
                    target = target[key]
                target[change[-1]] = target[change[-1]] + 1
            return inputs

        monkeypatch.setattr(loaded.conditioning, "batch", changed)
        with torch.no_grad():
            return loaded.sampler(x, time, torch.tensor([3]))

    def places(tree, place=()):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from places(value, (*place, key))
            elif torch.is_tensor(value) and value.is_floating_point():
                yield (*place, key)

    inputs = batch(torch.tensor([3]))
    overwritten = {("timestep",)}
    names = set(places(inputs)) - overwritten
    names -= {("img_ids",), ("txt_ids",)}  # positions count by their differences
    plain = output()
    for name in names:
        assert not torch.equal(output(name), plain), name
    assert not torch.equal(loaded.sampler(x + 0.1, time, torch.tensor([3])), plain)
    assert len(names) == {"sd": 1, "sdxl": 3, "sd3": 2, "flux": 3}[family]


@NETWORK
def test_the_lora_comes_back_whole(family, model_of, tmp_path):
    loaded = model_of(family)
    randomise_lora(loaded)
    loaded.save_lora(tmp_path)
    pipe = make(family)
    pipe.load_lora_weights(tmp_path)
    network = getattr(pipe, NETWORKS[type(pipe)])
    again = {name: weight for name, weight in network.named_parameters() if "lora_" in name}
    saved, written = loaded.lora_state(), load_file(tmp_path / LORA_FILE)
    assert len(again) == len(saved) == len(loaded.lora) == len(written)
    assert len(saved) >= 12
    for name, weight in again.items():
        assert torch.equal(weight, saved[name.replace(".default_0", "")]), name


@NETWORK
def test_a_loaded_pipeline_trains_twice_and_comes_back_as_it_was(family, folder_of):
    pipe, folder = make(family), folder_of(family)

    def draw():
        size = {"height": 32, "width": 32}
        noise = torch.Generator().manual_seed(0)
        return pipe(PROMPTS[0], num_inference_steps=2, generator=noise, **size).images

    before, log_probs = draw(), []
    for _ in range(2):
        loaded = load(folder, family, "--gradient-checkpointing", model=pipe)
        batch = loaded.sample((0,), 2)
        log_probs.append(loaded.log_prob(batch))
        loaded.update(batch, [[0, 1]])
        assert loaded.model.network.is_gradient_checkpointing
        assert not torch.equal(loaded.log_prob(batch), log_probs[-1])
        with pytest.raises(UserError, match="has a LoRA that is not fused"):
            load_pipeline(pipe, "fp32")
        loaded.model.release()
    assert torch.equal(*log_probs) and same_images(draw(), before, 0)
    network, fresh = (getattr(one, NETWORKS[type(pipe)]) for one in (pipe, make(family)))
    assert network.state_dict().keys() == fresh.state_dict().keys()
    assert type(pipe.scheduler) is type(make(family).scheduler)
    assert not network.is_gradient_checkpointing
    assert all(weight.requires_grad for weight in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINING_FLAGS)
def test_two_epochs_from_the_command_line(family, folder_of, tmp_path, no_figures):
    flags = f"{SIZE_FLAGS.get(family, '')} {TRAINING_FLAGS[family]}"
    out = run(folder_of(family), tmp_path / "run", "incompressibility", flags)
    rows = read_rows(out / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["loss"] > 0 for row in rows)
    weights = load_file(out / "lora" / LORA_FILE)
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)

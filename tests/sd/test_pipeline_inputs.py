"""Models that are unlike Stable Diffusion 1.5 in one thing: matched to stock, or refused."""

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
)
from safetensors.torch import save_file
from sd_helpers import Loaded, make_pipeline
from tiny_pipelines import make

from sd import UserError
from sd.pipeline import load_pipeline


def saved(folder, pipe=None, *, scheduler=None, **config):
    """The folder of a pipeline with another scheduler, or another setting of its own."""
    pipe = pipe or make_pipeline()
    if scheduler or config:
        kind = scheduler or type(pipe.scheduler)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **config)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scheduler", "config", "sentence"),
    [
        (
            DPMSolverMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            "DPMSolverMultistepScheduler samples another process",
        ),
        (EDMEulerScheduler, {}, "EDMEulerScheduler samples another process"),
        (LCMScheduler, {}, "LCMScheduler samples another process"),
        (DDIMScheduler, {"prediction_type": "sample"}, "it predicts 'sample'"),
        (DDIMScheduler, {"thresholding": True}, "clips x_0"),
    ],
)
def test_another_chain_is_refused_by_name(scheduler, config, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        Loaded(saved(tmp_path, scheduler=scheduler, **config))


def test_zero_terminal_snr_is_trained(tmp_path):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = saved(tmp_path, prediction_type="v_prediction", **config)
    loaded = Loaded(folder, "--num-steps 5")
    assert loaded.model.schedule.timesteps[0] == 999
    batch = loaded.sample()
    losses, _ = loaded.update(batch, [[0, 1], [2, 3]])
    assert torch.tensor(losses).isfinite().all() and batch.trajectory.x.isfinite().all()


@pytest.mark.parametrize("size", [[16, 16], None])
def test_the_size_is_the_pipelines_own(size, tmp_path):
    pipe = make_pipeline()
    pipe.unet.register_to_config(sample_size=size)
    folder = saved(tmp_path, pipe)
    flags = "" if size else "--height 32 --width 48"
    image = Loaded(folder, flags).sample((0,), 1).images[0]
    assert image.size == ((64, 64) if size else (48, 32))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_times_are_those_of_stock_but_0(spacing, tmp_path):
    folder = saved(tmp_path, timestep_spacing=spacing, steps_offset=0)
    loaded = Loaded(folder, "--num-steps 10").model
    loaded.pipe.scheduler.set_timesteps(10)
    expected = loaded.pipe.scheduler.timesteps.clamp(min=1)
    assert torch.equal(loaded.schedule.timesteps, expected)
    assert spacing != "linspace" or loaded.schedule.timesteps[0] == 999


@pytest.mark.parametrize("scale", ["0", "0.5", "1"])
def test_no_guidance_at_1_and_below(scale, tiny):
    loaded = Loaded(tiny, f"--guidance-scale {scale}").model
    assert loaded.conditioning.halves == 1


def test_a_vae_of_another_class(tmp_path):
    pipe = make_pipeline()
    pipe.vae = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        down_block_out_channels=(8, 8, 16),
        up_block_types=("UpDecoderBlock2D",) * 3,
        up_block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=8,
    )
    loaded = Loaded(saved(tmp_path, pipe))
    assert loaded.sample((0,), 1).images[0].size == (64, 64)


def test_sd3_without_its_third_text_encoder(tmp_path):
    parts = make("sd3").components
    parts |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    parts = {
        name: parts[name] for name in parts if name not in ("image_encoder", "feature_extractor")
    }
    StableDiffusion3Pipeline(**parts).save_pretrained(tmp_path)
    assert Loaded(tmp_path).sample((0,), 1).trajectory.x.isfinite().all()


def test_a_folder_with_fp16_files_only(tmp_path):
    make_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert Loaded(tmp_path).sample((0,), 1).trajectory.x.isfinite().all()


def test_weights_with_a_lora_inside_are_refused(tmp_path, tiny):
    Loaded(tiny).model.pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="saved with a LoRA that is not fused.*--init-lora"):
        load_pipeline(str(tmp_path), "fp32")


def test_a_run_begins_from_a_lora(tmp_path, tiny):
    first = Loaded(tiny)
    for weight in first.model.lora:
        torch.nn.init.normal_(weight, std=0.2)
    first.model.save_lora(tmp_path)
    second = Loaded(tiny, f"--init-lora {tmp_path}")
    trained, begun = (
        one.sample(denoiser=denoiser).trajectory.x
        for one, denoiser in ((first, first.model.sampler), (second, second.model.reference))
    )
    torch.testing.assert_close(begun, trained, atol=1e-3, rtol=1e-3)  # fused in float32
    assert (trained - first.sample(denoiser=first.model.reference).trajectory.x).abs().max() > 0.1


def test_a_lora_of_another_model_is_refused(tmp_path, tiny):
    make("sd3").save_pretrained(tmp_path / "sd3")
    Loaded(tmp_path / "sd3").model.save_lora(tmp_path)
    with pytest.raises(UserError, match="--init-lora .* does not fit"):
        Loaded(tiny, f"--init-lora {tmp_path}")


def test_other_pipelines_are_refused_by_name(tmp_path):
    parts = make_pipeline().components
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path)
    for model in (str(tmp_path), pipe):
        with pytest.raises(UserError, match="it is a StableDiffusionImg2ImgPipeline, and this"):
            load_pipeline(model, "fp32")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["unet.mid.to_q.lora_A.weight"], "it is a LoRA.*--init-lora"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "needs network access once"),
    ],
)
def test_one_file_says_what_it_lacks(keys, sentence, tmp_path):
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        load_pipeline(str(tmp_path / "model.safetensors"), "fp32")


def test_prompts_are_encoded_when_they_are_needed(tiny):
    loaded = Loaded(tiny, prompts=[f"a cat {n}" for n in range(20_000)])
    cache = loaded.model.conditioning.cache
    assert len(cache) == 1
    loaded.sample((7, 19_999))
    assert set(cache) == {0, 7, 19_999}


def test_old_prompts_are_forgotten(tiny, monkeypatch):
    loaded = Loaded(tiny)
    monkeypatch.setattr("sd.pipeline.CACHED_BYTES", 1)
    loaded.sample((3, 4))
    assert set(loaded.model.conditioning.cache) == {3, 4}
    assert loaded.sample((0, 1)).images

"""Models that are unlike Stable Diffusion 1.5 in one thing: matched to stock, or refused."""

from argparse import Namespace

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
)
from safetensors.torch import save_file
from sd_helpers import Loaded, make_pipeline, same_images
from tiny_pipelines import make

from sd import UserError, pipeline
from sd.pipeline import decode, encode, fuse_lora, load_pipeline, loading_options


def with_scheduler(kind=DDIMScheduler, **config):
    """A pipeline with another scheduler, or another setting of its own."""
    pipe = make_pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **config)
    return pipe


@pytest.mark.parametrize(
    ("scheduler", "config", "sentence"),
    [
        (
            DPMSolverMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            "DDIM cannot take the place of its DPMSolverMultistepScheduler",
        ),
        (EDMEulerScheduler, {}, "the place of its EDMEulerScheduler"),
        (FlowMatchHeunDiscreteScheduler, {}, "the place of its FlowMatchHeunDiscreteScheduler"),
        (
            EulerDiscreteScheduler,
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "EulerDiscreteScheduler tells the network log",
        ),
        (DDIMScheduler, {"prediction_type": "sample"}, "it predicts 'sample'"),
        (DDIMScheduler, {"thresholding": True}, "clips x_0"),
    ],
)
def test_another_chain_is_refused_by_name(scheduler, config, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        Loaded(tmp_path, model=with_scheduler(scheduler, **config))


@pytest.mark.parametrize(
    ("scheduler", "betas"),
    [(DDPMScheduler, "laplace"), (HeunDiscreteScheduler, "exp")],
)
def test_noise_levels_are_those_of_the_models_own_scheduler(scheduler, betas, tmp_path):
    pipe = with_scheduler(scheduler, beta_schedule=betas, clip_sample=False)
    levels, loaded = pipe.scheduler.alphas_cumprod, Loaded(tmp_path, model=pipe)
    assert type(pipe.scheduler) is DDIMScheduler
    assert torch.equal(pipe.scheduler.alphas_cumprod, levels)
    assert loaded.sample((0,), 1).trajectory.log_prob.isfinite().all()


def test_zero_terminal_snr_is_trained(tmp_path):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe = with_scheduler(prediction_type="v_prediction", **config)
    loaded = Loaded(tmp_path, "--num-steps 5", model=pipe)
    assert loaded.model.schedule.timesteps[0] == 999
    batch = loaded.sample()
    losses, _ = loaded.update(batch, [[0, 1], [2, 3]])
    assert torch.tensor(losses).isfinite().all() and batch.trajectory.x.isfinite().all()


@pytest.mark.parametrize("size", [[16, 16], None])
def test_the_size_is_the_pipelines_own(size, tmp_path):
    pipe = make_pipeline()
    pipe.unet.register_to_config(sample_size=size)
    pipe.save_pretrained(tmp_path)
    flags = "" if size else "--height 32 --width 48"
    image = Loaded(tmp_path, flags).sample((0,), 1).images[0]
    assert image.size == ((64, 64) if size else (48, 32))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_times_are_those_of_stock_but_0(spacing, tmp_path):
    pipe = with_scheduler(timestep_spacing=spacing, steps_offset=0)
    loaded = Loaded(tmp_path, "--num-steps 10", model=pipe).model
    loaded.pipe.scheduler.set_timesteps(10)
    expected = loaded.pipe.scheduler.timesteps.clamp(min=1)
    assert torch.equal(loaded.schedule.timesteps, expected)
    assert spacing != "linspace" or loaded.schedule.timesteps[0] == 999


TINY_VAE = {"latent_channels": 4, "num_decoder_blocks": [1] * 4, "num_encoder_blocks": [1] * 4}
ASYMMETRIC_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "down_block_out_channels": (8, 8, 16),
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "up_block_out_channels": (8, 8, 16),
    "latent_channels": 4,
    "norm_num_groups": 8,
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(AsymmetricAutoencoderKL, ASYMMETRIC_VAE), (AutoencoderTiny, TINY_VAE)],
)
def test_a_vae_of_another_class(kind, settings, tmp_path):
    pipe = make_pipeline()
    pipe.vae = kind(**settings).eval()
    images = Loaded(tmp_path, model=pipe).sample((0,), 1).images
    x_0 = encode(pipe, images, names=["a"])
    pixels = pipe.image_processor.preprocess(images)
    with torch.no_grad():
        output = pipe.vae.encode(pixels)
    latents = output.latents if kind is AutoencoderTiny else output.latent_dist.mean
    torch.testing.assert_close(x_0, latents * pipe.vae.config.scaling_factor)


def test_sd3_without_its_third_text_encoder(tmp_path):
    parts = make("sd3").components
    parts |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    optional = ("image_encoder", "feature_extractor")
    parts = {name: part for name, part in parts.items() if name not in optional}
    StableDiffusion3Pipeline(**parts).save_pretrained(tmp_path)
    assert Loaded(tmp_path).sample((0,), 1).trajectory.x.isfinite().all()
    options = loading_options(str(tmp_path))  # which a run's card prints
    assert options.keys() >= {"text_encoder_3", "tokenizer_3"} and set(options.values()) == {None}
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path, **options)
    assert pipe.text_encoder_3 is None


def test_sdxl_in_fp16_upcasts_its_vae_as_the_stock_pipeline_does(tmp_path):
    pipe = make("sdxl").to(torch.float16)
    conditioning = Namespace(latents=torch.zeros(1, 4, 8, 8, dtype=torch.float16))
    x_0 = 1e4 * torch.randn(1, 4, 8, 8)
    images = decode(pipe, x_0, conditioning, names=["a"])
    half = make("sdxl").vae.half().float()
    with torch.no_grad():
        pixels = half.decode(x_0 / half.config.scaling_factor).sample
    assert same_images(images, pipe.image_processor.postprocess(pixels), 0)
    assert pipe.vae.dtype == torch.float16  # as a stock call expects it
    assert encode(pipe, images, names=["a"]).isfinite().all() and pipe.vae.dtype == torch.float16


def test_a_folder_with_fp16_files_only(tmp_path):
    make_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert Loaded(tmp_path).sample((0,), 1).trajectory.x.isfinite().all()


@pytest.mark.parametrize("has_variant", [True, False])
def test_half_the_download_of_a_hub_id_in_fp16_where_it_exists(has_variant, monkeypatch):
    calls = []

    def from_pretrained(name, variant=None, **options):
        calls.append(variant)
        if variant and not has_variant:
            raise ValueError("no such modeling files are available")
        return variant or "all"

    monkeypatch.setattr(pipeline, "read_config", lambda name: {"_class_name": "FluxPipeline"})
    monkeypatch.setattr(pipeline.FluxPipeline, "from_pretrained", from_pretrained)
    assert load_pipeline("owner/name", "fp16") == ("fp16" if has_variant else "all")
    assert calls == (["fp16"] if has_variant else ["fp16", None])
    assert load_pipeline("owner/name", "bf16") == "all"


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


@pytest.fixture(scope="module")
def lora(tiny):
    """The tensors of a LoRA of the tiny pipeline."""
    model = Loaded(tiny).model
    layers = {f"unet.{name}": weight.clone() for name, weight in model.lora_state().items()}
    model.release()
    return layers


@pytest.mark.parametrize(
    ("part", "other", "sentence"),
    [
        ("", "", None),
        ("text_encoder.", "", None),
        ("mid_block", "mid_blockz", "12 of its 24 matrices have a layer in this model"),
        ("lora_A", "hada_w1_a", "it is a LoHa"),
        ("lora_A", "lokr_w1", "it is a LoKr"),
        ("unet.", "transformer.", "0 of its 24 matrices"),
    ],
)
def test_a_lora_is_fused_whole_or_refused(part, other, sentence, lora, tmp_path):
    changed = {name.replace(part, other): weight for name, weight in lora.items()}
    if part == "text_encoder.":
        ends = {"lora_A": torch.ones(4, 32), "lora_B": torch.ones(32, 4)}
        layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        changed |= {f"{layer}.{end}.weight": weight for end, weight in ends.items()}
    file = tmp_path / "lora.safetensors"
    save_file(changed, file)
    pipe = make_pipeline()
    old = [weight.clone() for weight in pipe.text_encoder.parameters()]
    if sentence is None:
        fuse_lora(pipe, str(file))
        new = pipe.text_encoder.parameters()
        assert all(map(torch.equal, old, new)) == (not part)
    else:
        with pytest.raises(UserError, match=f"does not fit this model .{sentence}"):
            fuse_lora(pipe, str(file))


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
    loaded = Loaded(tiny, prompts=[f"a cat {n}" for n in range(500)])
    cache = loaded.model.conditioning.cache
    assert len(cache) == 1
    loaded.sample((7, 499))
    assert set(cache) == {0, 7, 499}


def test_old_prompts_are_forgotten(tiny, monkeypatch):
    loaded = Loaded(tiny)
    monkeypatch.setattr("sd.pipeline.CACHED_BYTES", 1)
    loaded.sample((3, 4))
    assert set(loaded.model.conditioning.cache) == {3, 4}
    assert loaded.sample((0, 1)).images

"""Stable Diffusion 1.5 at its real size, with random weights: 5 GB of memory, no download."""

import pytest
import torch
from safetensors.torch import load_file
from sd_helpers import run
from transformers import CLIPTextConfig, CLIPTextModel

from sd import model
from sd.bench_models import SD15, build
from sd.files import LORA_FILE
from sd.seeds import RandomPurpose, seeded_generator

FLAGS = """
    --height 64 --width 64 --num-steps 2 --epochs 1 --prompts-per-epoch 1 --batch-size 1
    --eval-images 1 --loss chain --lora-rank 16
"""
# As its text_encoder/config.json has them
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}


@pytest.mark.slow
def test_the_command_trains_sd15_and_stock_diffusers_draws_the_same(
    tmp_path, monkeypatch, no_figures
):
    torch.manual_seed(0)
    pipe = build(SD15, torch.float32, "cpu")
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
    assert sum(weight.numel() for weight in pipe.text_encoder.parameters()) == 123_060_480
    latents, sample = [], model.sample

    def keep_latents(*args, **options) -> model.Batch:
        batch = sample(*args, **options)
        latents.append(batch.trajectory.x[-1])
        return batch

    monkeypatch.setattr(model, "sample", keep_latents)
    out = run(tmp_path, tmp_path / "run", "compressibility", FLAGS, model=pipe, prompts=["a cat"])
    initial, tuned = latents  # of the held-out noise

    lora = load_file(out / "lora" / LORA_FILE)
    layers = {name.partition(".lora")[0] for name in lora}
    assert len(lora) == 192 and len(layers) == 96
    for projection in ("to_q", "to_k", "to_v"):
        assert sum(layer.endswith(projection) for layer in layers) == 32

    def stock_latents() -> torch.Tensor:
        generator = seeded_generator(0, RandomPurpose.HELD_OUT, 0)
        return pipe(
            "a cat",
            latents=torch.randn(1, 4, 8, 8, generator=generator),
            generator=[generator],
            eta=1.0,
            num_inference_steps=2,
            guidance_scale=3,
            output_type="latent",
        ).images

    assert (stock_latents() - initial).abs().max() < 1e-6
    pipe.load_lora_weights(out / "lora")
    assert (stock_latents() - tuned).abs().max() < 1e-6
    assert (tuned - initial).abs().max() > 1e-3

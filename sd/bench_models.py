"""The architectures of SD 1.5, SDXL and SD 3 as numbers, with random weights or none: no download.

What a network is given has the shapes of the real one. A text encoder has one layer, and its words
are the emoji model's. SD 3 goes without T5, as its stock pipeline can: that part of the text is
zeros.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sd.pipeline import NETWORKS, map_tensors
from toy.emoji_sd import models

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
MAX_TOKENS = 77  # of CLIP


class Architecture(NamedTuple):
    """What a model is beside its weights."""

    kind: type[DiffusionPipeline]
    latents: int  # their height and width; pixels are DOWN times as many
    network: dict  # as the class of the network takes it
    vae: dict
    text: tuple[int, ...]  # widths of its CLIP encoders

    @property
    def pixels(self) -> int:
        return self.latents * 2 ** (len(self.vae["block_out_channels"]) - 1)


def vae(*widths: int, layers: int = 2, **options) -> dict:
    levels = len(widths)
    return {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        **options,
    }


VAE = 128, 256, 512, 512
SD15 = Architecture(
    StableDiffusionPipeline,
    latents=64,
    network={
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    vae=vae(*VAE),
    text=(768,),
)
SDXL = Architecture(
    StableDiffusionXLPipeline,
    latents=128,
    network={
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=vae(*VAE, scaling_factor=0.13025),
    text=(768, 1280),
)
SD3 = Architecture(
    StableDiffusion3Pipeline,
    latents=128,
    network={
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    vae=vae(
        *VAE,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    text=(768, 1280),
)
ARCHITECTURES = {"SD 1.5": SD15, "SDXL": SDXL, "SD 3 medium": SD3}
NARROW = {
    SD15.kind: {
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    },
    SDXL.kind: {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    SD3.kind: {
        "num_layers": 2,
        "num_attention_heads": 1,
        "caption_projection_dim": 64,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
}


def small(architecture: Architecture) -> Architecture:
    """The same blocks with few channels and layers, on small latents, for a trial on a CPU."""
    network = architecture.network | NARROW[architecture.kind]
    narrow_vae = architecture.vae | vae(32, 32, 32, 32, layers=1)
    text = (32,) * len(architecture.text)
    return architecture._replace(latents=8, network=network, vae=narrow_vae, text=text)


def clip(width: int, kind: type = CLIPTextModelWithProjection) -> nn.Module:
    config = models.text_encoder(models.tokenizer(), tiny=True).config
    widths = dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), width)
    config.update({**widths, "max_position_embeddings": MAX_TOKENS})
    return kind(config)


def build(
    architecture: Architecture, dtype: torch.dtype, device: str | torch.device
) -> DiffusionPipeline:
    """A pipeline with random weights, made in this dtype; on the device "meta" without data."""
    kind, size = architecture.kind, architecture.latents
    has_unet = NETWORKS[kind] == "unet"
    network_class = UNet2DConditionModel if has_unet else SD3Transformer2DModel
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # in float32 first, the largest would not fit
    try:
        with torch.device(device):
            network = network_class(sample_size=size, **architecture.network)
            autoencoder = AutoencoderKL(**architecture.vae)
    finally:
        torch.set_default_dtype(usual)
    words = models.tokenizer()
    words.model_max_length = MAX_TOKENS
    scheduler = models.scheduler() if has_unet else FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {NETWORKS[kind]: network, "vae": autoencoder, "scheduler": scheduler}
    first_class = CLIPTextModel if has_unet else CLIPTextModelWithProjection
    classes = first_class, CLIPTextModelWithProjection
    for end, width, text_class in zip(("", "_2"), architecture.text, classes, strict=False):
        parts |= {f"tokenizer{end}": words, f"text_encoder{end}": clip(width, text_class)}
    if kind is StableDiffusionPipeline:
        absent = dict.fromkeys(("safety_checker", "feature_extractor"))
        parts |= {**absent, "requires_safety_checker": False}
    if kind is StableDiffusion3Pipeline:
        parts |= dict.fromkeys(("tokenizer_3", "text_encoder_3"))
    pipe = kind(**parts)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)
    return pipe


# Without data: torch's meta device


class ToReal(torch.autograd.Function):
    """Zeros for a tensor without data, and gradients without data for real ones."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(gradient, device="meta")


def take_real(pipe: DiffusionPipeline) -> None:
    """Let a network on the meta device take and give real tensors, and stay where it is."""
    network = getattr(pipe, NETWORKS[type(pipe)])
    kind = type(network)

    @wraps(kind.forward)
    def without_data(network, *args, **kwargs):
        inputs = map_tensors(lambda x: x.to("meta"), {**dict(enumerate(args)), **kwargs})
        args = [inputs.pop(n) for n in range(len(args))]
        output = kind.forward(network, *args, **{**inputs, "return_dict": False})[0]
        return (ToReal.apply(output.float()),)

    # As the class's, for `load_model` drops what accelerate puts on the instance
    network.__class__ = type(kind.__name__, (kind,), {"forward": without_data})
    network.to = lambda *_, **__: network
    pipe.to = lambda *_, **__: pipe


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:
    """A GPU's kernel; on the meta device torch would choose to hold every attention matrix."""
    return CPU_ATTENTION(q, k, v)[0]


@contextmanager
def without_data(architecture: Architecture) -> Iterator[Callable[[], DiffusionPipeline]]:
    """Inside, what this makes are pipelines in fp16 whose network and VAE have shapes alone."""

    def load() -> DiffusionPipeline:
        pipe = build(architecture, torch.float16, "meta")
        take_real(pipe)
        return pipe

    cpu = torch.device("cpu")  # where others shall put the inputs of a network
    with ExitStack() as patches:
        for kind in (DiffusionPipeline, ModelMixin):
            patches.enter_context(mock.patch.object(kind, "device", cpu))
        attention = mock.patch.object(F, "scaled_dot_product_attention", flash_attention)
        patches.enter_context(attention)
        yield load

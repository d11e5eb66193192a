"""Small random pipelines of four families, with tokenizers made on the spot: nothing is downloaded.

Zero-initialised layers are randomised, so that the output depends on every input.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from sd_helpers import make_pipeline
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from toy.emoji_sd import models


def clip(width: int, kind=CLIPTextModelWithProjection, act: str = "quick_gelu"):
    words = models.tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return words, kind(config)


def t5():
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    words = T5Tokenizer(vocab=[*pieces, ("\u2581a", -2.0)], extra_ids=0)
    config = T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return words, T5EncoderModel(config)


def vae(channels: int = 4, **options) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        latent_channels=channels,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        **options,
    )


def sd():
    return make_pipeline()


def sd_v():
    pipe = make_pipeline()
    v = {"prediction_type": "v_prediction"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **v)
    return pipe


def sdxl():
    (words, one), (words_2, two) = clip(32, CLIPTextModel), clip(32, act="gelu")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=words,
        tokenizer_2=words_2,
        unet=unet,
        scheduler=scheduler,
    )


def sd3():
    (words, one), (words_2, two), (words_3, three) = clip(16), clip(16), t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(8, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words_2,
        text_encoder_3=three,
        tokenizer_3=words_3,
    )


def flux():
    (words, one), (words_2, two) = clip(32, CLIPTextModel), t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words_2,
        transformer=transformer,
    )


FAMILIES = {"sd": sd, "sd_v": sd_v, "sdxl": sdxl, "sd3": sd3, "flux": flux}
SIZE_FLAGS = {"flux": "--height 32 --width 32"}  # its default is large


def make(family: str):
    torch.manual_seed(0)
    pipe = FAMILIES[family]()
    network = getattr(pipe, "unet", None) or pipe.transformer
    noise = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        if weight.ndim > 1 and weight.abs().max() == 0:
            weight.data.normal_(0, 0.2, generator=noise)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()  # as a pipeline that is loaded
    pipe.set_progress_bar_config(disable=True)
    return pipe

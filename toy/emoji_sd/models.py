"""The parts of a small Stable Diffusion: tokenizer, text encoder, VAE, UNet, scheduler."""

from collections import Counter

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from toy.emoji_sd.render import NAMES, SIZE

COLOURS = "red orange yellow green blue purple pink brown black white grey gray".split()
WORDS = [*NAMES, "a", "an", "hand", *COLOURS]  # whole tokens; digits are in CLIP's alphabet
MAX_TOKENS = 16  # of a prompt, start and end included; what is longer is cut off
DOWN = 4  # pixels per latent, in height and in width


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, merged until each of WORDS is a token.

    Other text falls into their parts and letters.
    """
    alphabet = list(bytes_to_unicode().values())
    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS]
    merges = []
    while any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        words = [merge(word, pair) for word in words]
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols of a word after one BPE merge: each neighbouring `pair` becomes one symbol."""
    merged = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def text_encoder(words: CLIPTokenizer, tiny: bool = False) -> CLIPTextModel:
    width = 32 if tiny else 96
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=1 if tiny else 2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(config)


def vae(tiny: bool = False) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(8, 8, 16) if tiny else (32, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )


def unet(tiny: bool = False) -> UNet2DConditionModel:
    """Attention at 8x8 and 4x4 latents only: at 16x16 it would double the time of a step."""
    return UNet2DConditionModel(
        sample_size=SIZE // DOWN,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 16, 16) if tiny else (64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if tiny else 96,
        attention_head_dim=4,  # the number of heads, in spite of its name (SD 1.5 too)
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's, made for DDIM."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="epsilon",
    )


def pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokens(words: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token numbers (B, MAX_TOKENS) of the prompts, padded as the pipeline pads them."""
    encoded = words(
        prompts,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids

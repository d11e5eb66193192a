"""What is known of a model before it is loaded; cheap to import, unlike sd/pipeline.py."""

import json
import os
from functools import cache
from pathlib import Path

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Settings by pipeline class; beside Stable Diffusion none is measured here
PRESETS = {
    "StableDiffusionXLPipeline": {"guidance_scale": 5.0},  # the stock pipeline's
    "StableDiffusion3Pipeline": {"guidance_scale": 4.5},  # flow_grpo's, at 512x512
    "FluxPipeline": {"guidance_scale": 3.5},  # the stock pipeline's
}


def pipeline_name(model: str) -> str | None:
    """The class that a folder or hub id says it is, where that can be read."""
    config = read_config(model)
    return None if isinstance(config, Exception) else config["_class_name"]


@cache
def read_config(model: str) -> dict | Exception:
    """model_index.json of a folder or hub id, or why not: without network the hub takes minutes."""
    try:
        if os.path.isdir(model):
            file = Path(model) / "model_index.json"
        elif model.count("/") > 1 or model[:1] in "./~" or os.path.exists(model):
            raise FileNotFoundError("there is no such folder")  # a hub id is a name, or owner/name
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(model, "model_index.json"))
        return {"_class_name": None} | json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # the hub's client raises many kinds
        return error

"""Stock diffusers pipelines: load one, or refuse it; ask it for its conditioning; decode, encode.

A pipeline is asked, not rebuilt: a hook on its network notes the arguments of the first pass and
stops it. So a family needs no code of its own, but for how its latents are packed.
"""

import inspect
import os
import re
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from sd import UserError
from sd.families import DTYPES, read_config

NETWORKS = {  # of what can be trained; pipelines alike may call their network twice a step
    StableDiffusionPipeline: "unet",
    StableDiffusionXLPipeline: "unet",
    StableDiffusion3Pipeline: "transformer",
    FluxPipeline: "transformer",
}
# Samplers of one and the same process, x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
SCHEDULERS = """
    DDIM DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete
    HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep
    DPMSolverSDE UniPCMultistep DEISMultistep SASolver
""".split()
SINGLE_FILES = {  # by diffusers' name of what a checkpoint holds
    "v1": StableDiffusionPipeline,
    "v2": StableDiffusionPipeline,
    "xl_base": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "sd35_medium": StableDiffusion3Pipeline,
    "sd35_large": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}
OTHER_ADAPTERS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "ia3_": "IA3"}
UNFUSED = "a LoRA that is not fused: call fuse_lora() and unload_lora_weights() before"
CACHED_BYTES = 5e8  # of conditioning that is kept


def load_pipeline(model: str | DiffusionPipeline, precision: str) -> DiffusionPipeline:
    """A pipeline of the hub, a folder or a .safetensors file, or a loaded one, in this precision.

    Raises UserError where it cannot be loaded or trained.
    """
    dtype = DTYPES[precision]
    try:
        if isinstance(model, DiffusionPipeline):
            return accept(model, dtype)
        if model.endswith(".safetensors"):
            return load_single_file(model, dtype)
        options, kind = loading_options(model), pipeline_class(model)
        if precision == "fp16" and not os.path.exists(model):  # half the download, where it exists
            with suppress(ValueError):
                return kind.from_pretrained(model, dtype=dtype, **options, variant="fp16")
        return kind.from_pretrained(model, dtype=dtype, **options)
    except Exception as error:  # the hub's client raises many kinds
        name, remedy = f"--model {model}", "it needs network access; or give a folder"
        if isinstance(model, DiffusionPipeline):
            name, remedy = "the pipeline", "give another"
        elif os.path.exists(model):
            remedy = f"give another {'file' if os.path.isfile(model) else 'folder'}"
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name} cannot be loaded: {remedy} ({reason})") from error


def accept(pipe: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """A loaded pipeline, moved to this dtype. ValueError where it cannot be trained."""
    network = getattr(pipe, NETWORKS[class_by_name(type(pipe).__name__)])
    if getattr(network, "peft_config", None):
        raise ValueError(f"it has {UNFUSED}")
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()  # one that was made, not loaded, may have dropout
    return pipe if network.dtype == dtype else pipe.to(dtype)


def loading_options(name: str) -> dict:
    """What from_pretrained needs beside the name of a folder or hub id; for a file, nothing.

    Raises ValueError for weights with a LoRA inside, and what the hub's client raises.
    """
    if name.endswith(".safetensors"):
        return {}
    kind = pipeline_class(name)
    options = {part: None for part, value in read_config(name).items() if value == [None, None]}
    if kind is StableDiffusionPipeline:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    files = sorted((Path(name) / NETWORKS[kind]).glob("*.safetensors"))
    if files and all(".fp16." in file.name for file in files):
        options["variant"] = "fp16"
    if any("lora_" in key for key in tensor_names(files)):
        raise ValueError(f"it was saved with {UNFUSED}; or give it as --init-lora")
    return options


def tensor_names(files: list[Path]) -> list[str]:
    """Names of the tensors in the first of some files, if it is a .safetensors file."""
    if not files or files[0].suffix != ".safetensors":
        return []
    with safe_open(files[0], "pt") as weights:
        return list(weights.keys())


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """The class of a folder or hub id. Raises ValueError for one that cannot be trained."""
    config = read_config(name)
    if isinstance(config, Exception):
        raise config
    return class_by_name(config["_class_name"])


def class_by_name(name: str) -> type[DiffusionPipeline]:
    classes = {kind.__name__: kind for kind in NETWORKS}
    if name not in classes:
        raise ValueError(f"it is a {name}, and this script trains {', '.join(classes)}")
    return classes[name]


def load_single_file(file: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline from one checkpoint, such as a community model; its class is read off its keys."""
    if not os.path.isfile(file):
        raise ValueError("there is no such file")
    weights = single_file_utils.load_single_file_checkpoint(file)
    if any("lora" in key for key in weights):
        raise ValueError("it is a LoRA: give its model, and this with --init-lora")
    family = single_file_utils.infer_diffusers_model_type(weights).partition("-")[0]
    if family not in SINGLE_FILES:
        raise ValueError(f"it holds a '{family}', and this script trains {', '.join(SINGLE_FILES)}")
    try:
        return SINGLE_FILES[family].from_single_file(file, torch_dtype=dtype)
    except Exception as error:
        raise ValueError(
            f"a single file needs network access once, for the settings that it lacks: {error}"
        ) from error


def fuse_lora(pipe: DiffusionPipeline, path: str) -> None:
    """Put a LoRA into the weights for good. Raises UserError where not all of it fits."""
    try:
        file = Path(path)
        files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
        for mark, kind in OTHER_ADAPTERS.items():
            if any(mark in name for name in tensor_names(files)):
                raise ValueError(f"it is a {kind}, and only a LoRA can be fused")
        state = pipe.lora_state_dict(path)
        tensors = state[0] if isinstance(state, tuple) else state
        pipe.load_lora_weights(path)
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        names = [name for part in parts for name, _ in part.named_parameters()]
        matrices, placed = (sum(map(is_lora_matrix, some)) for some in (tensors, names))
        if placed < matrices:
            raise ValueError(f"{placed} of its {matrices} matrices have a layer in this model")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--init-lora {path} does not fit this model ({reason}): give a LoRA of it"
        ) from error


def is_lora_matrix(name: str) -> bool:
    """Whether a tensor is a LoRA's matrix; the names are diffusers', old and new."""
    return bool(re.search(r"lora.*[._](A|B|down|up)\b.*weight$", name))


def prediction_of(pipe: DiffusionPipeline) -> str:
    """What the network predicts: epsilon, v_prediction or flow.

    Raises UserError where its chain is not one that d3po.py knows.
    """
    name, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    prediction = config.get("prediction_type", "epsilon")
    if name.removesuffix("Scheduler") not in SCHEDULERS or config.get("use_flow_sigmas"):
        problem = f"DDIM cannot take the place of its {name}"
    elif config.get("timestep_type") == "continuous":
        problem = f"its {name} tells the network log(sigma) / 4, not the number of a noise level"
    elif prediction not in ("epsilon", "v_prediction"):
        problem = f"it predicts '{prediction}', not epsilon, v or a flow"
    elif config.get("thresholding") or config.get("clip_sample"):
        problem = f"its {name} clips x_0, which no Gaussian step does"
    else:
        return prediction
    raise UserError(f"This model cannot be trained, choose another: {problem}")


def as_ddim(scheduler: SchedulerMixin) -> DDIMScheduler:
    """DDIM on the noise levels of the scheduler of an epsilon or v model."""
    return DDIMScheduler.from_config(scheduler.config, **ddim_options(scheduler))


def ddim_options(scheduler: SchedulerMixin) -> dict:
    """What DDIM needs beside the settings of another scheduler."""
    options = {"set_alpha_to_one": False, "clip_sample": False}  # DDIM's own defaults are True
    if scheduler.config.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        options["trained_betas"] = scheduler.betas.tolist()  # it makes no others
    return options


# Conditioning


class FirstPass(Exception):
    """Ends a stock pipeline's call at the first pass of its network."""


class Conditioning:
    """What a stock pipeline gives its network for each prompt, by number; encoded when needed.

    options: of the pipeline's call: steps, guidance, height and width.
    """

    def __init__(self, pipe: DiffusionPipeline, prompts: list[str], **options):
        self.pipe, self.prompts, self.options = pipe, prompts, options
        self.network = getattr(pipe, NETWORKS[type(pipe)])
        self.signature = inspect.signature(self.network.forward)
        self.device, self.cache = pipe.device, {}
        self.last_numbers = self.last_inputs = None  # of `batch`
        self.first = self.inputs([0])[0]
        self.latents = self.first["latents"]  # (halves of guidance, *D)
        self.halves = len(self.latents)
        self.dtype = self.latents.dtype  # of what the network is given
        start = pipe.scheduler.timesteps[0].item()
        self.time_unit = self.first["timestep"].flatten()[0].item() / start  # of the network's time

    def inputs(self, numbers: list[int]) -> list[dict]:
        """The network's arguments at the first step, on the CPU, for each of these prompts."""
        missing = [number for number in dict.fromkeys(numbers) if number not in self.cache]
        if missing:
            self.move_text_encoders(self.device)
            for number in tqdm(missing, "encode prompts", unit=" prompts", delay=2, leave=False):
                self.cache[number] = self.record(self.prompts[number])
            self.move_text_encoders("cpu")
            self.forget(keep=numbers)
        return [self.cache[number] for number in numbers]

    def record(self, prompt: str) -> dict:
        arguments = {}

        def note(network, args, kwargs):
            bound = self.signature.bind(*args, **kwargs).arguments
            first = next(iter(bound))
            arguments.update({**bound, "latents": bound[first]})
            del arguments[first]
            raise FirstPass

        with self.network.register_forward_pre_hook(note, with_kwargs=True), suppress(FirstPass):
            self.pipe(prompt, **self.options)
        return map_tensors(Tensor.cpu, arguments)

    def forget(self, keep: list[int]) -> None:
        """Drop the oldest prompts beyond CACHED_BYTES that are not needed now."""
        sizes = []
        map_tensors(lambda tensor: sizes.append(tensor.nbytes), self.cache[keep[0]])
        for number in list(self.cache):
            if len(self.cache) * sum(sizes) > CACHED_BYTES and number not in keep:
                del self.cache[number]

    def move_text_encoders(self, device) -> None:
        for name, part in self.pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)

    def batch(self, numbers: Tensor) -> dict:
        """The arguments for a batch (B,); where there is guidance, the empty prompt's rows first.

        What has no row for each half is alike for all prompts: Flux's positions. All steps of a
        batch have one tensor of numbers, so its arguments are put together, and moved, once.
        """
        if numbers is not self.last_numbers:
            self.last_numbers, self.last_inputs = numbers, self.stack(numbers)
        return {**self.last_inputs}

    def stack(self, numbers: Tensor) -> dict:
        unique, place = numbers.unique(return_inverse=True)

        def rows(*values: Tensor) -> Tensor:
            dtype = self.dtype if values[0].dtype == self.latents.dtype else None
            if values[0].shape[:1] != (self.halves,):
                return values[0].to(numbers.device, dtype)
            stacked = torch.stack(values, 1).to(numbers.device, dtype)  # (halves, prompts, ...)
            return stacked[:, place].flatten(0, 1)

        inputs = map_tensors(rows, *self.inputs(unique.tolist()))
        del inputs["latents"]
        return inputs


def map_tensors(function: Callable, *trees):
    """Apply a function to the tensors at one place of nested dicts; the rest is the first's."""
    if isinstance(trees[0], dict):
        return {key: map_tensors(function, *(tree[key] for tree in trees)) for key in trees[0]}
    return function(*trees) if torch.is_tensor(trees[0]) else trees[0]


# Images and latents


@torch.no_grad()
def decode(
    pipe: DiffusionPipeline, x_0: Tensor, conditioning: Conditioning, *, names: list[str]
) -> list[Image.Image]:
    """The images of final states (B, *D); names (B,): what an error calls them.

    Raises UserError where one is not finite.
    """
    check_finite(x_0, names, "the network", conditioning.latents.dtype)
    if isinstance(pipe, FluxPipeline):  # its latents are rows of 2x2 patches
        rows, columns = (conditioning.first["img_ids"].amax(0)[1:].int() + 1).tolist()
        patch = 2 * pipe.vae_scale_factor
        x_0 = pipe._unpack_latents(x_0, rows * patch, columns * patch, pipe.vae_scale_factor)
    with upcast_vae(pipe) as vae:
        scale, shift = latent_scale(vae, x_0.device)
        latents = (x_0.to(vae.dtype) / scale + shift).to(vae.dtype)
        pixels = vae.decode(latents).sample
        check_finite(pixels, names, "the VAE's decoder", vae.dtype)
    return pipe.image_processor.postprocess(pixels, output_type="pil")


@torch.no_grad()
def encode(pipe: DiffusionPipeline, images: list[Image.Image], *, names: list[str]) -> Tensor:
    """Final states x_0 (B, *D) of images of the model's own size: the inverse of `decode`."""
    with upcast_vae(pipe) as vae:
        pixels = pipe.image_processor.preprocess(images).to(vae.device, vae.dtype)
        output = vae.encode(pixels)
        latents = output.latents if "latents" in output else output.latent_dist.mode()
        check_finite(latents, names, "the VAE's encoder", vae.dtype)
    latents = latents.float()
    scale, shift = latent_scale(pipe.vae, latents.device)
    x_0 = (latents - shift) * scale
    return pipe._pack_latents(x_0, *x_0.shape) if isinstance(pipe, FluxPipeline) else x_0


@contextmanager
def upcast_vae(pipe: DiffusionPipeline):
    """The VAE; inside, SDXL's is float32 where fp16 overflows, as in its stock pipeline."""
    vae = pipe.vae
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    if not isinstance(pipe, StableDiffusionXLPipeline) or not overflows:
        yield vae
        return
    vae.float()
    try:
        yield vae
    finally:
        vae.half()


def check_finite(values: Tensor, names: list[str], part: str, dtype: torch.dtype) -> None:
    """Raise UserError where values (B, ...) of images, made by a part, are not finite."""
    finite = values.flatten(1).isfinite().all(1).tolist()
    if all(finite):
        return
    broken = [f"number {n} ({name})" for n, name in enumerate(names, 1) if not finite[n - 1]]
    listed = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
    precision = next(name for name, kind in DTYPES.items() if kind == dtype)
    remedy = "--precision fp32"
    if precision == "fp32":
        remedy = "another --model if nothing is trained yet"
    raise UserError(
        f"{len(broken)} of {len(names)} images are not finite: {listed}. What {part} gave in "
        f"{precision} is NaN or infinite. Nothing of them is kept; start a new run with a lower "
        f"--lr, or {remedy}",
        new_run=True,
    )


def latent_scale(vae: nn.Module, device) -> tuple:
    """Scale and shift between the network's latents and the VAE's; by channel where it has them."""
    config = vae.config
    scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
    if config.get("latents_mean") and config.get("latents_std"):
        shift = torch.tensor(config.latents_mean, device=device).view(-1, 1, 1)
        scale = scale / torch.tensor(config.latents_std, device=device).view(-1, 1, 1)
    return scale, shift

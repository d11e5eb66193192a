"""A pipeline as a policy: against diffusers' own pipeline and scheduler, and the UNet by hand."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from sd_helpers import PROMPTS, Loaded, make_pipeline, noises, same_images

import d3po
from sd import UserError, model, options
from sd.families import DTYPES
from sd.pipeline import map_tensors
from sd.seeds import RandomPurpose, seeded_generator


def embeddings(loaded: model.Model, numbers: list[int]) -> torch.Tensor:
    """Of these prompts (B, halves, L, C); where there is guidance, the empty one's first."""
    inputs = loaded.conditioning.inputs(numbers)
    return torch.stack([one["encoder_hidden_states"] for one in inputs])


def randomise_lora(loaded: model.Model) -> None:
    noise = torch.Generator().manual_seed(0)
    for weight in loaded.lora:
        torch.nn.init.normal_(weight, std=0.05, generator=noise)


def count_rows(unet) -> list[int]:
    """How many rows each call of the UNet has from now on."""
    rows = []
    unet.register_forward_hook(lambda unet, inputs, output: rows.append(len(inputs[0])))
    return rows


# The policy


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_guidance_is_that_of_two_calls_but_takes_one(tiny, precision):
    loaded, ticks = Loaded(tiny, f"--precision {precision}"), []
    unet, text = loaded.model.network, embeddings(loaded.model, [1, 3, 4])
    assert unet.dtype == text.dtype == DTYPES[precision]
    loaded.model.policy.on_call = lambda: ticks.append(1)
    x, time, chosen = torch.randn(3, 4, 16, 16), torch.tensor([900] * 3), torch.tensor([1, 3, 4])
    x[1] = x[0]  # equal rows go through the UNet all the same
    rows = count_rows(unet)
    with torch.no_grad():
        out = loaded.model.policy(x, time, chosen)
        assert rows == [6] and len(ticks) == 1
        empty, prompted = (
            unet(x.to(unet.dtype), time, half).sample.float() for half in text.unbind(1)
        )
    assert out.dtype == torch.float32
    # bf16 has three digits; guidance trebles the error
    tolerance = 1e-5 if precision == "fp32" else 0.03
    expected = empty + 3 * (prompted - empty)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
    assert (prompted - empty).abs().max() > 2 * tolerance  # so the test sees the guidance


@pytest.mark.parametrize("scale", [0.5, 1])
def test_at_scale_1_and_below_the_empty_prompt_is_left_out(tiny, scale):
    loaded = Loaded(tiny, guidance_scale=scale)
    unet, text = loaded.model.network, embeddings(loaded.model, [1, 3])[:, 0]
    x, time = torch.randn(2, 4, 16, 16), torch.tensor([900, 300])
    rows = count_rows(unet)
    with torch.no_grad():
        out = loaded.model.policy(x, time, torch.tensor([1, 3]))
        assert torch.equal(out, unet(x, time, text).sample)
    assert rows == [2, 2]


def test_the_lora_is_back_on_after_an_error(tiny):
    loaded = Loaded(tiny)
    loaded.update(loaded.sample(), [[0, 1], [3, 2]])
    unet, cond = loaded.model.network, torch.tensor([1])
    x, time = torch.randn(1, 4, 16, 16), torch.tensor([900])
    with torch.no_grad():
        tuned = loaded.model.sampler(x, time, cond)
        with pytest.raises(RuntimeError, match="no luck"), model.lora_off(unet):
            untrained = loaded.model.sampler(x, time, cond)
            raise RuntimeError("no luck")
        assert torch.equal(loaded.model.sampler(x, time, cond), tuned)
        with pytest.raises(RuntimeError):  # of the UNet itself, as where memory runs out
            loaded.model.reference(x[:, :3], time, cond)
        assert torch.equal(loaded.model.sampler(x, time, cond), tuned)
        assert torch.equal(loaded.model.reference(x, time, cond), untrained)
    assert not torch.equal(tuned, untrained)


# Sampling


def as_ddim(pipe: StableDiffusionPipeline, **changes) -> StableDiffusionPipeline:
    """With the scheduler that sd_demo.py samples with."""
    changes |= {"set_alpha_to_one": False, "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, args, prompts: list[str], *numbers, K: int) -> list:
    """Of the pipeline itself: diffusers draws the noise of the steps as d3po.rollout does."""
    side = pipe.unet.config.sample_size
    generators = noises(*numbers, groups=len(prompts), K=K)
    x_T = torch.stack([torch.randn(4, side, side, generator=g) for g in generators[::K]])
    return pipe(
        [prompt for prompt in prompts for _ in range(K)],
        latents=x_T.repeat_interleave(K, 0),
        generator=generators,
        eta=args.eta,
        num_inference_steps=args.num_steps,
        guidance_scale=args.guidance_scale,
    ).images


VARIANTS = {  # changes of the scheduler
    "SD 1.5": {},
    "v": {"prediction_type": "v_prediction"},
    "PNDM": {"skip_prk_steps": True},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    "8x8, eta": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_are_those_of_the_stock_pipeline(tmp_path, variant, capsys):
    pipe = make_pipeline(**({"sample_size": 8} if variant == "8x8, eta" else {}))
    scheduler = PNDMScheduler if variant == "PNDM" else DDIMScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **VARIANTS[variant])
    pipe.save_pretrained(tmp_path)
    loaded = Loaded(tmp_path, "--eta 0.5" if "eta" in variant else "")
    is_replaced = variant in ("PNDM", "trailing")
    assert ("Scheduler: DDIM" in capsys.readouterr().out) == is_replaced
    batch = loaded.sample((1, 3), 2, 1, 2)
    prompts = [PROMPTS[n] for n in (1, 3)]
    assert batch.prompts == [prompts[0]] * 2 + [prompts[1]] * 2
    assert batch.groups == [range(0, 2), range(2, 4)]
    pipe = as_ddim(StableDiffusionPipeline.from_pretrained(tmp_path))
    images = stock_images(pipe, loaded.args, prompts, 0, 1, 2, K=2)
    assert images[0].size == ((32, 32) if "8x8" in variant else (64, 64))
    assert same_images(batch.images, images)
    assert not same_images(images[:1], images[1:2], 3)  # one x_T, but other noise on the way


def held_out(loaded, purpose=RandomPurpose.HELD_OUT) -> tuple[list, list, float | None]:
    return model.sample_held_out(loaded.model, loaded.model.sampler, loaded.args, purpose=purpose)


def test_held_out_images_have_the_prompts_in_turn_and_fixed_noises(tiny):
    loaded = Loaded(tiny, "--eval-images 7 --seed 3", max_kl=None)
    images, prompts, kl = held_out(loaded)
    assert kl is None  # without --max-kl nobody needs it
    assert prompts == [*PROMPTS, *PROMPTS[:2]] and len(images) == 7
    other, *_ = held_out(loaded, RandomPurpose.EVALUATION)
    assert not same_images(images[:1], other[:1], 3)
    alone = model.sample(
        loaded.model,
        loaded.model.sampler,
        torch.tensor([4]),
        images_per_prompt=1,
        generators=[seeded_generator(3, RandomPurpose.HELD_OUT, 4)],
    )
    assert same_images(alone.images, images[4:5])


def test_noise_belongs_to_the_image_however_many_are_sampled_together(tiny, monkeypatch):
    results = []
    monkeypatch.setattr(model, "STOCK_IMAGES", 3)
    loaded = Loaded(tiny, "--eval-images 6 --max-kl 9")
    randomise_lora(loaded.model)
    rows = count_rows(loaded.model.network)
    for together in (128, 2):
        monkeypatch.setattr(model, "ELEMENTS_WITHOUT_GRADIENT", together * 2048)
        rows.clear()
        images, _, kl = held_out(loaded)
        assert max(rows) == 2 * min(6, together)  # guided: two rows an image
        stock, _ = model.sample_stock(loaded.model, loaded.model.sampler, loaded.args)
        results.append((images, stock, kl))
    (images, stock, kl), (images_2, stock_2, kl_2) = results
    assert same_images(images_2, images) and same_images(stock_2, stock)
    assert kl_2 == pytest.approx(kl, rel=1e-3) and abs(kl) > 0.01
    assert not same_images(images[:1], images[5:], 3)  # the same prompt, other noise


# The LoRA


def test_the_lora_is_float32_on_queries_keys_and_values_alone(tiny):
    loaded = Loaded(tiny, "--precision bf16 --lora-rank 3").model
    unet = loaded.pipe.unet
    adapted = {name for name, part in unet.named_modules() if isinstance(part, LoraLayer)}
    plain = StableDiffusionPipeline.from_pretrained(tiny).unet
    layers = {name for name, _ in plain.named_modules() if name.endswith(("to_q", "to_k", "to_v"))}
    assert adapted == layers and len(loaded.lora) == 2 * len(layers)
    assert {weight.dtype for weight in loaded.lora} == {torch.float32}
    assert all(3 in weight.shape for weight in loaded.lora)
    trained = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    assert len(trained) == len(loaded.lora) and all(".lora_" in name for name in trained)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_training_the_policy_is_the_reference_exactly(tiny, precision):
    loaded = Loaded(tiny, f"--precision {precision}")
    batch = loaded.sample()
    reference = loaded.reference_log_prob(batch)
    assert reference.dtype == torch.float32
    assert torch.equal(reference, loaded.log_prob(batch))
    assert torch.equal(reference, batch.trajectory.log_prob)
    losses = d3po.d3po_losses(
        loaded.model.policy,
        loaded.model.schedule,
        batch.trajectory,
        pairs=torch.tensor([[0, 1]]),
        beta=0.05,
        ref_log_prob=reference,
        cond=batch.cond,
    )
    # Two of four chains in a batch: float32 rounds sums of 1,024 terms otherwise, by 1e-3 nats
    tolerance = 1e-4 if precision == "fp32" else 0.05
    assert next(losses).item() == pytest.approx(math.log(2), abs=tolerance)


# Half precision


def test_rounding_kl_is_that_between_bf16_and_a_model_in_float32_with_its_weights(tiny):
    run = Loaded(tiny, "--precision bf16 --num-steps 2")
    pipe = StableDiffusionPipeline.from_pretrained(tiny, dtype=torch.bfloat16)
    exact = Loaded(tiny, "--num-steps 2", model=pipe.to(torch.float32)).model
    half = run.model
    for loaded in (half, exact):
        randomise_lora(loaded)
    batch = run.sample((0,))
    cached = half.conditioning.cache
    exact.conditioning.cache = {0: map_tensors(torch.Tensor.float, cached[0])}
    expected, log_prob = 0.0, half.log_prob(half.sampler, batch)
    for i in range(2):
        x, sigma = batch.trajectory.x[i], half.schedule.sigma[i]
        with torch.no_grad():
            rounded, own = (
                d3po.policy_mean(loaded.sampler, loaded.schedule, i, x, batch.cond)
                - d3po.policy_mean(loaded.reference, loaded.schedule, i, x, batch.cond)
                for loaded in (half, exact)
            )
        expected += (rounded - own).square().sum() / (2 * sigma**2) / len(x)
    assert half.rounding_kl(batch, 2) == pytest.approx(expected.item(), rel=0.03) and expected > 0
    assert torch.equal(half.log_prob(half.sampler, batch), log_prob)  # it is bf16 again
    assert exact.rounding_kl(batch, 2) == 0


def test_a_kl_limit_below_what_rounding_adds_is_refused(tiny, tmp_path):
    loaded = Loaded(tiny, "--precision bf16 --max-kl 1e-6")
    randomise_lora(loaded.model)
    loaded.run.folder = tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        loaded.run.check_rounding()
    kl = json.loads((tmp_path / "config.json").read_text())["rounding_kl"]
    assert str(error.value) == (
        f"In bf16 rounding alone adds {kl:.2g} nats to the KL, more than --max-kl 1e-06: "
        "give a larger one, or a new run with --precision fp32, or with fp16 in place of bf16"
    )


def test_the_lora_passes_in_the_networks_precision_and_its_gradient_is_float32(tiny):
    loaded = Loaded(tiny, "--precision bf16")
    layer = next(part for part in loaded.model.network.modules() if isinstance(part, LoraLayer))
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    b.weight.data.normal_(0, 0.2)
    seen = []
    b.register_forward_hook(lambda part, inputs, output: seen.append((inputs[0], output)))
    x = torch.randn(3, a.in_features, dtype=torch.bfloat16)
    out = layer(x)
    ((hidden, added),) = seen
    assert hidden.dtype == added.dtype == out.dtype == torch.bfloat16
    expected = layer.base_layer(x).float() + x.float() @ a.weight.T @ b.weight.T
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.02)  # three digits
    out.float().sum().backward()
    assert a.weight.grad.dtype == b.weight.grad.dtype == torch.float32 and b.weight.grad.any()


def test_the_reference_is_switched_once_around_a_trajectory(tiny, monkeypatch):
    loaded, switches = Loaded(tiny), []
    lora_off = model.lora_off
    monkeypatch.setattr(model, "lora_off", lambda net: switches.append(net) or lora_off(net))
    batch = loaded.sample()
    assert not switches
    loaded.reference_log_prob(batch)
    loaded.sample(denoiser=loaded.model.reference)
    assert len(switches) == 2  # of three steps each
    loaded.model.reference(batch.trajectory.x[0], torch.tensor([1] * 4), batch.cond)
    assert len(switches) == 3


# Models that are refused


def refusal(folder, **changes) -> str:
    with pytest.raises(UserError) as error:
        args = options.make_settings(objective="compressibility", model=str(folder), **changes)
        model.load_model(args, PROMPTS, Accelerator())
    return str(error.value)


def test_a_model_that_is_not_there_or_no_pipeline_is_refused(tmp_path):
    for name in ("nobody/nothing", "no/such/folder/at/all"):
        message = refusal(name)
        assert f"--model {name} cannot be loaded: it needs network access" in message
        assert "\n" not in message
    assert "give another folder" in refusal(tmp_path)


def test_steps_and_noise_that_a_schedule_cannot_have_are_refused(tiny):
    assert "--num-steps 1000 --eta 1.0 cannot be sampled" in refusal(tiny, num_steps=1000)
    assert "eta = 1.5: choose 0 < eta <= 1" in refusal(tiny, eta=1.5)

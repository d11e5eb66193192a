"""sd_demo.py on tiny pipelines with random weights: the stock pipeline's policy, and what a run does and leaves."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

import d3po
import feedback
import sd_demo
from toy import plots, runs
from toy.emoji_sd import models

ROOT = Path(sd_demo.__file__).parent
# A rate and rank at which few updates show
QUICK = "--precision fp32 --num-steps 3 --skip-last 0 --guidance-scale 3 --lr 0.005 --lora-rank 4 --eval-images 2"
QUICK = [*QUICK.split(), *"--eval-every 1 --epochs 2 --pairs-per-epoch 2 --batch-size 1 --images-per-prompt 2".split()]
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Also where there is a GPU: these tests are about bytes and floats, and the GPU has its own benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def make_pipeline(**unet) -> StableDiffusionPipeline:
    words = models.tokenizer()
    torch.manual_seed(0)
    net = UNet2DConditionModel.from_config(models.unet(tiny=True).config, **unet)
    return models.pipeline(models.vae(tiny=True), models.text_encoder(words, tiny=True), net)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a pipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """A file of scorers; brightness is seldom tied and so smooth that few updates change it."""
    file = tmp_path_factory.mktemp("scorers") / "scorers.py"
    file.write_text(
        "import os\n"
        "import numpy as np\n"
        "def brightness(images, prompts): return [np.asarray(image).mean() for image in images]\n"
        "def blue(images, prompts): return [np.asarray(image)[..., 2].mean() for image in images]\n"
        "def same(images, prompts): return [1.0] * len(images)\n"
        "def few(images, prompts): return [1.0]\n"
        "def raises(images, prompts): raise RuntimeError('no\\nluck')\n"
        "def cats(images, prompts): return [{'a cat': 1.0}[prompt] for prompt in prompts]\n"
        "calls = 0\n"
        "def later(images, prompts):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > 4: raise RuntimeError('no\\nluck')\n"
        "    return brightness(images, prompts)\n"
        "def first_only(images, prompts):\n"
        "    return brightness(images, prompts) if os.environ.get('RANK') == '0' else same(images, prompts)\n"
    )
    return file


class Loaded:
    """A model, ready to train, without a run folder."""

    def __init__(self, folder, *flags, tick=lambda: None, accelerator=None):
        argv = ["--model", str(folder), "--objective", "compressibility", *QUICK, *flags]
        _, self.args = sd_demo.parse(argv)
        self.accelerator = accelerator or Accelerator()
        self.model = sd_demo.load_model(self.args, self.accelerator, tick)
        sd_demo.plan(self.model, self.args, 1)
        self.weights = [p for p in self.model.pipe.unet.parameters() if p.requires_grad]
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(self.weights, self.args.lr, weight_decay=self.args.weight_decay)
        )

    def sample(self, prompts=(0, 1), K=2, *numbers, denoiser=None):
        denoiser = denoiser or self.model.sampler
        return sd_demo.sample(self.model, denoiser, self.args, torch.as_tensor(prompts), K, *numbers)

    def train(self, batch, pairs, ref=None, steps=None):
        ref = self.initial_log_prob(batch) if ref is None else ref
        steps = list(range(self.args.num_steps)) if steps is None else steps
        pairs = torch.tensor(pairs).view(-1, 2)
        return sd_demo.train(self.model, self.args, self.accelerator, self.optimizer, batch, pairs, ref, steps)

    def log_prob(self, batch, denoiser=None):
        denoiser = denoiser or self.model.sampler
        return d3po.trajectory_log_prob(denoiser, self.model.schedule, batch.chains, batch.cond)

    def initial_log_prob(self, batch):
        return self.log_prob(batch, self.model.initial)

    def lora(self):
        return {name: weight.clone() for name, weight in get_peft_model_state_dict(self.model.pipe.unet).items()}


def run(tiny, out, objective, *flags):
    sd_demo.main(["--model", str(tiny), "--out", str(out), "--objective", objective, *QUICK, *map(str, flags)])
    return out


def rows(path):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def left(out):
    """What a run leaves, without times and memory: metrics, labels, bytes of the LoRA."""
    measured = ("seconds_sample", "seconds_train", "peak_memory_mb")
    metrics = [{k: v for k, v in row.items() if k not in measured} for row in rows(out / "metrics.jsonl")]
    lora = (out / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    return metrics, (out / "labels.jsonl").read_text(), lora


def same_lora(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_images(one, two, tolerance=1):
    """Up to a grey level: the same numbers in another order are rounded otherwise."""
    pixels = [np.stack([np.asarray(image, dtype=int) for image in images]) for images in (one, two)]
    return abs(pixels[0] - pixels[1]).max() <= tolerance


@pytest.fixture(scope="module")
def done(tiny, scorers, tmp_path_factory):
    """A finished run of two epochs: groups of three images, one scorer that is only watched."""
    out, curves = tmp_path_factory.mktemp("done") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        draw = plots.draw_curves
        patch.setattr(plots, "draw_curves", lambda folder: curves.append([p.read_bytes() for p in draw(folder)]))
        flags = ["--images-per-prompt", 3, "--watch", f"{scorers}:blue", "--no-gradient-checkpointing"]
        run(tiny, out, f"{scorers}:brightness", *flags)
    return out, curves


# The policy


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_guidance_is_that_of_two_calls_but_takes_one(tiny, precision):
    ticks = []
    loaded = Loaded(tiny, "--precision", precision, tick=lambda: ticks.append(1))
    unet, text = loaded.model.pipe.unet, loaded.model.text
    assert unet.dtype == text.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x, time, chosen = torch.randn(3, 4, 16, 16), torch.tensor([900, 900, 900]), [4, 7, 9]
    cond = torch.stack([text[[-1] * 3], text[chosen]], 1)
    calls = []
    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        out = loaded.model.policy(x, time, cond)
        assert len(calls) == len(ticks) == 1
        handle.remove()
        empty, prompt = (unet(x.to(unet.dtype), time, text[rows]).sample.float() for rows in ([-1] * 3, chosen))
    assert out.dtype == torch.float32
    tolerance = 1e-5 if precision == "fp32" else 0.03  # bf16 has three digits; guidance trebles the error
    torch.testing.assert_close(out, empty + 3 * (prompt - empty), atol=tolerance, rtol=0)
    assert (prompt - empty).abs().max() > 2 * tolerance  # so the test sees the guidance


def test_chains_that_start_alike_take_their_first_step_once(tiny):
    loaded = Loaded(tiny)
    text, rows = loaded.model.text, []
    loaded.model.pipe.unet.register_forward_hook(lambda unet, given, out: rows.append(len(given[0])))
    x = torch.randn(3, 4, 16, 16)[[0, 0, 1, 1, 1, 2, 0]]
    time = torch.tensor([900, 900, 900, 900, 300, 300, 900])  # the fifth row is at another time
    cond = torch.stack([text[[-1] * 7], text[[4, 4, 7, 8, 8, 8, 4]]], 1)  # the fourth has another prompt
    apart = loaded.model.policy(x, time, cond)
    with torch.no_grad():
        once = loaded.model.policy(x, time, cond)
    assert rows == [2 * 7, 2 * 6]  # the last row is no neighbour of the first two
    torch.testing.assert_close(once, apart, atol=1e-5, rtol=0)
    assert not torch.equal(once[2], once[3]) and not torch.equal(once[3], once[4])

    rows.clear()
    loaded.sample((3, 8), 4, 1)
    assert rows == [2 * 2] + [2 * 8] * (len(rows) - 1) and len(rows) == loaded.args.num_steps


def test_v_prediction_becomes_the_epsilon_of_diffusers(tmp_path):
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path)
    model, text = (loaded := Loaded(tmp_path)).model, loaded.model.text
    x, cond = torch.randn(2, 4, 16, 16), torch.stack([text[[-1, -1]], text[[3, 5]]], 1)
    for i, t in enumerate(model.schedule.timesteps):
        with torch.no_grad():
            mean = d3po.policy_mean(model.policy, model.schedule, i, x, cond)
            empty, prompt = (model.pipe.unet(x, t, rows).sample for rows in cond.unbind(1))
        v = empty + 3 * (prompt - empty)
        expected = model.pipe.scheduler.step(v, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)


def ddim(pipe):
    """What sd_demo.py says it samples with."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, args, prompts, K, *numbers):
    """Images of the stock pipeline: diffusers draws the noise of the steps as d3po.rollout does."""
    noise, side = runs.generator(args.seed, *numbers), pipe.unet.config.sample_size
    x_T = torch.randn(len(prompts), 4, side, side, generator=noise).repeat_interleave(K, 0)
    prompts = [prompt for prompt in prompts for _ in range(K)]
    return pipe(
        prompts, latents=x_T, generator=noise, eta=args.eta, num_inference_steps=args.num_steps,
        guidance_scale=args.guidance_scale,
    ).images  # fmt: skip


@pytest.mark.parametrize("variant", ["sd15", "v", "pndm", "linspace", "trailing", "8x8", "eta"])
def test_images_are_those_of_the_stock_pipeline(tmp_path, variant, capsys):
    pipe = make_pipeline(**({"sample_size": 8} if variant == "8x8" else {}))
    config = pipe.scheduler.config
    if variant == "v":
        pipe.scheduler = DDIMScheduler.from_config(config, prediction_type="v_prediction")
    elif variant == "pndm":
        pipe.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    elif variant == "linspace":  # its last step would be from model time 0
        pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="linspace")
    elif variant == "trailing":
        pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True)
    pipe.save_pretrained(tmp_path)
    loaded = Loaded(tmp_path, "--num-steps", "5", *(["--eta", "0.5"] if variant == "eta" else []))
    assert ("Scheduler: DDIM" in capsys.readouterr().out) == (variant in ("pndm", "trailing"))
    batch = loaded.sample((3, 8), 2, 1, 2)
    prompts = [loaded.model.prompts[n] for n in (3, 8)]
    assert batch.prompts == [prompts[0]] * 2 + [prompts[1]] * 2
    pipe = ddim(StableDiffusionPipeline.from_pretrained(tmp_path))
    if variant == "linspace":
        pipe.scheduler.register_to_config(timestep_spacing="leading")
    images = stock(pipe, loaded.args, prompts, 2, 1, 2)
    assert images[0].size == ((32, 32) if variant == "8x8" else (64, 64))
    assert same_images(batch.images, images)
    assert not same_images(images[:1], images[1:2], 3)  # one x_T, but other noise on the way


def test_the_trained_lora_gives_the_same_images_in_a_fresh_pipeline(tiny, done, capsys):
    out, _ = done
    parser, args = sd_demo.parse(["--evaluate", str(out)])
    loaded = Loaded(tiny, "--seed", "1")  # another seed: the LoRA must come from the file
    loaded.args.out, loaded.args.evaluate, loaded.args.resume = out, out, None
    assert sd_demo.open_folder(parser, loaded.args, loaded.accelerator, loaded.model, loaded.optimizer) == 2
    batch = loaded.sample((3, 8), 2, 1)
    untrained = loaded.sample((3, 8), 2, 1, denoiser=loaded.model.initial)
    fresh = ddim(StableDiffusionPipeline.from_pretrained(tiny))
    prompts = [loaded.model.prompts[n] for n in (3, 8)]
    assert same_images(untrained.images, stock(fresh, loaded.args, prompts, 2, 1))
    fresh.load_lora_weights(out / "lora")
    assert same_images(batch.images, stock(fresh, loaded.args, prompts, 2, 1))
    assert not same_images(batch.images, untrained.images, 3)


# The LoRA


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_lora_is_float32_on_queries_keys_and_values_alone(tiny, precision):
    loaded = Loaded(tiny, "--precision", precision, "--lora-rank", "3")
    unet = loaded.model.pipe.unet
    adapted = {name for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    plain = StableDiffusionPipeline.from_pretrained(tiny).unet
    assert adapted == {name for name, _ in plain.named_modules() if name.endswith(("to_q", "to_k", "to_v"))}
    assert len(loaded.weights) == 2 * len(adapted) and {w.dtype for w in loaded.weights} == {torch.float32}
    assert all(".lora_" in name for name, weight in unet.named_parameters() if weight.requires_grad)
    assert all(3 in weight.shape for weight in loaded.weights)
    for part in (loaded.model.pipe.vae, loaded.model.pipe.text_encoder):
        assert not any(weight.requires_grad for weight in part.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_training_the_policy_is_the_reference_exactly(tiny, precision):
    loaded = Loaded(tiny, "--precision", precision)
    batch = loaded.sample()
    reference = loaded.initial_log_prob(batch)
    assert reference.dtype == torch.float32
    assert torch.equal(reference, loaded.log_prob(batch)) and torch.equal(reference, batch.chains.log_prob)
    for ref in (reference, batch.chains.log_prob):  # --reference initial, previous
        first = next(d3po.d3po_losses(loaded.model.policy, loaded.model.schedule, batch.chains, torch.tensor([[0, 1]]),
                                      0.05, ref, batch.cond))  # fmt: skip
        # two of four chains in a batch: float32 rounds sums of 1,024 terms otherwise, by 1e-3 nats, times beta
        assert first.item() == pytest.approx(math.log(2), abs=1e-4 if precision == "fp32" else 0.05)


def test_training_changes_the_lora_and_nothing_else(tiny):
    loaded = Loaded(tiny)
    unet = loaded.model.pipe.unet
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    batch = loaded.sample()
    reference = loaded.initial_log_prob(batch)
    loaded.train(batch, [[0, 1], [3, 2]], reference)
    for name, weight in unet.state_dict().items():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name
    assert torch.equal(loaded.initial_log_prob(batch), reference)  # the adapter off: as it was
    assert (loaded.log_prob(batch) - reference).abs().max() > 0.1
    assert all(weight.requires_grad for weight in loaded.weights)


# Training

LOSSES = [("eq14", "timestep"), ("eq14", "trajectory"), ("eq12", "timestep"), ("chain", "trajectory")]


@pytest.mark.parametrize("loss, every", LOSSES)
def test_training_raises_winners_over_losers(tiny, loss, every):
    loaded = Loaded(tiny, "--loss", loss, "--update-every", every)
    batch, pairs = loaded.sample(), torch.tensor([[1, 0], [2, 3]])
    told = [loaded.train(batch, pairs.tolist()) for _ in range(3)]
    ratio = (loaded.log_prob(batch) - loaded.initial_log_prob(batch)).sum(0)
    agreement = feedback.agreement(ratio, pairs, 1.0)
    assert agreement["accuracy"] == 1 and agreement["margin"] > 1
    first, last = (sum(loss for loss, _ in losses) / len(losses) for losses in (told[0], told[-1]))
    assert last < first < math.log(2) + 0.01


@pytest.mark.parametrize("loss, every", LOSSES)
def test_each_loss_has_its_steps_updates_and_gradient(tiny, loss, every):
    """The gradients that reach the optimiser, against plain autograd through all that the update is about."""
    loaded = Loaded(tiny, "--loss", loss, "--update-every", every, "--max-grad-norm", "1e9", "--beta", "0.2")
    loaded.train(batch := loaded.sample(), [[1, 0], [3, 2]])  # away from theta = ref, where Eq. 5 and Eq. 14 agree
    model, ref, order = loaded.model, loaded.initial_log_prob(batch), [2, 0, 1]
    winner, loser = torch.tensor([[0, 1], [0, 3], [2, 3]]).T  # chain 0 twice

    def objective(steps):
        parts = []
        for i in steps:
            mean = d3po.policy_mean(model.sampler, model.schedule, i, batch.chains.x[i], batch.cond)
            ratio = d3po.log_prob(batch.chains.x[i + 1], mean, model.schedule.sigma[i]) - ref[i]
            parts.append(0.2 * (ratio[winner] - ratio[loser]))
        parts = torch.stack(parts).sum(0, keepdim=True) if loss == "chain" else torch.stack(parts)
        return -torch.nn.functional.logsigmoid(parts).mean(1).sum()

    updates = {"eq12": [[0]], "chain": [order], "eq14": [order] if every == "trajectory" else [[i] for i in order]}
    seen, expected = [], []

    def step():  # in place of the optimiser's: nothing moves, so that each update is about the same weights
        seen.append(torch.cat([w.grad.flatten() for w in loaded.weights]))

    loaded.optimizer.step = step
    told = loaded.train(batch, [[0, 1], [0, 3], [2, 3]], ref, order)
    for steps in updates[loss]:
        value = objective(steps)
        expected.append((value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, loaded.weights)])))
    assert len(seen) == len(expected) == [skipped for _, skipped in told].count(False)
    assert len(told) == sum(map(len, updates[loss]))
    for one, (_, other) in zip(seen, expected, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()  # float32, and beta times a log-prob of 1e-3 nats' rounding
    mean = sum(loss for loss, _ in told) / len(told)  # a chain's loss is not cut into T
    assert mean == pytest.approx(sum(v for v, _ in expected) / (1 if loss == "chain" else len(told)), rel=1e-3)


def test_the_gradient_is_clipped_to_its_norm(tiny):
    loaded, norms = Loaded(tiny, "--max-grad-norm", "1e-3"), []
    loaded.optimizer.step = lambda: norms.append(torch.cat([w.grad.flatten() for w in loaded.weights]).norm().item())
    loaded.train(loaded.sample(), [[0, 1]])
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 3


def test_without_pairs_nothing_is_trained(tiny):
    loaded = Loaded(tiny)
    before = loaded.lora()
    assert loaded.train(loaded.sample(), []) == []
    assert same_lora(loaded.lora(), before)


def test_checkpointing_keeps_the_gradients_and_little_memory_and_T_does_not_matter(tiny):
    held, gradients = {}, {}
    for name, flags in {
        "plain": ["--no-gradient-checkpointing"], "checkpointed": [], "long": ["--num-steps", "9"],
        "chain": ["--num-steps", "9", "--loss", "chain", "--update-every", "trajectory"],
    }.items():  # fmt: skip
        loaded = Loaded(tiny, *flags)
        batch, now = loaded.sample(), [0, 0]

        class Held:
            """A tensor that autograd keeps: counted as long as it is kept."""

            def __init__(self, tensor, now=now):
                self.tensor, self.now, self.bytes = tensor, now, tensor.numel() * tensor.element_size()
                now[0] += self.bytes
                now[1] = max(now)

            def __del__(self):
                self.now[0] -= self.bytes

        loaded.optimizer.step = lambda name=name, w=loaded.weights: gradients.setdefault(name, [v.grad for v in w])
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            loaded.train(batch, [[1, 0], [3, 2]])
        held[name] = now[1]
    assert held["checkpointed"] < held["plain"] / 2  # a tiny UNet has few blocks; bench_sd.py asks for a third
    assert held["long"] == held["checkpointed"]
    assert held["chain"] == pytest.approx(held["long"], rel=0.01)
    for one, other in zip(gradients["plain"], gradients["checkpointed"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# A run and what it leaves


def test_a_run_leaves_its_folder(done, tiny):
    out, _ = done
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == str(tiny) and config["seed"] == 0 and config["lr"] == 0.005
    assert config["versions"]["torch"] == torch.__version__ and set(config["initial"]) == {"eval_score", "watched"}
    names = {str(path.relative_to(out)) for path in out.rglob("*") if "images" not in path.parts}
    assert names == {
        "config.json", "metrics.jsonl", "labels.jsonl", "README.md", "reward_curve.png", "progress.png",
        "before_after.png", "lora", "lora/pytorch_lora_weights.safetensors", "checkpoint", "checkpoint/state.pt",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "--objective" in card and "load_lora_weights" in card and "2 epochs" in card
    assert all((out / name.rstrip(")")).is_file() for name in card.split("![](")[1:] for name in name.split(")")[:1])


def test_metrics_have_the_keys_of_the_design(done):
    metrics = rows(done[0] / "metrics.jsonl")
    keys = """epoch labels score score_sem eval_score eval_win_rate accuracy margin kl loss seconds_sample seconds_train
        peak_memory_mb log_ratio_winners log_ratio_losers watched skipped kl_trained""".split()
    assert [set(row) for row in metrics] == [set(keys)] * 2
    assert [row["epoch"] for row in metrics] == [1, 2] and [row["labels"] for row in metrics] == [6, 12]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    first, second = metrics
    assert abs(first["kl"]) < 0.01 < second["kl"]  # the policy that samples: first the initial one
    assert first["accuracy"] > 0.5 and first["margin"] > 0 and first["skipped"] == 0
    assert 0 < first["loss"] < math.log(2) + 0.1 and 0 <= first["eval_win_rate"] <= 1
    initial = json.loads((done[0] / "config.json").read_text())["initial"]
    assert first["eval_score"] != initial["eval_score"] and initial["watched"] > 0


def test_the_last_steps_are_left_out_of_training_and_told_apart(tiny, scorers, tmp_path, monkeypatch):
    seen, train, kl = [], sd_demo.train, feedback.kl
    monkeypatch.setattr(sd_demo, "train", lambda *args: seen.append(args[-1]) or train(*args))
    monkeypatch.setattr(feedback, "kl", lambda ratio, used: seen.append(ratio) or kl(ratio, used))
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", "--skip-last", 1, "--batch-size", 2)
    assert [sorted(order) for order in seen[::2]] == [[0, 1], [0, 1]]
    for row, ratio in zip(rows(out / "metrics.jsonl"), seen[1::2], strict=True):
        assert ratio.shape == (3, 4)
        assert row["kl"] == pytest.approx(ratio.sum().item() / 4, abs=1e-4)
        assert row["kl_trained"] == pytest.approx(ratio[:2].sum().item() / 4, abs=1e-4)


def test_labels_tell_what_the_stored_images_are(done):
    from PIL import Image

    labels = rows(done[0] / "labels.jsonl")
    assert len(labels) == 12 and {row["epoch"] for row in labels} == {1, 2}
    assert len({tuple(row["images"]) for row in labels}) == 12
    for row in labels:
        scores = [np.asarray(Image.open(done[0] / file)).mean() for file in row["images"]]
        assert row["scores"] == pytest.approx(scores, rel=1e-12)
        assert row["h"] == np.sign(scores[0] - scores[1])
        assert row["images"][0].startswith(f"images/e{row['epoch']:03}_p") and row["prompt"].startswith("a")
    first = [row for row in labels if row["epoch"] == 1]
    assert feedback.mean_score(first)["score"] == rows(done[0] / "metrics.jsonl")[0]["score"]


def test_figures_are_drawn_and_redrawn(done):
    _, curves = done
    assert len(curves) == 2 and all(len(figures) == 3 for figures in curves)
    for before, after in zip(*curves, strict=True):
        assert before.startswith(b"\x89PNG") and before != after


def test_held_out_images_are_the_initial_models_and_the_tuned_models(done, tiny):
    from PIL import Image

    files = [[done[0] / f"images/held_out_e{epoch:03}_{n}.png" for n in (0, 1)] for epoch in (0, 1, 2)]
    initial, _, tuned = ([Image.open(file) for file in row] for row in files)
    loaded = Loaded(tiny, "--images-per-prompt", "3")
    assert same_images(loaded.sample((0, 1), 1, sd_demo.HELD_OUT, 0).images, initial)
    assert not same_images(initial, tuned, 3)


@pytest.mark.parametrize(
    "flags",
    [["--loss", "eq12", "--reference", "previous"], ["--loss", "chain", "--update-every", "trajectory"],
     ["--update-every", "trajectory", "--reference", "previous", "--clip", "0.1"], ["--precision", "bf16"],
     ["--recipe", "paper", "--lr", "1e-3", "--pairs-per-epoch", "2"]],
)  # fmt: skip
def test_other_choices_run_the_same_loop(tiny, scorers, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(plots, "draw_curves", lambda folder: None)
    flags = [*flags, "--epochs", "1", "--batch-size", "2", "--eval-images", "1"]
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness,compressibility", *flags)
    (row,) = rows(out / "metrics.jsonl")
    assert row["score"] > 0 and row["labels"] == 2
    scores = rows(out / "labels.jsonl")[0]["scores"]
    assert len(scores) == 2 and len(scores[0]) == 2 and scores[0][0] > 0 > scores[0][1]


def test_an_epoch_of_ties_trains_nothing_and_goes_on(tiny, scorers, tmp_path):
    out = run(tiny, tmp_path / "run", f"{scorers}:same", "--images-per-prompt", 3, "--prompts", "hand")
    metrics = rows(out / "metrics.jsonl")
    for row in metrics:
        assert {row[k] for k in ("accuracy", "margin", "log_ratio_winners", "log_ratio_losers", "loss")} == {None}
        assert row["score"] == 1 and row["skipped"] == 0 and row["eval_win_rate"] == 0.5
    assert [row["labels"] for row in metrics] == [6, 12] and (out / "reward_curve.png").exists()
    # one prompt, one model: only the noise makes images differ, within a group, between groups and between epochs
    assert len({path.read_bytes() for path in out.glob("images/e00*.png")}) == 12
    state = torch.load(out / "checkpoint" / "state.pt")
    assert state["epoch"] == 2 and all((w == 0).all() for name, w in state["lora"].items() if "lora_B" in name)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(done, tiny, scorers, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_curves", lambda folder: None)
    flags = ["--images-per-prompt", 3, "--watch", f"{scorers}:blue", "--no-gradient-checkpointing"]
    same = run(tiny, tmp_path / "same", f"{scorers}:brightness", *flags)
    assert left(same) == left(done[0])
    other = run(tiny, tmp_path / "other", f"{scorers}:brightness", *flags, "--seed", 1, "--epochs", 1)
    assert left(other)[1].splitlines()[0] != left(done[0])[1].splitlines()[0]


def test_the_default_folder_is_named_after_the_objective(tiny, scorers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd_demo, "learn", lambda *args: None)
    for objective in ("compressibility", f"{scorers}:same", f"{scorers}:same"):
        sd_demo.main(["--model", str(tiny), "--objective", objective, *QUICK])
    names = ["compressibility-1", "scorers-py-same-1", "scorers-py-same-2"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names


def test_evaluation_compares_with_the_initial_model_on_new_noises(done, tmp_path, capsys):
    out = shutil.copytree(done[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    sd_demo.main(["--evaluate", str(out), "--eval-images", "5"])
    result = json.loads((out / "evaluation.json").read_text())
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert {path: path.read_bytes() for path in before} == before
    assert result["pairs"] == 5 and "brightness" in result["objective"]
    assert result["win_rate_interval"][0] <= result["win_rate"] <= result["win_rate_interval"][1]
    assert result["initial"]["score"] != result["tuned"]["score"] and result["tuned"]["watched"] > 0
    assert '"win_rate"' in capsys.readouterr().out
    held_out = json.loads((out / "config.json").read_text())["initial"]["eval_score"]
    assert result["initial"]["score"] != pytest.approx(held_out, rel=1e-6)
    # the initial model's part by hand, in the batches of the run
    loaded = Loaded(json.loads((out / "config.json").read_text())["model"], "--images-per-prompt", "3")
    parts = [loaded.sample(range(a, b), 1, sd_demo.EVALUATION, a).images for a, b in ((0, 3), (3, 5))]
    score = np.mean([np.asarray(image).mean() for part in parts for image in part])
    assert result["initial"]["score"] == pytest.approx(score, abs=0.1)


# Plans


COSTS = ["--loss eq14", "--loss eq14 --reference previous", "--loss eq12", "--loss chain --update-every trajectory",
         "--loss eq14 --skip-last 1",
         "--loss eq14 --eval-every 2 --eval-images 9 --batch-size 2 --pairs-per-epoch 4"]  # fmt: skip


@pytest.mark.parametrize("flags", COSTS)
def test_the_plan_counts_the_unet_calls(tiny, scorers, tmp_path, monkeypatch, capsys, flags):
    ticks, call, trained = [], sd_demo.Guided.__call__, []

    def counted(self, x, *rest):
        ticks.append(1)
        trained.append(2 * len(x) * torch.is_grad_enabled())
        return call(self, x, *rest)

    planned, plan = [], sd_demo.plan
    monkeypatch.setattr(sd_demo.Guided, "__call__", counted)
    monkeypatch.setattr(sd_demo, "plan", lambda *args: planned.append(plan(*args)) or planned[0])
    monkeypatch.setattr(plots, "draw_curves", lambda folder: None)
    run(tiny, tmp_path / "run", f"{scorers}:brightness", *flags.split())
    said, calls, look = planned[0]
    assert said in capsys.readouterr().out
    assert len(ticks) == 2 * calls + look * (2 if "9" in flags else 3)  # one look is at the initial model
    assert f" and {sum(trained) // 2:,} with gradient" in said


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, scorers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(tiny, tmp_path / "run", f"{scorers}:brightness", "--images-per-prompt", 3, "--dry-run")
    said = capsys.readouterr().out
    for words in ("2 groups of 3 images, 6 labels", "28 to sample, 28 without and 36 with gradient", "1,024 latent"):
        assert words in said.replace("\n", " ")
    assert "beta 0.05 per nat" in said and f"{0.05 * 1024:.3g}\nfor their mean" in said and " GB" in said
    assert not list(tmp_path.iterdir())


def test_the_papers_recipe_is_table_2_with_the_releases_clamp(tiny, capsys):
    flags = ["--model", str(tiny), "--objective", "compressibility", "--recipe", "paper"]
    _, args = sd_demo.parse(flags)
    accelerator = Accelerator()
    said, *_ = sd_demo.plan(sd_demo.load_model(args, accelerator, lambda: None), args, 4)  # on 4 GPUs, as in App. E
    expected = {
        "lr": 3e-5, "weight_decay": 1e-4, "max_grad_norm": 1.0, "num_steps": 20, "batch_size": 10, "eta": 1.0,
        "guidance_scale": 5.0, "epochs": 400, "pairs_per_epoch": 80, "images_per_prompt": 2, "loss": "eq14",
        "clip": 0.1, "update_every": "trajectory", "reference": "initial", "beta": 0.1 / 1024, "skip_last": 0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert "as 0.1\nfor their mean" in said
    _, args = sd_demo.parse([*flags, "--lr", "1", "--beta", "2", "--epochs", "3"])  # a flag of one's own counts more
    assert (args.lr, args.beta, args.epochs) == (1, 2, 3)


def test_the_emoji_model_has_its_own_defaults_and_a_watcher_for_animals():
    _, args = sd_demo.parse(["--objective", "compressibility"])
    assert args.model == str(sd_demo.EMOJI) and args.images_per_prompt == 8 and args.num_steps == 10
    assert args.watch.endswith("classifier.py:recognised")
    assert sd_demo.parse(["--objective", "compressibility", "--prompts", "hand"])[1].watch is None
    _, args = sd_demo.parse(["--objective", "compressibility", "--model", "some/thing"])
    assert args.num_steps == 20 and args.watch is None


# What is refused


def refused(capsys, argv):
    """The one sentence with which main refuses."""
    with pytest.raises(SystemExit) as stop:
        sd_demo.main([*map(str, argv)])
    error = capsys.readouterr().err
    # diffusers and transformers show the progress of loading on stderr, and rewrite it by carriage returns
    lines = [line for line in error.split("\n") if line and "\r" not in line and "it/s]" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


BAD = {
    "--objective beauty": "unknown: choose one of compressibility",
    "--objective human,compressibility": "'human' is unknown",
    "--annotators 0": "--annotators 0: give a positive number",
    "--skip-last 3": "--skip-last 3: some of the --num-steps 3 must be left to train",
    "--skip-last -1": "--skip-last -1",
    "--objective ''": "--objective: say what to learn",
    "--objective SCORERS:none": "none",
    "--objective no.py:f": "there is no file no.py",
    "--objective SCORERS:raises": "raised RuntimeError: no luck",
    "--objective SCORERS:few": r"(1,), not (2,)",
    "--watch SCORERS:cats --prompts hand": "raised KeyError: '1 hand'",
    "--model nobody/nothing": "network access; or give a folder",
    "--model no/such/folder/at/all": "network access; or give a folder",
    "--model EMPTY": "give another folder",
    "--model OTHER": "it is a StableDiffusionImg2ImgPipeline, and",
    "--precision fp16": "needs a CUDA GPU: give fp32 or bf16",
    "--eta 0": "--eta 0.0: give a positive number",
    "--eta 1.5": "eta = 1.5: choose 0 < eta <= 1",
    "--prompts no.txt": "--prompts no.txt",
    "--prompts PROMPTLESS": "has no prompt; give one a line",
    "--images-per-prompt 1": "a preference needs 2 or more",
    "--resume nothing": "nothing is no run of sd_demo.py",
    "--evaluate nothing": "nothing is no run of sd_demo.py",
    "--resume EMPTY": "is no run of sd_demo.py",
    "--out EMPTY": "exists: give a new folder, or --resume it",
    "--out PROMPTLESS/below": "cannot be written",
    "--pairs-per-epoch 3 --batch-size 2": "give a multiple of 2",
    "--loss chain": "give --update-every trajectory",
    "--loss chain --update-every trajectory --clip 0.1": "no --clip",
    "--clip 1": "below 1",
    "--num-steps 1000": "1000 noise levels have room for 1 to 999 steps",
    "--num-steps 2000": "2000",
    "--beta -1": "--beta -1.0: give a positive number",
    "--lr nan": "--lr nan: give a positive number",
    "--seed -1": "--seed -1",
    "--precision int8": "invalid choice",
    "--epoch 3": "unrecognized",  # no abbreviations
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(
    tiny, scorers, tmp_path, monkeypatch, capsys, flags
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "promptless.txt").write_text(" \n\n")
    shutil.copytree(tiny, tmp_path / "other")
    index = json.loads((tiny / "model_index.json").read_text()) | {"_class_name": "StableDiffusionImg2ImgPipeline"}
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    names = {"SCORERS": scorers, "EMPTY": tmp_path / "empty", "PROMPTLESS": tmp_path / "promptless.txt"}
    names |= {"OTHER": tmp_path / "other", "''": ""}
    given = flags
    for name, value in names.items():
        given = given.replace(name, str(value))
    argv = ["--model", tiny, "--objective", "compressibility", *QUICK, *given.split(" ")]
    before = sorted(tmp_path.rglob("*"))
    assert BAD[flags] in refused(capsys, argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_resume_with_other_settings_is_refused(done, capsys):
    for flag, value, was in (("--lr", "0.1", "--lr 0.005"), ("--images-per-prompt", "2", "--images-per-prompt 3")):
        error = refused(capsys, ["--resume", done[0], flag, value])
        assert was in error and "new run" in error
    assert "was started with --gradient-checkpointing False" in refused(
        capsys, ["--resume", done[0], "--gradient-checkpointing"]
    )


def test_a_folder_that_cannot_be_read_as_a_run_is_refused(tmp_path, capsys):
    for text in ("{", "{}", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert "is no run" in refused(capsys, ["--resume", tmp_path])


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_scorer_that_fails_in_the_middle_stops_the_run_with_a_sentence(tiny, scorers, tmp_path, capsys, evaluate):
    (tmp_path / "once.py").write_text(scorers.read_text())
    out, flags = tmp_path / "run", ["--epochs", 1] if evaluate else []
    with pytest.raises(SystemExit) as stop:  # the calls: a trial, the initial model, two batches, a look
        run(tiny, out, f"{tmp_path}/once.py:later", *flags)
    assert "raised RuntimeError: no" in str(stop.value.code) and "The run stops" in str(stop.value.code)
    if evaluate:
        (tmp_path / "once.py").write_text(scorers.read_text().replace("calls > 4", "calls > 1"))
        with pytest.raises(SystemExit, match="raised RuntimeError"):
            sd_demo.main(["--evaluate", str(out)])
        assert not (out / "evaluation.json").exists()


# Overflow


@pytest.fixture
def overflow(monkeypatch):
    """Gradients of chosen losses, by number, become infinite, as a GradScaler's too large factor makes them."""
    bad, count, losses = set(), [0], d3po.d3po_losses

    def broken(*args):
        for loss in losses(*args):
            if count[0] in bad:
                loss.register_hook(lambda gradient: gradient * math.inf)
            count[0] += 1
            yield loss

    monkeypatch.setattr(d3po, "d3po_losses", broken)
    return bad


def test_an_update_that_overflows_is_skipped(tiny, overflow):
    loaded, before = Loaded(tiny), []
    step = loaded.optimizer.step
    loaded.optimizer.step = lambda: before.append(loaded.lora()) or step()
    overflow.add(1)
    told = loaded.train(batch := loaded.sample(), [[0, 1], [2, 3]])
    assert [skipped for _, skipped in told] == [False, True, False] and len(before) == 2
    assert all(math.isfinite(loss) for loss, _ in told)
    assert all(weight.isfinite().all() for weight in loaded.weights)
    # as if the step had not been
    other = Loaded(tiny)
    other.train(batch, [[0, 1], [2, 3]], steps=[0, 2])
    overflow.clear()
    assert same_lora(loaded.lora(), other.lora())


def test_a_grad_scaler_skips_the_update_and_halves_its_factor(tiny, overflow):
    """The path of fp16 on a GPU, with torch's scaler for CPUs."""
    accelerator = Accelerator()
    try:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        loaded = Loaded(tiny, accelerator=accelerator)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # from here on it unscales
        overflow.add(1)
        batch, norms, clip = loaded.sample(), [], accelerator.clip_grad_norm_
        accelerator.clip_grad_norm_ = lambda *args: norms.append(clip(*args)) or norms[-1]
        told = loaded.train(batch, [[0, 1], [2, 3]])
        assert [skipped for _, skipped in told] == [False, True, False]
        assert accelerator.scaler.get_scale() == 2.0**15
        overflow.clear()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    plain = Loaded(tiny)
    plain.train(batch, [[0, 1], [2, 3]], steps=[0, 2])
    for name, weight in plain.lora().items():
        torch.testing.assert_close(weight, loaded.lora()[name])
    assert norms[0] < 100  # of the unscaled gradient


def test_a_skipped_update_is_counted_in_the_metrics_and_told(tiny, scorers, tmp_path, monkeypatch, capsys, overflow):
    monkeypatch.setattr(plots, "draw_curves", lambda folder: None)
    overflow |= {1, 4, 5}
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness")
    assert [row["skipped"] for row in rows(out / "metrics.jsonl")] == [3, 0]
    assert "3 updates skipped" in capsys.readouterr().out


@pytest.mark.parametrize("after", [0, 2], ids=["to the end", "then two good ones"])
def test_ten_overflows_in_a_row_stop_the_run_and_its_last_epoch_can_be_resumed(
    tiny, scorers, tmp_path, monkeypatch, overflow, after
):
    monkeypatch.setattr(plots, "draw_curves", lambda folder: None)
    flags = ["--num-steps", 6]  # 12 updates an epoch
    overflow |= set(range(24 - after - 10, 24 - after))
    with pytest.raises(SystemExit) as stop:
        run(tiny, tmp_path / "run", f"{scorers}:brightness", *flags)
    assert "Epoch 2" in stop.value.code and "--lr" in stop.value.code and str(tmp_path / "run") in stop.value.code
    assert [row["epoch"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1]
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt")
    assert state["epoch"] == 1 and all(weight.isfinite().all() for weight in state["lora"].values())
    overflow.clear()
    sd_demo.main(["--resume", str(tmp_path / "run")])
    assert left(tmp_path / "run") == left(run(tiny, tmp_path / "whole", f"{scorers}:brightness", *flags))


def test_nine_overflows_do_not_stop_the_run_and_weights_that_are_not_finite_do(
    tiny, scorers, tmp_path, monkeypatch, overflow
):
    monkeypatch.setattr(plots, "draw_curves", lambda folder: None)
    overflow |= set(range(2, 11))
    flags = ["--num-steps", 6]
    out = run(tiny, tmp_path / "nine", f"{scorers}:brightness", *flags, "--epochs", 1)
    assert rows(out / "metrics.jsonl")[0]["skipped"] == 9
    train = sd_demo.train

    def broken(model, *rest):
        told = train(model, *rest)
        next(p for p in model.pipe.unet.parameters() if p.requires_grad).data.view(-1)[0] = math.nan
        return told

    monkeypatch.setattr(sd_demo, "train", broken)
    with pytest.raises(SystemExit, match="not finite any more"):
        run(tiny, tmp_path / "nan", f"{scorers}:brightness")
    assert not rows(tmp_path / "nan" / "metrics.jsonl")


# Stopping and going on

FORK = """
import os, signal, sys
import sd_demo, d3po, torch
from pathlib import Path
from toy import plots, runs

torch.set_num_threads(1)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
plots.draw_curves = lambda folder: None

def wrap(module, name, when, before=None):
    real, count = getattr(module, name), [0]
    def wrapped(*args):
        if when(args):
            count[0] += 1
            if before and count[0] == before[0]:
                before[1](*args)
                die()
        result = real(*args)
        if when(args) and not before:
            die()
        return result
    setattr(module, name, wrapped)

def half(path, rows):  # a line that is cut short
    with path.open("a") as file:
        file.write('{"epoch": 1, "prompt": "a c')

def half_file(path, content):
    path.with_name(path.name + ".part").write_bytes(b"half")

name = lambda file: lambda args: args and isinstance(args[0], Path) and args[0].name == file
always = lambda args: True
nothing = lambda *args: None
MOMENTS = {
    "before the folders": lambda: wrap(runs, "open_run", always),
    "in the first labels": lambda: wrap(runs, "append", name("labels.jsonl"), (1, half)),
    "in the first training": lambda: wrap(d3po, "d3po_losses", always, (2, nothing)),
    "before the first checkpoint": lambda: wrap(runs, "append", name("metrics.jsonl")),
    "in the second labels": lambda: wrap(runs, "append", name("labels.jsonl"), (2, half)),
    "in the second training": lambda: wrap(d3po, "d3po_losses", always, (4, nothing)),
    "in the second metrics": lambda: wrap(runs, "append", name("metrics.jsonl"), (2, half)),
    "between LoRA and checkpoint": lambda: wrap(runs, "save_tensors", always, (2, half_file)),
    "in the last figures": lambda: wrap(plots, "draw_curves", always, (2, nothing)),
}
folder, argv = Path(sys.argv[1]), sys.argv[2:]
for number, moment in enumerate(MOMENTS):
    child = os.fork()
    if child == 0:
        MOMENTS[moment]()
        sd_demo.main([*argv, "--out", str(folder / str(number))])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tiny, scorers, tmp_path, monkeypatch):
    """kill -9 at nine moments of a run; each is resumed, and leaves what an unbroken run leaves."""
    objective = f"{scorers}:brightness"
    argv = ["--model", str(tiny), "--objective", objective, *QUICK]
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", FORK, str(tmp_path), *argv]
        assert subprocess.run(command, env=CPU, stderr=log, stdout=log).returncode == 0, (tmp_path / "log").read_text()
    whole = run(tiny, tmp_path / "whole", objective)
    for number in range(9):
        out = tmp_path / str(number)
        sd_demo.main(["--resume", str(out)])
        assert left(out) == left(whole), number
        names = [sorted(str(p.relative_to(o)) for p in o.rglob("*") if p.suffix != ".part") for o in (out, whole)]
        assert names[0] == names[1], number


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on(tiny, scorers, tmp_path):
    """As a user does it: the script in a process of its own, and kill -9 from outside once an epoch is done."""
    out = tmp_path / "run"
    argv = [*QUICK, "--model", str(tiny), "--objective", f"{scorers}:brightness", "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / "sd_demo.py"), *argv, "--epochs", "50"], env=CPU,
                                   stderr=log, stdout=log)  # fmt: skip
        while process.poll() is None and not ((out / "metrics.jsonl").exists() and rows(out / "metrics.jsonl")):
            time.sleep(0.01)
        process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    done = len(rows(out / "metrics.jsonl"))
    sd_demo.main(["--resume", str(out), "--epochs", str(done + 1)])
    assert left(out) == left(run(tiny, tmp_path / "whole", f"{scorers}:brightness", "--epochs", done + 1))


def test_a_finished_run_is_resumed_with_more_epochs(tiny, scorers, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_curves", lambda folder: None)
    objective = f"{scorers}:brightness"
    short = run(tiny, tmp_path / "short", objective, "--epochs", 1)
    command = json.loads((short / "config.json").read_text())["command"]
    sd_demo.main(["--resume", str(short), "--epochs", "2"])
    assert left(short) == left(run(tiny, tmp_path / "long", objective))
    config = json.loads((short / "config.json").read_text())
    assert config["epochs"] == 2 and config["command"] == command


# Several processes

RANKS = """
import os, sys
import sd_demo, torch
from peft import get_peft_model_state_dict
from toy import plots

torch.set_num_threads(1)
plots.draw_curves = lambda folder: None
learn = sd_demo.learn

def keep(model, args, *rest):
    learn(model, args, *rest)
    torch.save(get_peft_model_state_dict(model.pipe.unet), args.out / f"rank{os.environ['RANK']}.pt")

sd_demo.learn = keep
folder, scorers, *argv = sys.argv[1:]
for name, objective, flags in (
    ("both", "brightness", []), ("first", "first_only", []), ("none", "same", []),
    ("chain", "brightness", ["--loss", "chain", "--update-every", "trajectory"]),
):
    sd_demo.main([*argv, "--objective", f"{scorers}:{objective}", "--out", f"{folder}/{name}", *flags])
"""


@pytest.fixture(scope="module")
def two_processes(tiny, scorers, tmp_path_factory):
    """One epoch of four groups in two processes, in several ways; the last process may have ties only."""
    folder = tmp_path_factory.mktemp("two")
    argv = [*QUICK, "--model", str(tiny), "--epochs", "1", "--pairs-per-epoch", "4"]
    (folder / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (folder / "log").open("w") as log:
        command = [*launch, str(folder / "ranks.py"), str(folder), str(scorers), *argv]
        env = {**CPU, "ACCELERATE_USE_CPU": "true"}  # as `accelerate launch --cpu` sets it
        code = subprocess.run(command, env=env, stdout=log, stderr=log, timeout=1500).returncode
    assert code == 0, (folder / "log").read_text()[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both", "first", "none", "chain"])
def test_two_processes_end_as_one_that_is_fed_both_halves(tiny, two_processes, name):
    out = two_processes / name
    ranks = [torch.load(out / f"rank{n}.pt") for n in (0, 1)]
    assert same_lora(*ranks)
    labels, (row,) = rows(out / "labels.jsonl"), rows(out / "metrics.jsonl")
    assert len({row["images"][0] for row in labels}) == 4 and row["labels"] == 4 and row["skipped"] == 0
    tied = [row["h"] == 0 for row in sorted(labels, key=lambda row: row["images"])]
    assert tied == {"first": [False, True] * 2, "none": [True] * 4}.get(name, [False] * 4)

    flags = ["--loss", "chain", "--update-every", "trajectory"] if name == "chain" else []
    loaded = Loaded(tiny, *flags)
    start = loaded.lora()
    chance = runs.generator(0, sd_demo.PROMPTS, 1)
    numbers = torch.randint(45, (4,), generator=chance)
    batches, losses = [], []
    for n in (0, 1):  # updates: process 0 has the groups 0 and 2, process 1 the groups 1 and 3
        parts = [(f, loaded.sample(numbers[f : f + 1], 2, sd_demo.TRAINING, 1, f)) for f in (2 * n, 2 * n + 1)]
        files = [f"images/e001_p{first:02}_k{k}.png" for first, _ in parts for k in (0, 1)]
        states = [torch.cat(both, 1) for both in zip(*(part.chains for _, part in parts), strict=True)]
        batch = sd_demo.Batch(d3po.Trajectory(*states), torch.cat([part.cond for _, part in parts]), [], [])
        batches.append((batch, files))  # all are sampled before the first update
    for n, (batch, files) in enumerate(batches):
        order = torch.randperm(3, generator=runs.generator(0, sd_demo.STEPS, 1, n)).tolist()
        losses += loaded.train(batch, feedback.pairs_of(labels, files).tolist(), steps=order)
    moved = torch.cat([(loaded.lora()[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(loaded.lora()[name] - ranks[0][name]).flatten() for name in start])
    if name == "none":
        assert not losses and moved.abs().max() == 0 == apart.abs().max() and row["loss"] is None
        return
    # AdamW turns gradients into signs: an element whose gradient is rounding alone moves either way
    assert apart.norm() < 0.02 * moved.norm()
    assert row["loss"] == pytest.approx(sum(loss for loss, _ in losses) / len(losses), rel=1e-4)


@pytest.mark.slow
def test_two_processes_write_one_run_folder(two_processes):
    out = two_processes / "both"
    assert len(list(out.glob("images/e001_*.png"))) == 8
    assert (out / "checkpoint" / "state.pt").exists() and (out / "lora").exists()
    assert sorted(path.name for path in two_processes.iterdir() if path.is_dir()) == ["both", "chain", "first", "none"]
    assert "both/README.md" in {str(path.relative_to(two_processes)) for path in two_processes.glob("*/README.md")}


def test_the_readme_and_the_defaults_are_those_of_the_committed_runs():
    results = ROOT / "toy" / "results"
    assert (results / "emoji_runs.md").read_text() in (ROOT / "README.md").read_text()
    named = json.loads((results / "emoji_runs.json").read_text())["initial, beta 0.06"]
    assert named["command"] == "python sd_demo.py --objective compressibility"
    assert sd_demo.EMOJI_DEFAULTS["beta"] == 0.06 and named["looks"][-1]["epoch"] == sd_demo.EMOJI_DEFAULTS["epochs"]

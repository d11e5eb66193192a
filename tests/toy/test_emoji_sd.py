"""The emoji model: its renderings, tokenizer, training script and committed weights."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from toy.emoji_sd import check, classifier, make, models, render

QUICK = ["--quick", "--threads", "1"]


def drawable() -> bool:
    try:
        return bool(render.sprites())
    except FileNotFoundError:
        return False


needs_font = pytest.mark.skipif(
    not drawable(), reason="needs the Debian package fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The whole path of make.py, tiny."""
    out = tmp_path_factory.mktemp("emoji")
    make.main([*QUICK, "--out", str(out)])
    return out


def weights(out):
    pipe = check.load_pipeline(out)
    return {
        f"{part}.{name}": tensor
        for part in ("vae", "unet", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def refusal(argv, capsys):
    """The sentence with which make.py refuses, after a line on its usage."""
    with pytest.raises(SystemExit) as stop:
        make.main(argv)
    usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert usage.startswith("usage: ")
    return error


class Killed(Exception):
    pass


# Renderings


@needs_font
def test_every_animal_is_drawn_and_no_two_alike():
    drawn = render.sprites()
    assert list(drawn) == render.NAMES and len(render.NAMES) == 45
    assert min(max(sprite.size) for sprite in drawn.values()) > 100
    assert len({sprite.tobytes() for sprite in drawn.values()}) == 45


@needs_font
@pytest.mark.parametrize("kind", render.BACKGROUNDS)
def test_a_rendering_is_a_function_of_animal_and_seed(kind):
    one = render.render("cat", 1, (kind,))
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8
    assert (one == render.render("cat", 1, (kind,))).all()
    assert (one != render.render("cat", 2, (kind,))).any()
    assert (one != render.render("dog", 1, (kind,))).any()


def test_backgrounds_differ_in_what_jpeg_makes_of_them():
    def size(kind):
        pictures = [render.background(np.random.default_rng(n), kind) for n in range(30)]
        return np.median([check.jpeg_kb(picture) for picture in pictures])

    plain, gradient, *rest = (size(kind) for kind in render.BACKGROUNDS)
    assert plain < 0.75  # kB, nearly all of it header
    assert plain < gradient < min(rest)


@needs_font
def test_a_dataset_has_the_animals_in_turn_and_other_pictures_for_other_seeds():
    pictures, labels = render.dataset(50, 3)
    assert labels.tolist() == [*range(45), *range(5)]
    assert (pictures[46] == render.render("dog", [3, 46])).all()
    assert (render.dataset(50, 4)[0] != pictures).any((1, 2, 3)).all()


def test_a_missing_font_is_named_with_its_package(tmp_path, capsys):
    missing, broken = tmp_path / "no.ttf", tmp_path / "bad.ttf"
    broken.write_text("no font")
    for font in (missing, broken):
        out = tmp_path / "out"
        error = refusal([*QUICK, "--out", str(out), "--font", str(font)], capsys)
        assert "fonts-noto-color-emoji" in error and str(font) in error
        assert not out.exists()


# Tokens


@pytest.fixture(scope="module")
def words():
    return models.tokenizer()


def test_each_known_word_is_one_token_and_no_two_are_the_same(words):
    ids = [words(word).input_ids for word in [*models.WORDS, *"0123456789"]]
    assert {len(row) for row in ids} == {3}  # start, the word, end
    assert len({row[1] for row in ids}) == len(models.WORDS) + 10


@pytest.mark.parametrize(
    "prompt",
    ["", "a cat", "A  CAT!", "Zebrafinch", "Kätzchen", "猫 и кот", "🐈\u200d⬛\0\ud7ff"],
)
def test_any_prompt_becomes_tokens_and_fits_the_text_encoder(words, prompt):
    ids = models.tokens(words, [prompt, "x" * 500])
    assert ids.shape == (2, models.MAX_TOKENS) and ids.max() < len(words)
    assert (ids[:, 0] == words.bos_token_id).all() and (ids[:, -1] == words.eos_token_id).all()
    inside = words(prompt).input_ids[1:-1]
    assert words.unk_token_id not in inside  # nothing is lost
    hidden = models.text_encoder(words, tiny=True)(ids).last_hidden_state
    assert torch.isfinite(hidden).all()


def test_the_scheduler_is_that_of_stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    scheduler = models.scheduler()
    found = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(found, alpha_bar, rtol=1e-4, atol=0)  # it is float32
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == list(range(951, 0, -50))
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


# Training


@needs_font
def test_the_quick_model_loads_in_stock_diffusers_and_draws(quick):
    pipe = StableDiffusionPipeline.from_pretrained(quick, local_files_only=True)
    assert {net.dtype for net in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe.safety_checker is None and pipe.tokenizer.model_max_length == models.MAX_TOKENS
    first, again, other = (check.samples(pipe, 2, seed, steps=2) for seed in (0, 0, 1))
    assert first.shape == (2, 64, 64, 3)
    assert (first == again).all() and (first != other).any()


@needs_font
def test_the_quick_model_is_stored_as_fp16_with_its_card_and_losses(quick):
    files = list(quick.glob("*/*.safetensors"))
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert len(files) == 3
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float16}
    card = (quick / "README.md").read_text()
    assert "SIL Open Font License" in card
    assert "python -m toy.emoji_sd.make --quick" in card and "seed 0" in card
    rows = [json.loads(line) for line in (quick / "work" / "loss.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["vae", "unet"]
    assert all(row["loss"] > 0 for row in rows)


@needs_font
def test_latents_have_the_spread_of_the_noise(quick):
    latents = torch.load(quick / "work" / "latents.pt")["latents"].float()
    scaling_factor = check.load_pipeline(quick).vae.config.scaling_factor
    assert latents.shape == (make.QUICK["images"], 4, 16, 16)
    assert latents.mean((0, 2, 3)).abs().max() < 0.02  # bf16
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.02
    assert latents.std() * scaling_factor == pytest.approx(1, abs=1e-3)


def test_standardising_the_latents_changes_no_picture():
    torch.manual_seed(0)
    vae, x = models.vae(tiny=True).double(), torch.rand(20, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mode()).sample
        make.standardise(vae, x)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(after.mode()).sample, picture)
    centred = before.mean - before.mean.mean((0, 2, 3), True)
    torch.testing.assert_close(after.mean / after.std, centred / before.std)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4, dtype=torch.float64))


@pytest.mark.slow
@needs_font
def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(
    quick, tmp_path, monkeypatch
):
    argv = [*QUICK, "--out", str(tmp_path), "--checkpoint-minutes", "0"]
    write = make.write_tensors
    for stage in ("vae", "unet"):

        def write_then_die(path, content, stage=stage):
            write(path, content)
            if path.name == f"{stage}.pt" and content["step"] == 5:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(make, "write_tensors", write_then_die)
            make.main(argv)
    make.main(argv)
    expected, resumed = weights(quick), weights(tmp_path)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_resumed_log_loses_what_the_stop_undid_and_a_line_cut_short(tmp_path):
    log = tmp_path / "loss.jsonl"
    rows = [{"stage": "vae", "step": 100}, {"stage": "unet", "step": 50}]
    undone = {"stage": "unet", "step": 100}
    lines = [json.dumps(row) + "\n" for row in [*rows, undone]]
    log.write_text("".join(lines) + '{"stage": "un')
    make.drop_undone(log, "unet", 50)
    assert log.read_text() == "".join(lines[:2])


@pytest.mark.parametrize("argv", [["--quick"], ["--images", "0"], ["--lr", "inf"]])
def test_bad_flags_are_refused_in_one_sentence(argv, capsys):
    assert argv[0] in refusal(argv, capsys)


@needs_font
def test_the_work_of_another_seed_is_refused(quick, tmp_path, capsys):
    argv = [*QUICK, "--out", str(tmp_path), "--seed", "1", "--work", str(quick / "work")]
    assert "seed 0" in refusal(argv, capsys)


def test_the_average_lags_behind_and_needs_no_graph(tmp_path):
    args = make.Namespace(work=tmp_path, lr=0.1, seed=0, precision="fp32", checkpoint_minutes=1)
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average, _ = make.train("line", net, lambda net, _: -net.weight.sum(), steps=40, args=args)
    assert 0 < average.weight.item() < net.weight.item()
    assert average.weight.is_leaf


def test_the_vaes_psnr_of_a_perfect_and_of_a_shifted_copy():
    class Copy(nn.Module):
        device, shift = torch.device("cpu"), 0.0

        def encode(self, x):
            return make.Namespace(latent_dist=make.Namespace(mode=lambda: x))

        def decode(self, x):
            return make.Namespace(sample=x + self.shift)

    copy, grey = Copy(), np.full((3, 64, 64, 3), 100, np.uint8)
    assert make.psnr(copy, grey) == float("inf")
    copy.shift = 0.02  # a hundredth of the range [-1, 1]
    assert make.psnr(copy, grey) == pytest.approx(40, abs=1e-3)


# The committed weights


@needs_font
def test_the_committed_classifier_names_renderings():
    assert classifier.WEIGHTS.stat().st_size <= 1e6
    assert check.share_right(render.dataset(450, classifier.HELD_OUT)[0]).mean() >= 0.98


def test_the_committed_model_is_small_and_has_its_card():
    assert sum(file.stat().st_size for file in check.FOLDER.glob("*/*.safetensors")) <= 16e6
    card = (check.FOLDER / "README.md").read_text()
    assert "SIL Open Font License" in card
    assert "python -m toy.emoji_sd.make`, seed 0" in card


@needs_font
def test_the_committed_vae_keeps_held_out_renderings():
    pipe = check.load_pipeline()
    assert make.psnr(pipe.vae, render.dataset(20, make.HELD_OUT)[0]) >= 27


@needs_font
@pytest.mark.slow  # 8 s: 45 samples of 20 steps
def test_the_committed_model_draws_what_it_is_asked_for_and_it_compresses_like_the_data():
    drawn = check.samples(check.load_pipeline(), 45)
    rendered = render.dataset(90, make.HELD_OUT)[0]
    assert check.share_right(drawn).mean() >= 0.85
    sizes = [[check.jpeg_kb(picture) for picture in pictures] for pictures in (drawn, rendered)]
    assert 0.85 < np.median(sizes[0]) / np.median(sizes[1]) < 1.15

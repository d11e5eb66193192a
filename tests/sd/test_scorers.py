"""Scorers: the paper's objectives against their definition, and mistakes of one's own function."""

import io
import itertools
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from sd import UserError
from sd.scorers import get_switches, jpeg_kb, load_scorers, split_objective
from toy.emoji_sd import models

PROMPTS = ["a cat", "an ant", "a dog"]
WIDTH = {"hidden_size": 16, "intermediate_size": 32}
DEPTH = {"num_hidden_layers": 1, "num_attention_heads": 2}
MISTAKES = """
import numpy as np
import sys
import torch

def column(images, prompts): return np.zeros((len(images), 1))
def one(images, prompts): return 1.0
def few(images, prompts): return [1.0]
def words(images, prompts): return prompts
def none(images, prompts): pass
def pair(images, prompts): return [1.0] * len(images), {}
def long_pair(images, prompts): return (1.0, 2.0, 3.0)
def lists(images, prompts): return [[1.0] * len(images), {}]
def scores(images, prompts): return {"scores": [1.0] * len(images)}
def unordered(images, prompts): return {1.0, 2.0}
def text(images, prompts): return "12"
def waves(images, prompts): return [1j] * len(images)
def wave_tensor(images, prompts): return torch.zeros(len(images), dtype=torch.complex64)
def wave_array(images, prompts): return list(np.zeros(len(images), dtype=np.complex64))
def vectors(images, prompts): return [np.zeros(3)] * len(images)
def raises(images, prompts): raise RuntimeError("no luck\\nat all")
def leaves(images, prompts): sys.exit(3)
def later(images, prompts): return [1.0] * (len(images) if len(images) == 2 else 1)
not_a_function = 3
"""


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(size, 40, 3) for size in (40, 30, 50)]
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP with random weights, and its folder."""
    folder, words = tmp_path_factory.mktemp("clip"), models.tokenizer()
    text = {"vocab_size": len(words), "max_position_embeddings": models.MAX_TOKENS}
    text |= {
        f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    vision = {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    parts = {"text_config": text | WIDTH | DEPTH, "vision_config": vision | WIDTH | DEPTH}
    model = CLIPModel(CLIPConfig(**parts, projection_dim=8))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), words).save_pretrained(folder)
    return model.eval(), str(folder)


@pytest.fixture
def mistakes(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MISTAKES)
    return file


def test_compressibility_is_minus_the_bytes_of_the_jpeg(images, tmp_path):
    (small,) = load_scorers("compressibility", PROMPTS)
    (large,) = load_scorers("incompressibility", PROMPTS)
    for n, image in enumerate(images):
        image.save(tmp_path / "a.jpg", quality=95)
        size = (tmp_path / "a.jpg").stat().st_size / 1000
        assert large(images, PROMPTS)[n] == size == -small(images, PROMPTS)[n]


def test_the_jpeg_size_does_not_depend_on_where_the_image_was_stored(images):
    stored = io.BytesIO()
    images[0].save(stored, "PNG")
    assert jpeg_kb(Image.open(stored)) == jpeg_kb(images[0])


@torch.no_grad()
def test_alignment_is_the_cosine_of_clips_embeddings(images, clip):
    model, folder = clip
    (score,) = load_scorers("alignment", PROMPTS, clip=folder)
    words = models.tokenizer()
    for image, prompt, value in zip(images, PROMPTS, score(images, PROMPTS), strict=True):
        # By hand, one at a time, without padding: resize the shorter side to 32, crop the middle
        scale = 32 / min(image.size)
        resized = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - 32) // 2 for side in resized.size)
        pixels = np.asarray(resized.crop((left, top, left + 32, top + 32))) / 255
        mean, spread = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        pixels = torch.tensor((pixels - mean) / spread).permute(2, 0, 1)[None].float()
        out = model(input_ids=words(prompt, return_tensors="pt").input_ids, pixel_values=pixels)
        a, b = out.image_embeds[0], out.text_embeds[0]
        # The crop of an odd side and the resize's rounding may differ by a grey level
        assert value == pytest.approx((100 * a @ b / a.norm() / b.norm()).item(), abs=0.3)


def linear_head() -> nn.Module:
    """As sa_0_4_vit_l_14_linear.pth."""
    return nn.Linear(8, 1)


def mlp_head() -> nn.Module:
    """As sac+logos+ava1-l14-linearMSE.pth: linear layers, and dropouts that have numbers too."""
    head = nn.Module()
    head.layers = nn.Sequential()
    for a, b in itertools.pairwise((8, 12, 9, 6, 4, 1)):
        head.layers.append(nn.Linear(a, b))
        if b > 4:
            head.layers.append(nn.Dropout(0.2))
    assert {"layers.0.weight", "layers.7.bias"} <= set(head.state_dict())
    return head


@torch.no_grad()
@pytest.mark.parametrize("make_head", [linear_head, mlp_head])
def test_aesthetic_takes_both_published_heads(images, clip, tmp_path, make_head):
    model, folder = clip
    torch.manual_seed(1)
    head, file = make_head(), str(tmp_path / "head.pth")
    torch.save(head.state_dict(), file)
    (score,) = load_scorers("aesthetic", PROMPTS, clip=folder, head=file)
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(images=images, text=PROMPTS, padding=True, return_tensors="pt")
    expected = model(**inputs).image_embeds.T  # of length 1
    for layer in (part for part in head.modules() if isinstance(part, nn.Linear)):
        expected = layer.weight @ expected + layer.bias[:, None]
    assert score(images, PROMPTS) == pytest.approx(expected[0].tolist(), abs=1e-5)


HEADS = {
    "missing": None,
    "no state dict": b"no head",
    "another width": {"weight": torch.zeros(1, 5), "bias": torch.zeros(1)},
    "no bias": {"weight": torch.zeros(1, 8)},
    "two outputs": {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)},
    "no layer": {},
    "a vector": {"weight": torch.zeros(8), "bias": torch.zeros(1)},
    "a list": [torch.zeros(1, 8)],
    "a tensor": torch.zeros(1, 8),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_does_not_fit_is_refused(clip, tmp_path, name):
    file, head = tmp_path / "head.pth", HEADS[name]
    if isinstance(head, bytes):
        file.write_bytes(head)
    elif head is not None:
        torch.save(head, file)
    with pytest.raises(ValueError, match=f"aesthetic head {re.escape(str(file))}"):
        load_scorers("aesthetic", PROMPTS, clip=clip[1], head=str(file))


@pytest.mark.parametrize("objective", ["aesthetic", "alignment"])
def test_a_clip_that_is_not_there_is_refused_in_one_sentence(objective, tmp_path):
    for name in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(ValueError, match="network access, or a folder") as error:
            load_scorers(objective, PROMPTS, clip=name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_your_own_scorer(images, scorers):
    (score,) = load_scorers(f"{scorers}:brightness", PROMPTS)
    means = [np.asarray(image).mean() for image in images]
    assert score(images, PROMPTS) == pytest.approx(means, rel=1e-15)


@pytest.mark.parametrize(
    "function, message",
    [
        ("column", r"gave numbers of shape \(2, 1\), not \(2,\): give one number for each image"),
        ("one", "gave a float: give one number for each image"),
        ("few", "gave 1 of 2 numbers: give one"),
        ("words", "gave a list with 'a cat': give one"),
        ("none", "gave nothing: give one"),
        ("pair", "gave a tuple: give one"),
        ("long_pair", "gave a tuple: give one"),
        ("lists", r"gave a list with \[1.0, 1.0\]: give one"),
        ("scores", "gave a dict: give one"),
        ("unordered", "gave a set: give one"),
        ("text", "gave a str: give one"),
        ("waves", "gave a list with 1j"),
        ("wave_tensor", "gave a Tensor with 0j"),
        ("wave_array", "gave a list with .*0j"),
        ("vectors", "gave a list with array"),
        ("leaves", "raised SystemExit: 3"),
        ("not_a_function", "no function 'not_a_function'"),
        ("raises", "RuntimeError: no luck"),
        ("missing", "no function 'missing'"),
    ],
)
def test_mistakes_of_your_own_scorer_show_when_it_is_loaded(mistakes, function, message):
    with pytest.raises(UserError, match=message) as error:
        load_scorers(f"{mistakes}:{function}", PROMPTS)
    assert f"mine.py:{function}" in str(error.value)


def test_a_scorer_that_fails_later_is_named_too(mistakes, images):
    (score,) = load_scorers(f"{mistakes}:later", PROMPTS)
    with pytest.raises(UserError, match="mine.py:later gave 1 of 3 numbers"):
        score(images, PROMPTS)


ANSWERS = """
from decimal import Decimal
from fractions import Fraction
import numpy as np
import torch

nan, inf = float("nan"), float("inf")
def f(images, prompts): return ANSWER
"""
GOOD_ANSWERS = {  # what a function returns for three images: the scores, None where there are none
    "[1, 2.5, None]": [1, 2.5, None],
    "[nan, inf, -inf]": [None, None, None],
    "(1, 2, 3)": [1, 2, 3],
    "[True, False, np.bool_(True)]": [1, 0, 1],
    "[np.float16(0.5), np.int64(2), np.float32('nan')]": [0.5, 2, None],
    "[Fraction(1, 2), Decimal('0.25'), Decimal('NaN')]": [0.5, 0.25, None],
    "[torch.tensor(0.5), torch.tensor([2.0]), np.array([3])]": [0.5, 2, 3],
    "np.array([1, 2, 3]) > 1": [0, 1, 1],
    "np.array([1, None, 0.5], dtype=object)": [1, None, 0.5],
    "torch.tensor([1.0, 2.0, nan], requires_grad=True)": [1, 2, None],
    "torch.tensor([1, 2, 3]).bfloat16()": [1, 2, 3],
    "torch.tensor([True, False, True])": [1, 0, 1],
    "(0.5 * n for n in range(3))": [0, 0.5, 1],
    "dict(a=1, b=2, c=3).values()": [1, 2, 3],
}


@pytest.mark.parametrize("answer", GOOD_ANSWERS)
def test_scores_may_come_in_any_numbers(tmp_path, images, answer):
    file = tmp_path / "s.py"
    inside = "[None] * 2 if images[0].width == 64 else " + answer  # of the trial
    file.write_text(ANSWERS.replace("ANSWER", inside))
    (score,) = load_scorers(f"{file}:f", PROMPTS)
    found = score(images, PROMPTS)
    assert all(type(value) is float for value in found)
    assert [None if math.isnan(value) else value for value in found] == GOOD_ANSWERS[answer]


def test_a_number_that_no_float_holds_is_said(tmp_path):
    file = tmp_path / "s.py"
    file.write_text("def f(images, prompts): return [10**400] * len(images)")
    with pytest.raises(UserError, match="s.py:f raised OverflowError"):
        load_scorers(f"{file}:f", PROMPTS)


# A file is like a script that is run from its folder

LIKE_A_SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass
import helper, package.part, plain.part

@dataclass
class Weights:
    scale: float = helper.SCALE

def f(images, prompts):
    import late
    assert Weights.__module__ in __import__("sys").modules
    return [Weights().scale + late.EXTRA + package.part.N + plain.part.N for _ in images]
"""


def make_script(folder, scale: int):
    for name in ("package", "plain"):
        (folder / name).mkdir(parents=True)
        (folder / name / "part.py").write_text("N = 0")
    (folder / "package" / "__init__.py").write_text("")
    (folder / "helper.py").write_text(f"SCALE = {scale}")
    (folder / "late.py").write_text(f"EXTRA = {scale / 10}")
    (folder / "my scorer.v2.py").write_text(LIKE_A_SCRIPT)
    return folder / "my scorer.v2.py"


def test_helpers_beside_a_file_are_its_own(tmp_path, images):
    """Two folders with helpers of the same names, imported at once and late; commas in the path."""
    first, second = (make_script(tmp_path / f"{name}, b", n) for n, name in ((1, "a"), (2, "c")))
    modules, finders = dict(sys.modules), list(sys.meta_path)
    scorers = load_scorers(f"compressibility, {first}:f,{second}:f", PROMPTS)
    for _ in range(2):
        assert scorers[1](images, PROMPTS) == [1.1] * 3
        assert scorers[2](images, PROMPTS) == [2.2] * 3
    assert sys.meta_path == finders
    assert modules.items() <= sys.modules.items()
    assert not {"helper", "late", "package", "plain"} & sys.modules.keys()


def test_a_file_may_have_the_name_of_a_library(tmp_path, monkeypatch):
    """Neither it, nor a plain folder beside it, nor a file hides what is Python's own."""
    for name in ("wave", "colorsys"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    lines = [
        "import time, wave, colorsys",
        "N = bool(time.time and wave.Error and colorsys.ONE_SIXTH)",
    ]
    (tmp_path / "wave.py").write_text("\n".join([*lines, "def f(images, prompts): return [N, N]"]))
    (tmp_path / "time.py").write_text("raise RuntimeError")
    (tmp_path / "colorsys").mkdir()
    load_scorers(f"{tmp_path}/wave.py:f", PROMPTS)


SWITCHES = """
import os, torch

torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
os.chdir(os.path.dirname(__file__))

def f(images, prompts):
    assert not torch.is_grad_enabled() and torch.ones(1).dtype == torch.float64
    return [float(open("number.txt").read())] * len(images)

def g(images, prompts):
    os.chdir("/")
    torch.set_default_dtype(torch.float16)
    raise RuntimeError
"""


def test_what_a_scorer_switches_in_the_process_is_its_own(tmp_path, images):
    (tmp_path / "number.txt").write_text("7")
    (tmp_path / "s.py").write_text(SWITCHES)
    before = get_switches()
    (score,) = load_scorers(f"{tmp_path}/s.py:f", PROMPTS)
    assert score(images, PROMPTS) == score(images, PROMPTS) == [7] * 3
    with pytest.raises(UserError):
        load_scorers(f"{tmp_path}/s.py:g", PROMPTS)
    assert get_switches() == before and torch.ones(1).device.type == "cpu"


def test_a_scorer_gets_copies(tmp_path, images):
    file = tmp_path / "s.py"
    lines = ["def f(images, prompts):", " images[0].putpixel((0, 0), 0)", " prompts.clear()"]
    file.write_text("\n".join([*lines, " images.reverse()", " return [1] * len(images)"]))
    (score,) = load_scorers(f"{file}:f", PROMPTS)
    given, prompts = [image.copy() for image in images], list(PROMPTS)
    score(given, prompts)
    assert given == images and prompts == PROMPTS


SPLIT = {
    "compressibility,incompressibility": ["compressibility", "incompressibility"],
    " compressibility , a.py:f ": ["compressibility", "a.py:f"],
    "a.py:f,b.py:g": ["a.py:f", "b.py:g"],
    "x,y/a.py:f,compressibility": ["x,y/a.py:f", "compressibility"],
    "x,compressibility,y/a.py:f": ["x,compressibility,y/a.py:f"],
    "./compressibility,v2/a.py:f": ["./compressibility,v2/a.py:f"],
    "C:\\x\\a.py:f,b.py:g": ["C:\\x\\a.py:f", "b.py:g"],
    "compressibility,,b.py:g": ["compressibility", ",b.py:g"],
    "beauty,compressibility": ["beauty", "compressibility"],
    "": [""],
}


@pytest.mark.parametrize("objective", SPLIT)
def test_a_comma_ends_a_name_but_not_a_folder(objective):
    known = {"compressibility", "incompressibility"}
    assert split_objective(objective, known) == SPLIT[objective]


def test_a_scorer_is_tried_on_the_prompts_of_the_run(tmp_path):
    file = tmp_path / "s.py"
    file.write_text("def f(images, prompts): return [{'1 hand': 1.0}[p] for p in prompts]")
    load_scorers(f"{file}:f", ["1 hand"])
    with pytest.raises(UserError, match="KeyError: 'a cat'"):
        load_scorers(f"{file}:f", PROMPTS)


@pytest.mark.parametrize(
    "objective",
    ["beauty", "", "compressibility,", "compressibility,beauty", "human,compressibility"],
)
def test_an_unknown_objective_is_refused_with_the_choice(objective):
    message = "unknown: choose one of compressibility, .*human, tags, or give FILE.py:FUNCTION"
    with pytest.raises(ValueError, match=message):
        load_scorers(objective, PROMPTS)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*no.py"):
        load_scorers(f"{tmp_path}/no.py:f", PROMPTS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="broken.py:f cannot be loaded .SyntaxError"):
        load_scorers(f"{tmp_path}/broken.py:f", PROMPTS)

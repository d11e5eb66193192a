"""Scorers: the paper's objectives against their definition, and functions of one's own."""

import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from sd import UserError
from sd.scorers import jpeg_kb, load_scorers, split_objective
from toy.emoji_sd import models

PROMPTS = ["a cat", "an ant", "a dog"]
WIDTH = {"hidden_size": 16, "intermediate_size": 32}
DEPTH = {"num_hidden_layers": 1, "num_attention_heads": 2}


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


def test_compressibility_is_minus_the_bytes_of_the_jpeg(images, tmp_path):
    (small,) = load_scorers("compressibility", PROMPTS)
    (large,) = load_scorers("incompressibility", PROMPTS)
    for n, image in enumerate(images):
        image.save(tmp_path / "a.jpg", quality=95)
        size = (tmp_path / "a.jpg").stat().st_size / 1000
        assert large(images, PROMPTS)[n] == size == -small(images, PROMPTS)[n]


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


def mlp_head() -> nn.Module:
    """As sac+logos+ava1-l14-linearMSE.pth: linear layers, and dropouts that have numbers too."""
    head = nn.Module()
    head.layers = nn.Sequential(*map(nn.Linear, (8, 12, 6), (12, 6, 1)))
    head.layers.insert(1, nn.Dropout(0.2))
    return head


def test_aesthetic_takes_both_published_heads(images, clip, tmp_path):
    model, folder = clip
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(images=images, text=PROMPTS, padding=True, return_tensors="pt")
    torch.manual_seed(1)
    for head in (nn.Linear(8, 1), mlp_head()):  # the first as sa_0_4_vit_l_14_linear.pth
        file = str(tmp_path / "head.pth")
        torch.save(head.state_dict(), file)
        (score,) = load_scorers("aesthetic", PROMPTS, clip=folder, head=file)
        with torch.no_grad():
            expected = model(**inputs).image_embeds.T  # of length 1
            for layer in (part for part in head.modules() if isinstance(part, nn.Linear)):
                expected = layer.weight @ expected + layer.bias[:, None]
        assert score(images, PROMPTS) == pytest.approx(expected[0].tolist(), abs=1e-5)


HEADS = {
    "missing": None,
    "no state dict": b"no head",
    "another width": {"weight": torch.zeros(1, 5), "bias": torch.zeros(1)},
    "no bias": {"weight": torch.zeros(1, 8)},
    "no layer": {},
}


def test_a_head_that_does_not_fit_is_refused(clip, tmp_path):
    for name, head in HEADS.items():
        file = tmp_path / f"{name}.pth"
        if isinstance(head, bytes):
            file.write_bytes(head)
        elif head is not None:
            torch.save(head, file)
        with pytest.raises(UserError, match=f"aesthetic head {re.escape(str(file))}"):
            load_scorers("aesthetic", PROMPTS, clip=clip[1], head=str(file))


@pytest.mark.parametrize("objective", ["aesthetic", "alignment"])
def test_a_clip_that_is_not_there_is_refused_in_one_sentence(objective, tmp_path):
    for name in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(UserError, match="network access, or a folder") as error:
            load_scorers(objective, PROMPTS, clip=name)
        assert name in str(error.value) and "\n" not in str(error.value)


# The objective

SPLIT = {
    " compressibility , a.py:f ": ["compressibility", "a.py:f"],
    "x,y/a.py:f,compressibility": ["x,y/a.py:f", "compressibility"],
    "beauty,compressibility": ["beauty", "compressibility"],
    "": [""],
}


def test_a_comma_ends_a_name_but_not_a_folder():
    assert {objective: split_objective(objective) for objective in SPLIT} == SPLIT


@pytest.mark.parametrize("objective", ["beauty", "", "compressibility,", "human,compressibility"])
def test_an_unknown_objective_is_refused_with_the_choice(objective):
    message = "unknown: choose one of compressibility, .*human, tags, or give FILE.py:FUNCTION"
    with pytest.raises(UserError, match=message):
        load_scorers(objective, PROMPTS)


def test_a_function_may_be_handed_in_and_so_may_a_list(images, scorers):
    def width(images, prompts):
        return [image.width for image in images]

    mixed = [width, "compressibility", f"{scorers}:brightness"]
    widths, sizes, means = (score(images, PROMPTS) for score in load_scorers(mixed, PROMPTS))
    (alone,) = load_scorers(width, PROMPTS)
    assert widths == [image.width for image in images] == alone(images, PROMPTS)
    assert sizes == [-jpeg_kb(image) for image in images]
    assert means == pytest.approx([np.asarray(image).mean() for image in images], rel=1e-15)


# A function of one's own


def answering(answer):
    """A scorer that gives an answer whatever it is asked; None for each image when it is tried."""

    def mine(images, prompts):
        return [None] * 2 if images[0].width == 64 else answer

    return mine


GOOD_ANSWERS = [  # for three images; the scores, None where there are none
    ([1, 2.5, None], [1, 2.5, None]),
    ((math.nan, math.inf, -math.inf), [None, None, None]),
    ([True, np.float16(0.5), torch.tensor(3.0)], [1, 0.5, 3]),
    (np.array([1, None, 0.5], dtype=object), [1, None, 0.5]),
    (torch.tensor([1.0, 2.0, math.nan], requires_grad=True), [1, 2, None]),
]


def test_scores_may_come_in_any_numbers(images):
    for answer, expected in GOOD_ANSWERS:
        (score,) = load_scorers(answering(answer), PROMPTS)
        scores = score(images, PROMPTS)
        assert all(type(value) is float for value in scores)
        assert [None if math.isnan(value) else value for value in scores] == expected, answer


BAD_ANSWERS = [
    (None, "None"),
    ([1.0], r"\[1.0\]"),
    ("123", "'123'"),
    ({"scores": [1, 2, 3]}, r"{'scores': \[1, 2, 3\]}"),
    (([1.0, 2.0, 3.0], {}), r"\(\[1.0, 2.0, 3.0\], {}\)"),
    ([np.zeros(2)] * 3, r"\[array\(\[0., 0.\]\)"),
    ([10**400, 1, 1], r"\[10000"),
    (np.zeros((3, 1)), r"array\(\[\[0.\]"),
    (np.float64(1.0), ".*1.0"),
]


def test_an_answer_that_is_no_list_of_numbers_is_shown(images):
    for answer, text in BAD_ANSWERS:
        (score,) = load_scorers(answering(answer), PROMPTS)
        with pytest.raises(UserError, match=f"the scorer mine gave {text}.*: give a list of 3 num"):
            score(images, PROMPTS)


MISTAKES = {  # a file; what is said of its function f
    "def f(images, prompts): return [1.0]": r"s.py:f gave \[1.0\]: give a list of 2 numbers",
    "def f(images, prompts): raise RuntimeError('no luck')": "s.py:f raised RuntimeError: no luck",
    "def f(images, prompts): return [{'1 hand': 1.0}[p] for p in prompts]": "KeyError: 'a cat'",
    "f = 3": "s.py:f: the file has no function 'f'",
    "def f(:": "s.py:f cannot be loaded .SyntaxError",
    "raise SystemExit": "s.py:f cannot be loaded .SystemExit",
}


def test_mistakes_show_when_a_scorer_is_loaded(tmp_path):
    file = tmp_path / "s.py"
    with pytest.raises(UserError, match=f"there is no file {re.escape(str(file))}"):
        load_scorers(f"{file}:f", PROMPTS)
    for lines, message in MISTAKES.items():
        file.write_text(lines)
        with pytest.raises(UserError, match=message):
            load_scorers(f"{file}:f", PROMPTS)


def test_a_scorer_gets_copies(images):
    def vandal(images, prompts):
        images[0].putpixel((0, 0), 0)
        images.reverse()
        prompts.clear()
        return [1] * len(images)

    (score,) = load_scorers(vandal, PROMPTS)
    same_images, prompts = [image.copy() for image in images], list(PROMPTS)
    score(same_images, prompts)
    assert same_images == images and prompts == PROMPTS


def test_a_file_imports_what_lies_beside_it_and_hides_no_library(tmp_path, images, monkeypatch):
    """It is found by a link, whose folder counts; dataclasses need its module."""
    monkeypatch.syspath_prepend(tmp_path / "nothing")  # and what is added goes at the end
    folder, elsewhere = tmp_path / "a, b", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "helper_of_a_scorer.py").write_text("SCALE = 1")
    (folder / "late_helper_of_a_scorer.py").write_text("EXTRA = 0.5")
    (folder / "colorsys.py").write_text("raise RuntimeError")
    (elsewhere / "blob").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import colorsys\n"
        "import helper_of_a_scorer\n"
        "@dataclass\n"
        "class Weights:\n"
        "    scale: float = helper_of_a_scorer.SCALE\n"
        "def f(images, prompts):\n"
        "    import late_helper_of_a_scorer as late\n"
        "    return [Weights().scale + late.EXTRA] * len(images)\n"
    )
    (folder / "my scorer.v2.py").symlink_to(elsewhere / "blob")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.chdir(tmp_path)
    scorers = load_scorers(f"a, b{os.sep}my scorer.v2.py:f,compressibility", PROMPTS)
    monkeypatch.chdir("/")
    assert scorers[0](images, PROMPTS) == [1.5] * 3

"""Scorers: the paper's objectives against their definition, and mistakes of one's own function."""

import io
import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from sd.scorers import ScorerError, jpeg_kb, load_scorers
from toy.emoji_sd import models

PROMPTS = ["a cat", "an ant", "a dog"]
WIDTH = {"hidden_size": 16, "intermediate_size": 32}
DEPTH = {"num_hidden_layers": 1, "num_attention_heads": 2}
MISTAKES = """
import numpy as np

def column(images, prompts): return np.zeros((len(images), 1))
def one(images, prompts): return 1.0
def few(images, prompts): return [1.0]
def nan(images, prompts): return [float("nan")] * len(images)
def words(images, prompts): return prompts
def none(images, prompts): pass
def raises(images, prompts): raise RuntimeError("no luck\\nat all")
def later(images, prompts): return [1.0] * (len(images) if len(images) == 2 else 1)
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
        ("column", r"\(2, 1\), not \(2,\)"),
        ("one", r"shape \(\), not"),
        ("few", r"\(1,\), not \(2,\)"),
        ("nan", "not finite"),
        ("words", "raised"),
        ("none", "raised"),
        ("raises", "RuntimeError: no luck"),
        ("missing", "missing"),
    ],
)
def test_mistakes_of_your_own_scorer_show_when_it_is_loaded(mistakes, function, message):
    with pytest.raises(ScorerError, match=message) as error:
        load_scorers(f"{mistakes}:{function}", PROMPTS)
    assert f"mine.py:{function}" in str(error.value)


def test_a_scorer_that_fails_later_is_named_too(mistakes, images):
    (score,) = load_scorers(f"{mistakes}:later", PROMPTS)
    with pytest.raises(ScorerError, match="mine.py:later gave numbers of shape"):
        score(images, PROMPTS)


def test_a_scorer_is_tried_on_the_prompts_of_the_run(tmp_path):
    file = tmp_path / "s.py"
    file.write_text("def f(images, prompts): return [{'1 hand': 1.0}[p] for p in prompts]")
    load_scorers(f"{file}:f", ["1 hand"])
    with pytest.raises(ScorerError, match="KeyError: 'a cat'"):
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
    with pytest.raises(ScorerError, match="broken.py:f cannot be loaded .SyntaxError"):
        load_scorers(f"{tmp_path}/broken.py:f", PROMPTS)

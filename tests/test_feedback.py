"""Where labels come from: prompts, scorers, preferences by several scores, and what is told about them."""

import io
import itertools
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import d3po
import feedback
from toy import runs
from toy.emoji_sd import models

CLIP = {"image_size": 32, "patch_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
PROMPTS = ["a cat", "an ant", "a dog"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, 40, 3), dtype=np.uint8)) for size in (40, 30, 50)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP with random weights, and the model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder, words = tmp_path_factory.mktemp("clip"), models.tokenizer()
    text = {"vocab_size": len(words), "max_position_embeddings": models.MAX_TOKENS, "hidden_size": 16}
    text |= {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**CLIP, "intermediate_size": 32}, projection_dim=8))
    model.save_pretrained(folder)
    look = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(look, words).save_pretrained(folder)
    return str(folder), model.eval()


@pytest.fixture
def scorer_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "def brightness(images, prompts): return [np.asarray(image).mean() for image in images]\n"
        "def column(images, prompts): return np.zeros((len(images), 1))\n"
        "def one(images, prompts): return 1.0\n"
        "def few(images, prompts): return [1.0]\n"
        "def nan(images, prompts): return [float('nan')] * len(images)\n"
        "def words(images, prompts): return prompts\n"
        "def none(images, prompts): pass\n"
        "def raises(images, prompts): raise RuntimeError('no luck\\nat all')\n"
        "def later(images, prompts): return [1.0] * (len(images) if len(images) == 2 else 1)\n"
    )
    return file


def judge(objective, watch=None, prompts=PROMPTS):
    flags = Namespace(objective=objective, watch=watch, clip_model="", aesthetic_head="")
    return feedback.Judge(flags, prompts)


# Prompts


def test_the_prompts_are_those_of_the_papers_appendix():
    assert len(feedback.load_prompts("animals")) == 45 and "an ant" in feedback.load_prompts("animals")
    assert feedback.load_prompts("hand") == ["1 hand"]
    assert len(set(feedback.load_prompts("unsafe"))) == 14


def test_a_file_has_one_prompt_a_line_and_blank_lines_are_none(tmp_path):
    (tmp_path / "p.txt").write_text("\n a blue cat \n\nKätzchen\n", encoding="utf-8")
    assert feedback.load_prompts(str(tmp_path / "p.txt")) == ["a blue cat", "Kätzchen"]


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\xfa"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match="--prompts .*p.txt"):
        feedback.load_prompts(str(tmp_path / "p.txt"))


# Scorers


def test_compressibility_is_minus_the_bytes_of_the_jpeg(images, tmp_path):
    (less,), (more,) = (feedback.load_scorers(name, PROMPTS) for name in ("compressibility", "incompressibility"))
    for image, a, b in zip(images, less(images, PROMPTS), more(images, PROMPTS), strict=True):
        image.save(tmp_path / "a.jpg", quality=95)
        assert 1000 * b == pytest.approx((tmp_path / "a.jpg").stat().st_size) and a == -b


@torch.no_grad()
def test_alignment_is_the_cosine_of_clips_embeddings(images, clip):
    (score,) = feedback.load_scorers("alignment", PROMPTS, clip[0])
    words = models.tokenizer()
    for image, prompt, given in zip(images, PROMPTS, score(images, PROMPTS), strict=True):
        # By hand, one at a time, without padding: resize the shorter side to 32, crop the middle, standardise
        scale = 32 / min(image.size)
        resized = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - 32) // 2 for side in resized.size)
        pixels = np.asarray(resized.crop((left, top, left + 32, top + 32))) / 255
        mean, spread = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        pixels = torch.tensor((pixels - mean) / spread).permute(2, 0, 1)[None].float()
        ids = words(prompt, return_tensors="pt").input_ids
        out = clip[1](input_ids=ids, pixel_values=pixels)
        a, b = out.image_embeds[0], out.text_embeds[0]
        # the crop of an odd side and the resize's rounding may differ by a grey level
        assert given == pytest.approx((100 * a @ b / a.norm() / b.norm()).item(), abs=0.3)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["linear", "mlp"])
def test_aesthetic_takes_both_published_heads(images, clip, tmp_path, shape):
    folder, model = clip
    torch.manual_seed(1)
    if shape == "linear":  # sa_0_4_vit_l_14_linear.pth
        net = torch.nn.Linear(8, 1)
    else:  # sac+logos+ava1-l14-linearMSE.pth: an MLP without non-linearities, whose dropouts are numbered too
        widths, net = (8, 12, 9, 6, 4, 1), torch.nn.Module()
        net.layers = torch.nn.Sequential()
        for a, b in itertools.pairwise(widths):
            net.layers.append(torch.nn.Linear(a, b))
            if b > 4:
                net.layers.append(torch.nn.Dropout(0.2))
        assert {"layers.0.weight", "layers.7.bias"} <= set(net.state_dict())
    torch.save(net.state_dict(), tmp_path / "head.pth")
    (score,) = feedback.load_scorers("aesthetic", PROMPTS, folder, str(tmp_path / "head.pth"))
    from transformers import CLIPProcessor

    given = CLIPProcessor.from_pretrained(folder)(images=images, text=PROMPTS, padding=True, return_tensors="pt")
    expected = model(**given).image_embeds.T  # of length 1
    for layer in [net] if shape == "linear" else [m for m in net.layers if isinstance(m, torch.nn.Linear)]:
        expected = layer.weight @ expected + layer.bias[:, None]
    assert score(images, PROMPTS) == pytest.approx(expected[0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "head", [None, b"no head", {"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, {"weight": torch.zeros(1, 8)}, {},
             {"weight": torch.zeros(8), "bias": torch.zeros(1)}, [torch.zeros(1, 8)], torch.zeros(1, 8)]
)  # fmt: skip
def test_a_head_that_does_not_fit_is_refused(clip, tmp_path, head):
    file = tmp_path / "head.pth"
    if isinstance(head, bytes):
        file.write_bytes(head)
    elif head is not None:
        torch.save(head, file)
    with pytest.raises(ValueError, match=f"aesthetic head {re.escape(str(file))}"):
        feedback.load_scorers("aesthetic", PROMPTS, clip[0], str(file))


@pytest.mark.parametrize("objective", ["aesthetic", "alignment"])
def test_a_clip_that_is_not_there_is_refused_in_one_sentence(objective, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(ValueError, match="network access, or a folder") as error:
            feedback.load_scorers(objective, PROMPTS, name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_your_own_scorer(images, scorer_file):
    (score,) = feedback.load_scorers(f"{scorer_file}:brightness", PROMPTS)
    assert score(images, PROMPTS) == [pytest.approx(np.asarray(image).mean()) for image in images]


@pytest.mark.parametrize(
    "function, words",
    [("column", r"\(2, 1\), not \(2,\)"), ("one", r"shape \(\), not"), ("few", r"\(1,\), not \(2,\)"),
     ("nan", "not finite"), ("words", "raised"), ("none", "raised"), ("raises", "RuntimeError: no luck"),
     ("missing", "missing")],
)  # fmt: skip
def test_mistakes_of_your_own_scorer_show_when_it_is_loaded(scorer_file, function, words):
    with pytest.raises(feedback.ScorerError, match=words) as error:
        feedback.load_scorers(f"{scorer_file}:{function}", PROMPTS)
    assert f"mine.py:{function}" in str(error.value)


def test_a_scorer_that_fails_later_is_named_too(scorer_file, images):
    (score,) = feedback.load_scorers(f"{scorer_file}:later", PROMPTS)
    with pytest.raises(feedback.ScorerError, match="mine.py:later gave numbers of shape"):
        score(images, PROMPTS)


def test_a_scorer_is_tried_on_the_prompts_of_the_run(tmp_path):
    (tmp_path / "s.py").write_text("def f(images, prompts): return [{'1 hand': 1.0}[p] for p in prompts]")
    feedback.load_scorers(f"{tmp_path}/s.py:f", ["1 hand"])
    with pytest.raises(feedback.ScorerError, match="a cat"):
        feedback.load_scorers(f"{tmp_path}/s.py:f", PROMPTS)


@pytest.mark.parametrize("objective", ["beauty", "", "compressibility,", "compressibility,beauty"])
def test_an_unknown_objective_is_refused_with_the_choice(objective):
    with pytest.raises(ValueError, match="unknown: choose one of compressibility, .*FILE.py:FUNCTION"):
        feedback.load_scorers(objective, PROMPTS)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*no.py"):
        feedback.load_scorers(f"{tmp_path}/no.py:f", PROMPTS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(feedback.ScorerError, match="broken.py:f cannot be loaded .SyntaxError"):
        feedback.load_scorers(f"{tmp_path}/broken.py:f", PROMPTS)


# Labels


def test_one_score_compares_as_d3po_does():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).round()
    assert (feedback.compare(a[None], b[None]) == d3po.preference(a, b)).all()


def test_with_several_scores_only_dominance_counts():
    cases = {((1, 1), (0, 0)): 1, ((1, 0), (0, 0)): 1, ((1, 0), (0, 1)): 0, ((0, 0), (0, 0)): 0, ((0, 0), (0, 2)): -1}
    a, b = (torch.tensor([case[k] for case in cases]).T for k in (0, 1))
    assert feedback.compare(a, b).tolist() == list(cases.values())
    assert feedback.compare(b, a).tolist() == [-h for h in cases.values()]


@pytest.mark.parametrize("K", [2, 3])
def test_labels_are_rows_of_the_design_for_every_pair_inside_a_group(scorer_file, images, K):
    pictures, prompts = [*images, *images][: 2 * K], [prompt for prompt in PROMPTS[:2] for _ in range(K)]
    files = [f"images/e003_p{n // K:02}_k{n % K}.png" for n in range(2 * K)]
    rows = judge(f"{scorer_file}:brightness").label(pictures, prompts, files, K, 3)
    assert len(rows) == K * (K - 1)
    score = {file: np.asarray(image).mean() for file, image in zip(files, pictures, strict=True)}
    for row in json.loads(json.dumps(rows)):
        assert list(row) == ["epoch", "prompt", "images", "scores", "h"] and row["epoch"] == 3
        a, b = row["images"]
        assert a[:-6] == b[:-6] and a < b and row["prompt"] == prompts[files.index(a)]  # of one group
        assert row["scores"] == [score[a], score[b]]  # as the scorer gave them, to the last digit
        assert row["h"] == np.sign(score[a] - score[b])
    assert len({tuple(row["images"]) for row in rows}) == len(rows)


def test_rows_of_labels_become_pairs_of_chains():
    files = [f"k{n}" for n in range(6)]
    h = {("k0", "k1"): 1, ("k0", "k2"): 0, ("k1", "k2"): -1, ("k3", "k4"): -1, ("x0", "x1"): 1}
    rows = [{"images": list(images), "h": value} for images, value in h.items()]
    assert feedback.pairs_of(rows, files).tolist() == [[0, 1], [2, 1], [4, 3]]
    for nothing in ([], rows[1:2], rows[4:]):
        assert feedback.pairs_of(nothing, files).shape == (0, 2)


def test_pairs_of_labels_are_pairs_from_scores(scorer_file, images):
    files = [f"k{n}" for n in range(6)]
    pictures = [images[n] for n in (0, 1, 1, 2, 0, 1)]  # with a tie
    the = judge(f"{scorer_file}:brightness")
    rows = the.label(pictures, ["a cat"] * 6, files, 3, 1)
    scores = the.scores(pictures, ["a cat"] * 6)[0].view(2, 3)
    pairs = feedback.pairs_of(rows, files).tolist()
    assert len(pairs) == 5 and sorted(pairs) == sorted(d3po.pairs_from_scores(scores).tolist())


def test_several_objectives_are_stored_and_combined(scorer_file, images):
    the = judge(f"compressibility,{scorer_file}:brightness")
    (row,) = the.label(images[:2], PROMPTS[:2], ["a", "b"], 2, 1)
    sizes = [-feedback.jpeg_kb(image) for image in images[:2]]
    light = [np.asarray(image).mean() for image in images[:2]]
    assert row["scores"] == [list(both) for both in zip(sizes, light, strict=True)]
    signs = {np.sign(sizes[0] - sizes[1]), np.sign(light[0] - light[1])}
    assert row["h"] == (signs.pop() if len(signs) == 1 else 0)
    assert feedback.mean_score([row])["score"] == pytest.approx(np.mean(sizes))


def test_a_look_has_all_scores_and_the_mean_of_what_is_only_watched(scorer_file, images):
    look = judge("incompressibility", f"{scorer_file}:brightness").look(images, PROMPTS)
    assert look.scores.shape == (1, 3) and look.score == pytest.approx(np.mean([*map(feedback.jpeg_kb, images)]))
    assert look.watched == pytest.approx(np.mean([np.asarray(image).mean() for image in images]))
    assert judge("incompressibility").look(images, PROMPTS).watched is None


# What is told


def test_agreement_in_numbers():
    told = feedback.agreement(torch.tensor([1.0, -3.0, 2.0]), torch.tensor([[0, 1], [0, 2]]), beta=0.1)
    assert told["accuracy"] == 0.5
    assert told["margin"] == pytest.approx(0.1 * (4 - 1) / 2)
    assert told["log_ratio_winners"] == 1 and told["log_ratio_losers"] == pytest.approx(-0.5)
    assert set(feedback.agreement(torch.zeros(3), torch.zeros(0, 2).long(), 0.1).values()) == {None}


def test_the_mean_score_counts_every_image_once():
    pairs = itertools.combinations({"a": 1, "b": 2, "c": 6}.items(), 2)
    rows = [{"images": [a, b], "scores": [s, t]} for (a, s), (b, t) in pairs]
    told = feedback.mean_score(rows)
    assert told["score"] == 3 and told["score_sem"] == pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)


def test_the_standard_error_of_one_score_is_zero():
    assert feedback.standard_error(torch.tensor([3.0])) == 0


def look(scores, watched=None):
    return feedback.Look([], [], torch.tensor([scores], dtype=torch.float64), watched)


def test_the_win_rate_has_wilsons_interval():
    told = feedback.versus(look([1.0] * 8 + [0.0] * 2, 0.9), look([0.0] * 8 + [1.0] * 2))
    assert told["pairs"] == 10 and told["win_rate"] == pytest.approx(0.8)
    assert told["win_rate_interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)  # as tables have it for 8 of 10
    assert told["initial"] == {"score": 0.2, "score_sem": pytest.approx(0.1333, abs=1e-4), "watched": None}
    assert told["tuned"] == {"score": 0.8, "score_sem": pytest.approx(0.1333, abs=1e-4), "watched": 0.9}


@pytest.mark.parametrize("wins, ends", [(10, [0.7225, 1]), (0, [0, 0.2775]), (5, [0.2366, 0.7634])])
def test_the_interval_stays_inside_0_and_1_and_ties_count_half(wins, ends):
    ones = [1.0] * wins + [0.0] * (10 - wins)
    after, before = ([0.0] * 10, [0.0] * 10) if wins == 5 else (ones, [0.5] * 10)
    told = feedback.versus(look(after), look(before))
    assert told["win_rate"] == wins / 10 and told["win_rate_interval"] == pytest.approx(ends, abs=1e-4)


ROW = {
    "epoch": 3, "score": -2.0, "score_sem": 0.1, "eval_score": None, "eval_win_rate": None, "watched": None,
    "accuracy": 0.75, "log_ratio_winners": 1.5, "log_ratio_losers": -0.5, "kl": 12.0, "kl_trained": 9.0,
    "loss": 0.6, "skipped": 0, "seconds_sample": 1.0, "seconds_train": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [({}, ["epoch 3/9", "score -2.000 ± 0.100", "accuracy 75%", "winners +1.50, losers -0.50", "KL 12.0", "1 + 2 s"]),
     ({"eval_score": -1.0, "eval_win_rate": 0.9, "watched": 0.8}, ["held out -1.000 (initial -2.500)", "rate 90%",
                                                                    "watched 0.800 (initial 0.500)"]),
     ({"log_ratio_winners": -0.1}, ["WARNING: winners lose probability", "--beta"]),
     ({"kl_trained": feedback.KL_LIMIT + 1.0}, ["WARNING: KL", "progress.png"]),
     ({"skipped": 2}, ["2 updates skipped"])],
)  # fmt: skip
def test_an_epochs_line_tells_and_warns(change, words):
    line = feedback.tell(ROW | change, 9, {"eval_score": -2.5, "watched": 0.5})
    assert all(word in line for word in words) and "\n" not in line
    assert line.count("WARNING") == sum("WARNING" in word for word in words)


def test_an_epoch_that_people_labelled_has_no_score():
    assert feedback.mean_score([{"images": ["a", "b"], "scores": None, "h": 1}]) == {"score": None, "score_sem": None}
    row = ROW | {"score": None, "score_sem": None, "watched": 0.8}
    line = feedback.tell(row, 9, {"eval_score": None, "watched": 0.5})
    assert line.startswith("epoch 3/9; watched 0.800 (initial 0.500); accuracy")
    look = feedback.Look([], [], torch.empty(0, 4), 0.25)
    assert feedback.eval_row(look, look) == {"eval_score": None, "eval_win_rate": None, "watched": 0.25}


def test_tags_become_pairs_of_their_own_group():
    rows = [{"images": ["c", "d", "e"], "bad": [True, False, False]}, {"images": ["f", "g", "h"], "bad": [True] * 3},
            {"images": ["x", "y", "z"], "bad": [False, True, True]}]  # fmt: skip
    assert feedback.pairs_of(rows, ["e", "d", "c", "h", "g", "f"]).tolist() == [[1, 2], [0, 2]]
    assert feedback.pairs_of(rows[1:2], ["h", "g", "f"]).shape == (0, 2)


def test_an_epoch_of_ties_is_told_without_a_warning():
    nothing = dict.fromkeys(("accuracy", "margin", "log_ratio_winners", "log_ratio_losers", "loss"))
    assert "WARNING" not in feedback.tell(ROW | nothing, 9, {})


def test_the_flags_have_their_defaults():
    parser = runs.Parser(prog="p")
    feedback.add_flags(parser)
    args = parser.parse_args([])
    assert (args.prompts, args.watch, args.objective) == ("animals", None, None)
    assert args.clip_model == "openai/clip-vit-large-patch14" and "l14-linearMSE" in args.aesthetic_head


def test_the_jpeg_size_does_not_depend_on_the_pictures_past(images):
    stored = io.BytesIO()
    images[0].save(stored, "PNG")
    assert feedback.jpeg_kb(Image.open(stored)) == feedback.jpeg_kb(images[0])  # labels from files are the same

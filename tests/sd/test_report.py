"""What a run leaves to read: sentences, and code that draws what the training drew."""

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from sd_helpers import PROMPTS, Loaded, run, same_images

from sd import files, report

CONFIG = {
    "objective": "compressibility",
    "labels": None,
    "watch": "toy/emoji_sd/classifier.py:recognised",
    "max_kl": 30.0,
    "loss": "chain",
    "model": "/models/emoji_sd",
    "command": "python sd_demo.py --objective compressibility",
    "initial": {"eval_score": -2.09, "watched": 0.998},
    "stopped": None,
}
FIRST = {"epoch": 1, "labels": 64, "eval_score": -2.0, "watched": 0.5, "eval_kl": 1.0}
ROWS = [
    FIRST | {"eval_win_rate": 0.5, "eval_pairs": 10, "kl_trained": 1.0, "accuracy": None},
    {"epoch": 2, "labels": 128, "eval_score": -1.8, "watched": 0.989, "eval_kl": 8.12}
    | {"eval_win_rate": 0.9, "eval_pairs": 10, "kl_trained": 99.0, "accuracy": None},
    {"epoch": 3, "labels": 1280, "eval_score": None, "watched": None, "eval_kl": None}
    | {"eval_win_rate": None, "eval_pairs": None, "kl_trained": 99.0, "accuracy": 0.75},
]
PEOPLE = {"eval_score": None, "eval_win_rate": None, "eval_pairs": None}
UNMEASURED = "Whether its images are better is not measured yet: --evaluate does it."
RESULT = {  # of --evaluate
    "objective": "compressibility",
    "pairs": 450,
    "win_rate": 0.984,
    "win_rate_interval": [0.968, 0.992],
    "unscored": 0,
    "initial": {"score": -2.09, "watched": 0.998},
    "tuned": {"score": -1.8, "watched": 0.9},
    "stock": {
        "pairs": 45,
        "win_rate": 0.8,
        "win_rate_interval": [0.66, 0.89],
        "initial": {"score": -2.0, "watched": None},
        "tuned": {"score": -1.9, "watched": None},
    },
}


@pytest.fixture
def make(tmp_path):
    """A function that stores a run with some other settings and rows."""

    def make(config: dict | None = None, changed: dict | None = None, result: dict | None = None):
        files.save_json(tmp_path / "config.json", CONFIG | (config or {}))
        files.save_lines(tmp_path / "metrics.jsonl", [row | (changed or {}) for row in ROWS])
        (tmp_path / "evaluation.json").unlink(missing_ok=True)
        if result:
            files.save_json(tmp_path / "evaluation.json", result)
        return tmp_path

    return make


def test_the_result_is_what_was_learned_what_it_costs_and_how_far_the_model_went(make):
    assert report.result_sentences(make()) == [
        "Trained on 1,280 preferences by compressibility, in 3 epochs.",
        "Of 10 images from new noise 90 % are better than before (95 % interval 60 to 98 %; ties "
        "count half).",
        "The mean JPEG size is 1.80 kB (before: 2.09 kB).",
        "A separate classifier recognises 98.9 % of the animals (before: 99.8 %).",
        "The KL to the initial model is 8.1 of at most 30 nats.",
    ]
    several = make({"objective": "incompressibility,a/b.py:my_taste", "max_kl": None})
    text = " ".join(report.result_sentences(several))
    assert "by incompressibility and my taste, in" in text
    assert text.endswith(
        "KL to the initial model is 99.0 nats, of new images in the steps trained."
    )


def test_the_result_of_people_and_of_files_needs_no_score(make):
    of_people = {"objective": "human", "initial": {"eval_score": None, "watched": 0.998}}
    assert report.result_sentences(make(of_people, PEOPLE))[:-1] == [
        "Trained on 1,280 preferences by people, in 3 rounds.",
        "A separate classifier recognises 98.9 % of the animals (before: 99.8 %).",
        UNMEASURED,
        "Before it was trained on the last round's answers it agreed with 75 % of them; chance is "
        "50 %.",
    ]
    of_file = of_people | {"objective": None, "labels": "/data/pairs.csv", "watch": None}
    assert report.result_sentences(make(of_file, PEOPLE | {"watched": None}))[:-1] == [
        "Trained on 1,280 preferences from pairs.csv, in 3 epochs.",
        UNMEASURED,
    ]
    both = make(of_file | {"objective": "tags"}, PEOPLE | {"watched": None})
    (first, *_) = report.result_sentences(both)
    assert first.startswith("Trained on 1,280 preferences by tags of people and from pairs.csv")
    files.save_lines(both / "metrics.jsonl", [])
    assert report.result_sentences(both) == ["No epoch is done, so nothing is learned yet."]


def test_an_evaluation_in_words(make):
    words = report.evaluation_sentences(RESULT, "compressibility", CONFIG["watch"])
    assert words == [
        "Of 450 images from new noise 98 % are better than before (95 % interval 97 to 99 %; ties "
        "count half).",
        "The mean JPEG size is 1.80 kB (before: 2.09 kB).",
        "A separate classifier recognises 90.0 % of the animals (before: 99.8 %).",
        "With the pipeline's own settings, pipe(prompt): Of 45 images from new noise 80 % are "
        "better than before (95 % interval 66 to 89 %; ties count half). The mean JPEG size is "
        "1.90 kB (before: 2.00 kB).",
    ]
    result = report.result_sentences(make(result=RESULT | {"epoch": 3}))
    assert result[1:-1] == words  # in place of the held-out images
    assert "Of 10 images" in report.result_sentences(make(result=RESULT | {"epoch": 1}))[1]
    some = report.evaluation_sentences(RESULT | {"unscored": 3, "stock": {}}, "compressibility")
    assert some[2:] == [
        "The mean of watched score is 0.9 (before: 0.998).",
        "Images without a score, which do not count: 3.",
    ]


def test_a_blind_test_in_words():
    blind = {"annotators": 3, "votes": 48, "skipped": 1, "pairs": 16, "win_rate": 1.0}
    blind |= {"win_rate_interval": [0.806, 1.0], "more_than_half_of_votes": 0.9375}
    watched = {"initial": {"watched": 0.5}, "tuned": {"watched": 0.25}, "stock": {}}
    assert report.evaluation_sentences(blind | watched, "human", "a.py:sharp_edges") == [
        "Of 16 blind answers 100 % preferred the tuned model (95 % interval 81 to 100 %; ties "
        "count half).",
        "The mean of sharp edges is 0.25 (before: 0.5).",
        "In 94 % of the questions more than half of the answers preferred it.",
        "Skipped questions: 1.",
    ]


def test_card_and_page_begin_with_the_result_and_ask_nothing_of_the_network(make):
    """The card finds the LoRA in its own folder, the page where that was; keys stay in the JSON."""
    out = make(result=RESULT)
    for name in ("reward_curve.png", "evaluation.png"):
        Image.new("RGB", (4, 4)).save(out / name)
    report.write(out, 2, f"pipe.load_lora_weights({str(out / 'lora')!r})")
    card, page = ((out / name).read_text() for name in ("README.md", "report.html"))
    title, result = card.split("\n\n")[:2]
    assert title == "# emoji_sd, tuned by D3PO on labels by compressibility"
    assert result.split("\n") == report.result_sentences(out)
    assert "pipe.load_lora_weights('lora')" in card and str(out) not in card
    assert re.findall(r"!\[.*?\]\((.*?)\)", card) == ["reward_curve.png", "evaluation.png"]
    links = re.findall(r"(?:src|href)=([^ >]+)", page)
    pictures = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in links]
    assert pictures == [
        (out / name).read_bytes() for name in ("reward_curve.png", "evaluation.png")
    ]
    assert "JPEG size is 1.80 kB" in page and str(out / "lora") in page
    for key in ("eval_score", "win_rate", "watched", "kl_trained", "-1.8"):
        assert key not in card + page


def test_warnings_are_shown_with_their_epochs_and_why_the_run_ended(make):
    out = make({"stopped": "The KL is above --max-kl"}, {"warnings": ["<it> breaks"]})
    report.write(out, 2, "code")
    page = (out / "report.html").read_text()
    for line in ("&lt;it&gt; breaks (epoch 1, 2, 3)", "The KL is above --max-kl"):
        assert f"<li>{line}</li>" in page
    report.write(make(), 2, "code")
    assert "Warnings" not in (out / "report.html").read_text()


def test_the_end_of_a_run_says_what_can_be_done_with_it(make):
    out = make()
    *result, lora, page, evaluate, go_on = report.ending(out, 2, "compressibility").split("\n")
    assert result == report.result_sentences(out)
    assert lora == f"The LoRA: {out / 'lora'}" and page == f"The report: {out / 'report.html'}"
    assert evaluate.endswith(f": python sd_demo.py --evaluate {out}")
    assert go_on == f"To go on: python sd_demo.py --resume {out} --epochs 4"  # as many again
    assert f"--evaluate {out} --objective human" in report.ending(out, 2, None)
    assert "--epochs 2" in report.ending(out, 0, "human")  # ended in its first round
    assert "--epochs" not in report.ending(make({"stopped": "The KL is above"}), 2, "human")


@pytest.mark.slow
def test_the_code_of_the_card_draws_an_image_of_the_tuned_model(tiny, scorers, tmp_path):
    """Also when the folder has moved."""
    made = run(tiny, tmp_path / "made", f"{scorers}:brightness", "--lr 0.02 --eta 0.7")
    assert json.loads((made / "config.json").read_text())["eta"] == 0.7
    out = shutil.move(made, tmp_path / "moved")
    code = re.search("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    assert f"pipe('{PROMPTS[0]}', num_inference_steps=3, guidance_scale=3.0, eta=0.7)" in code
    seeded = code.replace("image = pipe(", "torch.manual_seed(3)\nimage = pipe(")
    subprocess.run([sys.executable, "-c", seeded], check=True, cwd=out)
    image = Image.open(out / "image.png").copy()
    untuned = re.sub("pipe.load_lora.*\n", "", seeded)
    subprocess.run([sys.executable, "-c", untuned], check=True, cwd=out)
    assert not same_images([image], [Image.open(out / "image.png")])
    loaded = Loaded(tiny, "--eta 0.7")  # the chain that was trained, by the stock pipeline
    assert loaded.model.pipe.scheduler.config.set_alpha_to_one is False

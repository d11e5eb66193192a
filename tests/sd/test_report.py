"""sd/report.py: what a run leaves to read, and code that draws what the training drew."""

import base64
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from sd_helpers import PROMPTS, Loaded, run, same_images

import sd_demo
from sd import files, report


@pytest.fixture(scope="module")
def done(tiny, scorers, tmp_path_factory):
    out = tmp_path_factory.mktemp("reported") / "run"
    return run(tiny, out, f"{scorers}:brightness", "--lr 0.02 --eta 0.7")


def test_the_end_of_a_run_says_what_can_be_done_with_it(tiny, scorers, tmp_path, capsys):
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", "--epochs 1")
    *_, lora, page, evaluate, go_on = capsys.readouterr().out.splitlines()
    assert lora == f"The LoRA: {out / 'lora'}" and page == f"The report: {out / 'report.html'}"
    assert evaluate == f"Evaluate: python sd_demo.py --evaluate {out}"
    assert go_on == f"Go on: python sd_demo.py --resume {out} --epochs 2"
    sd_demo.main(go_on.split()[4:])
    assert "2 epochs of D3PO" in (out / "README.md").read_text()


@pytest.mark.slow
def test_the_code_of_the_card_draws_an_image_of_the_tuned_model(done, tiny, tmp_path):
    code = re.search("```python\n(.*?)```", (done / "README.md").read_text(), re.DOTALL)[1]
    seeded = code.replace("image = pipe(", "torch.manual_seed(3)\nimage = pipe(")
    subprocess.run([sys.executable, "-c", seeded], check=True, cwd=tmp_path)
    image = Image.open(tmp_path / "image.png").copy()
    assert f"pipe('{PROMPTS[0]}', num_inference_steps=3, guidance_scale=3.0, eta=0.7)" in code
    subprocess.run(
        [sys.executable, "-c", re.sub("pipe.load_lora.*\n", "", seeded)], check=True, cwd=tmp_path
    )
    assert not same_images([image], [Image.open(tmp_path / "image.png")])
    loaded = Loaded(tiny, "--eta 0.7")  # the chain that was trained, by the stock pipeline
    assert loaded.model.pipe.scheduler.config.set_alpha_to_one is False


def test_an_evaluation_is_written_into_card_and_report(done):
    sd_demo.main(["--evaluate", str(done), "--eval-images", "3", "--eta", "0.3"])
    for name in ("README.md", "report.html"):
        text = (done / name).read_text()
        assert "win_rate_interval" in text and "evaluation.png" in text
        assert "eta=0.7" in text and "2 epochs" in text  # those of the training


def test_the_report_asks_nothing_of_the_network(done):
    page = (done / "report.html").read_text()
    links = re.findall(r"(?:src|href)=([^ >]+)", page)
    inside = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in links]
    assert inside[0] == (done / "reward_curve.png").read_bytes() and len(inside) > 1
    assert "brightness" in page and "eval_score" in page


def test_warnings_are_shown_with_their_epochs_and_why_the_run_ended(done, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    rows = files.read_lines(out / "metrics.jsonl")
    rows[0]["warnings"], rows[1]["warnings"] = ["<it> breaks"], ["<it> breaks", "nothing learned"]
    files.save_lines(out / "metrics.jsonl", rows)
    config = files.read_json(out / "config.json")
    assert config["stopped"] is None
    files.save_json(out / "config.json", config | {"stopped": "The KL is above --max-kl"})
    report.write(out, 2, "code")
    page = (out / "report.html").read_text()
    for line in ("&lt;it&gt; breaks (epoch 1, 2)", "nothing learned (epoch 2)", "The KL is above"):
        assert f"<li>{line}" in page
    assert "<th>warnings" not in page
    files.save_lines(out / "metrics.jsonl", [row | {"warnings": []} for row in rows])
    files.save_json(out / "config.json", config)
    report.write(out, 2, "code")
    assert "Warnings" not in (out / "report.html").read_text()


def test_numbers_are_short():
    assert report.show({"a": 0.123456, "b": None, "c": [0.5, 1]}) == "a 0.1235, c 0.5 to 1"

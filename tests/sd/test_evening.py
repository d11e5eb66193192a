"""One evening with people, from the command to a LoRA that loads: the emoji model in Chromium."""

import io
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_annotate import (
    Page,
    browser,  # noqa: F401, a fixture
    free_port,
    is_serving,
    open_tab,
    read_rows,
    request,
    until,
)
from test_human_run import WAIT, lora_of, start  # noqa: F401, the fixture

import sd_demo
from sd import annotate
from sd.files import read_lines, save_lines
from sd.labels import majority, read_labels

FLAGS = "--objective human --prompts-per-epoch 24 --eval-images 8 --seed 0"
ASKED, TRAINED_AFTER, FINISHED_AFTER = 24, 20, 5  # questions an epoch; answers in epochs 1 and 3


def warmth(png: bytes) -> float:
    pixels = np.asarray(Image.open(io.BytesIO(png)), float)
    return (pixels[..., 0] - pixels[..., 2]).mean()


class Person:
    """Likes warm colours; one answer in ten is random. Presses the keys of the page."""

    def __init__(self, tab, page: Page):
        self.tab, self.page, self.random = tab, page, random.Random(0)
        self.answers = []  # (images, h)

    def wait_for(self, done: int, epoch: int) -> None:
        count = "state.questions.filter(q => q.answered).length"
        right = f"([done, epoch]) => at >= 0 && !busy && state.progress.epoch === epoch && {count}"
        self.tab.wait_for_function(f"{right} === done", arg=[done, epoch])

    def answer(self) -> None:
        question = self.tab.evaluate("state.questions[at]")
        first, second = (warmth(request(self.page, "GET", url).body) for url in question["images"])
        h = 1 if first > second else -1
        if self.random.random() < 0.1:
            h = self.random.choice([1, -1])
        left = -h if question["left"] else h
        self.tab.keyboard.press("ArrowLeft" if left == 1 else "ArrowRight")
        self.answers.append(h)


@pytest.mark.slow
def test_an_evening(browser, start, tmp_path, monkeypatch):  # noqa: F811
    out, output = tmp_path / "run", tmp_path / "output.txt"
    page = Page(out, free_port())
    process = start([*FLAGS.split(), "--out", str(out), "--port", str(page.port)])
    until(lambda: is_serving(page))
    address, tunnel = (re.search(sign, output.read_text()) for sign in (r"http://\S+", r"ssh -L.*"))
    assert address[0] == page.url and f"{page.port}:127.0.0.1:{page.port}" in tunnel[0]
    with open_tab(browser, page.url) as tab:
        person = Person(tab, page)
        for done in range(TRAINED_AFTER):
            person.wait_for(done, 1)
            person.answer()
        person.wait_for(TRAINED_AFTER, 1)
        assert tab.locator("#done").text_content() == "Round 1 of 20: 20 answered, 4 left"
        tab.screenshot(path=tmp_path / "question.png")
        tab.get_by_role("button", name="Train now").click()
        tab.get_by_text("Training, round 1 of 20").wait_for()
        for done in range(ASKED):
            person.wait_for(done, 2)
            person.answer()
        tab.get_by_text("Undo the last answer").wait_for()
        tab.get_by_text("Training, round 2 of 20").wait_for()
        tab.get_by_text("Now, from the same starting noise").wait_for()
        tab.screenshot(path=tmp_path / "training.png")
        for done in range(FINISHED_AFTER):
            person.wait_for(done, 3)
            person.answer()
        person.wait_for(FINISHED_AFTER, 3)
        tab.get_by_role("button", name="Finish").click()
        tab.get_by_text("Last training, then your result").wait_for()
        tab.get_by_text("The run has finished").wait_for()
        code = tab.locator("#code").text_content()
        tab.screenshot(path=tmp_path / "end.png")
        assert tab.problems == []
    assert process.wait(WAIT) == 0, output.read_text()

    rows = read_rows(out)
    given = [row["h"] for row in rows if row["h"] is not None]
    assert given == person.answers and len(rows) == 3 * ASKED
    labels = [row["labels"] for row in read_lines(out / "metrics.jsonl")]
    assert len(labels) == 3 and code in (out / "README.md").read_text()

    # The LoRA loads, by the code of the page
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert Image.open(tmp_path / "image.png").size == (64, 64)

    # The same answers from the file, without a page: the same bytes
    def ask(server, questions, progress):
        epoch = questions[0]["epoch"]
        given = [row for row in read_lines(out / "labels.jsonl") if row["epoch"] == epoch]
        save_lines(server.file, given)
        answers = read_labels(server.file, questions).values()
        server.finished = epoch == 3
        return [
            {**row, "h": majority(row, list(of_one.values()))}
            for row, of_one in zip(questions, answers, strict=True)
        ]

    monkeypatch.setattr(annotate.AnnotationServer, "ask", ask)
    again = tmp_path / "again"
    sd_demo.main([*FLAGS.split(), "--out", str(again)])
    assert lora_of(again) == lora_of(out)

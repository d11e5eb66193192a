"""Runs of sd_demo.py that people label: the page and the training together."""

import http.client
import io
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_annotate import (
    AS_JSON,
    WAIT,
    Page,
    browser,  # noqa: F401, a fixture
    free_port,
    is_serving,
    open_questions,
    open_tab,
    post_answer,
    read_rows,
    request,
    until,
)

import sd_demo
from sd import annotate, figures
from sd.files import ROOT
from sd.scorers import jpeg_kb

TRAINING = """
    --precision fp32 --num-steps 3 --skip-last 0 --lr 0.01 --lora-rank 4 --guidance-scale 3
    --epochs 2 --prompts-per-epoch 4 --images-per-prompt 2 --batch-size 2
    --eval-images 2 --eval-every 1 --seed 3
    --loss eq14 --update-every timestep --beta 0.06 --replay 1 --average-weights --max-kl 1e6
    --warm-up 2
"""


def new_run(model: Path, out: Path, flags: str) -> list[str]:
    return [*TRAINING.split(), "--model", str(model), "--out", str(out), *shlex.split(flags)]


@pytest.fixture
def start(tmp_path):
    """Start sd_demo.py beside the test."""
    processes = []

    def starter(argv: list[str]) -> subprocess.Popen:
        offline = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(ROOT / "sd_demo.py"), *argv]
        with (tmp_path / "output.txt").open("a") as out:
            options = {"stdout": out, "stderr": out, "cwd": tmp_path, "env": os.environ | offline}
            processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    yield starter
    for process in processes:
        process.kill()
        process.wait()


def kill(process: subprocess.Popen) -> None:
    process.kill()  # SIGKILL
    process.wait(WAIT)


def answer_questions(page: Page, choose, stop: int | None = None) -> int:
    """Answer the questions of a run that starts, until it ends, or the first `stop` of them.

    choose(page, question) gives the answer. Returns how many were answered.
    """
    count, has_begun, end = 0, False, time.monotonic() + WAIT
    while count != stop:
        assert time.monotonic() < end, "it took too long"
        try:
            for question in open_questions(page)[: stop and stop - count]:
                answer = choose(page, question)
                assert post_answer(page, question["id"], answer).status == 200
                count += 1
            has_begun = True
        except (OSError, http.client.HTTPException):
            if has_begun:
                break
        time.sleep(0.05)
    return count


def run_with_people(argv: list[str], page: Page, choose) -> int:
    """sd_demo.py in this process, while somebody answers; returns how many answers."""
    counts = []
    people = threading.Thread(
        target=lambda: counts.append(answer_questions(page, choose)), daemon=True
    )
    people.start()
    sd_demo.main([*argv, "--port", str(page.port)])
    people.join(WAIT)
    return counts[0]


def prefer_plain(page: Page, question: dict) -> int:
    """What a person answers who likes the plainer image: the smaller JPEG."""
    files = [io.BytesIO(request(page, "GET", url).body) for url in question["images"]]
    sizes = [jpeg_kb(Image.open(file)) for file in files]
    return int(np.sign(sizes[1] - sizes[0]))


def last_metrics(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def lora_of(run: Path) -> bytes:
    return (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes()


def test_a_run_asks_trains_and_ends(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 0)
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 0)
    out = tmp_path / "run"
    flags = "--objective tags --epochs 1 --prompts-per-epoch 2 --images-per-prompt 3 --num-steps 2"
    argv = new_run(tiny, out, flags)
    assert run_with_people(argv, Page(out, free_port()), lambda *_: [True, False, False]) == 2
    assert [row["bad"] for row in read_rows(out)] == [[True, False, False]] * 2
    metrics = last_metrics(out)
    assert metrics["labels"] == 4 and metrics["bad_share"] == 1 / 3 and metrics["loss"] > 0
    assert metrics["score"] is metrics["eval_score"] is None
    assert lora_of(out)


@pytest.mark.parametrize("objective, answers", [("tags", [[False] * 2]), ("human", [None, 0])])
def test_people_who_prefer_nothing_in_three_epochs_end_the_run(
    tiny, tmp_path, monkeypatch, objective, answers
):
    monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 0)
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 0)
    monkeypatch.setattr(figures, "draw_run", lambda run: [])
    said, close = [], annotate.AnnotationServer.close
    monkeypatch.setattr(
        annotate.AnnotationServer, "close", lambda *args: said.append(args[1]) or close(*args)
    )
    out = tmp_path / "run"
    argv = new_run(tiny, out, f"--objective {objective} --epochs 5 --prompts-per-epoch 2")
    given = itertools.cycle(answers)
    with pytest.raises(SystemExit, match="No label of the epochs 1 to 3 says .*The run stops"):
        run_with_people(argv, Page(out, free_port()), lambda *_: next(given))
    assert len(read_rows(out)) == 6 and last_metrics(out)["epoch"] == 3
    assert said[0].startswith("No label of the epochs 1 to 3") and lora_of(out)


@pytest.mark.slow
def test_who_likes_plain_images_trains_the_weights_of_compressibility(tiny, start, tmp_path):
    """And kill -9 at three moments changes nothing: between labels, in training, an epoch later."""
    automatic, people = tmp_path / "automatic", tmp_path / "people"
    page = Page(people, free_port())
    flags = "--objective"
    sd_demo.main(new_run(tiny, automatic, f"{flags} compressibility"))
    begin = new_run(tiny, people, f"{flags} human --watch compressibility")
    resume = ["--resume", str(people)]
    for argv, answers in ((begin, 2), (resume, 2), (resume, 1)):
        process = start([*argv, "--port", str(page.port)])
        assert answer_questions(page, prefer_plain, stop=answers) == answers
        if len(read_rows(people)) == 4:  # all of the first epoch
            until(
                lambda: request(page, "GET", "/state").json()["status"] == "Training, round 1 of 2"
            )
        kill(process)
    assert len(read_rows(people)) == 5
    assert run_with_people(resume, page, prefer_plain) == 3

    answers = {tuple(row["images"]): row["h"] for row in read_rows(people)}
    assert answers == {tuple(row["images"]): row["h"] for row in read_rows(automatic)}
    assert len(read_rows(people)) == 8 and set(answers.values()) >= {1, -1}
    assert lora_of(people) == lora_of(automatic)
    by_people, by_score = last_metrics(people), last_metrics(automatic)
    assert by_people["watched"] == by_score["eval_score"]
    assert by_people["score"] is by_people["eval_score"] is None
    assert by_people["loss"] == by_score["loss"]
    assert by_people["accuracy"] == by_score["accuracy"]
    for name in ("reward_curve", "progress", "before_after"):
        assert (people / f"{name}.png").exists()


@pytest.mark.slow
def test_labels_of_another_tool_train_without_a_page(tiny, start, tmp_path):
    out = tmp_path / "run"
    page = Page(out, free_port())
    flags = "--objective tags --images-per-prompt 3 --prompts-per-epoch 2 --epochs 1"
    process = start([*new_run(tiny, out, flags), "--port", str(page.port)])
    until(lambda: is_serving(page))
    kill(process)
    questions = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [len(row["images"]) for row in questions] == [3, 3] and not read_rows(out)

    def write(*answers):
        rows = [row | {"bad": bad} for row, bad in zip(questions, answers, strict=True)]
        (out / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    resume = ["--resume", str(out), "--port", str(page.port)]
    write([True, False, False], 1)
    with pytest.raises(SystemExit, match="labels.jsonl, line 2: 'bad' is 1: .* 3 booleans"):
        sd_demo.main(resume)
    assert not (out / "checkpoint" / "state.pt").exists()

    write([True, False, False], [True, False, False])
    with socket.create_server(("127.0.0.1", page.port)):  # no page could open there
        sd_demo.main(resume)
    metrics = last_metrics(out)
    assert metrics["labels"] == 4 and metrics["bad_share"] == 1 / 3 and metrics["loss"] > 0

    # what people saw is never replaced by another image
    file = out / questions[0]["images"][0]
    Image.new("RGB", (64, 64), "red").save(file)
    (out / "checkpoint" / "state.pt").unlink()
    with pytest.raises(SystemExit, match="cannot be sampled again as people saw it"):
        sd_demo.main(resume)
    assert Image.open(file).getpixel((0, 0)) == (255, 0, 0)


def end(page: Page, question: dict, what: str) -> None:
    body = json.dumps({"id": question["id"], "end": what}).encode()
    assert request(page, "POST", "/end", body, AS_JSON).status == 200


def test_train_now_takes_the_answers_so_far_and_finish_ends_the_run(tiny, tmp_path, monkeypatch):
    """Epoch 1: two of four answers, train; epoch 2 of 5: one answer, finish."""
    monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 0)
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 0)
    out, states = tmp_path / "run", []
    page = Page(out, free_port())
    argv = new_run(tiny, out, "--objective human --epochs 5 --question 'Which is friendlier?'")

    def people():
        for answers, what in ((2, "questions"), (1, "run")):
            until(lambda: is_serving(page) and open_questions(page))
            states.append(json.loads(request(page, "GET", "/state").body))
            questions = open_questions(page)
            for question in questions[:answers]:
                assert post_answer(page, question["id"], 1).status == 200
            end(page, questions[answers], what)
            until(lambda: not is_serving(page) or not open_questions(page))

    thread = threading.Thread(target=people, daemon=True)
    thread.start()
    sd_demo.main([*argv, "--port", str(page.port)])
    thread.join(WAIT)
    labels = [(row["epoch"], row["h"]) for row in read_rows(out)]
    skipped = {1: 2, 2: 3}
    for epoch, answers in ((1, 2), (2, 1)):
        of_epoch = [h for number, h in labels if number == epoch]
        assert of_epoch == [1] * answers + [None] * skipped[epoch]
    assert last_metrics(out)["epoch"] == 2 and (out / "report.html").exists() and lora_of(out)
    assert [state["guide"] for state in states] == ["Which is friendlier?"] * 2
    assert states[1]["progress"] == {"epoch": 2, "epochs": 5, "total": 20} | {
        "before": 4,
        "asked": 4,
    }


@pytest.mark.slow
def test_finish_before_any_answer_trains_nothing_and_a_resumed_run_asks_again(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 0)
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 0)
    out, asked = tmp_path / "run", []
    page = Page(out, free_port())

    def answer_and_end(*answers):
        def people():
            for count in answers:
                until(lambda: is_serving(page) and open_questions(page))
                questions = open_questions(page)
                asked.append([question["images"] for question in questions])
                for question in questions[:count]:
                    assert post_answer(page, question["id"], 1).status == 200
                if count < len(questions):
                    end(page, questions[count], "run")
                until(lambda: not is_serving(page) or not open_questions(page))

        thread = threading.Thread(target=people, daemon=True)
        thread.start()
        return thread

    thread = answer_and_end(4, 0)
    flags = ["--port", str(page.port)]
    sd_demo.main([*new_run(tiny, out, "--objective human --epochs 5"), *flags])
    thread.join(WAIT)
    before = lora_of(out)
    assert last_metrics(out)["epoch"] == 1 and {row["epoch"] for row in read_rows(out)} == {1}
    assert (out / "report.html").exists()

    thread = answer_and_end(1)
    sd_demo.main(["--resume", str(out), *flags])
    thread.join(WAIT)
    assert last_metrics(out)["epoch"] == 2 and lora_of(out) != before
    assert [row["h"] for row in read_rows(out)] == [1] * 5 + [None] * 3
    assert [len(images) for images in asked] == [4, 4, 4]


@pytest.mark.slow
def test_a_blind_test_may_stop_early(tiny, tmp_path, monkeypatch):
    """Its page ends with the result, the training's images, and how to use the LoRA."""
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 0)
    out, end_states, images = tmp_path / "run", [], []
    page = Page(out / "blind_e001", free_port())
    sd_demo.main(new_run(tiny, out, "--objective compressibility --epochs 1"))

    def people():
        until(lambda: is_serving(page) and open_questions(page))
        questions = open_questions(page)
        for question in questions[:2]:
            post_answer(page, question["id"], 1)
        end(page, questions[2], "run")
        state = until(lambda: (now := request(page, "GET", "/state").json())["ended"] and now)
        end_states.append(state)
        images.extend(request(page, "GET", f"/{url}") for urls in state["shown"] for url in urls)

    thread = threading.Thread(target=people, daemon=True)
    thread.start()
    blind = ["--evaluate", str(out), "--objective", "human", "--eval-images", "5"]
    sd_demo.main([*blind, "--port", str(page.port)])
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["pairs"], result["skipped"], result["win_rate"]) == (2, 3, 1.0)
    (state,) = end_states
    assert "better in 100% of 2" in state["status"] and str(out / "lora") in state["status"]
    assert state["code"] in (out / "README.md").read_text()
    assert [urls[0] for urls in state["shown"]] == ["held_out/0/0", "held_out/1/0"]
    assert len(images) == 4 and {image.status for image in images} == {200}


@pytest.mark.slow
def test_a_blind_test_shows_no_name_and_counts_wins(tiny, start, tmp_path):
    out = tmp_path / "run"
    page = Page(out / "blind_e001", free_port())
    sd_demo.main(new_run(tiny, out, "--objective compressibility --epochs 1"))
    blind = ["--evaluate", str(out), "--objective", "human", "--eval-images", "5"]
    seen = []

    def choose(page, question):
        seen.append(question)
        return [1, -1, 0, None, 1][len(seen) - 1]

    process = start([*blind, "--port", str(page.port)])
    assert answer_questions(page, choose, stop=2) == 2
    kill(process)
    assert run_with_people(blind, page, choose) == 3  # goes on where it stopped
    assert not any(word in json.dumps(seen) for word in ("tuned", "initial"))
    assert len({question["left"] for question in seen}) == 2
    result = json.loads((out / "evaluation.json").read_text())
    assert result["objective"] == "human" and result["pairs"] == 4 and result["votes"] == 4
    assert result["win_rate"] == pytest.approx((2 + 0.5) / 4) and result["skipped"] == 1
    assert result["more_than_half_of_votes"] == 2 / 4
    low, high = result["win_rate_interval"]
    assert low < 0.6 < high
    assert (out / "evaluation.png").exists()


@pytest.mark.slow
def test_chromium_labels_an_epoch_and_the_next_one_appears(browser, start, tmp_path):  # noqa: F811
    """The emoji model; killed in the first epoch."""
    out = tmp_path / "run"
    page = Page(out, free_port())
    model = ROOT / "toy" / "emoji_sd"
    process = start([*new_run(model, out, "--objective human"), "--port", str(page.port)])
    until(lambda: is_serving(page))
    with open_tab(browser, page.url) as tab:

        def wait_for(left):
            script = "state.questions.filter(q => !q.answered).length"
            tab.wait_for_function(f"left => {script} === left && !busy", arg=left)

        def press(key, left):
            wait_for(left)
            tab.keyboard.press(key)

        press("ArrowLeft", 4)
        press("ArrowRight", 3)
        wait_for(2)
        kill(process)
        tab.keyboard.press("ArrowLeft")
        tab.get_by_text("--resume").wait_for()
        assert len(read_rows(out)) == 2
        process = start(["--resume", str(out), "--port", str(page.port)])
        press(" ", 2)
        press("s", 1)
        tab.get_by_text("Training, round 1 of 2").wait_for()
        press("ArrowLeft", 4)  # the second epoch
        assert (out / "checkpoint" / "state.pt").exists()
        for left in (3, 2, 1):
            press("ArrowLeft", left)
        tab.get_by_text("The run has finished").wait_for()
        assert process.wait(WAIT) == 0, (tmp_path / "output.txt").read_text()
        # no other problem than the time when the program was dead
        assert all("CONNECTION_REFUSED" in problem for problem in tab.problems)
    assert [row["epoch"] for row in read_rows(out)] == [1] * 4 + [2] * 4
    assert [row["h"] for row in read_rows(out)[2:4]] == [0, None]

"""The labelling page: the questions themselves, its requests, and people with a browser."""

import contextlib
import http.client
import http.server
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock
from urllib.parse import quote, urlsplit

import pytest
from PIL import Image

from sd import annotate
from sd.figures import held_out_file
from sd.files import ROOT, save_lines
from sd.prompts import PROMPTS

WAIT = 120  # seconds that nothing here should take, even where the machine is busy
AS_JSON = {"Content-Type": "application/json"}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        return json.loads(self.body)


class Page(NamedTuple):
    """Where the page of a run is, once it has begun to ask."""

    run: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{(self.run / 'token').read_text()}/"


def request(page, method: str, path: str, body=None, headers=None) -> Reply:
    """A request to a path of a Page, or a Session's."""
    parts = urlsplit(page.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=WAIT)
    with contextlib.closing(connection):
        target = parts.path.removesuffix("/") + "/" + path.removeprefix("/")
        connection.request(method, target, body, headers or {})
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers, reply.read())


def post(page, path: str, **content) -> Reply:
    return request(page, "POST", path, json.dumps(content), AS_JSON)


def post_answer(page, question: str, answer, name: str | None = None) -> Reply:
    return post(page, "answer", id=question, answer=answer, name=name)


def open_questions(page) -> list[dict]:
    return unanswered(request(page, "GET", "/state").json()["questions"])


def unanswered(questions: list[dict]) -> list[dict]:
    return [question for question in questions if not question["answered"]]


def until(condition):
    end = time.monotonic() + WAIT
    while not (result := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
    return result


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def is_serving(page) -> bool:
    try:
        return request(page, "GET", "/").status == 200
    except OSError:
        return False


def make_questions(run: Path, kind: str = "h", *, epoch: int = 3, N: int = 4, K: int = 2):
    """N questions about images that are drawn into a run folder."""
    (run / "images").mkdir(exist_ok=True)
    (run / "labels.jsonl").touch()
    questions = []
    for p, prompt in enumerate(PROMPTS["animals"][:N]):
        files = [f"images/e{epoch:03}_p{p:02}_k{k}.png" for k in range(K)]
        for k, file in enumerate(files):
            Image.new("RGB", (64, 64), (60 * epoch, 5 * p, 30 * k)).save(run / file)
        empty = {"scores": None, "h": None} if kind == "h" else {"bad": None}
        questions.append({"epoch": epoch, "prompt": prompt, "images": files, **empty})
    return questions


def read_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]


# Questions, without a server


class People:
    """Questions of a run folder, and people who answer them in order."""

    def __init__(self, run: Path, rows: list[dict], annotators: int = 1, seed: int = 0):
        self.questions = annotate.Questions(
            run / "labels.jsonl", rows, annotators=annotators, seed=seed
        )

    def open(self, name: str | None = None) -> list[dict]:
        return unanswered(self.questions.of_person(self.questions.check_name(name)))

    def answer(self, *answers, name: str | None = None) -> None:
        """Answer the first open questions."""
        for answer in answers:
            self.questions.answer(self.open(name)[0]["id"], name, answer)

    def decide(self) -> tuple[list, float]:
        """What the majority says of each question, and kappa."""
        assert self.questions.missing == 0
        rows, kappa = annotate.decide(self.questions.wait())
        return [row[annotate.labels.answer_field(row)] for row in rows], kappa


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 0)
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 0)


@contextlib.contextmanager
def refusal(status: int, words: str = ""):
    with pytest.raises(annotate.Refusal) as error:
        yield
    assert error.value.status_code == status and words in error.value.detail


def test_an_answer_is_a_line_of_the_file(tmp_path):
    rows = make_questions(tmp_path)
    people = People(tmp_path, rows)
    asked = people.open()
    assert [q["prompt"] for q in asked] == [row["prompt"] for row in rows]
    for n, h in enumerate([1, 0, -1, None]):
        people.answer(h)
        assert read_rows(tmp_path)[-1] == rows[n] | {"h": h, "left": asked[n]["left"]}
    assert people.open() == [] and people.decide()[0] == [1, 0, -1, 0]
    assert rows[0]["h"] is None
    with refusal(409, "too late"):
        people.questions.answer(asked[0]["id"], None, 1)
    with refusal(409, "too late"):
        people.questions.images(asked[0]["images"][0].split("/")[1])


def test_tags_are_a_list_with_a_boolean_for_each_image(tmp_path):
    rows = make_questions(tmp_path, "bad", N=1, K=4)
    people, marks = People(tmp_path, rows, annotators=2), [True, True, False, False]
    for wrong in ([True], 1, [1] * 4):
        with refusal(400, "give a list of 4 booleans"):
            people.answer(wrong, name="Ann")
    people.answer(marks, name="Ann")
    people.answer([True, False, False, False], name="Bob")
    assert read_rows(tmp_path)[0] == rows[0] | {"bad": marks, "annotator": "Ann"}
    answers, kappa = people.decide()
    assert answers == [[True, False, False, False]]
    # each image is an item: agreement 3/4, shares 3/8 and 5/8
    assert kappa == pytest.approx((3 / 4 - 34 / 64) / (1 - 34 / 64))


def test_an_id_changes_with_each_answer_and_the_last_counts(tmp_path):
    people = People(tmp_path, make_questions(tmp_path, N=2))
    first, second = (q["id"] for q in people.open())
    again = people.questions.answer(first, None, 1)
    assert again == first[:-1] + "1"
    with refusal(409, "another page"):
        people.questions.answer(first, None, -1)  # from a page that does not know of the first
    people.questions.answer(again, None, -1)
    people.questions.answer(second, None, 0)
    assert [row["h"] for row in read_rows(tmp_path)] == [1, -1, 0]
    assert people.decide()[0] == [-1, 0]


def test_sides_are_random_and_reproducible(tmp_path):
    rows = make_questions(tmp_path, N=40)

    def sides(epoch, seed=0):
        moved = [row | {"epoch": epoch} for row in rows]
        return [q["left"] for q in People(tmp_path, moved, seed=seed).open()]

    left = sides(epoch=3)
    assert left == sides(epoch=3) and left != sides(epoch=4) and left != sides(epoch=3, seed=1)
    assert 8 < sum(left) < 32


def test_a_restart_goes_on_at_the_first_unanswered_question(tmp_path):
    rows = make_questions(tmp_path)
    people = People(tmp_path, rows)
    old = people.open()[2]["id"]
    people.answer(1, None)
    with (tmp_path / "labels.jsonl").open("a") as file:
        file.write('{"epoch": 3, "pro')  # a kill in mid-write
    people = People(tmp_path, rows)
    assert [q["prompt"] for q in people.open()] == [row["prompt"] for row in rows[2:]]
    with refusal(409):
        people.questions.answer(old, None, 1)  # from a page of the old start
    people.answer(-1, 0)
    assert [row["h"] for row in read_rows(tmp_path)] == [1, None, -1, 0]
    assert people.decide()[0] == [1, 0, -1, 0]


def test_two_annotators(tmp_path):
    people = People(tmp_path, make_questions(tmp_path, N=3), annotators=2)
    assert people.open() == []  # without a name
    id = people.open("Ann")[0]["id"]
    with refusal(400, "your name"):
        people.questions.answer(id, None, 1)
    people.answer(1, 1, 0, name="Ann")
    assert people.open("Ann") == [] and people.questions.missing == 3
    people.answer(1, -1, None, name="Zoë")
    assert annotate.count_answered(tmp_path / "labels.jsonl") == 3
    assert [row["annotator"] for row in read_rows(tmp_path)] == ["Ann"] * 3 + ["Zoë"] * 3
    answers, kappa = people.decide()
    assert answers == [1, 0, 0]  # a draw is a tie
    # agreement 1/2, shares 3/4 and 1/4
    assert kappa == pytest.approx((1 / 2 - 10 / 16) / (1 - 10 / 16))


ZWJ, ZWNJ, ACUTE = "\u200d", "\u200c", "\u0301"


@pytest.mark.parametrize(
    "name, kept",
    [
        (f" Jose{ACUTE}  Diaz", "Jos\u00e9 Diaz"),  # as a Mac and others write it
        (f"\u0639\u0644\u06cc{ZWNJ}\u0631\u0636", f"\u0639\u0644\u06cc{ZWNJ}\u0631\u0636"),
        (f"\U0001f469{ZWJ}\U0001f52c", f"\U0001f469{ZWJ}\U0001f52c"),  # a joined emoji
        ("\u5c71\u7530\u3000\u592a\u90ce", "\u5c71\u7530 \u592a\u90ce"),  # with a wide space
        (f"{'e' * 40}{ACUTE}", f"{'e' * 39}\u00e9"),
    ],
)
def test_names_of_people_are_kept_in_nfc(name, kept):
    assert annotate.normalize_name(name) == kept


@pytest.mark.parametrize("name", ["", "\u3000", "x" * 41, "a\x00b", 5, "\ud800", ZWJ, "\u202eAnn"])
def test_what_is_no_name_is_refused(name):
    with refusal(400, "a name has 1 to 40"):
        annotate.normalize_name(name)


def test_there_are_as_many_places_as_annotators(tmp_path):
    people = People(tmp_path, make_questions(tmp_path, N=2), annotators=2)
    first = people.open("Cid")[0]["id"]  # a look takes no place
    people.answer(1, name="Ann  Lee")
    people.answer(1, name=" ann lee ")  # the same person
    people.answer(1, name="Bob")
    with refusal(403, "by Ann Lee, Bob"):
        people.questions.answer(first, "Cid", -1)
    with refusal(403):
        people.questions.check_name("Cid")
    people.answer(-1, name="BOB")
    assert [row["annotator"] for row in read_rows(tmp_path)] == ["Ann Lee"] * 2 + ["Bob"] * 2
    assert people.decide()[0] == [1, 0]


def test_the_last_answer_can_be_taken_back_for_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "UNDO_SECONDS", WAIT)
    people = People(tmp_path, make_questions(tmp_path, N=2))
    questions = people.questions
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(questions.wait)
        assert questions.last(None) is None and questions.seconds_left is None
        people.answer(1, 1)
        last = questions.last(None)
        questions.hold(last)
        assert questions.seconds_left is None
        questions.undo(last, None)
        (question,) = people.open()
        assert question["answer"] is None and questions.last(None) is None
        people.answer(-1)  # the countdown begins anew
        assert WAIT - 30 < questions.seconds_left <= WAIT
        with refusal(409):
            questions.undo(last, None)  # it was undone before
        assert not waiting.done()
        questions.end(last, "questions")  # no need to wait
        rows, _ = annotate.decide(waiting.result(WAIT))
    assert [row["h"] for row in rows] == [1, -1] and not questions.finished
    for late in (lambda: questions.undo(last, None), lambda: questions.hold(last)):
        with refusal(409):
            late()


@pytest.mark.parametrize("kind", ["h", "bad"])
def test_what_is_left_can_be_skipped_at_once(tmp_path, kind):
    people = People(tmp_path, make_questions(tmp_path, kind))
    answer, nothing = (1, 0) if kind == "h" else ([True, False], [False, False])
    people.answer(answer)
    for wrong, what, status in (("stale-0", "run", 409), (3, "run", 409), ("", "everything", 400)):
        with refusal(status):
            people.questions.end(wrong, what)
    assert len(people.open()) == 3
    people.questions.end(people.open()[0]["id"], "questions")
    assert [row[kind] for row in read_rows(tmp_path)] == [answer, None, None, None]
    assert people.decide()[0] == [answer] + [nothing] * 3 and not people.questions.finished


def test_finish_skips_for_all_and_is_remembered(tmp_path):
    rows = make_questions(tmp_path)
    people = People(tmp_path, rows, annotators=2)
    people.answer(1, name="Ann")
    people.questions.end(people.open("Ann")[0]["id"], "run")
    assert people.decide()[0] == [1, 0, 0, 0] and people.questions.finished
    assert People(tmp_path, rows, annotators=2).decide()[0] == [1, 0, 0, 0]  # nobody is asked


def test_finish_before_any_answer_keeps_nothing_so_that_a_resumed_run_asks_again(tmp_path):
    people = People(tmp_path, make_questions(tmp_path, N=2))
    people.questions.end(people.open()[0]["id"], "run")
    assert people.decide()[0] == [0, 0] and people.questions.finished
    assert not read_rows(tmp_path)


def test_a_full_disk_is_said_and_leaves_no_half_line(tmp_path, monkeypatch):
    people = People(tmp_path, make_questions(tmp_path, N=2))
    people.answer(1)
    before = (tmp_path / "labels.jsonl").read_bytes()
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))  # of os.fsync
    with monkeypatch.context() as broken, refusal(500, "No space left"):
        broken.setattr(annotate.os, "fsync", full)
        people.answer(1)
    assert (tmp_path / "labels.jsonl").read_bytes() == before and len(people.open()) == 1
    people.answer(0)
    assert people.decide()[0] == [1, 0]


def test_a_token_is_made_once_and_nobody_else_reads_it(tmp_path):
    file = tmp_path / "token"
    token = annotate.read_token(file)
    assert len(token) > 20 and annotate.read_token(file) == token
    assert file.stat().st_mode & 0o777 == 0o600


# A server in this process


class Session:
    """A server that asks in a thread, and people's requests to it."""

    def __init__(self, run: Path, questions: list[dict], annotators: int = 1, **options):
        self.server = annotate.AnnotationServer(run, annotators, 0, **options)
        self.ask(questions)

    def ask(self, questions: list[dict], **progress) -> None:
        def target():
            self.rows = self.server.ask(questions, progress)

        self.thread = threading.Thread(target=target, daemon=True)
        self.thread.start()
        until(lambda: self.is_open() or not self.thread.is_alive())

    def is_open(self) -> bool:
        return bool(self.server._server and self.server._server.started and self.open())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}/"

    @property
    def path(self) -> str:
        return "/" + (self.server.run / "token").read_text()

    @property
    def port(self) -> int:
        return self.server._server.servers[0].sockets[0].getsockname()[1]

    def request(self, method: str, path: str, body=None, headers=None) -> Reply:
        return request(self, method, path, body, headers)

    def state(self) -> dict:
        return self.request("GET", "/state").json()

    def open(self) -> list[dict]:
        name = None if self.server.annotators == 1 else "Ann"
        return unanswered(self.server._questions.of_person(name))

    def finish(self) -> list[dict]:
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        return self.rows


@pytest.fixture
def start(tmp_path):
    sessions = []

    def starter(questions, annotators=1, **options):
        sessions.append(Session(tmp_path, questions, annotators, **options))
        return sessions[-1]

    yield starter
    for session in sessions:
        session.server.close()


def test_a_person_labels_two_epochs(start, tmp_path, capsys):
    questions = make_questions(tmp_path, N=2)
    session = start(questions)
    page = (ROOT / "sd" / "annotate.html").read_bytes()
    assert session.request("GET", "/").body == page
    assert session.request("HEAD", "/").headers["Content-Length"] == str(len(page))
    opened = session.state()["questions"]
    assert opened == session.open()
    for question, row in zip(opened, questions, strict=True):
        for url, file in zip(question["images"], row["images"], strict=True):
            image = session.request("GET", url)
            assert image.body == (tmp_path / file).read_bytes()
            assert image.headers["Content-Type"] == "image/png"
        reply = post_answer(session, question["id"], 1)
        assert reply.json() == {"id": question["id"][:-1] + "1"}
    assert session.finish() == [row | {"h": 1} for row in questions]
    assert session.state()["status"] == "Training" and session.state()["training"]
    assert session.request("GET", opened[0]["images"][0]).status == 409  # not asked any more
    session.server.status("Making images")
    state = session.state()
    assert state["status"] == "Making images" and not state["training"] and not state["questions"]

    (question,) = make_questions(tmp_path, epoch=4, N=1)
    session.ask([question], epoch=2, epochs=5)
    assert session.state()["answers"] == 2
    assert post_answer(session, session.open()[0]["id"], -1).status == 200
    assert session.finish() == [question | {"h": -1}]
    assert session.state()["status"] == "Training, round 2 of 5"
    assert "Round 2: 1 questions for 1 person to answer at http://127" in capsys.readouterr().out


@pytest.mark.parametrize("is_blind", [False, True])
def test_undo_hold_and_finish_by_the_page(start, tmp_path, monkeypatch, is_blind):
    monkeypatch.setattr(annotate, "UNDO_SECONDS", WAIT)
    session = start(make_questions(tmp_path, N=1), story=tmp_path if is_blind else None)
    post_answer(session, session.open()[0]["id"], 1)
    state = session.state()
    assert not state["questions"] and state["last"] and state["seconds_left"] > 0
    post(session, "hold", id=state["last"])
    assert session.state()["seconds_left"] is None
    post(session, "undo", id=state["last"], name=None)
    assert post(session, "end", id=session.open()[0]["id"], end="run").status == 200
    session.finish()
    assert session.server.finished
    state = session.state()
    words = "Counting the answers" if is_blind else "Last training, then your result"
    assert state["status"] == words and state["blind"] == (not state["training"]) == is_blind


def test_closing_tells_open_pages_and_then_serves_no_more(start, tmp_path, monkeypatch):
    session = start(make_questions(tmp_path, N=1))
    post_answer(session, session.open()[0]["id"], 1)
    session.finish()
    (tmp_path / "report.html").write_text("<h1>Größe</h1>", "utf-8")
    states, port = [], session.port
    with monkeypatch.context() as waiting:  # what a page learns while the server waits for it
        waiting.setattr(annotate, "FAREWELL_SECONDS", 1.5)
        waiting.setattr(annotate.time, "sleep", lambda s: states.append((s, session.state())))
        session.server.close(code="code")
    ((seconds, state),) = states
    assert seconds == 1.5 and state["ended"] and state["questions"] == []
    assert "has finished" in state["status"] and state["code"] == "code"
    assert state["report"] == "<h1>Größe</h1>"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))
    session.server.close()  # a second time does nothing


def test_between_questions_the_page_shows_before_and_now(start, tmp_path):
    session = start(make_questions(tmp_path, N=1))
    for epoch in (0, 3):
        Image.new("RGB", (8, 8), (epoch, 0, 0)).save(held_out_file(tmp_path, epoch, 0))
    common = {"preferences": 8, "bad_share": None, "seconds_train": 2.5}
    rows = [common | {"epoch": 2, "accuracy": None}, common | {"epoch": 3, "accuracy": 0.75}]
    rows[-1]["warnings"] = ["the model seems to break"]
    a_pass = {"epoch": 1, "accuracy": 0.5, "preferences": None, "seconds_train": 9}
    save_lines(tmp_path / "metrics.jsonl", [a_pass, *rows])
    session.server.status("Making images")
    state = session.state()
    assert state["agreement"] == {"round": 2, "right": 6, "of": 8}
    assert state["seconds"] == 2.5
    assert state["warnings"] == ["the model seems to break"]
    before, now = state["shown"]
    for urls, epoch in ((before, 0), (now, 3)):
        image = session.request("GET", urls[0]).body
        assert image == held_out_file(tmp_path, epoch, 0).read_bytes()
        assert len(urls) == 1  # there are no more
    tags = common | {"epoch": 4, "accuracy": 1, "bad_share": 0.1}
    save_lines(tmp_path / "metrics.jsonl", [*rows, tags])
    session.server.status("Making images")  # an epoch without evaluation
    state = session.state()
    assert state["shown"] == [before, now] and not state["warnings"] and not state["agreement"]
    for path in ("0/1", "-1/0", "0/x", "0/../../config.json"):
        assert session.request("GET", f"/held_out/{path}").status == 404


def test_people_who_agree_on_nothing_are_told(start, tmp_path, capsys):
    session = start(make_questions(tmp_path, N=1), annotators=2)
    id = session.open()[0]["id"]
    assert post_answer(session, id, 1, "Ann").status == 200
    state = session.request("GET", "/state?name=Ann").json()
    assert state["named"] and state["missing"] == 1 and state["questions"] == []
    assert post_answer(session, id, -1, "Bob").status == 200
    assert [row["h"] for row in session.finish()] == [0]
    assert "agree on no question" in session.state()["status"]
    assert "Round 3: people agree on no question" in capsys.readouterr().out


def test_a_taken_port_is_said_and_the_next_free_one_taken(start, tmp_path):
    questions = make_questions(tmp_path, N=1)
    first, second = start(questions), start(questions)
    assert first.port != second.port and {first.port, second.port} <= set(annotate.PORTS)
    for port in (first.port, 70_000):
        with pytest.raises(annotate.UserError, match=f"{port} is not free"):
            annotate.listen(port)


# What is refused


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A session with one answer of five."""
    run = tmp_path_factory.mktemp("guarded")
    session = Session(run, make_questions(run, N=5))
    post_answer(session, session.open()[0]["id"], 1)
    yield session
    session.server._server.should_exit = True


@pytest.fixture
def guarded(serving):
    """It still serves afterwards, and its file is unchanged."""
    before = serving.server.file.read_bytes()
    yield serving
    assert serving.request("GET", "/").status == 200 and len(serving.open()) == 4
    assert serving.server.file.read_bytes() == before


def good_answer(session: Session) -> str:
    return json.dumps({"id": session.open()[0]["id"], "answer": 1, "name": None})


def is_refused(reply: Reply, status: int) -> bool:
    return reply.status == status and isinstance(reply.json()["error"], str)


def test_nobody_without_the_token_sees_or_changes_anything(guarded):
    assert guarded.server._server.servers[0].sockets[0].getsockname()[0] == "127.0.0.1"
    token = guarded.path.strip("/")
    question = guarded.open()[0]
    body = good_answer(guarded)
    end = json.dumps({"id": question["id"], "end": "run"})
    outside = SimpleNamespace(url=f"http://127.0.0.1:{guarded.port}")
    wrong = [token[:-1], f"{token}x", token.swapcase(), f"x/{token}", "", "%00", "é"]
    for prefix in ["", *(quote(f"/{one}", safe="/%") for one in wrong)]:
        for path in ("/", "/state", f"/{question['images'][0]}", "/held_out/0/0"):
            reply = request(outside, "GET", prefix + path)
            assert is_refused(reply, 403) and token not in reply.body.decode(), (prefix, path)
        for path, content in (("/answer", body), ("/undo", body), ("/end", end)):
            assert is_refused(request(outside, "POST", prefix + path, content, AS_JSON), 403)


def test_foreign_hosts_and_origins_are_refused(guarded):
    good, port = good_answer(guarded), guarded.port
    hosts = ["evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "127.0.0.1, evil"]
    hosts += ["127.0.0.1@evil.example", "0.0.0.0", "", "localhost:"]
    origins = ["http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1"]
    cases = [({"Host": host}, 400) for host in hosts]
    for headers, status in cases + [({"Origin": origin}, 403) for origin in origins]:
        for method, path in (("GET", "/state"), ("POST", "/answer"), ("OPTIONS", "/answer")):
            reply = guarded.request(method, path, good, AS_JSON | headers)
            assert is_refused(reply, status) and "--public-url" in reply.json()["error"], headers
            assert "Access-Control-Allow-Origin" not in reply.headers


def test_only_one_host_is_taken(guarded):
    for hosts in (["localhost", "evil"], ["evil", "localhost"], ["localhost"] * 2):
        fields = [f"Host: {host}" for host in hosts]
        lines = [f"GET {guarded.path}/state HTTP/1.1", *fields, "Connection: close", "", ""]
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=WAIT) as connection:
            connection.sendall("\r\n".join(lines).encode())
            assert connection.recv(65536).split()[1] == b"400"


def test_own_origin_is_answered_also_through_an_ssh_tunnel(start, tmp_path):
    hosts = ["127.0.0.1", "LOCALHOST:9000", "[::1]:9000"]
    session = start(make_questions(tmp_path, N=len(hosts)))
    for host in hosts:
        headers = AS_JSON | {"Host": host, "Origin": f"http://{host.lower()}"}
        assert session.request("POST", "/answer", good_answer(session), headers).status == 200


@pytest.mark.parametrize(
    "url, origin, hosts, prefix",
    [
        ("HTTPS://Hub.Org:443", "https://hub.org", ("hub.org", "hub.org:443"), ""),
        (
            "http://hub.org:8000/user/a%40b/proxy/7860/",
            "http://hub.org:8000",
            ("hub.org:8000", "hub.org:8000:80"),
            "/user/a@b/proxy/7860",
        ),
        ("http://[::A]:80/x", "http://[::a]", ("[::a]", "[::a]:80"), "/x"),
    ],
)
def test_a_public_url_is_one_origin(url, origin, hosts, prefix):
    public = annotate.parse_public_url(url)
    assert (public.origin, public.hosts, public.prefix) == (origin, hosts, prefix)
    assert public.url.startswith(f"{origin}/") and public.url.endswith("/")


@pytest.mark.parametrize(
    "url", ["hub.org", "ftp://hub.org/", "https://ann:pw@hub.org/", "https://hub.org/?a"]
)
def test_what_is_no_public_url_is_refused(tmp_path, url):
    with pytest.raises(annotate.UserError, match="--public-url .*: give the address of the page"):
        annotate.AnnotationServer(tmp_path, 1, 0, public_url=url)


def test_behind_a_proxy_one_host_and_one_origin_are_let_in(start, tmp_path, capsys):
    site = "https://hub.example"
    session = start(make_questions(tmp_path, N=9), public_url=f"{site}/user/ann/proxy/7860")
    assert session.server.url == f"{site}/user/ann/proxy/7860{session.path}/"
    assert session.server.url in capsys.readouterr().out
    local = f"127.0.0.1:{session.port}"

    def post(host, origin, prefix=""):
        """One more answer, with the path's part before the token taken off, or not."""
        outside = SimpleNamespace(url=f"http://{local}{prefix}{session.path}/")
        headers = AS_JSON | {"Host": host, "Origin": origin}
        return request(outside, "POST", "answer", good_answer(session), headers).status

    for host in ("hub.example", "hub.example:443", local, "localhost"):  # kept, or rewritten
        for prefix in ("", "/user/ann/proxy/7860"):
            assert post(host, site, prefix) == 200
    assert post(local, f"http://{local}") == 200  # without the proxy
    before = read_rows(tmp_path)
    session.ask(make_questions(tmp_path, epoch=4, N=1))
    for origin in ("http://hub.example", f"{site}:8443", "https://a.hub.example", "null"):
        assert post("hub.example", origin) == post(local, origin) == 403, origin
    assert post("hub.example", f"http://{local}") == 403
    assert post("evil.example", site) == post("hub.example:8443", site) == 400
    assert post("hub.example", site, "/user/bob/proxy/7860") == 403
    assert read_rows(tmp_path) == before


def test_nothing_else_is_served(guarded):
    paths = """
        /images/e003_p00_k0.png /images/../labels.jsonl /images/{id}/../../labels.jsonl
        /images/%2e%2e/labels.jsonl /images/{id}%2f..%2f..%2flabels.jsonl /images/{id}/2
        /images/{id}/-1 /images/{id}/%D9%A0 /images/{id}/0%00 //etc/passwd /images//etc/passwd
        /labels.jsonl /answer /state/ /docs /static/../../etc/passwd /annotate.py /favicon.ico
    """
    key = guarded.open()[0]["id"].rpartition("-")[0]
    for path in paths.replace("{id}", key).split():
        reply = guarded.request("GET", path)
        assert reply.status in (404, 405, 409) and reply.json()["error"], path


def test_wrong_answers_are_refused(guarded):
    ids = [q["id"] for q in guarded.open()]
    for answer in (2, True, 1.0, "1", [1], {}, [True, False], 10**30):
        assert is_refused(post_answer(guarded, ids[0], answer), 400), answer
    for question in ("", "0", ids[0] + "0", ids[0].split("-")[0], None, 0, [], {}, ids):
        assert is_refused(post_answer(guarded, question, 1), 409), question
    good = good_answer(guarded)
    bodies = ["", "{", "null", "[]", "[" * 9000, good[:-1], 2 * good, '{"id": 1}', b"\xff\xfe"]
    for body in [*bodies, good.replace('"name"', '"nom"')]:
        assert is_refused(guarded.request("POST", "/answer", body, AS_JSON), 400), body[:80]
    for method in ("PUT", "OPTIONS", "GET"):
        assert is_refused(guarded.request(method, "/answer"), 405)


def test_every_reply_has_the_security_headers(guarded, monkeypatch):
    good = good_answer(guarded)
    image = guarded.open()[0]["images"][0]
    replies = [guarded.request("GET", path) for path in ("/", "/state", "/no", "/answer", image)]
    replies.append(guarded.request("GET", "/", headers={"Host": "evil.example"}))
    replies.append(guarded.request("GET", "/", headers={"Origin": "http://evil.example"}))
    with monkeypatch.context() as broken:
        broken.setattr(annotate.labels, "validate_answer", lambda *_: 1 / 0)
        replies.append(guarded.request("POST", "/answer", good, AS_JSON))  # an error of our own
    assert [reply.status for reply in replies] == [200, 200, 404, 405, 200, 400, 403, 500]
    for reply in replies:
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert replies[1].headers["Cache-Control"] == "no-store"


# A browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, one for the tests of a module. It finds hub.example on this machine."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium")
    args = ["--no-sandbox", "--host-resolver-rules=MAP hub.example 127.0.0.1"]
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=args)


SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@contextlib.contextmanager
def open_tab(browser, url: str, size: str = "desktop", script: str = "", **options):
    """A page of the browser. `problems` has its errors, and requests to anywhere else.

    script: what runs before the page's own.
    """
    is_phone = size == "phone"
    viewport = dict(zip(("width", "height"), SIZES[size], strict=True))
    options |= {"viewport": viewport, "is_mobile": is_phone, "has_touch": is_phone}
    with contextlib.closing(browser.new_context(**options)) as context:
        context.set_default_timeout(WAIT * 1000)
        context.add_init_script(script)
        tab = context.new_page()
        tab.problems = []

        def check_address(sent):
            if not sent.url.startswith((url, "data:")):
                tab.problems.append(sent.url)

        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        tab.on("console", lambda said: said.type == "error" and tab.problems.append(said.text))
        tab.on("request", check_address)
        tab.on("dialog", lambda dialog: dialog.accept())
        tab.goto(url)
        yield tab


def wait_for_prompt(tab, text: str) -> None:
    script = "text => document.getElementById('prompt').textContent === text && !busy"
    tab.wait_for_function(script, arg=text)


def press(tab, *keys: str) -> None:
    for key in keys:
        tab.keyboard.press(key)


@pytest.mark.slow
def test_chromium_labels_rounds_by_keyboard_alone(browser, start, tmp_path):
    questions = make_questions(tmp_path, epoch=1, N=7)
    session = start(questions)
    with open_tab(browser, session.url) as tab:
        wait_for_prompt(tab, "a cat")
        assert "The model learns from your answers" in tab.locator("#intro").text_content()
        left = [question["left"] for question in tab.evaluate("state.questions")]
        images = tab.locator("#tiles img")
        assert images.evaluate_all("all => all.every(image => image.naturalWidth === 64)")
        assert images.first.get_attribute("src").endswith(f"/{left[0]}")  # the recorded side
        keys = {"ArrowLeft": 1, "ArrowRight": 2, " ": 3, "s": 4}
        for key, n in [*keys.items(), ("ArrowRight", 5), ("u", 4), ("u", 3)]:
            press(tab, key)
            wait_for_prompt(tab, questions[n]["prompt"])
        assert tab.locator("#intro").text_content() == ""
        assert tab.locator("#done").text_content() == "4 answered, 1 skipped, 2 left"
        press(tab, "ArrowLeft")  # in place of the skip, and on to the first open one
        wait_for_prompt(tab, questions[5]["prompt"])
        assert tab.locator("#done").text_content() == "5 answered, 2 left"
        press(tab, "ArrowLeft")
        wait_for_prompt(tab, questions[6]["prompt"])
        press(tab, "ArrowRight")
        tab.get_by_role("heading", name="Training").wait_for()
        rows = session.finish()
        session.ask(make_questions(tmp_path, epoch=2, N=1), epoch=2, epochs=5)
        wait_for_prompt(tab, "a cat")  # the next round, by itself
        assert tab.locator("#done").text_content() == "Round 2 of 5: 0 answered, 1 left"
        press(tab, " ")
        tab.get_by_text("Training, round 2 of 5").wait_for()
        assert tab.locator("#total").text_content() == "8 answers so far"
        assert tab.problems == []

    def pressed(side, n):
        return 1 if (side == "left") == (left[n] == 0) else -1

    sides = ["left", "right", None, "left", "right", "left", "right"]
    expected = [0 if side is None else pressed(side, n) for n, side in enumerate(sides)]
    assert [row["h"] for row in rows] == expected
    assert len(read_rows(tmp_path)) == 7 + 1 + 1


@pytest.mark.slow
def test_chromium_tags_by_keyboard(browser, start, tmp_path):
    session = start(make_questions(tmp_path, "bad", N=3, K=12))
    with open_tab(browser, session.url) as tab:
        wait_for_prompt(tab, "a cat")
        press(tab, *"25591", "Enter")
        wait_for_prompt(tab, "a dog")
        press(tab, "u")
        wait_for_prompt(tab, "a cat")
        assert tab.locator("#tiles .bad b").all_text_contents() == ["1", "2", "9"]
        press(tab, *"19", "Tab", "Tab", "Tab", " ", "Enter")  # also the third image
        wait_for_prompt(tab, "a dog")
        assert tab.evaluate("document.activeElement.parentElement.id") == "tiles"
        press(tab, "Enter")
        tab.get_by_text("Nothing is marked").wait_for()  # asked once
        press(tab, "Enter")
        wait_for_prompt(tab, "a horse")
        press(tab, "Enter")
        tab.get_by_role("heading", name="Training").wait_for()
        assert tab.problems == []
    marked = [[k for k, bad in enumerate(row["bad"], 1) if bad] for row in session.finish()]
    assert marked == [[2, 3], [], []]


@pytest.mark.slow
def test_chromium_two_people_on_one_machine(browser, start, tmp_path):
    session = start(make_questions(tmp_path, N=2), annotators=2)
    with open_tab(browser, session.url) as tab:
        for name in ("Ann", "<b>Bob</b>"):
            tab.get_by_label("Your name").fill(name)
            press(tab, "Enter")
            wait_for_prompt(tab, "a cat")
            press(tab, "ArrowLeft")
            wait_for_prompt(tab, "a dog")
            press(tab, "s")
            if name == "Ann":
                tab.get_by_text("The others still have 2 answers to give").wait_for()
                tab.get_by_text("Someone else").click()
        tab.get_by_role("heading", name="Training").wait_for()
        assert tab.problems == []
    rows = read_rows(tmp_path)
    assert [row["annotator"] for row in rows] == ["Ann"] * 2 + ["<b>Bob</b>"] * 2
    assert {row["h"] for row in rows[::2]} == {session.finish()[0]["h"]}


@pytest.mark.slow
def test_chromium_the_program_ends_and_comes_back_and_a_tab_is_behind(browser, start, tmp_path):
    questions = make_questions(tmp_path, N=3)
    session = start(questions)
    port = session.port
    with open_tab(browser, session.url) as tab:
        wait_for_prompt(tab, "a cat")
        press(tab, "ArrowLeft")
        wait_for_prompt(tab, "a dog")
        behind = tab.context.new_page()
        behind.goto(session.url)
        wait_for_prompt(behind, "a dog")
        stop(session)
        press(tab, "ArrowLeft")
        tab.get_by_text("--resume").wait_for()
        assert len(read_rows(tmp_path)) == 1
        session = start(questions, port=port)
        wait_for_prompt(tab, "a dog")
        assert tab.locator("#done").text_content() == "1 answered, 2 left"
        press(tab, "ArrowRight")
        wait_for_prompt(tab, "a horse")
        press(behind, "ArrowLeft")
        behind.get_by_text("too late").wait_for()
        wait_for_prompt(behind, "a horse")
        assert len(read_rows(tmp_path)) == 2


def stop(session: Session) -> None:
    """As a kill does it: without a word to the pages."""
    session.server._server.should_exit = True
    session.server._thread.join()
    session.server._server = None


@pytest.mark.slow
def test_chromium_the_last_answer_waits_for_a_person(browser, start, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 30)
    session = start(make_questions(tmp_path, N=1))
    with open_tab(browser, session.url) as tab:
        wait_for_prompt(tab, "a cat")
        press(tab, "ArrowLeft")
        tab.get_by_text("Training begins in").wait_for()
        first = int(tab.locator("#then").text_content().split()[3])
        tab.wait_for_function("n => parseInt(then.textContent.split(' ')[3]) < n", arg=first)
        press(tab, "w")
        tab.get_by_text("Training begins when you say so").wait_for()
        press(tab, "u")
        wait_for_prompt(tab, "a cat")
        press(tab, "ArrowRight")
        tab.get_by_text("Training begins in").wait_for()
        press(tab, "t")
        assert len(session.finish()) == 1 and tab.problems == []
    assert len({row["h"] for row in read_rows(tmp_path)}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, K, size", [("h", 2, "desktop"), ("h", 2, "phone"), ("bad", 7, "phone")]
)
def test_chromium_layout_fits_without_scrolling(browser, start, tmp_path, kind, K, size):
    session = start(make_questions(tmp_path, kind, N=1, K=K))
    wide, high = SIZES[size]
    with open_tab(browser, session.url, size, color_scheme="dark") as tab:
        wait_for_prompt(tab, "a cat")
        boxes = [one.bounding_box() for one in tab.locator("#tiles button, footer button").all()]
        for box in boxes:
            assert 0 <= box["x"] and box["x"] + box["width"] <= wide
            assert 0 <= box["y"] and box["y"] + box["height"] <= high
            assert box["width"] >= 44 and box["height"] >= 44
        if size == "desktop":
            a, b = boxes[:2]
            assert a["y"] == b["y"] and a["x"] < b["x"] and a["width"] > 0.35 * wide
        tab.locator("#tiles button").first.click()
        if kind == "bad":
            tab.get_by_role("button", name="Confirm").click()
        assert len(session.finish()) == 1 and tab.problems == []


NO_STORAGE = """
    for (const name of ["localStorage", "sessionStorage"]) {
      const get = () => { throw new DOMException("Access is denied", "SecurityError"); };
      Object.defineProperty(window, name, {get});
    }
"""


@pytest.mark.slow
def test_chromium_without_cookies_labels_and_says_errors(browser, start, tmp_path):
    session = start(make_questions(tmp_path, "bad", N=3, K=3), annotators=2)
    with open_tab(browser, session.url, script=NO_STORAGE) as tab:
        tab.get_by_label("Your name").fill("Ann")
        press(tab, "Enter")
        wait_for_prompt(tab, "a cat")
        press(tab, "2", "Enter")
        wait_for_prompt(tab, "a dog")
        press(tab, "1", "u")
        wait_for_prompt(tab, "a cat")
        assert tab.locator("#tiles .bad b").all_text_contents() == ["2"]
        assert tab.problems == [] and read_rows(tmp_path)[0]["bad"] == [False, True, False]
        for error in ("setTimeout(() => nothing.here)", "void Promise.reject(Error('no luck'))"):
            tab.reload()
            tab.get_by_label("Your name").wait_for()
            tab.evaluate(f"() => {{ {error} }}")
            tab.get_by_text("Something in this page went wrong").wait_for()
    assert ["nothing is not defined", "no luck"] == tab.problems


@pytest.mark.slow
def test_chromium_says_that_a_picture_did_not_come(browser, start, tmp_path):
    questions = make_questions(tmp_path, N=2)
    (tmp_path / questions[0]["images"][0]).write_bytes(b"no picture")
    session = start(questions)
    with open_tab(browser, session.url) as tab:
        wait_for_prompt(tab, "a cat")
        assert tab.get_by_text("This picture did not load").count() == 1
        assert tab.get_by_role("button", name="Tie").is_disabled()
        press(tab, "ArrowLeft", "ArrowRight", " ", "s")  # only the skip counts
        wait_for_prompt(tab, "a dog")
        assert [row["h"] for row in read_rows(tmp_path)] == [None]


@pytest.mark.slow
def test_chromium_at_the_end_the_page_keeps_result_code_and_report(
    browser, start, tmp_path, monkeypatch
):
    session = start(make_questions(tmp_path, N=1))
    report = "<!doctype html><style>h1 { color: #f00 }</style><h1>Größe</h1>"
    (tmp_path / "report.html").write_text(report, "utf-8")
    path = f"/home/ann/{'long-name/' * 9}run-1/lora"
    with open_tab(browser, session.url, "phone") as tab:
        wait_for_prompt(tab, "a cat")
        tab.locator("#tiles button").first.click()
        session.finish()
        monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 3)
        sentence = "The size is 2.0 kB (before: 2.1 kB)."
        session.server.close(f"It learned.\n{sentence}", "code", {"LoRA": path})
        assert tab.locator("#words").text_content() == "It learned."
        items = tab.locator("#result li").all_text_contents()
        assert items == ["Open the report", sentence, f"LoRA:{path}"]
        line = tab.locator("#result code").bounding_box()
        assert line["height"] < 60 and line["x"] + line["width"] <= SIZES["phone"][0]
        assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"][0]
        tab.get_by_role("button", name="Copy").click()
        tab.wait_for_function("() => /^(Copied|Selected)/.test(copy.textContent)")
        with tab.context.expect_page() as opened:
            tab.get_by_text("Open the report").click()
        title = opened.value.locator("h1")
        assert title.text_content() == "Größe"
        assert title.evaluate("it => getComputedStyle(it).color") == "rgb(255, 0, 0)"


@contextlib.contextmanager
def reverse_proxy(target: int, prefix: str):
    """As people have them: takes a prefix off the path and rewrites Host. Yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {**self.headers, "Host": f"localhost:{target}"}
            connection = http.client.HTTPConnection("127.0.0.1", target)
            with contextlib.closing(connection):
                connection.request(self.command, self.path.removeprefix(prefix), body, headers)
                reply = connection.getresponse()
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.read())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_chromium_behind_a_proxy(browser, start, tmp_path):
    target, prefix = free_port(), "/user/ann/proxy/7860"
    with reverse_proxy(target, prefix) as port:
        public_url = f"http://hub.example:{port}{prefix}"
        session = start(make_questions(tmp_path, N=2), port=target, public_url=public_url)
        with open_tab(browser, session.server.url) as tab:
            wait_for_prompt(tab, "a cat")
            images = tab.locator("#tiles img")
            assert images.evaluate_all("all => all.every(image => image.naturalWidth === 64)")
            tab.locator("#tiles button").first.click()
            wait_for_prompt(tab, "a dog")
            tab.locator("#tiles button").first.click()
            tab.get_by_role("heading", name="Training").wait_for()
            assert len(session.finish()) == 2 and tab.problems == []

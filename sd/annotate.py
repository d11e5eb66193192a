"""The labelling page: people answer the questions of a run in a browser, on this machine only.

All addresses begin with http://127.0.0.1:PORT/TOKEN:

    GET  /                 the page, annotate.html
    GET  /state?name=Ann   what Ann is asked, what she answered, and what the run is doing
    GET  /images/KEY/K     image K of a question that is asked now
    GET  /held_out/E/N     image N of the same prompts and noises, after epoch E (0: before)
    POST /answer           {"id": ID, "name": "Ann" or null, "answer": as in sd/labels.py}
    POST /undo             {"id": ID, "name": as above}: take the last answer back before training
    POST /end              {"id": ID of a question, "end": "questions" or "run"}: skip what is left

ID is KEY and how often this person's answer has changed, so that a page that is behind is refused.
The server listens on 127.0.0.1. Who lacks the token, another user of the machine say, is refused,
and so is what a page of another site sends, under its own name (Origin, against CSRF) and under a
name that leads here (Host, against DNS rebinding).
"""

import json
import math
import os
import secrets
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as Refusal  # Refusal(status, sentence)
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.routing import Route
from tqdm import tqdm

from sd import UserError, labels
from sd.figures import held_out_file, held_out_numbers
from sd.files import read_lines, replace, save_lines
from sd.seeds import RandomPurpose, seeded_generator

PORTS = range(7860, 7960)  # tried in turn where no port is given
MAX_REQUEST_BYTES = 10_000  # far more than an answer needs
TOKEN_FILE = "token"  # in the run folder, for its owner's eyes; a page outlives a restart
NOBODY = "(nobody"  # stands for a person whose answer was not waited for
FAREWELL = "The run has finished. You can close this page."
UNDO_SECONDS = 4  # between the last answer and training
FAREWELL_SECONDS = 1.5  # open pages ask once a second, and learn that the run has ended
CONTENT_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = [  # of every response, errors too
    ("Content-Security-Policy", CONTENT_POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
]


class Question(NamedTuple):
    row: dict  # line of labels.jsonl whose answer is null
    left: int  # which of two images stands on the left
    answers: dict  # by annotator
    changes: Counter  # of each annotator's answer, since this start


class Questions:
    """The questions of one epoch: what each person is asked, and who answered what.

    file: labels.jsonl; every answer is on disk when a method returns. rows: lines of it whose
    answer is null. annotators: answers that each needs, from as many people. seed: of left and
    right. Methods may be called from several threads. Raises UserError for a file with flaws.

    A question's ID is its KEY and how often this person's answer has changed. Methods raise
    `Refusal` for what a page may not do.
    """

    def __init__(self, file: Path, rows: list[dict], *, annotators: int, seed: int):
        self.file, self.annotators = file, annotators
        self.finished = self._hurry = False  # finished: somebody wants the run to end
        self._changed = threading.Condition()  # guards the questions and the two above
        answers = labels.read_labels(file, rows).values()
        sides = seeded_generator(seed, RandomPurpose.SIDES, rows[0]["epoch"])
        left = torch.randint(2, (len(rows),), generator=sides).tolist()
        with file.open("ab") as opened:  # or the next answer would join a line cut short
            opened.truncate(len(labels.whole_lines(file)))
        start = secrets.token_hex(8)  # a page of an earlier start cannot answer in this one
        self._by_key = {
            f"{start}-{n}": Question(*parts, Counter())
            for n, parts in enumerate(zip(rows, left, answers, strict=True))
        }

    @property
    def missing(self) -> int:
        """Answers that are still to come."""
        return sum(max(self.annotators - len(q.answers), 0) for q in self._by_key.values())

    def wait(self) -> list[Question]:
        """The questions when all are answered; the last answer can be taken back for a moment."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self.missing == 0)
                self._changed.wait_for(lambda: self.missing > 0 or self._hurry, UNDO_SECONDS)
                if self.missing == 0:
                    return self.close()

    def close(self) -> list[Question]:
        """Take no more answers; return the questions."""
        with self._changed:
            questions, self._by_key = [*self._by_key.values()], {}
            return questions

    def of_person(self, name: str | None) -> list[dict]:
        """What the page asks one person; nothing where all is answered, or a name is needed."""
        asked = []
        with self._changed:
            for key, (row, left, answers, _) in self._by_key.items():
                if name in answers or len(answers) < self.annotators:
                    asked.append(
                        {
                            "id": self._id(key, name),
                            "prompt": row["prompt"],
                            "images": [f"images/{key}/{k}" for k in range(len(row["images"]))],
                            "left": left,
                            "kind": labels.answer_field(row),
                            "answered": name in answers,
                            "answer": answers.get(name),
                        }
                    )
        is_open = name is not None or self.annotators == 1
        return asked if is_open and not all(question["answered"] for question in asked) else []

    def last(self, name: str | None) -> str | None:
        """ID of the last question where all is answered and this person may take it back."""
        with self._changed:
            key = next(reversed(self._by_key), None)
            if key is None or self.missing or name not in self._by_key[key].answers:
                return None
            return self._id(key, name)

    def images(self, key: str) -> list[str]:
        return self._question(key).row["images"]

    def answer(self, id, name: str | None, answer) -> str:
        """Keep an answer; return the question's new ID."""
        with self._changed:
            name = self.check_name(name)
            if name is None and self.annotators > 1:
                raise Refusal(400, "say your name first")
            key, question = self._answerable(id, name)
            if problem := labels.validate_answer(question.row, answer):
                raise Refusal(400, problem)
            left = {"left": question.left} if labels.answer_field(question.row) == "h" else {}
            self._keep(question, name, answer, **left)
            return self._id(key, name)

    def undo(self, id, name: str | None) -> None:
        """Take an answer back. The file keeps it; of several lines the last counts."""
        with self._changed:
            name = self.check_name(name)
            _, question = self._answerable(id, name)
            question.answers.pop(name, None)
            question.changes[name] += 1
            self._changed.notify_all()

    def end(self, id, end: str) -> None:
        """Skip what is not answered: "Train now"; and let the run end after it: "Finish"."""
        if end not in ("questions", "run"):
            raise Refusal(400, 'end is "questions" or "run"')
        with self._changed:
            finished = end == "run"
            self._question(str(id).rpartition("-")[0])
            # Where nobody has answered anything, a run that is resumed asks again
            forget = finished and not any(q.answers for q in self._by_key.values())
            for question in self._by_key.values():
                for number in range(self.annotators - len(question.answers)):
                    name = f"{NOBODY} {number + 1})" if self.annotators > 1 else None
                    if forget:
                        question.answers[name] = None
                    else:
                        self._keep(question, name, None)
            self.finished, self._hurry = finished, True
            self._changed.notify_all()

    def check_name(self, name) -> str | None:
        """A name as it was first written, "ann " is Ann; None without one."""
        if name is None:
            return None
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= 40):
            raise Refusal(400, "a name has 1 to 40 printable characters")
        if self.annotators == 1:
            raise Refusal(400, "one person labels this run, without a name")
        name = " ".join(name.split())
        with self._changed:
            names = {n for question in self._by_key.values() for n in question.answers}
        people = {n.casefold(): n for n in names if not n.startswith(NOBODY)}
        if name.casefold() not in people and len(people) >= self.annotators:
            taken = ", ".join(sorted(people.values()))
            raise Refusal(403, f"All {self.annotators} places are taken, by {taken}. Thank you!")
        return people.get(name.casefold(), name)

    def _keep(self, question: Question, name: str | None, answer, **more) -> None:
        annotator = {} if name is None else {"annotator": name}
        field = labels.answer_field(question.row)
        append_safely(self.file, {**question.row, field: answer, **annotator, **more})
        question.answers[name] = answer
        question.changes[name] += 1
        self._changed.notify_all()

    def _id(self, key: str, name: str | None) -> str:
        return f"{key}-{self._by_key[key].changes[name]}"

    def _answerable(self, id, name: str | None) -> tuple[str, Question]:
        """KEY and question of an ID, unless this person's answer has changed since."""
        key = str(id).rpartition("-")[0]
        question = self._question(key)
        if id != self._id(key, name):
            raise Refusal(409, "This was answered on another page: here is what it says now.")
        return key, question

    def _question(self, key: str) -> Question:
        with self._changed:
            if key not in self._by_key:
                late = "This answer came too late: training has begun without it. Thank you!"
                raise Refusal(409, late)
            return self._by_key[key]


def decide(questions: list[Question]) -> tuple[list[dict], float]:
    """The rows of questions with the majority's answers, and Fleiss' kappa of all answers."""
    votes = [[v for v in q.answers.values() if v is not None] for q in questions]
    field = labels.answer_field(questions[0].row)
    if field == "bad":  # each image is an item to agree on
        votes = [list(image) for tags in votes for image in zip(*tags, strict=True)]
    rows = [{**q.row, field: labels.majority(q.row, list(q.answers.values()))} for q in questions]
    return rows, labels.fleiss_kappa(votes)


class AnnotationServer:
    """Asks people about images of a run, on a page that opens with the first question.

    run: the folder with labels.jsonl and images/. annotators: answers that each question needs,
    from as many people. seed: of left and right. port: None for the first free one from 7860.
    guide: what the page asks; None for its own words. story: of a blind test, the run whose images
    before and after training the page shows. `finished`: somebody wants the run to end.
    """

    def __init__(
        self,
        run: Path,
        annotators: int,
        seed: int,
        *,
        port: int | None = None,
        guide: str | None = None,
        story: Path | None = None,
    ):
        self.run, self.annotators, self.seed, self.port = run, annotators, seed, port
        self.guide, self.story, self._blind = guide, story or run, story is not None
        self.file, self.url, self.kappa = run / "labels.jsonl", None, math.nan
        self.finished, self._progress = False, {}
        self._questions: Questions | None = None
        self._said = {}  # what the page says while it has no question
        self._server = self._thread = None

    def ask(self, questions: list[dict], progress: dict | None = None) -> list[dict]:
        """Wait until each question has its answers; return the questions as the majority answers.

        questions: lines of labels.jsonl, of one epoch, whose answer is null. Those that nobody
        wants to answer any more ("Train now") are skipped. progress: what the page shows of the
        whole run: epoch, epochs, before (answers), total. Sets `kappa`. Raises UserError for a
        labels.jsonl with flaws, and where no page can be opened.
        """
        self._progress = progress or {}
        if not questions:
            return []
        check_images(self.run, questions)
        asked = Questions(self.file, questions, annotators=self.annotators, seed=self.seed)
        answered = self._wait_for_people(asked, questions) if asked.missing else asked.close()
        rows, self.kappa = decide(answered)
        if self.annotators > 1 and not any(map(labels.has_preference, rows)):
            words = "you agree on no question, so there is nothing to train on"
            self.status(f"Epoch {rows[0]['epoch']}: {words}")
            tqdm.write(self._said["status"])
        return rows

    def status(self, text: str) -> None:
        """What the page says while it has no question, beside what the run has shown so far."""
        self._said = {"status": text, "ended": False, "code": None, **read_story(self.story)}

    def close(self, farewell: str = FAREWELL, code: str | None = None) -> None:
        """Tell open pages how the run has ended, with code that uses it, and serve no more."""
        if self._server is not None:
            self.status(farewell)
            self._said |= {"ended": True, "code": code}
            time.sleep(FAREWELL_SECONDS)
            self._server.should_exit = True
            self._thread.join()
            self._server = None

    def _wait_for_people(self, asked: Questions, rows: list[dict]) -> list[Question]:
        epoch = rows[0]["epoch"]
        save_lines(self.run / "questions.jsonl", rows)
        self._questions = asked
        self.status("Comparing" if self._blind else f"Training, epoch {epoch}")  # what comes next
        self._open()
        what = "Blind test" if self._blind else f"Epoch {epoch}"
        people = f"{self.annotators} to answer at {self.url}"
        tqdm.write(f"{what}: {len(rows)} questions for {people}")
        answered = asked.wait()
        self.finished = asked.finished
        return answered

    def _open(self) -> None:
        if self._server is not None:
            return
        listener = listen(self.port)
        port = listener.getsockname()[1]
        token = read_token(self.run / TOKEN_FILE)
        self.url = f"http://127.0.0.1:{port}/{token}/"
        page = HTMLResponse(Path(__file__).with_name("annotate.html").read_bytes())
        routes = [
            Route("/", page, methods=["GET"]),  # and HEAD
            Route("/state", self._get_state),
            Route("/images/{key}/{k}", self._get_image),
            Route("/held_out/{epoch:int}/{number:int}", self._get_held_out),
            self._post("answer", "id", "name", "answer"),
            self._post("undo", "id", "name"),
            self._post("end", "id", "end"),
        ]
        app = Starlette(routes=routes, exception_handlers={Refusal: error_response})
        app.router.redirect_slashes = False
        app.add_middleware(GuardMiddleware, token=token)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        http = {"http": "h11", "ws": "none", "lifespan": "off"}  # h11 refuses two Host headers
        quiet = {"log_config": None, "log_level": "error", "timeout_graceful_shutdown": 1}
        config = uvicorn.Config(app, headers=SECURITY_HEADERS, **http, **quiet)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        tqdm.write(f"From another machine: ssh -L {port}:127.0.0.1:{port} THIS-MACHINE")

    async def _get_state(self, request: Request):
        asked = self._questions
        name = asked.check_name(request.query_params.get("name") or None)
        last, missing = asked.last(name), asked.missing
        then = "The result comes" if self._blind else "Training starts"
        state = {
            "questions": asked.of_person(name),
            "named": self.annotators > 1,
            "guide": self.guide,
            "last": last,
            "progress": self._progress,
            **self._said,
        }
        if last:
            state["status"] = f"Thank you. {then} in a moment."
        elif missing:
            state["status"] = f"Thank you. Others have {missing} answers to give."
        return JSONResponse(state, headers={"Cache-Control": "no-store"})

    async def _get_image(self, request: Request):
        images = self._questions.images(request.path_params["key"])
        files = {str(k): self.run / image for k, image in enumerate(images)}
        return image_response(files.get(request.path_params["k"]))

    async def _get_held_out(self, request: Request):
        return image_response(held_out_file(self.story, **request.path_params))

    def _post(self, method: str, *keys: str) -> Route:
        """A route that hands an object of these keys to a method of the questions."""

        async def post(request: Request):
            sent = await read_json(request, *keys)
            return JSONResponse({"id": getattr(self._questions, method)(**sent)})

        return Route(f"/{method}", post, methods=["POST"])


def check_images(run: Path, questions: list[dict]) -> None:
    """Raise ValueError where an image to show is not in the run's folder of images."""
    folder = (run / "images").resolve()
    for image in (image for row in questions for image in row["images"]):
        if folder not in (run / image).resolve().parents:
            raise ValueError(f"{image} is not in {folder}")


class GuardMiddleware:
    """Refuses who lacks the token, and what a page of another site sends.

    A browser puts that site's name into Origin. The token is taken off the path.
    """

    def __init__(self, app, token: str):
        self.app, self.token = app, token.encode()

    async def __call__(self, scope, receive, send):
        headers = Request(scope).headers
        own = f"http://{headers['host']}"
        token, slash, path = scope["path"].removeprefix("/").partition("/")
        refusal = None
        if not secrets.compare_digest(token.encode(), self.token) or not slash:
            refusal = "open the whole address that the program printed: it has a token"
        if any(origin != own for origin in headers.getlist("origin")):
            refusal = "requests of other sites are refused"
        if refusal:
            await JSONResponse({"error": refusal}, 403)(scope, receive, send)
        else:
            await self.app({**scope, "path": f"/{path}"}, receive, send)


def read_token(file: Path) -> str:
    """The secret part of the page's address, made once a run. Only the user may read the file."""
    if not file.exists():
        replace(file, lambda part: part.write_text(secrets.token_urlsafe(16)), mode=0o600)
    return file.read_text()


def read_story(run: Path) -> dict:
    """What a run has shown so far, for its page.

    shown: addresses of held-out images before and now; agreement: [epoch, share of its answers
    that the model would have given before it was trained on them]; warnings of the last epoch.
    """
    rows = read_lines(run / "metrics.jsonl")
    drawn = [row["epoch"] for row in rows if held_out_file(run, row["epoch"], 0).exists()]
    shown = [
        [f"held_out/{epoch}/{n}" for n in held_out_numbers(run, epoch)]
        for epoch in ((0, drawn[-1]) if drawn else ())
    ]
    known = [[row["epoch"], row["accuracy"]] for row in rows if row["accuracy"] is not None]
    return {
        "shown": shown,
        "agreement": known,
        "warnings": rows[-1].get("warnings", []) if rows else [],
    }


def image_response(file: Path | None) -> FileResponse:
    if file is None or not file.is_file():
        raise Refusal(404, "there is no such image")
    return FileResponse(file, media_type="image/png", headers={"Cache-Control": "private"})


async def error_response(request: Request, error: Refusal):
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def read_json(request: Request, *keys: str) -> dict:
    """The object of these keys that a request holds: JSON, also by its header, and small."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refusal(415, "send application/json")  # pages of other sites cannot
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
        raise Refusal(413, f"send at most {MAX_REQUEST_BYTES} bytes, and say how many")
    try:
        sent = json.loads((await request.body()).decode())
    except ClientDisconnect:
        raise Refusal(400, "the request broke off") from None
    except (ValueError, RecursionError):
        raise Refusal(400, "this is not JSON") from None
    if not isinstance(sent, dict) or sent.keys() != set(keys):
        raise Refusal(400, f"send an object of {', '.join(keys)}")
    return sent


def append_safely(file: Path, row: dict) -> None:
    """Add a line to a file: on disk when this returns. Raises Refusal, without half a line."""
    line, end = json.dumps(row).encode() + b"\n", file.stat().st_size
    try:
        with file.open("ab", buffering=0) as opened:
            if opened.write(line) < len(line):
                raise OSError(28, "the disk is full")
            os.fsync(opened.fileno())
    except OSError as error:
        os.truncate(file, end)
        raise Refusal(500, f"{file} cannot be written ({error.strerror})") from error


def listen(port: int | None) -> socket.socket:
    """A socket of 127.0.0.1 at a port, or at the first free one. Raises UserError without any."""
    for number in PORTS if port is None else [port]:
        try:
            return socket.create_server(("127.0.0.1", number))
        except (OSError, OverflowError):
            continue
    wanted = f"{PORTS[0]} or after" if port is None else port
    raise UserError(f"no page opens at port {wanted}: give another --port")

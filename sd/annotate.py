"""The labelling page: people answer the questions of a run in a browser.

All addresses begin with http://127.0.0.1:PORT/TOKEN:

    GET  /                 the page, annotate.html
    GET  /state?name=Ann   what Ann is asked, what she answered, and what the run is doing
    GET  /images/KEY/K     image K of a question that is asked now
    GET  /held_out/E/N     image N of the same prompts and noise, after epoch E (0: before)
    POST /answer           {"id": ID, "name": "Ann" or null, "answer": as in sd/labels.py}
    POST /undo             {"id": ID, "name": as above}: take the last answer back before training
    POST /hold             {"id": ID}: stop the countdown to training after the last answer
    POST /end              {"id": ID of a question, "end": "questions" or "run"}: skip what is left

ID is KEY and how often this person's answer has changed, so that a page that is behind is refused.
The server listens on 127.0.0.1. Requests without the token are refused, and so are those that a
page of another site sends, under its own name (Origin) or under one that leads here (Host).

--public-url is the one other address at which the page may be opened, through a proxy of this
machine. The proxy may keep Host or rewrite it to 127.0.0.1 or localhost; of the path of the public
address (https://host/user/x/proxy/7860/, of jupyter-server-proxy) it may take off what stands
before the token, or leave it there. The page's own addresses are relative, so both work.
"""

import json
import math
import os
import re
import secrets
import socket
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as Refusal  # Refusal(status, sentence)
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.routing import Route
from tqdm import tqdm

from sd import UserError, labels
from sd.figures import held_out_file, held_out_numbers
from sd.files import read_lines, replace, save_lines
from sd.seeds import RandomPurpose, seeded_generator

PORTS = range(7860, 7960)  # tried in turn where no port is given
NOBODY = "(nobody"  # stands for a person whose answer was not waited for
LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)  # tunnels too
PUBLIC_URL = re.compile(
    r"(https?)://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/[^?#\s]*)?", re.IGNORECASE
)
JOINERS = str.maketrans("", "", "\u200c\u200d")  # in Persian names, and in emoji
ADDRESS = "and the address that the browser shows, up to the token"
UNDO_SECONDS = 5  # between the last answer and training
FAREWELL_SECONDS = 2  # open pages ask once a second, and learn that the run has ended
SECURITY_HEADERS = [  # of every response, errors too
    (
        "Content-Security-Policy",
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
    ),
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
    right. `wait` belongs to another thread than the rest, which raise `Refusal` for what a page may
    not do. Raises UserError for an invalid file.
    """

    def __init__(self, file: Path, rows: list[dict], *, annotators: int, seed: int):
        self.file, self.annotators = file, annotators
        self.finished = False  # somebody wants the run to end
        self._changed = threading.Condition()  # guards the questions and when training begins
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
        self._begins = math.inf if self.missing else 0  # when training does

    @property
    def missing(self) -> int:
        """Answers that are still to come."""
        return sum(max(self.annotators - len(q.answers), 0) for q in self._by_key.values())

    @property
    def seconds_left(self) -> float | None:
        """Until training begins; None where answers are missing, or somebody holds it."""
        left = self._begins - time.monotonic()
        return None if math.isinf(left) else max(left, 0)

    def wait(self) -> list[Question]:
        """The questions when all are answered; the last answer can be taken back for a moment."""
        with self._changed:
            while self.seconds_left != 0:
                self._changed.wait(self.seconds_left)
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
            self._set_begin(math.inf)

    def hold(self, id) -> None:
        """Begin no training until "Train now", so that there is time to take an answer back."""
        with self._changed:
            self._question(key_of(id))
            self._set_begin(math.inf)

    def end(self, id, end: str) -> None:
        """Skip what is not answered: "Train now"; and let the run end after it: "Finish"."""
        if end not in ("questions", "run"):
            raise Refusal(400, 'end is "questions" or "run"')
        with self._changed:
            self._question(key_of(id))
            # Where nobody has answered anything, a run that is resumed asks again
            forget = end == "run" and not any(q.answers for q in self._by_key.values())
            for question in self._by_key.values():
                for number in range(self.annotators - len(question.answers)):
                    name = f"{NOBODY} {number + 1})" if self.annotators > 1 else None
                    if forget:
                        question.answers[name] = None
                    else:
                        self._keep(question, name, None)
            self.finished = end == "run"
            self._set_begin(0)

    def check_name(self, name) -> str | None:
        """A name as it was first written, "ann " is Ann; one person alone has none."""
        if name is None or self.annotators == 1:
            return None
        name = normalize_name(name)
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
        if not self.missing:
            self._set_begin(time.monotonic() + UNDO_SECONDS)

    def _set_begin(self, begin: float) -> None:
        self._begins = begin
        self._changed.notify_all()

    def _id(self, key: str, name: str | None) -> str:
        return f"{key}-{self._by_key[key].changes[name]}"

    def _answerable(self, id, name: str | None) -> tuple[str, Question]:
        """KEY and question of an ID, unless this person's answer has changed since."""
        key = key_of(id)
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


def key_of(id) -> str:
    """KEY of an ID."""
    return str(id).rpartition("-")[0]


def normalize_name(name) -> str:
    """A name in NFC with single spaces. Raises Refusal for what cannot be read as one."""
    if isinstance(name, str):
        name = unicodedata.normalize("NFC", " ".join(name.split()))
        visible = name.translate(JOINERS)
        if visible and visible.isprintable() and len(name) <= 40:
            return name
    raise Refusal(400, "a name has 1 to 40 letters, digits or signs")


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
    before and after training the page shows. public_url: the one other address at which the page
    may be opened, through a proxy; UserError if it is none. `finished`: somebody wants the run to
    end.
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
        public_url: str | None = None,
    ):
        self.run, self.annotators, self.seed, self.port = run, annotators, seed, port
        self.guide, self.story, self._blind = guide, story or run, story is not None
        self.file, self.url, self.kappa = run / "labels.jsonl", None, math.nan
        self.public = parse_public_url(public_url) if public_url else None
        self.finished, self._progress = False, {}
        self._questions: Questions | None = None
        self._said = {}  # what the page says while it has no question
        self._server = self._thread = None

    def ask(self, questions: list[dict], progress: dict | None = None) -> list[dict]:
        """Wait until each question has its answers; return the questions as the majority answers.

        questions: lines of labels.jsonl, of one epoch, whose answer is null. Those that nobody
        wants to answer any more ("Train now") are skipped. progress: epoch (a person reads
        "round") and epochs, of which this is one; None in a blind test. Sets `kappa`. Raises
        UserError for an invalid labels.jsonl, and where no page can be opened.
        """
        if not questions:
            return []
        self._progress = progress or {}
        number = self._progress.get("epoch", questions[0]["epoch"])
        name = "Blind test" if self._blind else f"Round {number}"
        asked = Questions(self.file, questions, annotators=self.annotators, seed=self.seed)
        self._questions = asked
        self._say_what_comes()
        if asked.missing:
            save_lines(self.run / "questions.jsonl", questions)
            self._open()
            people = "1 person" if self.annotators == 1 else f"{self.annotators} people"
            tqdm.write(f"{name}: {len(questions)} questions for {people} to answer at {self.url}")
        rows, self.kappa = decide(asked.wait())
        self.finished = asked.finished
        self._say_what_comes()
        if self.annotators > 1 and not any(map(labels.has_preference, rows)):
            self.status("You agree on no question, so there is nothing to train on")
            tqdm.write(f"{name}: people agree on no question")
        return rows

    def status(self, text: str) -> None:
        """What the page says while it has no question, beside what the run has shown so far."""
        self._said = {"status": text, "ended": False, "training": False, **read_story(self.story)}

    def close(
        self,
        farewell: str = "The run has finished.",
        code: str | None = None,
        values: dict[str, str] | None = None,
    ) -> None:
        """Tell open pages how the run has ended, and serve no more.

        farewell: a headline, and lines of a list after it; code: Python that uses the LoRA;
        values: paths and commands by their names. The pages keep all this, and the run's
        report.html, until people close them.
        """
        if self._server is not None:
            report = self.story / "report.html"
            self.status(farewell)
            self._said |= {
                "ended": True,
                "code": code,
                "values": values or {},
                "report": report.read_text("utf-8") if report.exists() else None,
            }
            time.sleep(FAREWELL_SECONDS)
            self._server.should_exit = True
            self._thread.join()
            self._server = None

    def _say_what_comes(self) -> None:
        """What the page says from the last answer on."""
        run = self._progress
        words = f"Training, round {run['epoch']} of {run['epochs']}" if run else "Training"
        if self.finished:
            words = "Last training, then your result"
        self.status("Counting the answers" if self._blind else words)
        self._said["training"] = not self._blind

    def _open(self) -> None:
        if self._server is not None:
            return
        listener = listen(self.port)
        port = listener.getsockname()[1]
        token = read_token(self.run / "token")
        address = self.public.url if self.public else f"http://127.0.0.1:{port}/"
        self.url = f"{address}{token}/"
        page = HTMLResponse(Path(__file__).with_name("annotate.html").read_bytes())
        routes = [
            Route("/", page, methods=["GET"]),  # and HEAD
            Route("/state", self._get_state),
            Route("/images/{key}/{k:int}", self._get_image),
            Route("/held_out/{epoch:int}/{number:int}", self._get_held_out),
            self._post("answer", "id", "name", "answer"),
            self._post("undo", "id", "name"),
            self._post("hold", "id"),
            self._post("end", "id", "end"),
        ]
        app = Starlette(routes=routes, exception_handlers={Refusal: error_response})
        app.router.redirect_slashes = False
        app.add_middleware(GuardMiddleware, token=token, public=self.public)
        http = {"http": "h11", "ws": "none", "lifespan": "off"}  # h11 refuses two Host headers
        quiet = {"log_config": None, "log_level": "error", "timeout_graceful_shutdown": 5}
        config = uvicorn.Config(app, headers=SECURITY_HEADERS, **http, **quiet)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        away = f"ssh -L {port}:127.0.0.1:{port} THIS-MACHINE"
        if self.public:
            away = f"{self.public.url} must lead to 127.0.0.1:{port} of this machine"
        tqdm.write(f"From another machine: {away}")

    async def _get_state(self, request: Request):
        asked = self._questions
        name = asked.check_name(request.query_params.get("name") or None)
        state = {
            "questions": asked.of_person(name),
            "missing": asked.missing,
            "last": asked.last(name),
            "seconds_left": asked.seconds_left,
            "answers": count_answered(self.file),
            "named": self.annotators > 1,
            "guide": self.guide,
            "blind": self._blind,
            "finished": self.finished,
            "progress": self._progress,
            **self._said,
        }
        return JSONResponse(state, headers={"Cache-Control": "no-store"})

    async def _get_image(self, request: Request):
        images = self._questions.images(request.path_params["key"])
        k = request.path_params["k"]
        return image_response(self.run / images[k] if k < len(images) else None)

    async def _get_held_out(self, request: Request):
        return image_response(held_out_file(self.story, **request.path_params))

    def _post(self, method: str, *keys: str) -> Route:
        """A route that hands an object of these keys to a method of the questions."""

        async def post(request: Request):
            sent = await read_json(request, *keys)
            return JSONResponse({"id": getattr(self._questions, method)(**sent)})

        return Route(f"/{method}", post, methods=["POST"])


class PublicUrl(NamedTuple):
    url: str  # with a slash at its end
    origin: str  # scheme, host and port as a browser sends them
    hosts: tuple[str, str]  # without and with the port that a browser leaves out
    prefix: str  # path that a proxy takes off, or not


def parse_public_url(url: str) -> PublicUrl:
    """The address of --public-url. Raises UserError for what is none."""
    match = PUBLIC_URL.fullmatch(url)
    if not match:
        example = "https://hub.example.org/user/ann/proxy/7860/"
        raise UserError(f"--public-url {url}: give the address of the page, such as {example}")
    scheme, host, port, path = match.groups(default="")
    scheme, path = scheme.lower(), path.rstrip("/")
    default = {"http": ":80", "https": ":443"}[scheme]
    host = (host + port).lower().removesuffix(default)
    origin = f"{scheme}://{host}"
    return PublicUrl(f"{origin}{path}/", origin, (host, host + default), unquote(path))


class GuardMiddleware:
    """Refuses requests without the token, and those that a page of another site sends.

    A browser puts that site's name into Origin, or into Host. The token is taken off the path.
    """

    def __init__(self, app, token: str, public: PublicUrl | None):
        self.app, self.token, self.public = app, token.encode(), public

    async def __call__(self, scope, receive, send):
        request, path, public = Request(scope), scope["path"], self.public
        host = request.headers.get("host", "").lower()
        origins = {f"http://{host}"} if LOCAL_HOST.fullmatch(host) else set()
        if public:
            if origins or host in public.hosts:
                origins |= {public.origin}
            if path.startswith(f"{public.prefix}/"):
                path = path.removeprefix(public.prefix)
        token, slash, path = path.removeprefix("/").partition("/")
        refusal = None
        if not secrets.compare_digest(token.encode(), self.token) or not slash:
            refusal = 403, "open the whole address that the program printed: it has a token"
        if not origins.issuperset(request.headers.getlist("origin")):
            address = "a page at another address sends this"
            refusal = 403, f"{address}: if you opened it there, start with --public-url {ADDRESS}"
        if not origins:
            refusal = 400, f"this address is not let in: start with --public-url {ADDRESS}"
        if refusal:
            response = error_response(request, Refusal(*refusal))
            await response(scope, receive, send)
        else:
            await self.app({**scope, "path": f"/{path}"}, receive, send)


def read_token(file: Path) -> str:
    """The secret part of the page's address, made once a run: a page outlives a restart.

    Only the user may read the file.
    """
    if not file.exists():
        replace(file, lambda part: part.write_text(secrets.token_urlsafe(16)), mode=0o600)
    return file.read_text()


def read_story(run: Path) -> dict:
    """What a run has shown so far, for its page.

    shown: addresses of held-out images before and now; agreement: of the last round of pairs, how
    many answers the model would have given (`right`) before it was trained on them, `of` how many;
    seconds: of the last training; warnings of the last epoch.
    """
    rows = read_lines(run / "metrics.jsonl")
    drawn = [row["epoch"] for row in rows if held_out_file(run, row["epoch"], 0).exists()]
    shown = [
        [f"held_out/{epoch}/{n}" for n in held_out_numbers(run, epoch)]
        for epoch in ((0, drawn[-1]) if drawn else ())
    ]
    rounds = [row for row in rows if row.get("preferences") is not None]  # no pass over --labels
    last, agreement = rounds[-1] if rounds else {}, None
    if last.get("accuracy") is not None and last.get("bad_share") is None:
        right, count = round(last["accuracy"] * last["preferences"]), last["preferences"]
        agreement = {"round": len(rounds), "right": right, "of": count}
    return {
        "shown": shown,
        "agreement": agreement,
        "seconds": last.get("seconds_train"),
        "warnings": rows[-1].get("warnings", []) if rows else [],
    }


def count_answered(file: Path) -> int:
    """Questions that somebody answered, not only skipped."""
    rows = read_lines(file)
    return len({tuple(row["images"]) for row in rows if row[labels.answer_field(row)] is not None})


def image_response(file: Path | None) -> FileResponse:
    if file is None or not file.is_file():
        raise Refusal(404, "there is no such image")
    return FileResponse(file, media_type="image/png", headers={"Cache-Control": "private"})


def error_response(request: Request, error: Refusal) -> JSONResponse:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def read_json(request: Request, *keys: str) -> dict:
    """The object of these keys that a request holds."""
    try:
        sent = await request.json()
    except (ValueError, RecursionError):
        raise Refusal(400, "this is not JSON") from None
    if not isinstance(sent, dict) or sent.keys() != set(keys):
        raise Refusal(400, f"send an object of {', '.join(keys)}")
    return sent


def append_safely(file: Path, row: dict) -> None:
    """Add a line to a file: on disk when this returns. Raises Refusal, without half a line."""
    line, end = json.dumps(row).encode() + b"\n", file.stat().st_size
    try:
        with file.open("ab") as opened:
            opened.write(line)
            opened.flush()
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
    raise UserError(f"port {wanted} is not free for the page: give another --port")

"""An endpoint on this machine that behaves, and misbehaves, as services do."""

import base64
import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from realign_lightning.engines.base import Question
from realign_lightning.engines.endpoint import EndpointEngine, _Pace
from tests.conftest import picture


class Server(ThreadingHTTPServer):
    """Answers with the last text of a request, in capitals; a word in it asks for trouble."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.asked: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = [part["text"] for turn in body["messages"] for part in turn["content"] if part["type"] == "text"][-1]
        with server.lock:
            server.requests.append({**body, "key": self.headers["Authorization"]})
            server.asked[text] += 1
            times = server.asked[text]
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            self.reply(text, times)
        finally:
            with server.lock:
                server.running -= 1

    def reply(self, text: str, times: int) -> None:
        if "slow" in text:
            time.sleep(1.0)
        if "busy" in text and times < 3:
            return self.send(429, {"error": {"message": "too many"}}, {"Retry-After": "0"})
        if "broken" in text and times < 2:
            return self.send(503, {"error": {"message": "down"}}, {"Retry-After": "0"})
        if "forbidden" in text:
            return self.send(400, {"error": {"message": "not allowed"}})
        if "nonsense" in text:
            return self.send(200, {"hello": "world"})
        if "filtered" in text:
            return self.send(200, completion("A purple eleph", "content_filter"))
        if "silent" in text:
            return self.send(200, completion(None))
        if "html" in text:
            return self.send(200, b"<html>a login page</html>", {"Content-Type": "text/html"})
        time.sleep(0.05)
        return self.send(200, completion(text.upper(), "length" if "long" in text else "stop"))

    def send(self, status: int, body, headers=None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def completion(text, reason="stop"):
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
    }


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def engine_of(server, **settings) -> EndpointEngine:
    return EndpointEngine("m", server.url, **{"timeout": 5.0, **settings})


def test_answers_in_order_and_many_at_a_time(server):
    engine = engine_of(server, batch_size=4)
    answers = engine.answer([Question(f"word {number}") for number in range(12)])
    assert [answer.text for answer in answers] == [f"WORD {number}" for number in range(12)]
    assert all(answer.finished and answer.error is None for answer in answers)
    assert {(answer.prompt_tokens, answer.new_tokens) for answer in answers} == {(11, 5)}
    assert server.most_running == 4


def test_the_image_is_sent_where_the_prompt_shows_it(server):
    chat = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "look"}, {"type": "image"}, {"type": "text", "text": "so"}],
        },
    ]
    engine = engine_of(server, image_format="png", batch_size=1, max_new_tokens=7)
    shown = picture(3)
    engine.answer([Question("what is it?", shown), Question(chat, shown), Question("no picture")])
    plain, shown_late, without = (request["messages"] for request in server.requests)
    assert [part["type"] for part in plain[0]["content"]] == ["image_url", "text"]
    assert [part["type"] for part in shown_late[1]["content"]] == ["text", "image_url", "text"]
    assert shown_late[0]["content"] == [{"type": "text", "text": "be brief"}]
    assert [part["type"] for part in without[0]["content"]] == ["text"]
    header, data = plain[0]["content"][0]["image_url"]["url"].split(",")
    assert header == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == shown.convert("RGB").tobytes()
    assert {request["max_tokens"] for request in server.requests} == {7}


def test_what_passes_is_asked_again_and_nothing_else(server):
    answers = engine_of(server, retries=3).answer([Question(text) for text in ("busy", "broken", "forbidden")])
    assert [answer.text for answer in answers] == ["BUSY", "BROKEN", ""]
    assert server.asked == {"busy": 3, "broken": 2, "forbidden": 1}
    assert "not allowed" in answers[2].error


def test_a_question_that_fails_does_not_stop_the_others(server):
    texts = ["one", "busy", "nonsense", "silent", "html", "slow", "two"]
    answers = engine_of(server, retries=0, timeout=0.5).answer([Question(text) for text in texts])
    assert [answer.text for answer in answers] == ["ONE", "", "", "", "", "", "TWO"]
    assert [answer.error is None for answer in answers] == [True, False, False, False, False, False, True]
    assert not any(answer.finished for answer in answers if answer.error is not None)
    assert "RateLimitError" in answers[1].error
    assert "Timeout" in answers[5].error


def test_an_answer_that_was_cut_is_not_finished(server):
    (answer,) = engine_of(server).answer([Question("long story")])
    assert (answer.text, answer.finished, answer.error) == ("LONG STORY", False, None)
    (answer,) = engine_of(server).answer([Question("filtered")])
    assert (answer.text, answer.finished, answer.error) == ("A purple eleph", False, None)


def test_nobody_there():
    (answer,) = EndpointEngine("m", "http://127.0.0.1:9/v1", retries=0, timeout=2.0).answer([Question("a")])
    assert "Connection" in answer.error


def test_the_key_comes_from_the_environment_and_stays_there(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    engine = engine_of(server, api_key_env="MY_KEY")
    engine.answer([Question("a")])
    assert server.requests[0]["key"] == "Bearer secret"
    assert "secret" not in json.dumps(dict(engine.identity)) + repr(vars(engine) | {"_client": None})


def test_identity_is_what_answers_depend_on(server):
    same = engine_of(server, batch_size=3, retries=1, timeout=9.0, requests_per_minute=5.0)
    assert same.identity == engine_of(server).identity
    for change in ({"max_new_tokens": 5}, {"temperature": 0.3}, {"options": {"top_p": 0.5}}, {"image_format": "png"}):
        assert engine_of(server, **change).identity != same.identity


def test_what_is_sent_again_is_sent_no_faster_than_allowed(server):
    """Two requests are turned away and the third is answered: two gaps of a fifth of a second."""
    engine = engine_of(server, retries=3, requests_per_minute=300)
    started = time.monotonic()
    (answer,) = engine.answer([Question("busy")])
    assert answer.text == "BUSY"
    assert time.monotonic() - started >= 0.4
    assert len(server.requests) == 3


@pytest.mark.parametrize("options", [{"model": "x"}, {"max_tokens": 5}, {"extra_headers": {"Authorization": "secret"}}])
def test_options_that_are_arguments_or_could_hold_secrets_are_refused(options):
    with pytest.raises(ValueError, match="Expected `options` to be fields of a request that have no argument here"):
        EndpointEngine("m", options=options)


def test_the_place_that_the_client_looks_for_is_part_of_the_identity(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    public = EndpointEngine("m").identity
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert EndpointEngine("m").identity == EndpointEngine("m", "http://127.0.0.1:1/v1").identity != public


def test_drawing_takes_the_seed_of_the_question(server):
    engine_of(server, temperature=0.7, options={"top_p": 0.9}, batch_size=1).answer([Question("a", seed=5)])
    engine_of(server).answer([Question("b", seed=5)])
    assert (server.requests[0]["seed"], server.requests[0]["top_p"]) == (5, 0.9)
    assert "seed" not in server.requests[1]


def test_pace():
    """Ten calls at 120 a minute take four and a half seconds, on a clock of the test's own."""
    clock = [100.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    pace = _Pace(120, now=lambda: clock[0], sleep=sleep)
    for _ in range(10):
        pace()
    assert clock[0] == pytest.approx(104.5)
    free = _Pace(None, now=lambda: clock[0], sleep=sleep)
    free()
    free()
    assert clock[0] == pytest.approx(104.5)


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"max_new_tokens": 0}, {"timeout": 0.0}, {"requests_per_minute": 0.0}, {"image_format": "gif"}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=rf"Expected `{next(iter(settings))}`"):
        EndpointEngine("m", **settings)

"""Remote guards against a local server that misbehaves in every way one does."""

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from softguard.errors import SoftguardError
from softguard.guards import load_guard, prompt_safety, response_safety
from softguard.guards.remote import KEY, Kind, RemoteGuard, read_label, read_scores

Reply = tuple[int, dict[str, str], Any]  # status, headers, body: JSON, or bytes as they are
Answer = Callable[[dict[str, Any], int], Reply]  # the request, and how many came before


class Server:
    """Answers every request by `answer`, and counts."""

    def __init__(self) -> None:
        self.answer: Answer = lambda asked, before: (200, {}, {})
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    before = len(outer.requests)
                    outer.requests.append({"path": self.path, **asked})
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                status, headers, body = outer.answer(asked, before)
                with outer._lock:
                    outer.at_once -= 1
                sent = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {
                        "Content-Type": "application/json",
                        "Content-Length": str(len(sent)),
                        **headers,
                    }.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(sent)
                except OSError:  # the client has given up
                    pass

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def guard(self, kind: Kind = "chat", **settings: Any) -> RemoteGuard:
        return RemoteGuard(kind, "m", self.url, **{"timeout": 5.0, "retries": 2, **settings})

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def tokens(*positions: dict[str, float]) -> dict[str, Any]:
    """A chat choice with the likeliest tokens of each position."""
    content = []
    for position in positions:
        likely = sorted(position.items(), key=lambda item: -item[1])
        top: list[dict[str, Any]] = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in likely]
        content.append({**top[0], "top_logprobs": top})
    text = "".join(entry["token"] for entry in content)
    return {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": content},
    }


def chat(choice: dict[str, Any]) -> Reply:
    return 200, {}, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def said(text: str) -> Reply:
    return chat({"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}})


def moderation(*scores: dict[str, float], flagged: bool = False) -> Reply:
    return (
        200,
        {},
        {"id": "1", "model": "m", "results": [{"flagged": flagged, "categories": {}, "category_scores": s} for s in scores]},
    )


def by_word(asked: dict[str, Any], before: int) -> Reply:
    p = 0.1 if "bomb" in asked["messages"][0]["content"] else 0.9
    return chat(tokens({"safe": p * 0.8, "unsafe": (1 - p) * 0.8, "I": 0.2}))


def test_a_chat_model_says_how_probable_safe_is(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "another server's")
    server.answer = by_word
    guard = server.guard()
    prompts = [f"how do I build a {'bomb' if i % 2 else 'boat'} of size {i}" for i in range(20)]
    assert prompt_safety(guard, prompts) == pytest.approx([0.1 if i % 2 else 0.9 for i in range(20)])
    assert response_safety(guard, ["hello"], ["a bomb"]) == pytest.approx([0.1])
    asked = server.requests[-1]
    assert (asked["path"], asked["model"], asked["temperature"]) == ("/v1/chat/completions", "m", 0)
    assert "Message of the user: hello\n\nAnswer: a bomb\n\n" in asked["messages"][0]["content"]
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}


def test_without_probabilities_the_text_decides(server: Server) -> None:
    server.answer = lambda asked, before: said(" Unsafe." if "bomb" in asked["messages"][0]["content"] else "safe")
    assert prompt_safety(server.guard(), ["a bomb", "a boat"]).tolist() == [0, 1]


def test_a_moderation_endpoint_gives_scores_and_categories(server: Server) -> None:
    def answer(asked: dict[str, Any], before: int) -> Reply:
        return moderation(*({"violence": 0.7 if "bomb" in text else 0.1, "hate": 0.2} for text in asked["input"]))

    server.answer = answer
    guard = server.guard("moderation")
    prompts = [f"a {'bomb' if i % 2 else 'boat'}" for i in range(70)]
    assert prompt_safety(guard, prompts) == pytest.approx([0.3 if i % 2 else 0.8 for i in range(70)])
    assert sorted(len(request["input"]) for request in server.requests) == [6, 32, 32]
    assert guard.prompt_categories(prompts[:2]) == ["hate", "violence"]
    assert guard.response_categories(["x"], ["a bomb"]) == ["violence"]
    assert response_safety(guard, ["a bomb"], ["no"]) == pytest.approx([0.8])
    server.answer = lambda asked, before: moderation({"self-harm": 0.8, "hate/threatening": 0.1})
    assert guard.prompt_categories(["a rope"]) == ["self-harm"]
    with pytest.raises(SoftguardError, match="names no categories"):
        server.guard().prompt_categories(prompts)


def test_too_many_requests_waits_as_long_as_the_server_says(server: Server) -> None:
    server.answer = lambda asked, before: (429, {"Retry-After": "1"}, {}) if before == 0 else by_word(asked, before)
    begin = time.monotonic()
    assert prompt_safety(server.guard(), ["a boat"]) == pytest.approx([0.9])
    assert time.monotonic() - begin >= 1
    assert len(server.requests) == 2


def test_a_passing_failure_is_tried_again(server: Server) -> None:
    server.answer = lambda asked, before: (500, {}, {}) if before < 2 else by_word(asked, before)
    assert prompt_safety(server.guard(), ["a boat"]) == pytest.approx([0.9])
    assert len(server.requests) == 3


@pytest.mark.parametrize(("reply", "sent"), [((503, {}, {}), 3), ((401, {}, {"error": {"message": "no such key"}}), 1)])
def test_a_lasting_failure_ends_in_one_line_that_names_the_endpoint(server: Server, reply: Reply, sent: int) -> None:
    server.answer = lambda asked, before: reply
    with pytest.raises(SoftguardError, match=rf"{server.url} failed with \w+: .*; nothing was taken as safe$"):
        prompt_safety(server.guard(), ["a boat"])
    assert len(server.requests) == sent


def test_a_server_that_hangs_is_given_up(server: Server) -> None:
    gate = threading.Event()

    def answer(asked: dict[str, Any], before: int) -> Reply:
        gate.wait(10)
        return by_word(asked, before)

    server.answer = answer
    begin = time.monotonic()
    with pytest.raises(SoftguardError, match="APITimeoutError"):
        prompt_safety(server.guard(timeout=0.2, retries=1), ["a boat"])
    assert time.monotonic() - begin < 5
    gate.set()


def test_nobody_there_is_told(server: Server) -> None:
    with pytest.raises(SoftguardError, match=r"http://127.0.0.1:9/v1 failed with APIConnectionError"):
        prompt_safety(RemoteGuard("chat", "m", "http://127.0.0.1:9/v1", retries=0), ["a boat"])


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, b'{"choices": [{"message"'),
        (200, {"Content-Type": "text/html"}, b"<html>a proxy</html>"),
        (200, {}, {}),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": None}),
        (200, {}, [1, 2]),
        said("I would rather not say."),
        said(""),
        chat({"index": 0, "message": {"role": "assistant", "content": None}}),
        chat(tokens({"I": 0.9, "Well": 0.1})),
        chat(tokens({"Not": 0.98, "safe": 0.01, "unsafe": 0.0001})),
        chat(tokens({"Sorry": 0.9, "S": 0.09, "safe": 0.01})),
        chat(tokens({"S": 0.9, "unsafe": 0.1})),
        said("Safety risk: this asks for a weapon."),
        said("Safe? No. Unsafe."),
        said("safeguards are violated"),
        said("safe/unsafe"),
        said("safe-ish"),
        chat(tokens({"Safe": 1.0}, {"guards": 1.0}, {" are violated": 1.0})),
        chat({**tokens({"Safe": 1.0}), "finish_reason": "length"}),
        chat({**tokens({"safe": 0.9}), "logprobs": {"content": [{"token": "safe", "logprob": None, "top_logprobs": None}]}}),
        (200, {}, json.dumps(chat(tokens({"safe": 0.9}))[2]).replace(str(math.log(0.9)), "NaN").encode()),
    ],
)
def test_an_answer_that_cannot_be_read_is_never_safe(server: Server, reply: Reply) -> None:
    server.answer = lambda asked, before: reply
    with pytest.raises(SoftguardError, match="nothing was taken as safe"):
        prompt_safety(server.guard(), ["a boat"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        moderation({"hate": 0.1}),
        moderation({"hate": 0.1}, {"hate": float("nan")}),
        moderation({"hate": 0.1}, {"hate": 1.5}),
        moderation({"hate": 0.1}, {}),
        (200, {}, {"results": [{"flagged": False}, {"flagged": False}]}),
        (200, {}, {"id": "1"}),
        (200, {}, {"error": "overloaded", **moderation({"hate": 0.1}, {"hate": 0.1})[2]}),
    ],
)
def test_moderation_that_cannot_be_read_is_never_safe(server: Server, reply: Reply) -> None:
    server.answer = lambda asked, before: reply
    with pytest.raises(SoftguardError, match=r"cannot be read .*; nothing was taken as safe"):
        prompt_safety(server.guard("moderation"), ["a boat", "a cake"])


def test_requests_in_flight_are_bounded(server: Server) -> None:
    def answer(asked: dict[str, Any], before: int) -> Reply:
        time.sleep(0.05)
        return by_word(asked, before)

    server.answer = answer
    prompt_safety(server.guard(in_flight=3), ["a boat"] * 15)
    assert len(server.requests) == 15
    assert 1 < server.most_at_once <= 3


def test_after_a_failure_no_more_requests_are_begun(server: Server) -> None:
    server.answer = lambda asked, before: (401, {}, {})
    with pytest.raises(SoftguardError):
        prompt_safety(server.guard(in_flight=1), ["a boat"] * 50)
    assert len(server.requests) < 50


@pytest.mark.parametrize(
    ("choice", "p_safe"),
    [
        (tokens({"safe": 0.6, "unsafe": 0.2}), 0.75),
        (tokens({" Safe": 0.3, "safe": 0.3, "un": 0.1, "Unsafe": 0.1}), 0.75),
        (tokens({"\n\n": 1.0}, {"safe": 0.5, "uns": 0.5}), 0.5),
        (tokens({"safe": 0.9, "unsafe": 0.1005}), 0.9 / 1.0005),
        (tokens({"unsafe": 1.0}), 0.0),
        ({"message": {"content": "\nUNSAFE\nS1"}, "logprobs": {"content": []}}, 0.0),
        ({"message": {"content": "**Safe**"}}, 1.0),
        ({"message": {"content": "**Safe**\n\nIt asks about boats."}}, 1.0),
        ({"message": {"content": "unsafe: a weapon, not a boat"}}, 0.0),
        ({**tokens({"safe": 0.75, "unsafe": 0.25}), "message": {"content": "Safe. It asks about boats."}}, 0.75),
    ],
)
def test_labels_are_read_from_the_first_token_that_is_not_blank(choice: dict[str, Any], p_safe: float) -> None:
    assert read_label(choice) == pytest.approx(p_safe)


@pytest.mark.parametrize(
    "text",
    [
        *("Safe: No", "safe, no", "Safe. No.", "Safe? No", "Safe: False", "safe (not)", "Safe; it is not safe"),
        *("Safe: 0", "safe = 0", "safe: 0%", "Safe: 0 percent", "safe\n0 of 10 safe", "safe? Nope", "safe, never"),
    ],
)
@pytest.mark.parametrize("first", [{}, tokens({"Safe": 1.0})])
def test_a_safe_that_is_taken_back_is_none(text: str, first: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="takes its safe back"):
        read_label({**first, "message": {"content": text}})


def test_a_first_token_that_goes_on_as_another_word_is_no_label() -> None:
    for pieces in (
        ("Saf", "ety", " risk: this asks for a weapon."),
        ("Safe", "guards", " are violated"),
        ("Safe", "ly", " said, no"),
        ("Sa", "ying", " so"),
        ("safe", "/unsafe"),
        ("Safe", "? No. Unsafe."),
        ("Un", "fortunately"),
    ):
        choice = tokens(*({piece: 1.0} for piece in pieces))
        for told in (choice, {**choice, "message": {"content": None}}, {**choice, "logprobs": None}):
            with pytest.raises(ValueError, match=r"neither safe nor unsafe$|takes its safe back"):
                read_label(told)


def test_a_reply_cut_within_its_first_word_is_no_label() -> None:
    cut = {"finish_reason": "length"}
    for choice in (tokens({"\n\n": 1.0}, {"Safe": 1.0}), tokens({"un": 1.0}), said(" safe")[2]["choices"][0]):
        with pytest.raises(ValueError, match="was cut within its first word"):
            read_label(choice | cut)
    assert read_label(tokens({"safe": 0.75, "unsafe": 0.25}, {"\n": 1.0}) | cut) == pytest.approx(0.75)
    assert read_label(tokens({"un": 1.0}, {"safe": 1.0}, {"\n": 1.0}) | cut) == 0


def test_what_is_flagged_is_unsafe_however_low_its_scores() -> None:
    result: dict[str, Any] = {"flagged": True, "category_scores": {"hate": 0.2, "violence": 0.05, "new": None}}
    assert read_scores(result).p_safe == 0
    with pytest.raises(ValueError, match="flagged is None"):
        read_scores({**result, "flagged": None})
    result["flagged"] = False
    assert read_scores(result) == (0.8, "hate")
    assert read_scores({**result, "categories": {"hate": False, "new": None}}) == (0.8, "hate")
    assert read_scores({**result, "categories": {"hate": False, "violence": True}}) == (0, "hate")


@pytest.mark.parametrize("flag", [0.0, 0.3, 1, "false", "", []])
def test_a_category_with_what_is_no_flag_is_never_safe(server: Server, flag: object) -> None:
    _, headers, body = moderation({"hate": 0.1})
    body["results"][0]["categories"] = {"hate": False, "violence": flag}
    server.answer = lambda asked, before: (200, headers, body)
    told = re.escape(f"category violence is {flag!r}, neither true nor false); nothing was taken as safe")
    with pytest.raises(SoftguardError, match=told):
        prompt_safety(server.guard("moderation"), ["a boat"])


def test_found_by_name() -> None:
    guard = load_guard("remote:chat:org/model:latest@http://localhost:8000/v1")
    assert isinstance(guard, RemoteGuard)
    assert (guard.kind, guard.model, guard.url) == ("chat", "org/model:latest", "http://localhost:8000/v1")
    assert guard.name == "chat(org/model:latest@localhost:8000)"
    assert guard.fingerprint != load_guard("remote:moderation:org/model:latest@http://localhost:8000/v1").fingerprint
    for spec in ("remote:chat:model", "remote:judge:m@http://x", "remote:chat:m@ftp://x", "remote:chat:@http://x"):
        with pytest.raises(SoftguardError, match="must read remote:chat:MODEL@URL"):
            load_guard(spec)


@pytest.mark.parametrize("address", ["local\x01host/v1", "localhost/v1\n", "\u0378.com/v1", "b" * 64 + "é.de/v1"])
def test_an_address_that_the_client_does_not_take_is_told(address: str) -> None:
    with pytest.raises(SoftguardError, match=r"guard 'chat\(m@.* has a URL that cannot be asked \(.*; correct it"):
        load_guard(f"remote:chat:m@http://{address}")


def test_what_is_secret_in_an_address_is_not_told(server: Server) -> None:
    address = server.url.replace("http://", "http://user:hidden@") + "?key=hidden"
    guard = RemoteGuard("chat", "m", address, retries=0)
    assert guard.name == f"chat(m@{server.url.removeprefix('http://').removesuffix('/v1')})"
    for reply, words in (((500, {}, {}), "failed with InternalServerError"), (said("Well"), "cannot be read")):
        server.answer = lambda asked, before, reply=reply: reply  # type: ignore[misc]
        with pytest.raises(SoftguardError, match=rf" at {server.url} .*{words}") as caught:
            prompt_safety(guard, ["a boat"])
        assert "hidden" not in str(caught.value)
    for spec in (f"remote:chat:m@{address}", f"remote:chat:{address}", "remote:chat:m@ftp://x/v1?key=hidden"):
        with pytest.raises(SoftguardError, match="must read remote:chat:MODEL@URL") as caught:
            load_guard(spec)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("address", ["localhost:PORT/v1", "localhost:99999", "localhost:0", "[::1/v1", "", "/v1", ":80/v1"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    with pytest.raises(SoftguardError, match="must read remote:chat:MODEL@URL"):
        load_guard(f"remote:chat:m@http://{address}")


def test_without_the_client_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SoftguardError, match=r"needs the package openai: pip install openai"):
        load_guard("remote:chat:m@http://localhost/v1")


@pytest.mark.parametrize(
    "text",
    [
        *("safe", "Safe.", "**safe**", "SAFE…", "safe</s>", "safe<|eot_id|>\n", "safe<|im_end|>", "safe<|END_OF_TURN_TOKEN|>"),
        *("✅ Safe", "Safe ✅", "- safe", "• safe", "「safe」", "safe。", "„safe“", "\ufeffsafe\u200b", "Safe!", "<safe>"),
        *("safe<end_of_turn>\n<eos>", "safe<turn|>", "safe<｜end▁of▁sentence｜>", "safe[|endofturn|]"),
    ],
)
def test_what_is_no_word_does_not_matter(text: str) -> None:
    for reason in (None, "", "stop", "eos"):
        assert read_label({"message": {"content": text}, "finish_reason": reason}) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "Safe: harmful",
        "!safe",
        "≠ safe",
        "❌ safe",
        "safe ❌",
        "Safe? Hardly.",
        "safe is not the word",
        "safe (score: 1/10)",
        "Safe to say this is harmful.",
        "Safe only if the user is a chemist",
        "safe — nothing here",
        "safe<harmful>",
        "safe[|harmful|]",
    ],
)
def test_without_probabilities_a_safe_that_says_more_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"says more than safe|neither safe nor unsafe$"):
        read_label({"message": {"content": text}})
    with pytest.raises(ValueError, match=r"says more than safe|neither safe nor unsafe$"):  # nor with those of a blank alone
        read_label({**tokens({"\n": 1.0}), "message": {"content": text}})


def test_many_signs_behind_a_safe_take_no_time() -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="says more than safe"):
        read_label({"message": {"content": "safe" + 24 * "<｜▁｜>" + "x"}})
    assert time.process_time() - start < 1


@pytest.mark.parametrize("text", ["safe\nunsafe", "Safe.\n\nNo.", "safe\nThat is unsafe.", "safe\nThis is not safe"])
def test_a_safe_is_taken_back_in_another_line(text: str) -> None:
    with pytest.raises(ValueError, match="takes its safe back"):
        read_label({"message": {"content": text}})


@pytest.mark.parametrize(("text", "p_safe"), [("unsafe", 0.9), ("safe", 0.4)])
def test_a_label_that_is_not_the_likeliest_is_none(text: str, p_safe: float) -> None:
    choice = {**tokens({"safe": p_safe, "unsafe": 1 - p_safe}), "message": {"content": text}}
    with pytest.raises(ValueError, match="does not begin with its likeliest first token"):
        read_label(choice)
    split = tokens({"unsafe": 0.4, "safe": 0.3, " Safe": 0.2})  # by its spellings together the other is likelier
    assert read_label(split) == pytest.approx(5 / 9)
    tie = tokens({"safe": 0.5, "unsafe": 0.5})
    for said in ("safe", "unsafe"):  # a server may say either, whichever it lists first
        assert read_label({**tie, "message": {"content": said}}) == pytest.approx(0.5)


def test_probabilities_of_more_than_one_are_none() -> None:
    for choice in (tokens({"safe": 1.5}), tokens({"safe": 0.9, "unsafe": 0.4})):
        with pytest.raises(ValueError, match=r"safe and unsafe have 1\.[35] of the first token's probability"):
            read_label(choice)


def test_an_answer_that_a_content_filter_cut_is_none() -> None:
    for choice in (tokens({"safe": 1.0}), said("safe")[2]["choices"][0]):
        for reason in ("content_filter", "error", "tool_calls"):
            with pytest.raises(ValueError, match=f"was ended by '{reason}'"):
                read_label({**choice, "finish_reason": reason})
        with pytest.raises(ValueError, match="comes with a refusal"):
            read_label({**choice, "message": {"content": "safe", "refusal": "I cannot judge that."}})
        with pytest.raises(ValueError, match="no text"):
            read_label({**choice, "message": {"content": ["safe"]}})


def test_an_error_beside_an_answer_is_an_error(server: Server) -> None:
    status, headers, body = said("safe")
    server.answer = lambda asked, before: (status, headers, {**body, "error": {"message": "overloaded"}})
    with pytest.raises(SoftguardError, match=r"an error: .*overloaded.*nothing was taken as safe"):
        server.guard().prompt_safety(["hello"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed(server: Server, status: int) -> None:
    elsewhere = Server()
    elsewhere.answer = lambda asked, before: said("safe")
    server.answer = lambda asked, before: (status, {"Location": f"{elsewhere.url}/chat/completions"}, {})
    with pytest.raises(SoftguardError, match="nothing was taken as safe"):
        server.guard(retries=0).prompt_safety(["hello"])
    assert elsewhere.requests == []
    elsewhere.close()


def test_a_key_that_no_header_holds_is_told_and_blanks_around_one_are_not_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda asked, before: said("safe")
    monkeypatch.setenv(KEY, "secret\n")
    assert server.guard().prompt_safety(["hello"]) == [1]
    assert server.headers[-1]["authorization"] == "Bearer secret"
    for key in ("sécret", "se\ncret"):
        monkeypatch.setenv(KEY, key)
        with pytest.raises(SoftguardError, match=f"{KEY} holds a character that no header can"):
            server.guard()

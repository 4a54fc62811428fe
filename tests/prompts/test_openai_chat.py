"""A chat model behind a server, against a stub of one."""

import base64
import json
import socket
import threading
import time
from functools import partial
from io import BytesIO

import pytest
from PIL import Image

from tests.prompts.stubs import completion, serving
from wan22.prompts import ChatError, Message, OpenAIChat, extend_prompt

ASKED = [Message("system", "be short"), Message("user", "a fox")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def ask(url, **settings):
    return OpenAIChat(url, "tiny", **settings)(ASKED)


def test_a_request_and_its_answer():
    with serving(completion("Ein Füchslein.")) as (url, requests):
        chat = OpenAIChat(url + "/", "tiny", api_key="sk-1", options={"temperature": 0.5})
        assert chat(ASKED, seed=3) == "Ein Füchslein."
    [(path, headers, body)] = requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-1"
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "a fox"}],
        "seed": 3,
        "temperature": 0.5,
    }


def test_no_key_and_no_seed_are_not_sent():
    with serving(completion("A fox.")) as (url, requests):
        ask(url)
    [(_, headers, body)] = requests
    assert "Authorization" not in headers
    assert set(json.loads(body)) == {"model", "messages"}


def test_images_are_sent_small():
    with serving(completion("A fox.")) as (url, requests):
        images = (Image.new("RGB", (2048, 512), "red"), Image.new("RGB", (30, 40), "blue"))
        OpenAIChat(url, "tiny")([Message("user", "what is it?", images)])
    assert images[0].size == (2048, 512)  # the caller's stays as it is
    first, second, text = json.loads(requests[0][2])["messages"][0]["content"]
    assert text == {"type": "text", "text": "what is it?"}
    for part, size, colour in ((first, (1024, 256), (254, 0, 0)), (second, (30, 40), (0, 0, 254))):
        start, _, data = part["image_url"]["url"].partition(",")
        assert (part["type"], start) == ("image_url", "data:image/jpeg;base64")
        sent = Image.open(BytesIO(base64.b64decode(data)))
        assert sent.size == size
        assert sent.getpixel((5, 5)) == colour


def test_an_extension_end_to_end():
    with serving(completion('<think>hm</think>\n**Prompt:** "A red fox trots."')) as (url, requests):
        assert extend_prompt("a fox", OpenAIChat(url, "tiny"), seed=1) == "A red fox trots."
    messages = json.loads(requests[0][2])["messages"]
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"] == "a fox"


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ChatError, match=rf"nothing listens at http://127.0.0.1:{port}/v1/chat/completions"):
        ask(f"http://127.0.0.1:{port}/v1")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "no such model: tiny"}}', "no such model: tiny"),
        ('{"error": "no such model"}', "no such model"),
        ('{"detail": "not found"}', '\'{"detail": "not found"}\''),
        ("<html>not here</html>", "'<html>not here</html>'"),
        ('["a"]', "'.\"a\".'"),
        ("", "''"),
    ],
)
def test_an_http_error_brings_the_servers_message(body, said):
    with (
        serving(body, status=404) as (url, _),
        pytest.raises(ChatError, match=f"answered 404 Not Found: {said}$"),
    ):
        ask(url)


def test_the_key_goes_nowhere_else():
    with serving(completion("stolen")) as (other, stolen):
        moved = [("Location", f"{other}/chat/completions")]
        with (
            serving("", 302, moved) as (url, _),
            pytest.raises(ChatError, match=rf"302 Found \(moved to {other}"),
        ):
            ask(url, api_key="sk-secret")
    assert stolen == []
    assert "sk-secret" not in repr(OpenAIChat(url, "tiny", api_key="sk-secret"))


@pytest.mark.parametrize("body", ["hello", "", b"\xff\xfe\x00", '{"choices": [{'])
def test_an_answer_that_is_not_json(body):
    with (
        serving(body) as (url, _),
        pytest.raises(ChatError, match="answered with something that is not JSON: '"),
    ):
        ask(url)


@pytest.mark.parametrize(
    "body", ["{}", "[]", "null", "3", '{"choices": []}', '{"choices": [{"text": "a"}]}', '{"choices": ["a"]}']
)
def test_an_answer_of_another_form(body):
    with (
        serving(body) as (url, _),
        pytest.raises(ChatError, match=r"answered without choices.0..message.content: '"),
    ):
        ask(url)


def test_an_answer_without_text():
    with (
        serving(completion(None)) as (url, _),
        pytest.raises(ChatError, match=r"answered without a text: '.*null"),
    ):
        ask(url)


def test_an_answer_that_was_cut_off():
    message = "tiny was cut off before its answer's end: 'A fox and'; options="
    with serving(completion("A fox and", "length")) as (url, _), pytest.raises(ChatError, match=message):
        ask(url)


def test_a_server_that_sleeps():
    message = r"did not answer within 0\.1 s; a larger timeout waits longer"
    woken = threading.Event()
    with serving(respond=lambda _: woken.wait()) as (url, _), pytest.raises(ChatError, match=message):
        ask(url, timeout=0.1)
    woken.set()


def test_a_server_that_falls_asleep():
    """While the body is read, a timeout takes another way through urllib."""
    woken = threading.Event()

    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.wfile.flush()
        woken.wait()

    with serving(respond=half) as (url, _), pytest.raises(ChatError, match=r"did not answer within 0\.1 s"):
        ask(url, timeout=0.1)
    woken.set()


def test_a_server_that_breaks_off():
    def nothing(handler):
        handler.connection.shutdown(socket.SHUT_RDWR)

    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"{")

    for respond in (nothing, half):
        with serving(respond=respond) as (url, _), pytest.raises(ChatError, match="could not be reached: "):
            ask(url)


# ---- servers that misbehave ----


def dripping(handler):
    """Sends a byte of the answer before each silence is over."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def dripping_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(200):
        handler.wfile.write(b"X-%d: a\r\n" % (i % 50))
        time.sleep(0.05)


def endless(handler, status=200):
    """Sends 200 MB, which nobody asked for."""
    handler.send_response(status)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(bytes(10**6))


@pytest.mark.parametrize("respond", [dripping, dripping_headers])
def test_the_timeout_is_for_the_whole_answer(respond):
    start = time.monotonic()
    with serving(respond=respond) as (url, _), pytest.raises(ChatError, match=r"not answer within 0\.3 s"):
        ask(url, timeout=0.3)
    assert time.monotonic() - start < 2


def test_what_is_read_of_an_answer_is_bounded(monkeypatch):
    with serving(respond=endless) as (url, _), pytest.raises(ChatError, match="more than 16777216 bytes"):
        ask(url)
    announced = [("Content-Length", str(10**14))]
    with serving("{}", 200, announced) as (url, _), pytest.raises(ChatError, match="100000000000000 bytes"):
        ask(url)
    with (
        serving(respond=partial(endless, status=500)) as (url, _),
        pytest.raises(ChatError, match="500") as e,
    ):
        ask(url)
    assert len(str(e.value)) < 3000


def test_deep_json_is_refused():
    for status, said in ((200, "something that is not JSON"), (418, "answered 418")):
        with serving("[" * 100_000, status) as (url, _), pytest.raises(ChatError, match=said):
            ask(url)


@pytest.mark.parametrize("status", [401, 200])
def test_a_key_that_comes_back_is_not_told(status):
    said = json.dumps({"error": {"message": "x" * 140 + "Bearer sk-secret-0123456789 is wrong \x1b[31m"}})
    with serving(said, status) as (url, _), pytest.raises(ChatError) as caught:
        ask(url, api_key="sk-secret-0123456789")
    assert "***" in str(caught.value)
    assert "sk-secret" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_plain_http_with_a_key_goes_past_a_proxy(monkeypatch):
    monkeypatch.delenv("no_proxy")
    with serving(completion("seen")) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        assert ask("http://chat.invalid/v1") == "seen"
        with pytest.raises(ChatError, match="could not be reached"):
            ask("http://chat.invalid/v1", api_key="sk-secret")
        with pytest.raises(ChatError, match="nothing listens"):
            ask("http://127.0.0.1:1/v1")
    assert len(seen) == 1


def test_an_answer_has_no_control_characters():
    text = "a\x00\x1b[31mb\x07\tfox\r\nruns\x9b \ud800"
    with serving(completion(text)) as (url, _):
        assert ask(url) == "ab\tfox\nruns ?"


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "http://user:secret@a/v1"}, r"'http://\*\*\*@a/v1' must be .*, without a user's name"),
        ({"base_url": "ftp://user:secret@a/v1"}, r"'ftp://\*\*\*@a/v1' must begin"),
        ({"base_url": "http://a b/v1"}, "without spaces"),
        ({"base_url": "http://a:99999/v1"}, "with a valid host and port"),
        ({"base_url": "http://"}, "with a host on http or https"),
        ({"base_url": "http://a/v1?version=2"}, "must have no query; give 'http://a/v1'"),
        (
            {"base_url": "localhost:1/v1"},
            "base_url='localhost:1/v1' must begin .* give 'http://localhost:1/v1'",
        ),
        ({"base_url": "file:///etc/passwd"}, "must begin with http:// or https://"),
        ({"base_url": "http://a/v1/chat/completions/"}, "must end before the endpoint; give 'http://a/v1'"),
        ({"timeout": 0}, "timeout=0 must be a number, above 0; such as 120"),
        ({"timeout": float("nan")}, "timeout=nan must be"),
        ({"api_key": "sk-secret\n"}, "api_key must be ASCII without spaces or line breaks"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIChat(**{"base_url": "http://a/v1", "model": "tiny", **settings})
    assert "secret" not in str(caught.value)

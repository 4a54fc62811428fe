"""A chat model behind a server, against a stub of one."""

import base64
import json
import socket
import threading
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
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

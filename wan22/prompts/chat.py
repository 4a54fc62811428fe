"""Chat models: any function from messages to text, a model behind a server, a model run by transformers."""

import base64
import http.client
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..checks import check_real, cut, shown
from ..downloads import reaching
from ..web import Answer, check_url, fetch, masked

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of an image's longer side. Chat models see about this much, and servers limit the size of requests.
MAX_SIDE = 1024
# Bytes that are read of an answer: a thousand times a long prompt, its thinking included.
MOST_BYTES = 2**24


class ChatError(RuntimeError):
    """A chat model gave no usable answer; the prompt may still be used as it is."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation; its images, RGB, are shown before the text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: "tuple[Image, ...]" = ()


class ChatModel(Protocol):
    """Anything that answers a conversation: a function, or `OpenAIChat`, or `TransformersChat`."""

    def __call__(self, messages: Sequence[Message], *, seed: int | None = None) -> str:
        """Return the answer to a conversation: one of those possible by seed, the model's choice with None.

        Raises: ChatError: there is no answer.
        """
        ...


@dataclass(frozen=True)
class OpenAIChat:
    """A chat model behind a server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, or a service.

    Args:
        base_url: the server's address without the endpoint, such as "http://localhost:11434/v1".
        model: the server's name of the model.
        api_key: bearer token, sent to this server only; over plain http, not through a proxy, either.
        timeout: seconds in which the whole answer must have come.
        options: further fields of the request, such as {"temperature": 0.7}.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base_url.lower().startswith(("http://", "https://")):
            raise ValueError(
                f"base_url='{masked(self.base_url)}' must begin with http:// or https://; "
                f"give 'http://{masked('//' + self.base_url.rpartition('://')[2])[2:]}', for example"
            )
        check_url("base_url", self.base_url)
        if "?" in self.base_url or "#" in self.base_url:
            nearest = re.split(r"[?#]", self.base_url)[0]
            raise ValueError(f"base_url={shown(self.base_url)} must have no query; give {shown(nearest)}")
        if self.base_url.rstrip("/").endswith("/chat/completions"):
            nearest = self.base_url.rstrip("/").removesuffix("/chat/completions")
            raise ValueError(
                f"base_url={shown(self.base_url)} must end before the endpoint; give {shown(nearest)}"
            )
        if self.api_key is not None and not re.fullmatch(r"[!-~]*", self.api_key):
            raise ValueError(
                "api_key must be ASCII without spaces or line breaks; api_key.strip() may make it so"
            )
        timeout = check_real("timeout", self.timeout, 0, above=True, hint="such as 120")
        object.__setattr__(self, "timeout", timeout)

    def __call__(self, messages: Sequence[Message], *, seed: int | None = None) -> str:
        """Return the model's answer, without control characters but line breaks and tabs.

        Images are sent as JPEG data URLs; the server may ignore the seed.
        Raises: ChatError: no connection, no answer in time, an HTTP error, or an answer of another form.
        """
        request: dict[str, Any] = {"model": self.model, "messages": [_openai_message(m) for m in messages]}
        request |= {} if seed is None else {"seed": seed}
        raw = self._post(json.dumps(request | dict(self.options)).encode())
        try:
            choice = json.loads(raw)["choices"][0]
            answer, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, RecursionError):
            message = f"{self._url} answered with something that is not JSON: {_excerpt(raw)}"
            raise ChatError(message) from None
        except (LookupError, TypeError, AttributeError):
            message = f"{self._url} answered without choices[0].message.content: {_excerpt(raw)}"
            raise ChatError(message) from None
        if not isinstance(answer, str):
            raise ChatError(f"{self._url} answered without a text: {_excerpt(raw)}")
        if reason == "length":
            raise ChatError(
                f"{cut(self.model)} was cut off before its answer's end: {shown(answer[-80:])}; "
                "options={'max_tokens': 1024} lets it write more"
            )
        return plain_text(answer)

    @property
    def _url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        # Over plain http, a proxy would read the key. No redirect is followed: the key is for this server.
        direct = bool(self.api_key) and not self._url.lower().startswith("https")
        limits: dict[str, Any] = {"silence": self.timeout, "total": self.timeout, "most": MOST_BYTES}
        try:
            answer = fetch(self._url, body=body, headers=headers, redirects=0, direct=direct, **limits)
        except TimeoutError as error:
            message = f"{self._url} did not answer within {self.timeout:g} s; a larger timeout waits longer"
            raise ChatError(message) from error
        except ConnectionRefusedError as error:
            message = f"nothing listens at {self._url} (connection refused); is the server up?"
            raise ChatError(message) from error
        except (OSError, http.client.HTTPException) as error:
            message = f"{self._url} could not be reached: {cut(self._without_key(str(error)))}"
            raise ChatError(message) from error
        raw = self._without_key(answer.body.decode("latin-1")).encode("latin-1")
        if not 200 <= answer.status < 300:
            raise ChatError(self._without_key(f"{self._url} answered {_refusal(answer, raw)}"))
        return raw

    def _without_key(self, text: str) -> str:
        """Return a text without the key, which some servers and proxies send back."""
        return text.replace(self.api_key, "***") if self.api_key else text


class TransformersChat:
    """A chat model on this machine, run by transformers.

    Args:
        model: hub name or folder, loaded as a text model; or a loaded model, which may see images.
        tokenizer: tokenizer or, to show images, processor; needed with a loaded model.
        max_new_tokens: limit of the answer, thinking included.
        device: device for a model loaded by name; the GPU by default, if there is one.
        template_options: arguments for the chat template, such as {"enable_thinking": False}.

    Raises:
        ValueError: a loaded model without its tokenizer, or a tokenizer without a chat template.
        FileNotFoundError: neither in the cache nor reached.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_new_tokens: int = 512,
        device: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if not isinstance(model, (str, Path)) and tokenizer is None:
            raise ValueError(f"tokenizer=None must be given where the model is a loaded one ({self.name})")
        if tokenizer is None:
            from huggingface_hub import hf_hub_download
            from transformers import AutoTokenizer

            if not Path(self.name).exists():  # transformers' own message has several lines
                with reaching(self.name):
                    hf_hub_download(self.name, "config.json")
            tokenizer = AutoTokenizer.from_pretrained(self.name)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{self.name} has no chat template; give a chat model, such as one named '…-Instruct'"
            )
        if isinstance(model, (str, Path)):
            from transformers import AutoModelForCausalLM

            from ..devices import card

            loaded: Any = AutoModelForCausalLM.from_pretrained(self.name, dtype="auto")
            model = loaded.to(device or card() or "cpu")
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.template_options = dict(template_options or {})

    def __call__(self, messages: Sequence[Message], *, seed: int | None = None) -> str:
        """Return the model's answer: a random one by seed, or the likeliest one with seed=None.

        Torch's global random state stays as it is.
        Raises: ValueError: images for a model without a processor. ChatError: the answer was cut off.
        """
        import torch

        from ..devices import card, module_of

        inputs = self.tokenizer.apply_chat_template(
            self._conversation(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.template_options,
        ).to(self.model.device)
        sampling: dict[str, Any] = {"do_sample": seed is not None}
        if seed is None:
            # Without these, transformers warns of the checkpoint's own sampling settings.
            sampling |= {"temperature": None, "top_p": None, "top_k": None}
        # manual_seed seeds every device.
        kind = card()
        states = [] if kind is None else range(module_of(kind).device_count())
        with torch.random.fork_rng(states, device_type=(kind or torch.device("cuda")).type), torch.no_grad():
            if seed is not None:
                torch.manual_seed(seed)
            ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **sampling)
        ids = ids[0, inputs["input_ids"].shape[1] :]
        answer = plain_text(self.tokenizer.decode(ids, skip_special_tokens=True))
        if len(ids) >= self.max_new_tokens and int(ids[-1]) not in self._ends():
            raise ChatError(
                f"{self.name} was cut off after {self.max_new_tokens} tokens: {shown(answer[-80:])}; "
                f"max_new_tokens={2 * self.max_new_tokens} lets it write more"
            )
        return answer

    def _conversation(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if hasattr(self.tokenizer, "image_processor"):
            return [{"role": m.role, "content": _parts(m)} for m in messages]
        if any(message.images for message in messages):
            raise ValueError(
                f"{self.name} sees no images; give a model that does, with its processor as tokenizer, "
                "or no image"
            )
        return [{"role": m.role, "content": m.text} for m in messages]

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())


def plain_text(answer: str) -> str:
    """Return an answer without control characters, but with its line breaks and tabs."""
    text = answer.encode("utf-8", "replace").decode()  # lone surrogates are no text
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text.replace("\r\n", "\n"))


def _parts(message: Message) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": image} for image in message.images]
    return [*images, {"type": "text", "text": message.text}]


def _openai_message(message: Message) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": message.text}
    images = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in message.images]
    return {"role": message.role, "content": [*images, {"type": "text", "text": message.text}]}


def _data_url(image: "Image") -> str:
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    file = BytesIO()
    small.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _refusal(answer: Answer, body: bytes) -> str:
    """Return an error's code, where it leads, and what the server says of it in its body."""
    target = answer.headers.get("location")
    moved = "" if target is None else f" (moved to {masked(target)})"
    return f"{answer.status} {cut(answer.reason)}{moved}: {_server_message(body)}"


def _server_message(body: bytes) -> str:
    """Return OpenAI's error.message if there is one, otherwise the start of the body."""
    try:
        error = json.loads(body)["error"]
        return cut(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return _excerpt(body)


def _excerpt(body: bytes) -> str:
    return repr(body[:1200].decode(errors="replace")[:300])

"""The SDKs that the transports are tried with, behind one set of functions; and HTTP clients without any."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anthropic
import groq
import httpx
import httpx2
import openai

MESSAGES = [{"role": "user", "content": "Define alpha."}]


@dataclass(frozen=True)
class Sdk:
    """An SDK: its clients, how it asks, and what of an answer tells it apart."""

    name: str
    library: Any
    module: Any
    kinds: tuple[type, type]
    base: str
    ask: Callable[..., Any]
    text: Callable[[Any], str]
    # Of one event of a stream; empty if it carries none.
    word: Callable[[Any], str]

    def client(self, provider: Any, transport: Any, *, key: str = "a key", **options: Any) -> Any:
        """Return a client of threads that sends through a transport."""
        http_client = self.library.Client(transport=transport)
        return self.kinds[0](**self._options(provider, http_client, key, options))

    def async_client(self, provider: Any, transport: Any, *, key: str = "a key", **options: Any) -> Any:
        """Return a client of tasks that sends through a transport."""
        http_client = self.library.AsyncClient(transport=transport)
        return self.kinds[1](**self._options(provider, http_client, key, options))

    def _options(self, provider, http_client, key, options):
        own = {"api_key": key, "base_url": provider.root + self.base, "http_client": http_client, "max_retries": 0}
        return own | options


def _chat(client, **options):
    return client.chat.completions.create(model="small", messages=MESSAGES, **options)


def _message(client, **options):
    return client.messages.create(model="small", messages=MESSAGES, max_tokens=50, **options)


def _chat_text(answer):
    return answer.choices[0].message.content


def _chat_word(event):
    return event.choices[0].delta.content or ""


def _message_word(event):
    return event.delta.text if event.type == "content_block_delta" else ""


OPENAI = Sdk("openai", httpx2, openai, (openai.OpenAI, openai.AsyncOpenAI), "/v1", _chat, _chat_text, _chat_word)
ANTHROPIC = Sdk(
    "anthropic",
    httpx2,
    anthropic,
    (anthropic.Anthropic, anthropic.AsyncAnthropic),
    "",
    _message,
    lambda answer: answer.content[0].text,
    _message_word,
)
GROQ = Sdk("groq", httpx, groq, (groq.Groq, groq.AsyncGroq), "", _chat, _chat_text, _chat_word)
SDKS = [OPENAI, ANTHROPIC, GROQ]
LIBRARIES = [httpx2, httpx]


def warm(provider):
    """Use each SDK once. On free-threaded builds the first use from several threads at once fails inside pydantic."""
    for sdk in SDKS:
        with contextlib.closing(sdk.client(provider, sdk.library.HTTPTransport())) as client:
            sdk.ask(client)
            with sdk.ask(client, stream=True) as stream:
                assert list(stream)
    provider.reset()

"""The stand-in for a model provider: ``POST /v1/chat/completions`` answered from the glossary, whole or streamed.

``python -m llm_batch_coalesce._demo.provider`` serves it on a free port of the loopback interface, prints the port, and
ends when its standard input does, so it never outlives the demo, however that ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import socket
import sys
import threading
import time
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_batch_coalesce._demo.glossary import load_glossary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

_CHARACTERS_PER_TOKEN: Final = 4  # what English text comes to with the usual tokenizers
_TOKENS_PER_LATENCY: Final = 10  # a stream writes so many in the time that it takes to begin
_KEEP_ALIVE_SECONDS: Final = 75  # longer than clients keep an idle connection, so that no request meets a closing one
_BACKLOG: Final = 1024


@dataclass(slots=True)
class _Books:
    """What the provider would bill for. Touched by the event loop's thread only."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What a request asks for."""

    model: str
    text: str
    """All the text of its messages."""
    question: str
    """The last message."""
    streams: bool
    tells_usage: bool
    """Whether a stream ends with the tokens that it took."""


def make_app(*, latency_seconds: float, price: float) -> Starlette:
    """Return the provider as an ASGI application.

    Args:
        latency_seconds: How long every completion takes, or a stream before it begins.
        price: US dollars for 1,000 tokens.
    """
    glossary = load_glossary()
    books = _Books()
    numbers = count(1)

    async def complete(request: Request) -> Response:
        books.calls += 1
        try:
            prompt = _read_prompt(await request.body())
        except (ValueError, RecursionError) as error:
            return _refusal(400, str(error))
        answer = glossary.get(prompt.question)
        if answer is None:
            return _refusal(400, f"the glossary has no entry for {prompt.question!r}")
        books.prompt_tokens += _tokens(prompt.text)
        completion = {"id": f"chatcmpl-{next(numbers)}", "created": int(time.time()), "model": prompt.model}
        if prompt.streams:
            events = _write(prompt, answer, completion, books, latency_seconds)
            return StreamingResponse(events, media_type="text/event-stream")
        books.completion_tokens += _tokens(answer)
        await asyncio.sleep(latency_seconds)
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        completion |= {"object": "chat.completion", "choices": [choice], "usage": _usage(prompt.text, answer)}
        return JSONResponse(completion)

    async def stats(_: Request) -> JSONResponse:
        tokens = books.prompt_tokens + books.completion_tokens
        return JSONResponse({"calls": books.calls, "tokens": tokens, "cost": tokens / 1000 * price})

    async def reset(_: Request) -> JSONResponse:
        books.calls = books.prompt_tokens = books.completion_tokens = 0
        return JSONResponse({})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/stats", stats, methods=["GET"]),
            Route("/stats/reset", reset, methods=["POST"]),
        ],
    )


def _read_prompt(body: bytes) -> _Prompt:
    """Read the body of a chat completion request."""
    try:
        request = json.loads(body)
        texts = [message["content"] for message in request["messages"]]
        return _Prompt(
            model=str(request["model"]),
            text="\n".join(texts),
            question=texts[-1],
            streams=request.get("stream") is True,
            tells_usage=(request.get("stream_options") or {}).get("include_usage") is True,
        )
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        message = "the request needs a model and a list of messages whose content is text"
        raise ValueError(message) from error


def _tokens(text: str) -> int:
    return math.ceil(len(text) / _CHARACTERS_PER_TOKEN)


async def _write(
    prompt: _Prompt, answer: str, completion: dict[str, Any], books: _Books, latency_seconds: float
) -> AsyncIterator[str]:
    """Write the answer token by token, and bill what was written before the client left."""

    def event(choices: list[dict[str, Any]], **more: object) -> str:
        chunk = completion | {"object": "chat.completion.chunk", "choices": choices} | more
        return f"data: {json.dumps(chunk)}\n\n"

    await asyncio.sleep(latency_seconds)
    for start in range(0, len(answer), _CHARACTERS_PER_TOKEN):
        delta = {"role": "assistant", "content": answer[start : start + _CHARACTERS_PER_TOKEN]}
        books.completion_tokens += 1
        yield event([{"index": 0, "delta": delta, "finish_reason": None}])
        await asyncio.sleep(latency_seconds / _TOKENS_PER_LATENCY)
    yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if prompt.tells_usage:
        yield event([], usage=_usage(prompt.text, answer))
    yield "data: [DONE]\n\n"


def _usage(prompt: str, answer: str) -> dict[str, int]:
    asked, answered = _tokens(prompt), _tokens(answer)
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)


def _serve(app: Starlette) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="critical",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
        ),
    )

    def leave_with_the_demo() -> None:
        sys.stdin.read()
        server.should_exit = True

    # asyncio turns Nagle's algorithm off (40 ms an answer) for sockets that say that they are TCP, and for no others.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        # From here on the kernel queues connections, so the port may be told before the server accepts any.
        listener.listen(_BACKLOG)
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        threading.Thread(target=leave_with_the_demo, daemon=True).start()
        server.run(sockets=[listener])


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--latency", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--price", type=float, required=True, metavar="USD")
    arguments = parser.parse_args()
    _serve(make_app(latency_seconds=arguments.latency, price=arguments.price))


if __name__ == "__main__":
    main()

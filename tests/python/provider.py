"""A stand-in for providers over real HTTP on loopback: it counts, and holds its answers until a test lets them go."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from loops import PATIENCE, wait_until

TEXT = "what alpha means"


@dataclass
class Seen:
    """A request as it has arrived, and what has become of it."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    # Set when it is in the provider's hands, and when its client has gone before the answer's end.
    disconnected: threading.Event = field(default_factory=threading.Event)

    @property
    def asked(self) -> Any:
        return json.loads(self.body or b"null")


@dataclass
class Answer:
    """What to send, in parts; `HOLD` among them waits for the test."""

    parts: list[Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


HOLD = object()
BREAK = object()  # ends the connection in mid-answer


class Gate:
    """Lets what waits for it, in threads and on event loops, go on once it is opened from any thread."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def open(self) -> None:
        with self._lock:
            self._open.set()
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(lambda future=future: future.done() or future.set_result(None))

    def wait(self, seconds: float) -> bool:
        return self._open.wait(seconds)

    async def passed(self) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            if self._open.is_set():
                return
            self._waiting.append((loop, future))
        await future


class Provider:
    """Answers like OpenAI's and Anthropic's APIs, unless `script` says otherwise."""

    def __init__(self, root: str) -> None:
        self._root, self._turn = root, 0
        self.reset()

    def reset(self) -> None:
        """Forget what was seen. Until the test says so, heads are not held, and `HOLD` holds."""
        # What an earlier test has left on its way does not count as seen.
        self._turn += 1
        self._prefix = f"/turn{self._turn}"
        self.root = self._root + self._prefix
        self.seen: list[Seen] = []
        self.script: Callable[[Seen], Answer] = sdk_answer
        self._head, self._body = Gate(), Gate()
        self._head.open()

    def hold(self) -> None:
        """Hold all answers, from their heads on, until `release` or `release_heads`."""
        self._head = Gate()

    def release_heads(self) -> None:
        """Let answers begin; `HOLD` holds."""
        self._head.open()

    def release(self) -> None:
        """Let all answers go, from any thread."""
        self._head.open()
        self._body.open()

    def wait_for(self, count: int) -> Seen:
        """Return the last of so many requests when it is here."""
        wait_until(lambda: len(self.seen) >= count)
        return self.seen[count - 1]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serve a request, as ASGI wants it."""
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if not scope["path"].startswith(self._prefix + "/"):
            return
        path = scope["path"].removeprefix(self._prefix)
        seen = Seen(len(self.seen) + 1, scope["method"], path, headers, body)
        self.seen.append(seen)
        serving = asyncio.ensure_future(self._answer(seen, send))
        leaving = asyncio.ensure_future(self._left(receive))
        await asyncio.wait([serving, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            seen.disconnected.set()
            serving.cancel()
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    async def _answer(self, seen: Seen, send: Any) -> None:
        await self._head.passed()
        answer = self.script(seen)
        headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        for part in answer.parts:
            if part is HOLD:
                await self._body.passed()
            elif part is BREAK:
                raise ConnectionError("the provider breaks down")
            else:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _left(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def sdk_answer(seen: Seen, *, hold: bool = False, gzipped: bool = False) -> Answer:
    """Answer a chat request, as a stream if it asks for one; the upstream request's number is in it."""
    anthropic = seen.path.endswith("/messages")
    events = anthropic_events(seen) if anthropic else openai_events(seen)
    if seen.asked.get("stream"):
        parts = [event.encode() for event in events]
        if hold:
            parts.insert(len(parts) // 2, HOLD)
        headers = {"content-type": "text/event-stream"}
    else:
        parts = [json.dumps(anthropic_message(seen) if anthropic else openai_completion(seen)).encode()]
        headers = {"content-type": "application/json"}
    if gzipped:
        parts = [gzip.compress(b"".join(parts))]
        headers["content-encoding"] = "gzip"
    return Answer(parts, headers=headers | {"x-request-id": f"request {seen.number}"})


def openai_completion(seen: Seen) -> dict[str, Any]:
    message = {"role": "assistant", "content": TEXT}
    return {
        "id": f"answer {seen.number}",
        "object": "chat.completion",
        "created": 1,
        "model": "small",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
    }


def openai_events(seen: Seen) -> list[str]:
    events = []
    for word in ["what", " alpha", " means"]:
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
        chunk = {"id": f"answer {seen.number}", "object": "chat.completion.chunk", "created": 1, "model": "small"}
        events.append(f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n")
    return [*events, "data: [DONE]\n\n"]


def anthropic_message(seen: Seen, text: str = TEXT) -> dict[str, Any]:
    return {
        "id": f"answer {seen.number}",
        "type": "message",
        "role": "assistant",
        "model": "small",
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 3},
    }


def anthropic_events(seen: Seen) -> list[str]:
    start = {"type": "message_start", "message": anthropic_message(seen, "")}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    words = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
        for word in ["what", " alpha", " means"]
    ]
    stop = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}
    ends = [{"type": "content_block_stop", "index": 0}, stop, {"type": "message_stop"}]
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in [start, block, *words, *ends]]


@contextlib.contextmanager
def running_provider() -> Iterator[Provider]:
    """Serve on a free port of the loopback interface, in a thread, until the block is left."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        provider = Provider(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            provider,
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level=100,
            access_log=False,
            timeout_graceful_shutdown=0,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="provider")
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield provider
        finally:
            server.should_exit = server.force_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the provider hangs"

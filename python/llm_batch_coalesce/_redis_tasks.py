"""The driver for tasks: does the steps of flights on a Redis or Valkey server, on one event loop.

One task reads the process's inbox, and, while it leads, one renews all its leases. Both end when the coalescer is closed
or collected.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._errors import BackendError
from llm_batch_coalesce._fleet_flight import (
    Ask,
    Await,
    BackendTroubleError,
    Call,
    Lease,
    Message,
    Read,
    Watch,
    parse_message,
)
from llm_batch_coalesce._redis_common import TROUBLE, WRONG, check_server, described, sha_of
from llm_batch_coalesce._reports import in_coalescer, logger
from llm_batch_coalesce._store import checked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from llm_batch_coalesce._fleet_flight import Step
    from llm_batch_coalesce._fleet_options import Fleet

_LOOK = 1.0
_LONGEST_PAUSE = 1.0


def own_client(client: Any, fleet: Fleet) -> Any:  # noqa: ANN401 - a client of redis-py
    """Make a client of the same server that gives up in time and returns bytes. Those of clusters and Sentinels stay."""
    pool: Any = getattr(client, "connection_pool", None)
    if type(pool) not in (redis.asyncio.ConnectionPool, redis.asyncio.BlockingConnectionPool):
        return client
    options = dict(pool.connection_kwargs)
    options.update(
        decode_responses=False,
        socket_connect_timeout=fleet.backend_timeout,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )
    # A command's own limit is set around it; the inbox waits as long as it likes.
    options.pop("socket_timeout", None)
    pool = redis.asyncio.ConnectionPool(connection_class=pool.connection_class, **options)
    return redis.asyncio.Redis(connection_pool=pool)


class Server:
    """One process's connections to the server, on one event loop."""

    def __init__(self, client: Any, fleet: Fleet, forget: Callable[[str | None], None]) -> None:  # noqa: ANN401
        self.loop = asyncio.get_running_loop()
        self._client = own_client(client, fleet)
        self._is_own = self._client is not client
        self._fleet = fleet
        self._forget = forget
        self._boxes: dict[str, list[asyncio.Queue[Message | None]]] = {}
        self._leases: dict[str, Lease] = {}
        self._lead = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._closed = False
        self._checked = False
        self._inbox: asyncio.Task[None] | None = None
        self._renewer: asyncio.Task[None] | None = None
        self._last_words: set[asyncio.Task[Any]] = set()

    async def run(self, steps: Any, fn: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as for threads
        """Do the steps of a flight."""
        answer: Any = None
        error: BaseException | None = None
        async with contextlib.AsyncExitStack() as boxes:
            box: Any = None
            while True:
                try:
                    step = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as stop:
                    return stop.value
                if isinstance(error, asyncio.CancelledError) and isinstance(step, Ask):
                    # The call was cancelled, and those who wait elsewhere are told; the cancelled task waits for nothing.
                    self._tell_later(step)
                    raise error
                answer = error = None
                if isinstance(step, Watch):
                    box = await boxes.enter_async_context(self._box(step.digest))
                    continue
                try:
                    answer = await self._do(step, box, fn)
                except BaseException as raised:  # noqa: BLE001 - it goes into the flight
                    error = raised

    async def _do(self, step: Step, box: Any, fn: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as above
        match step:
            case Ask():
                return await self.ask(step)
            case Read():
                return await self._guarded(self._client.get, step.key)
            case Await():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(step.seconds):
                        return await box.get()
                return None
            case Call(lease) if lease.token:
                self._leases[lease.token] = lease
                self._lead.set()
                if self._renewer is None:
                    self._renewer = asyncio.create_task(self._renew(), name="coalesce-leases")
                try:
                    return await checked(fn())
                finally:
                    del self._leases[lease.token]
            case _:
                return await checked(fn())

    def _tell_later(self, step: Ask) -> None:
        async def tell() -> None:
            with contextlib.suppress(BackendTroubleError):
                await self.ask(step)

        task = asyncio.create_task(tell())
        self._last_words.add(task)
        task.add_done_callback(self._last_words.discard)

    @contextlib.asynccontextmanager
    async def _box(self, digest: str) -> AsyncGenerator[asyncio.Queue[Message | None]]:
        box: asyncio.Queue[Message | None] = asyncio.Queue()
        self._boxes.setdefault(digest, []).append(box)
        try:
            yield box
        finally:
            boxes = self._boxes[digest]
            boxes.remove(box)
            if not boxes:
                del self._boxes[digest]

    async def ask(self, step: Ask) -> Any:  # noqa: ANN401 - what the script returns
        """Run a script; the first one opens the connections."""
        await self._begin()
        try:
            return await self._guarded(
                self._client.evalsha, sha_of(step.script), len(step.keys), *step.keys, *step.args
            )
        except NoScriptError:
            return await self._guarded(self._client.eval, step.script, len(step.keys), *step.keys, *step.args)

    async def read(self, key: str) -> Any:  # noqa: ANN401 - bytes or None
        """Read a string."""
        await self._begin()
        return await self._guarded(self._client.get, key)

    async def _guarded(self, command: Callable[..., Awaitable[Any]], *args: Any) -> Any:  # noqa: ANN401 - any command
        try:
            async with asyncio.timeout(self._fleet.backend_timeout):
                return await command(*args)
        except NoScriptError:
            raise
        except (*TROUBLE, TimeoutError) as error:
            if isinstance(error, WRONG) and not self._checked:
                raise BackendError(f"the server refuses the client: {described(error)}") from error
            raise BackendTroubleError(described(error)) from error

    async def _begin(self) -> None:
        if self._closed:
            raise RuntimeError("the coalescer is closed")
        if not self._checked:
            info: dict[str, Any] = {}
            with contextlib.suppress(NoPermissionError):
                info = await self._guarded(self._client.info)
            check_server(info)
            self._checked = True
        if self._inbox is None:
            self._inbox = asyncio.create_task(self._listen(), name="coalesce-inbox")
        if not self._subscribed.is_set():
            try:
                async with asyncio.timeout(self._fleet.backend_timeout):
                    await self._subscribed.wait()
            except TimeoutError:
                raise BackendTroubleError("the server did not confirm the subscription in time") from None

    async def _listen(self) -> None:
        pause, lost = 0.05, False
        while True:
            try:
                async with self._client.pubsub() as inbox:
                    await inbox.subscribe(self._fleet.inbox, self._fleet.names.everybody())
                    missing = 2
                    while True:
                        message = await inbox.get_message(timeout=_LOOK)
                        if message is None:
                            continue
                        if message["type"] == "subscribe":
                            missing -= 1
                            if missing == 0:
                                if lost:
                                    # What was said meanwhile.
                                    self._forget(None)
                                lost = True
                                self._subscribed.set()
                                self._wake_all()
                                pause = 0.05
                        elif message["type"] == "message":
                            self._receive(message["data"])
            except TROUBLE as error:
                logger.debug("the inbox%s was lost: %s", in_coalescer(self._fleet.name), described(error))
            except Exception:
                logger.exception("the inbox%s failed", in_coalescer(self._fleet.name))
            self._subscribed.clear()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _receive(self, content: object) -> None:
        received = parse_message(content)
        if received is None:
            return
        digest, message = received
        if message is None:
            self._forget(digest)
            return
        for box in self._boxes.get(digest, ()):
            box.put_nowait(message)

    def _wake_all(self) -> None:
        for boxes in self._boxes.values():
            for box in boxes:
                box.put_nowait(None)

    async def _renew(self) -> None:
        fleet = self._fleet
        while True:
            await self._lead.wait()
            await asyncio.sleep(fleet.lease_seconds / 3)
            leases = list(self._leases.values())
            if not leases:
                self._lead.clear()
            for lease in leases:
                keys = [fleet.names.flight(lease.digest), fleet.names.forgotten(lease.digest, lease.token)]
                try:
                    await self.ask(Ask(scripts.RENEW, keys, [lease.token, fleet.lease_ms]))
                except BackendTroubleError as trouble:
                    fleet.note_trouble(trouble)
                    break

    def stop(self) -> None:
        """Have the tasks end; from any thread."""
        self._closed = True
        tasks = [task for task in (self._inbox, self._renewer) if task is not None]
        with contextlib.suppress(RuntimeError):
            for task in tasks:
                self.loop.call_soon_threadsafe(task.cancel)

    async def close(self) -> None:
        """End the tasks and the connections."""
        self._closed = True
        tasks = [task for task in (self._inbox, self._renewer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._last_words, return_exceptions=True)
        if self._is_own:
            with contextlib.suppress(*TROUBLE):
                await self._client.aclose()

"""The driver for tasks: does the steps of flights on a Redis or Valkey server, on one event loop.

One task reads the process's inbox, and, while it leads, one renews all its leases. Both end when the coalescer is
closed or collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import redis.asyncio
from redis.exceptions import NoPermissionError, NoScriptError

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._errors import BackendError
from llm_batch_coalesce._fleet_flight import (
    Ask,
    Await,
    BackendTroubleError,
    Call,
    Doubt,
    Lease,
    Message,
    parse_message,
    renewal,
    settlement,
)
from llm_batch_coalesce._redis_clients import other_primary, own_async_client, own_async_client_of_node
from llm_batch_coalesce._redis_common import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LOOK,
    TROUBLE,
    Subscription,
    check_server,
    described,
    packed,
    second_answer,
    sha_of,
    told,
    was_cut,
    was_demoted,
)
from llm_batch_coalesce._redis_connections import most_commands
from llm_batch_coalesce._reports import in_coalescer, logger
from llm_batch_coalesce._store import checked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from llm_batch_coalesce._fleet_flight import Step
    from llm_batch_coalesce._fleet_options import Fleet


def _cancellations() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


class Server:
    """One process's connections to the server, on one event loop."""

    def __init__(self, client: Any, fleet: Fleet, forget: Callable[[str | None], None]) -> None:  # noqa: ANN401
        self.loop = asyncio.get_running_loop()
        self._client = own_async_client(client, fleet.backend_timeout)
        self._is_own = self._client is not client
        self._is_cluster = isinstance(client, redis.asyncio.RedisCluster)
        self._fleet = fleet
        self._forget = forget
        self._boxes: dict[str, list[asyncio.Queue[Message | None]]] = {}
        self._leases: dict[str, Lease] = {}
        # Until when they matter.
        self._doubts: dict[Doubt, float] = {}
        self._lead = asyncio.Event()
        self._turns = asyncio.Semaphore(most_commands(self._client, shared=not self._is_own))
        self._closed = self._met = False
        self._check: asyncio.Task[None] | None = None
        self._inbox: asyncio.Task[None] | None = None
        self._inbox_node: Any = None  # of a cluster
        self._renewer: asyncio.Task[None] | None = None
        self._last_words: set[asyncio.Task[Any]] = set()
        # The subscription: whether it is there, or could not be made, which is told in turn. `_wanted`: try now.
        # `_deaf`: what is retained may have been forgotten elsewhere.
        self._subscribed = self._deaf = False
        self._told: asyncio.Future[BaseException | None] = self.loop.create_future()
        self._wanted = asyncio.Event()

    async def run(self, digest: str, steps: Any, fn: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as for threads
        """Do the steps of a flight."""
        answer: Any = None
        error: BaseException | None = None
        # From before the first claim, so that no message is missed.
        with self._box(digest) as box:
            while True:
                try:
                    step = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as stop:
                    return stop.value
                if isinstance(error, asyncio.CancelledError) and isinstance(step, Ask):
                    # The call was cancelled. Those who wait elsewhere are told; the cancelled task waits for nothing.
                    self._tell_later(step)
                    raise error
                answer = error = None
                cancelled = _cancellations()
                try:
                    answer = await self._do(step, box, fn)
                except BaseException as raised:  # noqa: BLE001 - it goes into the flight
                    error = raised
                if isinstance(step, Ask) and error is None and _cancellations() > cancelled:
                    # Swallowed: `asyncio.wait_for`, which users' clients may use, does that before Python 3.12.
                    error = asyncio.CancelledError()

    async def _do(self, step: Step, box: Any, fn: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as above
        match step:
            case Ask():
                return await self.ask(step)
            case Await():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(step.seconds):
                        return await box.get()
                return None
            case Call(lease) if lease.token:
                self._leases[lease.token] = lease
                self._renew_from_now()
                try:
                    return await checked(fn())
                finally:
                    del self._leases[lease.token]
            case Doubt():
                self._doubts[step] = time.monotonic() + self._fleet.lease_seconds
                self._renew_from_now()
                return None
            case _:
                return await checked(fn())

    def _tell_later(self, step: Ask) -> None:
        async def tell() -> None:
            try:
                await self.ask(step)
            except (BackendError, BackendTroubleError) as trouble:
                self._fleet.note_trouble(trouble)

        task = asyncio.create_task(tell())
        self._last_words.add(task)
        task.add_done_callback(self._last_words.discard)

    @contextlib.contextmanager
    def _box(self, digest: str) -> Generator[asyncio.Queue[Message | None]]:
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
        if step.script is scripts.CLAIM:
            # Who may have to wait needs the inbox. What is said of calls under way is said after `close`, too.
            try:
                await self._begin()
            except BackendTroubleError:
                self._deaf = True
                raise
        try:
            answer = await self._evaluate(step)
        except BackendTroubleError as trouble:
            if not was_cut(trouble.__cause__):
                raise
            answer = second_answer(step, await self._evaluate(step))
        self._met = True
        if self._closed and self._is_own:
            await self._client.connection_pool.disconnect(inuse_connections=False)
        return answer

    async def _evaluate(self, step: Ask) -> Any:  # noqa: ANN401 - as above
        words = (len(step.keys), *step.keys, *step.args)
        try:
            return await self._command("EVALSHA", sha_of(step.script), *words, key=step.keys[0])
        except NoScriptError:
            return await self._command("EVAL", step.script, *words, key=step.keys[0])

    async def _command(self, *words: Any, key: str) -> Any:  # noqa: ANN401 - any command
        await self._checked()

        async def command() -> Any:  # noqa: ANN401 - its answer
            if not self._is_cluster:
                return await self._send(*words)
            await self._client.initialize()
            # A cluster's client does not try again if it is told whom to ask: the first try may have been heard.
            return await self._client.execute_command(*words, target_nodes=self._client.get_node_from_key(key))

        return await self._in_time(command)

    async def _send(self, *words: Any) -> Any:  # noqa: ANN401 - any command of one server, and its answer
        if not self._is_own:
            return await self._client.execute_command(*words)
        pool = self._client.connection_pool
        connection = await pool.get_connection()
        try:
            writer = getattr(connection, "_writer", None)
            if writer is not None and writer.transport.is_closing():
                # To write to it may have the loop take the next connection, of the same number, for one that it watches
                # already: https://github.com/python/cpython/issues/136234, mended in 3.13.10 and 3.14.1.
                await connection.disconnect(nowait=True)
            await connection.send_packed_command([packed(words)], check_health=False)
            return await self._client.parse_response(connection, words[0])
        finally:
            await pool.release(connection)

    async def _in_time(self, command: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - the command's answer
        try:
            async with asyncio.timeout(self._fleet.backend_timeout), self._turns:
                return await command()
        except NoScriptError:
            raise
        except Exception as error:
            # Whatever it is: a transport that is closed, too, says what it likes.
            if self._is_own and (was_cut(error) or was_demoted(error)):
                # The others are no better.
                with contextlib.suppress(*TROUBLE):
                    await self._client.connection_pool.disconnect(inuse_connections=False)
            raise told(error, first=not self._met) from error

    async def _checked(self) -> None:
        """Look at the server; all that come meanwhile wait for one answer."""
        if self._check is None or (self._check.done() and (self._check.cancelled() or self._check.exception())):
            self._check = asyncio.create_task(self._check_server())
            self._check.add_done_callback(lambda check: check.cancelled() or check.exception())
        check = self._check
        if not check.done():
            # Not by `shield`: when it is cancelled by `close`, these callers are not.
            await asyncio.wait([check])
        if check.cancelled():
            raise BackendTroubleError("the coalescer was closed meanwhile")
        check.result()

    async def _check_server(self) -> None:
        info: Any = None
        try:
            info = await self._in_time(lambda: self._send("INFO"))
        except BackendError as error:
            # Who may not ask that may do everything else.
            if not isinstance(error.__cause__, NoPermissionError):
                raise
        check_server(info)

    async def _begin(self) -> None:
        """Wait for the inbox; the first one starts it."""
        if self._closed:
            raise RuntimeError("the coalescer is closed")
        if self._subscribed:
            return
        await self._checked()
        if self._inbox is None:
            self._inbox = asyncio.create_task(self._listen(), name="coalesce-inbox")
        self._wanted.set()
        done, _ = await asyncio.wait([self._told], timeout=self._fleet.backend_timeout)
        if self._subscribed:
            return
        failure = self._told_by(done)
        if failure is None:
            raise BackendTroubleError("the server did not confirm the subscription in time")
        raise told(failure, first=not self._met) from failure

    # The subscriber.

    async def _listen(self) -> None:
        pause = FIRST_PAUSE
        while not self._is_over():
            try:
                await self._read_inbox()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                if not isinstance(error, TROUBLE):
                    logger.exception("the inbox%s failed", in_coalescer(self._fleet.name))
                logger.debug("the inbox%s was lost: %s", in_coalescer(self._fleet.name), described(error))
                if self._subscribed:
                    pause = FIRST_PAUSE
                else:
                    self._tell(error)
                self._subscribed = False
            if self._is_over():
                return
            await asyncio.sleep(FIRST_PAUSE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wanted.wait()
            self._wanted.clear()
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _read_inbox(self) -> None:
        """Subscribe, and take what comes, until the connection is lost."""
        timeout = self._fleet.backend_timeout
        async with contextlib.AsyncExitStack() as opened:
            async with asyncio.timeout(timeout):
                inbox = await opened.enter_async_context((await self._inbox_client(opened)).pubsub())
                subscription = Subscription((self._fleet.inbox, self._fleet.names.everybody()), timeout)
                await inbox.subscribe(*subscription.channels)
            while not self._is_over():
                message = await inbox.get_message(timeout=min(LOOK, timeout))
                if message is None:
                    if subscription.must_ping():
                        async with asyncio.timeout(timeout):
                            await inbox.ping()
                elif subscription.take(message):
                    self._resume()
                elif message["type"] == "message":
                    self._receive(message["data"])

    def _is_over(self) -> bool:
        """Tell whether this task is to end. The client library may drop a cancellation when it reconnects."""
        task = asyncio.current_task()
        return self._closed or (task is not None and task.cancelling() > 0)

    async def _inbox_client(self, opened: contextlib.AsyncExitStack) -> Any:  # noqa: ANN401 - a client of redis-py
        # A pool of its own: what is cut here is not to be taken for commands.
        if not self._is_cluster:
            own = own_async_client(self._client, self._fleet.backend_timeout)
            return own if own is self._client else await opened.enter_async_context(contextlib.aclosing(own))
        # Every node of a cluster has every message; another one is tried when this one is lost.
        await self._client.initialize()
        self._inbox_node = other_primary(self._client, self._inbox_node)
        own = own_async_client_of_node(self._inbox_node, self._fleet.backend_timeout)
        return await opened.enter_async_context(contextlib.aclosing(own))

    def _resume(self) -> None:
        if self._deaf:
            self._forget(None)
        self._deaf = self._subscribed = True
        self._tell(None)
        self._wake_all()

    def _tell(self, failure: BaseException | None) -> None:
        """Tell those who wait for the subscription what has become of it."""
        told, self._told = self._told, self.loop.create_future()
        told.set_result(failure)

    @staticmethod
    def _told_by(done: set[asyncio.Future[BaseException | None]]) -> BaseException | None:
        return next((told.result() for told in done), None)

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

    # The leases.

    def _renew_from_now(self) -> None:
        self._lead.set()
        if self._renewer is None and not self._closed:
            self._renewer = asyncio.create_task(self._renew(), name="coalesce-leases")

    async def _renew(self) -> None:
        slow: set[str] = set()
        while not self._is_over():
            await self._lead.wait()
            await asyncio.sleep(self._fleet.lease_seconds / 3)
            self._lead.clear()
            leases = list(self._leases.values())
            slow = await self._renew_all(leases, slow)
            await self._settle()
            if leases or self._doubts:
                self._lead.set()

    async def _settle(self) -> None:
        """Give up what claims that were not answered may have got."""
        for doubt, until in self._doubts.copy().items():
            if time.monotonic() < until:
                try:
                    await self.ask(settlement(self._fleet, doubt, waits=doubt.lease.digest in self._boxes))
                except (BackendError, BackendTroubleError):
                    return
            self._doubts.pop(doubt, None)

    async def _renew_all(self, leases: list[Lease], slow: set[str]) -> set[str]:
        """Renew leases, last those of nodes that were slow the last time; return which nodes are slow now."""
        placed = [(self._node_of(lease), lease) for lease in leases]
        placed.sort(key=lambda pair: pair[0] in slow)
        slow = set()
        for node, lease in placed:
            if node in slow:
                continue
            try:
                await self.ask(renewal(self._fleet, lease))
            except (BackendError, BackendTroubleError) as trouble:
                self._fleet.note_trouble(trouble)
                slow.add(node)
        return slow

    def _node_of(self, lease: Lease) -> str:
        if self._is_cluster:
            with contextlib.suppress(*TROUBLE):
                return str(self._client.get_node_from_key(self._fleet.names.flight(lease.digest)).name)
        return ""

    def stop(self) -> None:
        """Have the tasks and connections end; from any thread."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._close_later)

    def _close_later(self) -> None:
        task = self.loop.create_task(self.close())
        self._last_words.add(task)
        task.add_done_callback(self._last_words.discard)

    async def close(self) -> None:
        """End the tasks and the connections."""
        self._closed = True
        tasks = [task for task in (self._inbox, self._renewer, self._check) if task is not None]
        for task in tasks:
            task.cancel()
        self._wake_all()
        self._tell(None)
        last_words = self._last_words - {asyncio.current_task()}
        try:
            await asyncio.gather(*tasks, *last_words, return_exceptions=True)
        finally:
            if self._is_own:
                with contextlib.suppress(*TROUBLE):
                    # Those that are in use have something to say of calls under way, and end after that.
                    await self._client.connection_pool.disconnect(inuse_connections=False)

"""The driver for threads: does the steps of flights on a Redis or Valkey server.

Each process has one subscriber thread, which reads its inbox, and, while it leads, one thread that renews all its leases.
Both know the coalescer only through what they are given here, so an abandoned coalescer is collected, and ends them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

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

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_batch_coalesce._fleet_flight import Step
    from llm_batch_coalesce._fleet_options import Fleet

# How long the subscriber waits for a message before it looks whether it is still wanted, in seconds.
_LOOK = 1.0
_LONGEST_PAUSE = 1.0


def own_client(client: Any, fleet: Fleet) -> Any:  # noqa: ANN401 - a client of redis-py
    """Make a client of the same server that gives up in time and returns bytes. Those of clusters and Sentinels stay."""
    pool: Any = getattr(client, "connection_pool", None)
    if type(pool) not in (redis.ConnectionPool, redis.BlockingConnectionPool):
        return client
    options = dict(pool.connection_kwargs)
    options.update(
        decode_responses=False,
        socket_timeout=fleet.backend_timeout,
        socket_connect_timeout=fleet.backend_timeout,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **options))


class Boxes:
    """What has come for those who wait, by digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[str, list[queue.SimpleQueue[Message | None]]] = {}

    @contextlib.contextmanager
    def box(self, digest: str) -> Any:  # noqa: ANN401 - a context manager of a queue
        """Collect the messages about a digest."""
        box: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        with self._lock:
            self._boxes.setdefault(digest, []).append(box)
        try:
            yield box
        finally:
            with self._lock:
                boxes = self._boxes[digest]
                boxes.remove(box)
                if not boxes:
                    del self._boxes[digest]

    def put(self, digest: str, message: Message) -> None:
        """Hand a message to all who wait."""
        with self._lock:
            boxes = list(self._boxes.get(digest, ()))
        for box in boxes:
            box.put(message)

    def wake_all(self) -> None:
        """Have everybody look again."""
        with self._lock:
            boxes = [box for boxes in self._boxes.values() for box in boxes]
        for box in boxes:
            box.put(None)


class Server:
    """One process's connections to the server."""

    def __init__(self, client: Any, fleet: Fleet, forget: Callable[[str | None], None]) -> None:  # noqa: ANN401
        self._client = own_client(client, fleet)
        self._is_own = self._client is not client
        self._fleet = fleet
        self._forget = forget
        self._boxes = Boxes()
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}
        self._lead = threading.Event()
        self._closed = threading.Event()
        self._subscribed = threading.Event()
        self._checked = False
        self._threads: list[threading.Thread] = []

    def run(self, steps: Any, fn: Callable[[], Any]) -> Any:  # noqa: ANN401 - a flight's steps, and the user's value
        """Do the steps of a flight."""
        answer: Any = None
        error: BaseException | None = None
        with contextlib.ExitStack() as boxes:
            box: Any = None
            while True:
                try:
                    step = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as stop:
                    return stop.value
                answer = error = None
                if isinstance(step, Watch):
                    box = boxes.enter_context(self._boxes.box(step.digest))
                    continue
                try:
                    answer = self._do(step, box, fn)
                except BaseException as raised:  # noqa: BLE001 - it goes into the flight
                    error = raised

    def _do(self, step: Step, box: Any, fn: Callable[[], Any]) -> Any:  # noqa: ANN401 - as above
        match step:
            case Ask():
                return self.ask(step)
            case Read():
                return self._guarded(self._client.get, step.key)
            case Await():
                try:
                    return box.get(timeout=step.seconds)
                except queue.Empty:
                    return None
            case Call(lease) if lease.token:
                with self._renewed(lease):
                    return fn()
            case _:
                return fn()

    def ask(self, step: Ask) -> Any:  # noqa: ANN401 - what the script returns
        """Run a script; the first one opens the connections."""
        self._begin()
        try:
            return self._guarded(self._client.evalsha, sha_of(step.script), len(step.keys), *step.keys, *step.args)
        except NoScriptError:
            return self._guarded(self._client.eval, step.script, len(step.keys), *step.keys, *step.args)

    def read(self, key: str) -> Any:  # noqa: ANN401 - bytes or None
        """Read a string."""
        self._begin()
        return self._guarded(self._client.get, key)

    def _guarded(self, command: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - any command
        try:
            return command(*args)
        except NoScriptError:
            raise
        except TROUBLE as error:
            if isinstance(error, WRONG) and not self._checked:
                raise BackendError(f"the server refuses the client: {described(error)}") from error
            raise BackendTroubleError(described(error)) from error

    def _begin(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("the coalescer is closed")
        if not self._checked:
            info: dict[str, Any] = {}
            with contextlib.suppress(redis.exceptions.NoPermissionError):
                info = self._guarded(self._client.info)
            check_server(info)
            self._checked = True
        if not self._threads:
            with self._lock:
                if not self._threads:
                    self._start("coalesce-inbox", self._listen)
        if not self._subscribed.wait(self._fleet.backend_timeout):
            raise BackendTroubleError("the server did not confirm the subscription in time")

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # The subscriber.

    def _listen(self) -> None:
        pause, lost = 0.05, False
        while not self._closed.is_set():
            try:
                with self._client.pubsub() as inbox:
                    inbox.subscribe(self._fleet.inbox, self._fleet.names.everybody())
                    missing = 2
                    while not self._closed.is_set():
                        message = inbox.get_message(timeout=_LOOK)
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
                                self._boxes.wake_all()
                                pause = 0.05
                        elif message["type"] == "message":
                            self._receive(message["data"])
            except TROUBLE as error:
                if self._closed.is_set():
                    return
                logger.debug("the inbox%s was lost: %s", in_coalescer(self._fleet.name), described(error))
            except Exception:
                logger.exception("the inbox%s failed", in_coalescer(self._fleet.name))
            self._subscribed.clear()
            self._closed.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _receive(self, content: object) -> None:
        received = parse_message(content)
        if received is None:
            return
        digest, message = received
        if message is None:
            self._forget(digest)
        else:
            self._boxes.put(digest, message)

    # The leases.

    @contextlib.contextmanager
    def _renewed(self, lease: Lease) -> Any:  # noqa: ANN401 - a context manager
        with self._lock:
            self._leases[lease.token] = lease
            if len(self._threads) == 1:
                self._start("coalesce-leases", self._renew)
        self._lead.set()
        try:
            yield
        finally:
            with self._lock:
                del self._leases[lease.token]

    def _renew(self) -> None:
        fleet = self._fleet
        while not self._closed.is_set():
            self._lead.wait()
            if self._closed.wait(fleet.lease_seconds / 3):
                return
            with self._lock:
                leases = list(self._leases.values())
                if not leases:
                    self._lead.clear()
            for lease in leases:
                keys = [fleet.names.flight(lease.digest), fleet.names.forgotten(lease.digest, lease.token)]
                try:
                    self.ask(Ask(scripts.RENEW, keys, [lease.token, fleet.lease_ms]))
                except BackendTroubleError as trouble:
                    fleet.note_trouble(trouble)
                    break
                except RuntimeError:
                    # Closed meanwhile.
                    return

    def stop(self) -> None:
        """Have the threads end; they do so within a second."""
        self._closed.set()
        self._lead.set()
        self._boxes.wake_all()

    def close(self) -> None:
        """End the threads and the connections."""
        self.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._is_own:
            with contextlib.suppress(*TROUBLE):
                self._client.close()

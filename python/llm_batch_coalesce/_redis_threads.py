"""The driver for threads: does the steps of flights on a Redis or Valkey server.

Each process has one subscriber thread, which reads its inbox, and, while it leads, one thread that renews all its
leases. Both know the coalescer only through what they are given here, so an abandoned coalescer is collected, and ends
them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import redis
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
from llm_batch_coalesce._redis_bounded import Bounded
from llm_batch_coalesce._redis_clients import other_primary, own_client
from llm_batch_coalesce._redis_common import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LOOK,
    TROUBLE,
    Subscription,
    check_server,
    described,
    second_answer,
    sha_of,
    told,
    was_cut,
    was_demoted,
)
from llm_batch_coalesce._redis_connections import Connections, most_commands
from llm_batch_coalesce._reports import in_coalescer, logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_batch_coalesce._fleet_flight import Step
    from llm_batch_coalesce._fleet_options import Fleet


class Boxes:
    """What has come for those who wait, by digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[str, list[queue.SimpleQueue[Message | None]]] = {}

    def open(self, digest: str) -> queue.SimpleQueue[Message | None]:
        """Collect the messages about a digest, until the box is closed."""
        box: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        with self._lock:
            self._boxes.setdefault(digest, []).append(box)
        return box

    def close(self, digest: str, box: queue.SimpleQueue[Message | None]) -> None:
        """Collect no more."""
        with self._lock:
            boxes = self._boxes[digest]
            boxes.remove(box)
            if not boxes:
                del self._boxes[digest]

    def has(self, digest: str) -> bool:
        """Tell whether anybody waits."""
        with self._lock:
            return digest in self._boxes

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


def _next_message(inbox: Any, seconds: float) -> dict[str, Any] | None:  # noqa: ANN401 - of redis-py
    """Return a subscription's next message as `get_message` does, without the retries that take most of its time."""
    if not inbox.connection.can_read(timeout=seconds):
        return None
    answer = inbox.connection.read_response(disconnect_on_error=False, push_request=True)
    if type(answer) is list and answer[0] == b"message":
        return {"type": "message", "data": answer[2]}
    message: dict[str, Any] | None = inbox.handle_message(answer)
    return message


class Server:
    """One process's connections to the server."""

    def __init__(self, client: Any, fleet: Fleet, forget: Callable[[str | None], None]) -> None:  # noqa: ANN401
        self._client = own_client(client, fleet.backend_timeout)
        self._is_own = self._client is not client
        self._is_cluster = isinstance(client, redis.RedisCluster)
        # Others than clients of one server may ask several, or try again, so their sockets' limits are not enough.
        plain = type(getattr(self._client, "connection_pool", None)) is redis.ConnectionPool
        self._bounded = Bounded(fleet.backend_timeout, most_commands(self._client, shared=not self._is_own))
        self._connections = Connections(self._client, fleet.backend_timeout, self._bounded) if plain else None
        self._fleet = fleet
        self._forget = forget
        self._boxes = Boxes()
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}
        # Until when they matter.
        self._doubts: dict[Doubt, float] = {}
        self._lead = threading.Event()
        self._process = os.getpid()
        self._closed = threading.Event()
        self._checked = self._met = False
        self._inbox: threading.Thread | None = None
        self._inbox_node: Any = None  # of a cluster
        self._renewer: threading.Thread | None = None
        # The subscription: whether it is there, how often it could not be made, and why. `_wanted`: try now.
        # `_deaf`: what is retained may have been forgotten elsewhere.
        self._changed = threading.Condition()
        self._subscribed = self._deaf = False
        self._failures = 0
        self._failure: BaseException | None = None
        self._wanted = threading.Event()

    def run(self, digest: str, steps: Any, fn: Callable[[], Any]) -> Any:  # noqa: ANN401 - steps, and the user's value
        """Do the steps of a flight."""
        answer: Any = None
        error: BaseException | None = None
        # From before the first claim, so that no message is missed.
        box = self._boxes.open(digest)
        try:
            while True:
                try:
                    step = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as stop:
                    return stop.value
                answer = error = None
                try:
                    answer = self._do(step, box, fn)
                except BaseException as raised:  # noqa: BLE001 - it goes into the flight
                    error = raised
        finally:
            if not self._is_forked():
                self._boxes.close(digest, box)

    def _is_forked(self) -> bool:
        """Tell whether this is a child in which a call goes on: what is here is the parent's, locks and connections."""
        return os.getpid() != self._process

    def _do(self, step: Step, box: Any, fn: Callable[[], Any]) -> Any:  # noqa: ANN401 - as above
        match step:
            case Ask():
                return self.ask(step)
            case Await():
                try:
                    return box.get(timeout=step.seconds)
                except queue.Empty:
                    return None
            case Call(lease) if lease.token:
                try:
                    self._leases[lease.token] = lease
                    self._renew_from_now()
                    return fn()
                finally:
                    # Also if whoever leads was interrupted.
                    self._leases.pop(lease.token, None)
                    if self._is_forked():
                        self._fleet.begin_process()
            case Doubt():
                self._doubts[step] = time.monotonic() + self._fleet.lease_seconds
                self._renew_from_now()
                return None
            case _:
                return fn()

    def ask(self, step: Ask) -> Any:  # noqa: ANN401 - what the script returns
        """Run a script; the first one opens the connections."""
        if self._is_forked():
            raise RuntimeError("the call was forked, and its outcome is for its own caller")
        try:
            if step.script is scripts.CLAIM:
                # Who may have to wait needs the inbox. What is said of calls under way is said after `close`, too.
                try:
                    self._begin()
                except BackendTroubleError:
                    self._deaf = True
                    raise
            try:
                answer = self._evaluate(step)
            except BackendTroubleError as trouble:
                if not was_cut(trouble.__cause__):
                    raise
                answer = second_answer(step, self._evaluate(step))
            self._met = True
            return answer
        finally:
            if self._closed.is_set():
                self._disconnect()

    def _evaluate(self, step: Ask) -> Any:  # noqa: ANN401 - as above
        words = (len(step.keys), *step.keys, *step.args)
        try:
            return self._command("EVALSHA", sha_of(step.script), *words, key=step.keys[0])
        except NoScriptError:
            return self._command("EVAL", step.script, *words, key=step.keys[0])

    def _command(self, *words: Any, key: str | None = None) -> Any:  # noqa: ANN401 - any command
        if not self._checked and key is not None:
            self._check()

        try:
            return self._run_command(*words, key=key)
        except NoScriptError:
            raise
        except Exception as error:
            # Whatever it is: a transport that is closed, too, says what it likes.
            if was_cut(error) or was_demoted(error):
                # The others are no better.
                self._disconnect()
            raise told(error, first=not self._met) from error

    def _run_command(self, *words: Any, key: str | None) -> Any:  # noqa: ANN401 - as above
        if self._connections is not None:
            return self._connections.command(*words)
        # A cluster's client does not try again if it is told whom to ask: the first try may have been heard.
        where = {"target_nodes": self._client.get_node_from_key(key)} if self._is_cluster and key is not None else {}
        return self._bounded.run(lambda: self._client.execute_command(*words, **where))

    def _disconnect(self) -> None:
        """Cut the connections that are the coalescer's own, and that nobody uses."""
        with contextlib.suppress(*TROUBLE):
            if self._connections is not None:
                self._connections.disconnect()
            elif self._is_own:
                self._client.connection_pool.disconnect(inuse_connections=False)

    def _check(self) -> None:
        info: Any = None
        try:
            info = self._command("INFO")
        except BackendError as error:
            # Who may not ask that may do everything else.
            if not isinstance(error.__cause__, NoPermissionError):
                raise
        check_server(info)
        self._checked = True

    def _begin(self) -> None:
        """Wait for the inbox; the first one starts it."""
        if self._closed.is_set():
            raise RuntimeError("the coalescer is closed")
        if self._subscribed:
            return
        if not self._checked:
            self._check()
        with self._lock:
            if self._inbox is None:
                self._inbox = self._started("coalesce-inbox", self._listen)
        with self._changed:
            failures = self._failures
            self._wanted.set()
            self._changed.wait_for(
                lambda: self._subscribed or self._failures > failures or self._closed.is_set(),
                self._fleet.backend_timeout,
            )
            if self._subscribed:
                return
            if self._failures > failures and self._failure is not None:
                raise told(self._failure, first=not self._met) from self._failure
        raise BackendTroubleError("the server did not confirm the subscription in time")

    @staticmethod
    def _started(name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads
            raise BackendTroubleError(described(error)) from error
        return thread

    # The subscriber.

    def _listen(self) -> None:
        pause = FIRST_PAUSE
        while not self._closed.is_set():
            try:
                self._read_inbox()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                if not isinstance(error, TROUBLE):
                    logger.exception("the inbox%s failed", in_coalescer(self._fleet.name))
                logger.debug("the inbox%s was lost: %s", in_coalescer(self._fleet.name), described(error))
                with self._changed:
                    if self._subscribed:
                        pause = FIRST_PAUSE
                    else:
                        self._failures += 1
                        self._failure = error
                        self._changed.notify_all()
                    self._subscribed = False
            self._closed.wait(FIRST_PAUSE)
            self._wanted.wait(pause)
            self._wanted.clear()
            pause = min(2 * pause, LONGEST_PAUSE)

    def _read_inbox(self) -> None:
        """Subscribe, and take what comes, until the coalescer is closed or the connection is lost."""
        subscription = Subscription((self._fleet.inbox, self._fleet.names.everybody()), self._fleet.backend_timeout)
        look = min(LOOK, self._fleet.backend_timeout)
        with contextlib.ExitStack() as opened:
            inbox = opened.enter_context(self._inbox_client(opened).pubsub())
            inbox.subscribe(*subscription.channels)
            while not self._closed.is_set():
                message = _next_message(inbox, look)
                if message is None:
                    if subscription.must_ping():
                        inbox.ping()
                elif subscription.take(message):
                    self._resume()
                elif message["type"] == "message":
                    self._receive(message["data"])

    def _inbox_client(self, opened: contextlib.ExitStack) -> Any:  # noqa: ANN401 - a client of redis-py
        client = self._client
        if self._is_cluster:
            # Every node of a cluster has every message; another one is tried when this one is lost.
            self._inbox_node = other_primary(client, self._inbox_node)
            client = client.get_redis_connection(self._inbox_node)
        # A pool of its own: what is cut here is not to be taken for commands.
        own = own_client(client, self._fleet.backend_timeout)
        return own if own is client else opened.enter_context(contextlib.closing(own))

    def _resume(self) -> None:
        if self._deaf:
            self._forget(None)
        self._deaf = True
        with self._changed:
            self._subscribed = True
            self._changed.notify_all()
        self._boxes.wake_all()

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

    def _renew_from_now(self) -> None:
        if self._renewer is None:
            # If that is not possible, the call is made all the same, and the lease runs out.
            with self._lock, contextlib.suppress(BackendTroubleError):
                if self._renewer is None:
                    self._renewer = self._started("coalesce-leases", self._renew)
        self._lead.set()

    def _renew(self) -> None:
        slow: set[str] = set()
        while not self._closed.is_set():
            self._lead.wait()
            if self._closed.wait(self._fleet.lease_seconds / 3):
                return
            self._lead.clear()
            leases = list(self._leases.copy().values())
            slow = self._renew_all(leases, slow)
            self._settle()
            if leases or self._doubts:
                self._lead.set()

    def _settle(self) -> None:
        """Give up what claims that were not answered may have got."""
        for doubt, until in self._doubts.copy().items():
            if time.monotonic() < until:
                try:
                    self.ask(settlement(self._fleet, doubt, waits=self._boxes.has(doubt.lease.digest)))
                except (BackendError, BackendTroubleError):
                    return
            self._doubts.pop(doubt, None)

    def _renew_all(self, leases: list[Lease], slow: set[str]) -> set[str]:
        """Renew leases, last those of nodes that were slow the last time; return which nodes are slow now."""
        placed = [(self._node_of(lease), lease) for lease in leases]
        placed.sort(key=lambda pair: pair[0] in slow)
        slow = set()
        for node, lease in placed:
            if node in slow or self._closed.is_set():
                continue
            try:
                self.ask(renewal(self._fleet, lease))
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
        """Have the threads end; they do so within a second."""
        self._closed.set()
        self._lead.set()
        self._wanted.set()
        with self._changed:
            self._changed.notify_all()
        self._boxes.wake_all()
        self._bounded.close()

    def close(self) -> None:
        """End the threads and the connections."""
        self.stop()
        if self._subscribed:
            # So that the subscriber looks.
            with contextlib.suppress(BackendError, BackendTroubleError):
                self._command("PUBLISH", self._fleet.inbox, "")
        with self._lock:
            threads = [thread for thread in (self._inbox, self._renewer) if thread is not None]
        for thread in threads:
            if thread is not threading.current_thread():
                # A user's own client may let it wait for longer.
                thread.join(LOOK + 2 * self._fleet.backend_timeout)
        # Those that are in use have something to say of calls under way, and end after that.
        self._disconnect()

"""Outcomes as bytes: a line of JSON that says what it is, and the value as its serializer has it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llm_batch_coalesce._errors import RemoteCallError, SerializationError

_VERSION = 1
_JSON = json.JSONEncoder(allow_nan=False)
# Escapes would make one character of two surrogates that stand for one.
_JSON_AS_IT_IS = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
_EXACT = frozenset({str, int, float, bool, type(None)})


class Serializer(Protocol):
    """Turns values into bytes or text and back: `json`, `pickle`, `orjson` and `msgpack` have the two functions.

    But for pickle, they change some values without a word: tuples come back as lists; with `json` all keys as text;
    with `orjson` NaN as None, and dates as text. `orjson` and `msgpack` refuse integers past 64 bits, and `orjson` keys
    that are integers, which `msgpack` writes and does not read. Take one only if your values have none of these.
    """

    def dumps(self, value: Any, /) -> bytes | str:  # noqa: ANN401 - any value of the user's
        """Return the value as bytes or text."""

    def loads(self, content: Any, /) -> Any:  # noqa: ANN401 - bytes or text, as `dumps` gave them
        """Return the value."""


class JsonSerializer:
    """The standard `json`, which changes no value silently: what would not come back as it was is refused."""

    def dumps(self, value: Any, /) -> bytes:  # noqa: ANN401 - as above
        """Return the value as JSON in UTF-8.

        Raises:
            TypeError: If it is not JSON, or would come back as something else: a tuple, an instance of a subclass (of
                an enumeration, a `Counter`), or a key that is no string.
            ValueError: If it has a NaN, an infinity, or an integer of more digits than Python takes, or contains
                itself.
        """
        text = _JSON_AS_IT_IS.encode(value)
        _check_json(value)
        # `json.loads` reads surrogates without a partner, too.
        return text.encode("utf-8", "surrogatepass")

    def loads(self, content: bytes, /) -> Any:  # noqa: ANN401 - as above
        """Return the value."""
        return json.loads(content)


def _check_json(value: object) -> None:
    """Refuse what `json` would turn into something else."""
    kind = type(value)
    if kind in _EXACT:
        return
    if kind is dict:
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) is not str:
                raise TypeError(f"a key of type {type(key).__qualname__} would come back as a str")
            _check_json(item)
    elif kind is list:
        for item in value:  # type: ignore[attr-defined]
            _check_json(item)
    else:
        plain = next(base for base in (dict, list, tuple, str, int, float) if isinstance(value, base))
        raise TypeError(f"a {kind.__qualname__} would come back as a {'list' if plain is tuple else plain.__name__}")


@dataclass(frozen=True, slots=True)
class Landed:
    """An outcome as it was read.

    Attributes:
        kind: What it is.
        value: The value, of that kind.
        error: The error to raise, of the other two.
        seconds: How long the call took.
        ttl_seconds: How long it was to be retained from then on, in seconds.
    """

    kind: Literal["value", "error", "unserializable"]
    value: Any
    error: RemoteCallError | SerializationError | None
    seconds: float
    ttl_seconds: float


@dataclass(frozen=True, slots=True)
class About:
    """What is told beside an outcome: how long its call took, how long it is retained, and who made the call."""

    seconds: float
    ttl_seconds: float
    leader: str


class DamagedError(Exception):
    """What is under an outcome's key is none of ours."""


def pack_value(serializer: Serializer, value: object, about: About) -> bytes:
    """Make the payload of a value.

    Raises:
        Exception: Whatever the serializer raises for a value that it does not take.
    """
    content = serializer.dumps(value)
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        raise TypeError(f"the serializer's dumps() returned {type(content).__qualname__}, not bytes or str")
    return _head("value", about) + content


def pack_unserializable(value: object, reason: Exception, about: About) -> bytes:
    """Make the payload that tells of a value which cannot be sent."""
    content = [type(value).__qualname__, f"{type(reason).__qualname__}: {message_of(reason)}"]
    return _head("unserializable", about) + json.dumps(content).encode()


def pack_error(error: BaseException, about: About) -> bytes:
    """Make the payload of an error."""
    kind = type(error)
    content = [f"{kind.__module__}.{kind.__qualname__}", message_of(error)]
    return _head("error", about) + json.dumps(content).encode()


def message_of(error: BaseException) -> str:
    """Return the message of an error, whose `__str__` may be the user's."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - as above
        return "<its message cannot be read>"


def _head(kind: str, about: About) -> bytes:
    # Numbers and this word are JSON as they are.
    seconds, ttl, leader = round(about.seconds, 6), round(about.ttl_seconds, 3), _JSON.encode(about.leader)
    head = f'{{"v": {_VERSION}, "kind": "{kind}", "seconds": {seconds}, "ttl": {ttl}, "leader": {leader}}}\n'
    return head.encode()


def unpack(serializer: Serializer, payload: object) -> Landed:
    """Read a payload.

    Raises:
        DamagedError: If it is none of ours, or cannot be read.
    """
    try:
        if not isinstance(payload, bytes):
            raise TypeError(f"a payload is bytes, not {type(payload).__qualname__}")  # noqa: TRY301
        line, content = payload.split(b"\n", 1)
        head = json.loads(line.decode())
        if head["v"] != _VERSION:
            raise ValueError(f"version {head['v']!r} is not {_VERSION}")  # noqa: TRY301
        seconds, ttl, leader = float(head["seconds"]), float(head["ttl"]), str(head["leader"])
        if not (math.isfinite(seconds) and math.isfinite(ttl)):
            raise ValueError("a number of seconds is not finite")  # noqa: TRY301
        if head["kind"] == "value":
            return Landed("value", serializer.loads(content), None, seconds, ttl)
        name, message = json.loads(content)
        if head["kind"] == "error":
            return Landed("error", None, RemoteCallError(str(name), str(message), leader), seconds, ttl)
        if head["kind"] == "unserializable":
            return Landed("unserializable", None, SerializationError(str(name), str(message)), seconds, ttl)
        raise ValueError(f"kind {head['kind']!r} is unknown")  # noqa: TRY301
    except Exception as error:
        raise DamagedError(f"{type(error).__qualname__}: {error}") from error

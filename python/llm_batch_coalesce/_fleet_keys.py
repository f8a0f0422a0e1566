"""Keys of a fleet: what a key is called on the server, the same in every process."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

from llm_batch_coalesce._shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


class FleetKey:
    """A key with its digest. Equal by digest, so that a process may forget what another one names."""

    __slots__ = ("digest", "key")

    def __init__(self, key: Hashable, digest: str) -> None:
        self.key = key
        self.digest = digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FleetKey) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return repr(self.key)


def fleet_key(key: Hashable, key_encoder: Callable[[Any], str | bytes] | None) -> FleetKey:
    """Make the fleet's key of a key.

    Raises:
        TypeError: If the key is unhashable, or of a type that needs a `key_encoder` and there is none.
    """
    hash(key)
    encoded = _encode(key)
    if encoded is None:
        if key_encoder is None:
            raise TypeError(
                f"key {shown(key)} needs a key_encoder: only str, bytes, int, float, bool, None and tuples of them are "
                "the same in every process"
            )
        chosen = key_encoder(key)
        if not isinstance(chosen, str | bytes):
            raise TypeError(f"key_encoder must return str or bytes, not {shown(chosen)}")
        # Apart from keys that need no encoder.
        encoded = b"e" + _sized(chosen.encode("utf-8", "surrogatepass") if isinstance(chosen, str) else chosen)
    return FleetKey(key, hashlib.blake2b(encoded, digest_size=20).hexdigest())


def _encode(key: Any) -> bytes | None:  # noqa: ANN401 - any part of a key
    """Encode a key, the same for keys that are equal in a dict; None if its type is not known."""
    if key is None:
        return b"n"
    kind = next((kind for kind in _ENCODERS if isinstance(key, kind)), None)
    # Of other classes too, if they are equal to what these take for equal: members of an enum, named tuples.
    if kind is None or type(key).__eq__ is not kind.__eq__ or type(key).__hash__ is not kind.__hash__:
        return None
    return _ENCODERS[kind](key)


def _encode_float(key: float) -> bytes:
    if math.isfinite(key) and float.is_integer(key):
        return _encode_int(float.__int__(key))
    return b"f" + _sized(float.hex(key).encode())


def _encode_int(key: int) -> bytes:
    # In hexadecimal, since Python refuses to write long numbers in decimal.
    return b"i" + _sized(b"%x" % int.__int__(key))


def _encode_tuple(key: tuple[Any, ...]) -> bytes | None:
    items = [_encode(item) for item in tuple.__iter__(key)]
    return None if None in items else b"t%d:" % len(items) + b"".join(item for item in items if item is not None)


_ENCODERS: dict[type, Callable[[Any], bytes | None]] = {
    str: lambda key: b"s" + _sized(str.encode(key, "utf-8", "surrogatepass")),
    bytes: lambda key: b"b" + _sized(b"".join([key])),
    int: _encode_int,
    float: _encode_float,
    tuple: _encode_tuple,
}


def _sized(content: bytes) -> bytes:
    return b"%d:" % len(content) + content

"""Keys of whole requests: the same for requests that mean the same, different for all others."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from llm_batch_coalesce._shown import shown

# An integer of so many bits may have more digits than Python writes.
_LONG = 2_000


def request_key(request: Mapping[str, Any] | Any, *, scope: str, drop: Iterable[str] = ()) -> str:  # noqa: ANN401
    """Return the key of a request: the same for equal requests in whatever order, another for any other.

    The request is rendered as canonical JSON in the sense of RFC 8785: names sorted, `1` and `1.0` one number, `-0.0`
    zero. Beyond it, integers past 2**53 stay exact, and strings are compared by code point and not normalised. All
    fields count, sampling parameters too: at a temperature above zero callers with one key get one sample.

    Args:
        request: A mapping of JSON values (lists or tuples, mappings, strings, numbers, booleans, None), or a pydantic
            model; models may be part of it, too.
        scope: For whom an answer is: the tenant, the user, or `"public"`. Two scopes never share a key.
        drop: Names of top-level fields that do not change the answer, such as `"user"` or `"metadata"`.

    Returns:
        A version, and 64 hexadecimal digits of a BLAKE2b digest; nothing of the request can be read from it.

    Raises:
        TypeError: If the request is none, or a value in it is not JSON, a secret of pydantic's, or an integer of more
            than 4,300 digits (as many as Python writes); it names the place, such as `messages[2].content[0]`. If the
            request is nested too deeply. If `scope` or a name to drop is no string.
        ValueError: If `scope` is empty.

    Example:
        >>> one = request_key({"model": "small", "temperature": 0}, scope="public")
        >>> one == request_key({"temperature": 0.0, "model": "small", "user": "u1"}, scope="public", drop=["user"])
        True
        >>> one == request_key({"model": "small", "temperature": 0}, scope="tenant 7")
        False
    """
    if not isinstance(scope, str):
        raise TypeError(f"scope must be a str, not {shown(scope)}")
    if not scope:
        raise ValueError('scope must not be empty; give the tenant, the user or "public"')
    dropped = {drop} if isinstance(drop, str) else set(drop)
    if not all(isinstance(name, str) for name in dropped):
        raise TypeError(f"drop must be names of fields, not {shown(drop)}")
    fields = _dumped(request, "")
    if not isinstance(fields, Mapping):
        raise TypeError(f"request must be a mapping or a pydantic model, not {shown(request)}")
    kept = {name: value for name, value in fields.items() if name not in dropped}
    try:
        rendered = render([scope, plain(kept, "", equal_numbers=True)])
    except RecursionError:
        raise TypeError("the request cannot be a key: it is nested too deeply") from None
    return f"request-v1:{hashlib.blake2b(rendered, digest_size=32).hexdigest()}"


def render(value: object) -> bytes:
    """Render what `plain` has returned, the same for values that are the same."""
    # Escapes would render one character outside the BMP like the two surrogates that stand for it.
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


def plain(value: object, place: str, around: frozenset[int] = frozenset(), *, equal_numbers: bool = False) -> object:
    """Return a copy that is rendered without loss.

    Args:
        value: A value of a request.
        place: Where in the request it is, for errors.
        around: The containers that this value is in, by id.
        equal_numbers: Whether a float that is whole is the same as an int.

    Raises:
        TypeError: If the value, or one in it, is not JSON.
    """
    value = _dumped(value, place)
    if isinstance(value, int) and value.bit_length() > _LONG:
        _check_digits(value, place)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if equal_numbers and value.is_integer() else value
    where = place or "the request"
    if not isinstance(value, list | tuple | Mapping):
        raise TypeError(f"{where} cannot be part of a request as JSON: {shown(value)}")
    if id(value) in around:
        raise TypeError(f"{where} cannot be part of a request as JSON: it contains itself")
    around |= {id(value)}
    if not isinstance(value, Mapping):
        items = enumerate(value)
        return [plain(item, f"{place}[{index}]", around, equal_numbers=equal_numbers) for index, item in items]
    copy = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{where} cannot be part of a request as JSON: its key {shown(key)} is no string")
        inner = f"{place}[{key!r}]" if not key.isidentifier() else f"{place}.{key}" if place else key
        copy[key] = plain(item, inner, around, equal_numbers=equal_numbers)
    return copy


def _check_digits(number: int, place: str) -> None:
    try:
        str(number)
    except ValueError as error:
        raise TypeError(f"{place or 'the request'} cannot be part of a request as JSON: {error}") from None


def _dumped(value: Any, place: str) -> Any:  # noqa: ANN401 - whatever a request is made of
    # Pydantic's models have it; asked of the class, since instances may make up attributes.
    if hasattr(type(value), "model_dump"):
        _refuse_secrets(value.model_dump(by_alias=True), place)
        return value.model_dump(mode="json", by_alias=True)
    return value


def _refuse_secrets(value: object, place: str) -> None:
    """Refuse what pydantic masks as JSON: all secrets would look the same."""
    if hasattr(type(value), "get_secret_value"):
        raise TypeError(f"{place} cannot be part of a request: secrets are masked, so that any two would be equal")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_secrets(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            _refuse_secrets(item, f"{place}[{index}]")

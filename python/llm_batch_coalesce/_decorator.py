"""The decorator: a function whose concurrent calls with equal arguments are one call.

A default key is made of the function's name and of its arguments in the order of its parameters, each in a place of
its own, so that no two ways to call a function meet unless they mean the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Protocol, Self, TypeVar, cast, overload

from llm_batch_coalesce._shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable, Iterator, Mapping

    from llm_batch_coalesce._async import AsyncBatchCoalescer
    from llm_batch_coalesce._sync import BatchCoalescer

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class _Face(Protocol):
    # For type checkers, that know the kind of the function only by what it returns.
    @overload
    def __get__(self, decorated: Callable[..., Coroutine[Any, Any, Any]], owner: type, /) -> AsyncBatchCoalescer: ...
    @overload
    def __get__(self, decorated: Callable[..., Any], owner: type, /) -> BatchCoalescer: ...


class CoalescedFunction(Protocol[P, R_co]):
    """What the decorator makes of a function: one with the same signature, and with this."""

    __name__: str
    __qualname__: str
    coalescer: ClassVar[_Face]
    """The coalescer in use: that of tasks for a coroutine function, that of threads for any other."""

    @property
    def __wrapped__(self) -> Callable[P, R_co]:
        """The function itself, to call it uncoalesced."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function, or share the outcome of a call with the same key."""

    def key_for(self, *args: P.args, **kwargs: P.kwargs) -> Hashable:
        """Return the key of a call with these arguments."""

    def forget(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the key of a call with these arguments, as the coalescer's `forget` does."""

    @overload
    def __get__(
        self: CoalescedFunction[Concatenate[Any, Q], R], instance: object, owner: type | None = None, /
    ) -> CoalescedMethod[Q, P, R]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class CoalescedMethod(Protocol[Q, P, R_co]):
    """The same in a class. `key_for` and `forget` are the function's: they take the instance (or the class) first."""

    __name__: str
    __qualname__: str
    coalescer: ClassVar[_Face]

    @property
    def __wrapped__(self) -> Callable[P, R_co]: ...

    # Type checkers cannot tell a method from a static one, nor from a class method that is looked up in its class.
    @overload
    def __call__(self, *args: Q.args, **kwargs: Q.kwargs) -> R_co: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def key_for(self, *args: P.args, **kwargs: P.kwargs) -> Hashable: ...
    def forget(self, *args: P.args, **kwargs: P.kwargs) -> bool: ...


class FleetFunction(Protocol[P, R_co]):
    """What the decorator of a fleet's coalescer makes of a function."""

    __name__: str
    __qualname__: str
    coalescer: Any

    @property
    def __wrapped__(self) -> Callable[P, R_co]: ...
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def key_for(self, *args: P.args, **kwargs: P.kwargs) -> Hashable: ...

    # A bool, or of a coroutine function an awaitable of one.
    def forget(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...  # noqa: ANN401
    def __get__(self, instance: object, owner: type | None = None, /) -> Any: ...  # noqa: ANN401


class FleetDecorator(Protocol):
    """What `coalesced` of a fleet's coalescer returns."""

    def __call__(self, fn: Callable[P, R], /) -> FleetFunction[P, R]: ...


class Decorator(Protocol):
    """What `coalesced` returns."""

    def __call__(self, fn: Callable[P, R], /) -> CoalescedFunction[P, R]: ...


def coalesced(coalescer: BatchCoalescer | AsyncBatchCoalescer, key: Callable[..., Hashable] | None = None) -> Decorator:
    """Make a decorator; what it does is told by the methods of the same name."""
    if key is not None and (not callable(key) or inspect.iscoroutinefunction(key) or _yields(key)):
        raise TypeError(
            f"key must be a plain function of the call's arguments, not {shown(key)}; "
            "to decorate without a key of your own, write @coalescer.coalesced()"
        )

    def decorate(*functions: Any, **options: Any) -> Any:  # noqa: ANN401 - a misplaced decorator is called with anything
        if len(functions) != 1 or options:
            raise TypeError(_misplaced(f"{len(functions) + len(options)} arguments"))
        fn = _checked(functions[0])
        key_for = _default_key(fn) if key is None else key
        for_tasks = inspect.iscoroutinefunction(fn)
        wrapped = _wrapped_for_tasks if for_tasks else _wrapped
        return wrapped(_face(coalescer, fn, for_tasks=for_tasks), fn, key_for)

    return cast("Decorator", decorate)


def _face(coalescer: Any, fn: Callable[..., Any], *, for_tasks: bool) -> Any:  # noqa: ANN401 - of whatever kind
    """Return the face of a coalescer that serves such functions."""
    if for_tasks is inspect.iscoroutinefunction(coalescer.get_or_call):
        return coalescer
    if not hasattr(coalescer, "as_async" if for_tasks else "as_sync"):
        kind = "plain functions" if for_tasks else "coroutine functions"
        raise TypeError(f"{type(coalescer).__qualname__} decorates {kind} only, not {shown(fn)}")
    return coalescer.as_async() if for_tasks else coalescer.as_sync()


def _wrapped(face: Any, fn: Callable[..., Any], key_for: Callable[..., Hashable]) -> Callable[..., Any]:  # noqa: ANN401 - as above
    @functools.wraps(fn)
    def call(*args: object, **kwargs: object) -> object:
        return face.get_or_call(key_for(*args, **kwargs), functools.partial(fn, *args, **kwargs))

    return _equipped(call, face, key_for)


def _wrapped_for_tasks(
    face: Any,  # noqa: ANN401 - as above
    fn: Callable[..., Any],
    key_for: Callable[..., Hashable],
) -> Callable[..., Any]:
    @functools.wraps(fn)
    async def call(*args: object, **kwargs: object) -> object:
        return await face.get_or_call(key_for(*args, **kwargs), functools.partial(fn, *args, **kwargs))

    return _equipped(call, face, key_for)


def _equipped(
    call: Any,  # noqa: ANN401 - a function has no type that takes attributes
    face: Any,  # noqa: ANN401 - as above
    key_for: Callable[..., Hashable],
) -> Callable[..., Any]:
    def forget(*args: object, **kwargs: object) -> Any:  # noqa: ANN401 - of a fleet's tasks it is awaited
        return face.forget(key_for(*args, **kwargs))

    call.coalescer, call.key_for, call.forget = face, key_for, forget
    return cast("Callable[..., Any]", call)


def _checked(fn: Any) -> Callable[..., Any]:  # noqa: ANN401 - whatever was decorated
    if isinstance(fn, classmethod | staticmethod):
        kind = type(fn).__name__
        raise TypeError(f"@{kind} must stand above @coalescer.coalesced(), not below it, for {shown(fn.__func__)}")
    if not callable(fn) or isinstance(fn, type) or not hasattr(fn, "__qualname__"):
        raise TypeError(_misplaced(shown(fn)))
    if _yields(fn):
        raise TypeError(
            f"{fn.__qualname__} is a generator function: what it yields can be consumed only once, so callers cannot "
            "share it; return a list"
        )
    return cast("Callable[..., Any]", fn)


def _yields(fn: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)


def _misplaced(given: str) -> str:
    return (
        f"@coalescer.coalesced() decorates one function, not {given}. "
        "If it stands without parentheses, write @coalescer.coalesced()"
    )


_first_of_name: dict[tuple[str, str], weakref.ref[Any]] = {}


def _identity(fn: Callable[..., Any]) -> tuple[Hashable, ...]:
    """Return what tells a function from all others: its name, and itself if another one came first by that name.

    That is so for closures, lambdas, functions that were defined anew, and methods of an instance.
    """
    name = (fn.__module__, fn.__qualname__)
    if not inspect.ismethod(fn) and _first_of_name.setdefault(name, weakref.ref(fn))() is fn:
        return name
    return (*name, fn)


# What a decorator below wraps may have other parameters than the wrapper, which is what gets the arguments.
if sys.version_info >= (3, 14):
    import annotationlib

    def _signature(fn: Callable[..., Any]) -> inspect.Signature:
        # Annotations may name what is not defined yet.
        return inspect.signature(fn, follow_wrapped=False, annotation_format=annotationlib.Format.FORWARDREF)

else:
    _signature = functools.partial(inspect.signature, follow_wrapped=False)


def _default_key(fn: Callable[..., Any]) -> Callable[..., Hashable]:
    identity, signature = _identity(fn), _signature(fn)
    parameters = signature.parameters
    keywords = next((name for name, it in parameters.items() if it.kind is it.VAR_KEYWORD), None)

    def bind(*args: object, **kwargs: object) -> tuple[object, ...]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if keywords is not None:
            # Names differ, so values are not compared.
            arguments[keywords] = tuple(sorted(arguments[keywords].items()))
        return tuple(arguments.values())

    # `Signature.bind` takes microseconds. A call with nothing but so many positional arguments has those, and after
    # them always the same.
    positional = sum(it.kind in {it.POSITIONAL_ONLY, it.POSITIONAL_OR_KEYWORD} for it in parameters.values())
    rests: dict[int, tuple[object, ...]] = {}
    for count in range(positional + 1):
        with contextlib.suppress(TypeError):
            rests[count] = bind(*(None,) * count)[count:]

    def key_for(*args: object, **kwargs: object) -> Hashable:
        rest = None if kwargs else rests.get(len(args))
        if rest is None:
            try:
                arguments = bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{fn.__qualname__}(): {error}") from None
        else:
            arguments = args + rest
        try:
            hash(arguments)
        except TypeError as error:
            _name_unhashable(fn, _named(parameters, arguments), error)
            raise
        return (*identity, arguments)

    return key_for


def _named(parameters: Mapping[str, inspect.Parameter], arguments: tuple[Any, ...]) -> Iterator[tuple[str, object]]:
    for (name, parameter), argument in zip(parameters.items(), arguments, strict=True):
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from argument
        elif parameter.kind is parameter.VAR_POSITIONAL:
            yield from ((f"{name}[{index}]", each) for index, each in enumerate(argument))
        else:
            yield name, argument


def _name_unhashable(fn: Callable[..., Any], named: Iterator[tuple[str, object]], error: TypeError) -> None:
    for name, argument in named:
        try:
            hash(argument)
        except TypeError:
            raise TypeError(
                f"{fn.__qualname__}(): the argument {name} cannot be part of a key, for it is unhashable: "
                f"{shown(argument)}; give @coalescer.coalesced(key=...) a function that makes a key of the arguments"
            ) from error

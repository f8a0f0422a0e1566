"""Copies of errors: whoever did not run the callable raises an exception object of its own.

Raising one object in several threads mixes their tracebacks, and crashes free-threaded CPython 3.13. The rules:

1. A copy has the class, `args`, `__dict__`, slots, C members, `__cause__` and notes of the error; no traceback and no
   `__context__`. Values are shared, except for what rule 2 says and for the list of notes.
2. What hangs on an error is copied with it: its causes, the members of groups, and errors that it holds as plain values
   (`args[0]` of requests' ConnectionError, `reason` of URLError). They too would be raised by several threads, and
   their tracebacks would keep frames alive. Each has one copy, so circles and diamonds keep their shape.
3. None of the user's code runs: no `__init__`, `__new__`, `__setattr__`, property or metaclass. Everything goes through
   the descriptors of built-in classes and of slots. There are two exceptions: `__str__`, for the message of a stand-in;
   and an extension class that no built-in `__new__` can make is asked for its own compiled `__reduce__`.
4. An error that can be copied in no way is replaced by a `SharedCallError`.
5. Nothing recurses along causes or groups, so their depth does not matter.
6. A template is only read, never raised and never changed once published, so any number of threads may copy it at once.
"""

from __future__ import annotations

import builtins
import operator
import struct
import weakref
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from llm_batch_coalesce._errors import SharedCallError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

_POINTER_BYTES = struct.calcsize("P")
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE, which the interpreter's own static classes lack

# How far containers are searched for errors: pydantic keeps them in a dict in a dict in a list. A long container is
# data, unless it begins with an error.
_CONTAINER_DEPTH = 3
_LONG_CONTAINER = 100

# Descriptors reach an object's own state whatever its class overrides. __reduce__ gives args and __dict__ in one step
# and, unlike reading __dict__, leaves no empty one behind.
_state_of = cast("Callable[[BaseException], tuple[Any, ...]]", BaseException.__reduce__)
_set_args = BaseException.__dict__["args"].__set__
_get_dict = BaseException.__dict__["__dict__"].__get__
_set_dict = BaseException.__dict__["__dict__"].__set__
_get_cause = BaseException.__dict__["__cause__"].__get__
_set_cause = BaseException.__dict__["__cause__"].__set__
_get_suppress = BaseException.__dict__["__suppress_context__"].__get__
_set_suppress = BaseException.__dict__["__suppress_context__"].__set__
_get_traceback = BaseException.__dict__["__traceback__"].__get__
_get_message = BaseExceptionGroup.__dict__["message"].__get__
_get_members = BaseExceptionGroup.__dict__["exceptions"].__get__
_class_attribute = type.__getattribute__


class _Member(NamedTuple):
    """A C member or a slot."""

    get: Callable[[BaseException], object]
    put: Callable[[BaseException, object], None]
    holds_none: bool  # a C member reads None when it is unset, and OSError would print one that was set to None


class _Recipe(NamedTuple):
    """How errors of one class are copied. A kept one must not hold its class, so that the class can be collected."""

    new: Callable[..., BaseException]
    members: tuple[_Member, ...]
    is_group: bool
    hides_state: bool  # in C fields that no descriptor shows
    forget: weakref.ref[type[BaseException]]  # its callback drops the recipe


def _static_members() -> dict[int, tuple[_Member, ...]]:
    """Return what each static error class of the interpreter adds to the members of its base, by the class's id."""
    found = {}
    for cls in vars(builtins).values():
        if isinstance(cls, type) and issubclass(cls, BaseException) and not cls.__flags__ & _HEAP_TYPE:
            found[id(cls)] = tuple(
                _Member(member.__get__, member.__set__, holds_none=False)
                for member in vars(cls).values()
                if isinstance(member, MemberDescriptorType | GetSetDescriptorType)
            )
    return found


_builtin_members = _static_members()
# A class has one weak reference without a callback, so that keys are found by identity. On 3.13t a lookup that must
# compare with a key made in another thread takes 16 us.
_recipes: dict[weakref.ref[type[BaseException]], _Recipe] = {}


def _recipe_of(cls: type[BaseException]) -> _Recipe:
    # the hash of a reference is that of its class, which a metaclass may define
    recipe = _recipes.get(weakref.ref(cls)) if type(cls) is type else None
    return recipe or _learn(cls)


def _learn(cls: type[BaseException]) -> _Recipe:
    """Return how errors of a class are copied, and keep it where that does not hold the class."""
    members: list[_Member] = []
    hides_state = False
    owner: type = cls
    # Along __base__ and not the MRO: it is the line of storage, and the static class at its end has the safe __new__.
    while id(owner) not in _builtin_members:
        base = _class_attribute(owner, "__base__")
        namespace = dict(_class_attribute(owner, "__dict__"))
        slots = [
            _Member(slot.__get__, slot.__set__, holds_none=True)
            for name, slot in namespace.items()
            if type(slot) is MemberDescriptorType and slot.__objclass__ is owner and slot.__name__ == name
        ]
        storage = _class_attribute(owner, "__basicsize__") - _class_attribute(base, "__basicsize__")
        unseen = storage - len(slots) * _POINTER_BYTES
        # until 3.11 the list of weak references was part of that storage
        hides_state |= unseen != 0 and not (unseen == _POINTER_BYTES and "__weakref__" in namespace)
        members += slots
        owner = base
    has_slots = bool(members)
    is_group = owner is BaseExceptionGroup
    new = cast("Callable[..., BaseException]", owner.__new__)
    while owner is not BaseException:
        members += _builtin_members[id(owner)]
        owner = cast("type", owner.__base__)
    key = weakref.ref(cls)
    forget = weakref.ref(cls, lambda _: _recipes.pop(key, None))
    recipe = _Recipe(new, tuple(members), is_group, hides_state, forget)
    if type(cls) is type and not has_slots:  # the descriptor of a slot holds its class
        _recipes[key] = recipe
    return recipe


class _Copies:
    """The copies of one error and of all that hangs on it."""

    __slots__ = ("_made", "_unfilled")

    def __init__(self) -> None:
        # by id of the original, which is kept beside its copy so that the id stays its own
        self._made: dict[int, tuple[BaseException, BaseException]] = {}
        self._unfilled: list[tuple[BaseException, BaseException, _Recipe | None]] = []

    def finished(self, error: BaseException) -> BaseException:
        """Return the copy of an error with all that hangs on it."""
        copy = self._of(error)
        while self._unfilled:
            self._fill(*self._unfilled.pop())
        return copy

    def _of(self, error: BaseException) -> BaseException:
        """Return the copy of an error, which may be empty yet."""
        made = self._made.get(id(error))
        if made is not None:
            return made[1]
        recipe = _recipe_of(type(error))
        return self._make_group(error) if recipe.is_group else self._make(error, recipe)

    def _make_group(self, group: BaseException) -> BaseException:
        """Make a group after its members, which its `__new__` wants; all else can be linked afterwards."""
        waiting = [group]
        while waiting:
            error = waiting[-1]
            recipe = _recipe_of(type(error))
            members = _get_members(error) if recipe.is_group else ()
            missing = [member for member in members if id(member) not in self._made]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if id(error) not in self._made:
                self._make(error, recipe)
        return self._made[id(group)][1]

    def _make(self, error: BaseException, recipe: _Recipe) -> BaseException:
        try:
            copy = self._empty(error, recipe)
            self._unfilled.append((error, copy, recipe))
        except Exception:  # noqa: BLE001 - whatever an extension class raises, it cannot be copied
            copy = stand_in(error)
            self._unfilled.append((error, copy, None))
        self._made[id(error)] = error, copy
        return copy

    def _empty(self, error: BaseException, recipe: _Recipe) -> BaseException:
        if recipe.hides_state:
            return self._rebuilt(error)
        cls = type(error)
        try:
            if not recipe.is_group:
                return recipe.new(cls)
            return recipe.new(cls, _get_message(error), [self._of(member) for member in _get_members(error)])
        except TypeError:  # "ValueError.__new__(X) is not safe": X comes from an extension module
            return self._rebuilt(error)

    def _rebuilt(self, error: BaseException) -> BaseException:
        """Return an error of an extension class, made by the function that its own compiled `__reduce__` names."""
        cls = type(error)
        namespaces = [_class_attribute(base, "__dict__") for base in _class_attribute(cls, "__mro__")]
        reduce = next(namespace["__reduce__"] for namespace in namespaces if "__reduce__" in namespace)
        if type(reduce) is MethodDescriptorType and id(reduce.__objclass__) not in _builtin_members:
            make, arguments, *state = reduce(error)
            _, _, *attributes = _state_of(error)
            # attributes are copied anyhow; other state would be set by what may be the user's code
            if type(make) is BuiltinFunctionType and {*map(id, state)} <= {id(None), *map(id, attributes)}:
                copy = make(*[self._value(argument) for argument in arguments])
                if type(copy) is cls and copy is not error:
                    return copy
        msg = "this class cannot be copied"
        raise TypeError(msg)

    def _fill(self, error: BaseException, copy: BaseException, recipe: _Recipe | None) -> None:
        """Give a copy, or without a recipe a stand-in, what the original has."""
        _, args, *rest = _state_of(error)
        attributes: dict[str, Any] = dict.copy(rest[0]) if rest else {}
        if recipe is None:
            notes = {name: value for name, value in attributes.items() if name == "__notes__"}
            attributes = _get_dict(copy) | notes
        else:
            _set_args(copy, tuple([self._value(value) for value in args]))
            self._fill_members(error, copy, recipe)
        if attributes:
            for name, value in attributes.items():
                is_notes = name == "__notes__" and issubclass(type(value), list)
                attributes[name] = list.copy(value) if is_notes else self._value(value)
            _set_dict(copy, attributes)
        cause = _get_cause(error)
        if cause is not None:
            _set_cause(copy, self._of(cause))
        _set_suppress(copy, _get_suppress(error))  # last, because setting a cause sets it

    def _fill_members(self, error: BaseException, copy: BaseException, recipe: _Recipe) -> None:
        for get, put, holds_none in recipe.members:
            try:
                value = get(error)
                if value is not None or holds_none:
                    put(copy, self._value(value))
            except AttributeError:  # unset; or read-only, and given to __new__ already
                continue

    def _value(self, value: object, depth: int = _CONTAINER_DEPTH) -> object:
        """Return a value as it is, but an error, or a plain container that holds one, as a copy."""
        # type() and issubclass(): isinstance() would ask the value's __class__, which may be a property
        kind = type(value)
        if kind is str:
            return value
        if issubclass(kind, BaseException):
            return self._of(cast("BaseException", value))
        if depth and (kind is dict or kind is list or kind is tuple):
            return self._container(value, depth - 1)
        return value

    def _container(self, value: object, depth: int) -> object:
        if type(value) is dict:
            whole = value.copy()  # in one step, so that keys and values belong together
            copies = self._items(list(whole.values()), depth)
            return dict(zip(whole, copies, strict=True)) if copies else value
        if type(value) is list:
            return self._items(value.copy(), depth) or value
        items = cast("tuple[object, ...]", value)
        return tuple(self._items(items, depth) or items)

    def _items(self, items: Sequence[object], depth: int) -> list[object] | None:
        """Return the items with errors copied, or None if there are none."""
        if len(items) > _LONG_CONTAINER and not issubclass(type(items[0]), BaseException):
            return None
        copies = [self._value(item, depth) for item in items]
        return None if all(map(operator.is_, copies, items)) else copies


def make_template(error: Exception) -> Exception:
    """Return a copy of the error that a flight's callable raised, to be copied for every caller that shares it.

    The template keeps no frames alive and is never raised. A note on it, and so on its copies, tells where the callable
    failed, which their own tracebacks do not show. Frames stay alive through errors that the error reaches only by
    objects that are not searched, such as the Future in tenacity's RetryError.

    Args:
        error: What the callable raised; it is left as it is.

    Returns:
        A copy, or a `SharedCallError` for an error that cannot be copied.
    """
    template = copy_error(error)
    innermost: TracebackType | None = _get_traceback(error)
    if innermost is None:
        return template
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code
    place = f'File "{code.co_filename}", line {innermost.tb_lineno}, in {code.co_qualname}'
    attributes = _get_dict(template)
    notes = attributes.setdefault("__notes__", [])
    if issubclass(type(notes), list):
        list.append(notes, f"shared from another caller's call, which failed here:\n  {place}")
    return template


def copy_error(template: Exception) -> Exception:
    """Return a fresh copy of a template, for one waiter or one hit to raise.

    Args:
        template: What `make_template` returned.

    Returns:
        A copy, or a `SharedCallError` for an error that cannot be copied.
    """
    try:
        return cast("Exception", _Copies().finished(template))
    except Exception:  # noqa: BLE001 - a caller must get an error of the flight, never one of the copying
        return stand_in(template)


def stand_in(error: BaseException) -> SharedCallError:
    """Return what replaces an error that cannot be copied."""
    if type(error) is SharedCallError:
        return SharedCallError(error.error_type, error.error_message)
    cls = type(error)
    name = _class_attribute(cls, "__qualname__")
    module = _class_attribute(cls, "__dict__").get("__module__")
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - __str__ is the user's
        message = "<its message cannot be read>"
    return SharedCallError(f"{module}.{name}" if type(module) is str else name, message)

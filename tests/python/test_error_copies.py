"""Copies of errors: faithful, made without the user's code, and safe to raise in many threads at once."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import inspect
import json
import pickle
import ssl
import subprocess
import sys
import threading
import traceback
import urllib.error
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Self

import anthropic
import httpx2
import openai
import pydantic
import pydantic_core
import pytest

from llm_batch_coalesce import CoalesceError, RecursiveCallError, SharedCallError, _copying
from llm_batch_coalesce._copying import copy_error, make_template

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REQUEST = httpx2.Request("POST", "https://llm.example/v1/chat")
BODY = {"error": {"message": "slow down", "type": "rate_limit_error"}, "code": "slow", "type": "rate"}
RESPONSE = httpx2.Response(429, request=REQUEST, json=BODY, headers={"x-request-id": "r1", "request-id": "r2"})


def caught(error: Exception) -> Exception:
    """Return the error as a caller of the failing function would catch it, with a traceback."""
    try:
        raise_it(error)
    except Exception as raised:
        return raised


def raise_it(error: BaseException) -> NoReturn:
    """Raise the error one frame further down."""
    raise error


def shared(error: Exception) -> Any:
    """Return what a waiter would raise."""
    return copy_error(make_template(error))


def attributes(error: BaseException) -> dict[str, Any]:
    """Return what a user sees on an error, without its dunder names and methods."""
    found = {}
    for name in dir(error):
        if not name.startswith("__") and hasattr(error, name) and not callable(getattr(error, name)):
            found[name] = getattr(error, name)
    return found


def assert_faithful(copied: BaseException, error: BaseException) -> None:
    """Fail unless a user could not tell the copy from the error."""
    assert copied is not error
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert repr(copied) == repr(error)
    assert copied.args == error.args
    assert attributes(copied) == attributes(error)
    assert vars(copied) == vars(error)


class StrictError(Exception):
    """An error that fights: it wants a keyword, refuses attributes, and counts what is called."""

    calls = 0

    def __new__(cls, *_args: object, code: int) -> Self:
        StrictError.calls += 1
        return super().__new__(cls, code)

    def __init__(self, message: str, *, code: int) -> None:
        StrictError.calls += 1
        super().__init__(message)
        vars(self)["_code"] = code

    def __setattr__(self, name: str, value: object) -> None:
        StrictError.calls += 1
        msg = f"{name} is read-only"
        raise TypeError(msg)

    def __reduce__(self) -> NoReturn:
        StrictError.calls += 1
        raise TypeError

    @property
    def code(self) -> int:
        return int(vars(self)["_code"])


class OwnInitError(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(errno.ENOENT, "gone", path)
        self.path = path


class SlottedError(Exception):
    __slots__ = ("__secret", "given", "never")

    def __init__(self, given: object) -> None:
        super().__init__(given)
        self.given = given
        self.__secret = "outer"

    def secret(self) -> str:
        return self.__secret


class MoreSlottedError(SlottedError):
    __slots__ = ("__secret", "nothing")

    def __init__(self, given: object) -> None:
        super().__init__(given)
        self.nothing = None
        self.__secret = "inner"

    def secrets(self) -> tuple[str, str]:
        return self.secret(), self.__secret


class RefusedErrors(ExceptionGroup[Exception]):
    """A group that is made in a way of its own, and counts that."""

    calls = 0

    def __new__(cls, errors: list[Exception], _code: int) -> Self:
        RefusedErrors.calls += 1
        return super().__new__(cls, "refused", errors)

    def __init__(self, errors: list[Exception], code: int) -> None:
        super().__init__(errors, code)  # type: ignore[arg-type]
        self.code = code

    def derive(self, excs: Any, /) -> RefusedErrors:  # type: ignore[override]
        return RefusedErrors(excs, self.code)


class BoxedError(Exception):
    """An error that holds whatever it is given."""

    def __init__(self, held: object) -> None:
        super().__init__("boxed")
        self.held = held


class HiddenError(Exception):
    """An error with state that nothing shows: its slot is gone from the class."""

    __slots__ = ("state",)


type.__delattr__(HiddenError, "state")


def sdk_errors() -> Iterator[Exception]:
    """Yield an error of each class that the SDKs raise for a status, and of those that are made in other ways."""
    for sdk in (openai, anthropic):
        for cls in tuple(vars(sdk).values()):
            if isinstance(cls, type) and issubclass(cls, openai.APIStatusError | anthropic.APIStatusError):
                if cls is openai.OAuthError:
                    yield openai.OAuthError(response=RESPONSE, body={"error": "invalid_grant"})
                else:
                    yield cls("slow down", response=RESPONSE, body=BODY)
        yield sdk.APIConnectionError(request=REQUEST)
        yield sdk.APITimeoutError(REQUEST)
        yield sdk.APIResponseValidationError(RESPONSE, body=None)
    yield openai.ContentFilterFinishReasonError()
    yield openai.OpenAIError("no key")
    yield anthropic.AnthropicError("no key")


BUILT_IN = [
    ValueError(),
    KeyError("key"),
    OSError("one argument"),
    OSError(errno.ENOENT, "gone", "from", None, "to"),
    BlockingIOError(errno.EAGAIN, "full", 7),
    OwnInitError("path"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad start"),
    UnicodeEncodeError("ascii", "ä", 0, 1, "too high"),
    UnicodeTranslateError("ä", 0, 1, "too high"),
    ImportError("cannot", name="module", path="path"),
    SyntaxError("bad", ("file.py", 3, 4, "x = = 1\n", 3, 5)),
    StopIteration("value"),
    AttributeError("no name", name="name", obj=REQUEST),
    NameError("no name", name="name"),
    MemoryError("much"),
    ssl.SSLCertVerificationError(1, "bad certificate"),
    json.JSONDecodeError("bad", "{", 1),
    subprocess.CalledProcessError(2, ["cmd"], b"out"),
    httpx2.HTTPStatusError("bad", request=REQUEST, response=RESPONSE),
    StrictError("strict", code=3),
    SlottedError("given"),
    MoreSlottedError("given"),
]


@pytest.mark.parametrize("error", BUILT_IN, ids=lambda error: type(error).__name__)
def test_a_copy_cannot_be_told_from_the_error(error: Exception) -> None:
    assert_faithful(shared(error), error)


@pytest.mark.parametrize("error", [*sdk_errors()], ids=lambda error: f"{type(error).__module__}.{type(error).__name__}")
def test_errors_of_the_sdks_copy_faithfully(error: Exception) -> None:
    copied = shared(error)
    assert_faithful(copied, error)
    assert all(value is vars(error)[name] for name, value in vars(copied).items())


def test_a_copy_has_no_traceback_and_no_context() -> None:
    error = caught(ValueError())
    error.__context__ = caught(KeyError())
    for copied in (make_template(error), shared(error)):
        assert copied.__traceback__ is None
        assert copied.__context__ is None


def test_every_copy_is_an_object_of_its_own() -> None:
    template = make_template(BoxedError("value"))
    copies = [copy_error(template) for _ in range(3)]
    assert len({id(copied) for copied in [template, *copies]}) == 4
    copies[0].held = "changed"  # type: ignore[attr-defined]
    assert attributes(copies[1]) == attributes(template) == {"args": ("boxed",), "held": "value"}


def test_no_code_of_the_class_runs() -> None:
    error = StrictError("strict", code=3)
    before = StrictError.calls
    assert shared(error).code == 3
    assert StrictError.calls == before


def test_attribute_hooks_and_metaclasses_are_not_asked() -> None:
    class Meta(type):
        __hash__ = None  # type: ignore[assignment]

        def __getattribute__(cls, name: str) -> NoReturn:
            raise RuntimeError(name)

    class HostileError(Exception, metaclass=Meta):
        def __getattribute__(self, name: str) -> NoReturn:
            raise RuntimeError(name)

    class Proxy:
        @property  # type: ignore[misc]
        def __class__(self) -> NoReturn:  # type: ignore[override]
            raise RuntimeError

    copied = shared(HostileError(Proxy()))
    assert type(copied) is HostileError
    assert type(BaseException.__reduce__(copied)[1][0]) is Proxy


def test_values_are_shared_but_not_the_dict() -> None:
    value = {"a": [1, ("b",)]}
    error = BoxedError(value)
    copied = shared(error)
    assert copied.held is value
    assert vars(copied) is not vars(error)


def test_slots_keep_what_is_private_none_and_unset() -> None:
    copied = shared(MoreSlottedError("given"))
    assert copied.secrets() == ("outer", "inner")
    assert copied.nothing is None
    assert not hasattr(copied, "never")


def test_the_list_of_notes_is_copied() -> None:
    error = ValueError()
    error.add_note("first")
    template = make_template(error)
    copied = copy_error(template)
    copied.add_note("second")
    assert copied.__notes__ == ["first", "second"]
    assert template.__notes__ == error.__notes__ == ["first"]


@pytest.mark.parametrize("notes", [("a", "b"), "text", None, MappingProxyType({})])
def test_notes_that_are_no_list_stay_as_they_are(notes: object) -> None:
    error = ValueError()
    error.__notes__ = notes  # type: ignore[assignment]
    assert shared(caught(error)).__notes__ is notes


def test_a_note_tells_the_innermost_place_of_failure() -> None:
    def innermost() -> NoReturn:
        raise ValueError

    with pytest.raises(ValueError, match=r"^$") as info:
        innermost()
    (note,) = shared(info.value).__notes__
    line = innermost.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in {innermost.__qualname__}' in note
    assert "shared from another caller's call" in note
    assert not hasattr(info.value, "__notes__")


def test_an_error_that_was_never_raised_gets_no_note() -> None:
    assert not hasattr(shared(ValueError()), "__notes__")


@pytest.mark.parametrize("cause", [None, KeyError("cause")])
@pytest.mark.parametrize("suppress", [True, False])
def test_a_copy_has_a_copied_cause_and_the_same_suppression(cause: Exception | None, *, suppress: bool) -> None:
    error = ValueError()
    error.__cause__ = caught(cause) if cause else None
    error.__suppress_context__ = suppress
    copied = shared(error)
    assert copied.__suppress_context__ is suppress
    if cause is None:
        assert copied.__cause__ is None
    else:
        assert_faithful(copied.__cause__, cause)
        assert copied.__cause__.__traceback__ is None


def test_a_cause_may_be_no_exception_but_a_base_exception() -> None:
    error = ValueError()
    error.__cause__ = KeyboardInterrupt("stop")
    assert_faithful(shared(error).__cause__, error.__cause__)


def test_circles_keep_their_shape() -> None:
    member = ValueError("member")
    group = ExceptionGroup("group", [member])
    member.__cause__ = group
    held = BoxedError(group)
    group.__cause__ = held
    held.held = (held, member)
    copied = shared(group)
    assert copied is not group
    assert copied.exceptions[0].__cause__ is copied
    assert copied.__cause__.held == (copied.__cause__, copied.exceptions[0])
    assert copied.__cause__ is not held


def test_depth_does_not_matter() -> None:
    depth = 5_000
    error: Exception = ValueError(0)
    for level in range(depth):
        outer = ValueError(level) if level % 2 else ExceptionGroup(str(level), [error])
        outer.__cause__ = error if level % 2 else None
        error = outer
    copied = shared(error)
    for _ in range(depth):
        copied = copied.__cause__ or copied.exceptions[0]
    assert copied.args == (0,)

    group: Exception = ValueError("innermost")
    for level in range(depth):
        group = ExceptionGroup(str(level), [group])
    copied = shared(group)
    for _ in range(depth):
        copied = copied.exceptions[0]
    assert copied.args == ("innermost",)


def test_the_members_of_a_group_are_copied_once_each() -> None:
    inner = ExceptionGroup("inner", [caught(KeyError("a")), caught(OSError("b"))])
    group = ExceptionGroup("outer", [inner, inner.exceptions[0], inner])
    copied = shared(group)
    assert type(copied) is ExceptionGroup
    assert repr(copied) == repr(group)
    first, second, third = copied.exceptions
    assert first is third is not inner
    assert first.exceptions[0] is second is not inner.exceptions[0]
    assert first.exceptions[1].__traceback__ is None
    assert copied.args == ("outer", [first, second, third])


def test_a_group_with_a_new_and_a_derive_of_its_own_can_be_split() -> None:
    group = RefusedErrors([ValueError("a"), KeyError("b")], 403)
    calls = RefusedErrors.calls
    copied = shared(group)
    assert RefusedErrors.calls == calls
    assert (type(copied), copied.code, copied.message) == (RefusedErrors, 403, "refused")
    match, rest = copied.split(KeyError)
    assert (repr(match.exceptions), repr(rest.exceptions)) == ("(KeyError('b'),)", "(ValueError('a'),)")
    assert (type(match), match.code) == (RefusedErrors, 403)


HOLDERS: dict[str, Callable[[Exception], Exception]] = {
    "itself": lambda error: error,
    "args": ValueError,
    "attribute": BoxedError,
    "slot": SlottedError,
    "member": StopIteration,
    "list": lambda error: BoxedError([1, error]),
    "long list": lambda error: BoxedError([error] * 1_000),
    "dicts": lambda error: BoxedError({"a": {"b": (error,)}}),
    "group": lambda error: ExceptionGroup("group", [error]),
    "URLError": urllib.error.URLError,
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_a_template_keeps_no_frames_alive(holder: Callable[[Exception], Exception]) -> None:
    class Local:
        pass

    def fail() -> tuple[weakref.ref[Local], Exception]:
        local = Local()
        return weakref.ref(local), make_template(caught(holder(caught(ValueError("held")))))

    frame_is_alive, template = fail()
    gc.collect()
    assert frame_is_alive() is None
    assert "held" in repr(vars(template)) + repr(template) + repr(attributes(template))


def test_an_error_held_twice_has_one_copy() -> None:
    reason = caught(TimeoutError("slow"))
    error = urllib.error.URLError(reason)
    error.__cause__ = reason
    copied = shared(error)
    assert copied.reason is copied.args[0] is copied.__cause__ is not reason
    assert str(copied) == str(error)


def test_a_long_list_of_data_is_not_searched() -> None:
    held = [0, *[ValueError()] * 1_000]
    assert shared(BoxedError(held)).held is held


def test_a_validation_error_is_rebuilt_without_the_frames_of_its_validator() -> None:
    class Local:
        pass

    alive: list[weakref.ref[Local]] = []

    def refuse(_number: int) -> NoReturn:
        local = Local()
        alive.append(weakref.ref(local))
        msg = "negative"
        raise ValueError(msg)

    # no local may keep the original: its frames would hold it in a circle that older pydantic-core does not show to gc
    try:
        pydantic.TypeAdapter(Annotated[int, pydantic.AfterValidator(refuse)]).validate_python(-1)
    except pydantic.ValidationError as error:
        template = make_template(error)
        shown = str(error), repr(error), repr(error.errors())
    gc.collect()
    assert alive[0]() is None
    copied: Any = copy_error(template)
    assert type(copied) is pydantic.ValidationError
    assert (str(copied), repr(copied), repr(copied.errors())) == shown
    assert len(copied.__notes__) == 1


def test_an_error_of_an_extension_module_that_cannot_be_copied_is_replaced() -> None:
    error = pydantic_core.PydanticCustomError("kind", "no {what}", {"what": "copy"})
    error.add_note("first")
    cause = caught(KeyError("cause"))
    error.__cause__ = cause
    copied = shared(caught(error))
    assert type(copied) is SharedCallError
    assert copied.error_type == "pydantic_core._pydantic_core.PydanticCustomError"
    assert copied.error_message == str(error)
    assert copied.__notes__[0] == "first"
    assert len(copied.__notes__) == 2
    copied_cause: Any = copied.__cause__
    assert_faithful(copied_cause, cause)
    assert copied_cause.__traceback__ is None


def test_an_error_with_hidden_state_is_replaced() -> None:
    copied = shared(HiddenError("message"))
    assert type(copied) is SharedCallError
    assert copied.error_type == f"{__name__}.HiddenError"
    assert copied.error_message == "message"


def test_a_reduce_of_the_users_is_not_asked() -> None:
    asked = []

    class ReducibleError(HiddenError):
        def __reduce__(self) -> NoReturn:
            asked.append(self)
            raise NotImplementedError

    assert type(shared(ReducibleError())) is SharedCallError
    assert not asked


def test_only_the_cause_or_member_that_cannot_be_copied_is_replaced() -> None:
    group = ExceptionGroup("group", [HiddenError("member")])
    group.__cause__ = HiddenError("cause")
    copied = shared(group)
    assert type(copied) is ExceptionGroup
    assert [type(copied.exceptions[0]), type(copied.__cause__)] == [SharedCallError] * 2


def test_a_message_that_raises_is_tolerated() -> None:
    class UnreadableError(HiddenError):
        def __str__(self) -> str:
            raise RuntimeError

    copied = shared(UnreadableError())
    assert (type(copied), copied.error_message) == (SharedCallError, "<its message cannot be read>")


def test_a_keyboard_interrupt_passes_through() -> None:
    class InterruptingError(HiddenError):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_error(InterruptingError())


def test_whatever_goes_wrong_while_copying_the_caller_gets_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_error: BaseException) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(_copying, "_get_cause", fail)
    assert str(shared(ValueError("message"))) == "the shared call raised ValueError: message"


@pytest.mark.skipif(
    sys.version_info[:2] == (3, 13) and "free-threading" in sys.version,
    reason="free-threaded 3.13 keeps classes for ever once a second thread has run",
)
@pytest.mark.parametrize("slots", [(), ("slot",)])
def test_copying_keeps_no_class_alive(slots: tuple[str, ...]) -> None:
    cls = type("Passing", (Exception,), {"__slots__": slots})
    assert type(shared(cls())) is cls
    is_alive = weakref.ref(cls)
    del cls
    # A free-threaded build may need more than one.
    for _ in range(5):
        gc.collect()
    assert is_alive() is None


def test_the_original_is_left_as_it_is() -> None:
    error = caught(BoxedError(["value"]))
    error.add_note("note")
    before, state = error.__traceback__, dict(vars(error))
    make_template(error)
    assert error.__traceback__ is before
    assert vars(error) == state
    assert error.__notes__ == ["note"]


def test_the_stand_in_can_be_copied_in_every_way() -> None:
    error = SharedCallError("package.SomeError", "message")
    for copied in (copy.copy(error), pickle.loads(pickle.dumps(error)), shared(error)):
        assert_faithful(copied, error)
        assert (copied.error_type, copied.error_message) == ("package.SomeError", "message")
    assert str(error) == "the shared call raised package.SomeError: message"
    assert str(SharedCallError("package.SomeError", "")) == "the shared call raised package.SomeError"


def test_the_errors_of_the_package_have_one_base_and_public_names() -> None:
    assert issubclass(RecursiveCallError, CoalesceError)
    assert issubclass(RecursiveCallError, RuntimeError)
    assert issubclass(SharedCallError, CoalesceError)
    for cls in (CoalesceError, RecursiveCallError, SharedCallError):
        assert cls.__module__ == "llm_batch_coalesce"
        assert pickle.loads(pickle.dumps(cls)) is cls


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work` in that many threads, which start together, and raise what it raises."""
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        work(number)

    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(run, number) for number in range(count)]:
            done.result()


def test_many_threads_raise_copies_of_one_template_at_once() -> None:
    error = ExceptionGroup("group", [BoxedError("member"), OSError(errno.ENOENT, "gone", "path")])
    error.__cause__ = MoreSlottedError("cause")
    template = make_template(caught(error))

    def raise_copies(number: int) -> None:
        for turn in range(2_000):
            copied = copy_error(template)
            assert isinstance(copied, ExceptionGroup)
            copied.add_note(f"thread {number}, turn {turn}")
            for own in filter(None, (copied, copied.__cause__, *copied.exceptions)):
                with contextlib.suppress(Exception):
                    raise_it(own)
                frames = [frame for frame, _ in traceback.walk_tb(own.__traceback__)]
                assert [frame.f_code for frame in frames] == [raise_copies.__code__, raise_it.__code__]
                assert frames[0] is inspect.currentframe()
                assert frames[1].f_back is frames[0]
            assert len(copied.__notes__) == 2
            assert repr(copied) == repr(error)

    in_threads(16, raise_copies)
    assert len(template.__notes__) == 1
    assert template.__traceback__ is None


def test_many_threads_copy_errors_of_classes_that_come_and_go() -> None:
    def copy_new_classes(number: int) -> None:
        for turn in range(200):
            cls = type(f"Passing{number}", (ValueError,), {"turn": turn})
            copied = shared(cls(turn))
            assert (type(copied), copied.turn, copied.args) == (cls, turn, (turn,))

    in_threads(16, copy_new_classes)

"""Read by mypy, never run: a decorated function is called as before, and has what `coalesced` adds."""

from collections.abc import Coroutine, Hashable
from typing import Any, TypeVar, assert_type

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

threads = BatchCoalescer()
tasks = AsyncBatchCoalescer()
T = TypeVar("T")


@threads.coalesced()
def define(term: str, /, language: str = "en", *, loud: bool = False) -> int:
    return len(term + language) + loud


@threads.coalesced()
async def define_async(term: str) -> bytes:
    return term.encode()


@tasks.coalesced(key=lambda term: term.lower())
def define_on_the_async_coalescer(term: str) -> str:
    return term


@tasks.coalesced()
async def define_on_its_own_coalescer(term: str) -> str:
    return term


@threads.coalesced()
def first(items: tuple[T, ...]) -> T:
    return items[0]


async def functions() -> None:
    assert_type(define("alpha", "de", loud=True), int)
    define(5)  # type: ignore[arg-type]
    define("alpha", quiet=True)  # type: ignore[call-arg]
    assert_type(define.coalescer, BatchCoalescer)
    assert_type(define.key_for("alpha", loud=True), Hashable)
    assert_type(define.forget("alpha"), bool)
    assert_type(define.__wrapped__("alpha"), int)
    assert_type(define.__name__, str)
    define.forget()  # type: ignore[call-arg]
    define.key_for(5)  # type: ignore[arg-type]

    pending: Coroutine[Any, Any, bytes] = define_async("alpha")
    assert_type(await pending, bytes)
    assert_type(define_async.coalescer, AsyncBatchCoalescer)
    assert_type(define_async.forget("alpha"), bool)

    assert_type(define_on_the_async_coalescer("alpha"), str)
    assert_type(define_on_the_async_coalescer.coalescer, BatchCoalescer)
    assert_type(await define_on_its_own_coalescer("alpha"), str)
    assert_type(define_on_its_own_coalescer.coalescer, AsyncBatchCoalescer)

    assert_type(first((1, 2)), int)
    assert_type(first(("text",)), str)


class Client:
    @threads.coalesced()
    def ask(self, question: str, *, loud: bool = False) -> int:
        return len(question) + loud

    @tasks.coalesced()
    async def ask_async(self, question: str) -> list[str]:
        return [question]

    @classmethod
    @threads.coalesced()
    def of_class(cls, question: str) -> int:
        return len(question)

    @staticmethod
    @threads.coalesced()
    def of_nobody(question: str) -> int:
        return len(question)


async def methods(client: Client) -> None:
    assert_type(client.ask("?", loud=True), int)
    client.ask(5)  # type: ignore[call-overload]
    client.ask("?", quiet=True)  # type: ignore[call-overload]
    assert_type(client.ask.coalescer, BatchCoalescer)
    assert_type(client.ask.forget(client, "?"), bool)
    assert_type(client.ask.key_for(client, "?", loud=True), Hashable)
    client.ask.forget("?")  # type: ignore[arg-type, call-arg]
    assert_type(await client.ask_async("?"), list[str])
    assert_type(client.ask_async.coalescer, AsyncBatchCoalescer)
    assert_type(client.ask.__wrapped__(client, "?"), int)

    assert_type(Client.ask(client, "?"), int)
    Client.ask(client)  # type: ignore[call-overload]
    assert_type(Client.ask.forget(client, "?"), bool)
    assert_type(Client.of_class("?"), int)
    assert_type(client.of_class("?"), int)
    assert_type(Client.of_nobody("?"), int)
    assert_type(client.of_nobody("?"), int)


class Subclass(Client):
    pass


def inherited(client: Subclass) -> None:
    assert_type(client.ask("?"), int)
    assert_type(client.ask.forget(client, "?"), bool)


def misused() -> None:
    threads.coalesced("k")  # type: ignore[arg-type]
    threads.coalesced()(5)  # type: ignore[arg-type]
    threads.coalesced(key=lambda term: [term])  # type: ignore[arg-type, return-value]

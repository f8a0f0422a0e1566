"""A fleet in use: roles, counters, peeking, forgetting, namespaces and databases, and the decorator."""

import pytest
from fleets import KEPT, KINDS
from loops import wait_until

from llm_batch_coalesce import Outcome, RecursiveCallError
from llm_batch_coalesce.httpx import AsyncCoalescingTransport, CoalescingTransport
from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer, FleetStats

both_kinds = pytest.mark.parametrize("kind", KINDS)


@both_kinds
def test_roles_are_those_in_the_fleet(fleet, kind):
    leader, waiter, late = (fleet.member(kind, ttl_seconds=60) for _ in range(3))
    led = leader.ask("k", value="v", hold=True, callers=3, how="outcome").wait_for_call()
    waits = waiter.ask("k", callers=3, how="outcome")
    fleet.wait_for_waiting(1)
    for member in [leader, waiter]:
        wait_until(lambda member=member: member.do("flights")[0].waiters == 2)
    led.release()
    assert sorted(outcome.role for outcome in led.results()) == ["leader", "waiter", "waiter"]
    assert [outcome.role for outcome in waits.results()] == ["waiter"] * 3
    assert late.ask("k", how="outcome").result().role == "hit"
    took = led.results()[0].duration_seconds
    assert all(abs(outcome.duration_seconds - took) < 1e-4 for outcome in waits.results())
    for member in [leader, waiter, late]:
        outcome = member.ask("k", how="outcome").result()
        assert type(outcome) is Outcome
        assert (outcome.value, outcome.role) == ("v", "hit")
        assert abs(outcome.duration_seconds - took) < 1e-4
    stats = [member.do("stats") for member in [leader, waiter, late]]
    assert [type(each) for each in stats] == [FleetStats] * 3
    counted = ["calls", "joined", "hits", "errors", "timeouts", "fleet_joined", "fleet_hits", "retained", "in_flight"]
    assert [[getattr(each, name) for name in counted] for each in stats] == [
        [1, 2, 1, 0, 0, 0, 0, 1, 0],
        [0, 3, 1, 0, 0, 1, 0, 1, 0],
        [0, 0, 2, 0, 0, 0, 1, 1, 0],
    ]
    late.do("reset_stats")
    assert [getattr(late.do("stats"), name) for name in counted] == [0, 0, 0, 0, 0, 0, 0, 1, 0]


@both_kinds
def test_errors_are_counted_where_the_call_was_made(fleet, kind):
    leader, waiter, late = (fleet.member(kind, ttl_seconds=60, private_errors=KeyError) for _ in range(3))
    led = leader.ask("k", error=ValueError(), hold=True).wait_for_call()
    waits = waiter.ask("k", callers=2)
    fleet.wait_for_waiting(1)
    wait_until(lambda: waiter.do("flights")[0].waiters == 1)
    led.release()
    # One after the other, since who comes before it has landed waits for it.
    for ask in [lambda: led, lambda: waits, lambda: late.ask("k"), lambda: leader.ask("private", error=KeyError())]:
        assert all(isinstance(error, Exception) for error in ask().results())
    counted = ["calls", "joined", "hits", "errors", "fleet_joined", "fleet_hits"]
    assert [[getattr(member.do("stats"), name) for name in counted] for member in [leader, waiter, late]] == [
        [2, 0, 0, 2, 0, 0],
        [0, 2, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1],
    ]


@both_kinds
def test_peek_shows_what_is_retained_and_never_calls(fleet, kind):
    one, other = fleet.member(kind, ttl_seconds=60), fleet.member(kind)
    assert other.do("peek", "k") is None
    assert other.do("peek", "k", "default") == "default"
    led = one.ask("k", value=[1], hold=True).wait_for_call()
    assert [member.do("peek", "k", "default") for member in [one, other]] == ["default"] * 2
    led.release()
    led.result()
    assert [member.do("peek", "k", "default") for member in [one, other]] == [[1]] * 2
    assert one.do("peek", "k") is led.result()
    one.ask("error", error=ValueError()).results()
    one.ask("refused", value=(1,)).result()
    for key in ["error", "refused", "unknown"]:
        assert [member.do("peek", key, "default") for member in [one, other]] == ["default"] * 2
    assert (other.do("stats").calls, other.do("stats").backend_errors) == (0, 0)


@both_kinds
def test_what_is_forgotten_is_forgotten_everywhere(fleet, kind):
    one, other, third = members = [fleet.member(each, ttl_seconds=60) for each in [kind, *KINDS]]
    for member in members:
        assert member.get("k", "old") == member.get("kept", "kept") == member.get("k", "x") or True
    assert one.do("forget", "k") is True
    for member in members:
        wait_until(lambda member=member: not member.do("__contains__", "k"))
        assert member.do("__contains__", "kept")
    assert one.do("forget", "k") is False
    assert third.get("k", "new") == "new"
    assert other.get("k") == one.get("k") == "new"
    assert other.do("forget", "never seen") is False


@both_kinds
def test_a_forgotten_flight_serves_its_waiters_and_nobody_else(fleet, kind):
    one, other, third = (fleet.member(each, ttl_seconds=60, lease_seconds=KEPT) for each in [kind, *KINDS])
    old = one.ask("k", value="old", hold=True).wait_for_call()
    waits = other.ask("k", value="of a waiter")
    fleet.wait_for_waiting(1)
    assert third.do("forget", "k") is True
    for member in [one, other]:
        wait_until(lambda member=member: not member.do("__contains__", "k"))
    new = third.ask("k", value="new", hold=True).wait_for_call()
    late = other.ask("k", value="late")
    fleet.wait_for_waiting(1, flights=2)
    # Its lease is renewed, and its waiters stay with it.
    wait_until(lambda: other.do("flights")[0].age_seconds > 2 * KEPT)
    old.release()
    assert [old.result(), waits.result()] == ["old"] * 2
    assert not late.done()
    assert [member.do("peek", "k", "nothing") for member in [one, other, third]] == ["nothing"] * 3
    new.release()
    assert [new.result(), late.result(), one.get("k"), other.get("k")] == ["new"] * 4
    assert (waits.calls, late.calls) == (0, 0)


@both_kinds
def test_a_flight_that_was_forgotten_after_it_was_handed_over(fleet, kind):
    options = {"lease_seconds": KEPT, "private_errors": KeyError, "ttl_seconds": 60}
    one, other, third = (fleet.member(each, **options) for each in [*KINDS, kind])
    first = one.ask("k", error=KeyError(), hold=True).wait_for_call()
    second = other.ask("k", value="old", hold=True)
    fleet.wait_for_waiting(1)
    first.release()
    second.wait_for_call()
    waits = third.ask("k", value="of a waiter")
    fleet.wait_for_waiting(1)
    assert one.do("forget", "k") is True
    wait_until(lambda: third.do("flights")[0].age_seconds > 2 * KEPT)
    second.release()
    assert [second.result(), waits.result(), waits.calls] == ["old", "old", 0]
    assert one.get("k", "new") == "new"


@pytest.mark.parametrize("error", [KeyError(), None], ids=["that then gives up", "that then completes"])
def test_forgetting_under_a_leader_in_the_same_process(fleet, error):
    member = fleet.member(private_errors=KeyError, ttl_seconds=60)
    old = member.ask("k", value="old", error=error, hold=True).wait_for_call()
    behind = member.ask("k", value="behind")
    wait_until(lambda: member.do("flights")[0].waiters == 1)
    assert member.do("forget", "k") is True
    new = member.ask("k", value="new", hold=True).wait_for_call()
    old.release()
    assert old.results()[0] == ("old" if error is None else error)
    if error is None:
        assert behind.result() == "old"
    new.release()
    assert new.result() == "new"
    behind.results()


@both_kinds
def test_namespaces_and_databases_share_nothing(fleet, kind):
    options = {"ttl_seconds": 60, "lease_seconds": 10}
    members = [
        fleet.member(kind, **options),
        fleet.member(kind, namespace=f"{fleet.namespace}2", **options),
        fleet.member(kind, namespace=f"{fleet.namespace}:0", **options),
        fleet.member(kind, database=1, **options),
    ]
    held = [member.ask("k", value=number, hold=True).wait_for_call() for number, member in enumerate(members)]
    channels = fleet.client.pubsub_channels(f"{fleet.namespace}*:all")
    assert len(channels) == 4
    assert {subscribers for _, subscribers in fleet.client.pubsub_numsub(*channels)} == {1}
    for each in held:
        each.release()
    assert [each.result() for each in held] == [0, 1, 2, 3]
    assert members[0].do("forget", "k") is True
    wait_until(lambda: not members[0].do("__contains__", "k"))
    # Its own message has come, and so all messages have.
    assert [member.do("__contains__", "k") for member in members] == [False, True, True, True]
    assert [member.do("peek", "k") for member in members] == [None, 1, 2, 3]
    assert len(fleet.names(0)) == 2
    assert len(fleet.names(1)) == 1


def describe(term, *, length=1):
    return f"{term} {length}"


async def describe_in_task(term, *, length=1):
    return f"{term} {length}"


@both_kinds
def test_decorated_functions_share_calls(fleet, kind):
    calls = []
    if kind == "threads":

        def function(term, *, length=1):
            calls.append(term)
            return [term, length]
    else:

        async def function(term, *, length=1):
            calls.append(term)
            return [term, length]

    # The same name in every process, and so in both members of this one.
    key = lambda term, length=1: ("describe", term, length)  # noqa: E731
    one, other = (fleet.member(kind, ttl_seconds=60) for _ in range(2))

    def decorate(member):
        member.coalescer.decorated = member.coalescer.coalesced(key)(function)
        assert member.coalescer.decorated.coalescer is member.coalescer

    def do(member, method, *args, **kwargs):
        def work():
            found = member.coalescer.decorated
            return (getattr(found, method) if method else found)(*args, **kwargs)

        if kind == "threads":
            return work()

        async def run():
            return await work()

        return member.loop.start(run()).result()

    for member in [one, other]:
        decorate(member)
    assert do(one, "", "alpha") == do(other, "", "alpha", length=1) == do(other, "", "alpha") == ["alpha", 1]
    assert calls == ["alpha"]
    assert do(other, "forget", "alpha") is True
    wait_until(lambda: not one.do("__contains__", key("alpha")))
    assert do(one, "", "alpha") == ["alpha", 1]
    assert calls == ["alpha"] * 2


def test_the_default_key_of_a_decorated_function_is_the_same_in_every_process(fleet):
    first, second = (fleet.member(ttl_seconds=60).coalescer for _ in range(2))
    one, other = first.coalesced()(describe), second.coalesced()(describe)
    assert one("alpha") == other(term="alpha", length=1) == "alpha 1"
    assert second.stats().fleet_hits == 1
    assert one.key_for("alpha") == other.key_for("alpha") == (__name__, "describe", ("alpha", 1))
    with pytest.raises(TypeError, match="key_encoder"):
        one(object())


def test_functions_of_the_other_kind_are_not_decorated(fleet):
    threads, tasks = fleet.member(), fleet.member("tasks")
    with pytest.raises(TypeError, match="DistributedBatchCoalescer decorates plain functions only"):
        threads.coalescer.coalesced()(describe_in_task)
    with pytest.raises(TypeError, match="AsyncDistributedBatchCoalescer decorates coroutine functions only"):
        tasks.coalescer.coalesced()(describe)


@both_kinds
def test_a_coalescer_shows_what_it_is(fleet, kind):
    member = fleet.member(kind, name="terms", ttl_seconds=60, max_retained=2)
    cls = DistributedBatchCoalescer if kind == "threads" else AsyncDistributedBatchCoalescer
    assert member.coalescer.name == "terms"
    assert bool(member.coalescer)
    assert len(member.coalescer) == 0
    assert "k" not in member.coalescer
    member.get("k", "value")
    assert "k" in member.coalescer
    assert len(member.coalescer) == 1
    shown = repr(member.coalescer)
    assert shown.startswith(f"<{cls.__name__} 'terms' ttl_seconds=60.0 ")
    assert " calls=1 " in shown
    for number in range(100):
        member.get(number)
    assert member.do("stats").evicted > 0
    assert fleet.member(kind).get("k") == "value", "the server keeps what the process does not"


@both_kinds
def test_a_call_may_ask_for_other_keys(fleet, kind):
    member = fleet.member(kind)
    if kind == "threads":
        inner = lambda: member.coalescer.get_or_call("inner", lambda: 1)  # noqa: E731
        recursive = lambda: member.coalescer.get_or_call("k", lambda: 1)  # noqa: E731
    else:

        async def one():
            return 1

        inner = lambda: member.coalescer.get_or_call("inner", one)  # noqa: E731
        recursive = lambda: member.coalescer.get_or_call("k", one)  # noqa: E731

    assert member.do("get_or_call", "outer", inner) == 1
    other = fleet.member(kind)
    with pytest.raises(RecursiveCallError, match="asks for the same key"):
        member.do("get_or_call", "k", recursive)
    # Of no concern to others.
    assert other.get("k", "value") == "value"


@both_kinds
def test_what_a_fleet_cannot_do_is_not_there(fleet, kind):
    coalescer = fleet.member(kind).coalescer
    absent = ["as_async", "as_sync", "stream", "get_or_call_many", "warm", "put", "cancel", "clear"]
    assert [name for name in absent if hasattr(coalescer, name)] == []
    for transport in [CoalescingTransport, AsyncCoalescingTransport]:
        with pytest.raises(TypeError, match=r"coalescer must be an? (Async)?BatchCoalescer, not <"):
            transport(coalescer=coalescer)

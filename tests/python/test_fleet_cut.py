"""Commands of a fleet whose connection is cut: unheard or heard, they are sent once more and come out right."""

import contextlib
import functools
import gc
import socket
import threading

import pytest
from fleet_proxy import Proxy
from fleets import HOST, KEPT, KINDS
from loops import PATIENCE, wait_until

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce.redis import RemoteCallError

# On its way to the server, or with the answer, when it has been done.
heard_or_not = pytest.mark.parametrize("heard", [False, True], ids=["unheard", "heard"])


@pytest.fixture
def behind(behind):
    # It is cuts that are tested, and nothing that is slow.
    return functools.partial(behind, backend_timeout_seconds=10.0)


@pytest.fixture
def cut(fleet, proxy):
    """Have the connection cut of those that run a script next, which the server knows; returns what waits for that."""

    def cut(script, *, heard, times=1):
        fleet.client.script_load(script)
        proxy.cut_scripts(script, heard=heard, times=times)
        return proxy.wait_for_cuts

    return cut


def troubles(*members):
    """Return what members count of trouble: backend errors, and leases that they have lost."""
    stats = [member.coalescer.stats() for member in members]
    return [(each.backend_errors, each.leases_lost) for each in stats]


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_a_claim_that_is_cut_leads_all_the_same(fleet, behind, cut, kind, heard):
    first, second = behind(kind), fleet.member(kind)
    assert first.get("before", 0) == 0
    wait_for_cut = cut(scripts.CLAIM, heard=heard)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    wait_for_cut()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    leads.release()
    assert (leads.result(), waits.result(), leads.calls, waits.calls) == (1, 1, 1, 0)
    assert troubles(first, second) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_a_claim_that_takes_over_and_is_cut_leads_all_the_same(fleet, behind, cut, kind, heard):
    options = {"private_errors": KeyError}
    first, second = fleet.member(kind, **options), behind(kind, **options)
    leads = first.ask("k", error=KeyError("of one caller"), hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    wait_for_cut = cut(scripts.CLAIM, heard=heard)
    leads.release()
    wait_for_cut()
    assert (waits.result(), waits.calls) == (2, 1)
    with pytest.raises(KeyError, match="of one caller"):
        leads.result()


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_a_claim_that_is_cut_waits_all_the_same(fleet, behind, cut, kind, heard):
    first, second = fleet.member(kind), behind(kind)
    assert second.get("before", 0) == 0
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    wait_for_cut = cut(scripts.CLAIM, heard=heard)
    waits = second.ask("k", callers=3, value=2)
    wait_for_cut()
    fleet.wait_for_waiting()
    leads.release()
    assert (leads.result(), waits.results(), leads.calls, waits.calls) == (1, [1] * 3, 1, 0)
    assert troubles(first, second) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_a_claim_that_is_cut_finds_what_is_retained_all_the_same(fleet, behind, cut, kind, heard):
    first, second = fleet.member(kind, ttl_seconds=600), behind(kind)
    assert (first.get("k", 1), second.get("before", 0)) == (1, 0)
    wait_for_cut = cut(scripts.CLAIM, heard=heard)
    finds = second.ask("k", value=2)
    assert (finds.result(), finds.calls) == (1, 0)
    wait_for_cut()
    assert troubles(first, second) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
@pytest.mark.parametrize("ttl_seconds", [600, 0], ids=["retained", "not retained"])
def test_a_completion_that_is_cut_serves_those_that_wait(fleet, behind, cut, *, kind, heard, ttl_seconds):
    options = {"ttl_seconds": ttl_seconds}
    first, second, third = behind(kind, **options), fleet.member(kind, **options), fleet.member(kind, **options)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", callers=3, value=2)
    fleet.wait_for_waiting()
    # What is not retained serves those only who are there by now.
    wait_until(lambda: [flight.waiters for flight in second.do("flights")] == [2])
    wait_for_cut = cut(scripts.COMPLETE, heard=heard)
    leads.release()
    assert (leads.result(), waits.results(), leads.calls, waits.calls) == (1, [1] * 3, 1, 0)
    wait_for_cut()
    assert troubles(first, second) == [(0, 0), (0, 0)]
    expected = 1 if ttl_seconds else 3
    assert [third.get("k", 3), first.get("k", 3)] == [expected] * 2


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_an_error_whose_completion_is_cut_reaches_those_that_wait(fleet, behind, cut, kind, heard):
    first, second = behind(kind), fleet.member(kind)
    leads = first.ask("k", error=KeyError("gone"), hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    wait_for_cut = cut(scripts.COMPLETE, heard=heard)
    leads.release()
    with pytest.raises(KeyError, match="gone"):
        leads.result()
    with pytest.raises(RemoteCallError, match="gone"):
        waits.result()
    wait_for_cut()
    assert (leads.calls, waits.calls) == (1, 0)
    assert troubles(first, second) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_a_renewal_that_is_cut_keeps_the_lease(fleet, behind, cut, kind, heard):
    first, second = behind(kind, lease_seconds=1.0), fleet.member(kind)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    wait_for_cut = cut(scripts.RENEW, heard=heard)
    wait_for_cut()
    leads.release()
    assert (leads.result(), waits.result(), leads.calls, waits.calls) == (1, 1, 1, 0)
    assert troubles(first, second) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_a_release_that_is_cut_hands_the_call_to_one_of_those_that_wait(fleet, behind, cut, kind, heard):
    options = {"private_errors": KeyError}
    first, others = behind(kind, **options), [fleet.member(kind, **options) for _ in range(2)]
    leads = first.ask("k", error=KeyError("of one caller"), hold=True).wait_for_call()
    waiting = [member.ask("k", value=2) for member in others]
    fleet.wait_for_waiting(2)
    wait_for_cut = cut(scripts.RELEASE, heard=heard)
    leads.release()
    with pytest.raises(KeyError, match="of one caller"):
        leads.result()
    wait_for_cut()
    assert [each.result() for each in waiting] == [2, 2]
    assert (leads.calls, sum(each.calls for each in waiting)) == (1, 1)
    assert troubles(first, *others) == [(0, 0)] * 3


@pytest.mark.parametrize("kind", KINDS)
@heard_or_not
def test_what_is_cut_a_second_time_is_trouble_and_not_sent_again(fleet, behind, cut, kind, heard):
    first, second = behind(kind, lease_seconds=KEPT), fleet.member(kind)
    assert first.get("before", 0) == 0
    wait_for_cut = cut(scripts.CLAIM, heard=heard, times=2)
    alone = first.ask("alone", value=1)
    assert (alone.result(), alone.calls) == (1, 1)
    wait_for_cut()
    assert troubles(first) == [(1, 0)]
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    wait_for_cut = cut(scripts.COMPLETE, heard=heard, times=2)
    leads.release()
    assert (leads.result(), leads.calls) == (1, 1)
    wait_for_cut()
    # If the server has not heard of it, the lease runs out.
    assert (waits.result(), waits.calls) == ((1, 0) if heard else (2, 1))
    assert troubles(first, second) == [(2, 0), (0, 0)]


# The proxy itself.


@pytest.fixture
def connect():
    """Make connections to a proxy, which are told something if they can be."""
    with contextlib.ExitStack() as opened:

        def connect(proxy):
            made = [opened.enter_context(socket.create_connection((HOST, proxy.port), PATIENCE)) for _ in range(5)]
            for connection in made:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"PING\r\n")
            return made

        yield connect


def wait_for_end(connection):
    """Return when the other end has gone, whatever comes before that."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(100):
            pass


@pytest.mark.parametrize("fault", ["none", "delayed", "lost", "refused", "not served yet"])
def test_a_proxy_ends_with_all_that_go_through_it(server, connect, fault):
    before = set(threading.enumerate())
    with Proxy(server.port) as proxy:
        connections = connect(proxy)
        assert [connection.recv(7) for connection in connections] == [b"+PONG\r\n"] * 5
        if fault == "delayed":
            proxy.delay(1000.0)
        elif fault == "lost":
            proxy.blackhole(later=True)
        elif fault == "refused":
            proxy.refuse()
        elif fault == "not served yet":
            proxy._thread.hold()
        connections += connect(proxy)
        proxy._thread.let_go()
    for connection in connections:
        wait_for_end(connection)
    assert set(threading.enumerate()) <= before
    # What it has not closed says so.
    gc.collect()

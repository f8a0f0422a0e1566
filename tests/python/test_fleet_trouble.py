"""A fleet whose server is down, hangs, restarts or refuses: nobody hangs, every value is right, one call a process."""

import logging
import time

import pytest
import redis
import redis.asyncio
from fleets import KINDS, SHORT, Fleet, ServerProcess, wait_until_shared
from loops import wait_until
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from llm_batch_coalesce import _fleet_options
from llm_batch_coalesce.redis import BackendError

# What the server is given for an answer in these tests, in seconds, and what is far too long for anybody.
FAR_TOO_LONG = 20.0
# For how long a server hangs: longer than the leases, and than anybody waits for it.
HANGS = 5.0


@pytest.fixture
def lone():
    """Be a fleet on a server that its test may break."""
    server = ServerProcess().start()
    fleet = Fleet(server, [])
    try:
        yield fleet
        if server._process is None:
            server.start()
        server.resume()
        fleet.end()
    finally:
        server.end()


def pair(fleet, kind, **options):
    """Make two members that are as impatient as tests are."""
    options = {"backend_timeout_seconds": SHORT, "lease_seconds": 2.0} | options
    return fleet.member(kind, **options), fleet.member(kind, **options)


def share(first, second, key):
    """Have two members share one call; this is how it should be."""
    leads = first.ask(key, value="shared", hold=True).wait_for_call()
    waits = second.ask(key, value="of its own")
    leads.release()
    assert (leads.result(), waits.result(), leads.calls, waits.calls) == ("shared", "shared", 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_whose_server_is_down_at_the_start_goes_on_alone_and_joins_later(lone, kind):
    lone.server.kill()
    first, second = pair(lone, kind)
    asked = first.ask("k", callers=5, value=1, hold=True).wait_for_call()
    asked.release()
    assert (asked.results(), asked.calls) == ([1] * 5, 1)
    assert second.get("k", 2) == 2
    assert first.get("k", 3) == 1, "retained in the process itself"
    assert first.coalescer.stats().backend_errors == 1
    lone.server.start()
    # At once: nobody waits for anything to try again.
    share(first, second, "later")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_retained_while_cut_off_is_dropped_when_the_server_is_there_again(lone, kind):
    lone.server.kill()
    first, second = pair(lone, kind, ttl_seconds=600)
    assert (first.get("k", 1), second.get("k", 2)) == (1, 2)
    lone.server.start()
    share(first, second, "later")
    # Somebody may have forgotten it meanwhile; so it comes from the server, or from a call.
    assert first.get("k", 3) == 3
    assert second.get("k", 4) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_raised_instead_if_that_was_chosen(lone, kind):
    first, second = pair(lone, kind, on_backend_error="raise")
    share(first, second, "before")
    lone.server.kill()
    asked = first.ask("k", value=1)
    with pytest.raises(BackendError, match="cannot be used"):
        asked.result()
    assert asked.calls == 0
    for name, args in [("peek", ("k",)), ("forget", ("k",))]:
        with pytest.raises(BackendError, match="cannot be used"):
            first.do(name, *args)
    assert first.coalescer.stats().backend_errors == 3
    lone.server.start()
    share(first, second, "after")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("away", ["for good", "for a moment"])
def test_a_server_that_is_killed_while_a_call_is_under_way_and_others_wait(lone, kind, away):
    first, second = pair(lone, kind, lease_seconds=1.0)
    leads = first.ask("k", callers=3, value=1, hold=True).wait_for_call()
    waits = second.ask("k", callers=3, value=2)
    lone.wait_for_waiting()
    lone.server.kill()
    if away == "for a moment":
        lone.server.start()
    # Those that wait look when the lease has run out, or are told to when they are connected again, and find nothing.
    assert waits.results() == [2] * 3
    leads.release()
    assert leads.results() == [1] * 3
    assert (leads.calls, waits.calls) == (1, 1)
    if away == "for good":
        assert first.coalescer.stats().backend_errors >= 1
        lone.server.start()
    else:
        assert first.coalescer.stats().leases_lost == 1
    wait_until_shared(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_that_could_not_be_renewed_is_lost_and_the_call_goes_on(lone, kind):
    first, second = pair(lone, kind, lease_seconds=0.6, ttl_seconds=600)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    lone.server.kill()
    wait_until(lambda: first.coalescer.stats().backend_errors >= 2)
    lone.server.start()
    assert second.get("k", 2) == 2
    leads.release()
    assert leads.result() == 1
    assert first.coalescer.stats().leases_lost == 1
    assert (first.get("k", 3), second.get("k", 4)) == (2, 2), "what was refused is retained nowhere"


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_hangs_holds_nobody_up_for_long(lone, kind):
    first, second = pair(lone, kind)
    share(first, second, "before")
    held = first.ask("held", value="h", hold=True).wait_for_call()
    waits = second.ask("held", value="w")
    lone.wait_for_waiting()
    lone.server.pause()
    began = time.monotonic()
    turn = 0
    while time.monotonic() - began < HANGS:
        turn += 1
        asked_at = time.monotonic()
        asked = [member.ask(("k", turn), callers=4, value=[turn, at]) for at, member in enumerate([first, second])]
        assert [one.results() for one in asked] == [[[turn, 0]] * 4, [[turn, 1]] * 4]
        assert [one.calls for one in asked] == [1, 1]
        assert time.monotonic() - asked_at < FAR_TOO_LONG
    assert turn > 1, "nobody waits for the server to be there again"
    assert waits.result() in {"w", "h"}
    lone.server.resume()
    held.release()
    assert held.result() == "h"
    assert (held.calls, waits.calls <= 1) == (1, True)
    wait_until_shared(first, second)


class OwnPool(redis.ConnectionPool):
    """A client with a pool of a class of its own is used as it is, and so are its retries."""


class OwnAsyncPool(redis.asyncio.ConnectionPool):
    """The same for tasks."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", ["copied", "as it is"])
def test_a_client_that_tries_again_for_ever_holds_nobody_up(lone, kind, used):
    if kind == "threads":
        module, retry, pool = redis, Retry, OwnPool
    else:
        module, retry, pool = redis.asyncio, AsyncRetry, OwnAsyncPool
    pool = module.ConnectionPool if used == "copied" else pool
    patient = pool(**lone.server.address, retry=retry(ConstantBackoff(0.01), -1), socket_timeout=SHORT / 4)
    second = lone.member(kind, backend_timeout_seconds=SHORT, lease_seconds=2.0)
    first = lone.member(kind, client=module.Redis.from_pool(patient), backend_timeout_seconds=SHORT, lease_seconds=2.0)
    share(first, second, "before")
    for fault, end in [(lone.server.kill, lone.server.start), (lone.server.pause, lone.server.resume)]:
        leads = first.ask((fault.__name__, "under way"), value=1, hold=True).wait_for_call()
        fault()
        # Who leads has to tell, who comes has to ask, and nobody is answered.
        leads.release()
        asked = first.ask(fault.__name__, callers=3, value=2)
        assert (leads.result(), asked.results(), asked.calls) == (1, [2] * 3, 1)
        end()
        wait_until_shared(first, second)
    lone.server.kill()
    first.do("close")


@pytest.mark.parametrize("kind", KINDS)
def test_a_lead_that_nobody_heard_of_is_given_up_before_its_lease_has_run_out(lone, kind):
    first, _ = pair(lone, kind, lease_seconds=6.0)
    first.get("before", 1)
    flight = first.coalescer._fleet.names.flight(first.coalescer._key("k").digest)
    lone.server.pause()
    assert first.get("k", 1) == 1
    lone.server.resume()
    # The server reads the claim now.
    wait_until(lambda: lone.client.exists(flight))
    left = lefts = lone.client.pttl(flight)
    while left > 0:
        lefts, left = left, lone.client.pttl(flight)
    assert lefts > 1000, "it has run out"


@pytest.mark.parametrize("kind", KINDS)
def test_timeouts_of_callers_hold_while_the_server_hangs(lone, kind):
    first, second = pair(lone, kind, backend_timeout_seconds=1.0, lease_seconds=30.0)
    held = first.ask("k", value=1, hold=True).wait_for_call()
    second.get("elsewhere", 1)
    lone.server.pause()
    began = time.monotonic()
    # In the process that leads nobody needs the server; in the other one the claim is not answered, and it calls.
    with pytest.raises(TimeoutError):
        first.get("k", 2, timeout=0.05)
    assert second.get("k", 3, timeout=0.05) == 3
    assert time.monotonic() - began < FAR_TOO_LONG
    held.release()
    assert held.result() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_closing_does_not_wait_for_a_server_that_hangs(lone, kind):
    first, _ = pair(lone, kind)
    held = first.ask("k", value=1, hold=True).wait_for_call()
    lone.server.pause()
    began = time.monotonic()
    first.do("close")
    assert time.monotonic() - began < FAR_TOO_LONG
    held.release()
    assert held.result() == 1, "a call that is under way belongs to its callers"


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_outlives_its_coalescer_serves_all_that_wait(lone, kind):
    first, second = pair(lone, kind, lease_seconds=10.0)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    lone.wait_for_waiting()
    first.do("close")
    leads.release()
    assert (leads.result(), waits.result(), waits.calls) == (1, 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_those_that_wait_when_their_coalescer_is_closed_are_told(lone, kind):
    first, second = pair(lone, kind, lease_seconds=30.0)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    lone.wait_for_waiting()
    second.do("close")
    with pytest.raises(RuntimeError, match="closed"):
        waits.result()
    leads.release()
    assert leads.result() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_scripts_that_the_server_has_forgotten_are_told_again(lone, kind):
    first, second = pair(lone, kind)
    lone.client.script_flush()
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    lone.client.script_flush()
    waits = second.ask("k", value=2)
    lone.wait_for_waiting()
    lone.client.script_flush()
    leads.release()
    assert (leads.result(), waits.result(), waits.calls) == (1, 1, 0)
    lone.client.script_flush()
    assert second.do("forget", "k") is True
    assert second.coalescer.stats().backend_errors == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_server_is_trouble_and_no_more(lone, kind):
    first, second = pair(lone, kind)
    share(first, second, "before")
    lone.client.config_set("maxmemory-policy", "noeviction")
    lone.client.config_set("maxmemory", "1")
    held = first.ask("k", value=1, hold=True).wait_for_call()
    # Whether the server refuses the first or the second is its own business.
    assert second.ask("k", value=2).wait_for_call().result() == 2
    held.release()
    assert held.result() == 1
    assert second.coalescer.stats().backend_errors >= 1
    lone.client.config_set("maxmemory", "0")
    wait_until_shared(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_trouble_is_logged_once_a_minute(lone, kind, caplog, monkeypatch):
    lone.server.kill()
    first, _ = pair(lone, kind, name="terms")
    with caplog.at_level(logging.WARNING):
        for key in range(5):
            assert first.get(key, key) == key
    (record,) = caplog.records
    assert "'terms'" in record.getMessage()
    assert "goes on alone" in record.getMessage()
    assert first.coalescer.stats().backend_errors == 5
    monkeypatch.setattr(_fleet_options, "_LOG_EVERY", 0.0)
    first.get(5, 5)
    assert len(caplog.records) == 2


def test_members_of_other_processes_survive_a_restart(lone):
    first, second = lone.processes(KINDS, backend_timeout_seconds=SHORT, lease_seconds=1.0)
    leads = first.ask("k", callers=3, value=1, hold=True).wait_for_call()
    waits = second.ask("k", callers=3, value=2)
    lone.wait_for_waiting()
    lone.server.kill()
    lone.server.start()
    assert waits.results() == [2] * 3
    leads.release()
    assert leads.results() == [1] * 3
    assert (leads.calls, waits.calls) == (1, 1)
    wait_until_shared(first, second)

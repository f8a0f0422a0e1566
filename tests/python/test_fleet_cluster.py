"""A fleet on a cluster of three nodes, and on a server that a Sentinel names."""

import math
import time

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from fleet_members import Member
from fleets import HOST, KINDS, SHORT, ServerProcess, acl_rules
from loops import wait_until
from redis.crc import key_slot

from llm_batch_coalesce import _redis_common
from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer

SLOTS = 16384


@pytest.fixture(scope="module")
def nodes():
    options = {"cluster-enabled": "yes", "cluster-node-timeout": "60000", "cluster-require-full-coverage": "no"}
    nodes = [ServerProcess(**options) for _ in range(3)]
    try:
        for node in nodes:
            node.start()
        clients = [node.client() for node in nodes]
        for number, client in enumerate(clients):
            slots = range(SLOTS * number // 3, SLOTS * (number + 1) // 3)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", slots[0], slots[-1])
            client.execute_command("CLUSTER", "MEET", HOST, nodes[0].port)

        def is_whole(client):
            told = client.execute_command("CLUSTER", "INFO")
            return b"cluster_known_nodes:3" in told and b"cluster_slots_assigned:16384" in told

        wait_until(lambda: all(is_whole(client) for client in clients))
        wait_until(lambda: all(b"cluster_state:ok" in one.execute_command("CLUSTER", "INFO") for one in clients))
        wait_until_all_hear_all(clients)
        for client in clients:
            client.close()
        yield nodes
    finally:
        for node in nodes:
            node.end()


def wait_until_all_hear_all(clients):
    """Return when messages get from every node to every other one, which is later than the cluster says it is up."""
    heard = [set() for _ in clients]
    inboxes = [client.pubsub() for client in clients]
    for inbox in inboxes:
        inbox.subscribe("ready")

    def all_heard():
        for number, client in enumerate(clients):
            client.publish("ready", str(number))
        for inbox, names in zip(inboxes, heard, strict=True):
            while (message := inbox.get_message(timeout=0.01)) is not None:
                names.add(message["data"])
        return all({b"0", b"1", b"2"} <= names for names in heard)

    wait_until(all_heard)
    for inbox in inboxes:
        inbox.close()


@pytest.fixture
def members(nodes, request):
    """Make members with clients of the cluster; each starts at another node."""
    made = []

    def make(kind, **options):
        node = nodes[len(made) % 3]
        client = (redis if kind == "threads" else redis.asyncio).RedisCluster(**node.address, socket_timeout=2.0)
        options = {"backend_timeout_seconds": 5.0, "namespace": request.node.name.partition("[")[0]} | options
        made.append(Member(kind, {}, options, client))
        return made[-1]

    yield make
    for node in nodes:
        node.resume()
    for member in made:
        member.close()
    for node in nodes:
        with node.client() as client:
            assert [key for key in client.scan_iter() if client.pttl(key) == -1] == []
            client.flushall()


def flight_of(member, key):
    """Return what the server calls the flight of a key."""
    return member.coalescer._fleet.names.flight(member.coalescer._key(key).digest)


def node_of(nodes, member, key):
    """Return which node has a key."""
    slot = key_slot(flight_of(member, key).encode())
    return next(node for number, node in enumerate(nodes, 1) if slot < SLOTS * number // 3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_in_the_fleet_for_keys_on_all_nodes(nodes, members, kind):
    fleet = [members("threads"), members("tasks"), members(kind)]
    keys = range(30)
    # Several nodes have some of them; what wakes those that wait comes from another one than their own.
    assert {node_of(nodes, fleet[0], key).port for key in keys} == {node.port for node in nodes}
    leads = [fleet[key % 3].ask(key, value=[key], hold=True).wait_for_call() for key in keys]
    waits = [(key, fleet[(key + more) % 3].ask(key, callers=2, value="wrong")) for key in keys for more in (1, 2)]

    def waiting():
        found = [field for client in clients for name in client.keys("*flight") for field in client.hkeys(name)]
        return sum(field.startswith(b"inbox:") for field in found)

    clients = [node.client() for node in nodes]
    wait_until(lambda: waiting() == 2 * len(keys))
    for client in clients:
        client.close()
    for one in leads:
        one.release()
    assert [one.result() for one in leads] == [[key] for key in keys]
    assert [one.results() for _, one in waits] == [[[key]] * 2 for key, _ in waits]
    assert sum(one.calls for one in leads) == len(keys)
    assert sum(one.calls for _, one in waits) == 0
    assert [member.coalescer.stats().backend_errors for member in fleet] == [0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_is_heard_by_all(nodes, members, kind):
    fleet = [members("threads"), members("tasks"), members(kind)]
    for key in range(6):
        assert [member.get(key, number) for number, member in enumerate(fleet)] == [0] * 3
        under_way = fleet[0].ask((key, "held"), value="old", hold=True).wait_for_call()
        assert fleet[1].do("forget", key) is True
        assert fleet[1].do("forget", (key, "held")) is True
        wait_until(lambda key=key: not any(key in member.coalescer for member in fleet))
        assert [member.get(key, number) for number, member in enumerate(fleet, 7)] == [7] * 3
        assert fleet[2].get((key, "held"), "new") == "new"
        under_way.release()
        assert under_way.result() == "old"
        assert fleet[2].do("peek", (key, "held")) == "new"


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_that_hangs_is_trouble_for_its_own_keys_only(nodes, members, kind):
    first, second = (members(kind, backend_timeout_seconds=1.0, lease_seconds=4.0) for _ in range(2))
    keys = range(20)
    assert [(first.get(key, key), second.get(key, key)) for key in keys] == [(key, key) for key in keys]
    # The inboxes are at nodes of their own choice; the one that hangs may be such a node.
    hangs = nodes[2]
    leads = {key: first.ask((key, "long"), value=key, hold=True).wait_for_call() for key in range(6)}
    lives = [key for key in leads if node_of(nodes, first, (key, "long")) is not hangs]
    hangs.pause()
    began = time.monotonic()
    # For longer than a lease: those on other nodes are renewed.
    wait_until(lambda: time.monotonic() - began > 3.0)
    waits = {key: second.ask((key, "long"), value=("own", key)) for key in leads}
    hangs.resume()
    for one in leads.values():
        one.release()
    assert [one.result() for one in leads.values()] == list(leads)
    got = {key: one.result() for key, one in waits.items()}
    assert all(got[key] in (key, ("own", key), ["own", key]) for key in leads)
    assert all(one.calls <= 1 for one in waits.values())
    assert lives
    numbers = iter(range(1000))

    def shared():
        key = ("again", next(numbers))
        return first.get(key, 1) == second.get(key, 2)

    wait_until(lambda: all(shared() for _ in range(10)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_inbox_whose_node_hangs_goes_to_another_one(nodes, members, kind, monkeypatch, caplog):
    monkeypatch.setattr(_redis_common, "PING_EVERY", 0.2)
    monkeypatch.setattr("secrets.choice", lambda among: min(among, key=lambda node: node.name))
    caplog.set_level("DEBUG", "llm_batch_coalesce")
    member = members(kind, backend_timeout_seconds=1.0)
    member.get("before", 1)

    def has_inbox(node):
        with node.client() as client:
            return client.pubsub_channels("*:inbox:*") != []

    hangs, *others = sorted(nodes, key=has_inbox, reverse=True)
    hangs.pause()
    wait_until(lambda: any(has_inbox(node) for node in others))
    assert caplog.text.count("the inbox was lost") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_leases_on_other_nodes_are_renewed_while_a_node_hangs(nodes, members, kind):
    first, second = (members(kind, backend_timeout_seconds=1.0, lease_seconds=4.0) for _ in range(2))
    assert (first.get("before", 1), second.get("before", 2)) == (1, 1)
    dead, *live = [[key for key in range(100) if node_of(nodes, first, key) is node][:12] for node in reversed(nodes)]
    lives = [key for keys in live for key in keys[:2]]
    # To wait for the answer to each of those that come first takes longer than a lease.
    leads = {key: first.ask(key, value=key, hold=True).wait_for_call() for key in [*dead, *lives]}
    assert len(leads) == 16
    left, renewals = dict.fromkeys(lives, math.inf), dict.fromkeys(lives, 0)

    def have_been_renewed():
        for key in lives:
            with node_of(nodes, first, key).client() as client:
                now = client.pttl(flight_of(first, key))
            assert now > 0, "a lease has run out"
            renewals[key] += now > left[key]
            left[key] = now
        return min(renewals.values()) >= 4  # which takes longer than a lease

    nodes[2].pause()
    wait_until(have_been_renewed)
    waits = {key: second.ask(key, value="wrong") for key in lives}
    for one in leads.values():
        one.release()
    assert {key: one.result() for key, one in leads.items()} == {key: key for key in leads}
    assert {key: (one.result(), one.calls) for key, one in waits.items()} == {key: (key, 0) for key in lives}


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_who_may_do_only_what_the_guide_says(nodes, kind):
    made = []
    try:
        for node in nodes:
            with node.client() as client:
                rules = acl_rules("mine")
                client.execute_command("ACL", "SETUSER", "fleet", "reset", "on", ">secret", "resetchannels", *rules)
        for node in nodes[:2]:
            user = node.address | {"username": "fleet", "password": "secret", "socket_timeout": 10.0}
            client = (redis if kind == "threads" else redis.asyncio).RedisCluster(**user)
            made.append(
                Member(kind, {}, {"namespace": "mine", "backend_timeout_seconds": 20.0, "ttl_seconds": 60}, client)
            )
        for key in range(5):
            leads = made[0].ask(key, value=1, hold=True).wait_for_call()
            waits = made[1].ask(key, value=2)
            leads.release()
            assert (leads.result(), waits.result(), waits.calls) == (1, 1, 0)
            assert made[1].do("forget", key) is True
        assert [member.coalescer.stats().backend_errors for member in made] == [0, 0]
    finally:
        for member in made:
            member.close()
        for node in nodes:
            with node.client() as client:
                client.execute_command("ACL", "DELUSER", "fleet")
                client.flushall()


@pytest.mark.parametrize("kind", KINDS)
def test_clients_of_clusters_are_used_as_they_are_and_so_must_be_fit(nodes, kind):
    module = redis if kind == "threads" else redis.asyncio
    made = DistributedBatchCoalescer if kind == "threads" else AsyncDistributedBatchCoalescer
    with pytest.raises(TypeError, match="decode_responses"):
        refused(made, module.RedisCluster(**nodes[0].address, decode_responses=True))
    if kind == "threads":
        with pytest.raises(ValueError, match="socket_timeout"):
            refused(made, module.RedisCluster(**nodes[0].address, socket_timeout=None))


def refused(made, client):
    """Make a coalescer, which cannot be done, with a client that is closed then; those of tasks have no connection."""
    try:
        made(client)
    finally:
        if made is DistributedBatchCoalescer:
            client.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_primary_that_a_sentinel_names(kind):
    primary, replica, sentinel = ServerProcess(), ServerProcess(), ServerProcess()
    members, sentinels = [], []
    try:
        primary.start()
        replica.start()
        with replica.client() as client:
            client.replicaof(HOST, primary.port)
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        watch = f"monitor watched {HOST} {primary.port} 1"
        (sentinel.folder / "sentinel.conf").write_text(
            f"sentinel {watch}\nsentinel down-after-milliseconds watched 300\n"
        )
        start_sentinel(sentinel)
        module = redis.sentinel if kind == "threads" else redis.asyncio.sentinel
        for _ in range(2):
            # Its own options do not matter.
            named = module.Sentinel([(HOST, sentinel.port)], socket_timeout=2.0)
            sentinels.append(named.sentinels[0])
            client = named.master_for("watched", decode_responses=True, socket_timeout=2.0)
            members.append(Member(kind, {}, {"backend_timeout_seconds": SHORT, "lease_seconds": 2.0}, client))
        first, second = members
        leads = first.ask("k", value=1, hold=True).wait_for_call()
        waits = second.ask("k", value=2)
        with primary.client() as client:
            wait_until(lambda: any(f.startswith(b"inbox:") for n in client.keys("*flight") for f in client.hkeys(n)))
        leads.release()
        assert (leads.result(), waits.result(), waits.calls) == (1, 1, 0)
        # Alone until there is another primary, and then together again.
        primary.kill()
        assert first.get("while cut off", 1) == 1
        numbers = iter(range(10000))

        def shared():
            key = ("again", next(numbers))
            return first.get(key, 1) == second.get(key, 2)

        wait_until(shared)
        with replica.client() as client:
            assert client.info("replication")["role"] == "master"
    finally:
        for member, client in zip(members, sentinels, strict=True):
            if kind == "tasks":
                member.loop.start(client.aclose()).result()
            else:
                client.close()
            member.close()
        for server in (sentinel, replica, primary):
            server.end()


def start_sentinel(sentinel):
    """Start it: its configuration must be a file, which it writes to."""
    import subprocess

    from fleets import binary, free_port

    sentinel.port = free_port()
    command = [binary("valkey"), str(sentinel.folder / "sentinel.conf"), "--sentinel", "--port", str(sentinel.port)]
    sentinel._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers():
        try:
            with sentinel.client() as client:
                return len(client.sentinel_slaves("watched")) == 1
        except redis.RedisError:
            return False

    wait_until(answers)

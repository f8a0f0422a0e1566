"""How a fleet gets at its server: passwords, ACL users, TLS, sockets, and servers that will not do."""

import re
import shutil
import socketserver
import ssl
import subprocess
import threading

import pytest
from fleet_members import Member
from fleet_proxy import Proxy
from fleets import HOST, KINDS, SHORT, ServerProcess, acl_rules

from llm_batch_coalesce import _fleet_scripts
from llm_batch_coalesce.redis import BackendError


@pytest.fixture
def members():
    """Make members with clients of any options."""
    made = []

    def make(kind, address, **options):
        made.append(Member(kind, address, {"backend_timeout_seconds": SHORT, "lease_seconds": 2.0} | options))
        return made[-1]

    yield make
    for member in made:
        member.close()


@pytest.fixture
def lone():
    server = ServerProcess().start()
    yield server
    server.end()


def share(first, second, key):
    """Have two members share one call."""
    leads = first.ask(key, value="shared", hold=True).wait_for_call()
    waits = second.ask(key, value="of its own")
    # It waits, or comes a moment later and finds it.
    leads.release()
    assert (leads.result(), waits.result(), leads.calls, waits.calls) == ("shared", "shared", 1, 0)
    assert [member.coalescer.stats().backend_errors for member in (first, second)] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["call", "raise"])
def test_a_wrong_password_is_told_at_the_first_contact_and_is_trouble_later(lone, members, kind, mode):
    right, wrong = lone.address | {"password": "right"}, lone.address | {"password": "wrong"}
    with lone.client() as client:
        client.config_set("requirepass", "right")
    for address in (wrong, lone.address):
        refused = members(kind, address, on_backend_error=mode)
        for _ in range(2):
            asked = refused.ask("k", value=1)
            with pytest.raises(BackendError, match="refuses the client: AuthenticationError"):
                asked.result()
            assert asked.calls == 0
    first, second = members(kind, right, on_backend_error=mode), members(kind, right)
    share(first, second, "k")
    with lone.client(password="right") as client:
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal")
    asked = first.ask("later", value=2)
    if mode == "call":
        assert asked.result() == 2
    else:
        with pytest.raises(BackendError, match="cannot be used"):
            asked.result()
    assert first.coalescer.stats().backend_errors == 1


class Pretender(socketserver.StreamRequestHandler):
    """A server that knows little but its version."""

    def handle(self):
        while line := self.rfile.readline():
            words = [self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))]
            if words[0].upper() == b"INFO":
                info = "\r\n".join(self.server.info).encode()
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(info), info))
            else:
                self.wfile.write(b"-ERR unknown command\r\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("info", "says"),
    [
        (["redis_version:6.0.16"], "redis 6.0.16; 6.2 or newer"),
        (["redis_version:7.2.4", "valkey_version:7.1.0"], "valkey 7.1.0; 7.2 or newer"),
    ],
)
def test_a_server_that_is_too_old(members, kind, info, says):
    with socketserver.ThreadingTCPServer((HOST, 0), Pretender) as server:
        server.daemon_threads, server.info = True, info
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        member = members(kind, {"host": HOST, "port": server.server_address[1], "protocol": 2})
        asked = member.ask("k", value=1)
        with pytest.raises(BackendError, match=re.escape(says)):
            asked.result()
        assert asked.calls == 0
        server.shutdown()


@pytest.mark.parametrize("mode", ["call", "raise"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_replica_is_told_at_the_first_contact_and_is_trouble_later(lone, members, kind, mode):
    other = ServerProcess().start()
    try:
        first, second = members(kind, lone.address), members(kind, lone.address)
        share(first, second, "before")
        with lone.client() as client:
            client.replicaof(HOST, other.port)
            assert first.get("alone", 1) == 1
            assert first.coalescer.stats().backend_errors == 1
            asked = members(kind, lone.address, on_backend_error=mode).ask("k", value=1)
            with pytest.raises(BackendError, match="read-only replica"):
                asked.result()
            assert asked.calls == 0
            client.replicaof("NO", "ONE")
        assert first.get("again", 1) == second.get("again", 2) == 1
    finally:
        other.end()


def test_the_list_for_acl_users_is_complete_and_no_longer_than_it_must_be():
    code = [text for name, text in vars(_fleet_scripts).items() if name.isupper() and isinstance(text, str)]
    called = set()
    for text in code:
        for pair in re.findall(r"redis\.p?call\('(\w+)'|\bread\('(\w+)'", text):
            called |= {word.lower() for word in pair if word}
    rest = {"eval", "evalsha", "subscribe", "ping", "info", "select", "cluster|slots", "command"}
    assert {rule[1:] for rule in acl_rules("mine") if rule[0] == "+"} == called | rest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", ["", "+info"])
def test_a_user_who_may_do_only_that(server, members, kind, without, monkeypatch):
    from llm_batch_coalesce import _redis_common

    monkeypatch.setattr(_redis_common, "PING_EVERY", 0.1)
    own = [rule for rule in acl_rules("mine") if rule not in (without, "+cluster|slots", "+command", "+select")]
    with server.client() as client:
        client.flushall()
        client.acl_log_reset()
        client.execute_command("ACL", "SETUSER", "fleet", "reset", "on", ">secret", "resetchannels", *own)
        address = server.address | {"username": "fleet", "password": "secret"}
        first, second = (members(kind, address, namespace="mine") for _ in range(2))
        share(first, second, "k")
        # Whatever there is: forgetting, errors, values that are not retained, leads that are given up, renewals, PINGs.
        assert first.do("peek", "k") == "shared"
        held = first.ask("held", value=1, hold=True, retain_seconds=0.0).wait_for_call()
        waits = second.ask("held", value=2)
        held.called.wait(0.9)
        held.release()
        assert (held.result(), waits.result() in (1, 2)) == (1, True)
        assert second.do("forget", "k") is True
        failing = first.ask("e", error=OSError("no"))
        assert isinstance(failing.results()[0], OSError)
        assert [member.coalescer.stats().backend_errors for member in (first, second)] == [0, 0]
        denied = [entry for entry in client.acl_log() if entry["username"] == "fleet" and entry["reason"] != "auth"]
        assert {entry["object"].lower() for entry in denied} <= {"client|setinfo", "client", "info"}
        client.execute_command("ACL", "DELUSER", "fleet")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", ["~", "&", "+evalsha", "+hset", "+subscribe"])
def test_a_user_who_may_not_do_enough_is_told(server, members, kind, missing):
    own = [rule for rule in acl_rules("mine") if not rule.startswith(missing)]
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "fleet", "reset", "on", ">secret", "resetchannels", *own)
        address = server.address | {"username": "fleet", "password": "secret"}
        asked = members(kind, address, namespace="mine").ask("k", value=1)
        with pytest.raises(BackendError, match="refuses the client"):
            asked.result()
        assert asked.calls == 0
        client.execute_command("ACL", "DELUSER", "fleet")


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """Make a certificate for 127.0.0.1, and who vouches for it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("papers")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    (folder / "extensions").write_text(f"subjectAltName=IP:{HOST}\nauthorityKeyIdentifier=keyid\n")
    for command in [
        f"req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=ca -addext keyUsage=critical,keyCertSign",
        f"req {key} -keyout own.key -out own.csr -subj /CN=own",
        "x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out own.pem -days 2 -extfile extensions",
    ]:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_tls_with_certificates_on_both_sides(server, members, papers, kind):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=papers / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(papers / "own.pem", papers / "own.key")
    with Proxy(server.port, context) as proxy:
        trusting = proxy.address | {"ssl": True, "ssl_ca_certs": str(papers / "ca.pem")}
        known = trusting | {"ssl_certfile": str(papers / "own.pem"), "ssl_keyfile": str(papers / "own.key")}
        first, second = members(kind, known, backend_timeout_seconds=5.0), members(kind, server.address)
        share(first, second, f"tls {kind}")
        # Nobody vouches for the server, or for the client: trouble, as if it was not there.
        for address in (trusting, known | {"ssl_ca_certs": None}):
            member = members(kind, address)
            assert member.get("elsewhere", 1) == 1
            assert member.coalescer.stats().backend_errors == 1
        first.close()
        first.close = lambda: None


@pytest.mark.parametrize("kind", KINDS)
def test_a_unix_socket(members, kind):
    server = ServerProcess(unixsocket="fleet.sock").start()
    try:
        address = {"unix_socket_path": str(server.folder / "fleet.sock")}
        share(members(kind, address), members(kind, server.address), "k")
    finally:
        server.end()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"protocol": 2}, {"protocol": 3}, {"decode_responses": True, "health_check_interval": 1}]
)
def test_options_of_the_client_that_do_not_matter(server, members, kind, options):
    first, second = members(kind, server.address | options), members(kind, server.address)
    share(first, second, f"{kind} {options}")
    first.do("close")
    # The client is still its owner's.
    ping = first.client.ping()
    if kind == "tasks":

        async def ask():
            return await first.client.ping()

        ping.close()
        ping = first.loop.start(ask()).result()
    assert ping is True

"""The proxies' configurations in deploy/proxies, each in front of two real nodes and one Redis."""

import concurrent.futures
import contextlib
import http.client
import socket
import subprocess
import time
import urllib.request

import pytest
import websockets.exceptions
import websockets.sync.client

from chart import ROOT
from processes import Client, Node, Redis, Running, eventually, free_ports, get, token

PROXIES = ROOT / "deploy" / "proxies"
# The time-out in the files, and its replacement, which keeps the test short.
TIME_OUT, SHORT = "75s", "2s"
FILES = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf", "caddy": "Caddyfile", "envoy": "envoy.yaml"}


class Proxy(Running):
    """A proxy with its configuration from the repository, except for addresses and the time-out."""

    def __init__(self, kind, directory, nodes):
        (self.port,) = free_ports(1)
        text = (PROXIES / FILES[kind]).read_text()
        assert text.count(TIME_OUT) >= (1 if kind == "envoy" else 2)
        text = text.replace(TIME_OUT, SHORT)
        for name, node in zip(("tidegate-a", "tidegate-b"), nodes, strict=True):
            for written, here in {
                f"{name}:8080": f"{node.host}:{node.public}",
                f"address: {name}, port_value: 8080": f"address: {node.host}, port_value: {node.public}",
            }.items():
                text = text.replace(written, here)
        assert "tidegate-a:" not in text and "8080" not in text
        text = text.replace("9090", str(nodes[0].ops)).replace("8000", str(self.port))
        text = text.replace("/run/nginx.pid", f"{directory}/nginx.pid")
        # More than a test machine lets a process open.
        text = text.replace("maxconn 200000", "maxconn 2000")
        file = directory / FILES[kind]
        file.write_text(text)
        bin_ = ROOT / "tests" / ".venv" / "bin"
        command = {
            "haproxy": ["haproxy", "-db", "-f", file],
            "nginx": ["nginx", "-c", file, "-p", directory, "-g", "daemon off;"],
            "caddy": [bin_ / "caddy", "run", "--adapter", "caddyfile", "--config", file],
            "envoy": [
                bin_ / "envoy",
                "--config-path",
                file,
                "--use-dynamic-base-id",
                "--concurrency",
                "1",
                "--log-level",
                "warn",
            ],
        }[kind]
        super().__init__(kind, command, directory, env={"HOME": str(directory)})
        # 404 comes from a node; before a node is up, the proxy answers 5xx.
        self.until(lambda: get(f"http://127.0.0.1:{self.port}/", timeout=2)[0] in (200, 404), "a node's answer")


@pytest.fixture
def stage(tmp_path, tidegate):
    """Sets up nodes and a proxy, and stops them again."""
    parts = []

    class Stage:
        """Redis, two nodes at two addresses with the same ports, a proxy, and any number of clients."""

        def __init__(self):
            self.redis = self.keep(Redis(tmp_path))
            self.token = token(tidegate)

        def keep(self, part):
            parts.append(part)
            return part

        def nodes(self, **settings):
            ports = free_ports(2)
            return [
                self.keep(
                    Node(
                        tidegate,
                        tmp_path,
                        f"node-{host}-{ports[0]}",
                        host,
                        ports,
                        **{"broker.url": self.redis.url, "heartbeat.timeout": "120s", **settings},
                    )
                )
                for host in ("127.0.0.2", "127.0.0.3")
            ]

        def proxy(self, kind, nodes):
            directory = tmp_path / f"{kind}-{nodes[0].public}"
            directory.mkdir()
            return self.keep(Proxy(kind, directory, nodes))

        def client(self, kind, proxy, name):
            address = f"127.0.0.1:{proxy.port}"
            arguments = {
                "ws": ["ws.mjs", f"ws://{address}/rooms/lobby?token={self.token}"],
                "eventsource": ["eventsource.mjs", f"http://{address}/rooms/lobby?token={self.token}"],
                "centrifuge": ["centrifuge.mjs", f"ws://{address}/connection/websocket", "lobby", self.token],
            }[kind]
            return self.keep(Client(arguments[0], tmp_path, f"{kind}-{name}", *arguments[1:]))

        def publish(self, text):
            command = ["redis-cli", "-p", str(self.redis.port), "PUBLISH", "room:lobby", text]
            subprocess.run(command, check=True, capture_output=True)

    try:
        yield Stage()
    finally:
        for part in reversed(parts):
            part.stop()


@pytest.mark.parametrize("kind", FILES)
def test_clients_connect_stay_and_reconnect(kind, stage):
    # The same ratio between heartbeats and the shortened time-out as between the real ones.
    nodes = stage.nodes(
        **{"heartbeat.interval": "600ms", "drain.pause": "3s", "drain.window": "1s", "sse.retry": "200ms"}
    )
    proxy = stage.proxy(kind, nodes)
    clients = {
        (kind_, number): stage.client(kind_, proxy, f"{number}")
        for kind_ in ("ws", "eventsource", "centrifuge")
        for number in range(2)
    }
    for client in clients.values():
        client.until(lambda c=client: c.count("open") == 1, "connected")
    begun = time.monotonic()
    sessions = [node.metric("tidegate_connections{") for node in nodes]
    assert sum(sessions) == len(clients) and min(sessions) > 0, f"both nodes have clients: {sessions}"

    # Messages published by a backend, over HTTP and by a client reach all clients.
    stage.publish("from-redis")
    request = urllib.request.Request(
        f"http://127.0.0.1:{proxy.port}/rooms/lobby",
        data=b"from-http",
        headers={"Authorization": f"Bearer {stage.token}", "Content-Type": "text/plain"},
    )
    assert urllib.request.urlopen(request, timeout=5).status == 202
    clients[("ws", 0)].send("from-client")
    said = ["from-redis", "from-http", "from-client"]

    def heard(client, expected):
        # The Centrifuge SDK returns values, which the script writes as JSON.
        return [message.strip('"') for message in client.messages()] == expected

    for client in clients.values():
        client.until(lambda c=client: heard(c, said), f"{said}")

    # A page of the proxy's own host may connect, because Host is passed on; another may not.
    url = f"ws://127.0.0.1:{proxy.port}/rooms/lobby?token={stage.token}"
    with websockets.sync.client.connect(url, origin=f"http://127.0.0.1:{proxy.port}"):
        pass
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(url, origin="http://other.example")
    assert refused.value.response.status_code == 403

    # No client sends anything for three time-outs.
    eventually(lambda: time.monotonic() > begun + 3 * float(SHORT.removesuffix("s")), "three time-outs of silence")
    for name, client in clients.items():
        assert [h["on"] for h in client.happenings() if h["on"] != "message"] == ["open"], f"{name} was cut"

    # One node drains. Its clients reconnect to the other one; a plain WebSocket does not reconnect by itself.
    leaving, staying = nodes if sessions[0] >= sessions[1] else nodes[::-1]
    leaving.terminate()
    back = dict(clients)

    def everybody_is_back():
        for (kind_, number), client in clients.items():
            if kind_ == "ws" and client.count("close") and back[(kind_, number)] is client:
                back[(kind_, number)] = stage.client("ws", proxy, f"{number}-again")
        return staying.metric("tidegate_connections{") == len(clients)

    staying.until(everybody_is_back, "every client")
    assert leaving.wait() == 0, "it left in time"
    moved = [client for client in clients.values() if [h["on"] for h in client.happenings()].count("open") > 1]
    assert moved or back != clients
    for client in back.values():
        client.until(lambda c=client: c.count("open") >= 1, "connected again")
    stage.publish("afterwards")
    for name, client in back.items():
        client.until(lambda c=client: c.messages()[-1:] in (["afterwards"], ['"afterwards"']), f"{name}: afterwards")

    log = proxy.log.read_text()
    assert stage.token not in log, "a token is in the proxy's log"
    # Caddy logs no requests; the others must have logged some, or this check would prove nothing.
    assert kind == "caddy" or "/rooms/lobby" in log


@pytest.mark.parametrize("kind", FILES)
def test_without_heartbeats_the_time_out_disconnects(kind, stage):
    """The counterpart of the test above: the time-out is in force, and only heartbeats prevent it."""
    proxy = stage.proxy(kind, stage.nodes(**{"heartbeat.interval": "60s"}))
    clients = [stage.client(client, proxy, "quiet") for client in ("ws", "eventsource")]
    for client in clients:
        client.until(lambda c=client: c.count("open") == 1, "connected")
    for client in clients:
        client.until(lambda c=client: c.count("close") + c.count("interrupted") > 0, "cut")


@pytest.mark.parametrize("kind", FILES)
def test_a_client_counts_as_the_address_it_comes_from(kind, stage):
    # The nodes see the proxy at 127.0.0.1. Headers from a client are not trusted.
    nodes = stage.nodes(**{"public.trusted_proxies": "127.0.0.1", "limits.connections_per_address": "2"})
    proxy = stage.proxy(kind, nodes)
    open_sockets = contextlib.ExitStack()

    def connect(address):
        raw = socket.create_connection(("127.0.0.1", proxy.port), source_address=(address, 0))
        url = f"ws://127.0.0.1:{proxy.port}/rooms/lobby?token={stage.token}"
        headers = {"X-Forwarded-For": "192.0.2.99"}
        client = websockets.sync.client.connect(url, sock=raw, additional_headers=headers, ping_interval=None)
        open_sockets.enter_context(client)

    with open_sockets:
        # At most two per node; how the proxy spreads them does not matter.
        connect("127.0.0.5")
        connect("127.0.0.5")
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            for _ in range(3):
                connect("127.0.0.5")
        assert refused.value.response.status_code == 429
        connect("127.0.0.6")


@pytest.mark.parametrize("kind", FILES)
def test_an_early_refusal_is_passed_on_and_affects_no_other_client(kind, stage):
    # A node answers before the body has arrived. If it reset the connection, the proxy would consider the node dead,
    # and with both nodes marked dead, all clients would get 502.
    proxy = stage.proxy(kind, stage.nodes())
    url = f"http://127.0.0.1:{proxy.port}/rooms/lobby"
    body = b"x" * (1024 * 1024)

    def post(_):
        client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
        # Caddy reads 256 KiB of a body that nobody wants and then closes its side; the answer has arrived by then.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.request("POST", "/rooms/lobby", body, {"Content-Type": "text/plain"})
        return client.getresponse().status

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(post, range(12))) == [401] * 12
    honest = urllib.request.Request(
        url, data=b"x", headers={"Authorization": f"Bearer {stage.token}", "Content-Type": "text/plain"}
    )
    assert urllib.request.urlopen(honest, timeout=5).status == 202

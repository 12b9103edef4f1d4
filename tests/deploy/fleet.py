"""Two nodes with a Redis, scraped by a real Prometheus, and clients that keep them busy."""

import asyncio
import functools
import json
import threading
import urllib.parse
import urllib.request

import websockets

from chart import CHART
from processes import Client, Node, Redis, Running, free_ports, get, token

# The node sends pings; a client that sends its own as well would only measure the load of this machine.
connect = functools.partial(websockets.connect, ping_interval=None, open_timeout=60)

NAMESPACE = "realtime"
ROOMS = 6


class Fleet:
    """Redis, two nodes, Prometheus. Call `stop` at the end."""

    def __init__(self, binary, directory, scrape="1s"):
        self.binary, self.directory = binary, directory
        self.parts = []
        try:
            self.redis = self.add(Redis(directory))
            self.nodes = [
                self.add(Node(binary, directory, name, **{"broker.url": self.redis.url, "limits.connections": "1000"}))
                for name in ("tidegate-a", "tidegate-b")
            ]
            self.prometheus = self.add(Prometheus(directory, self.nodes, scrape))
        except BaseException:
            self.stop()
            raise

    def add(self, part):
        self.parts.append(part)
        return part

    def stop(self):
        for part in reversed(self.parts):
            part.stop()


class Prometheus(Running):
    """A server that scrapes nodes with the labels that Kubernetes would add, and with our rules."""

    def __init__(self, directory, nodes, scrape):
        (self.port,) = free_ports(1)
        targets = [
            {"targets": [f"127.0.0.1:{node.ops}"], "labels": {"namespace": NAMESPACE, "pod": node.name}}
            for node in nodes
        ]
        config = {
            "global": {"scrape_interval": scrape, "scrape_timeout": scrape, "evaluation_interval": "1s"},
            "rule_files": [str(CHART / "files" / "rules.yaml")],
            "scrape_configs": [{"job_name": "tidegate", "static_configs": targets}],
        }
        # JSON is valid YAML.
        (directory / "prometheus.json").write_text(json.dumps(config))
        super().__init__(
            "prometheus",
            [
                "prometheus",
                f"--config.file={directory}/prometheus.json",
                f"--storage.tsdb.path={directory}/prometheus",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--log.level=warn",
            ],
            directory,
        )
        self.until(lambda: get(f"http://127.0.0.1:{self.port}/-/ready")[0] == 200, "ready")

    def api(self, path, **parameters):
        """The data of a response, or the error."""
        query = urllib.parse.urlencode(parameters, doseq=True)
        status, body = get(f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}", timeout=30)
        answer = json.loads(body)
        assert status == 200 and answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]


class Load:
    """Clients of all kinds that listen, publish, connect and disconnect until it is stopped."""

    def __init__(self, fleet, sockets=24, pause=0.01):
        self.fleet = fleet
        self.sockets = sockets
        self.pause = pause
        self.token = token(fleet.binary)
        self.clients = []
        for number, node in enumerate(fleet.nodes):
            query = f"token={self.token}"
            self.clients += [
                Client(
                    "eventsource.mjs",
                    fleet.directory,
                    f"sse-{number}",
                    f"http://127.0.0.1:{node.public}/rooms?room=room-0&room=room-1&{query}",
                ),
                Client(
                    "centrifuge.mjs",
                    fleet.directory,
                    f"centrifuge-{number}",
                    f"ws://127.0.0.1:{node.public}/connection/websocket",
                    "room-2",
                    self.token,
                ),
            ]
        self.over = threading.Event()
        self.failure = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            asyncio.run(self.work())
        except BaseException as error:  # raised again by stop()
            self.failure = error

    async def work(self):
        tasks = [asyncio.create_task(self.listener(number)) for number in range(self.sockets)]
        tasks += [asyncio.create_task(self.publisher(number)) for number in range(2)]
        tasks.append(asyncio.create_task(self.stranger()))
        while not self.over.is_set():
            await asyncio.sleep(0.05)
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def url(self, number, given=None):
        node = self.fleet.nodes[number % len(self.fleet.nodes)]
        return f"ws://127.0.0.1:{node.public}/rooms/room-{number % ROOMS}?token={given or self.token}"

    async def listener(self, number):
        """Connects, listens for a while, and disconnects."""
        life = 200 + 97 * number % 4001
        while True:
            async with connect(self.url(number), max_queue=None) as socket:
                for _ in range(life):
                    await socket.recv()

    async def publisher(self, number):
        """Publishes in one room after the other, in varying sizes."""
        sockets = [await connect(self.url(room) + "&echo=false") for room in range(ROOMS)]
        # A client that does not read does not answer pings either, and is closed after a while.
        readers = [asyncio.create_task(self.read(socket)) for socket in sockets]
        turn = 0
        while not any(reader.done() for reader in readers):
            turn += 1
            await sockets[turn % ROOMS].send(json.dumps({"n": turn, "text": "x" * (turn * 37 % 700)}))
            await asyncio.sleep(self.pause * (1 + 2 * (turn // 2000 % 2) + number))

        raise AssertionError("a publisher was closed")

    async def read(self, socket):
        async for _ in socket:
            pass

    async def stranger(self):
        """Connects without a valid token."""
        while True:
            try:
                async with connect(self.url(0, "not-a-token")):
                    raise AssertionError("a stranger was let in")
            except websockets.InvalidStatus as refused:
                assert refused.response.status_code == 401
            await asyncio.sleep(0.5)

    def stop(self):
        self.over.set()
        self.thread.join()
        for client in self.clients:
            client.stop()
        if self.failure:
            raise self.failure

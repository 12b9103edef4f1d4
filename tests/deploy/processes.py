"""Real processes for the checks: nodes, Redis, proxies, Prometheus, clients. Each has its own ports, writes its
log to a file, and is stopped by the code that started it. Waits are always for a state, and report the last one
when they time out."""

import base64
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

SECRET = "a-secret-of-the-checks-that-is-long-enough"
CLIENTS = Path(__file__).resolve().parents[1] / "clients"
PATIENCE = 30


def eventually(look, what, patience=PATIENCE):
    """Calls `look` until it returns something true, and returns that. After `patience` seconds, fails with what it last
    raised or returned."""
    end = time.monotonic() + patience
    last = None
    while True:
        try:
            last = look()
            if last:
                return last
        except (OSError, AssertionError) as error:
            last = error
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not after {patience} s, but {last!r}")
        time.sleep(0.05)


def free_ports(count):
    """Distinct ports without a listener at any address."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def get(url, timeout=5):
    """Status and body; an error status raises no exception."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Running:
    """A process with its log."""

    def __init__(self, name, command, directory, env=None, **options):
        self.log = Path(directory) / f"{name}.log"
        self.name = name
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=options.pop("stdout", log),
                stderr=log,
                env=None if env is None else {"PATH": os.environ["PATH"], **env},
                **options,
            )

    def alive(self):
        """Raises with the end of the log if the process has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
        return True

    def until(self, look, what, patience=PATIENCE):
        """`eventually`, failing at once if the process ends."""
        return eventually(lambda: self.alive() and look(), f"{self.name}: {what}", patience)

    def terminate(self):
        """Sends SIGTERM, without waiting."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, patience=PATIENCE):
        """Its exit status."""
        return self.process.wait(patience)

    def stop(self):
        """Kills it, whatever it is doing."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Redis(Running):
    """A private server."""

    def __init__(self, directory):
        (self.port,) = free_ports(1)
        super().__init__("redis", ["redis-server", "--port", self.port, "--save", "", "--dir", directory], directory)
        self.url = f"redis://127.0.0.1:{self.port}"

        def answers():
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"

        self.until(answers, "an answer to PING")


class Node(Running):
    """A Tidegate node."""

    def __init__(self, binary, directory, name="node", host="127.0.0.1", ports=None, **settings):
        self.host = host
        self.public, self.ops = ports or free_ports(2)
        defaults = {"public.listen": f"{host}:{self.public}", "ops.listen": f"{host}:{self.ops}", "shards": "1"}
        command = [binary, "serve"]
        for key, value in (defaults | settings).items():
            command += ["--set", f"{key}={value}"]
        super().__init__(name, command, directory, env={"TIDEGATE_AUTH__HS256_SECRET": SECRET})
        self.until(self.ready, "/readyz answers 200")

    def ready(self):
        return get(f"http://{self.host}:{self.ops}/readyz")[0] == 200

    def metric(self, name):
        """The sum of all series whose text begins with `name`."""
        lines = get(f"http://{self.host}:{self.ops}/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def token(binary, room="*=subscribe,publish", sub="checks"):
    """A token signed with the checks' secret."""
    made = subprocess.run(
        [binary, "token", "--sub", sub, "--room", room, "--ttl", "1h"],
        capture_output=True,
        text=True,
        check=True,
        env={"TIDEGATE_AUTH__HS256_SECRET": SECRET},
    )
    return made.stdout.strip()


class Client(Running):
    """One of the real clients in tests/clients, which report events as lines of JSON."""

    def __init__(self, script, directory, name, *arguments):
        self.happenings_file = Path(directory) / f"{name}.happenings"
        with self.happenings_file.open("w") as out:
            super().__init__(
                name, ["node", CLIENTS / script, *arguments], directory, stdout=out, stdin=subprocess.PIPE, text=True
            )

    def happenings(self):
        lines = self.happenings_file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def count(self, on):
        return sum(happening["on"] == on for happening in self.happenings())

    def messages(self):
        """The payloads that arrived, as text."""
        return [base64.b64decode(h["data"]).decode() for h in self.happenings() if h["on"] == "message"]

    def send(self, text):
        """Publishes in its room."""
        data = base64.b64encode(text.encode()).decode()
        self.process.stdin.write(json.dumps({"kind": "text", "data": data}) + "\n")
        self.process.stdin.flush()

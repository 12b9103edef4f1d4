"""The systemd unit: valid, hardened by systemd's own score, and it starts a node that serves and drains.

No systemd runs here, so the test itself starts the node as the unit would: the command, the environment, the
credentials, a dedicated user, no capabilities, the descriptor limit. `under_systemd` tests the unit itself."""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import tomllib

import pytest

from chart import ROOT
from processes import SECRET, Redis, Running, free_ports, get

UNIT = ROOT / "deploy" / "systemd" / "tidegate.service"
# systemd's scale goes from 0 (safe) to 10. The remaining exposure is network access.
EXPOSURE = 1.5


@pytest.fixture(scope="module")
def here(tmp_path_factory, tidegate):
    """The unit with the path of this binary, because systemd checks that it exists."""
    unit = tmp_path_factory.mktemp("systemd") / "tidegate.service"
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/tidegate", str(tidegate)))
    return unit


def analyze(*arguments):
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@needs_systemd
def test_the_unit_is_valid(here):
    checked = analyze("verify", here)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr


@needs_systemd
def test_the_unit_is_hardened(here):
    checked = analyze("security", "--offline=true", here)
    overall = float(re.search(r"Overall exposure level for \S+: ([\d.]+)", checked.stdout)[1])
    assert overall <= EXPOSURE, checked.stdout


def service():
    # A key may occur several times: collect all of its values, in order.
    class Several(dict):
        def __setitem__(self, key, value):
            if isinstance(value, list) and key in self:
                self[key].extend(value)
            else:
                super().__setitem__(key, value)

    parser = configparser.RawConfigParser(strict=False, dict_type=Several, delimiters=("=",), interpolation=None)
    parser.optionxform = str
    parser.read(UNIT)
    return {key: value.split("\n") for key, value in parser["Service"].items()}


def counted(metrics, name):
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name))


def test_its_grace_is_longer_than_the_drain():
    sample = (UNIT.parent / "tidegate.toml").read_text()
    deadline = int(re.search(r'^deadline = "(\d+)s"$', sample, re.M)[1])
    assert int(service()["TimeoutStopSec"][0]) > deadline


def test_its_limit_of_descriptors_is_enough():
    sample = (UNIT.parent / "tidegate.toml").read_text()
    assert int(service()["LimitNOFILE"][0]) > int(re.search(r"^connections = (\d+)$", sample, re.M)[1])


def test_the_started_node_serves_and_drains(tidegate, tmp_path):
    redis = Redis(tmp_path)
    unit = service()
    public, ops = free_ports(2)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    secrets = {"hs256": SECRET, "broker-url": redis.url}
    assert {credential.split(":")[0] for credential in unit["LoadCredential"]} == set(secrets)
    for name, value in secrets.items():
        (credentials / name).write_text(value)
    toml = tmp_path / "tidegate.toml"
    text = (UNIT.parent / "tidegate.toml").read_text()
    text = text.replace("0.0.0.0:8080", f"127.0.0.1:{public}").replace("127.0.0.1:9090", f"127.0.0.1:{ops}")
    toml.write_text(re.sub(r'^window = "60s"$', 'window = "1s"', text, flags=re.M))
    environment = dict(entry.replace("%d", str(credentials)).split("=", 1) for entry in unit["Environment"])

    def command(line):
        words = shlex.split(line)
        assert words[0] == "/usr/local/bin/tidegate"
        return [tidegate, *(word.replace("/etc/tidegate/tidegate.toml", str(toml)) for word in words[1:])]

    confined = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    node = Running("node", [*confined, *command(unit["ExecStart"][0])], tmp_path, env=environment)
    try:
        node.until(lambda: get(f"http://127.0.0.1:{ops}/readyz")[0] == 200, "ready")
        reloads = "tidegate_config_reloads_total"
        metrics = get(f"http://127.0.0.1:{ops}/metrics")[1]
        node.process.send_signal(signal.SIGHUP)
        node.until(
            lambda: counted(get(f"http://127.0.0.1:{ops}/metrics")[1], reloads) > counted(metrics, reloads),
            "read again",
        )
        node.terminate()
        assert node.wait() == 0
    finally:
        node.stop()
        redis.stop()


def test_a_reload_is_a_signal_without_credentials():
    """systemd runs ExecReload without the service's credentials, so a command that reads them always fails."""
    assert [shlex.split(line) for line in service()["ExecReload"]] == [["/bin/kill", "-HUP", "$MAINPID"]]


def test_the_ops_listener_is_local():
    sample = tomllib.loads((UNIT.parent / "tidegate.toml").read_text())
    assert sample["ops"]["listen"] == "127.0.0.1:9090"


def test_an_invalid_configuration_is_not_restarted(tidegate, tmp_path):
    toml = tmp_path / "tidegate.toml"
    toml.write_text("[limits]\nconnectons = 5\n")
    ended = subprocess.run([tidegate, "serve", "--config", toml], capture_output=True, check=False, env={})
    assert [str(ended.returncode)] == service()["RestartPreventExitStatus"]

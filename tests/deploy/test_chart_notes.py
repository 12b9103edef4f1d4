"""NOTES.txt is correct for the values, and its commands, when pasted, do what it says."""

import os
import signal
import subprocess

import pytest
import yaml

from chart import CHART, FLEET, merge, render
from processes import SECRET, Node, eventually

# A fake kubectl: runs the node's own program instead of a pod's, forwards a port to a Service, waits.
KUBECTL = """#!/bin/sh
case "$*" in
  *" rollout status deployment/r-tidegate") ;;
  *" port-forward service/r-tidegate 8080:80") ;;
  *" get service r-tidegate -o jsonpath={.status.loadBalancer.ingress[0].ip}{.status.loadBalancer.ingress[0].hostname}")
    printf %s "$ADDRESS_OF_THE_LOAD_BALANCER" ;;
  *" exec deployment/r-tidegate -- /tidegate "*)
    while [ "$1" != /tidegate ]; do shift; done
    command="$2"; [ "$3 $4" = "--config /etc/tidegate/config/tidegate.toml" ] || exit 3
    shift 4; exec "$TIDEGATE" "$command" "$@" ;;
  *) echo "not a command of NOTES.txt: $*" >&2; exit 2 ;;
esac
"""


def commands(told):
    """The commands to paste: the indented lines that are not prose."""
    lines = [line[3:] for line in told.splitlines() if line.startswith("   ")]
    return "\n".join(line for line in lines if not line.startswith("Web pages"))


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ({}, "http://127.0.0.1:8080"),
        ({"service": {"type": "LoadBalancer"}}, None),
        ({"service": {"type": "LoadBalancer", "port": 8000}}, "$ADDRESS:8000"),
        ({"httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.example"]}}, "https://a.example"),
        ({"ingress": {"enabled": True, "tls": [{"secretName": "a"}]}}, "https://tidegate.example.com"),
        ({"ingress": {"enabled": True}}, "http://tidegate.example.com"),
    ],
    ids=["port-forward", "load balancer", "load balancer at a port", "gateway", "ingress", "ingress without tls"],
)
def test_the_commands_of_the_notes_work(tidegate, tmp_path, values, written):
    node = Node(tidegate, tmp_path)
    address = f"{node.host}:{node.public}"
    told = render(merge(FLEET, values), notes=True)
    text = commands(told)
    if written:
        assert f"{written}/rooms/lobby" in text
        here = address if written.startswith("$") else f"http://{address}"
        text = text.replace(written, here)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TIDEGATE": str(tidegate),
        "TIDEGATE_AUTH__HS256_SECRET": SECRET,
        "ADDRESS_OF_THE_LOAD_BALANCER": address,
    }
    said = tmp_path / "said"
    with said.open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-euc", f"{text}\nwait"], stdout=out, stderr=out, env=env, start_new_session=True
        )
    try:
        eventually(lambda: "data: hello" in said.read_text() or shell.poll() is not None, "the message")
        assert "data: hello" in said.read_text(), f"{said.read_text()}\n{text}"
    finally:
        # The listening command never ends by itself.
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        node.stop()


def test_notes_list_the_next_three_steps_and_the_risks():
    # Helm 4 only: a dry run of Helm 3 asks a cluster for its version.
    told = render({}, notes=True)
    for step in ("1. ", "2. ", "3. "):
        assert step in told
    assert "rollout status deployment/r-tidegate" in told
    assert "logs deployment/r-tidegate" in told
    # The node prints a URL with its own port, as this machine reaches it.
    assert "port-forward service/r-tidegate 8080:80" in told
    assert "WARNING: no key is set" in told
    assert "WARNING: one pod." in told

    fleet = yaml.safe_load((CHART / "ci" / "production-values.yaml").read_text())
    told = render(fleet, notes=True)
    assert "WARNING" not in told
    assert "/tidegate token --config /etc/tidegate/config/tidegate.toml" in told
    assert '"https://rooms.example.com/rooms/lobby"' in told

    open_door = render(fleet | {"ingress": {"enabled": True}, "httpRoute": {"enabled": False}}, notes=True)
    assert "tokens are sent unencrypted" in open_door
    unlisted = render({"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}, notes=True)
    assert "config.public.trusted_proxies is empty" in unlisted
    assert "no machine with a pod of this release can be drained" in render(
        {"podDisruptionBudget": {"maxUnavailable": 0}}, notes=True
    )
    assert "development Redis has no password" in render(
        yaml.safe_load((CHART / "ci" / "development-values.yaml").read_text()), notes=True
    )

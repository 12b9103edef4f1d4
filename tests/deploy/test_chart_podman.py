"""The rendered Deployment, run with `podman kube play`: it becomes ready, is as hardened as declared, serves a
client, drains, and exits with 0.

The test modifies the rendering where podman differs from Kubernetes: the image is built here, Secrets are in a
directory (podman 4.3 has no secret volumes), and the pod uses the machine's network (so it gets free ports, and does
not declare them: podman would publish them).
Podman sends SIGTERM without the pre-stop sleep and runs no probes, so the test itself checks both."""

import subprocess
from pathlib import Path

import pytest
import yaml

from chart import deployment_name, node_container, of_kind, pod_spec, render
from processes import SECRET, Client, Node, Redis, eventually, free_ports, get, token


@pytest.fixture
def redis(tmp_path):
    redis = Redis(tmp_path)
    yield redis
    redis.stop()


def play(podman, directory, values, secrets, **changes):
    """Plays the ConfigMap and the Deployment, with Secrets as a directory."""
    objects = render(values)
    pod_spec(objects, deployment_name(objects)).update(changes)
    # The kubelet's layout, readable by the node's user.
    held = directory / "secrets"
    held.mkdir()
    held.chmod(0o755)
    name = deployment_name(objects)
    for volume in pod_spec(objects, name)["volumes"]:
        if "projected" in volume:
            for source in volume.pop("projected")["sources"]:
                (item,) = source["secret"]["items"]
                file = held / item["path"]
                file.write_text(secrets[source["secret"]["name"]][item["key"]])
                file.chmod(0o444)
            volume["hostPath"] = {"path": str(held)}
    del node_container(objects, name)["ports"]
    # A separate directory: podman considers a directory with the container's name a build context.
    (directory / "play").mkdir()
    file = directory / "play" / "pod.yaml"
    file.write_text(yaml.safe_dump_all([of_kind(objects, "ConfigMap"), of_kind(objects, "Deployment")]))
    podman("kube", "play", "--build=false", "--network", "host", file, cwd=file.parent)
    return f"{name}-pod-0-tidegate"


def test_the_deployment_runs_as_rendered(podman, redis, tidegate, tmp_path):
    public, ops = free_ports(2)
    values = {
        "image": {"repository": "localhost/tidegate", "tag": "check", "pullPolicy": "Never"},
        "containerPorts": {"public": public, "ops": ops},
        "auth": {"existingSecret": "keys"},
        "redis": {"existingSecret": "redis"},
        "drain": {"windowSeconds": 1, "flushSeconds": 10},
        "config": {"limits": {"connections": 100}},
    }
    secrets = {"keys": {"hs256-secret": SECRET}, "redis": {"url": redis.url}}
    container = play(podman, tmp_path, values, secrets)

    def inspect(path):
        return podman("inspect", "--format", path, container)

    try:
        # It becomes ready, according to the probes of the manifest.
        spec = pod_spec(render(values))["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = spec[probe]["httpGet"]["path"]
            eventually(lambda url=f"http://127.0.0.1:{ops}{path}": get(url)[0] == 200, f"{probe} answers 200")

        # The kernel confirms the hardening of the manifest.
        pid = int(inspect("{{.State.Pid}}"))
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["Uid"].split() == ["65532"] * 4
        assert status["Gid"].split() == ["65532"] * 4
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["Seccomp"] == "2", "a filter is in force"
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        (root,) = [mount for mount in mounts if mount[4] == "/"]
        assert "ro" in root[5].split(","), "the root is read-only"
        environment = Path(f"/proc/{pid}/environ").read_text()
        assert SECRET not in environment and "redis://" not in environment

        # It serves a client, with the key and the Redis URL from files.
        url = f"ws://127.0.0.1:{public}/rooms/lobby?token={token(tidegate)}"
        listener = Client("ws.mjs", tmp_path, "listener", url)
        try:
            listener.until(lambda: listener.count("open"), "connected")
            subprocess.run(
                ["redis-cli", "-p", str(redis.port), "PUBLISH", "room:lobby", "hello"], check=True, capture_output=True
            )
            listener.until(lambda: listener.messages() == ["hello"], "the message")

            # On SIGTERM it drains: it tells its client to reconnect, and exits with 0.
            grace = pod_spec(render(values))["terminationGracePeriodSeconds"]
            podman("stop", "--time", grace, container)
            assert inspect("{{.State.ExitCode}}") == "0"
            closes = eventually(lambda: [h for h in listener.happenings() if h["on"] == "close"], "closed")
            assert closes == [{"on": "close", "code": 1012, "reason": "node is leaving, come back"}]
        finally:
            listener.stop()
    except BaseException:
        print(podman("logs", container, check=False))
        raise


def test_an_invalid_configuration_stops_the_container_with_a_message(podman, tmp_path):
    public, ops = free_ports(2)
    values = {
        "fullnameOverride": "broken",
        "image": {"repository": "localhost/tidegate", "tag": "check", "pullPolicy": "Never"},
        "containerPorts": {"public": public, "ops": ops},
        # A fault that only the node detects: a rule between two values.
        "config": {"heartbeat": {"interval": "60s", "timeout": "30s"}},
    }
    # Kubernetes would restart it again and again; here one start is enough.
    container = play(podman, tmp_path, values, {}, restartPolicy="Never")
    eventually(lambda: podman("inspect", "--format", "{{.State.Status}}", container) == "exited", "the container ends")
    assert podman("inspect", "--format", "{{.State.ExitCode}}", container) == "2"


def test_the_test_hook_queries_a_running_node(podman, tidegate, tmp_path):
    """The hook's own container, with the addresses of a running node."""
    node = Node(tidegate, tmp_path)
    try:
        (hook,) = [o for o in render({}) if o["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
        arguments = hook["spec"]["containers"][0]["args"]
        here = [argument.replace("r-tidegate-ops:9090", f"127.0.0.1:{node.ops}") for argument in arguments]
        assert here != arguments
        run = ["run", "--rm", "--network", "host", "--read-only", "--cap-drop", "ALL", "--user", "65532"]
        assert podman(*run, "localhost/tidegate:check", *here).endswith("200 OK")
    finally:
        node.stop()

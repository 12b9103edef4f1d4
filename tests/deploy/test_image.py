"""The image: its contents, its labels, and that it runs, becomes healthy, and drains."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from chart import ROOT
from containers import libraries
from processes import SECRET, Client, eventually, free_ports, token

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
VENV = ROOT / "tests" / ".venv" / "bin"
IMAGE = "localhost/tidegate:check"
MOST = 20_000_000


def test_the_dockerfile_is_clean():
    checked = subprocess.run([VENV / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_build_context_is_sufficient_and_minimal(podman, tmp_path):
    """.dockerignore as a builder applies it: the workspace loads, and no test, log or history is in the context."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /src\n")
    name = "localhost/context:check"
    podman.run(
        "buildah", "bud", "--isolation", "chroot", "--quiet", "--file", tmp_path / "Dockerfile", "--tag", name, ROOT
    )
    container = podman.run("buildah", "from", name)
    source = Path(podman.run("buildah", "mount", container)) / "src"
    try:
        top = {path.name for path in source.iterdir()}
        assert top == {"Cargo.toml", "Cargo.lock", "gateway", "broker-bridge", "tests", "loadtest"}
        assert {path.name for path in (source / "tests").iterdir()} == {"Cargo.toml", "src"}
        read = subprocess.run(
            ["cargo", "metadata", "--no-deps", "--format-version", "1", "--offline"],
            cwd=source,
            capture_output=True,
            text=True,
            check=False,
        )
        assert read.returncode == 0, read.stderr
        assert "tidegate" in {package["name"] for package in json.loads(read.stdout)["packages"]}
    finally:
        podman.run("buildah", "rm", container)


def test_the_image_has_its_metadata(podman):
    image = json.loads(podman("inspect", "--type", "image", IMAGE))[0]
    config = image["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "MIT OR Apache-2.0"
    assert labels["org.opencontainers.image.revision"] == "abc1234"
    assert {"title", "description", "source", "documentation", "version"} <= {
        label.removeprefix("org.opencontainers.image.") for label in labels
    }
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["/tidegate"]
    assert set(config["ExposedPorts"]) == {"8080/tcp", "9090/tcp"}
    assert config["StopSignal"] == "SIGTERM"
    assert image["Healthcheck"]["Test"] == ["CMD", "/tidegate", "healthcheck"]
    # The environment overrides a configuration file, so the image sets no TIDEGATE_ variables.
    assert not [entry for entry in config["Env"] if entry.startswith("TIDEGATE")]


def test_the_image_contains_the_binary_and_certificates(podman, tidegate):
    container = podman.run("buildah", "from", IMAGE)
    root = Path(podman.run("buildah", "mount", container))
    try:
        held = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        expected = {"tidegate", "etc/ssl/certs/ca-certificates.crt"}
        assert expected <= held
        brought = {library.lstrip("/") for library in libraries(tidegate)}
        assert {file for file in held - expected if file.split("/")[0] not in ("dev", "proc", "sys", "run")} == brought
        if not brought:
            size = sum((root / file).stat().st_size for file in held)
            assert size <= MOST, f"{size} bytes"
            print(f"{size} bytes in the image")
    finally:
        podman.run("buildah", "rm", container)


@pytest.fixture
def running(podman, tmp_path):
    """The image on this machine's network, with its own command except for the ports, which may be in use."""
    public, ops = free_ports(2)
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o444)
    name = f"image-{public}"
    podman(
        "run",
        "--detach",
        "--name",
        name,
        "--network",
        "host",
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--volume",
        f"{tmp_path}/secret:/secret:ro",
        "--env",
        "TIDEGATE_AUTH__HS256_SECRET_FILE=/secret",
        "--env",
        f"TIDEGATE_OPS__LISTEN=127.0.0.1:{ops}",
        "--env",
        "TIDEGATE_DRAIN__WINDOW=200ms",
        IMAGE,
        "serve",
        "--public-listen",
        f"0.0.0.0:{public}",
    )
    yield name, public
    podman("rm", "--force", "--time", "0", name, check=False)


def test_the_container_is_healthy_serves_and_drains(podman, running, tidegate, tmp_path):
    name, public = running
    # The HEALTHCHECK command, in the container, with the container's environment.
    eventually(lambda: podman("healthcheck", "run", name) in ("", "healthy"), "the first health check")
    eventually(lambda: podman("exec", name, "/tidegate", "healthcheck", check=False).endswith("200 OK"), "healthy")
    client = Client("ws.mjs", tmp_path, "client", f"ws://127.0.0.1:{public}/rooms/lobby?token={token(tidegate)}")
    try:
        client.until(lambda: client.count("open"), "connected")
        client.send("hello")
        client.until(lambda: client.messages() == ["hello"], "its own message")
        podman("stop", "--time", "30", name)
        assert podman("inspect", "--format", "{{.State.ExitCode}}", name) == "0"
        client.until(lambda: client.count("close") or client.process.poll() == 0, "told to come back")
    finally:
        client.stop()


def test_a_container_without_a_node_is_unhealthy(podman):
    (ops,) = free_ports(1)
    podman(
        "run",
        "--name",
        f"nobody-{ops}",
        "--network",
        "host",
        "--env",
        f"TIDEGATE_OPS__LISTEN=127.0.0.1:{ops}",
        IMAGE,
        "healthcheck",
        check=False,
    )
    assert podman("inspect", "--format", "{{.State.ExitCode}}", f"nobody-{ops}") == "1"


def test_the_sbom_lists_the_dependencies(tmp_path):
    """The SBOM of a release, from the lock file that the image is built with."""
    file = tmp_path / "sbom.json"
    subprocess.run(
        [VENV / "syft", "scan", f"file:{ROOT}/Cargo.lock", "--output", f"spdx-json={file}", "--quiet"],
        check=True,
        env={**os.environ, "SYFT_CHECK_FOR_APP_UPDATE": "false"},
    )
    named = {package["name"] for package in json.loads(file.read_text())["packages"]}
    locked = {
        line.split('"')[1] for line in (ROOT / "Cargo.lock").read_text().splitlines() if line.startswith("name = ")
    }
    assert locked <= named

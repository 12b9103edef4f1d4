"""Fixtures for all tests."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from chart import ROOT, VALUES
from containers import Podman


def _target_directory():
    metadata = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--no-deps", "--offline"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return Path(json.loads(metadata.stdout)["target_directory"]) if metadata.returncode == 0 else ROOT / "target"


@pytest.fixture(scope="session")
def tidegate():
    """A real node's binary: TIDEGATE_BIN, or the most recent build."""
    if given := os.environ.get("TIDEGATE_BIN"):
        return Path(given)
    built = [path for path in _target_directory().glob("*/tidegate") if os.access(path, os.X_OK)]
    assert built, "no node was built: cargo build -p tidegate, or set TIDEGATE_BIN"
    return max(built, key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="session")
def podman(tidegate):
    """Podman with the image `localhost/tidegate:check`, built from deploy/Dockerfile around the binary."""
    if os.geteuid() != 0:
        pytest.skip("needs root: rootless containers want user namespaces and id ranges set up")
    # Not one of pytest's directories: podman needs a short path for its sockets.
    directory = Path(tempfile.mkdtemp(prefix="tidegate-"))
    podman = Podman(directory)
    try:
        podman.build(tidegate, "localhost/tidegate:check", "--build-arg", "REVISION=abc1234")
        yield podman
    finally:
        podman.remove()
        shutil.rmtree(directory, ignore_errors=True)


def pytest_generate_tests(metafunc):
    if "values_file" in metafunc.fixturenames:
        metafunc.parametrize("values_file", VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))

"""The information that the build gives the program about itself."""

import os
import subprocess

import pytest

from chart import ROOT


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    program = tmp_path_factory.mktemp("build") / "script"
    subprocess.run(["rustc", "--edition", "2024", ROOT / "gateway" / "build.rs", "-o", program], check=True)
    return program


def told(script, directory, **environment):
    """The lines that the build script prints for cargo."""
    environment = {"PATH": os.environ["PATH"], **environment}
    ran = subprocess.run([script], cwd=directory, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def revision(lines):
    return next(line for line in lines if "TIDEGATE_REVISION" in line).rpartition("=")[2]


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    ran = subprocess.run(["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def test_a_release_names_its_commit_and_is_rebuilt_for_another(script, tmp_path):
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "a")
    lines = told(script, tmp_path, PROFILE="release")
    assert revision(lines) == git(tmp_path, "rev-parse", "--short=12", "HEAD")
    watched = [line.rpartition("=")[2] for line in lines if line.startswith("cargo::rerun-if-changed=")]
    # A path that does not exist would make cargo run the script every time.
    assert watched == ["build.rs", ".git/logs/HEAD"] and (tmp_path / watched[1]).exists()


def test_other_builds_do_not_depend_on_commits(script, tmp_path):
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "a")
    lines = told(script, tmp_path, PROFILE="debug")
    assert revision(lines) == "unknown"
    assert [line for line in lines if "rerun-if-changed" in line] == ["cargo::rerun-if-changed=build.rs"]


def test_build_revision_overrides_git(script, tmp_path):
    for profile in ("debug", "release"):
        assert revision(told(script, tmp_path, PROFILE=profile, BUILD_REVISION=" abc1234 ")) == "abc1234"


def test_without_a_repository_it_is_unknown(script, tmp_path):
    nowhere = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for given in ({}, {"BUILD_REVISION": ""}):
        assert revision(told(script, tmp_path, PROFILE="release", **nowhere, **given)) == "unknown"

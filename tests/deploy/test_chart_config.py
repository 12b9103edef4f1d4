"""The configuration that the chart renders is one that the real node takes, and means what the values say."""

import subprocess
import tomllib

import pytest
import yaml

from chart import CHART, config_text, deployment_name, render

SECRETS = {
    "auth.hs256_secret_file": "0123456789abcdef0123456789abcdef0123456789abcdef",
    "broker.url_file": "rediss://user:password@redis.example.com:6379/0",
    "broker.ca_file": "",
}


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A pair as cert-manager would write it."""
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=rooms.example.com",
            "-keyout",
            directory / "tls.key",
            "-out",
            directory / "tls.crt",
        ],
        check=True,
        capture_output=True,
    )
    return directory


def check(tidegate, text, tmp_path, certificate=None):
    """What `tidegate check-config` says of a rendered file, once the files it names are there."""
    secrets = tmp_path / "secrets"
    secrets.mkdir(exist_ok=True)
    for name, value in SECRETS.items():
        (secrets / name).write_text(value)
    if certificate:
        (tmp_path / "tls").symlink_to(certificate)
    path = tmp_path / "tidegate.toml"
    path.write_text(text.replace("/etc/tidegate/", f"{tmp_path}/"))
    # A clean environment: nothing of this machine may mend what is broken.
    return subprocess.run(
        [tidegate, "check-config", "--config", path], capture_output=True, text=True, check=False, env={}
    )


def test_the_node_takes_what_is_rendered(tidegate, values_file, tmp_path, certificate):
    objects = render(files=[values_file])
    checked = check(tidegate, config_text(objects, deployment_name(objects)), tmp_path, certificate)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == "configuration is valid\n"


def test_the_node_refuses_what_it_does_not_know(tidegate, tmp_path):
    objects = render({"config": {"limits": {"connectons": 5}}})
    checked = check(tidegate, config_text(objects), tmp_path)
    assert checked.returncode == 2
    assert "limits.connectons" in checked.stderr and "connections" in checked.stderr


@pytest.mark.parametrize("binary", ["helm3", "helm4"])
def test_values_arrive_as_they_are(binary):
    config = {
        "origins": ["https://a.example", 'quo"ted', "a\\b", "tab\there", "<&>", "ü€"],
        "demo": False,
        "limits": {"connections": 10_000_000, "message_size": "64KiB", "rooms_per_session": 1},
        "rooms": {"a b.c:*": {"grant": ["subscribe"]}, "inbox:{sub}": {"grant": []}},
        "future": {
            "ratio": 0.5,
            "nested": {"deep": {"x": -1}},
            "tables": [{"kid": "a", "weight": 1}, {"kid": "b", "weight": 2}],
        },
    }
    read = tomllib.loads(config_text(render({"config": config}, binary=binary)))
    assert {key: read[key] for key in config} == config
    assert type(read["limits"]["connections"]) is int


def test_what_is_null_is_left_out():
    read = tomllib.loads(config_text(render({"config": {"log": {"format": None}, "limits": {"connections": None}}})))
    assert "format" not in read.get("log", {})
    assert "connections" not in read.get("limits", {})


def test_the_defaults_of_the_chart_say_nothing_that_the_node_would_not_say_itself(tidegate):
    """Every key that the chart manages is still a key of the node."""
    known = subprocess.run([tidegate, "default-config"], capture_output=True, text=True, check=True).stdout
    guards = (CHART / "templates" / "_guards.tpl").read_text()
    managed = [line.split('"')[1] for line in guards.splitlines() if line.startswith('  "') and "." in line]
    assert len(managed) == 12
    table = None
    keys = set()
    for line in known.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif " = " in line and (name := line.removeprefix("# ").split(" = ")[0]).replace("_", "").isalnum():
            keys.add(f"{table}.{name}" if table else name)
    assert set(managed) <= keys, f"the node does not know {set(managed) - keys}"


def test_notes_name_the_next_three_steps_and_what_is_dangerous():
    # By Helm 4 alone: a dry run of Helm 3 asks a cluster for its version.
    told = render({}, notes=True)
    for step in ("1. ", "2. ", "3. "):
        assert step in told
    assert "rollout status deployment/r-tidegate" in told
    assert "logs deployment/r-tidegate" in told
    assert "WARNING: no key is set" in told
    assert "WARNING: one pod." in told

    fleet = yaml.safe_load((CHART / "ci" / "production-nginx-values.yaml").read_text())
    told = render(fleet, notes=True)
    assert "WARNING" not in told
    assert "/tidegate token --config /etc/tidegate/config/tidegate.toml" in told

    open_door = render(fleet | {"ingress": {"enabled": True}}, notes=True)
    assert "tokens travel in the open" in open_door
    unlisted = render({"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}, notes=True)
    assert "config.public.trusted_proxies is empty" in unlisted
    assert "no machine with a pod of this release can be drained" in render(
        {"podDisruptionBudget": {"maxUnavailable": 0}}, notes=True
    )
    assert "development Redis has no password" in render(
        yaml.safe_load((CHART / "ci" / "development-values.yaml").read_text()), notes=True
    )

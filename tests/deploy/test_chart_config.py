"""The real node accepts the configuration that the chart renders, and reads it as the values say."""

import itertools
import json
import re
import subprocess
import tomllib

import jsonschema
import pytest
import yaml

import config_schema
from chart import CHART, Refused, config_text, deployment_name, render

SECRETS = {
    "auth.hs256_secret_file": "0123456789abcdef0123456789abcdef0123456789abcdef",
    "broker.url_file": "rediss://user:password@redis.example.com:6379/0",
    "broker.ca_file": "",
}


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A key pair as cert-manager would write it."""
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
            "-addext",
            "subjectAltName=DNS:rooms.example.com",
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
    """The output of `tidegate check-config` for a rendered file, with the files that it names in place."""
    secrets = tmp_path / "secrets"
    secrets.mkdir(exist_ok=True)
    for name, value in SECRETS.items():
        (secrets / name).write_text(value)
    if certificate:
        (secrets / "broker.ca_file").write_text((certificate / "tls.crt").read_text())
        (tmp_path / "tls").symlink_to(certificate)
    path = tmp_path / "tidegate.toml"
    path.write_text(text.replace("/etc/tidegate/", f"{tmp_path}/"))
    # A clean environment: nothing on this machine may hide a fault.
    return subprocess.run(
        [tidegate, "check-config", "--config", path], capture_output=True, text=True, check=False, env={}
    )


def test_the_node_accepts_the_rendered_configuration(tidegate, values_file, tmp_path, certificate):
    objects = render(files=[values_file])
    checked = check(tidegate, config_text(objects, deployment_name(objects)), tmp_path, certificate)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == "configuration is valid\n"


def test_the_config_schema_is_current():
    assert config_schema.SCHEMA.read_text() == config_schema.schema_with_config(), (
        "run python tests/deploy/config_schema.py"
    )


# Typical values, valid and invalid, for keys of every kind.
CANDIDATES = [
    *[True, False, 0, 1, 2, 7, 65, 300, 70000, 10_000_001, -1, 0.5, "", "auto", "off", "none", "on", "true", "0", "7", "007", "-1"],
    *["0s", "5ms", "10ms", "7s", "1m", "2h", "200h", "7", "7 s", "1.5s", "7d", "1B", "7KiB", "7MB", "7 KiB", "2GiB"],
    *["7/s", "600/m burst 50", "0/s", "7/d", "7KiB/s", "1MiB/s burst 4MiB", "7 / s", "7/s  burst 50", "7/s burst"],
    *["text", "json", "JSON", "forwarded", "x-forwarded-for", "close", "latest", "drop_oldest", "drop", "info"],
    *["memory:", "redis://h:6379/0", "https://login.example/jwks", "127.0.0.1:8080", "::1", "10.0.0.0/8", "/a/file"],
    *[[], ["*"], ["https://a.example"], ["10.0.0.0/8", "::1"], ["subscribe"], ["subscribe", "fly"], [1], [["a"]]],
    *["subscribe,publish", "https://a.example,https://b.example", "x" * 40, "a{b", {"a": 1}, {}],
    {"a": {"algorithm": "ES256", "public_key_file": "/a"}},
    {"a": {"algorithm": "HS256", "secret_file": "/a"}},
    {"a": {"algorithm": "ES256"}},
    {"a": {"public_key_file": "/a"}},
]


def toml(value):
    """A value in TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def test_the_chart_accepts_every_value_that_the_node_accepts(tidegate, tmp_path):
    schema = json.loads(config_schema.SCHEMA.read_text())
    validators = {}
    for key, _ in config_schema.reference():
        part = schema["properties"]["config"]
        for name in key.split("."):
            part = part["additionalProperties"] if name.startswith('"') else part["properties"][name]
        validators[key.replace("<pattern>", "news:*")] = jsonschema.Draft7Validator(
            part | {"definitions": schema["definitions"]}
        )
    taken = dict.fromkeys(validators, 0)
    path = tmp_path / "tidegate.toml"
    # All keys at once: the node lists every key whose value it refuses. A value and its file exclude each other.
    either = {key for key in validators if f"{key}_file" in validators}
    halves = [set(validators) - either, set(validators) - {f"{key}_file" for key in either}]
    for value, keys in itertools.product(CANDIDATES, halves):
        path.write_text("".join(f"{key} = {toml(value)}\n" for key in sorted(keys)))
        checked = subprocess.run(
            [tidegate, "check-config", "--config", path], capture_output=True, text=True, check=False, env={}
        )
        assert checked.returncode == 2 and "no such key" not in checked.stderr, checked.stderr
        refused = {line.split(" ", 1)[0] for line in checked.stderr.splitlines()}
        for key in keys - refused:
            taken[key] += 1
            assert validators[key].is_valid(value), f"the node takes {key} = {toml(value)}, and the chart does not"
    # Not all: some keys are compared with others, and some files are read at once.
    assert sum(map(bool, taken.values())) > 0.8 * len(taken), taken


@pytest.mark.parametrize(
    "pattern",
    ["a", "*", "a:*", "{sub}", "user:{sub}", "{sub}:a*", "日本/*", "a b", "a*b", "{sub}*", "{sub}{sub}", "{a}", "a\t", ""],
)
def test_room_patterns_match_those_of_the_node(tidegate, tmp_path, pattern):
    path = tmp_path / "tidegate.toml"
    path.write_text(f"[rooms.{json.dumps(pattern)}]\npriority = true\n")
    node = subprocess.run([tidegate, "check-config", "--config", path], capture_output=True, check=False, env={})
    values = {"config": {"rooms": {pattern: {"priority": True}}}}
    if node.returncode == 0:
        assert tomllib.loads(config_text(render(values)))["rooms"] == values["config"]["rooms"]
    else:
        with pytest.raises(Refused, match="propertyName|Property name"):
            render(values)


@pytest.mark.parametrize(("key", "kind"), config_schema.reference())
def test_every_kind_of_value_is_checked(key, kind):
    """A new kind of value in the reference would not be checked; this test names the kind to add to `choices`."""
    assert config_schema.value(kind) != config_schema.ANYTHING, f"{key}: config_schema.choices does not know {kind!r}"


@pytest.mark.parametrize("binary", ["helm3", "helm4"])
def test_a_limit_can_be_off_as_yaml_reads_it(tidegate, tmp_path, binary):
    values = tmp_path / "values.yaml"
    values.write_text("config:\n  limits:\n    accepts: off\n    bytes: 'off'\n    commands: 0\n")
    checked = check(tidegate, config_text(render(files=[values], binary=binary)), tmp_path)
    assert checked.returncode == 0, checked.stderr


def test_no_secret_can_be_given_by_config():
    """They must not be in a ConfigMap: they come from a Secret, as a file."""
    secret = re.compile("(secrets?|password|private_key|api_keys?)$")
    secrets = [key for key, _ in config_schema.reference() if secret.search(key)]
    assert secrets
    for key in secrets:
        table, name = key.split(".")
        with pytest.raises(Refused, match=f"config.{key}: the chart sets this key"):
            render({"config": {table: {name: "x" * 40}}})


@pytest.mark.parametrize("binary", ["helm3", "helm4"])
def test_values_arrive_unchanged(binary):
    config = {
        "origins": ["https://a.example", 'quo"ted', "a\\b", "tab\there", "<&>", "ü€"],
        "demo": False,
        "limits": {"connections": 10_000_000, "message_size": "64KiB", "rooms_per_session": 1},
        "rooms": {"a-b.c:*": {"grant": ["subscribe"]}, "inbox:{sub}": {"history": {"size": 100}}},
        "auth": {"keys": {"a b": {"algorithm": "ES256", "public_key_file": "/keys/a b.pem"}}},
    }
    read = tomllib.loads(config_text(render({"config": config}, binary=binary)))
    assert {key: read[key] for key in config} == config
    assert type(read["limits"]["connections"]) is int


def test_null_values_are_omitted():
    read = tomllib.loads(config_text(render({"config": {"log": {"format": None}, "limits": {"connections": None}}})))
    assert "format" not in read.get("log", {})
    assert "connections" not in read.get("limits", {})


def test_every_managed_key_is_a_key_of_the_node(tidegate):
    """Every key that the chart manages is still a key of the node."""
    known = subprocess.run([tidegate, "default-config"], capture_output=True, text=True, check=True).stdout
    guards = (CHART / "templates" / "_guards.tpl").read_text().split("$managed := dict")[1].split("}}")[0]
    managed = [line.split('"')[1] for line in guards.splitlines() if line.startswith('  "')]
    assert len(managed) == 12
    table = None
    keys = set()
    for line in known.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif " = " in line and (name := line.removeprefix("# ").split(" = ")[0]).replace("_", "").isalnum():
            keys.add(f"{table}.{name}" if table else name)
    assert set(managed) <= keys, f"the node does not know {set(managed) - keys}"

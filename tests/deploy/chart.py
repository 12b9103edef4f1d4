"""Renders the chart with real helm binaries. Owns how helm is called, and nothing of what is expected."""

import functools
import json
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "tidegate"
TOOLS = Path(__file__).parent / ".tools"
HELM = {"helm3": TOOLS / "helm3", "helm4": TOOLS / "helm4"}
# The oldest version that the chart takes, the middle, and the newest there are schemas for.
KUBERNETES = ("1.28", "1.33", "1.37")
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
# Enough for more than one pod.
FLEET = {"replicaCount": 2, "auth": {"existingSecret": "keys"}, "redis": {"existingSecret": "redis"}}


class Strict(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads YAML as kubectl, kustomize and Flux do: a key that stands twice is an error, and what their parser (Go's, of
    YAML 1.1 and 1.2) takes for a number or a truth is one, though PyYAML would take it for text."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)} twice", node.start_mark)
        return super().construct_mapping(node, deep)


# PyYAML wants a dot in a float and knows neither 0o17 nor y and n.
Strict.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
Strict.add_implicit_resolver("!number", re.compile(r"^[-+]?(0o[0-7_]+|[0-9][0-9_]*)$"), list("-+0123456789"))
Strict.add_implicit_resolver("!truth", re.compile(r"^[yYnN]$"), list("yYnN"))
Strict.add_constructor("!number", lambda loader, node: int(node.value.replace("_", ""), 0 if "o" in node.value else 10))
Strict.add_constructor("!truth", lambda loader, node: node.value in "yY")


class Refused(Exception):
    """Helm did not render; the text is what it said."""


def merge(base, over):
    """Deep merge of two maps, as helm does with several values files."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def helm(binary, *args, stdin=None):
    """Runs helm and returns its standard output."""
    done = subprocess.run([HELM[binary], *map(str, args)], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused(done.stderr)
    return done.stdout


def load(text):
    """The objects of a rendered text."""
    return [document for document in yaml.load_all(text, Strict) if document]


def render(
    values=None,
    *,
    files=(),
    binary="helm4",
    kubernetes="1.33",
    release="r",
    namespace="realtime",
    chart=CHART,
    notes=False,
):
    """The rendered objects, as a list of maps; the text of NOTES.txt with `notes`."""
    # JSON is YAML that every parser reads alike.
    text = _render(
        json.dumps(values or {}), tuple(map(str, files)), binary, kubernetes, release, namespace, chart, notes
    )
    return text.split("\nNOTES:\n", 1)[1] if notes else load(text)


@functools.lru_cache(maxsize=None)
def _render(values, files, binary, kubernetes, release, namespace, chart, notes):
    # NOTES.txt is rendered by an installation only; a dry run on the client asks no cluster.
    command = (
        ["install", release, chart, "--dry-run=client"]
        if notes
        else ["template", release, chart, "--kube-version", kubernetes]
    )
    for file in files:
        command += ["--values", file]
    return helm(binary, *command, "--namespace", namespace, "--values", "-", stdin=values)


def of_kind(objects, kind, name=None):
    """The one object of that kind (and name)."""
    found = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects of kind {kind} {name or ''}"
    return found[0]


def deployment_name(objects):
    """The name of the gateway's Deployment, and of most objects beside it."""
    return next(
        o["metadata"]["name"]
        for o in objects
        if o["kind"] == "Deployment" and o["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"
    )


def pod_spec(objects, name="r-tidegate"):
    """The pod of the gateway's Deployment."""
    return of_kind(objects, "Deployment", name)["spec"]["template"]["spec"]


def node_container(objects, name="r-tidegate"):
    """The gateway's container."""
    return pod_spec(objects, name)["containers"][0]


def config_text(objects, name="r-tidegate"):
    """The TOML file that the node gets."""
    return of_kind(objects, "ConfigMap", name)["data"]["tidegate.toml"]

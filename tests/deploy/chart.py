"""Renders the chart with real helm binaries. Owns how helm is called, not the expectations."""

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
# The oldest version that the chart supports, one in the middle, and the newest with schemas.
KUBERNETES = ("1.28", "1.33", "1.37")
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
# Enough for more than one pod.
FLEET = {"replicaCount": 2, "auth": {"existingSecret": "keys"}, "redis": {"existingSecret": "redis"}}


class Strict(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads YAML like kubectl, kustomize and Flux: a duplicate key is an error, and what their parser (Go's, of YAML
    1.1 and 1.2) reads as a number or a boolean is one here, even if PyYAML would read it as a string."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)} twice", node.start_mark)
        return super().construct_mapping(node, deep)


# PyYAML requires a dot in a float and supports neither 0o17 nor y and n.
Strict.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
Strict.add_implicit_resolver("!number", re.compile(r"^[-+]?(0o[0-7_]+|[0-9][0-9_]*)$"), list("-+0123456789"))
Strict.add_implicit_resolver("!truth", re.compile(r"^[yYnN]$"), list("yYnN"))
Strict.add_constructor("!number", lambda loader, node: int(node.value.replace("_", ""), 0 if "o" in node.value else 10))
Strict.add_constructor("!truth", lambda loader, node: node.value in "yY")


class Refused(Exception):
    """Helm refused to render; the text is its error message."""


def merge(base, over):
    """Deep merge of two maps, like helm merges several values files."""
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
    # Every YAML parser reads JSON the same way.
    text = _render(
        json.dumps(values or {}), tuple(map(str, files)), binary, kubernetes, release, namespace, chart, notes
    )
    return text.split("\nNOTES:\n", 1)[1] if notes else load(text)


@functools.lru_cache(maxsize=None)
def _render(values, files, binary, kubernetes, release, namespace, chart, notes):
    # Only an installation renders NOTES.txt; a dry run on the client needs no cluster.
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

"""Renders the chart with real helm binaries. Owns how helm is called, and nothing of what is expected."""

import functools
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


def render(values=None, *, files=(), binary="helm4", kubernetes="1.33", release="r", notes=False):
    """The rendered objects, as a list of maps; the text of NOTES.txt with `notes`."""
    text = _render(yaml.safe_dump(values or {}), tuple(map(str, files)), binary, kubernetes, release, notes)
    return text if notes else [document for document in yaml.safe_load_all(text) if document]


@functools.lru_cache(maxsize=None)
def _render(values, files, binary, kubernetes, release, notes):
    # NOTES.txt is rendered by an installation only; a dry run on the client asks no cluster.
    command = (
        ["install", release, CHART, "--dry-run=client"]
        if notes
        else ["template", release, CHART, "--kube-version", kubernetes]
    )
    for file in files:
        command += ["--values", file]
    return helm(binary, *command, "--namespace", "realtime", "--values", "-", stdin=values)


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

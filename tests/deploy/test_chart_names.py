"""Names that YAML or Kubernetes misreads: a string value is rendered as that string, or is refused."""

import json
import re

import pytest
import yaml

from chart import HELM, Refused, Strict, load, merge, of_kind, pod_spec, render

# Strings that Go's YAML reads as a number, a boolean, null or a date, unless they are quoted.
TRAPS = ["123", "0123", "1e3", "1.5", "true", "null", "n"]
CAPITALS = ["1E3", "1_000"]


def full_name(trap):
    """The trap itself, if it is a valid Service name."""
    return trap if re.fullmatch("[a-z][-a-z0-9]*", trap) else "rooms"


def values_of(trap, name):
    """Values that render `trap` wherever a name may be set."""
    return {
        "nameOverride": trap,
        "fullnameOverride": name,
        "commonLabels": {"common": trap},
        "commonAnnotations": {"common": trap},
        "podLabels": {"pod": trap},
        "podAnnotations": {"pod": trap},
        "image": {"repository": trap, "tag": trap},
        "imagePullSecrets": [{"name": trap}],
        "replicaCount": 2,
        "auth": {"existingSecret": trap, "existingSecretKey": trap},
        "redis": {"existingSecret": trap, "existingSecretKey": trap, "caSecret": trap, "caSecretKey": trap},
        "tls": {"existingSecret": trap},
        "secretFiles": {"auth.keys.1e3.secret_file": {"name": trap, "key": trap}},
        "config": {"auth": {"keys": {"1e3": {"algorithm": "HS256"}}, "issuer": trap}},
        "service": {"annotations": {"service": trap}, "loadBalancerClass": trap, "appProtocol": trap},
        "opsService": {"annotations": {"ops": trap}},
        "ingress": {
            "enabled": True,
            "className": trap,
            "annotations": {"ingress": trap},
            "hosts": [{"host": trap, "paths": [{"path": f"/{trap}", "pathType": "Prefix"}]}],
            "tls": [{"secretName": trap, "hosts": [trap]}],
        },
        "httpRoute": {
            "enabled": True,
            "annotations": {"route": trap},
            "parentRefs": [{"name": trap, "namespace": trap, "sectionName": trap}],
            "hostnames": [trap],
        },
        "networkPolicy": {"enabled": True, "opsFrom": [{"podSelector": {"matchLabels": {"app": trap}}}]},
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"monitor": trap}},
            "prometheusRule": {"enabled": True, "labels": {"rule": trap}, "alertLabels": {"team": trap}},
            "dashboards": {"enabled": True, "labels": {"board": trap}, "annotations": {"board": trap}},
        },
        "serviceAccount": {"name": trap, "annotations": {"account": trap}},
        "nodeSelector": {"node": trap},
        "tolerations": [{"key": trap, "operator": "Equal", "value": trap}],
        "priorityClassName": trap,
        "runtimeClassName": trap,
        "schedulerName": trap,
        "extraArgs": [trap],
        "extraEnv": [{"name": "TRAP", "value": trap}],
    }


def renderings(trap, binary, name=None):
    """Every object of the chart with `trap` in its names: three renderings, since some values exclude each other."""
    options = {"binary": binary, "release": trap, "namespace": "456"}
    first = values_of(trap, name or full_name(trap))
    second = merge(
        first,
        {
            "auth": {"existingSecretKey": "k"},
            "autoscaling": {
                "kind": "keda",
                "keda": {"serverAddress": "http://p", "authenticationRef": trap},
            },
            "tls": {
                "existingSecret": "",
                "certManager": {"enabled": True, "issuerRef": {"name": trap}, "dnsNames": [trap]},
            },
            "metrics": {"serviceMonitor": {"enabled": False}, "podMonitor": {"enabled": True, "labels": {"pod": trap}}},
            "ingress": {"preset": "gke"},
        },
    )
    third = merge(first, {"autoscaling": {"kind": "hpa", "hpa": {"metricName": trap}}})
    third["redis"] = {"development": {"enabled": True, "image": trap}}
    return [o for values in (first, second, third) for o in render(values, **options)]


def without_checksum(objects):
    """The configuration's checksum depends on its contents, and is not a name."""
    for o in objects:
        o.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {}).pop("checksum/config", None)
    return objects


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize("trap", TRAPS)
def test_names_arrive_as_text(binary, trap):
    """The rendering with a trap equals the rendering with a harmless name, with the trap in its place as a string."""
    objects = without_checksum(renderings(trap, binary))
    harmless = json.dumps(without_checksum(renderings("harmless", binary, full_name(trap))))
    assert len({o["kind"] for o in objects}) == 16, "every kind of object is looked at"
    assert objects == json.loads(harmless.replace("harmless", trap))


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize("trap", CAPITALS)
def test_labels_and_annotations_arrive_as_text_in_any_case(binary, trap):
    values = {"commonLabels": {"a": trap}, "commonAnnotations": {"a": trap}, "nameOverride": trap}
    for o in render({**values, "fullnameOverride": "rooms"}, binary=binary):
        assert o["metadata"]["labels"]["a"] == o["metadata"]["annotations"]["a"] == trap
        assert o["metadata"]["labels"]["app.kubernetes.io/name"] == trap


@pytest.mark.parametrize("trap", TRAPS + CAPITALS + ["0", "-1", "~", ".5", "0x1f", "0o17", "off", "Yes", "TRUE", "2001-01-01"])
def test_the_test_loader_parses_yaml_like_go(trap):
    (read,) = load(f"a: [{trap}]\n")[0]["a"]
    assert not isinstance(read, str), f"{trap} was read as text"
    (read,) = load(f'a: ["{trap}"]\n')[0]["a"]
    assert read == trap


def test_the_test_loader_refuses_duplicate_keys():
    with pytest.raises(yaml.constructor.ConstructorError, match="twice"):
        yaml.load("a: 1\nb: {c: 1, c: 1}\n", Strict)


# Names that Kubernetes would refuse

LONG = "r" * 53
SERVICE = "as the name of a Service"


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize(
    ("release", "namespace", "values", "said"),
    [
        ("123", "n", {}, f'refuses "123-tidegate" {SERVICE} .made of the release "123" and the chart "tidegate".'),
        ("1.5", "n", {}, SERVICE),
        ("a.b", "n", {}, f'"a.b-tidegate" {SERVICE}.*set fullnameOverride, or install under another release name'),
        ("r", "n", {"fullnameOverride": "9lives"}, f'"9lives" {SERVICE} .fullnameOverride.'),
        ("r", "n", {"fullnameOverride": "Rooms"}, SERVICE),
        ("r", "n", {"fullnameOverride": "rooms-"}, SERVICE),
        ("r", "n", {"fullnameOverride": LONG}, f'"{LONG}" .fullnameOverride. has 53, but at most 52 are allowed'),
        ("r", "n", {"nameOverride": "x" * 64, "fullnameOverride": "a"}, "as the label app.kubernetes.io/name"),
        ("r", "n", {"nameOverride": "not good", "fullnameOverride": "a"}, "as the label app.kubernetes.io/name"),
        ("r", "A_b", {}, 'refuses "A_b" as the name of a namespace'),
        ("r", "a.b", {}, 'refuses "a.b" as the name of a namespace'),
    ],
)
def test_names_of_objects_that_kubernetes_would_refuse_are_refused(binary, release, namespace, values, said):
    with pytest.raises(Refused, match=said):
        render(values, release=release, namespace=namespace, binary=binary)


@pytest.mark.parametrize("release", [LONG, "a" * 51 + "-b", "tidegate-" + "x" * 44])
def test_a_long_release_is_cut_to_a_name_that_leaves_room_for_suffixes(release):
    name = of_kind(render(release=release), "Deployment")["metadata"]["name"]
    assert len(name) <= 52 and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"auth": {"existingSecret": "a..b"}}, "existingSecret"),
        ({"auth": {"existingSecretKey": ".."}}, "existingSecretKey"),
        ({"redis": {"caSecret": "a.-b"}}, "caSecret"),
        ({"tls": {"existingSecret": "a_b"}}, "existingSecret"),
        ({"imagePullSecrets": [{"name": "A"}]}, "imagePullSecrets"),
        ({"secretFiles": {"auth.jwks_file": {"name": "A", "key": "k"}}}, "jwks_file"),
        ({"commonLabels": {"a": "two words"}}, "commonLabels"),
        ({"commonLabels": {"a": "x" * 64}}, "commonLabels"),
        ({"commonLabels": {"a b": "c"}}, "a b"),
        ({"podLabels": {"a/b/c": "d"}}, "a/b/c"),
        ({"commonAnnotations": {"a b": "c"}}, "a b"),
        ({"nodeSelector": {"a": "-"}}, "nodeSelector"),
        ({"metrics": {"prometheusRule": {"alertLabels": {"a-b": "c"}}}}, "a-b"),
        ({"ingress": {"className": "A"}}, "className"),
        ({"ingress": {"hosts": [{"host": "A_b", "paths": [{"path": "/", "pathType": "Prefix"}]}]}}, "host"),
        ({"ingress": {"tls": [{"secretName": "A"}]}}, "secretName"),
        ({"httpRoute": {"hostnames": ["*.*.example"]}}, "hostnames"),
        ({"service": {"appProtocol": "a/b/c"}}, "appProtocol"),
        ({"service": {"loadBalancerClass": "a b"}}, "loadBalancerClass"),
        ({"serviceAccount": {"name": "A"}}, "name"),
        ({"priorityClassName": "A"}, "priorityClassName"),
        ({"extraVolumes": [{"name": "A"}]}, "extraVolumes"),
        ({"extraContainers": [{"name": "a.b"}]}, "extraContainers"),
    ],
)
def test_other_names_that_kubernetes_would_refuse_are_refused(binary, values, where):
    with pytest.raises(Refused, match="values don't meet the specifications of the schema") as refused:
        render(values, binary=binary)
    assert where in str(refused.value)


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"extraVolumes": [{"name": "config", "emptyDir": {}}]}, "extraVolumes: name config twice: the chart has one"),
        ({"extraVolumes": [{"name": "a"}, {"name": "a"}]}, "extraVolumes: name a twice"),
        (
            {"extraVolumeMounts": [{"name": "a", "mountPath": "/etc/tidegate/secrets/"}]},
            "extraVolumeMounts: mountPath /etc/tidegate/secrets twice",
        ),
        ({"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "extraEnv: name A twice"),
        ({"extraContainers": [{"name": "tidegate"}]}, "initContainers and extraContainers: name tidegate twice"),
        ({"initContainers": [{"name": "a"}], "extraContainers": [{"name": "a"}]}, "name a twice"),
    ],
)
def test_names_in_lists_are_unique(binary, values, said):
    with pytest.raises(Refused, match=said):
        render(values, binary=binary)


def test_every_ci_file_renders_with_a_numeric_name(values_file):
    values = merge(yaml.safe_load(values_file.read_text()) or {}, {"fullnameOverride": "rooms"})
    for o in render(values, release="123", namespace="456"):
        assert o["metadata"].get("namespace", "456") == "456"
        assert o["metadata"].get("labels", {}).get("app.kubernetes.io/instance", "123") == "123"

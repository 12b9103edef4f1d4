"""Labels and annotations of the chart and of the user are merged: no key occurs twice, and the user's override the
chart's, except those that the chart depends on."""

import pytest

from chart import FLEET, HELM, Refused, merge, of_kind, render

# Keys that the chart sets and the user may override.
FREE = {
    "helm.sh/chart": "mine",
    "app.kubernetes.io/version": "mine",
    "app.kubernetes.io/part-of": "mine",
    "app.kubernetes.io/managed-by": "mine",
}
SELECTED = ["app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"]
# The values that set labels, each with the kind of object that gets them.
PLACES = {
    "podLabels": "Deployment",
    "metrics.serviceMonitor.labels": "ServiceMonitor",
    "metrics.podMonitor.labels": "PodMonitor",
    "metrics.prometheusRule.labels": "PrometheusRule",
    "metrics.dashboards.labels": "ConfigMap",
}


def at(path, value):
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


# Every template, in two renderings: a ServiceMonitor and a PodMonitor exclude each other, and so do two autoscalers.
MOST = merge(
    FLEET,
    {
        "autoscaling": {"kind": "hpa"},
        "redis": {"existingSecret": "", "development": {"enabled": True}},
        "tls": {"certManager": {"enabled": True, "issuerRef": {"name": "i"}}},
        "ingress": {"enabled": True, "preset": "gke"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
        "networkPolicy": {"enabled": True},
        "metrics": {
            "serviceMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True},
            "dashboards": {"enabled": True},
        },
    },
)
REST = merge(
    MOST,
    {
        "autoscaling": {"kind": "keda", "keda": {"serverAddress": "http://p"}},
        "metrics": {"serviceMonitor": {"enabled": False}, "podMonitor": {"enabled": True}},
    },
)


def labels_of(o):
    """The labels of the object, and of the pods that it creates."""
    yield o["metadata"]["labels"]
    if o["kind"] == "Deployment":
        yield o["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("binary", HELM)
def test_keys_are_unique_and_user_values_win(binary):
    # The loader of `render` refuses a duplicate key.
    common = {"commonLabels": FREE, "commonAnnotations": {"a": "common", "helm.sh/hook-delete-policy": "mine"}}
    kinds = set()
    for base in (MOST, REST):
        for o in render(merge(base, common), binary=binary):
            kinds.add(o["kind"])
            for labels in labels_of(o):
                assert FREE.items() <= labels.items(), o["kind"]
                assert set(SELECTED) <= labels.keys()
            assert o["metadata"]["annotations"]["a"] == "common"
            assert o["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "mine"
    assert len(kinds) == 16, "every kind of object is looked at"


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize("place", PLACES)
def test_metadata_for_one_object_wins_over_common_metadata(binary, place):
    given = {"a": "mine", "app.kubernetes.io/part-of": "mine", "grafana_dashboard": "mine"}
    values = merge(REST if "podMonitor" in place else MOST, {"commonLabels": {"a": "common"}})
    found = [o for o in render(merge(values, at(place, given)), binary=binary) if o["kind"] == PLACES[place]]
    carried = [labels for o in found for labels in labels_of(o) if given.items() <= labels.items()]
    assert carried, f"nobody carries {place}"


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize(
    ("place", "kind", "key"),
    [
        ("service.annotations", "Service", "cloud.google.com/neg"),
        ("ingress.annotations", "Ingress", "a"),
        ("httpRoute.annotations", "HTTPRoute", "a"),
        ("serviceAccount.annotations", "ServiceAccount", "a"),
        ("opsService.annotations", "Service", "a"),
        ("metrics.dashboards.annotations", "ConfigMap", "a"),
    ],
)
def test_annotations_for_one_object_win_over_presets_and_common_ones(binary, place, kind, key):
    values = merge(merge(MOST, {"commonAnnotations": {key: "common"}}), at(place, {key: "mine"}))
    found = [o["metadata"]["annotations"][key] for o in render(values, binary=binary) if o["kind"] == kind]
    assert "mine" in found


def test_annotations_of_pods_win_over_the_charts():
    key = "kubectl.kubernetes.io/default-container"
    values = {"commonAnnotations": {"a": "common", "b": "common"}, "podAnnotations": {"a": "mine", key: "sidecar"}}
    annotations = of_kind(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations.pop("checksum/config")
    assert annotations == {"a": "mine", "b": "common", key: "sidecar"}


def test_labels_of_alerts_win_over_the_rules():
    values = {"metrics": {"prometheusRule": {"enabled": True, "alertLabels": {"severity": "page", "team": "a"}}}}
    rules = [rule for group in of_kind(render(values), "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    alerts = [rule["labels"] for rule in rules if "alert" in rule]
    assert alerts and all(labels == {"severity": "page", "team": "a"} for labels in alerts)


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize(
    ("place", "key"), [*(("commonLabels", key) for key in SELECTED), *((place, SELECTED[0]) for place in PLACES)]
)
def test_selector_labels_cannot_be_set(binary, place, key):
    with pytest.raises(Refused, match=f"{place}: selectors use the label {key}"):
        render(at(place, {key: "mine"}), binary=binary)


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize("place", ["commonAnnotations", "podAnnotations"])
def test_the_checksum_annotation_cannot_be_set(binary, place):
    with pytest.raises(Refused, match=f"{place}: only the chart may set the annotation checksum/config"):
        render({place: {"checksum/config": "mine"}}, binary=binary)

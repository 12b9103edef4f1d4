"""Renders every values file of ci/ with both versions of Helm, and validates the results against the schemas of
Kubernetes and of the custom resources."""

import json
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from chart import CHART, HELM, KUBERNETES, Refused, VALUES, helm, render

# Custom resources; models.mjs checks each against its definition.
CUSTOM = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "BackendConfig", "Certificate"}


@pytest.mark.parametrize("binary", HELM)
def test_lint_passes(binary, values_file):
    said = helm(binary, "lint", CHART, "--strict", "--values", values_file)
    assert "0 chart(s) failed" in said
    assert "[WARNING]" not in said and "[ERROR]" not in said, said


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("binary", HELM)
def test_objects_match_the_schemas_of_kubernetes(binary, kubernetes, values_file):
    objects = render(files=[values_file], binary=binary, kubernetes=kubernetes)
    assert objects
    for document in objects:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, kubernetes, strict=True)


def test_the_newest_kubernetes_with_a_schema_is_tested():
    assert kubernetes_validate.latest_version().startswith(f"{KUBERNETES[-1]}.")


def test_helm_3_and_4_render_the_same(values_file):
    assert render(files=[values_file], binary="helm3") == render(files=[values_file], binary="helm4")


def held_against_models(objects):
    return subprocess.run(
        ["node", Path(__file__).parent / "models.mjs"],
        input=json.dumps(objects),
        capture_output=True,
        text=True,
        check=False,
    )


def test_custom_resources_match_their_definitions():
    customs = [o for file in VALUES for o in render(files=[file]) if o["kind"] in CUSTOM]
    assert {o["kind"] for o in customs} == CUSTOM, "every custom resource of the chart is in some values file"
    checked = held_against_models(customs)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == f"{len(customs)} custom resources are sound\n"


@pytest.mark.parametrize(
    "change", [{"pollInterval": 15}, {"pollingInterval": "often"}], ids=["unknown field", "wrong value"]
)
def test_the_models_find_errors(change):
    (scaled,) = [o for o in render(files=[CHART / "ci" / "keda-haproxy-values.yaml"]) if o["kind"] == "ScaledObject"]
    wrong = {**scaled, "spec": {**scaled["spec"], **change}}
    checked = held_against_models([wrong])
    assert checked.returncode == 1
    assert next(iter(change)) in checked.stderr


def test_a_cluster_that_is_too_old_is_refused():
    with pytest.raises(Refused, match="requires kubeVersion: >=1.28"):
        render(kubernetes="1.27")


@pytest.mark.parametrize("binary", HELM)
def test_it_can_be_packaged_and_rendered_from_the_package(binary, tmp_path):
    helm(binary, "package", CHART, "--destination", tmp_path)
    (package,) = tmp_path.glob("tidegate-*.tgz")
    rendered = helm(binary, "template", "r", package, "--values", CHART / "ci" / "production-values.yaml")
    assert "PrometheusRule" in {o["kind"] for o in yaml.safe_load_all(rendered) if o}

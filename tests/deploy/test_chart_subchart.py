"""The chart as a subchart: under an alias, twice, disabled, and with what Helm and users add to its values."""

import shutil

import pytest
import yaml

from chart import CHART, HELM, Refused, helm, load

PARENT = {
    "apiVersion": "v2",
    "name": "shop",
    "version": "1.0.0",
    "dependencies": [
        {"name": "tidegate", "version": "0.x", "condition": "tidegate.enabled"},
        {"name": "tidegate", "version": "0.x", "alias": "chat", "condition": "chat.enabled"},
    ],
}
VALUES = """
global:
  imageRegistry: registry.example
x-labels: &labels
  owner: shop
tidegate:
  enabled: true
  x-resources: &resources
    limits: {memory: 2Gi}
  commonLabels: *labels
  resources: *resources
  global: {more: true}
chat:
  enabled: %s
"""


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent") / "shop"
    (directory / "templates").mkdir(parents=True)
    (directory / "Chart.yaml").write_text(yaml.safe_dump(PARENT))
    shutil.copytree(CHART, directory / "charts" / "tidegate")
    return directory


def template(binary, parent, values, *options):
    return load(helm(binary, "template", "r", parent, "--namespace", "n", "--values", "-", *options, stdin=values))


def deployments(objects):
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == "Deployment"}


@pytest.mark.parametrize("binary", HELM)
def test_it_can_be_a_subchart(binary, parent):
    objects = template(binary, parent, VALUES % "false")
    (deployment,) = deployments(objects).values()
    assert deployment["metadata"]["name"] == "r-tidegate"
    assert deployment["metadata"]["labels"]["owner"] == "shop"
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "2Gi"}


@pytest.mark.parametrize("binary", HELM)
def test_two_aliases_in_one_release_are_two_gateways(binary, parent):
    objects = template(binary, parent, VALUES % "true")
    assert set(deployments(objects)) == {"r-tidegate", "r-chat"}
    named = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(named) == len(set(named)), "no object is there twice"
    pods = {name: o["spec"]["template"]["metadata"]["labels"] for name, o in deployments(objects).items()}
    for o in objects:
        if o["kind"] == "Service":
            found = [name for name, labels in pods.items() if o["spec"]["selector"].items() <= labels.items()]
            assert found == [o["metadata"]["name"].removesuffix("-ops")]


@pytest.mark.parametrize("binary", HELM)
def test_a_disabled_subchart_renders_nothing(binary, parent):
    assert template(binary, parent, "tidegate: {enabled: false}\nchat: {enabled: false}\n") == []


@pytest.mark.parametrize("binary", HELM)
def test_a_subchart_still_refuses_invalid_values(binary, parent):
    with pytest.raises(Refused, match="connectons"):
        template(binary, parent, "tidegate: {config: {limits: {connectons: 5}}}\nchat: {enabled: false}\n")
    with pytest.raises(Refused, match="enabled"):
        template(binary, parent, "tidegate: {enabled: sometimes}\nchat: {enabled: false}\n")


@pytest.mark.parametrize("binary", HELM)
def test_a_standalone_chart_accepts_values_for_a_parent(binary):
    values = "enabled: true\nglobal: {a: 1}\nx-common: &common {a: b}\nx-list: [1]\ncommonLabels: *common\n"
    objects = load(helm(binary, "template", "r", CHART, "--values", "-", stdin=values))
    assert all(o["metadata"]["labels"]["a"] == "b" for o in objects)

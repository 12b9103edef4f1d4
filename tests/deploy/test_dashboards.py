"""The dashboards: typed, current, and every panel with data when a real Prometheus scrapes two real nodes."""

import json
import math
import re
import subprocess
import time
from pathlib import Path

import promql_parser
import pytest
import yaml

from chart import CHART, ROOT
from fleet import NAMESPACE, Fleet, Load
from pictures import chosen, dashboards, draw, substituted
from processes import eventually, get

HERE = Path(__file__).parent
INTERVAL = "10s"
# Metrics that the nodes here lack, because they are not configured for TLS and fetched key sets.
ELSEWHERE = {
    "tidegate_tls_certificate_expiry_timestamp_seconds",
    "tidegate_tls_reloads_total",
    "tidegate_jwks_keys",
    "tidegate_jwks_last_success_timestamp_seconds",
    "tidegate_jwks_refreshes_total",
}
# Metrics that are on no dashboard, with the reason.
NOT_DRAWN = {
    "process_threads": "as many as the configuration says, for as long as the process lives",
    "process_virtual_memory_bytes": "address space costs nothing; resident memory is drawn",
} | dict.fromkeys(ELSEWHERE, "many nodes have none, and a panel without data looks like a fault")


def built(source, directory):
    """Compiles the sources of the dashboards."""
    return subprocess.run(
        [HERE / "node_modules/.bin/tsc", "--project", source, "--outDir", directory],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_files_match_the_typed_sources(tmp_path):
    # Next to the sources, so that packages are found.
    out = HERE / "dashboards" / ".built"
    compiled = built(HERE / "dashboards", out)
    assert compiled.returncode == 0, compiled.stdout
    subprocess.run(["node", out / "write.js", tmp_path], check=True)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    held = {path.name: path.read_text() for path in (CHART / "files" / "dashboards").glob("*.json")}
    assert made == held, "run tests/deploy/dashboards/write"
    assert len(held) == 4
    assert (ROOT / "deploy" / "grafana" / "dashboards").resolve() == CHART / "files" / "dashboards"


def test_the_types_reject_unknown_grafana_options():
    source = (HERE / "dashboards" / "panels.ts").read_text()
    wrong = HERE / "dashboards" / ".wrong.ts"
    wrong.write_text(source.replace("GraphDrawStyle.Line", '"wiggly"'))
    try:
        compiled = subprocess.run(
            [
                HERE / "node_modules/.bin/tsc",
                "--ignoreConfig",
                "--noEmit",
                "--strict",
                "--skipLibCheck",
                "--target",
                "es2022",
                "--module",
                "nodenext",
                wrong,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        wrong.unlink()
    assert compiled.returncode != 0
    assert "wiggly" in compiled.stdout


def panels():
    return [(dashboard, panel) for dashboard in dashboards() for panel in dashboard["panels"] if panel["type"] != "row"]


def test_every_panel_has_a_description_a_unit_and_a_place_of_its_own():
    for dashboard in dashboards():
        assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "namespace", "pod"}
        taken = set()
        for panel in dashboard["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not taken & cells and max(x for x, _ in cells) < 24, panel["title"]
            taken |= cells
            if panel["type"] != "row":
                assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids))


def test_every_expression_parses():
    expressions = [target["expr"] for _, panel in panels() for target in panel["targets"]]
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    expressions += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(expressions) > 100
    for expression in expressions:
        promql_parser.parse(
            substituted(expression, {"namespace": "n", "pod": "p"}, "1m") if "$" in expression else expression
        )
    with pytest.raises(ValueError):
        promql_parser.parse("sum by (pod) rate(tidegate_sockets[5m]")


@pytest.fixture(scope="module")
def busy(tmp_path_factory, tidegate):
    fleet = Fleet(tidegate, tmp_path_factory.mktemp("fleet"))
    try:
        start = time.time()
        load = Load(fleet)
        try:
            yield fleet, start
        finally:
            load.stop()
    finally:
        fleet.stop()


def test_every_panel_has_data(busy, tmp_path):
    fleet, start = busy
    node = fleet.nodes[0].name

    def missing():
        found = []
        for dashboard, panel in panels():
            for target in panel["targets"]:
                expression = substituted(target["expr"], chosen(dashboard, node), INTERVAL)
                answer = fleet.prometheus.api("query", query=expression)
                values = [float(series["value"][1]) for series in answer["result"]]
                if not values or not any(math.isfinite(value) for value in values):
                    found.append(f"{dashboard['title']}: {panel['title']}: {expression}: {values}")
        return found

    def none_missing():
        gone = missing()
        assert not gone, "\n".join(gone)
        return True

    eventually(none_missing, "every panel has data", 60)
    # The pictures in the documentation are drawn from the same panels.
    for dashboard in dashboards():
        file = tmp_path / f"{dashboard['uid']}.png"

        def every_panel_has_a_line(dashboard=dashboard, file=file):
            drawn = draw(dashboard, fleet.prometheus, chosen(dashboard, node), INTERVAL, start, time.time(), file)
            assert all(drawn.values()), f"without a line: {[title for title, lines in drawn.items() if not lines]}"
            return True

        eventually(every_panel_has_a_line, dashboard["title"])
        assert file.stat().st_size > 10_000


def test_the_variables_list_existing_values(busy):
    fleet, _ = busy
    for dashboard in dashboards():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] != "query":
                continue
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
            metric = metric.replace("$namespace", ".*")
            expected = {NAMESPACE} if label == "namespace" else {node.name for node in fleet.nodes}

            def offered(metric=metric, label=label, expected=expected):
                values = set(fleet.prometheus.api(f"label/{label}/values", **{"match[]": metric}))
                assert values == expected, values
                return True

            eventually(offered, f"{dashboard['title']}: {variable['name']}")


def test_every_rule_is_evaluated_on_existing_metrics(busy):
    fleet, _ = busy

    def evaluated():
        rules = [rule for group in fleet.prometheus.api("rules")["groups"] for rule in group["rules"]]
        states = {rule["name"]: (rule["health"], rule.get("lastError")) for rule in rules}
        assert {health for health, _ in states.values()} == {"ok"}, states
        return rules

    rules = eventually(evaluated, "all rules are evaluated")
    page = get(f"http://127.0.0.1:{fleet.nodes[0].ops}/metrics")[1]
    there = set(re.findall(r"^(\w+)(?:\{| )", page, re.M)) | {"up"}
    asked = {name for rule in rules for name in re.findall(r"\b(?:tidegate|process)_\w+\b", rule["query"])}
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    unknown = {name for name in asked if name not in there and name not in ELSEWHERE and name not in recorded}
    assert not unknown, f"no node has {unknown}"


def test_every_metric_of_a_node_is_on_a_dashboard(busy):
    fleet, _ = busy
    page = get(f"http://127.0.0.1:{fleet.nodes[0].ops}/metrics")[1]
    exported = set(re.findall(r"^# TYPE (\w+) ", page, re.M))
    assert len(exported) > 40
    # Include metrics that no node here has, from their registration in the sources.
    for source in (ROOT / "gateway" / "src").rglob("*.rs"):
        registered = r"(?:registry,|(?:Opts|IntGauge|IntCounter)::new\()\s*\"(tidegate_\w+)\""
        exported |= set(re.findall(registered, source.read_text()))
    assert exported >= ELSEWHERE, "no node exports it any more"
    expressions = " ".join(target["expr"] for _, panel in panels() for target in panel["targets"])
    drawn = {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"\b(?:tidegate|process)_\w+", expressions)}
    missing = exported - drawn - set(NOT_DRAWN)
    assert not missing, f"on no dashboard, and without a reason in NOT_DRAWN: {missing}"
    assert not set(NOT_DRAWN) & drawn, "drawn after all"
    assert set(NOT_DRAWN) <= exported, "no node exports it any more"


def test_the_nodes_metrics_are_well_formed(busy):
    """promtool's linter on the metrics of a busy node."""
    fleet, _ = busy
    page = get(f"http://127.0.0.1:{fleet.nodes[0].ops}/metrics")[1]
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    complaints = [line for line in checked.stderr.splitlines() if not line.startswith("process_")]
    assert not complaints, complaints


def test_the_pictures_are_of_these_dashboards():
    for dashboard in dashboards():
        picture = ROOT / "deploy" / "grafana" / f"{dashboard['uid']}.png"
        assert 10_000 < picture.stat().st_size < 400_000, f"{picture.name}: python tests/deploy/pictures.py NODE"


def test_the_json_is_json():
    for path in (CHART / "files" / "dashboards").glob("*.json"):
        assert json.loads(path.read_text())["uid"] == path.stem

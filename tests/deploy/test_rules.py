"""Recording and alerting rules: valid, tested to fire and to stay silent, and each alert explained in the runbook."""

import re
import subprocess

import pytest
import yaml

from chart import CHART, ROOT

RULES = CHART / "files" / "rules.yaml"
TESTS = ROOT / "tests" / "deploy" / "rules.test.yaml"
RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
PARTS = ["Meaning", "First look", "Action"]


def rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts():
    return [rule["alert"] for rule in rules() if "alert" in rule]


def promtool(*args):
    return subprocess.run(["promtool", *args], capture_output=True, text=True, check=False)


def test_the_rules_are_valid():
    checked = promtool("check", "rules", RULES)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout
    # deploy/ links to the same file.
    assert (ROOT / "deploy" / "prometheus" / "rules.yaml").resolve() == RULES


def test_the_alerts_pass_their_tests():
    tested = promtool("test", "rules", TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "SUCCESS" in tested.stdout


def test_the_rule_tests_detect_a_wrong_rule(tmp_path):
    """promtool fails if an alert does not fire, so the tests can fail."""
    broken = tmp_path / "rules.yaml"
    broken.write_text(RULES.read_text().replace("expr: tidegate_broker_up == 0", "expr: tidegate_broker_up == 2"))
    tests = yaml.safe_load(TESTS.read_text())
    tests["rule_files"] = [str(broken)]
    tests["tests"] = [
        test for test in tests["tests"] if test["alert_rule_test"][0]["alertname"] == "TidegateBrokerInterrupted"
    ]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    tested = promtool("test", "rules", tmp_path / "tests.yaml")
    assert tested.returncode == 1
    assert "TidegateBrokerInterrupted" in tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_is_tested_to_fire_and_to_be_silent(alert):
    expected = [
        check["exp_alerts"]
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for check in test["alert_rule_test"]
        if check["alertname"] == alert
    ]
    assert any(expected), "no test expects it to fire"
    assert not all(expected), "no test expects it to be silent"


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_has_a_severity_a_description_and_a_runbook(alert):
    (rule,) = [rule for rule in rules() if rule.get("alert") == alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"].endswith(f"/deploy/RUNBOOK.md#{alert.lower()}")

    section = re.search(rf"^### {alert}\n(.*?)(?=^##|\Z)", RUNBOOK.read_text(), re.M | re.S)
    assert section, "it has no section in the runbook"
    assert re.findall(r"^\*\*(.+?)\.\*\*", section[1], re.M) == PARTS


def test_the_runbook_has_exactly_the_alerts():
    assert re.findall(r"^### (Tidegate\w+)$", RUNBOOK.read_text(), re.M) == alerts(), "the order is the same, too"

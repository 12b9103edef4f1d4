"""What the documents of helm/ and deploy/ tell an operator to type is right as far as the tools themselves can say:
kubectl and helm know every command and flag, Redis every command, PromQL parses, values render."""

import os
import re
import subprocess

import promql_parser
import pytest
import yaml

from chart import CHART, FLEET, ROOT, TOOLS, merge, render
from processes import Redis

DOCUMENTS = {
    name: ROOT / name
    for name in ("deploy/RUNBOOK.md", "deploy/README.md", "deploy/CAPACITY.md", "helm/tidegate/README.md")
}
# A cluster that is not there: what a tool has to complain about before it asks, it says.
NOWHERE = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "c",
    "users": [{"name": "u", "user": {}}],
}
UNREACHABLE = re.compile(r"connection refused|connection to the server .* was refused|cluster unreachable")
MISTAKE = re.compile(
    r"unknown (flag|shorthand|command)|syntax error|not found|requires|required|must (be|specify)|accepts|expected|"
    r"unexpected|invalid|failed to load|no such file|Usage:|deprecated",
    re.I,
)


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def inline(path):
    """Code between text, a line break in it being a blank."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text)]


def commands(program):
    """Each command line of the program in the documents, with where it stands."""
    found = []
    for name, path in DOCUMENTS.items():
        lines = [line for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines()]
        # In a sentence, two words are a command's name.
        for line in [*lines, *(code for code in inline(path) if code.count(" ") > 1 or program == "redis-cli")]:
            line = re.sub(r"\s+# .*", "", line)
            if re.search(rf"(^|\$\(){program} \S", line) and "…" not in line:
                found.append((name, line))
    return sorted(set(found))


@pytest.mark.parametrize(("where", "command"), [*commands("kubectl"), *commands("helm")])
def test_kubectl_and_helm_know_what_they_are_asked(where, command, tmp_path):
    config = tmp_path / "config"
    config.write_text(yaml.safe_dump(NOWHERE))
    for program, tool in (("kubectl", "kubectl"), ("helm", "helm4")):
        (tmp_path / program).symlink_to(TOOLS / tool)
    variables = "NS=default RELEASE=tidegate NODES=a=b POD=tidegate-0 DEPLOYMENT=deployment.apps/tidegate REDIS=redis://r"
    # In the background it would outlive its shell.
    command = re.sub(r"\s+& FORWARD=\$!", "", command)
    ran = subprocess.run(
        ["bash", "-c", f"{variables}; {command}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBECONFIG": str(config), "HOME": str(tmp_path)},
    )
    said = ran.stdout + ran.stderr
    assert UNREACHABLE.search(said), f"{where}: {command}\n{said}"
    # What it says of the connection is none.
    mistakes = [line for line in said.splitlines() if MISTAKE.search(line) and not UNREACHABLE.search(line)]
    assert not mistakes, f"{where}: {command}\n{said}"


def test_redis_knows_what_it_is_asked(tmp_path):
    redis = Redis(tmp_path)
    try:
        asked = commands("redis-cli")
        assert len(asked) > 5
        for where, command in asked:
            ran = subprocess.run(
                ["timeout", "1", "bash", "-c", f'redis-cli() {{ command redis-cli -p {redis.port} "$@"; }}; {command}'],
                capture_output=True,
                text=True,
                check=False,
            )
            # CLIENT KILL finds nobody, and the look at latencies never ends.
            said = (ran.stdout + ran.stderr).replace("ERR No such client", "")
            assert not re.search("ERR|not found|Unrecognized|Usage", said), f"{where}: {command}\n{said}"
    finally:
        redis.stop()


def test_queries_parse():
    queries = [
        (name, code)
        for name, path in DOCUMENTS.items()
        for code in inline(path)
        if re.search(r"\b(rate|increase|histogram_quantile)\(", code)
    ]
    assert len(queries) > 10
    for name, query in queries:
        try:
            promql_parser.parse(query)
        except Exception as error:
            raise AssertionError(f"{name}: {query}: {error}") from error


@pytest.mark.parametrize("block", [b for b in blocks(CHART / "README.md", "yaml") if "seriesQuery" not in b])
def test_values_in_the_charts_readme_render(block):
    values = yaml.safe_load(block)
    # Secrets that the example leaves to the reader.
    assert render(merge(FLEET, values))

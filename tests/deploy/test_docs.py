"""What the documents tell people to type is right as far as the tools themselves can say. For operators (helm/ and
deploy/): kubectl and helm know every command and flag, Redis every command, PromQL parses, values render. For those who
change the code: packages, tests, benchmarks and fuzz targets exist, nothing being built. Every link leads somewhere."""

import functools
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from chart import CHART, FLEET, ROOT, TOOLS, merge, render
from processes import Redis

DOCUMENTS = {
    name: ROOT / name
    for name in ("deploy/RUNBOOK.md", "deploy/README.md", "deploy/CAPACITY.md", "helm/tidegate/README.md")
}
# Documents for those who change the code.
DEVELOPERS = {
    name: ROOT / name
    for name in (
        "README.md",
        ".github/CONTRIBUTING.md",
        "gateway/docs/architecture.md",
        "loadtest/README.md",
        "deploy/CAPACITY.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gateway/docs/design").glob("*.md")),
    )
}
# A cluster that does not exist: a tool reports mistakes in a command before it tries to connect.
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
    """Inline code; a line break in it counts as a blank."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text)]


def commands(program, documents=DOCUMENTS):
    """Each command line of the program in the documents, with its document."""
    found = []
    for name, path in documents.items():
        lines = [line for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines()]
        # In a sentence, two words only name a command.
        for line in [*lines, *(code for code in inline(path) if code.count(" ") > 1 or program == "redis-cli")]:
            line = re.sub(r"\s+# .*", "", line)
            if re.search(rf"(^|\$\(){program} \S", line) and "…" not in line:
                found.append((name, line))
    return sorted(set(found))


@pytest.mark.parametrize(("where", "command"), [*commands("kubectl"), *commands("helm")])
def test_kubectl_and_helm_accept_the_documented_commands(where, command, tmp_path):
    config = tmp_path / "config"
    config.write_text(yaml.safe_dump(NOWHERE))
    for program, tool in (("kubectl", "kubectl"), ("helm", "helm4")):
        (tmp_path / program).symlink_to(TOOLS / tool)
    variables = "NS=default RELEASE=tidegate NODES=a=b POD=tidegate-0 DEPLOYMENT=deployment.apps/tidegate REDIS=redis://r"
    # A background process would outlive its shell.
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
    # Errors about the connection are not mistakes.
    mistakes = [line for line in said.splitlines() if MISTAKE.search(line) and not UNREACHABLE.search(line)]
    assert not mistakes, f"{where}: {command}\n{said}"


def test_redis_accepts_the_documented_commands(tmp_path):
    redis = Redis(tmp_path)
    try:
        asked = commands("redis-cli")
        # What `tidegate print-functions` prints, without a build.
        library = ROOT / "broker-bridge/src/redis/functions.lua"
        functions = f'redis-cli() {{ command redis-cli -p {redis.port} "$@"; }}; tidegate() {{ cat {library}; }}'
        assert len(asked) > 5
        for where, command in asked:
            ran = subprocess.run(
                ["timeout", "1", "bash", "-c", f"{functions}; {command}"],
                capture_output=True,
                text=True,
                check=False,
            )
            # CLIENT KILL finds no client, and --latency-history never ends.
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
    # The example leaves the Secrets to the reader.
    assert render(merge(FLEET, values))


def arguments(program):
    """What each command line of the program is given in the documents for developers: the words after its name, and the
    variables before it."""
    name = re.escape(program)
    for where, path in DEVELOPERS.items():
        lines = [line for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *inline(path)]:
            for said in re.findall(rf"(?:^|[ ({{/]){name} ([^;|)]*)", re.sub(r"\s+(#|&&) .*", "", line)):
                if "…" not in said:
                    yield where, shlex.split(said)


def value_of(flag, words):
    return [words[at + 1] for at, word in enumerate(words[:-1]) if word == flag]


@pytest.fixture(scope="module")
def packages():
    read = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1", "--offline"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {package["name"]: package for package in json.loads(read.stdout)["packages"]}


@functools.cache
def names_in(package):
    """Modules, as `name::`, and functions of the package in this folder."""
    folders = (package / folder for folder in ("src", "tests", "benches"))
    sources = (path for folder in folders for path in folder.rglob("*.rs"))
    found = re.findall(r"\b(fn|mod) (\w+)", "\n".join(path.read_text() for path in sources))
    return {f"{name}::" if kind == "mod" else name for kind, name in found}


def test_documented_cargo_commands_exist(packages):
    seen = set()
    for where, words in arguments("cargo"):
        command = words[0]
        if command not in ("build", "test", "bench", "clippy"):
            continue
        line = f"{where}: cargo {' '.join(words)}"
        seen.add(command)
        asked = value_of("-p", words) + value_of("--package", words)
        assert set(asked) <= packages.keys(), line
        assert set(value_of("--profile", words)) <= {"ci"}, line
        for name in asked:
            package = packages[name]
            targets = {(kind, target["name"]) for target in package["targets"] for kind in target["kind"]}
            for kind in ("test", "bench"):
                assert {(kind, target) for target in value_of(f"--{kind}", words)} <= targets, line
            assert set(value_of("--features", words)) <= package["features"].keys(), line
            # What is left chooses tests by a part of their name.
            valued = {"-p", "--package", "--profile", "--test", "--bench", "--features", "--test-threads"}
            chosen = [
                word
                for before, word in zip(words, words[1:])
                if not word.startswith("-") and before not in valued
            ]
            known = names_in(Path(package["manifest_path"]).parent)
            for word in chosen if command == "test" else ():
                *modules, function = word.split("::")
                assert {f"{module}::" for module in modules} <= known, f"{line}: no such module"
                assert any(function in name for name in known), f"{line}: no such test"
    assert seen == {"build", "test", "bench", "clippy"}


def test_tests_that_show_a_guarantee_exist(packages):
    known = names_in(Path(packages["tidegate-tests"]["manifest_path"]).parent)
    text = (ROOT / "gateway/docs/delivery.md").read_text()
    shown = re.findall(r"`(\w+)::(\w+)`", text)
    assert len(shown) > 15
    for module, function in shown:
        assert {f"{module}::", function} <= known, f"{module}::{function}"


def test_documented_test_names_exist():
    here = ROOT / "tests" / "deploy"
    named = [path.stem for path in here.glob("test_*.py")]
    named += re.findall(r"^def (test_\w+)", "\n".join(path.read_text() for path in here.glob("test_*.py")), re.M)
    chosen = [(where, value) for where, words in arguments("tests/deploy/run") for value in value_of("-k", words)]
    assert len(chosen) > 5
    for where, expression in chosen:
        for word in set(re.findall(r"\w+", expression)) - {"and", "or", "not"}:
            assert any(word in name for name in named), f"{where}: tests/deploy/run -k {expression}: none is {word}"


def test_fuzz_targets_and_budgets_exist():
    targets = {path.stem for path in (ROOT / "gateway/fuzz/fuzz_targets").glob("*.rs")}
    fuzzed = list(arguments("gateway/fuzz/run"))
    assert fuzzed
    for where, (seconds, *chosen) in fuzzed:
        assert seconds.isdigit() and set(chosen) <= targets, f"{where}: {chosen}"
    budgets = set(re.findall(r'name: "([^"]+)"', (ROOT / "loadtest/src/budgets/list.rs").read_text()))
    assert budgets
    for where, path in DEVELOPERS.items():
        for chosen in re.findall(r"budgets --only ([a-z0-9,-]+)", path.read_text()):
            assert set(chosen.split(",")) <= budgets, f"{where}: {chosen}"


def test_documented_long_runs_and_files_exist():
    usage = subprocess.run([ROOT / "tests/run", "--help"], capture_output=True, text=True, check=True).stdout
    for where, words in arguments("tests/run"):
        assert all(word in usage for word in words), f"{where}: tests/run {words}"
    for where, path in DEVELOPERS.items():
        if not where.startswith(".github/") and "/design/" not in where:
            continue
        for code in inline(path):
            # A path from the top of the repository.
            if re.fullmatch(r"(gateway|broker-bridge|tests|loadtest|deploy|helm|\.\w+)/[\w./*-]+", code):
                assert list(ROOT.glob(code)), f"{where}: {code}"


NOT_OURS = {"target", "node_modules", ".git", ".venv", ".node", ".tools"}


def documents():
    """The repository's own, and none of what was built or installed."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        yield from (os.path.relpath(os.path.join(folder, file), ROOT) for file in files if file.endswith(".md"))


def anchors(path):
    """The names that GitHub gives to headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", sorted(documents()))
def test_links_resolve(document):
    path = ROOT / document
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z+]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{document}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{document}: {link}"

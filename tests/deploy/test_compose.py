"""compose.yaml is valid by its schema, and consistent with the node and with the files that it mounts.

There is no engine here to start it with. The parts that need none are started: two nodes with its environment behind
its HAProxy here, Prometheus and the image in other tests."""

import re
import subprocess

import pytest
import websockets.sync.client
import yaml

from chart import ROOT
from processes import SECRET, Node, Redis, get, token
from test_proxies import Proxy

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"


def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def seconds(time):
    return int(time.removesuffix("s"))


def test_it_matches_the_compose_schema():
    tool = ROOT / "tests" / ".venv" / "bin" / "check-jsonschema"
    checked = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", COMPOSE], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_node_accepts_its_environment(tidegate, tmp_path):
    (tmp_path / "hs256").write_text(SECRET)
    nodes = {name: service for name, service in services().items() if name.startswith("tidegate-")}
    assert set(nodes) == {"tidegate-a", "tidegate-b"}
    for service in nodes.values():
        environment = {
            key: value.replace("/run/tidegate", str(tmp_path)) for key, value in service["environment"].items()
        }
        checked = subprocess.run(
            [tidegate, "check-config"], capture_output=True, text=True, check=False, env=environment
        )
        assert checked.returncode == 0, checked.stderr
        assert seconds(service["stop_grace_period"]) > seconds(environment["TIDEGATE_DRAIN__DEADLINE"])


@pytest.fixture
def fleet(tidegate, tmp_path):
    """Redis, both nodes with the settings of compose.yaml, and HAProxy, at the test's own addresses."""
    parts = [redis := Redis(tmp_path)]
    own = {"broker.url", "auth.hs256_secret_file", "public.listen", "ops.listen"}
    try:
        nodes = []
        ports = None
        for number, name in enumerate(("tidegate-a", "tidegate-b")):
            environment = services()[name]["environment"]
            settings = {key.removeprefix("TIDEGATE_").replace("__", ".").lower(): environment[key] for key in environment}
            settings = {key: value for key, value in settings.items() if key not in own}
            # HAProxy runs on this machine.
            settings |= {"broker.url": redis.url, "public.trusted_proxies": "127.0.0.0/8"}
            parts.append(node := Node(tidegate, tmp_path, name, f"127.0.0.{number + 2}", ports, **settings))
            ports = node.public, node.ops
            nodes.append(node)
        parts.append(proxy := Proxy("haproxy", tmp_path, nodes))
        yield proxy
    finally:
        for part in reversed(parts):
            part.stop()


def test_every_listed_address_is_published(tidegate, fleet):
    named = re.findall(r"http://localhost:(\d+)([^\s\"]*)", COMPOSE.read_text().split("\nname:")[0])
    published = {port.split(":")[1] for service in services().values() for port in service.get("ports", [])}
    assert {port for port, _ in named} == published == {"8000", "3000", "9091"}
    made = token(tidegate)
    page, room = [path for port, path in named if port == "8000"]
    assert page == "/#token=$TOKEN"

    # The page, with everything that it loads.
    origin = f"http://127.0.0.1:{fleet.port}"
    status, text = get(f"{origin}/")
    assert status == 200 and "<title>" in text
    for loaded in re.findall(r'(?:src|href)="([^":]+)"', text):
        assert get(f"{origin}/{loaded.removeprefix('/')}")[0] == 200, loaded
    # Connect like the page.
    protocols = ["tidegate", f"tidegate.bearer.{made}"]
    with websockets.sync.client.connect(
        f"ws://127.0.0.1:{fleet.port}/rooms/demo:lobby?gap=close", origin=origin, subprotocols=protocols
    ) as socket:
        socket.send("hello")
        assert socket.recv(timeout=10) == "hello"

    # The room, with the documented curl command.
    curl = ["curl", "-sN", "--max-time", "2", "-o", "/dev/null", "-w", "%{http_code}"]
    asked = subprocess.run(
        [*curl, "-H", f"Authorization: Bearer {made}", f"{origin}{room}"], capture_output=True, text=True, check=False
    )
    assert asked.stdout == "200", asked


def test_every_mounted_file_exists():
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name}: {source}"
                # A link inside a mounted directory would be broken.
                if (DEPLOY / source).is_dir():
                    assert not [path for path in (DEPLOY / source).rglob("*") if path.is_symlink()]


def test_names_agree():
    """Services, the proxy's servers, the scrape targets, and Grafana's paths."""
    names = set(services())
    servers = set(re.findall(r"^    server \S+ ([\w-]+):8080", (DEPLOY / "proxies" / "haproxy.cfg").read_text(), re.M))
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"][0]
    targets = {target.split(":")[0] for config in scraped["static_configs"] for target in config["targets"]}
    assert servers == targets == {"tidegate-a", "tidegate-b"} <= names
    assert scraped["job_name"] == "tidegate"

    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/tidegate.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services()["grafana"]["volumes"])
    assert provider["options"]["path"] == mounts["../helm/tidegate/files/dashboards"]
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "../helm/tidegate/files/dashboards" / home.rsplit("/", 1)[1]).exists()
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in names


def test_ports_are_local_and_containers_unprivileged():
    for name, service in services().items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if image := service.get("image", "").removeprefix("tidegate:local"):
            assert re.search(r":v?\d+\.\d+", image), f"{name}: {image} names no version"


def test_prometheus_accepts_its_configuration(tmp_path):
    # Next to each other, as they are mounted.
    (tmp_path / "prometheus.yaml").write_text((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    (tmp_path / "rules.yaml").write_text((DEPLOY / "prometheus" / "rules.yaml").read_text())
    checked = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "1 rule files found" in checked.stdout


def test_haproxy_accepts_its_configuration(tmp_path):
    # Replace compose's host names with addresses.
    text = (
        (DEPLOY / "proxies" / "haproxy.cfg")
        .read_text()
        .replace("tidegate-a:", "127.0.0.2:")
        .replace("tidegate-b:", "127.0.0.3:")
    )
    (tmp_path / "haproxy.cfg").write_text(text)
    checked = subprocess.run(
        ["haproxy", "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr

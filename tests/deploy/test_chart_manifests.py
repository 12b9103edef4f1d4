"""The rendered objects are consistent with each other and with the node."""

import json
import re
import tomllib

import jsonschema
import pytest
import yaml

from chart import CHART, FLEET, VALUES, config_text, deployment_name, merge, node_container, of_kind, pod_spec, render

# Draining


def seconds(time):
    return int(time.removesuffix("s"))


@pytest.mark.parametrize("kubernetes", ["1.28", "1.29", "1.30", "1.37"])
@pytest.mark.parametrize(
    "drain",
    [
        {},
        {"preStopSeconds": 0},
        {"preStopSeconds": 30, "pauseSeconds": 10, "windowSeconds": 300, "flushSeconds": 20, "marginSeconds": 15},
    ],
    ids=["default", "no pre-stop", "long"],
)
def test_the_grace_period_covers_the_whole_drain_of_a_pod(drain, kubernetes):
    values = yaml.safe_load((CHART / "values.yaml").read_text())["drain"] | drain
    objects = render({"drain": drain}, kubernetes=kubernetes)
    told = tomllib.loads(config_text(objects))["drain"]
    sleep = node_container(objects).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = pod_spec(objects)["terminationGracePeriodSeconds"]

    # The kubelet counts the pre-stop sleep; the node counts from SIGTERM.
    assert grace == sleep + seconds(told["deadline"]) + values["marginSeconds"]
    assert seconds(told["deadline"]) == (seconds(told["pause"]) + seconds(told["window"]) + values["flushSeconds"])
    assert seconds(told["window"]) == values["windowSeconds"]
    # The wait for the load balancers has the configured length, whichever side waits.
    assert sleep + seconds(told["pause"]) == values["preStopSeconds"] + values["pauseSeconds"]
    assert (sleep > 0) == (values["preStopSeconds"] > 0 and float(kubernetes) >= 1.30)


def test_a_longer_grace_period_can_be_set():
    assert pod_spec(render({"terminationGracePeriodSeconds": 900}))["terminationGracePeriodSeconds"] == 900


@pytest.mark.parametrize(("pods", "expected"), [(1, 600), (5, 625), (40, 5000)])
def test_the_progress_deadline_covers_all_pods_in_sequence(pods, expected):
    # 30 s to start, 10 s to be ready, 85 s to drain.
    spec = of_kind(render(merge(FLEET, {"replicaCount": pods})), "Deployment")["spec"]
    assert spec["progressDeadlineSeconds"] == expected
    assert spec["progressDeadlineSeconds"] > spec["minReadySeconds"]


def test_a_rollout_starts_new_pods_before_it_stops_old_ones(values_file):
    objects = render(files=[values_file])
    strategy = of_kind(objects, "Deployment", deployment_name(objects))["spec"]["strategy"]
    assert strategy["type"] == "RollingUpdate"
    assert strategy["rollingUpdate"]["maxUnavailable"] == 0
    assert strategy["rollingUpdate"]["maxSurge"] not in (0, "0%")


# Probes and ports


def test_only_the_readiness_probe_depends_on_redis(values_file):
    objects = render(files=[values_file])
    container = node_container(objects, deployment_name(objects))
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert {container[name]["httpGet"]["port"] for name in paths} == {"ops"}


def test_ports_of_node_pod_and_services_agree(values_file):
    objects = render(files=[values_file])
    name = deployment_name(objects)
    ports = {port["name"]: port["containerPort"] for port in node_container(objects, name)["ports"]}
    config = tomllib.loads(config_text(objects, name))
    assert ports == {part: int(config[part]["listen"].rsplit(":", 1)[1]) for part in ("public", "ops")}

    service, ops = of_kind(objects, "Service", name), of_kind(objects, "Service", f"{name}-ops")
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["public"], "clients never reach the ops port"
    assert [port["targetPort"] for port in ops["spec"]["ports"]] == ["ops"]
    assert ops["spec"]["type"] == "ClusterIP"

    for ingress in [o for o in objects if o["kind"] == "Ingress"]:
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                assert path["backend"]["service"] == {"name": name, "port": {"name": "public"}}
    for route in [o for o in objects if o["kind"] == "HTTPRoute"]:
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        assert backend == {"name": name, "port": service["spec"]["ports"][0]["port"]}

    (test,) = [o for o in objects if o["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    assert f"http://{name}-ops:{ops['spec']['ports'][0]['port']}/readyz" in test["spec"]["containers"][0]["args"]


# Selectors


def selects(selector, labels):
    return selector.items() <= labels.items()


def test_selectors_find_the_gateway_and_nothing_else(values_file):
    objects = render(files=[values_file])
    name = deployment_name(objects)
    pods = {
        o["metadata"]["name"]: o["spec"]["template"]["metadata"]["labels"] for o in objects if o["kind"] == "Deployment"
    }
    pods |= {o["metadata"]["name"]: o["metadata"]["labels"] for o in objects if o["kind"] == "Pod"}
    selectors = {
        ("Deployment", name): of_kind(objects, "Deployment", name)["spec"]["selector"]["matchLabels"],
        ("Service", name): of_kind(objects, "Service", name)["spec"]["selector"],
        ("Service", f"{name}-ops"): of_kind(objects, "Service", f"{name}-ops")["spec"]["selector"],
    }
    for o in objects:
        if o["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selectors[(o["kind"], o["metadata"]["name"])] = o["spec"]["selector"]["matchLabels"]
        if o["kind"] == "NetworkPolicy":
            selectors[(o["kind"], o["metadata"]["name"])] = o["spec"]["podSelector"]["matchLabels"]
    for constraint in pod_spec(objects, name).get("topologySpreadConstraints", []):
        selectors[("spread", constraint["topologyKey"])] = constraint["labelSelector"]["matchLabels"]
    for what, selector in selectors.items():
        assert [pod for pod, labels in pods.items() if selects(selector, labels)] == [name], what

    for monitor in [o for o in objects if o["kind"] == "ServiceMonitor"]:
        selector = monitor["spec"]["selector"]["matchLabels"]
        found = [o for o in objects if o["kind"] == "Service" and selects(selector, o["metadata"]["labels"])]
        assert [o["metadata"]["name"] for o in found] == [f"{name}-ops"], "scraped once, on the ops port"


@pytest.mark.parametrize("peers", [[], [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]])
def test_the_network_policy_lets_the_test_hook_in(peers):
    objects = render({"networkPolicy": {"enabled": True, "opsFrom": peers}})
    (hook,) = [o for o in objects if o["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    (rule,) = [
        rule
        for rule in of_kind(objects, "NetworkPolicy")["spec"]["ingress"]
        if [port["port"] for port in rule["ports"]] == ["ops"]
    ]
    selectors = [peer["podSelector"] for peer in rule["from"] if set(peer) == {"podSelector"}]
    assert any(selects(selector.get("matchLabels", {}), hook["metadata"]["labels"]) for selector in selectors)
    assert all(peer in rule["from"] for peer in peers)


def test_the_development_redis_is_found_by_the_node():
    objects = render(files=[CHART / "ci" / "development-values.yaml"])
    assert tomllib.loads(config_text(objects))["broker"]["url"] == "redis://r-tidegate-redis:6379/0"
    service = of_kind(objects, "Service", "r-tidegate-redis")
    assert service["spec"]["ports"][0]["port"] == 6379
    labels = of_kind(objects, "Deployment", "r-tidegate-redis")["spec"]["template"]["metadata"]["labels"]
    assert selects(service["spec"]["selector"], labels)


def test_object_names_are_valid_for_the_longest_release_name():
    for o in render(files=[CHART / "ci" / "production-values.yaml"], release="r" * 53):
        # Names of Services become host names, names of workloads become labels; others may be longer.
        most = 253 if o["kind"] in ("ConfigMap", "PrometheusRule") else 63
        name = o["metadata"]["name"]
        assert len(name) <= most and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name), f"{o['kind']} {name}"


def test_every_object_carries_the_common_labels():
    for o in render(files=[CHART / "ci" / "everything-values.yaml"]):
        if not o["metadata"]["name"].startswith(("realtime-extra", "realtime-text")):
            assert o["metadata"]["labels"]["owner"] == "platform"
            assert o["metadata"]["annotations"]["example.com/contact"] == "platform@example.com"


# Scaling


@pytest.mark.parametrize(
    ("kind", "expected"), [("none", []), ("hpa", ["HorizontalPodAutoscaler"]), ("keda", ["ScaledObject"])]
)
def test_there_is_at_most_one_autoscaler_and_no_fixed_number_beside_it(kind, expected):
    values = merge(FLEET, {"autoscaling": {"kind": kind, "keda": {"serverAddress": "http://prometheus:9090"}}})
    objects = render(values)
    scalers = [o for o in objects if o["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert [o["kind"] for o in scalers] == expected
    assert ("replicas" in of_kind(objects, "Deployment")["spec"]) == (kind == "none")
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": of_kind(objects, "Deployment")["metadata"]["name"],
        }


def test_it_grows_fast_and_shrinks_slowly_within_the_limits_of_the_api():
    hpa = of_kind(render(merge(FLEET, {"autoscaling": {"kind": "hpa"}})), "HorizontalPodAutoscaler")["spec"]
    metrics = [metric["type"] for metric in hpa["metrics"]]
    assert metrics == ["Pods", "Resource"], "connections first, the processor second"
    assert hpa["metrics"][0]["pods"]["target"] == {"type": "AverageValue", "averageValue": "20000"}
    up, down = hpa["behavior"]["scaleUp"], hpa["behavior"]["scaleDown"]
    assert up["stabilizationWindowSeconds"] < down["stabilizationWindowSeconds"] <= 3600
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]
    assert all(policy["periodSeconds"] <= 1800 for policy in up["policies"] + down["policies"])


def test_an_outage_of_prometheus_removes_no_pods():
    scaled = of_kind(render(files=[CHART / "ci" / "keda-haproxy-values.yaml"]), "ScaledObject")["spec"]
    assert scaled["fallback"] == {"failureThreshold": 3, "replicas": 6, "behavior": "currentReplicasIfHigher"}
    assert [trigger["type"] for trigger in scaled["triggers"]] == ["prometheus", "cpu"]
    values = merge(FLEET, {"autoscaling": {"kind": "keda", "maxReplicas": 7, "keda": {"serverAddress": "http://p"}}})
    assert of_kind(render(values), "ScaledObject")["spec"]["fallback"]["replicas"] == 7


# Security


def test_pods_meet_the_restricted_standard(values_file):
    objects = render(files=[values_file])
    for o in objects:
        spec = o["spec"]["template"]["spec"] if o["kind"] == "Deployment" else o["spec"] if o["kind"] == "Pod" else None
        if spec is None:
            continue
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] != 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not any("hostPath" in volume for volume in spec.get("volumes", []))
        context = spec["containers"][0]["securityContext"]
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in spec["containers"][0]["resources"]["limits"]


def test_secrets_are_mounted_and_never_written(values_file):
    objects = render(files=[values_file])
    assert not [o for o in objects if o["kind"] == "Secret"], "the chart makes no Secret"
    name = deployment_name(objects)
    spec = pod_spec(objects, name)
    container = spec["containers"][0]
    assert not [entry for entry in container.get("env", []) if "TIDEGATE" in entry["name"]]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert not [mount for mount in mounts.values() if "subPath" in mount], "what is mounted by subPath never changes"
    assert all(mount.get("readOnly") for mount in mounts.values())

    # Each file that the configuration names is mounted, and each mounted file is named.
    config = tomllib.loads(config_text(objects, name))
    named = {
        value
        for table in config.values()
        if isinstance(table, dict)
        for value in table.values()
        if isinstance(value, str) and value.startswith("/etc/tidegate/")
    }
    mounted = set()
    for volume in spec["volumes"]:
        for source in volume.get("projected", {}).get("sources", []):
            items = source["secret"]["items"]
            mounted |= {f"{mounts[volume['name']]['mountPath']}/{item['path']}" for item in items}
        if "secret" in volume:
            mounted |= {f"{mounts[volume['name']]['mountPath']}/{file}" for file in ("tls.crt", "tls.key")}
    assert named == mounted


def test_any_secret_can_be_mounted_for_a_key_that_names_a_file():
    key = "auth.keys.2026-08.secret_file"
    objects = render(
        {
            "config": {"auth": {"keys": {"2026-08": {"algorithm": "HS512"}}}},
            "secretFiles": {key: {"name": "more-keys", "key": "pem"}},
        }
    )
    assert tomllib.loads(config_text(objects))["auth"]["keys"] == {
        "2026-08": {"algorithm": "HS512", "secret_file": f"/etc/tidegate/secrets/{key}"}
    }
    (volume,) = [volume for volume in pod_spec(objects)["volumes"] if volume["name"] == "secrets"]
    assert volume["projected"]["sources"] == [{"secret": {"name": "more-keys", "items": [{"key": "pem", "path": key}]}}]


# Replacing pods


def checksum(values):
    return of_kind(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"]


@pytest.mark.parametrize(
    ("change", "restarts", "restarts_when_live"),
    [
        ({"config": {"limits": {"connections": 5}}}, True, False),
        ({"config": {"rooms": {"a:*": {"grant": ["subscribe"]}}}}, True, False),
        ({"drain": {"windowSeconds": 90}}, True, False),
        ({"config": {"shards": 2}}, True, True),
        ({"config": {"broker": {"prefix": "x"}}}, True, True),
        ({"containerPorts": {"public": 8081}}, True, True),
        ({"service": {"port": 81}}, False, False),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_pods_are_replaced_when_they_must_be(change, restarts, restarts_when_live):
    assert (checksum(change) != checksum({})) == restarts
    live = {"restartOnConfigChange": False}
    assert (checksum(merge(live, change)) != checksum(live)) == restarts_when_live


def keys_of_the_node():
    """Every key, and whether it takes effect at once, from the node's own reference."""
    text = (CHART.parents[1] / "gateway" / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| .+? \| .+? \| (at once|after a restart|[^|]*) \|", text, re.M)
    # A new location of the secret is a new volume and so a new pod anyway; a room's policy has no name.
    return [(key, when) for key, when in rows if "<" not in key and not key.startswith("auth.hs256_secret")]


def another(key):
    """A value of this key that the schema accepts and that is not the default."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    part = schema["properties"]["config"]
    for name in key.split("."):
        part = part["properties"][name]
    validator = jsonschema.Draft7Validator(part | {"definitions": schema["definitions"]})
    key_table = {"a": {"algorithm": "ES256", "public_key_file": "/a"}}
    values = ["text", "forwarded", True, 7, "7s", "7KiB", "7/s", "7KiB/s", ["changed"], key_table, "changed"]
    return next(value for value in values if validator.is_valid(value))


@pytest.mark.parametrize(("key", "when"), keys_of_the_node())
def test_the_chart_knows_the_keys_that_a_running_node_reloads(key, when):
    managed = {
        "public.listen": {"containerPorts": {"public": 1}},
        "ops.listen": {"containerPorts": {"ops": 1}},
        "broker.url": {"redis": {"url": "redis://other"}},
        "broker.url_file": {"redis": {"existingSecret": "other"}},
        "broker.ca_file": {"redis": {"caSecret": "other"}},
        "tls.cert": {"tls": {"existingSecret": "other"}},
        "tls.key": {"tls": {"existingSecret": "other"}},
        "drain.pause": {"drain": {"pauseSeconds": 1}},
        "drain.window": {"drain": {"windowSeconds": 1}},
        "drain.deadline": {"drain": {"flushSeconds": 1}},
    }
    change = another(key)
    for part in reversed(key.split(".")):
        change = {part: change}
    change = managed.get(key, {"config": change})
    live = {"restartOnConfigChange": False}
    restarts = checksum(merge(live, change)) != checksum(live)
    assert restarts == (when == "after a restart"), f"{key} counts {when}"


def test_a_new_chart_version_alone_moves_no_connection():
    for file in VALUES:
        objects = render(files=[file])
        labels = of_kind(objects, "Deployment", deployment_name(objects))["spec"]["template"]["metadata"]["labels"]
        assert "helm.sh/chart" not in labels


# Ingress presets

PRESETS = {
    "nginx": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "3600"},
    "haproxy": {"haproxy.org/timeout-server": "1h"},
    "alb": {
        "alb.ingress.kubernetes.io/healthcheck-path": "/readyz",
        "alb.ingress.kubernetes.io/healthcheck-port": "9090",
        "alb.ingress.kubernetes.io/target-group-attributes": (
            "deregistration_delay.timeout_seconds=85,load_balancing.algorithm.type=least_outstanding_requests"
        ),
    },
    "gke": {},
    "traefik": {},
    "": {},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_the_annotations_of_their_load_balancer(preset):
    objects = render({"ingress": {"enabled": True, "preset": preset}})
    annotations = of_kind(objects, "Ingress")["metadata"].get("annotations", {})
    assert PRESETS[preset].items() <= annotations.items()
    if not PRESETS[preset]:
        assert annotations == {}
    backends = [o for o in objects if o["kind"] == "BackendConfig"]
    assert bool(backends) == (preset == "gke")
    for backend in backends:
        service = of_kind(objects, "Service", "r-tidegate")
        named = yaml.safe_load(service["metadata"]["annotations"]["cloud.google.com/backend-config"])
        assert named == {"default": backend["metadata"]["name"]}
        assert backend["spec"]["timeoutSec"] >= 3600


def test_annotations_of_the_user_win_over_the_presets():
    name = "nginx.ingress.kubernetes.io/proxy-read-timeout"
    objects = render({"ingress": {"enabled": True, "preset": "nginx", "annotations": {name: "7200"}}})
    assert of_kind(objects, "Ingress")["metadata"]["annotations"][name] == "7200"


@pytest.mark.parametrize(
    ("preset", "kind", "annotation", "value"),
    [
        ("nginx", "Ingress", "nginx.ingress.kubernetes.io/backend-protocol", "HTTPS"),
        ("haproxy", "Service", "haproxy.org/server-ssl", "true"),
        ("alb", "Ingress", "alb.ingress.kubernetes.io/backend-protocol", "HTTPS"),
        ("traefik", "Service", "traefik.ingress.kubernetes.io/service.serversscheme", "https"),
    ],
)
def test_presets_use_tls_to_nodes_with_tls(preset, kind, annotation, value):
    values = {"ingress": {"enabled": True, "preset": preset}, "tls": {"existingSecret": "tls"}}
    assert of_kind(render(values), kind, "r-tidegate")["metadata"]["annotations"][annotation] == value


# Rules and dashboards


def test_rules_and_dashboards_are_the_files_of_the_chart():
    objects = render(files=[CHART / "ci" / "production-values.yaml"])
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule.setdefault("labels", {})["team"] = "realtime"
            if rule.get("alert") == "TidegateDrainOverBudget":
                rule["for"] = f"{pod_spec(objects)['terminationGracePeriodSeconds']}s"
    assert of_kind(objects, "PrometheusRule")["spec"] == rules

    found = [o for o in objects if o["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    held = {name: text.rstrip("\n") for o in found for name, text in o["data"].items()}
    files = (CHART / "files" / "dashboards").glob("*.json")
    assert held == {file.name: file.read_text().rstrip("\n") for file in files}
    assert held


@pytest.mark.parametrize("monitor", ["serviceMonitor", "podMonitor"])
def test_scrape_labels_match_rules_and_dashboards(monitor):
    kind = monitor[0].upper() + monitor[1:]
    spec = of_kind(render({"metrics": {monitor: {"enabled": True}}}), kind)["spec"]
    (endpoint,) = spec.get("endpoints") or spec["podMetricsEndpoints"]
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "tidegate"}]
    assert endpoint["port"] == "ops"

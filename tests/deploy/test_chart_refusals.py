"""Values that the chart refuses, and its error messages, with both versions of Helm."""

import json
import re
import subprocess

import pytest
import yaml

from chart import CHART, FLEET, HELM, Refused, VALUES, merge, render

INGRESS = {"enabled": True, "hosts": [{"host": "a.example", "paths": [{"path": "/", "pathType": "Prefix"}]}]}

# Values that are invalid by themselves: values.schema.json. Helm 3 and 4 word the errors differently, so the tests look
# for the place and the kind of the fault.
SCHEMA = [
    ({"replicas": 3}, r"replicas"),
    ({"replicaCount": "3"}, r"replicaCount.*(integer|got string)"),
    ({"replicaCount": -1}, r"replicaCount"),
    ({"image": {"tag": "not a tag"}}, r"tag"),
    ({"image": {"digest": "sha256:short"}}, r"digest"),
    ({"image": {"pullPolicy": "Sometimes"}}, r"pullPolicy"),
    ({"image": {"registry": "r"}}, r"registry"),
    ({"autoscaling": {"kind": "both"}}, r"kind"),
    ({"autoscaling": {"enabled": True}}, r"enabled"),
    ({"autoscaling": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 7200}}}}, r"stabilizationWindowSeconds"),
    (
        {
            "autoscaling": {
                "behavior": {"scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 3600}]}}
            }
        },
        r"periodSeconds",
    ),
    ({"autoscaling": {"keda": {"serverAddress": "prometheus:9090"}}}, r"serverAddress"),
    ({"maxSurge": 0}, r"maxSurge"),
    ({"maxSurge": "0%"}, r"maxSurge"),
    ({"podDisruptionBudget": {"minAvailable": 1}}, r"minAvailable"),
    ({"podDisruptionBudget": {"maxUnavailable": "most"}}, r"maxUnavailable"),
    ({"drain": {"windowSeconds": "60s"}}, r"windowSeconds"),
    ({"drain": {"windowSeconds": 4000}}, r"windowSeconds"),
    ({"drain": {"marginSeconds": 0}}, r"marginSeconds"),
    ({"listenAddress": "localhost"}, r"listenAddress"),
    ({"containerPorts": {"public": 70000}}, r"public"),
    ({"auth": {"hs256_secret": "x"}}, r"hs256_secret"),
    ({"auth": {"existingSecret": "Not A Name"}}, r"existingSecret"),
    ({"secretFiles": {"auth.key_file": "my-secret"}}, r"auth.key_file"),
    ({"secretFiles": {"nodots": {"name": "a", "key": "b"}}}, r"nodots"),
    ({"redis": {"url": "http://redis"}}, r"url"),
    ({"redis": {"password": "x"}}, r"password"),
    ({"service": {"type": "ExternalName"}}, r"type"),
    ({"service": {"annotations": {"a": 1}}}, r"annotations"),
    ({"ingress": {"preset": "apache"}}, r"preset"),
    ({"ingress": {"hosts": [{"host": "a.example"}]}}, r"hosts"),
    ({"ingress": {"hosts": [{"host": "a", "paths": [{"path": "rooms", "pathType": "Prefix"}]}]}}, r"path"),
    ({"httpRoute": {"timeouts": {"request": "forever"}}}, r"request"),
    ({"networkPolicy": {"publicFrom": [{"pods": {}}]}}, r"pods"),
    ({"metrics": {"serviceMonitor": {"interval": 15}}}, r"interval"),
    ({"resources": {"limit": {"memory": "1Gi"}}}, r"limit"),
    ({"extraEnv": {"A": "b"}}, r"extraEnv"),
    ({"extraEnv": [{"name": "A", "value": 1}]}, r"extraEnv"),
    ({"config": "log.format = 'json'"}, r"config"),
    # Keys and values unknown to the node.
    ({"config": {"limts": {"connections": 5}}}, r"limts"),
    ({"config": {"limits": {"connectons": 5}}}, r"limits.*connectons"),
    ({"config": {"limits": {"connections": 0}}}, r"limits.connections|/limits/connections"),
    ({"config": {"limits": {"connections": "many"}}}, r"connections"),
    ({"config": {"limits": {"outbound": "1MB"}}}, r"outbound"),
    ({"config": {"limits": {"commands": "often"}}}, r"commands"),
    ({"config": {"heartbeat": {"interval": 25}}}, r"interval.*(integer|got number)"),
    ({"config": {"heartbeat": {"interval": "0s"}}}, r"interval"),
    ({"config": {"log": {"format": "xml"}}}, r"format"),
    ({"config": {"demo": "perhaps"}}, r"demo"),
    ({"config": {"public": {"trusted_proxies": [10]}}}, r"trusted_proxies"),
    ({"config": {"rooms": {"news:*": {"grants": []}}}}, r"grants"),
    ({"config": {"rooms": {"news:*": {"grant": ["read"]}}}}, r"grant"),
    ({"config": {"rooms": {"news:*": {"overflow": "drop"}}}}, r"overflow"),
    ({"config": {"auth": {"keys": {"a": {"alg": "ES256"}}}}}, r"alg"),
    ({"secretFiles": {"auth.jwks_fil": {"name": "a", "key": "b"}}}, r"auth.jwks_fil"),
    ({"extraEnv": [{"name": "TIDEGATE_LIMITS__CONECTIONS", "value": "5"}]}, r"extraEnv.*name"),
]


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize(
    ("values", "said"), SCHEMA, ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else ""
)
def test_the_schema_refuses(binary, values, said):
    with pytest.raises(Refused) as refused:
        render(values, binary=binary)
    text = str(refused.value)
    assert "values don't meet the specifications of the schema" in text, text
    assert re.search(said, text), text


# Values that are invalid together: _guards.tpl.
GUARDS = [
    ({"replicaCount": 2, "auth": FLEET["auth"]}, "more than one pod needs a Redis that all of them use"),
    ({"replicaCount": 2, "redis": FLEET["redis"]}, "more than one pod needs a common key"),
    ({"replicaCount": 2, "redis": FLEET["redis"], "config": {"auth": {"leeway": "1s"}}}, "needs a common key"),
    (
        {"replicaCount": 2, "redis": FLEET["redis"], "secretFiles": {"auth.jwks_ca_file": {"name": "a", "key": "b"}}},
        "needs a common key",
    ),
    ({"autoscaling": {"kind": "hpa"}, "auth": FLEET["auth"]}, "more than one pod needs a Redis"),
    (
        merge(FLEET, {"autoscaling": {"kind": "hpa", "minReplicas": 5, "maxReplicas": 4}}),
        "autoscaling.minReplicas is 5 and autoscaling.maxReplicas is 4",
    ),
    (
        merge(FLEET, {"autoscaling": {"kind": "hpa"}, "config": {"limits": {"connections": 20000}}}),
        r"autoscaling.connectionsPerPod is 20000: it must be below limits.connections \(20000\)",
    ),
    (
        merge(FLEET, {"autoscaling": {"kind": "hpa"}, "resources": {"requests": None}}),
        "autoscaling.cpuUtilization is in per cent of resources.requests.cpu, which is not set",
    ),
    (merge(FLEET, {"autoscaling": {"kind": "keda"}}), "needs autoscaling.keda.serverAddress"),
    (
        {"terminationGracePeriodSeconds": 84},
        r"terminationGracePeriodSeconds is 84, but a pod needs 85 to drain: drain.preStopSeconds 5 \+ pauseSeconds 0 "
        r"\+ windowSeconds 60 \+ flushSeconds 15 \+ marginSeconds 5",
    ),
    ({"progressDeadlineSeconds": 10}, "progressDeadlineSeconds must be longer than minReadySeconds"),
    ({"containerPorts": {"public": 9090}}, "containerPorts.public and containerPorts.ops must differ"),
    (
        {"config": {"public": {"listen": "0.0.0.0:1"}}},
        "config.public.listen: the chart sets this key; use listenAddress",
    ),
    ({"config": {"drain": {"window": "10s"}}}, "config.drain.window: the chart sets this key; use drain.windowSeconds"),
    ({"config": {"broker": {"url": "redis://a"}}}, "config.broker.url: the chart sets this key; use redis.url"),
    ({"config": {"auth": {"hs256_secret": "x" * 40}}}, "config.auth.hs256_secret: the chart sets this key"),
    ({"config": {"auth": {"jwks_url": "https://user:pass@login.example/"}}}, "config.auth.jwks_url holds a password"),
    ({"secretFiles": {"broker.url_file": {"name": "a", "key": "b"}}}, "secretFiles.broker.url_file: the chart sets this key"),
    ({"extraEnv": [{"name": "TIDEGATE_AUTH__HS256_SECRET", "value": "x"}]}, "holds a secret; take it from a Secret"),
    (
        {"extraEnv": [{"name": "TIDEGATE_OPS__LISTEN", "value": "127.0.0.1:9090"}]},
        "extraEnv: TIDEGATE_OPS__LISTEN would override what the chart sets; use listenAddress and containerPorts.ops",
    ),
    ({"extraEnv": [{"name": "TIDEGATE_DRAIN__WINDOW", "value": "1s"}]}, "use drain.windowSeconds"),
    ({"extraArgs": ["--config=/mine.toml"]}, "extraArgs: the chart sets --config=/mine.toml"),
    ({"redis": {"url": "redis://user:pass@host"}}, "redis.url holds a password"),
    (
        {"redis": {"url": "redis://host", "existingSecret": "a"}},
        "redis.url, redis.existingSecret: set only one of them",
    ),
    ({"redis": {"existingSecret": "a", "development": {"enabled": True}}}, "set only one of them"),
    ({"redis": {"url": "redis://host", "caSecret": "ca"}}, "redis.caSecret is for Redis behind TLS"),
    ({"tls": {"existingSecret": "a", "certManager": {"enabled": True}}}, "tls.certManager.enabled: set only one"),
    ({"tls": {"certManager": {"enabled": True}}}, "tls.certManager needs tls.certManager.issuerRef.name"),
    ({"httpRoute": {"enabled": True}}, "httpRoute needs httpRoute.parentRefs"),
    (
        {"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}},
        "would scrape every pod twice",
    ),
]


@pytest.mark.parametrize("binary", HELM)
@pytest.mark.parametrize(("values", "said"), GUARDS, ids=lambda value: value[:60] if isinstance(value, str) else "")
def test_the_guards_refuse(binary, values, said):
    with pytest.raises(Refused, match=said):
        render(values, binary=binary)


@pytest.mark.parametrize(
    "values",
    [
        {"replicaCount": 2, "auth": FLEET["auth"], "redis": {"url": "redis://redis:6379/0"}},
        {"replicaCount": 2, "auth": FLEET["auth"], "redis": {"url": "rediss://user@redis:6379/0"}},
        {"replicaCount": 2, "auth": FLEET["auth"], "redis": {"development": {"enabled": True}}},
        merge(FLEET, {"auth": {"existingSecret": ""}, "secretFiles": {"auth.jwks_file": {"name": "k", "key": "k"}}}),
        merge(FLEET, {"auth": {"existingSecret": ""}, "config": {"auth": {"jwks_url": "https://login.example/jwks"}}}),
        merge(FLEET, {"auth": {"existingSecret": ""}, "extraEnvFrom": [{"secretRef": {"name": "k"}}]}),
        {
            "replicaCount": 2,
            "auth": FLEET["auth"],
            "extraEnv": [{"name": "TIDEGATE_BROKER__URL", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}],
        },
    ],
)
def test_a_fleet_may_use_any_source_of_redis_and_keys(values):
    assert render(values)


@pytest.mark.parametrize("scheme", ["redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"])
def test_the_chart_refuses_the_kinds_of_redis_that_the_node_refuses(scheme, tidegate):
    url = f"{scheme}://a.example:26379/main"
    node = subprocess.run([tidegate, "check-config", "--broker-url", url], capture_output=True, text=True, check=False)
    if "not yet supported" in node.stderr:
        with pytest.raises(Refused, match=re.escape(f"does not serve {scheme}:// yet")):
            render({"redis": {"url": url}})
    else:
        # The node supports it now: remove the scheme from tidegate.guardRedis.
        render({"redis": {"url": url}})


def schema():
    return json.loads((CHART / "values.schema.json").read_text())


def test_the_schema_lists_exactly_the_values():
    def compare(values, part, path):
        part = schema()["definitions"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part
        if path == ".config":
            return  # test_chart_config.py
        if not part.get("properties"):
            return
        assert part.get("additionalProperties") is False, f"{path or 'values'} is open"
        if isinstance(values, dict):
            for key, value in values.items():
                assert key in part["properties"], f"{path}.{key} is not in the schema"
                compare(value, part["properties"][key], f"{path}.{key}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    compare(values, schema(), "")
    # Values that helm itself reads, or passes to subcharts.
    assert set(schema()["properties"]) - set(values) == {"global", "enabled"}


def test_every_value_is_used_by_some_values_file_or_template():
    templates = "\n".join(
        path.read_text() for path in (CHART / "templates").rglob("*") if path.suffix in (".yaml", ".tpl", ".txt")
    )
    for key in yaml.safe_load((CHART / "values.yaml").read_text()):
        assert re.search(rf"\.Values\.{key}\b", templates), f"no template reads {key}"
    assert VALUES


NETWORK = {"networkPolicy": {"enabled": True, "limitEgress": True}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"redis": {"url": "rediss://redis:6380/0"}}, "redisPort is 6379, and redis.url is reached at port 6380"),
        ({"redis": {"url": "redis://redis"}, "networkPolicy": {"redisPort": 6380}}, "reached at port 6379"),
        ({"redis": {"development": {"enabled": True}}, "networkPolicy": {"redisPort": 1}}, "development listens at"),
        ({"config": {"auth": {"jwks_url": "https://login.example/"}}}, "config.auth.jwks_url needs a way out"),
    ],
)
def test_a_network_policy_that_cuts_nodes_off_is_refused(values, said):
    with pytest.raises(Refused, match=said):
        render(merge(NETWORK, values))


@pytest.mark.parametrize(
    "values",
    [
        {"redis": {"url": "rediss://redis:6380/0"}, "networkPolicy": {"redisPort": 6380}},
        {"redis": {"url": "redis://user@[2001:db8::1]/0"}},
        {"config": {"auth": {"jwks_url": "http://127.0.0.1:8000/"}}},
        {"config": {"auth": {"jwks_url": "https://a/"}}, "networkPolicy": {"extraEgress": [{"ports": [{"port": 443}]}]}},
    ],
)
def test_a_network_policy_that_keeps_nodes_reachable_is_accepted(values):
    assert render(merge(NETWORK, values))

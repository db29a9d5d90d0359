"""What is in `deploy/` fits the server: names of metrics, keys, paths and times; and it fits the published schemas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lab import cli
from lora_lab.config.run import all_keys
from lora_lab.serve.config import ServeConfig
from lora_lab.serve.guard import OPEN
from lora_lab.serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def expressions() -> dict[str, str]:
    """Each PromQL expression by where it is."""
    found = {rule["alert"]: rule["expr"] for group in read("alerts.yaml")["groups"] for rule in group["rules"]}
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "1m")
    return found


@pytest.fixture(scope="module")
def offered() -> dict[str, tuple[str, ...]]:
    """The labels of every series that `/metrics` gives."""
    metrics = Metrics()
    metrics.watch(*[lambda: 0] * 4, 1)
    found = {}
    for family in metrics.registry.collect():
        collector = metrics.registry._names_to_collectors[family.name]
        labels = tuple(collector._labelnames) + (("le",) if family.type == "histogram" else ())
        found |= {family.name + suffix: labels for suffix in SUFFIXES[family.type]}
    return found


def test_every_metric_of_alerts_and_panels_is_there_with_its_labels(offered):
    used = set()
    for place, expression in expressions().items():
        for name, matchers in re.findall(r"(lora_lab_\w+)(?:\{([^}]*)\})?", expression):
            assert name in offered, (place, name)
            used.add(name)
            for label in re.findall(r"(\w+)\s*[=!]", matchers):
                assert label in (*offered[name], "instance"), (place, label)
        by = {label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", labels)}
        series = re.findall(r"lora_lab_\w+", expression)
        assert by <= {"instance", *(label for name in series for label in offered[name])}, (place, by)
    families = {re.sub("_(total|bucket|sum|count)$", "", name) for name in used}
    assert families == {
        re.sub("_(total|bucket|sum|count)$", "", name) for name in offered
    }  # the board shows all of them


def test_values_of_labels_are_those_that_are_counted(service, tmp_path):
    from lora_lab.serve.keys import Keys, add
    from tests.serve.conftest import client_of

    add(tmp_path / "keys.json", "a", ["use"])
    with client_of(service, Keys.read(tmp_path / "keys.json")) as client:
        client.get("/v1/models", headers={"x-api-key": "no"})
    value = service.metrics.registry.get_sample_value
    assert value("lora_lab_refusals_total", {"reason": "wrong key", "key": "none"}) >= 1
    assert value("lora_lab_requests_total", {"route": "none", "status": "401"}) >= 1
    source = (ROOT / "lora_lab/serve/keys.py").read_text(encoding="utf-8")
    assert all(f'return "{reason}"' in source for reason in ("requests", "tokens", "concurrency"))


def test_expressions_are_promql():
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed here")
    for expression in expressions().values():
        parser.parse(expression)


def test_alerts_say_what_is_wrong():
    rules = [rule for group in read("alerts.yaml")["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def test_the_dashboards_panels_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana/dashboard.json").read_text(encoding="utf-8"))["panels"]
    places = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & places
        assert at["x"] + at["w"] <= 24
        places |= own
    assert len({panel["id"] for panel in panels}) == len(panels)


# -- commands -----------------------------------------------------------------------------------------------------------


def deployment() -> dict[str, Any]:
    return read("kubernetes/deployment.yaml")["spec"]["template"]["spec"]


def commands() -> dict[str, list[str]]:
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    return {
        "Dockerfile": json.loads(re.search(r"^CMD (.*)$", docker, re.MULTILINE)[1]),
        "compose": read("compose.yaml")["services"]["serve"]["command"],
        "kubernetes": deployment()["containers"][0]["args"],
    }


def test_command_lines_are_those_of_the_verb(capsys, tmp_path):
    from tests.conftest import fails

    known = {*all_keys(), "sweep", "run", "runs", "base", "serve"}
    for place, words in commands().items():
        assert all(word.partition("=")[0] in known for word in words), place
        # everything is understood: what is wrong is that the folder is not there on this machine
        message = fails(["serve", *(word.replace("/runs", str(tmp_path / "runs")) for word in words)], capsys)
        assert "runs" in message


def test_times_let_open_answers_end():
    pause = deployment()["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert deployment()["terminationGracePeriodSeconds"] > pause + ServeConfig().stop_seconds + 5
    assert (
        int(read("compose.yaml")["services"]["serve"]["stop_grace_period"].rstrip("s")) > ServeConfig().stop_seconds + 5
    )


def test_probes_ask_the_route_that_needs_no_key():
    container = deployment()["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN
    assert "/healthz" in OPEN
    assert "/healthz" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_only_its_own_folders_can_be_written():
    container, serve = deployment()["containers"][0], read("compose.yaml")["services"]["serve"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert serve["read_only"]
    written = {one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")}
    assert written == {"/cache", "/tmp"}  # noqa: S108
    assert {one["target"] for one in serve["volumes"] if not one.get("read_only")} == {"/cache"}
    assert "ENV LORA_LAB_CACHE=/cache" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in deployment()["volumes"]}


def test_the_parts_fit_together(offered):
    labels = read("kubernetes/deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    service = read("kubernetes/service.yaml")["spec"]
    assert service["selector"].items() <= labels.items()
    assert read("kubernetes/disruption.yaml")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    [port] = deployment()["containers"][0]["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert port["containerPort"] == ServeConfig().port
    scaled = read("kubernetes/autoscaler.yaml")["spec"]
    assert scaled["scaleTargetRef"]["name"] == read("kubernetes/deployment.yaml")["metadata"]["name"]
    [metric] = scaled["metrics"]
    assert metric["pods"]["metric"]["name"] in offered
    [rule] = read("prometheus_adapter.yaml")["rules"]["custom"]
    assert rule["seriesQuery"].startswith(metric["pods"]["metric"]["name"])
    compose = read("compose.yaml")["services"]
    for one in compose.values():
        for mount in one.get("volumes", []):
            if mount["type"] == "bind" and mount["source"].startswith("./"):
                assert (DEPLOY / mount["source"]).is_file(), mount
    [scrape] = read("prometheus.yaml")["scrape_configs"]
    assert scrape["job_name"] == "lora_lab"  # as the alerts have it
    assert set(scrape["dns_sd_configs"][0]["names"]) <= set(compose)
    assert "set $servers serve:8000;" in (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    for name in re.findall(r"^COPY ([^-].*) \S+$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE):
        assert all((ROOT / one).exists() for one in name.split())


# -- schemas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(path.name for path in (DEPLOY / "kubernetes").iterdir()))
def test_kubernetes_files_fit_the_published_schemas(file):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed here")
    validate.validate(read(f"kubernetes/{file}"), validate.latest_version(), strict=True)


def test_the_compose_file_fits_the_published_schema():
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed here")
    import importlib.resources

    import jsonschema

    schema = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(read("compose.yaml"), json.loads(schema.read_text(encoding="utf-8")))


def test_add_key_prints_the_key_alone(tmp_path, capsys):
    """`compose.yaml` writes it into a file that Prometheus sends."""
    assert cli.main(["serve", "add_key=watch", f"serve.keys={tmp_path}/keys.json"]) == 0
    assert re.fullmatch(r"\S+\n", capsys.readouterr().out)

"""The alert rules and the dashboard of the server: by promtool, and beside the metrics that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from mim_torchrec.serving.metrics import Metrics

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)


def promtool(*words: str, text: str | None = None) -> str:
    ended = subprocess.run(
        ["promtool", *words],
        input=text,
        text=True,
        cwd=FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def dashboard_expressions() -> list[str]:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def alert_expressions() -> list[str]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    """With a value of everything."""
    made = Metrics()
    for name in ("requests", "seconds", "unknown", "store_seconds", "store_errors", "store_up", "swaps",
                 "served", "wanted"):  # fmt: skip
        metric = getattr(made, name)
        child = metric.labels(*["x"] * len(metric._labelnames))
        next(getattr(child, way) for way in ("set", "observe", "inc") if hasattr(child, way))(1)
    return made


@needs_promtool
def test_the_rules_are_rules():
    assert f"{len(alert_expressions())} rules found" in promtool("check", "rules", "alerts.yaml")


@needs_promtool
def test_every_alert_fires_when_it_is_to_and_not_otherwise():
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert len(fired) == len(alert_expressions())
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yaml")


@needs_promtool
def test_what_the_dashboard_asks_can_be_asked(tmp_path):
    asked = [
        one.replace("$__rate_interval", "5m").replace("$instance", "a") for one in dashboard_expressions()
    ]
    rules = [{"record": f"one:{k}", "expr": expression} for k, expression in enumerate(asked)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


@needs_promtool
def test_metrics_are_named_as_prometheus_names_them(metrics):
    promtool("check", "metrics", text=generate_latest(metrics.registry).decode())


@pytest.mark.parametrize("asked", [alert_expressions, dashboard_expressions])
def test_every_metric_that_is_asked_for_is_one_of_the_server(metrics, asked):
    there, labels = set(), {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            there.add(sample.name)
            labels.setdefault(sample.name, set()).update(sample.labels)
    for expression in asked():
        for name, selector in re.findall(r"\b(mim_\w+)(?:\{([^}]*)\})?", expression):
            assert name in there, f"{name} in {expression}"
            named = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selector)) - {"instance"}
            assert named <= labels[name], f"{named - labels[name]} of {name}"

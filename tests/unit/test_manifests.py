"""The manifests for Kubernetes are well-formed by the models of its client, and true to the server."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from kubernetes import client

from mim_torchrec.serving.config import Limits, ServeConfig
from mim_torchrec.serving.guards import OPEN
from mim_torchrec.serving.main import LAST
from tests.manifests import faults

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "deploy" / "kubernetes" / "serve"
MODELS = {
    ("apps/v1", "Deployment"): client.V1Deployment,
    ("v1", "Service"): client.V1Service,
    ("policy/v1", "PodDisruptionBudget"): client.V1PodDisruptionBudget,
    ("networking.k8s.io/v1", "NetworkPolicy"): client.V1NetworkPolicy,
}


def manifests() -> dict[str, dict[str, Any]]:
    """The manifests by their kind."""
    names = yaml.safe_load((SERVE / "kustomization.yaml").read_text())["resources"]
    assert sorted(names) == sorted(p.name for p in SERVE.glob("*.yaml") if p.name != "kustomization.yaml")
    found = [yaml.safe_load((SERVE / name).read_text()) for name in names]
    return {manifest["kind"]: manifest for manifest in found}


def container() -> dict[str, Any]:
    (only,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def test_every_manifest_is_well_formed():
    for manifest in manifests().values():
        model = MODELS[manifest["apiVersion"], manifest["kind"]]
        assert list(faults(manifest, model.__name__, manifest["kind"])) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda d: d["spec"].update(replica=3),
            "Deployment.spec.replica: V1DeploymentSpec has no such field",
        ),
        (lambda d: d["spec"].update(replicas="3"), "Deployment.spec.replicas: '3' is no int"),
        (lambda d: d["spec"].pop("selector"), "Deployment.spec: Invalid value for `selector`"),
    ],
)
def test_a_malformed_manifest_is_noticed(change, problem):
    manifest = manifests()["Deployment"]
    change(manifest)
    assert any(fault.startswith(problem) for fault in faults(manifest, "V1Deployment", "Deployment"))


def test_the_server_understands_its_command_line():
    assert container()["command"] == ["mim", "serve"]
    config = tyro.cli(ServeConfig, args=container()["args"])
    assert config.host == "0.0.0.0" and config.token_file is not None
    (mounted,) = [m for m in container()["volumeMounts"] if m["name"] == "tokens"]
    assert str(config.token_file.parent) == mounted["mountPath"]
    assert [config.port] == [port["containerPort"] for port in container()["ports"]]


def test_probes_ask_what_is_answered_without_a_token():
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container()[probe]["httpGet"]["path"] in OPEN
        assert container()[probe]["httpGet"]["port"] == container()["ports"][0]["name"]
    assert (
        "ready" not in container()["livenessProbe"]["httpGet"]["path"]
    )  # a store that is down restarts nobody


def test_selectors_choose_the_pods_of_the_deployment():
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    port = container()["ports"][0]["name"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port
    assert found["NetworkPolicy"]["spec"]["ingress"] == [{"ports": [{"port": port}]}]


def test_pods_are_not_root_and_write_to_their_own_folders_only():
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    temporary = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    writable = {m["name"]: m["mountPath"] for m in container()["volumeMounts"] if not m.get("readOnly")}
    assert set(writable) == temporary and set(writable.values()) == {"/tmp", "/dev/shm"}
    assert {m["name"] for m in container()["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_server_that_is_stopped_has_time_to_answer():
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    before = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + Limits().deadline_ms / 1000 + LAST


def test_kustomize_builds_them():
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run(["kubectl", "kustomize", str(SERVE)], capture_output=True, text=True, check=True)
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(built.stdout)]
    assert sorted(kinds) == sorted(manifests())
    assert "image: mim-torchrec:cpu" in built.stdout

"""launch/kubernetes/jobset.yaml against the schemas of JobSet and Kubernetes; its commands as a pod would run them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, assert_same_run
from hosts import ETC, hosts
from test_distributed import launch

from psn_train.recipe import load_recipe, recipe_path

PATH = ROOT / "launch" / "kubernetes" / "jobset.yaml"
VERSIONS = ["1.29", "1.33"]


def documents() -> tuple[dict, dict]:
    claim, jobset = yaml.safe_load_all(PATH.read_text(encoding="utf-8"))
    return claim, jobset


def job(jobset: dict) -> dict:
    """The Job that the controller makes of the only replicated job."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    metadata = {"name": f"{jobset['metadata']['name']}-{replicated['name']}-0"}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": replicated["template"]["spec"]}


def problems_of_jobset(jobset: dict) -> list[str]:
    """What JobSet's API, as generated from its own OpenAPI schema, does not know or want."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    from pydantic import ValidationError

    try:
        known = models.JobsetV1alpha2JobSet.from_dict(json.loads(json.dumps(jobset))).to_dict()
    except ValidationError as error:
        return [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
    # the models pass over keys that they do not know, and put empty texts where required ones are missing
    unknown = [f"unknown: {key}" for key in sorted(keys(jobset) - keys(known))]
    return unknown + [f"missing: {key}" for key in sorted(keys(known) - keys(jobset))]


def keys(value, path: str = "") -> set[str]:
    if isinstance(value, dict):
        return {f"{path}.{key}" for key in value} | {k for key, v in value.items() for k in keys(v, f"{path}.{key}")}
    if isinstance(value, list):
        return {k for i, v in enumerate(value) for k in keys(v, f"{path}[{i}]")}
    return set()


def test_the_recipe_finds_all_its_shards_on_the_volume():
    _, jobset = documents()
    (container,) = job(jobset)["spec"]["template"]["spec"]["containers"]
    (mount,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "data"]
    recipe = load_recipe(recipe_path(container["args"][0]), container["args"][1:])
    named = [where for where in (recipe.data.train, recipe.data.val, recipe.data.test, recipe.run_dir) if where]
    assert len(named) >= 3 and all(where.startswith(f"{mount}/") for where in named)


def test_the_jobset_is_one():
    _, jobset = documents()
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert problems_of_jobset(jobset) == []
    assert jobset["spec"]["failurePolicy"]["restartStrategy"] in ("Recreate", "BlockingRecreate", "InPlaceRestart")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda spec: spec["network"].update(enableDnsHostnames=True), "enableDnsHostnames"),
        (lambda spec: spec["failurePolicy"].update(maxRestarts="20"), "maxRestarts"),
        (lambda spec: spec["replicatedJobs"][0].pop("name"), "name"),
        (lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(gracePeriod=3), "grace"),
    ],
)
def test_a_mistake_in_the_jobset_is_seen(spoil, problem):
    _, jobset = documents()
    spoil(jobset["spec"])
    found = problems_of_jobset(jobset)
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_its_job_and_its_claim_are_what_kubernetes_takes(version):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    claim, jobset = documents()
    kubernetes.validate(claim, version, strict=True)
    kubernetes.validate(job(jobset), version, strict=True)
    wrong = job(jobset)
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountpath"] = "/data"
    with pytest.raises(kubernetes.ValidationError, match="mountpath"):
        kubernetes.validate(wrong, version, strict=True)


def pod(jobset: dict) -> tuple[dict, dict, dict[str, str]]:
    spec = job(jobset)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container, {variable["name"]: variable["value"] for variable in container["env"]}


def test_its_numbers_and_names_fit_together():
    claim, jobset = documents()
    spec, container, variables = pod(jobset)
    count = job(jobset)["spec"]
    assert count["parallelism"] == count["completions"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["PROCESSES_PER_NODE"])
    name, (replicated,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    assert variables["MAIN_HOST"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert jobset["spec"]["successPolicy"]["targetReplicatedJobs"] == [replicated["name"]]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    # whom the image runs as
    user = re.search(r"--uid (\d+)", (ROOT / "Dockerfile").read_text())[1]
    assert spec["securityContext"]["runAsUser"] == int(user)
    recipe, *overrides = container["args"]
    assert load_recipe(recipe_path(recipe), overrides).run_dir.startswith("/data/")


def numbers(process: int) -> list[int]:
    """The ids of a process, from this namespace to its own; [id, 1] is process 1 of a pod."""
    (ids,) = re.findall(r"^NSpid:(.*)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return [int(word) for word in ids.split()]


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.timeout(900)
def test_its_pods_train_save_when_they_are_stopped_and_go_on(small, tmp_path):
    """The container's commands in process namespaces on two hosts; processes and paths are this test's."""
    _, jobset = documents()
    _, container, variables = pod(jobset)
    assert container["lifecycle"]["preStop"]["exec"]["command"][:2] == ["bash", "-c"]
    stop_command = container["lifecycle"]["preStop"]["exec"]["command"]
    changes = {
        "schedule": {"epochs": None, "steps": 600},
        "checkpoint": {"every_epochs": 9999},
        "log": {"every_steps": 5, "eval_every_epochs": 9999},
    }
    whole, stopped = small("whole", **changes), small("stopped", **changes)
    (tmp_path / "recipe.json").write_text(json.dumps(stopped))
    environment = {**variables, "PROCESSES_PER_NODE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    with hosts(2, tmp_path) as made:
        for host in made:
            with open(ETC / host.namespace / "hosts", "a") as table:
                table.write(f"{made[0].address} {variables['MAIN_HOST']}\n")

        def start(attempt: str) -> list[subprocess.Popen]:
            alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
            return [
                host.start(
                    [*alone, *container["command"], str(tmp_path / "recipe.json")],
                    tmp_path / f"{attempt}.{index}",
                    env={**environment, "JOB_COMPLETION_INDEX": str(index)},
                    cwd=ROOT,
                )
                for index, host in enumerate(made)
            ]

        running = start("first")
        metrics, deadline = Path(stopped["run_dir"]) / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and '"step": 20,' in metrics.read_text()):
            assert time.monotonic() < deadline, (tmp_path / "first.0").read_text()
            time.sleep(0.2)
        # what the kubelet does to one pod that has to go: the hook, in the pod's namespaces
        (first,) = [pid for pid in made[1].processes() if numbers(pid)[1:] == [1]]
        inside = ["nsenter", "--target", str(first), "--pid", "--mount", "--net"]
        subprocess.run([*inside, *stop_command], check=True, timeout=200)
        assert all(process.wait(200) != 0 for process in running)
        output = (tmp_path / "first.0").read_text()
        assert "a signal to another rank" in output and "all is saved" in output, output
        running = start("second")
        assert [process.wait(600) for process in running] == [0, 0], (tmp_path / "second.0").read_text()
        assert "goes on after step" in (tmp_path / "second.0").read_text()
    status, output = launch(whole, tmp_path, 2)
    assert status == 0, output
    assert_same_run(stopped["run_dir"], whole["run_dir"])

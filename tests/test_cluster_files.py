"""Cluster files against Ray's own schema, loader and AWS provider; kuberay.yaml against what KubeRay documents."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import ray.autoscaler
import tyro
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

from tests.job_scripts import REPOSITORY, load_job

CLUSTER: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
GOOGLE: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster-gcp.yaml").read_text())
JOB: dict[str, Any] = yaml.safe_load((REPOSITORY / "kuberay.yaml").read_text())
SCHEMA = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
RAY_VERSION = next(asked.partition("==")[2] for asked in EXTRAS["ray"] if asked.startswith("ray["))
UNITS = {"m": 2**20, "Mi": 2**20, "Gi": 2**30}


def in_bytes(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(m|Mi|Gi)", size).groups()
    return int(number) * UNITS[unit]


def object_store(command: str) -> int:
    return int(re.search(r"--object-store-memory=(\d+)", command)[1])


# --- cluster.yaml -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [CLUSTER, GOOGLE], ids=["aws", "gcp"])
def test_the_cluster_file_is_what_ray_s_schema_and_loader_take(cluster: dict[str, Any]):
    jsonschema.validate(cluster, SCHEMA)
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "gpu-spot", "gpu-on-demand"}


def test_the_clouds_differ_in_machines_alone():
    of_the_cloud = {"provider", "available_node_types", "initialization_commands", "head_setup_commands"}
    for key in (CLUSTER.keys() | GOOGLE.keys()) - of_the_cloud:
        assert CLUSTER[key] == GOOGLE[key], key
    without_machines = [
        {name: {**node_type, "node_config": None} for name, node_type in cluster["available_node_types"].items()}
        for cluster in (CLUSTER, GOOGLE)
    ]
    assert without_machines[0] == without_machines[1]


@pytest.fixture
def amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A pretended EC2 with a default network; Ray's new ssh key goes to a folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        yield boto3.resource("ec2", CLUSTER["provider"]["region"])


def launched(config: dict[str, Any], node_type: str) -> Any:
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    node_config = config["available_node_types"][node_type]["node_config"]
    (instance,) = provider.create_node(node_config, {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}, 1).values()
    return instance


def test_ray_s_aws_provider_starts_its_nodes_in_the_closed_group_alone(amazon: Any):
    group = amazon.create_security_group(GroupName="closed", Description="ssh from one address")
    image = next(iter(amazon.images.all())).id
    profiles = boto3.client("iam", CLUSTER["provider"]["region"])
    config = prepare_config(copy.deepcopy(CLUSTER))
    for node_type in config["available_node_types"].values():
        node_config = node_type["node_config"]
        node_config |= {"SecurityGroupIds": [group.id], "ImageId": image}
        name = node_config["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        if name not in {each["InstanceProfileName"] for each in profiles.list_instance_profiles()["InstanceProfiles"]}:
            profiles.create_instance_profile(InstanceProfileName=name)
        found = profiles.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        node_config["IamInstanceProfile"] = {"Arn": found["Arn"]}
    before = {each.id for each in amazon.security_groups.all()}
    bootstrapped = bootstrap_aws(config)
    nodes = {name: launched(bootstrapped, name) for name in config["available_node_types"]}
    # A typo in what EC2 is asked for would have been refused by its client.
    assert {name: node.instance_type for name, node in nodes.items()} == {
        "head": "m7i.xlarge",
        "gpu-spot": "g5.xlarge",
        "gpu-on-demand": "g5.xlarge",
    }
    assert [[each["GroupId"] for each in node.security_groups] for node in nodes.values()] == [[group.id]] * 3
    assert {each.id for each in amazon.security_groups.all()} == before


def test_every_node_has_a_profile_and_no_key_is_in_the_files():
    for node_type in CLUSTER["available_node_types"].values():
        assert set(node_type["node_config"]["IamInstanceProfile"]) == {"Arn"}
    for name in ("cluster.yaml", "cluster-gcp.yaml", "kuberay.yaml", "Dockerfile"):
        text = (REPOSITORY / name).read_text()
        assert not re.search(r"AKIA|aws_secret|SECRET_ACCESS|ACCESS_KEY", text, re.IGNORECASE)


def test_shared_memory_holds_the_object_store():
    docker = CLUSTER["docker"]
    for role in ("head", "worker"):
        (option,) = docker[f"{role}_run_options"]
        store = object_store(CLUSTER[f"{role}_start_ray_commands"][-1])
        assert store < in_bytes(option.removeprefix("--shm-size=")) < 1.3 * store


def test_the_dashboard_is_on_loopback_and_the_token_is_everywhere():
    assert "--dashboard-host=127.0.0.1" in CLUSTER["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in (REPOSITORY / "cluster.yaml").read_text()
    assert "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in CLUSTER["file_mounts"]


def test_what_is_mounted_and_copied_is_there():
    for source in CLUSTER["file_mounts"].values():
        assert source.startswith("~") or (REPOSITORY / source).exists(), source
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"requirements.txt", "scalenet_ray", "jobs"} <= set(copied)
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []


def test_pinned_versions_are_installed_and_the_images_hold_the_same_ray():
    install = "-m pip install --quiet --require-hashes -r ~/project/requirements.txt"
    assert any(command.endswith(install) for command in CLUSTER["setup_commands"])
    images = [CLUSTER["docker"]["head_image"], CLUSTER["docker"]["worker_image"]]
    images += re.findall(r"^FROM (\S+)", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert [image for image in images if not image.startswith(f"rayproject/ray:{RAY_VERSION}-py311")] == []
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION


# --- kuberay.yaml -----------------------------------------------------------------------------------


def test_the_ray_job_s_entrypoint_is_a_command_of_ours():
    program, script, *flags = shlex.split(JOB["spec"]["entrypoint"])
    path = Path(script)
    assert (program, path.parent) == ("/home/ray/venv/bin/python", Path("/home/ray/project/jobs"))
    assert (REPOSITORY / "jobs" / path.name).is_file()
    job = tyro.cli(load_job(path.stem).EvalCoco, args=flags)
    assert job.resume
    assert job.resources.gpus_per_detector_actor == 0.5


def test_pods_have_room_for_their_object_store():
    cluster = JOB["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,), (volume,) = (group["template"]["spec"][key] for key in ("containers", "volumes"))
        store = int(group["rayStartParams"]["object-store-memory"])
        shared = in_bytes(volume["emptyDir"]["sizeLimit"])
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert store < shared < in_bytes(container["resources"]["limits"]["memory"])
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in cluster["workerGroupSpecs"]] == [0]

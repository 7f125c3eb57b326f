"""A job with all its files on S3, under failing requests; `pytest -s` prints their number."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from s3fs import S3FileSystem

from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.policy_form import policy_to_dict
from scalenet_ray.data import stores
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import load_job
from tests.s3_faults import ANSWERS, BREAKS, faulty_s3

POLICIES = ("scalenet",)


def policy_yaml(name: str) -> str:
    info = NetworkSpec(detector=SAMPLE_DETECTOR).describe_detector()
    policy = parse_policy(name, input_side=info.input_side, iou_threshold=info.iou_threshold)
    return yaml.safe_dump({**policy_to_dict(policy), "name": "from-a-file"})


@pytest.mark.slow
def test_a_run_with_everything_on_s3_survives_failing_requests(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sample = write_sample(tmp_path / "sample", train=1, val=4)
    (tmp_path / "policy.yaml").write_text(policy_yaml("first-pass"))
    module = load_job("eval_coco")
    job = module.EvalCoco(
        data=str(sample),
        policies=POLICIES,
        policy_file=str(tmp_path / "policy.yaml"),
        output=str(tmp_path / "run"),
        engine="local",
        networks=NetworkSpec(SAMPLE_DETECTOR, SAMPLE_SCALE_NET),
    )
    assert module.main(job) == 0

    store = S3FileSystem()
    store.put(str(sample), f"{s3_bucket}/sample", recursive=True)
    store.put(str(tmp_path / "policy.yaml"), f"{s3_bucket}/policy.yaml")
    detector, scale_net = SAMPLE_DETECTOR.removeprefix("tiny:"), SAMPLE_SCALE_NET
    for path in (detector, scale_net):
        store.put(path, f"{s3_bucket}/weights/{os.path.basename(path)}")
    away = module.EvalCoco(
        data=f"{s3_bucket}/sample",
        policies=POLICIES,
        policy_file=f"{s3_bucket}/policy.yaml",
        output=f"{s3_bucket}/run",
        engine="local",
        networks=NetworkSpec(
            f"tiny:{s3_bucket}/weights/{os.path.basename(detector)}",
            f"{s3_bucket}/weights/{os.path.basename(scale_net)}",
        ),
    )
    monkeypatch.setattr(stores, "_S3_TIMEOUTS", {"connect_timeout": 5, "read_timeout": 2})
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], [*ANSWERS, *BREAKS], every=10) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        S3FileSystem.clear_instance_cache()
        assert module.main(away) == 0
    S3FileSystem.clear_instance_cache()
    said = capsys.readouterr()
    sys.stdout.write(f"S3 faults injected and survived, of {server.signed.total()} requests: {dict(server.injected)}\n")

    assert not {*ANSWERS, *BREAKS} - set(server.injected)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.behind.netloc}")
    there = S3FileSystem(skip_instance_cache=True)
    for name in (*POLICIES, "from-a-file"):
        found = json.loads(there.cat(f"{s3_bucket}/run/results/{name}.json"))
        assert found
        assert found == json.loads((tmp_path / "run" / "results" / f"{name}.json").read_text())
    # Neither what was said nor what was written repeats a credential.
    written = [there.cat(path) for path in there.find(f"{s3_bucket}/run")]
    shown = [said.out.encode(), said.err.encode(), *written]
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert [text[:200] for text in shown if os.environ[secret].encode() in text] == []

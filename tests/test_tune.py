"""The search for policies, through the job's entry point on a small sample."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from s3fs import S3FileSystem
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from scalenet_ray.core.policy import parse_policy
from scalenet_ray.data import storage
from scalenet_ray.data.categories import CategoryChoice
from scalenet_ray.data.policy_files import read_policies, read_space
from scalenet_ray.engine.study import StudyFile
from scalenet_ray.engine.trial import STARTS, TrialSettings
from scalenet_ray.engine.tune import PruningOptuna, ResumableAsha, Sweep, best_policies
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import REPOSITORY, load_job
from tests.ray_fixture import own_ray_environment
from tests.test_datasets import sample_as_yolo

NETWORKS = NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET)
SPACE = {
    "version": 1,
    "policies": ["first-pass", "scalenet"],
    "search": {
        "recursion.window": {"from": 0.3, "to": 0.6},
        "recursion.max_windows": {"from": 0, "to": 4},
        "recursion.small_classes": {"of": [[1], [1, 2]]},
        "merging.method": {"of": ["nms", "soft-nms-linear"]},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sweep") / "sample", train=8, val=4)


def space_file(folder: Path, content: dict[str, Any] = SPACE) -> str:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def job_on(data: Path, folder: Path, **changes: Any) -> Any:
    job = load_job("tune_recursion").TuneRecursion(
        data=str(data),
        space=space_file(folder),
        ceiling=4.0,
        output=str(folder / "run"),
        networks=NETWORKS,
        sweep=Sweep(trials=6, at_once=1),
    )
    return replace(job, **changes)


def task_on(data: Path, policy: str = "first-pass", **changes: Any) -> TrialSettings:
    info = NETWORKS.describe_detector()
    start = parse_policy(policy, input_side=info.input_side, iou_threshold=info.iou_threshold)
    annotations = str(data / "annotations" / "instances_train2017.json")
    task = TrialSettings({policy: start}, NETWORKS, annotations, str(data / "train2017"), (4, 8), (4.0, 4.0), 10**8)
    return replace(task, **changes)


def hparams_of(folder: Path) -> dict[str, Any]:
    """The values of a trial in its events: records of a length (8 bytes), its check sum (4), data, and theirs (4)."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, at, found = path.read_bytes(), 0, {}
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        for value in Event.FromString(content[at + 12 : at + 12 + size]).summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                started = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
                found |= {name: getattr(one, one.WhichOneof("kind")) for name, one in started.hparams.items()}
        at += 16 + size
    return found


# --- what is chosen ---------------------------------------------------------------------------------


def row(passes: float, ap_small: float, **changes: Any) -> dict[str, Any]:
    values = {"policy": "first-pass", "recursion.window": passes / 10}
    return {
        "trial": "t",
        "values": values,
        "passes": passes,
        "AP_small": ap_small,
        "complete": True,
        "error": None,
        **changes,
    }


def test_the_best_is_chosen_under_the_ceiling_or_the_whole_front(data: Path) -> None:
    rows = [row(1.0, 10.0), row(3.0, 20.0), row(3.5, 19.0), row(5.0, 30.0), row(2.0, 90.0, complete=False)]
    (best,) = best_policies(rows, task_on(data))
    assert (best.name, best.recursion.window) == ("tuned", 0.3)
    chosen = best_policies(rows, task_on(data, ceilings=None))
    assert [(policy.name, policy.recursion.window) for policy in chosen] == [
        ("front-1", 0.1),
        ("front-2", 0.3),
        ("front-3", 0.5),
    ]


def test_a_ceiling_that_no_trial_stays_under_is_said(data: Path) -> None:
    message = "no trial of 2 stays at 1.5 passes an image or under, the cheapest takes 2.00: raise the ceiling"
    with pytest.raises(ValueError, match=message):
        best_policies([row(2.0, 10.0), row(3.0, 20.0)], task_on(data, ceilings=(1.5, 1.5)))


def test_what_reads_the_ground_truth_is_never_the_best(data: Path) -> None:
    policies = dict(task_on(data).policies)
    task = task_on(data, policies={**policies, "mine": replace(policies["first-pass"], name="mine", kind="oracle")})
    knowing = row(3.0, 90.0, values={"policy": "mine"})
    for ceilings in ((4.0, 4.0), None):
        (best,) = best_policies([knowing, row(3.0, 20.0)], replace(task, ceilings=ceilings))
        assert best.kind == "first-pass"
    with pytest.raises(ValueError, match="read the ground truth: let the sweep start from a policy that reads none"):
        best_policies([knowing], task)


def test_a_sweep_whose_trials_all_failed_says_why(data: Path) -> None:
    with pytest.raises(ValueError, match="no trial of 1 saw all images to its end: the reason"):
        best_policies([row(2.0, 10.0, complete=False, error="the reason")], task_on(data))


def test_the_searcher_learns_no_score_of_a_trial_that_was_stopped() -> None:
    space = {"window": FloatDistribution(0.0, 1.0)}
    searcher = PruningOptuna(steps=2, space=space, metric="score", mode="max", seed=0)
    for trial, scores in {"stopped": [99.0], "whole": [20.0, 21.0]}.items():
        searcher.suggest(trial)
        results = [{"training_iteration": step, "score": score} for step, score in enumerate(scores, start=1)]
        for result in results:
            searcher.on_trial_result(trial, result)
        searcher.on_trial_complete(trial, results[-1])
    searcher.suggest("failed")
    searcher.on_trial_complete("failed", error=True)
    stopped, whole, failed = searcher._ot_study.trials
    assert [stopped.state, whole.state, failed.state] == [TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL]
    assert searcher._ot_study.best_value == whole.value == 21.0


def test_after_a_resume_trials_are_stopped_as_they_would_have_been() -> None:
    def trial(name: str, scores: list[float]) -> Any:
        last = {"training_iteration": len(scores)} if scores else {}
        return SimpleNamespace(
            trial_id=name,
            is_finished=lambda: bool(scores),
            last_result=last,
            # A trial that was begun anew has what it said the first time, too.
            metric_n_steps={"score": {"10": deque([99.0, *scores])}},
        )

    def scheduler() -> ResumableAsha:
        return ResumableAsha(max_t=3, grace_period=1, reduction_factor=2, metric="score", mode="max")

    whole: Any = scheduler()
    ended = [[20.0, 22.0, 23.0], [10.0]]
    for i, scores in enumerate(ended):
        one = trial(str(i), [])
        whole.on_trial_add(None, one)
        for step, score in enumerate(scores, start=1):
            whole.on_trial_result(None, one, {"training_iteration": step, "score": score})
    resumed: Any = scheduler()
    for i, scores in enumerate(ended):
        resumed.on_trial_add(None, trial(str(i), scores))
    for score, action in ((14.0, "STOP"), (16.0, "CONTINUE")):
        for each in (whole, resumed):
            new = trial(f"new {score}", [])
            each.on_trial_add(None, new)
            assert each.on_trial_result(None, new, {"training_iteration": 1, "score": score}) == action


# --- the job ----------------------------------------------------------------------------------------


@pytest.mark.ray
# Three sweeps, one of them in a process of its own: minutes where cores are shared.
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_killed_in_the_middle_ends_with_the_same_best(
    idle_ray: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_job("tune_recursion")
    (tmp_path / "whole").mkdir()
    job = job_on(data, tmp_path / "whole", ceiling="start")
    assert module.main(job) == 0
    output = capsys.readouterr().out
    assert "trial 6 of 6: AP_small" in output
    assert re.search(r"ceiling: [\d.]+ detector passes an image, what (first-pass|scalenet) takes on train2017", output)
    assert "difference to first-pass" in output
    assert re.search("nothing beat the start on train2017|which the sweep started from", output)
    assert re.search("(no sure gain|a gain|a loss) on val2017: tuned has AP_small", output)
    assert "The start beside the best" in (tmp_path / "whole" / "run" / "report.html").read_text()
    run = tmp_path / "whole" / "run"
    trials = json.loads((run / "trials.json").read_text())
    assert len(trials) == 6
    assert sum(trial["hits"] for trial in trials) > 0
    starts = json.loads((run / "starts.json").read_text())
    assert list(starts["policies"]) == ["first-pass", "scalenet"]
    assert [len(steps) for steps in (starts["ceilings"], *starts["policies"].values())] == [3, 3, 3]
    assert f"The ceiling is {starts['ceilings'][-1]:g} detector passes an image." in (run / "report.html").read_text()
    (best,) = read_policies(run / "best.yaml")
    assert best.name == "tuned"
    reported = json.loads((run / "report" / "metrics.json").read_text())
    assert list(reported["policies"]) == ["first-pass", "scalenet", "tuned"]
    assert reported["images"]["done"] == 4
    assert {trial["trial"]: hparams_of(run / "tune" / trial["trial"]) for trial in trials} == {
        trial["trial"]: pytest.approx(trial["values"]) for trial in trials
    }
    assert (run / "front.svg").read_text().startswith("<svg")
    in_study = {
        (trial.user_attrs["trial"], trial.values[0])
        for trial in StudyFile(str(run / "study.log"), read_space(space_file(tmp_path)), 6, single=True).open().trials
        if trial.values
    }
    assert in_study == {(trial["trial"], trial["score"]) for trial in trials if trial["complete"]}

    import ray

    (tmp_path / "killed").mkdir()
    killed = job_on(data, tmp_path / "killed", ceiling="start")
    command = [sys.executable, "jobs/tune_recursion.py", "--data", str(data), "--space", killed.space]
    command += ["--output", killed.output, "--detector", SAMPLE_DETECTOR]
    command += ["--scale-net", SAMPLE_SCALE_NET, "--trials", "6", "--at-once", "1"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("trial 3 of 6") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert not Path(killed.output, "best.yaml").exists()
    # It keeps the ceilings that it began with, whatever its starts would take now.
    assert json.loads(Path(killed.output, STARTS).read_text()) == starts
    assert module.main(replace(killed, resume=True)) == 0
    assert len(json.loads(Path(killed.output, "trials.json").read_text())) == 6
    assert read_policies(Path(killed.output, "best.yaml")) == [best]


@pytest.mark.ray
@pytest.mark.slow
def test_trials_that_fail_are_named_and_the_sweep_goes_on(
    idle_ray: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # R_H under R_L is no policy.
    search = {"recursion.scale_range.high": {"of": [0.5, 1.1]}, "recursion.max_windows": {"of": [1, 2]}}
    yolo = Path(sample_as_yolo(data, tmp_path / "yolo"))
    yolo.write_text(yolo.read_text().replace("- star", "- asterisk"))
    other = {"split": "train", "report_split": "val", "categories": CategoryChoice(("asterisk=star",))}
    job = job_on(yolo, tmp_path, ceiling=None, sweep=Sweep("grid", at_once=2, keep=False), **other)
    space_file(tmp_path, {"version": 1, "policies": ["first-pass"], "search": search})
    assert load_job("tune_recursion").main(job) == 0
    trials = json.loads((tmp_path / "run" / "trials.json").read_text())
    assert sorted(trial["complete"] for trial in trials) == [False, False, True, True]
    failed = [trial for trial in trials if not trial["complete"]]
    assert all("scale_range must be 0 < R_L <= R_H" in trial["error"] for trial in failed)
    assert [trial["values"]["recursion.scale_range.high"] for trial in failed] == [0.5, 0.5]
    assert {trial["trial"] for trial in trials} == {path.name for path in (tmp_path / "run" / "tune").glob("*/")}
    reported = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert reported["renamed_categories"] == {"asterisk": "star"}
    # The start has more windows than the space, and is evaluated all the same.
    starts = json.loads((tmp_path / "run" / STARTS).read_text())
    assert starts["ceilings"] is None
    output = capsys.readouterr().out
    assert "no ceiling: the sweep searches the front of AP_small and passes" in output
    assert f"first-pass: AP_small {starts['policies']['first-pass'][-1]['AP_small']:.1f} at" in output
    assert output.count("failed, the sweep goes on") == 2
    # Nothing of Tune's own: it prints folders that Ray takes away.
    assert not re.search("To visualize|View detailed|Error file", output)
    assert "failed: scale_range must be 0 < R_L <= R_H" in output
    assert read_policies(tmp_path / "run" / "best.yaml")[0].name == "front-1"


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": (0.5, 0.25, 1.0)}, "--subsets must be at most 10 growing shares of the images that end at 1"),
        ({"subsets": (0.5,)}, "--subsets must be at most 10 growing shares"),
        ({"ceiling": 0.5}, "--ceiling must be 1 pass an image"),
        ({"space": {**SPACE, "policies": ["first-pass", "oracle"]}}, "read no ground truth, got oracle: leave it out"),
        (
            {"sweep": Sweep("grid")},
            r"a grid wants lists, {of: \[VALUE, ...\]}, got ranges for recursion.max_windows, recursion.window",
        ),
    ],
)
def test_bad_input_is_refused(
    ray_session: None, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    job = job_on(data, tmp_path, **changes)
    if "space" in changes:
        job = replace(job, space=space_file(tmp_path, changes["space"]))
    with pytest.raises(ValueError, match=message):
        load_job("tune_recursion").main(job)


def test_a_sweep_has_trials() -> None:
    with pytest.raises(ValueError, match="trials must be 1 or more, got 0"):
        Sweep(trials=0)


# --- tune on s3 -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_has_its_data_and_its_state_on_s3_and_resumes_there(tmp_path: Path, s3_bucket: str) -> None:
    sample = write_sample(tmp_path / "sample", train=4, val=1)
    S3FileSystem().put(str(sample), f"{s3_bucket}/sample", recursive=True)
    command = [sys.executable, "-m", "tests.tune_on_s3", s3_bucket]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=own_ray_environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tried"')]
    # The second time both trials are done: none is tried again.
    assert runs == [{"tried": 2, "complete": 2}, {"tried": 0, "complete": 2}]
    assert storage.exists(f"{s3_bucket}/run/tune/tuner.pkl")
    written = b"".join(storage.read_bytes(uri) for uri in storage.list_files(f"{s3_bucket}/run"))
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in written

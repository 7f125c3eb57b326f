"""Joining a Ray cluster, and calls that run away from the driver."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import ray
from ray._private.log import PlainRayHandler

from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.core.networks import NetworkTrial, TrialCall
from scalenet_ray.engine.session import RaySession, join_ray
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.automatic import Cluster
from scalenet_ray.runs.resources import ResourceChoice
from tests.task_functions import node_id, raise_it
from tests.three_nodes import free_port


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Ray has started, and it must not start."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was asked to join"))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_nobody_listens_at_is_refused(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    port = free_port()
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}, .*refused.*unset it"):
        join_ray()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_accepts_and_says_nothing_is_refused(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{port}")
        monkeypatch.setattr("scalenet_ray.engine.session._ANSWER_SECONDS", 0.2)
        with pytest.raises(UserError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}, .*no answer"):
            join_ray()


@pytest.mark.parametrize("address", ["head", "head:ninety", ":6379", "head:99999", "auto"])
def test_an_address_that_names_no_cluster_is_refused(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("scalenet_ray.engine.session.canonicalize_bootstrap_address", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS must be HOST:PORT .*, got {address}: correct it, or unset it"):
        join_ray()


@pytest.mark.parametrize("error", [ConnectionError("no nodes"), RuntimeError("Version mismatch"), ValueError("odd")])
def test_what_ray_says_when_it_cannot_start_is_the_users_to_correct(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with patch.object(ray, "init", side_effect=error), pytest.raises(UserError, match=f"not be started: {error}"):
        join_ray()


def test_handlers_that_others_gave_ray_datas_logger_keep_their_levels(
    no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    of_others, of_ray = logging.StreamHandler(), PlainRayHandler()
    monkeypatch.setattr(logging.getLogger("ray.data"), "handlers", [of_others, of_ray])
    with patch.object(ray, "init"):
        join_ray()
    assert (of_others.level, of_ray.level) == (logging.NOTSET, logging.CRITICAL)


@pytest.mark.parametrize(("own", "used"), [(None, "10000"), ("77", "77")])
def test_a_ray_of_its_own_remembers_few_tasks_unless_told_otherwise(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, own: str | None, used: str
) -> None:
    name = "RAY_task_events_max_num_task_in_gcs"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Set before it is deleted, so that the test leaves it as it was.
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    with patch.object(ray, "init") as init:
        init.side_effect = lambda *args, **kwargs: init.seen(os.environ.get(name))
        join_ray()
    init.seen.assert_called_once_with(used)


def test_joining_leaves_the_handler_of_sigterm_as_it_was(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*args: object, **kwargs: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("Ray's handler"))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with patch.object(ray, "init", init):
        join_ray()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_joining_reaches_who_handled_it_before(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*args: object, **kwargs: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: (_ for _ in ()).throw(SystemExit(number)))
        signal.raise_signal(signal.SIGTERM)

    heard: list[int] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with patch.object(ray, "init", init), pytest.raises(SystemExit):
            join_ray()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_ray_is_joined_from_a_thread_too(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with patch.object(ray, "init", lambda address, **kwargs: joined.append(address)):
        thread = threading.Thread(target=join_ray)
        thread.start()
        thread.join()
    assert joined == ["local"]


# --- what the user has left open ----------------------------------------------------------------------------


def trial_on(networks: NetworkSpec) -> NetworkTrial:
    """A trial of networks that refuse one GPU, and have no use for another."""
    if networks.device == "cuda" and networks.detector == "needs:CPU":
        raise UserError("there is no CUDA in this onnxruntime")
    return NetworkTrial("cpu" if networks.detector == "ignores:GPU" else networks.device, (TrialCall(8, 0.1),))


class Settling(RaySession):
    """A session of a cluster that is made up, whose trials run here."""

    def __init__(self, cluster: Cluster, **chosen: Any) -> None:
        with patch("scalenet_ray.engine.session.join_ray"):
            super().__init__(ResourceChoice(**chosen))
        self._cluster, self.lines, self.on_gpu = cluster, list[str](), 0

    def settled(self, detector: str, device: str) -> NetworkSpec:
        with patch("scalenet_ray.engine.session.cluster_now", lambda: self._cluster):
            return self.settle(NetworkSpec(detector, device=device), trial_on, self.lines.append)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def _try_on_gpu(self, networks: NetworkSpec, trial: Any, log: Any) -> NetworkTrial:
        self.on_gpu += 1
        return trial(networks)


WITH_GPUS, WITHOUT, GPUS_TO_COME = Cluster(16, 2), Cluster(4), Cluster(8, 0, most_cpus=40, most_gpus=8)


@pytest.mark.parametrize(
    ("cluster", "detector", "device", "settled", "trials_on_gpu"),
    [
        (WITH_GPUS, "a:B", "auto", "cuda", 1),
        (GPUS_TO_COME, "a:B", "auto", "cuda", 1),
        (WITHOUT, "a:B", "auto", "cpu", 0),
        (WITH_GPUS, "needs:CPU", "auto", "cpu", 1),
        (WITH_GPUS, "ignores:GPU", "auto", "cpu", 1),
        (WITH_GPUS, "a:B", "cpu", "cpu", 0),
        (GPUS_TO_COME, "a:B", "cuda", "cuda", 1),
    ],
)
def test_auto_is_a_gpu_if_there_may_be_one_and_the_networks_run_on_it(
    cluster: Cluster, detector: str, device: str, settled: str, trials_on_gpu: int
) -> None:
    session = Settling(cluster)
    assert session.settled(detector, device).device == settled
    assert session.on_gpu == trials_on_gpu
    assert session.settings["gpus_per_detector_actor"] == (settled == "cuda")
    assert ("GPUs: " if settled == "cuda" else "CPUs: ") in session.lines[-1]
    assert any("the networks run on CPUs" in line for line in session.lines) == (detector == "needs:CPU")


def test_the_address_of_the_dashboard_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.worker._global_node", SimpleNamespace(webui_url="10.0.0.1:8265"))
    session = Settling(WITHOUT)
    session.settled("a:B", "cpu")
    assert session.lines[0] == "Ray's dashboard: http://10.0.0.1:8265"


def test_a_gpu_that_the_user_names_is_waited_for_on_a_cluster_that_has_none_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    session = Settling(WITHOUT)
    assert session.settled("a:B", "cuda").device == "cuda"
    assert session.on_gpu == 1
    assert session.settings["detector_actors"] == 1


def test_a_user_who_has_set_everything_has_no_trial() -> None:
    chosen = {"readers": 3, "detector_actors": 2, "scale_batch_size": 4, "detector_batch_size": 8}
    session = Settling(WITH_GPUS, **chosen)
    assert session.settled("needs:CPU", "cuda").device == "cuda"
    assert session.on_gpu == 0
    assert {name: session.settings[name] for name in chosen} == chosen


# --- calls --------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize("error", [UserError("give --scale-net"), FileNotFoundError("no a.json")])
def test_a_call_raises_a_users_error_as_itself(ray_session: None, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as raised:
        RaySession(ResourceChoice()).call(raise_it, error)
    assert type(raised.value) is type(error)


@pytest.mark.ray
@pytest.mark.parametrize("error", [KeyError("x"), ValueError("two"), RuntimeError("three")])
def test_a_call_raises_a_bug_with_the_workers_trace(ray_session: None, error: Exception) -> None:
    with pytest.raises(WorkerError) as raised:
        RaySession(ResourceChoice()).call(raise_it, error)
    assert str(raised.value) == f"{type(error).__name__}: {error} in a worker"
    assert "in raise_it" in raised.value.trace


@pytest.mark.ray
def test_a_call_stays_on_the_drivers_node(ray_session: None) -> None:
    from scalenet_ray.engine.pipeline import on_this_node

    assert on_this_node().node_id == node_id()
    assert not on_this_node().soft
    with patch("scalenet_ray.engine.session.on_this_node", wraps=on_this_node) as asked:
        assert RaySession(ResourceChoice()).call(node_id) == node_id()
    asked.assert_called_once()

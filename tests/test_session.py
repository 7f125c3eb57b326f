"""Joining a Ray cluster, and calls that run away from the driver."""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import closing
from unittest.mock import patch

import pytest
import ray

from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.engine.session import RaySession, join_ray
from scalenet_ray.runs.resources import Resources
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


# --- calls --------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize("error", [UserError("give --scale-net"), FileNotFoundError("no a.json")])
def test_a_call_raises_a_users_error_as_itself(ray_session: None, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as raised:
        RaySession(Resources()).call(raise_it, error)
    assert type(raised.value) is type(error)


@pytest.mark.ray
@pytest.mark.parametrize("error", [KeyError("x"), ValueError("two"), RuntimeError("three")])
def test_a_call_raises_a_bug_with_the_workers_trace(ray_session: None, error: Exception) -> None:
    with pytest.raises(WorkerError) as raised:
        RaySession(Resources()).call(raise_it, error)
    assert str(raised.value) == f"{type(error).__name__}: {error} in a worker"
    assert "in raise_it" in raised.value.trace


@pytest.mark.ray
def test_a_call_stays_on_the_drivers_node(ray_session: None) -> None:
    from scalenet_ray.engine.pipeline import on_this_node

    assert on_this_node().node_id == node_id()
    assert not on_this_node().soft
    with patch("scalenet_ray.engine.session.on_this_node", wraps=on_this_node) as asked:
        assert RaySession(Resources()).call(node_id) == node_id()
    asked.assert_called_once()

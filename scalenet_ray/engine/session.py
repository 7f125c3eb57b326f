"""Where the work happens: Ray, joined or started, or this very process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import ray
from ray._private import worker
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.coco import ImageRecord, OpenImage
from scalenet_ray.engine.parallel import image_stream
from scalenet_ray.engine.pipeline import on_this_node
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.runs.batch import Stream
from scalenet_ray.runs.local import LocalStream
from scalenet_ray.runs.resources import Resources

__all__ = ["EngineName", "Session", "join_ray"]

EngineName = Literal["ray", "local"]
"""ray: actors on this machine or a cluster; local: one process, for small jobs and notebooks."""


_STDERR = 2
_ANSWER_SECONDS = 10.0
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The preface of HTTP/2 and empty settings: what a gRPC server answers at once, with settings of its own."""


@ray.remote(num_cpus=0, max_retries=0)
def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def join_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it); without it start Ray on this machine.

    What Ray and its workers say goes to the logs of Ray's session alone, not to the terminal; with the package's log
    at INFO what workers say is shown, too.

    Raises:
        UserError: if there is no cluster at that address, or Ray can be neither joined nor started.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        _check_answers(address)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    shown = logging.getLogger("scalenet_ray").isEnabledFor(logging.INFO)
    with _quiet_backend(), _same_sigterm_handler():
        # Of all errors of all tasks, those too that are tried again; there is no setting for it.
        listen = worker.listen_error_messages
        worker.listen_error_messages = listen if shown else lambda *args: None
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=shown)
        except (RayError, OSError, RuntimeError, ValueError) as error:
            verb = "started" if address == "local" else f"joined at RAY_ADDRESS {address}"
            msg = f"Ray could not be {verb}: {error}"
            raise UserError(msg) from error
        finally:
            worker.listen_error_messages = listen


def _check_answers(address: str) -> None:
    """Refuse an address at which nobody answers: Ray itself would try for minutes.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or auto: the cluster that was started on this machine.
    """
    found = canonicalize_bootstrap_address(address) if address == "auto" else address.removeprefix("ray://")
    host, _, port = str(found).rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        wanted = "HOST:PORT of a running cluster, ray://HOST:PORT, or auto on a machine of one"
        msg = f"RAY_ADDRESS must be {wanted}, got {address}: correct it, or unset it to use this machine"
        raise UserError(msg)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS / 2) as connection:
            connection.settimeout(_ANSWER_SECONDS / 2)
            connection.sendall(_HTTP2_GREETING)
            connection.recv(1)
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        msg = (
            f"no Ray cluster answers at {found}, which RAY_ADDRESS names ({why}): start it, correct RAY_ADDRESS, or "
            "unset it to use this machine"
        )
        raise UserError(msg) from None


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Have Ray's C++ core, here and in processes started in the block, say only what ends it, unless told otherwise."""
    name = "RAY_BACKEND_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "fatal"
    sys.stderr.flush()
    # That its level is another one than its default it says itself, on the standard error's descriptor.
    terminal, nowhere = os.dup(_STDERR), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDERR)
        yield
    finally:
        os.dup2(terminal, _STDERR)
        os.close(terminal)
        os.close(nowhere)
        del os.environ[name]


@contextmanager
def _same_sigterm_handler() -> Iterator[None]:
    """Keep whoever handles SIGTERM: `ray.init` puts a handler of its own there, which raises `SystemExit`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


class Session:
    """An engine, ready for work; with `ray`, as `join_ray` finds it.

    Args:
        engine: which one.
        resources: who works, for `ray`.
    """

    def __init__(self, engine: EngineName, resources: Resources) -> None:
        self._engine = engine
        self._resources = resources
        if engine == "ray":
            join_ray()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function away from the driver, so that what it loads never lies in the driver's memory.

        On the driver's own node: a local run folder is a folder of that one.

        Raises:
            WorkerError: if the function raised what is neither a `UserError` nor an `OSError`.
        """
        if self._engine == "local":
            return function(*args)
        with workers_errors():
            return ray.get(_call.options(scheduling_strategy=on_this_node()).remote(function, *args))

    def start(
        self, images: Sequence[ImageRecord], policy: Policy, networks: NetworkFactories, open_image: OpenImage
    ) -> Stream:
        """Begin to work on images."""
        if self._engine == "local":
            return LocalStream(images, policy, networks, open_image)
        return image_stream(images, policy, networks, open_image, self._resources)

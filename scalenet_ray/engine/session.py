"""Connection to Ray, and the session of engine `ray`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray._private import worker
from ray._private.log import PlainRayHandler
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.networks import NetworkFactories, NetworkTrial
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, OpenImage
from scalenet_ray.engine.parallel import RestartingStream, image_stream
from scalenet_ray.engine.pipeline import on_this_node
from scalenet_ray.engine.placement import cluster_now
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.models.devices import is_gpu
from scalenet_ray.models.spec import AUTO, NetworkSpec
from scalenet_ray.runs.automatic import choose_resources, in_words
from scalenet_ray.runs.batch import Stream
from scalenet_ray.runs.resources import ResourceChoice

_STDERR = 2
_ANSWER_SECONDS = 10.0
_SECONDS_FOR_A_GPU = 10.0
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""HTTP/2 connection preface with empty settings; a gRPC server replies at once with its settings."""


@ray.remote(num_cpus=0, max_retries=0)
def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _stored(references: Sequence[ray.ObjectRef], position: int) -> Any:
    return ray.get(references[position])


def join_ray() -> None:
    """Connect to the cluster at RAY_ADDRESS (set by `ray job submit`), or start Ray on this machine.

    Output of Ray and its workers goes to the log files of the Ray session. Worker output is also printed if the log
    level of the package is INFO or lower.

    Raises:
        UserError: if no cluster answers at the address, or Ray cannot be started.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # The tasks that the dashboard lists: so many take 33 MB of GCS. Ray's default is 100,000.
        os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "10000")
    else:
        _check_answers(address)
    for handler in logging.getLogger("ray.data").handlers:
        # Only the terminal's: handlers of others keep their levels.
        if isinstance(handler, PlainRayHandler):
            handler.setLevel(logging.CRITICAL)
    shown = logging.getLogger("scalenet_ray").isEnabledFor(logging.INFO)
    with _quiet_backend(), _same_sigterm_handler():
        # It prints the errors of all tasks, retried ones included; Ray has no setting for it.
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
    """Check that a cluster answers at an address; Ray itself would retry for minutes.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or auto for the cluster that was started on this machine.
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
    """Set Ray's C++ log level to fatal, in this process and those started in the block, unless the user has set it."""
    name = "RAY_BACKEND_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "fatal"
    sys.stderr.flush()
    # Ray prints a changed log level to file descriptor 2.
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
    """Restore the SIGTERM handler: `ray.init` installs its own, which raises `SystemExit`."""
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


class RaySession:
    """`Session` of engine `ray`, which `join_ray` starts.

    Args:
        choice: the user's readers, actors and batch sizes; until `settle`, others have the defaults of `Resources`.
    """

    def __init__(self, choice: ResourceChoice) -> None:
        self._choice = choice
        self._resources = choice.completed()
        join_ray()

    @property
    def settings(self) -> dict[str, Any]:
        """Readers, actors, batch sizes, limits and timeouts, by the names of their flags."""
        return self._resources.as_settings()

    def settle(
        self, networks: NetworkSpec, trial: Callable[[NetworkSpec], NetworkTrial], log: Callable[[str], None]
    ) -> NetworkSpec:
        """Choose the device, and the resources that the user has left open; log the dashboard, and them in one line.

        Args:
            networks: the networks, on a device or auto.
            trial: tries networks in the process that calls it.
            log: takes a line for the terminal.

        Returns:
            The networks with their device.

        Raises:
            UserError: if the networks do not run on the user's device, or the resources do not fit each other.
        """
        # A client of ray:// has no node.
        if dashboard := getattr(worker._global_node, "webui_url", None):
            log(f"Ray's dashboard: http://{dashboard}")
        on_gpu = is_gpu(networks.device)
        if self._choice.is_complete and networks.device != AUTO:
            self._resources = self._choice.completed(gpus_per_detector_actor=float(on_gpu))
            return networks
        cluster = cluster_now()
        tried = None
        if networks.device == AUTO and cluster.may_have_gpus:
            try:
                tried = self._try_on_gpu(replace(networks, device="cuda"), trial, log)
            except UserError as error:
                log(f"the networks run on CPUs: {error}")
        if tried is None:
            networks = networks if networks.device != AUTO else replace(networks, device="cpu")
            # Not every autoscaler tells which nodes it may add.
            with_gpu = on_gpu and (cluster.may_have_gpus or "RAY_ADDRESS" in os.environ)
            tried = self._try_on_gpu(networks, trial, log) if with_gpu else self.call(trial, networks)
        cluster = cluster_now()  # The trial may have brought a node.
        self._resources = choose_resources(self._choice, cluster, tried)
        log(in_words(self._resources, cluster, tried.device))
        return replace(networks, device=tried.device)

    def _try_on_gpu(
        self,
        networks: NetworkSpec,
        trial: Callable[[NetworkSpec], NetworkTrial],
        log: Callable[[str], None],
    ) -> NetworkTrial:
        """Try the networks on a node with a GPU, which an autoscaler may have to add first."""
        gpus = min(1.0, self._choice.gpus_per_detector_actor or 1.0)
        task: Any = _call.options(num_gpus=gpus)
        answer = task.remote(trial, networks)
        if not ray.wait([answer], timeout=_SECONDS_FOR_A_GPU)[0]:
            log("waiting for a node with a GPU")
        with workers_errors():
            return ray.get(answer)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a Ray task, so that its data does not stay in the driver's memory.

        The task runs on the driver's node, which has the local run folder.

        Raises:
            WorkerError: if the function raised an error other than a `UserError` or an `OSError`.
        """
        with workers_errors():
            return ray.get(_call.options(scheduling_strategy=on_this_node()).remote(function, *args))

    def hold(self, values: Sequence[Any]) -> Callable[[int], Any]:
        """Put values into Ray's object store, which writes to disk what its memory does not hold."""
        return partial(_stored, [ray.put(value) for value in values])

    def start(
        self, images: Sequence[ImageRecord], policy: Policy, networks: NetworkFactories, open_image: OpenImage
    ) -> Stream:
        """Start to process images."""

        def start(images: ImageRecords) -> Stream:
            """Start to process some of the images."""
            return image_stream(images, policy, networks, open_image, self._resources)

        return RestartingStream(ImageRecords.of(images), start)

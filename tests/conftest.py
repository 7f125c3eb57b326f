"""Fixtures that several test files share, and how tests are dealt out to processes."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.ray_fixture import idle_ray, ray_session, uses_ray  # noqa: F401 - fixtures

# On shared cores an example may take any time.
settings.register_profile("tests", deadline=None, max_examples=60)
settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process of pytest-xdist, put the files of the shared Ray first: they take longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not uses_ray(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files, and all files of the shared Ray to one process."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if uses_ray(config.rootpath / file) else file

    return OneRay(config, log)


@pytest.fixture(autouse=True)
def unchanged_package_logger() -> Iterator[None]:
    """Undo what a command run in a test's process sets on the package's logger."""
    logger = logging.getLogger("scalenet_ray")
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def few_resamples() -> Iterator[None]:
    """A third of an evaluation of few images was its bootstrap."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("scalenet_ray.evaluation.compare.RESAMPLES", 50)
        yield


@pytest.fixture(scope="session", autouse=True)
def empty_charts() -> Iterator[Any]:
    """Four fifths of a run of few images were its report's charts: they are drawn where a test asks for them."""
    from scalenet_ray.report import charts

    draw = charts.to_svg
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(charts, "to_svg", lambda figure: '<svg width="1.0pt"></svg>')
        yield draw


@pytest.fixture
def drawn_charts(empty_charts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's charts are drawn as for a user."""
    monkeypatch.setattr("scalenet_ray.report.charts.to_svg", empty_charts)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles of actors answer at once, and a reader that would wait is a mistake of the test."""
    monkeypatch.setattr("scalenet_ray.engine.stages.ray.get", lambda answer: answer)
    monkeypatch.setattr("scalenet_ray.engine.readers.time.sleep", lambda seconds: pytest.fail("a reader waits"))


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small embedded sample, which tests leave as it is."""
    from scalenet_ray.sample.scenes import write_sample

    return write_sample(tmp_path_factory.mktemp("data") / "sample", train=1, val=4)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data (COCO, models); the test is skipped where there is none."""
    folder = os.environ.get("SCALENET_RAY_DATA")
    if not folder:
        pytest.skip("set SCALENET_RAY_DATA to the folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3 on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """`s3://` and a bucket of the test's own, with what reaches it in the environment."""
    import boto3
    from s3fs import S3FileSystem

    settings = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key-of-a-test",
        "AWS_SECRET_ACCESS_KEY": "word-that-must-stay-hidden",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    # A client keeps the endpoint and the credentials that it was made with.
    S3FileSystem.clear_instance_cache()
    bucket = f"bucket{abs(hash(request.node.nodeid))}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    S3FileSystem.clear_instance_cache()
    # A run's lock that is not released would write to the servers of all tests that follow.
    for thread in threading.enumerate():
        if thread.name == "run-lock":
            thread.join(timeout=10)
            assert not thread.is_alive(), "the test has not released a run's lock"


@pytest.fixture(scope="session")
def google_endpoint() -> Iterator[str]:
    """A server that speaks Google Cloud Storage on this machine."""
    from tests.google_store import google_server

    with google_server() as address:
        yield address


@pytest.fixture
def object_bucket(s3_bucket: str, google_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`gs://` and a bucket of the test's own, with what reaches it in the environment."""
    from obstore.fsspec import FsspecStore

    from scalenet_ray.data import stores

    account = {"gcs_base_url": google_endpoint, "disable_oauth": True}
    account |= {"client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    monkeypatch.setitem(stores._OBJECT_TIMEOUTS, "allow_http", True)
    FsspecStore.clear_instance_cache()
    yield s3_bucket.replace("s3://", "gs://")
    FsspecStore.clear_instance_cache()

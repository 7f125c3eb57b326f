"""Stores other than the disk and S3: web servers, Google Cloud Storage, Azure, whatever fsspec knows."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.data.images import file_hw, read_image
from scalenet_ray.data.listings import find_images
from scalenet_ray.data.storage import RangeFile, exists, join, list_files, local_path, read_bytes, write_bytes_atomic
from scalenet_ray.data.stores import locate
from scalenet_ray.models.spec import SAMPLE_DETECTOR
from scalenet_ray.runs.folder import RunFolder
from tests.hub_server import DATASET, hub_server
from tests.job_scripts import run_command


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, whole or in ranges."""

    server: _Server

    def do_GET(self) -> None:
        """Answer a request for a file, or for a range of one."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not self.server.knows_ranges or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        part = data[int(asked[1]) : int(asked[2]) + 1]
        self.server.sent += len(part)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        """End the headers, and say whether ranges are known."""
        if self.server.knows_ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    """A web server of a folder.

    Attributes:
        knows_ranges: whether it serves parts of files.
        sent: bytes that it sent in parts.
    """

    daemon_threads = True

    def __init__(self, folder: Path, *, knows_ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.knows_ranges = knows_ranges
        self.sent = 0


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_Server]:
    (tmp_path / "www" / "sub").mkdir(parents=True)
    made = _Server(tmp_path / "www", knows_ranges=request.param)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def site(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_files_of_a_web_server_are_read_and_listed(site: str, tmp_path: Path) -> None:
    (tmp_path / "www" / "a.jpg").write_bytes(b"one")
    (tmp_path / "www" / "sub" / "b.jpg").write_bytes(b"other")
    assert read_bytes(f"{site}/a.jpg") == b"one"
    assert read_bytes(f"{site}/a.jpg", max_bytes=3) == b"one"
    with pytest.raises(UserError, match=r"a\.jpg may have 2 bytes, got 3"):
        read_bytes(f"{site}/a.jpg", max_bytes=2)
    assert list_files(f"{site}/", (".jpg",)) == [f"{site}/a.jpg", f"{site}/sub/b.jpg"]
    assert [record.file_name for record in find_images(join(site, "")).records] == [
        f"{site}/a.jpg",
        f"{site}/sub/b.jpg",
    ]
    assert exists(f"{site}/a.jpg")
    assert not exists(f"{site}/none.jpg")
    assert local_path(f"{site}/a.jpg") is None


def test_parts_of_a_file_are_read_with_or_without_ranges(site: str, tmp_path: Path) -> None:
    (tmp_path / "www" / "file").write_bytes(bytes(range(256)) * 100)
    with RangeFile(f"{site}/file") as file:
        assert file.seek(1000) == 1000
        assert file.read(4) == bytes([1000 % 256 + i for i in range(4)])
        assert file.seek(0, io.SEEK_END) == 25600


def test_of_an_image_only_the_header_is_fetched(server: _Server, site: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "www" / "a.png")
    assert file_hw(f"{site}/a.png") == (1000, 1500)
    size = (tmp_path / "www" / "a.png").stat().st_size
    assert not server.knows_ranges or 0 < server.sent < size / 4
    assert np.array_equal(read_image(f"{site}/a.png"), noise)


def test_what_a_web_server_does_not_have_is_named(site: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json: there is no such file or folder; check the path"):
        read_bytes(f"{site}/none.json")
    with pytest.raises(TileError, match="there is no such file"):
        read_image(f"{site}/none.jpg")


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(OSError, match=r"cannot read http://127.0.0.1:1/a: .*check the address, the network") as caught:
        read_bytes("http://127.0.0.1:1/a")
    assert caught.value.__cause__ is None


def test_a_web_server_is_read_only(site: str) -> None:
    message = r"cannot write http://.*: it is read only, without conditional writes .* write to a local disk, s3://"
    with pytest.raises(UserError, match=message):
        write_bytes_atomic(f"{site}/file", b"x")
    with pytest.raises(UserError, match=message), RunFolder(f"{site}/run").begin({}, resume=False):
        pass


def test_images_of_a_web_server_are_detected(site: str, tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (96, 64)).save(tmp_path / "www" / name)
    (tmp_path / "www" / "broken.png").write_bytes(b"no image")
    flags = ("--detector", SAMPLE_DETECTOR, "--policy", "whole", "--engine", "local", "--max-failures", "1")
    assert run_command("detect", "--images", f"{site}/", *flags, "--output", str(tmp_path / "run")) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["images"] == {"total": 3, "done": 2, "failed": 1}


def test_images_of_the_hugging_face_hub_are_detected(tmp_path: Path) -> None:
    (tmp_path / "hub" / "images" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b c.png"):
        Image.new("RGB", (96, 64)).save(tmp_path / "hub" / "images" / name)
    flags = ("--detector", SAMPLE_DETECTOR, "--policy", "whole", "--engine", "local", "--output", tmp_path / "run")
    with hub_server(tmp_path / "hub") as address:
        # huggingface_hub reads the address once, when it is imported.
        environment = {**os.environ, "HF_ENDPOINT": address, "PYTHONPATH": os.getcwd()}
        detect = (sys.executable, "-m", "scalenet_ray", "detect", "--images", f"hf://datasets/{DATASET}/images")
        subprocess.run([*detect, *flags], env=environment, check=True, cwd=tmp_path, timeout=240)
        missing = (*detect[:-1], "hf://datasets/owner/other", *flags[:-1], tmp_path / "other")
        refused = subprocess.run(missing, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["images"] == {"total": 2, "done": 2, "failed": 0}
    assert "hf://datasets/owner/other: there is no such file or folder; check the path" in refused.stderr


# --- other stores --------------------------------------------------------------------------------------


def test_what_fsspec_knows_is_read() -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/data/a.jpg", b"one")
    try:
        assert read_bytes("memory://data/a.jpg") == b"one"
        assert list_files("memory://data") == ["memory:///data/a.jpg"]
        assert read_bytes(list_files("memory://data")[0]) == b"one"
        with pytest.raises(UserError, match="cannot write memory://data/b: it is read only"):
            write_bytes_atomic("memory://data/b", b"x")
    finally:
        store.rm("/data", recursive=True)


@pytest.mark.parametrize(
    ("address", "package", "extra"),
    [
        ("gs://bucket/a", "obstore", "gcs"),
        ("az://container/a", "obstore", "azure"),
        ("hf://datasets/a/b", "huggingface_hub", "hf"),
    ],
)
def test_a_store_whose_package_is_missing_names_the_extra(
    address: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'scalenet-ray\[{extra}\]'"):
        read_bytes(address)


@pytest.mark.parametrize(
    ("form", "addresses"),
    [
        ("s3://BUCKET/KEY", ("s3://", "s3:///key", "s3:/key", "s3:")),
        ("gs://BUCKET/KEY", ("gs://", "gs:///key", "gs:/key", "gs:", "gs:// ")),
        ("az://CONTAINER/KEY", ("az://", "az:///key", "az:/key", "az:")),
        ("https://HOST/PATH", ("https://", "https:///a", "https:/host/a")),
        ("file:///PATH", ("file://", "file:", "file:/a")),
        (
            "hf://datasets/OWNER/NAME/PATH",
            (
                *("hf://", "hf:///owner/name", "hf:/owner/name", "hf:", "hf://owner", "hf://owner//a", "hf://a b/name"),
                *(
                    "hf://datasets",
                    "hf://datasets/",
                    "hf://datasets/owner",
                    "hf://datasets/owner/",
                    "hf://spaces/owner",
                ),
                *("hf://datasets/owner/name@/a", "hf://datasets/datasets/owner/name"),
            ),
        ),
    ],
)
def test_an_incomplete_address_is_refused_before_its_store_is_asked(form: str, addresses: tuple[str, ...]) -> None:
    for address in addresses:
        with pytest.raises(UserError) as caught:
            locate(address)
        scheme = form.partition(":")[0]
        message = f"an address with {scheme}: must be {form}, got {address}: complete it (is a variable unset?)"
        assert str(caught.value) == message


@pytest.mark.parametrize("address", ["owner/name", "datasets/o.w-n_er/name/a b/c", "spaces/owner/name@main/a", "o/n@a"])
def test_a_complete_address_of_the_hub_is_not_refused(address: str) -> None:
    assert locate(f"hf://{address}")[1] == address


@pytest.mark.parametrize("name", ["s3", "gs", "file", "hf", "a:b", "http.jpg"])
def test_a_file_may_be_called_like_a_scheme(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"one")
    assert read_bytes(name) == b"one"


@pytest.mark.parametrize(
    "address",
    ["https://user:secret@host/a", "gs://key:secret@bucket/a", "gs:///key:secret@bucket/a", "https:/user:secret@host"],
)
def test_an_address_with_credentials_is_refused_without_them(address: str) -> None:
    with pytest.raises(UserError, match="must not hold credentials: set them in the environment instead") as caught:
        read_bytes(address)
    assert "secret" not in str(caught.value)


def test_a_run_in_an_object_store_goes_on(object_bucket: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (96, 64)).save(tmp_path / name)
        write_bytes_atomic(f"{object_bucket}/photos/{name}", (tmp_path / name).read_bytes())
    flags = ("--images", f"{object_bucket}/photos", "--detector", SAMPLE_DETECTOR, "--policy", "whole")
    output = ("--engine", "local", "--output", f"{object_bucket}/run")
    assert run_command("detect", *flags, *output) == 0
    assert json.loads(read_bytes(f"{object_bucket}/run/metrics.json"))["images"]["done"] == 2
    assert not exists(f"{object_bucket}/run/driver.lock")
    assert run_command("detect", *flags, *output, "--resume") == 0

"""`--device tensorrt`: engines for the shapes of a detector's batches, their cache, and what is refused.

TensorRT is played by onnxruntime on the CPU, behind a session that says it is TensorRT's.
"""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnxruntime
import pytest

from scalenet_ray.core.errors import UserError
from scalenet_ray.engine.placement import gpu_share
from scalenet_ray.models import network_trial
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.devices import batch_size_on, device_named
from scalenet_ray.models.network_trial import try_networks
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_DETECTOR_WEIGHTS, SAMPLE_SCALE_NET, NetworkSpec
from tests.colour_exports import export
from tests.faults import Scenes, policy_of, records_of
from tests.test_onnx_detector import detections, in_order
from tests.test_yolox import black, colour_net

GPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Played:
    """An `InferenceSession` that computes on the CPU whatever the providers, and keeps what it was asked for."""

    made: ClassVar[list[Self]] = []
    without_tensorrt = False

    def __init__(self, data: bytes, options: Any, *, providers: list[Any], enable_fallback: int = 1) -> None:
        self.names = [each if isinstance(each, str) else each[0] for each in providers]
        self.settings = {} if isinstance(providers[0], str) else providers[0][1]
        self.enable_fallback = enable_fallback
        self.shapes: list[tuple[int, ...]] = []
        self.is_locked = self.of_tensorrt and _is_locked(self.folder / "lock")
        self._real = REAL(data, options, providers=["CPUExecutionProvider"])
        self.made.append(self)

    @property
    def of_tensorrt(self) -> bool:
        return self.names[0] == "TensorrtExecutionProvider"

    @property
    def folder(self) -> Path:
        return Path(self.settings["trt_engine_cache_path"])

    def get_providers(self) -> list[str]:
        return GPU if self.without_tensorrt else self.names

    def run(self, names: Any, feed: dict[str, np.ndarray], options: Any = None) -> Any:
        self.shapes.append(next(iter(feed.values())).shape)
        return self._real.run(names, feed, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


REAL = onnxruntime.InferenceSession


def _is_locked(path: Path) -> bool:
    with path.open("w") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Played]:
    """`onnxruntime` with TensorRT and CUDA, and a user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Played, "made", [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Played)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", *GPU])
    return Played


def engine_of(played: type[Played]) -> Played:
    """The one session in TensorRT."""
    (engine,) = [each for each in played.made if each.of_tensorrt]
    return engine


def shapes_of(engine: Played) -> list[str | None]:
    return [engine.settings.get(f"trt_profile_{name}_shapes") for name in ("min", "opt", "max")]


def test_an_engine_is_built_once_for_all_batches_of_a_network_of_free_size(
    played: type[Played], tmp_path: Path
) -> None:
    path = export(tmp_path / "net.onnx", "yolov8")
    load_detector(f"onnx:{path}", device="tensorrt:1")
    engine = engine_of(played)
    assert engine.names == ["TensorrtExecutionProvider", *GPU]
    assert engine.enable_fallback == 0
    assert engine.is_locked
    assert shapes_of(engine) == ["images:1x3x320x320", "images:8x3x640x640", "images:16x3x1280x1280"]
    assert engine.settings["device_id"] == 1
    assert engine.settings["trt_engine_cache_enable"] == engine.settings["trt_timing_cache_enable"] == "1"
    assert engine.settings["trt_timing_cache_path"] == str(engine.folder)
    assert engine.folder.parent == tmp_path / "cache" / "scalenet_ray" / "tensorrt"
    assert {tuple(each.names) for each in played.made if not each.of_tensorrt} == {tuple(GPU)}


def test_the_cache_is_one_folder_for_a_file_and_another_for_another(played: type[Played], tmp_path: Path) -> None:
    paths = [export(tmp_path / f"{count}.onnx", "yolov8", classes=count) for count in (3, 4)]
    names = [tmp_path / f"{count}.txt" for count in (3, 4)]
    for count, file in zip((3, 4), names, strict=True):
        file.write_text("\n".join("abcd"[:count]))
    for i in (0, 0, 1):
        load_detector(f"onnx:{paths[i]}@{names[i]}", device="tensorrt")
    first, again, other = (each.folder for each in played.made if each.of_tensorrt)
    assert first == again != other


def test_sizes_that_are_fixed_are_not_in_the_profile(played: type[Played], tmp_path: Path) -> None:
    # The fixed size of a network whose rows are no cells stays as it is.
    load_detector(
        f"onnx:{export(tmp_path / 'net.onnx', 'target-sizes', hw=(64, 96), free=['batch'])}", device="tensorrt"
    )
    batch = "images:{0}x3x64x96,orig_target_sizes:{0}x2"
    assert shapes_of(engine_of(played)) == [batch.format(tiles) for tiles in (1, 8, 16)]


@pytest.mark.parametrize("kind", ["onnx", "yolox-onnx"])
def test_tiles_are_found_in_batches_of_at_most_16_and_as_on_the_cpu(
    kind: str, played: type[Played], tmp_path: Path
) -> None:
    path = colour_net(tmp_path / "net.onnx") if kind == "yolox-onnx" else export(tmp_path / "net.onnx", "yolov8")
    tiles = [black(64, 64, green=(i % 6, 1)) for i in range(20)]
    detector = load_detector(f"{kind}:{path}", device="tensorrt")
    found = detections(detector(tiles))
    assert [shape[0] for shape in engine_of(played).shapes] == [16, 16]
    for one, other in zip(found, load_detector(f"{kind}:{path}")(tiles), strict=True):
        for part, same in zip(
            in_order(one.boxes, one.scores, one.labels), in_order(other.boxes, other.scores, other.labels), strict=True
        ):
            np.testing.assert_allclose(part, same, atol=1e-4)


def test_canvases_beyond_the_engine_run_on_cuda_which_is_said_once(
    played: type[Played], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = tmp_path / "input.yaml"
    small.write_text("imgsz: 64")
    detector = load_detector(f"onnx:{export(tmp_path / 'net.onnx', 'yolov8')}@{small}", device="tensorrt")
    engine = engine_of(played)
    assert shapes_of(engine)[2] == "images:16x3x128x128"
    with caplog.at_level(logging.WARNING):
        (found,) = detections(detector([black(192, 64, green=(2, 2))]))
        detector([black(192, 64)])
    assert len(found) == 1
    assert engine.shapes == []
    assert [record.message for record in caplog.records] == [
        "canvases over 128 x 128 run on CUDA: TensorRT's engine was not built for them"
    ]


@pytest.mark.gpu
def test_a_real_engine_finds_what_the_cpu_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = export(tmp_path / "net.onnx", "yolov8")
    try:
        detector = load_detector(f"onnx:{path}", device="tensorrt")
    except UserError as error:
        if not any(missing in str(error) for missing in ("needs onnxruntime-gpu", "Please install TensorRT libraries")):
            raise
        pytest.skip(str(error))
    tiles = [black(64, 64, green=(i, 1)) for i in range(3)]
    for one, other in zip(detector(tiles), load_detector(f"onnx:{path}")(tiles), strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=0.1)
        np.testing.assert_allclose(one.scores, other.scores, atol=0.01)
    assert list(tmp_path.rglob("*.engine"))


# --- names of the device ---------------------------------------------------------------------------------


def test_it_is_a_gpu_for_batches_and_actors() -> None:
    assert [batch_size_on(name) for name in ("tensorrt", "tensorrt:1")] == [16, 16]
    assert gpu_share("tensorrt:1", 2, gpus=[2.0]) == 1.0


def test_a_trial_keeps_it_where_no_library_tells_how_full_the_gpu_is(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_trial, "_gpu_memory", lambda: (0, 0))
    networks = NetworkSpec(f"onnx:{export(tmp_path / 'net.onnx', 'yolov8')}", device="tensorrt")
    categories = networks.describe_detector().categories
    trial = try_networks(networks, [policy_of("whole")], categories, (), records_of(1), Scenes())
    assert trial.device == "tensorrt"
    assert engine_of(played).shapes


def test_scale_net_in_onnx_runs_on_cuda_beside_it(played: type[Played]) -> None:
    NetworkSpec(scale_net=SAMPLE_SCALE_NET, device="tensorrt").load_scale_net()
    assert [each.names for each in played.made] == [GPU]


@pytest.mark.parametrize("spec", [SAMPLE_DETECTOR, SAMPLE_DETECTOR_WEIGHTS, "torchvision:ssd300_vgg16"])
def test_detectors_in_torch_are_refused_before_a_run(spec: str) -> None:
    said = f"device 'tensorrt' is for detectors in ONNX, such as onnx:PATH, got '{spec}': use device cuda"
    with pytest.raises(UserError, match=said):
        NetworkSpec(spec, device="tensorrt").check_device(here=False)
    with pytest.raises(UserError, match=said):
        load_detector(spec, device="tensorrt")


def test_other_networks_in_torch_are_refused() -> None:
    with pytest.raises(UserError, match=r"device 'tensorrt:0' is for networks in ONNX, got one in torch: .*export it"):
        device_named("tensorrt:0")


# --- what is refused -------------------------------------------------------------------------------------


def test_an_onnxruntime_without_it_is_refused_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = NetworkSpec("onnx:net.onnx", device="tensorrt")
    networks.check_device(here=False)
    for has in (["CPUExecutionProvider"], GPU):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda has=has: has)
        with pytest.raises(UserError, match=r"device 'tensorrt' needs onnxruntime-gpu, got one with \['C.*: install"):
            networks.check_device(here=True)


@pytest.mark.parametrize("name", ["tensorrt:x", "tensorrt:", "tensorrt_rtx"])
def test_a_name_that_is_nearly_its_is_refused(name: str, tmp_path: Path, played: type[Played]) -> None:
    with pytest.raises(UserError, match=f"device must be cpu, cuda, .*tensorrt:INDEX, got '{name}'"):
        load_detector(f"onnx:{export(tmp_path / 'net.onnx', 'yolov8')}", device=name)


def test_a_library_that_is_missing_is_said_with_what_to_install(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Played.__init__

    def without_library(self: Played, data: bytes, options: Any, **settings: Any) -> None:
        if settings["providers"][0][0] == "TensorrtExecutionProvider":
            raise RuntimeError("Please install\nTensorRT libraries")
        begin(self, data, options, **settings)

    monkeypatch.setattr(Played, "__init__", without_library)
    path = export(tmp_path / "net.onnx", "yolov8")
    said = (
        f"device 'tensorrt' must have an engine of TensorRT for {path}, got Please install TensorRT libraries: install "
        "TensorRT's libraries .pip install tensorrt. and name their folder, tensorrt_libs, in LD_LIBRARY_PATH, or use "
    )
    with pytest.raises(UserError, match=said):
        load_detector(f"onnx:{path}", device="tensorrt")


def test_a_session_that_quietly_runs_without_it_is_refused(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "without_tensorrt", True)
    with pytest.raises(UserError, match="got no error, but a session without it: install TensorRT's libraries"):
        load_detector(f"onnx:{export(tmp_path / 'net.onnx', 'yolov8')}", device="tensorrt")

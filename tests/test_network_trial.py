"""The short trial of a run's networks."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scalenet_ray.core.errors import OutOfMemoryError, TileError, UserError
from scalenet_ray.core.networks import NetworkTrial
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.models import network_trial
from scalenet_ray.models.devices import has_gpu_driver
from scalenet_ray.models.network_trial import try_networks
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from tests.faults import Scenes, policy_of, records_of

COUNTING = """
import numpy as np
from scalenet_ray import Detections
from scalenet_ray.core.errors import OutOfMemoryError

class Counting:
    input_side = 64
    iou_threshold = 0.5
    categories = {1: "square"}
    batches = []
    fits = 1000

    def canvas_hw(self, hw):
        return hw

    def __call__(self, pixels):
        if len(pixels) > Counting.fits:
            raise OutOfMemoryError("no room")
        Counting.batches.append(len(pixels))
        return [Detections.empty() for _ in pixels]
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class of a detector that counts its batches."""
    (tmp_path / "counting_detector.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "counting_detector", raising=False)
    return importlib.import_module("counting_detector").Counting


def tried(networks: NetworkSpec, policy: str = "whole", open_image: object = None, images: int = 3) -> NetworkTrial:
    scenes = open_image or Scenes()
    return try_networks(networks, [policy_of(policy)], {1: "square"}, (), records_of(images), scenes)  # type: ignore[arg-type]


OF_COUNTING = NetworkSpec("counting_detector:Counting", device="cpu")


def test_networks_are_timed_with_batches_of_two_sizes_after_a_first_call(counting: type) -> None:
    trial = tried(OF_COUNTING)
    assert counting.batches == [1, 1, 4, 16]
    assert [call.tiles for call in trial.calls] == [4, 16]
    assert all(call.seconds > 0 for call in trial.calls)
    assert trial.device == "cpu"
    assert trial.read_seconds > 0
    assert trial.process_bytes > 2**20


def test_a_batch_that_would_take_long_is_not_tried(counting: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_trial, "_MOST_SECONDS", 0.0)
    assert [call.tiles for call in tried(OF_COUNTING).calls] == [1]
    assert counting.batches == [1, 1]


def test_a_batch_that_does_not_fit_is_not_counted(counting: type) -> None:
    counting.fits = 4
    assert [call.tiles for call in tried(OF_COUNTING).calls] == [4]
    counting.fits = 0
    with pytest.raises(OutOfMemoryError):
        tried(OF_COUNTING)


def test_images_that_cannot_be_read_are_left_out(counting: type) -> None:
    def unreadable(record: ImageRecord) -> np.ndarray:
        raise TileError("gone")

    assert len(tried(OF_COUNTING, open_image=unreadable).calls) == 2
    assert len(tried(OF_COUNTING, images=0).calls) == 2


def test_a_policy_with_a_scale_net_is_timed_with_it() -> None:
    sample = NetworkSpec(SAMPLE_DETECTOR, SAMPLE_SCALE_NET, device="cpu")
    categories = sample.describe_detector().categories
    trial = try_networks(sample, [policy_of("scalenet")], categories, (), records_of(2), Scenes())
    assert trial.calls[-1].tiles == 16


def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    if has_gpu_driver():
        pytest.skip("this machine has a GPU")
    assert NetworkSpec(SAMPLE_DETECTOR).device == "auto"
    assert NetworkSpec(SAMPLE_DETECTOR).on_this_machine().device == "cpu"
    assert NetworkSpec(SAMPLE_DETECTOR, device="cuda").on_this_machine().device == "cuda"
    NetworkSpec(SAMPLE_DETECTOR).check_device(here=True)


def test_auto_does_not_load_torch_where_there_is_no_gpu() -> None:
    asks = f"NetworkSpec({SAMPLE_DETECTOR!r}).on_this_machine()"
    code = f"import sys; from scalenet_ray.models.spec import NetworkSpec; {asks}; sys.exit('torch' in sys.modules)"
    if has_gpu_driver():
        pytest.skip("this machine has a GPU")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_device_that_this_machine_lacks_is_refused_before_the_networks_are_loaded() -> None:
    networks = NetworkSpec(detector="no_such_module:Detector", device="cuda:99")
    policy = policy_of("whole")
    with pytest.raises(UserError, match="device 'cuda:99' was wanted"):
        try_networks(networks, [policy], {}, (), records_of(1), Scenes())

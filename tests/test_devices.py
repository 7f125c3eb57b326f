"""Names of devices that torch does not know or this machine does not have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.devices import batch_size_on, device_named, device_on_this_machine
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from tests.job_scripts import load_job

NO_SUCH_DEVICE = "cuda:99"


@pytest.mark.parametrize("name", ["cudaa", "", "cpu:x", "cuda:", "gpu"])
def test_a_name_that_torch_does_not_know_is_refused(name: str) -> None:
    for wanted in (device_named, device_on_this_machine):
        with pytest.raises(UserError, match=f"device must be one that torch knows, such as .*, got '{name}'"):
            wanted(name)


@pytest.mark.parametrize("name", [NO_SUCH_DEVICE, "xla"])
def test_a_device_that_this_machine_lacks_is_refused_here_and_may_be_elsewhere(name: str) -> None:
    assert str(device_named(name)) == name
    with pytest.raises(UserError, match=f"device '{name}' was wanted, torch .*: .*use device cpu"):
        device_on_this_machine(name)


@pytest.mark.parametrize("device", ["cudaa", NO_SUCH_DEVICE])
def test_networks_of_torch_are_not_loaded_for_it(device: str) -> None:
    names = NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET, device=device)
    for load in (lambda: names.load_detector({}), names.load_scale_net):
        with pytest.raises(UserError, match="device"):
            load()


@pytest.mark.parametrize("name", ["detect", "eval_coco"])
def test_a_job_refuses_it_before_its_run_folder_begins(name: str, tmp_path: Path) -> None:
    job = load_job(name)
    kind = {"detect": "DetectImages", "eval_coco": "EvalCoco"}[name]
    asked = getattr(job, kind)(
        output=str(tmp_path / "run"),
        engine="local",
        networks=NetworkSpec(device=NO_SUCH_DEVICE),
        **{"detect": {"images": str(tmp_path)}, "eval_coco": {"data": str(tmp_path)}}[name],
    )
    with pytest.raises(UserError, match=f"device '{NO_SUCH_DEVICE}' was wanted"):
        job.main(asked)
    assert not (tmp_path / "run").exists()


def test_a_gpu_takes_an_images_tiles_in_batches() -> None:
    assert [batch_size_on(name) for name in ("cpu", "cuda", "cuda:1")] == [1, 16, 16]


def test_detectors_in_onnx_ask_onnxruntime_for_a_gpu_and_not_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    networks = NetworkSpec(detector="onnx:a.onnx", device="cuda")
    with pytest.raises(UserError, match="device 'cuda' needs onnxruntime-gpu, got one with"):
        networks.check_device(here=True)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    networks.check_device(here=True)
    NetworkSpec(detector="yolox-onnx:a.onnx", scale_net="head.onnx", device="cuda:1").check_device(here=True)
    for other in (NetworkSpec(detector="onnx:a.onnx", scale_net="head.safetensors"), NetworkSpec(SAMPLE_DETECTOR)):
        with pytest.raises(UserError, match="device 'cuda' was wanted, torch finds 0 CUDA devices"):
            replace(other, device="cuda").check_device(here=True)
    with pytest.raises(UserError, match="device must be one that torch knows"):
        replace(networks, device="gpu").check_device(here=False)

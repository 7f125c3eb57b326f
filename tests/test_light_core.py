"""The core without its extras: detection on one image and local runs load neither torch nor Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scalenet_ray.core.errors import EXTRAS, UserError, needs_extra
from tests.job_scripts import REPOSITORY
from tests.test_repository import project
from tests.test_yolox import colour_net

# In `sys.modules` None stands for a module that cannot be imported.
HIDE = "import sys; sys.modules.update(dict.fromkeys(('ray', 'torch', 'torchvision', 'segmentation_models_pytorch')))\n"


def without_extras(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE + script]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_one_image_of_the_sample() -> None:
    done = without_extras(
        "from scalenet_ray import get_scaled_prediction\n"
        "from scalenet_ray.sample.scenes import sample_scene\n"
        "found = get_scaled_prediction(sample_scene('val2017', 7).pixels, confidence_threshold=0.4)\n"
        "assert found.policy.name == 'scalenet' and len(found.detections) > 3"
    )
    assert done.returncode == 0, done.stderr


def test_one_image_with_a_yolox(tmp_path: Path) -> None:
    net = colour_net(tmp_path / "net.onnx", (1, 3, 64, 64))
    done = without_extras(
        "import numpy as np\n"
        "from scalenet_ray import get_scaled_prediction\n"
        f"get_scaled_prediction(np.zeros((90, 120, 3), np.uint8), {f'yolox-onnx:{net}'!r})"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        ("scalenet_ray.load_detector('torchvision:fasterrcnn_resnet50_fpn')", "torch"),
        ("scalenet_ray.load_detector('tiny:a.safetensors')", "torch"),
        ("scalenet_ray.load_predictor('a.safetensors')", "torch"),
        ("scalenet_ray.load_detector('transformers:a')", "transformers"),
        ("scalenet_ray.load_detector('ultralytics:a.pt')", "ultralytics"),
    ],
)
def test_a_network_of_torch_names_the_extra(call: str, extra: str) -> None:
    done = without_extras(
        f"import scalenet_ray\ntry:\n    {call}\n"
        "except scalenet_ray.UserError as error:\n    sys.stdout.write(str(error))"
    )
    assert done.stdout.endswith(f" is not installed: pip install 'scalenet-ray[{extra}]'"), done.stderr


def test_a_device_is_for_onnxruntime_to_refuse() -> None:
    done = without_extras(
        "from scalenet_ray.models.spec import SAMPLE_SCALE_NET\n"
        "from scalenet_ray import UserError, load_predictor\n"
        "try:\n    load_predictor(SAMPLE_SCALE_NET, 'cuda')\n"
        "except UserError as error:\n    sys.stdout.write(str(error))"
    )
    assert "needs onnxruntime-gpu" in done.stdout, done.stderr


def test_the_extras_that_errors_name_are_there() -> None:
    assert set(EXTRAS.values()) <= set(project()["optional-dependencies"])


def test_a_module_of_no_extra_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needs_extra():
        import no_such_module  # noqa: F401  # pyright: ignore[reportMissingImports]
    with (
        pytest.raises(UserError, match=r"^torch is not installed: pip install 'scalenet-ray\[train\]'$"),
        needs_extra("train"),
    ):
        raise ModuleNotFoundError(name="torch.nn")

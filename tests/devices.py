"""Devices of tests that run on the CPU and, where torch finds one, on a GPU."""

from __future__ import annotations

import pytest
import torch

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
"""Marks of a case that needs a GPU."""

DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
"""Values of a parameter `device`."""

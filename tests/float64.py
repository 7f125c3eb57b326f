"""Networks in float64, for comparisons that must not depend on a CPU's rounding."""

from __future__ import annotations

from typing import Any


def in_float64(model: Any, entrance: str = "") -> Any:
    """The same network, computing in float64 from its part `entrance` on; changed in place.

    With random weights many boxes nearly tie in score or overlap, and many pixels in class. What float32 makes of such
    ties depends on how a CPU sums and on the batch; float64 leaves ties 2^29 times less room.
    """
    model.double().get_submodule(entrance).register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))
    return model

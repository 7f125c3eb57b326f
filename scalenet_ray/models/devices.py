"""Where networks compute: a device by the name that torch has for it, found on this machine or refused."""

from __future__ import annotations

import torch

from scalenet_ray.core.errors import UserError

__all__ = ["device_named", "device_on_this_machine"]


def device_named(name: str) -> torch.device:
    """A device that some machine may have.

    Raises:
        UserError: if torch knows none of that name.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        msg = f"device must be one that torch knows, such as cpu or cuda:0, got {name!r}"
        raise UserError(msg) from error


def device_on_this_machine(name: str) -> torch.device:
    """A device that this machine has.

    Raises:
        UserError: if torch knows none of that name, or finds none here.
    """
    device = device_named(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"device {name!r} was wanted, torch finds {torch.cuda.device_count()} CUDA devices: use device cpu"
        raise UserError(msg)
    if device.type not in ("cpu", "cuda", "meta"):
        try:
            torch.empty(1, device=device)
        except Exception as error:
            why = str(error).partition("\n")[0]
            msg = f"device {name!r} was wanted, torch cannot use it on this machine: {why}; use device cpu"
            raise UserError(msg) from error
    return device

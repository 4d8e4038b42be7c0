"""Where to compute: the device of a `--device` value."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """The torch device of a `--device` value; "auto" is the GPU where there is one.

    Raises:
        ValueError: not a device, or not available.
    """
    import torch

    found = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if found else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(f"device={name!r} but torch sees {found} CUDA devices: choose cpu or auto")
    return device

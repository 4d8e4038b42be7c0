"""The global random state, seen but not seeded: whether a function drew from it, and how to draw the same again."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import torch


class RandomState:
    """The state of Python's and of torch's global generators when this was made.

    Args:
        devices: accelerators to look at besides the CPU.
    """

    def __init__(self, devices: Collection[torch.device] = ()) -> None:
        self._devices = tuple(devices)
        self._state = self._read()

    def _read(self) -> tuple[Any, ...]:
        accelerators = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]
        return (random.getstate(), torch.get_rng_state(), *accelerators)

    def changed(self) -> bool:
        """Whether somebody has drawn from it, or seeded it."""
        (ours, *tensors), (python, *others) = self._state, self._read()
        return ours != python or any(not torch.equal(*pair) for pair in zip(tensors, others, strict=True))

    def restore(self) -> None:
        """Put it back."""
        python, cpu, *accelerators = self._state
        random.setstate(python)
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, accelerators, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

"""What software and hardware a run used, so that two results can be compared honestly."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

PACKAGES = ("burnish", "torch", "transformers", "safetensors", "tokenizers", "accelerate", "datasets", "numpy")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result, without importing them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def environment() -> dict[str, object]:
    """Versions, platform and device names of this process; JSON-ready.

    The device list is read from torch only when torch is loaded already: recording must not load it.
    """
    record: dict[str, object] = {
        "versions": package_versions(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        record["threads"] = torch.get_num_threads()
        record["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    return record

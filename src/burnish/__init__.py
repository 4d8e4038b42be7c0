"""burnish finishes trained models. Importing it is light: each door loads its room on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.align import align as align
    from burnish.densify import densify as densify
    from burnish.distill import distill as distill
    from burnish.evaluate import evaluate as evaluate
    from burnish.prune import prune as prune
    from burnish.tune import tune as tune

__version__ = "0.1.0"
__all__ = ["__version__", "align", "densify", "distill", "evaluate", "prune", "tune"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"burnish.{name}")
    raise AttributeError(f"module 'burnish' has no attribute {name!r}")

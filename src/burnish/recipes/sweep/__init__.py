"""The sweep: every way to densify a model over one set of statistics, measured, compared, and the best distilled."""

from burnish.doors import make_callable
from burnish.recipes.sweep.result import Row, SweepResult
from burnish.recipes.sweep.run import sweep

__all__ = ["Row", "SweepResult", "sweep"]

make_callable(__name__)

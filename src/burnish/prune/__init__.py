"""Dense to smaller dense: observe activations, keep the layers, channels, heads and neurons that matter, cut."""

from burnish.doors import make_callable
from burnish.prune.convert import PruneResult, prune
from burnish.prune.layout import Sizes
from burnish.prune.plan import LayerPlan, PrunePlan
from burnish.prune.statistics import ActivationStatistics, LayerStatistics

__all__ = ["ActivationStatistics", "LayerPlan", "LayerStatistics", "PrunePlan", "PruneResult", "Sizes", "prune"]

make_callable(__name__)

"""Mixture-of-Experts to dense: observe routers and experts, score, select, group, scale, concatenate."""

from burnish.densify.convert import DensifyResult, densify
from burnish.densify.plan import DensifyPlan, LayerPlan
from burnish.densify.statistics import LayerStatistics, RoutingStatistics
from burnish.doors import make_callable

__all__ = ["DensifyPlan", "DensifyResult", "LayerPlan", "LayerStatistics", "RoutingStatistics", "densify"]

make_callable(__name__)

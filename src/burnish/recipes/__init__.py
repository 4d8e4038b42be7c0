"""Chains of verbs: a YAML recipe in one run directory, and the sweep over ways to densify."""

from burnish.recipes.recipe import Recipe, Step, shipped
from burnish.recipes.run import RunResult, run_recipe

__all__ = ["Recipe", "RunResult", "Step", "run_recipe", "shipped"]

"""Chains of verbs: a YAML recipe in one run directory, and the sweep over ways to densify."""

"""Which family a checkpoint belongs to, and its config with every default filled in."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from burnish.errors import UnsupportedModelError
from burnish.families import deepseek_v2, gpt_oss, granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe
from burnish.families.family import Config, Family, num_experts

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        qwen3_moe.FAMILY,
        mixtral.FAMILY,
        qwen2_moe.FAMILY,
        olmoe.FAMILY,
        deepseek_v2.FAMILY,
        gpt_oss.FAMILY,
        granitemoe.FAMILY,
    )
}
READABLE_QUANTISATION = ("mxfp4",)


def resolve_config(raw: Config) -> dict[str, Any]:
    """The config as transformers understands it: class defaults filled in, old key names translated.

    Raises:
        UnsupportedModelError: transformers has no such `model_type`, or refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} is unknown to the installed transformers")
    settings = {key: value for key, value in raw.items() if key not in ("model_type", "quantization_config")}
    try:
        config: dict[str, Any] = CONFIG_MAPPING[model_type](**settings).to_dict()
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"config.json: not a valid {model_type} config: {_one_line(error)}") from error
    return config


def detect_family(raw: Config, family: Family | str | Path | None = None) -> Family:
    """The family of a checkpoint's raw config, or the one given.

    Args:
        raw: parsed `config.json`.
        family: a Family, or the path of a Python file that defines `FAMILY`, instead of a built-in one.

    Raises:
        UnsupportedModelError: dense already, quantised in a form that cannot be read, or of no known family.
    """
    chosen = load_family(family) if isinstance(family, str | Path) else family
    model_type = str(raw.get("model_type"))
    chosen = chosen or FAMILIES.get(model_type)
    if chosen is None:
        raise UnsupportedModelError(_unknown(raw, model_type))
    if chosen.model_type != model_type:
        raise UnsupportedModelError(
            f"config.json: model_type is {model_type!r}, but family {chosen.name} is {chosen.model_type!r}"
        )
    settings = raw.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if settings and method not in READABLE_QUANTISATION:
        raise UnsupportedModelError(
            f"config.json: the weights are quantised with {method or 'an unknown method'}, which cannot be read: give a"
            " checkpoint in bfloat16 or float16"
        )
    return chosen


def load_family(file: str | Path) -> Family:
    """The `FAMILY` that a Python file defines.

    Raises:
        UnsupportedModelError: no such file, it cannot be run, or it defines no Family of that name.
    """
    path = Path(file)
    name = f"burnish_family_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UnsupportedModelError(f"{file}: no Python file with a family")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UnsupportedModelError(f"{file}: cannot be run ({type(error).__name__}: {_one_line(error)})") from error
    family = getattr(module, "FAMILY", None)
    if not isinstance(family, Family):
        raise UnsupportedModelError(f"{file}: defines no FAMILY of type burnish.families.Family")
    return family


def _unknown(raw: Config, model_type: str) -> str:
    try:
        num_experts(raw)
    except KeyError:
        return f"model_type {model_type!r} has no experts in its config: it is dense, nothing to densify"
    supported = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
    nearest = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)[0]
    return (
        f"config.json: model_type {model_type!r} is not supported; nearest is {nearest!r}; supported: {supported};"
        " to add a family, see docs/families.md"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

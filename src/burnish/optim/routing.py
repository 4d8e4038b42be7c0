"""Which tensor goes to the matrix rule, which to the auxiliary rule, and why: decided by module, not by name or size.

The matrix rule orthogonalises updates, which makes sense for a tensor that maps vectors to vectors. An embedding looks
the same but is a table of vectors, and a head is the same table read backwards: shape and name cannot tell them apart,
the module that owns the tensor and the tying of its weight can.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Rule = Literal["matrix", "auxiliary"]
Layout = Literal["batch", "flatten"]
Patterns = str | Iterable[str]

RESERVED = ("params", "use_muon", "layout", "transposed", "splits", "reasons")
"""Keys of a parameter group that the routing itself decides."""

NORM = re.compile(r"Norm(\dd|Gated|PerHead)?$")
"""Class names of norms, of any library; looked up along the base classes."""

TRANSPOSED_STACKS = frozenset({"Llama4TextExperts"})
"""Expert stacks stored [experts, in, out] whose class does not say so by an attribute `is_transposed`."""

WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What torch.compile and activation checkpointing put between a module and its name."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Route:
    """Where one tensor goes and why.

    A tensor of the matrix rule is first flattened, then transposed, then split, where its route says so.

    Attributes:
        name: full name in the model, without the prefixes of wrappers; empty for a tensor given without one.
        parameter: the tensor; a `DTensor` stands for its whole.
        rule: "matrix" orthogonalises the update; "auxiliary" treats each number on its own.
        reason: of the decision, for people.
        layout: "batch": the leading dimensions stack matrices; "flatten": (first dimension, everything else).
        transposed: stored [in, out], not [out, in].
        splits: heights of row blocks [out] that are matrices of their own, such as fused q, k and v; empty for one.
    """

    name: str
    parameter: Tensor
    rule: Rule
    reason: str
    layout: Layout = "batch"
    transposed: bool = False
    splits: tuple[int, ...] = ()

    @property
    def treatment(self) -> str:
        """As what the matrix rule sees the tensor: `stack of 16, transposed`; `-` for the auxiliary rule."""
        if self.rule == "auxiliary":
            return "-"
        shape = self.parameter.shape
        parts = []
        if self.layout == "flatten" and len(shape) > 2:
            parts.append(f"flattened to {shape[0]} x {math.prod(shape[1:])}")
        elif len(shape) > 2:
            parts.append(f"stack of {math.prod(shape[:-2])}")
        if self.transposed:
            parts.append("transposed")
        if self.splits:
            parts.append(f"split {len(self.splits)}")
        return ", ".join(parts) or "matrix"


@dataclass(frozen=True, eq=False)
class Routing:
    """Every trainable tensor once, with its route; `print` it to see the table.

    Attributes:
        routes: in the order of the model.
        frozen: how many tensors do not require a gradient and are left out.
        note: what the caller should look at, or empty.
    """

    routes: tuple[Route, ...]
    frozen: int = 0
    note: str = ""

    def __len__(self) -> int:
        return len(self.routes)

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def __getitem__(self, index: int) -> Route:
        return self.routes[index]

    def param_groups(
        self, *, matrix: Mapping[str, Any] | None = None, auxiliary: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: one for each way of treating tensors, those of the matrix rule first.

        Args:
            matrix, auxiliary: more keys for the groups of a rule (`lr`, `weight_decay`).

        Returns:
            Dictionaries with `params` as (name, tensor) pairs, `use_muon`, `layout`, `transposed`, `splits`, and
            `reasons` in the order of `params`.

        Raises:
            ValueError: a key that the routing itself decides.

        Examples:
            >>> groups = split_parameters(nn.Linear(3, 2)).param_groups(matrix={"lr": 0.02}, auxiliary={"lr": 3e-4})
            >>> [(group["use_muon"], group["lr"], [name for name, _ in group["params"]]) for group in groups]
            [(True, 0.02, ['weight']), (False, 0.0003, ['bias'])]
        """
        extra = {"matrix": dict(matrix or {}), "auxiliary": dict(auxiliary or {})}
        for rule, keys in extra.items():
            if taken := [key for key in keys if key in RESERVED]:
                raise ValueError(f"{rule}={{{taken[0]!r}: ...}}: the routing decides this key; give other options")
        groups: dict[tuple[Any, ...], list[Route]] = {}
        for route in sorted(self.routes, key=lambda route: route.rule != "matrix"):
            groups.setdefault((route.rule, route.layout, route.transposed, route.splits), []).append(route)
        return [
            {
                **extra[rule],
                "params": [(route.name, route.parameter) if route.name else route.parameter for route in routes],
                "use_muon": rule == "matrix",
                "layout": layout,
                "transposed": transposed,
                "splits": splits,
                "reasons": [route.reason for route in routes],
            }
            for (rule, layout, transposed, splits), routes in groups.items()
        ]

    def __str__(self) -> str:
        """The table, with like tensors of many layers in one line, and how much goes to each rule."""
        rows = [("tensor", "shape", "rule", "as", "reason"), *_folded(self.routes)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        total = sum(route.parameter.numel() for route in self.routes)
        for rule in ("matrix", "auxiliary"):
            chosen = [route.parameter.numel() for route in self.routes if route.rule == rule]
            share = sum(chosen) / total if total else 0.0
            lines.append(f"{rule}: {_tensors_in_words(len(chosen))}, {sum(chosen):,} parameters ({share:.1%})")
        if self.frozen:
            lines.append(f"frozen: {_tensors_in_words(self.frozen)}, left out")
        return "\n".join([*lines, self.note] if self.note else lines)


def split_parameters(model: nn.Module, *, matrix: Patterns = (), auxiliary: Patterns = ()) -> Routing:
    """Route each trainable tensor of a model by the type of the module that owns it, and by tying.

    Linear layers, convolutions, recurrent and attention weights, expert stacks and LoRA factors go to the matrix rule;
    embeddings, output heads (and what is tied to them), norms, biases, depthwise kernels and parameters of no known
    layer go to the auxiliary rule. Compiled, checkpointed and data-parallel wrappers are looked through.

    Args:
        model: on any device, also meta; parameters may be `DTensor`s.
        matrix, auxiliary: full names of tensors, or patterns with `*`, that decide before anything else; any name of a
            shared tensor will do.

    Raises:
        ValueError: a pattern that matches nothing, a tensor that both name, a vector sent to the matrix rule, no
            trainable tensor, or parameters that a wrapper has flattened or not yet created.

    Source: which tensors: K. Jordan's Muon (hidden matrices; embeddings, heads and vectors to AdamW). Ours: by module
    type, convolution groups as row blocks, and everything unknown to the auxiliary rule.
    """
    tensors = _tensors(model)
    factors = _lora_factors(model)
    heads = _output_heads(model, factors)
    forced = _forced(tensors, "matrix", matrix)
    for key, pattern in _forced(tensors, "auxiliary", auxiliary).items():
        if key in forced:
            raise ValueError(
                f"{tensors[key].names[0]} is named by matrix={forced[key][1]!r} and by auxiliary={pattern[1]!r}: leave"
                " one out"
            )
        forced[key] = pattern
    routes, frozen = [], 0
    for key, tensor in tensors.items():
        if not tensor.parameter.requires_grad:
            frozen += 1
            continue
        way = _forced_way(tensor, *forced[key]) if key in forced else _way(tensor, heads, factors)
        routes.append(Route(tensor.names[0], tensor.parameter, *way))
    if not routes:
        raise ValueError(
            f"{_class_name(model)} has no trainable tensor ({frozen} are frozen): call requires_grad_() on what is to"
            " be trained"
        )
    return Routing(tuple(routes), frozen, "" if heads else _headless(model, routes, factors))


def route_tensors(named_tensors: Iterable[Tensor | tuple[str, Tensor]]) -> Routing:
    """Route tensors by their dimensions alone, where no model is known.

    Two dimensions are a matrix, three a stack of matrices (experts), four or more a kernel, flattened to (out, rest);
    fewer go to the auxiliary rule. An embedding or a head cannot be told from a matrix: prefer `split_parameters`.

    Args:
        named_tensors: (name, tensor) pairs, or tensors; those that require no gradient are counted and left out.

    Raises:
        ValueError: a tensor twice.
    """
    routes, frozen = [], 0
    seen: dict[int, str] = {}
    for index, item in enumerate(named_tensors):
        name, tensor = ("", item) if isinstance(item, Tensor) else item
        shown = name or f"tensor {index}"
        if id(tensor) in seen:
            raise ValueError(f"{shown} and {seen[id(tensor)]} are the same tensor: give it once")
        seen[id(tensor)] = shown
        if not tensor.requires_grad:
            frozen += 1
        elif tensor.ndim < 2:
            routes.append(Route(name, tensor, "auxiliary", _dimensions(tensor.ndim)))
        else:
            reason = f"{_dimensions(tensor.ndim)}; without the model, an embedding or a head is not recognised"
            routes.append(Route(name, tensor, "matrix", reason, "flatten" if tensor.ndim > 3 else "batch"))
    return Routing(tuple(routes), frozen)


def param_groups(
    model: nn.Module, *, matrix: Patterns = (), auxiliary: Patterns = (), show: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups of a model for an optimizer of this package; the table goes to the log at INFO.

    Args:
        model, matrix, auxiliary: as for `split_parameters`, which also says what is refused.
        show: print the table to stderr instead.

    Returns:
        As `Routing.param_groups`.
    """
    routing = split_parameters(model, matrix=matrix, auxiliary=auxiliary)
    if show:
        print(routing, file=sys.stderr)
    else:
        _log.info("%s", routing)
    return routing.param_groups()


@dataclass(frozen=True)
class _Tensor:
    """A parameter with all its names, and the modules that own it with their own name for it."""

    parameter: Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)


class _Way(NamedTuple):
    """A route without its tensor."""

    rule: Rule
    reason: str
    layout: Layout = "batch"
    transposed: bool = False
    splits: tuple[int, ...] = ()


def _tensors(model: nn.Module) -> dict[int, _Tensor]:
    tensors: dict[int, _Tensor] = {}
    for prefix, module in _walk(model, ""):
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"{prefix}{local} has no shape yet: run the model once before building the optimizer")
            if "_fsdp_wrapped_module." in prefix or hasattr(parameter, "ds_shape"):
                raise ValueError(
                    f"{prefix}{local} is flattened for sharding (FSDP1 or ZeRO-3), so that it is no matrix any more:"
                    " shard the model with fully_shard (FSDP2)"
                )
            tensor = tensors.setdefault(id(parameter), _Tensor(parameter))
            tensor.names.append(prefix + local)
            tensor.owners.append((module, local))
    return tensors


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules with the prefix of their parameters; shared ones under every name, wrappers without one."""
    yield prefix, module
    parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    for name, child in module._modules.items():
        if child is not None:
            hidden = name in WRAPPED or (parallel and name == "module")
            yield from _walk(child, prefix if hidden else f"{prefix}{name}.")


def _forced(tensors: Mapping[int, _Tensor], rule: Rule, patterns: Patterns) -> dict[int, tuple[Rule, str]]:
    """The tensors that patterns name, each with the rule and the pattern."""
    found: dict[int, tuple[Rule, str]] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matched = [key for key, tensor in tensors.items() if any(fnmatchcase(name, pattern) for name in tensor.names)]
        if not matched:
            names = [name for tensor in tensors.values() for name in tensor.names]
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise ValueError(f"{rule}={pattern!r} matches no parameter: the nearest names are {', '.join(near)}")
        for key in matched:
            found.setdefault(key, (rule, pattern))
    return found


def _forced_way(tensor: _Tensor, rule: Rule, pattern: str) -> _Way:
    reason = f"named by {rule}={pattern!r}"
    if rule == "auxiliary":
        return _Way(rule, reason)
    if tensor.parameter.ndim < 2:
        raise ValueError(
            f"{tensor.names[0]} has shape {list(tensor.parameter.shape)}, but {reason}: the matrix rule needs two"
            " dimensions or more"
        )
    if (way := _by_type(tensor)) is not None and way.rule == "matrix":
        return way._replace(reason=reason)
    kernel = tensor.parameter.ndim > 3 or any(isinstance(module, _ConvNd) for module, _ in tensor.owners)
    return _Way(rule, reason, "flatten" if kernel else "batch")


def _way(tensor: _Tensor, heads: Mapping[int, str], factors: Mapping[int, tuple[nn.Module, str]]) -> _Way:
    parameter, head = tensor.parameter, heads.get(id(tensor.parameter))
    if parameter.ndim < 2:
        return _Way("auxiliary", _vector(*tensor.owners[0], parameter))
    for module, _ in tensor.owners:
        if id(module) in factors:
            return _factor(tensor, *factors[id(module)])
    if any(_is_embedding(module) for module, _ in tensor.owners):
        return _Way("auxiliary", "embedding, tied to the output head" if head else "embedding")
    if head:
        return _Way("auxiliary", f"output head: {head}")
    return _by_type(tensor) or _Way("auxiliary", _unknown(*tensor.owners[0], parameter))


def _by_type(tensor: _Tensor) -> _Way | None:
    """What the first owner of a known type says."""
    ways = (_by_module(module, local, tensor.parameter) for module, local in tensor.owners)
    return next((way for way in ways if way is not None), None)


def _by_module(module: nn.Module, local: str, parameter: Tensor) -> _Way | None:
    """How a module of a known type uses one of its tensors of two dimensions or more; None for any other."""
    if _is_linear(module) and local == "weight":
        return _Way("matrix", "linear layer")
    if _is_conv1d_of_gpt2(module) and local == "weight":
        return _Way("matrix", "linear layer stored [in, out]", transposed=True)
    if isinstance(module, _ConvNd) and local == "weight":
        return _convolution(module, parameter)
    if isinstance(module, nn.MultiheadAttention):
        if local == "in_proj_weight":
            return _Way("matrix", "query, key and value in one tensor", splits=(module.embed_dim,) * 3)
        if local in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return _Way("matrix", "attention projection")
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and local.startswith(("weight_ih", "weight_hh")):
        gates = parameter.shape[0] // module.hidden_size
        return _Way("matrix", "recurrent layer", splits=(module.hidden_size,) * gates if gates > 1 else ())
    if isinstance(module, nn.RNNBase) and local.startswith("weight_hr"):
        return _Way("matrix", "recurrent layer, projection")
    if getattr(module, "num_experts", None) == parameter.shape[0]:
        return _expert_tensor(module, local, parameter)
    if _is_norm(module):
        return _Way("auxiliary", f"norm ({_class_name(module)})")
    return None


def _convolution(module: _ConvNd, parameter: Tensor) -> _Way:
    """Kernels as the map from a patch to channels; the backward map of it, stored [in, out], where transposed."""
    groups, transposed = module.groups, isinstance(module, _ConvTransposeNd)
    if groups > 1 and groups == module.in_channels:
        return _Way("auxiliary", "depthwise convolution: a kernel for each channel, no matrix")
    if groups > 1 and transposed:
        return _Way("auxiliary", "transposed convolution in groups: a matrix for each group, not in blocks of rows")
    if transposed:
        return _Way("matrix", "transposed convolution, stored [in, out]", "flatten", transposed=True)
    if groups > 1:
        # Groups see different inputs: a block-diagonal map, whose polar factor is that of each block.
        splits = (parameter.shape[0] // groups,) * groups
        return _Way("matrix", "convolution in groups: a matrix for each", "flatten", splits=splits)
    return _Way("matrix", "convolution", "flatten")


def _expert_tensor(module: nn.Module, local: str, parameter: Tensor) -> _Way | None:
    experts = parameter.shape[0]
    if parameter.ndim == 3 and 1 not in parameter.shape[1:]:
        known = any(base.__name__ in TRANSPOSED_STACKS for base in type(module).__mro__)
        transposed = bool(getattr(module, "is_transposed", known))
        where = " stored [in, out]" if transposed else ""
        return _Way("matrix", f"matrices of {experts} experts{where}", transposed=transposed)
    if parameter.ndim == 2 and local == "weight":
        return _Way("matrix", f"router, a linear map to {experts} experts")
    if parameter.numel() == experts * max(parameter.shape[1:]):
        return _Way("auxiliary", f"a vector for each of {experts} experts")
    return None


def _lora_factors(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Modules that hold LoRA factors, by id: the adapted layer and "A", "B" or "embedding"."""
    factors: dict[int, tuple[nn.Module, str]] = {}
    for layer in model.modules():
        parts = {side: layer._modules.get(f"lora_{side}") for side in ("A", "B")}
        if all(isinstance(part, nn.ModuleDict) for part in parts.values()):
            for side, part in parts.items():
                factors |= {id(module): (layer, side) for module in part.modules()} if part is not None else {}
        for side in ("A", "B"):
            if (part := layer._modules.get(f"lora_embedding_{side}")) is not None:
                factors[id(part)] = (layer, "embedding")
    return factors


def _factor(tensor: _Tensor, layer: nn.Module, side: str) -> _Way:
    if side == "embedding":
        return _Way("auxiliary", "LoRA factor of an embedding")
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:
        return _Way("auxiliary", f"LoRA factors of {experts} experts in one tensor: B interleaves their columns")
    rank = tensor.parameter.shape[0 if side == "A" else 1]
    way = _by_type(tensor)
    if way is None or way.rule == "auxiliary":
        return _Way("auxiliary", f"LoRA factor, rank {rank}, not stored as a matrix")
    return way._replace(reason=f"LoRA factor, rank {rank}: orthogonalised by itself")


def _output_heads(model: nn.Module, factors: Mapping[int, tuple[nn.Module, str]]) -> dict[int, str]:
    """Tensors of output heads, by id, with how each was recognised."""
    found: dict[int, str] = {}
    for module in model.modules():
        for method in ("get_output_embeddings", "get_classifier"):
            for head in _ask(module, method):
                found |= {id(weight): f"{method}()" for weight in head.parameters() if weight.ndim > 1}
        for weight, how in _heads_beside_the_body(module, factors):
            found.setdefault(id(weight), how)
    linears = _linears(model, factors)
    embeddings = [weight for module in model.modules() if _is_embedding(module) for weight in module.parameters()]
    tied = {id(weight) for weight in embeddings}
    found |= {id(linear.weight): "tied to an embedding" for linear in linears if id(linear.weight) in tied}
    if not found and embeddings and len(embeddings[0]) > 1:
        # The embedding of tokens is registered before that of positions. Where hidden layers are as wide as the
        # vocabulary, only the last layer can be the head, and only if it has the very shape of the embedding.
        shape = embeddings[0].shape
        wide = [linear.weight for linear in linears if _is_linear(linear) and linear.weight.shape[0] == shape[0]]
        if len(wide) == 1 or (wide and wide[-1] is linears[-1].weight and wide[-1].shape == shape):
            found[id(wide[-1])] = f"{shape[0]:,} outputs, as many as the embedding has rows"
    return found


def _ask(module: nn.Module, method: str) -> list[nn.Module]:
    """The heads that a module names by a method; none where it has no such method, or only a placeholder."""
    ask = getattr(module, method, None)
    try:
        head = ask() if callable(ask) else None
    except NotImplementedError:
        return []
    heads = head if isinstance(head, tuple | list) else [head]
    return [head for head in heads if isinstance(head, nn.Module)]


def _heads_beside_the_body(
    model: nn.Module, factors: Mapping[int, tuple[nn.Module, str]]
) -> Iterator[tuple[Tensor, str]]:
    """Heads of a transformers model with a task: in each part beside its body, the last layer, where it gives as many
    numbers as the configuration has labels or tokens. Where the body is not known, a part is a single layer."""
    prefix = getattr(type(model), "base_model_prefix", None)
    config = getattr(model, "config", None)
    if prefix is None:
        return
    body = model._modules.get(prefix)
    for child in model.children():
        for linear in _linears(child, factors)[-1:] if child is not body else ():
            if body is None and linear is not child:
                continue
            for option in ("num_labels", "vocab_size"):
                if linear.weight.shape[0] == getattr(config, option, None):
                    yield linear.weight, f"{linear.weight.shape[0]:,} outputs, as config.{option}"


def _headless(model: nn.Module, routes: Sequence[Route], factors: Mapping[int, tuple[nn.Module, str]]) -> str:
    """A line for the table where no head was recognised, naming the layer most likely to be one."""
    linears = _linears(model, factors)
    last = id(linears[-1].weight) if linears else None
    for route in routes:
        if id(route.parameter) == last and route.rule == "matrix":
            return (
                f"no output head was recognised: if {route.name} {list(route.parameter.shape)} is it, pass"
                f" auxiliary=[{route.name!r}]"
            )
    return ""


def _linears(model: nn.Module, factors: Mapping[int, tuple[nn.Module, str]]) -> list[Any]:
    """Linear layers and convolutions in the order of the model, without LoRA factors."""
    return [
        module
        for module in model.modules()
        if id(module) not in factors
        and (_is_linear(module) or isinstance(module, _ConvNd))
        and isinstance(module._parameters.get("weight"), Tensor)
    ]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    weight = module._parameters.get("weight")
    declared = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return weight is not None and tuple(weight.shape) == declared


def _is_conv1d_of_gpt2(module: nn.Module) -> bool:
    # Known by its place, so that transformers is not imported for models that do not need it.
    known = ("transformers.pytorch_utils", "Conv1D")
    return any((base.__module__, base.__name__) == known for base in type(module).__mro__)


def _is_embedding(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    weight = module._parameters.get("weight")
    declared = (getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None))
    return weight is not None and tuple(weight.shape) == declared


def _is_norm(module: nn.Module) -> bool:
    return any(NORM.search(base.__name__) for base in type(module).__mro__)


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # fully_shard puts it before the name


def _vector(module: nn.Module, local: str, parameter: Tensor) -> str:
    if _is_norm(module):
        return f"norm ({_class_name(module)})"
    return "bias" if "bias" in local else "vector" if parameter.ndim else "scalar"


def _unknown(module: nn.Module, local: str, parameter: Tensor) -> str:
    if parameter.numel() == max(parameter.shape):
        return "vector"
    return f"no known layer ({local} of {_class_name(module)}): name it in matrix=[...] to orthogonalise it"


def _tensors_in_words(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _dimensions(count: int) -> str:
    kinds = {0: "a scalar", 1: "a vector", 2: "a matrix", 3: "a stack of matrices"}
    return f"{count} dimension{'' if count == 1 else 's'}: {kinds.get(count, 'a kernel, flattened')}"


class _Cells(NamedTuple):
    """A row of the table without the name."""

    shape: str
    rule: str
    treatment: str
    reason: str


def _folded(routes: Sequence[Route]) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows of the table: tensors whose names differ in whole numbers only, and nothing else does, share one."""
    rows: dict[tuple[tuple[str | None, ...], _Cells], list[tuple[int, ...]]] = {}
    for index, route in enumerate(routes):
        parts = (route.name or f"tensor.{index}").split(".")
        pattern = tuple(None if part.isdecimal() else part for part in parts)
        cells = _Cells(str(list(route.parameter.shape)), route.rule, route.treatment, route.reason)
        rows.setdefault((pattern, cells), []).append(tuple(int(part) for part in parts if part.isdecimal()))
    for (pattern, cells), numbers in rows.items():
        columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        spans = iter([_spans(column) for column in columns])
        name = ".".join(next(spans) if part is None else part for part in pattern)
        if math.prod(len(column) for column in columns) != len(numbers):
            name += f" ({len(numbers)} of these)"
        yield (name, *cells)


def _spans(numbers: Sequence[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)

"""The sizes to prune to: given exactly, or found for a number of parameters."""

from __future__ import annotations

from fractions import Fraction

from burnish.prune.layout import DenseModel, Sizes


def exact_sizes(
    source: Sizes,
    *,
    layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Sizes:
    """The sizes asked for; what is left out stays as it is.

    Raises:
        ValueError: a size is out of range, or the heads cannot be shared out equally.
    """
    wanted = {
        "layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "heads": heads,
        "kv_heads": kv_heads,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    for name, value in given.items():
        if not 1 <= value <= getattr(source, name):
            raise ValueError(
                f"{name}={value}, but the model has {getattr(source, name)}: choose 1..{getattr(source, name)}"
            )
    target = source.model_copy(update=given)
    if target.heads % target.kv_heads:
        raise ValueError(
            f"heads={target.heads} cannot be shared by {target.kv_heads} key-value heads: choose a multiple, or other"
            " kv_heads"
        )
    if target.group > source.group:
        raise ValueError(
            f"heads={target.heads} for kv_heads={target.kv_heads} is {target.group} a group, but the model has"
            f" {source.group}: choose heads <= {source.group * target.kv_heads}"
        )
    return target


def sizes_for(model: DenseModel, parameters: int) -> Sizes:
    """Sizes of at most this many parameters (ours).

    All dimensions shrink by one common factor, each rounded to the nearest of its steps: whole layers, steps of
    channels and of neurons, whole query heads in each group (key-value heads stay, unless each query head has its own).
    The largest factor that fits, and for which transformers has such a model, is taken; the feed-forward is then
    widened by single steps to the largest count that fits.

    Raises:
        ValueError: more than the model has, or fewer than the smallest sizes have.
    """
    source = model.sizes
    if parameters > model.num_parameters():
        raise ValueError(f"parameters={parameters:,}, but the model has {model.num_parameters():,}: choose fewer")
    neurons = step_of(source.intermediate_size, largest=64, parts=64)
    channels = step_of(source.hidden_size, largest=256, parts=8)
    counts = {
        "layers": source.layers,
        "hidden": source.hidden_size // channels,
        "neurons": source.intermediate_size // neurons,
        "heads": source.group if source.group > 1 else source.heads,
    }

    def at(factor: Fraction) -> Sizes:
        scaled = {name: max(1, int(count * factor + Fraction(1, 2))) for name, count in counts.items()}
        kv_heads = source.kv_heads if source.group > 1 else scaled["heads"]
        return Sizes(
            layers=scaled["layers"],
            hidden_size=scaled["hidden"] * channels,
            intermediate_size=scaled["neurons"] * neurons,
            heads=kv_heads * scaled["heads"] if source.group > 1 else kv_heads,
            kv_heads=kv_heads,
        )

    # The sizes change only where a dimension rounds up to its next step.
    factors = {Fraction(2 * part - 1, 2 * count) for count in counts.values() for part in range(1, count + 1)}
    fitting = (at(factor) for factor in sorted(factors, reverse=True))
    found = next((s for s in fitting if model.num_parameters(s) <= parameters and model.refusal(s) is None), None)
    if found is None:
        smallest = at(Fraction(0))
        raise ValueError(
            f"parameters={parameters:,} cannot be reached: the smallest sizes ({smallest}) have"
            f" {model.num_parameters(smallest):,}"
        )
    wider = found.model_copy(update={"intermediate_size": found.intermediate_size + neurons})
    spare = parameters - model.num_parameters(found)
    steps = spare // (model.num_parameters(wider) - model.num_parameters(found))
    width = min(found.intermediate_size + steps * neurons, source.intermediate_size)
    return found.model_copy(update={"intermediate_size": width})


def step_of(size: int, *, largest: int, parts: int) -> int:
    """The largest power of two, up to `largest`, that divides `size` into at least `parts` steps; 1 if there is none.

    Examples:
        >>> step_of(5120, largest=256, parts=8), step_of(128, largest=256, parts=8), step_of(48, largest=64, parts=64)
        (256, 16, 1)
    """
    step = 1
    while 2 * step <= largest and size % (2 * step) == 0 and size // (2 * step) >= parts:
        step *= 2
    return step

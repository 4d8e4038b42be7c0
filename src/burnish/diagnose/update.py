"""What a step of an optimizer does to the parameters, whichever optimizer it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from burnish.diagnose.hessian import Parameters, chosen_tensors, flatten


def update_of(
    optimizer: Optimizer, params: Parameters, closure: Callable[[], Any] | None = None, *, restore: bool = True
) -> Tensor:
    """The new parameters less the old ones, of one real step with the gradients that are there.

    It holds all that the optimizer does: learning rate, momentum, orthogonalisation, weight decay. To look at a part of
    the parameters, such as the matrices that Muon orthogonalises, name that part in `params`.

    Args:
        optimizer: any.
        params: see `Parameters`; those that the optimizer does not hold have a zero update.
        closure: as for `optimizer.step`.
        restore: put parameters, gradients and the optimizer's state and options back, bit by bit; False takes the step.

    Returns:
        Tensor `[numel]`.

    Raises:
        ValueError: parameters as in `chosen_tensors`.

    Examples:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x.grad = torch.tensor([1.0, -1.0])
        >>> update_of(torch.optim.SGD([x], lr=0.5, momentum=0.9), [x])
        tensor([-0.5000,  0.5000])
        >>> x
        tensor([1., 2.], requires_grad=True)
    """
    tensors = chosen_tensors(params)
    old = flatten(tensors)
    if not restore:
        optimizer.step(closure)
        return flatten(tensors) - old
    with _restored(optimizer):
        optimizer.step(closure)
        return flatten(tensors) - old


@contextmanager
def _restored(optimizer: Optimizer) -> Iterator[None]:
    """After the block, all that the optimizer holds is as before, and the same tensors hold it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [(parameter.detach().clone(), parameter.grad, _copy(parameter.grad)) for parameter in parameters]
    # Groups share the dictionary's form with the state of a tensor; their tensors are the parameters, dealt with above.
    states = {parameter: _copy_all(state) for parameter, state in optimizer.state.items()}
    groups = [_copy_all(group) for group in optimizer.param_groups]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, (value, gradient, gradient_value) in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
                if gradient is not None:
                    gradient.copy_(gradient_value)
            for key in [key for key in optimizer.state if key not in states]:
                del optimizer.state[key]
            for key, state in states.items():
                _put_back(optimizer.state[key], state)
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                _put_back(group, options)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _copy_all(mapping: MutableMapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) for key, value in mapping.items() if key != "params"}


def _put_back(mapping: MutableMapping[str, Any], saved: dict[str, Any]) -> None:
    for key in [key for key in mapping if key not in saved and key != "params"]:
        del mapping[key]
    for key, value in saved.items():
        now = mapping.get(key)
        if isinstance(now, Tensor) and isinstance(value, Tensor) and now.shape == value.shape:
            now.copy_(value)
        else:
            mapping[key] = value

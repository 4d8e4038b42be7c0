"""Gradient and Hessian of a loss at a model's present parameters, as vectors over the chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from burnish.errors import BurnishError
from burnish.runs.randomness import random_state_kept

Loss = Callable[[], Tensor] | Iterable[Callable[[], Tensor]]
"""A function without arguments that gives a scalar, or several (one a micro-batch) whose mean is the loss."""

Parameters = nn.Module | Iterable[Tensor]
"""Tensors, in the order in which they are laid out in a vector; of a module, its parameters that require a gradient."""


def chosen_tensors(params: Parameters) -> list[Tensor]:
    """The tensors that `params` names.

    Raises:
        ValueError: there is none, one is there twice, is sharded, needs no gradient, or is neither float32 nor float64
            (rounding would drown the curvature), or they differ in type or device.
    """
    tensors = list(params.parameters() if isinstance(params, nn.Module) else params)
    if isinstance(params, nn.Module):
        tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not tensors:
        raise ValueError("params is empty: give a module or tensors that require a gradient")
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise ValueError("params holds a tensor twice: give each once")
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1 or tensors[0].dtype not in (torch.float32, torch.float64):
        seen = ", ".join(sorted({f"{dtype} on {device}" for dtype, device in kinds}))
        raise ValueError(f"params are {seen}: expected all float32 or all float64 on one device")
    for position, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise ValueError(f"tensor {position} of params does not require a gradient: leave it out")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"tensor {position} of params is sharded: measure before the model is sharded")
    return tensors


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Tensor `[numel]`: all of them one after the other."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector `[numel]` in the shapes of `like`.

    Raises:
        ValueError: the numbers of elements differ.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"vector has shape {list(vector.shape)}: expected [{sum(sizes)}], the size of params")
    return [part.view_as(tensor) for part, tensor in zip(torch.split(vector, sizes), like, strict=True)]


Gradients = Sequence[Tensor | None]


class Hessian:
    """The Hessian of a loss at the present parameters, as a function from a vector to its product.

    Make a new one after the parameters have moved. Each product is a backward pass through the gradient. The model is
    left as it was found: gradients, training mode, random state (dropout draws the same mask each time) and, if a
    module was given, its buffers. A single loss is evaluated once and its graph kept; of several, each is evaluated
    again for each product, so that one graph is in memory at a time.

    Args:
        loss: see `Loss`; micro-batches weigh the same.
        params: see `Parameters`.

    Attributes:
        tensors: the parameters.
        size: number of their elements.
        products: how many were computed.

    Raises:
        ValueError: parameters as in `chosen_tensors`, or the losses are an iterator, which could be read only once.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994), by double backward.
    """

    def __init__(self, loss: Loss, params: Parameters) -> None:
        self.tensors = chosen_tensors(params)
        self.size = sum(tensor.numel() for tensor in self.tensors)
        self.products = 0
        self._buffers = list(params.buffers()) if isinstance(params, nn.Module) else []
        if isinstance(loss, Iterator):
            raise ValueError("loss is an iterator, which can be read only once: give a list of functions")
        self._losses: Iterable[Callable[[], Tensor]] = (loss,) if callable(loss) else loss
        self._single = callable(loss)
        self._graph: Gradients | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector, Tensor `[numel]` of the parameters' type.

        Raises:
            BurnishError: it is not finite.
        """
        directions = unflatten(vector, self.tensors)
        total = self._mean(lambda loss: self._differentiate(self._with_graph(loss), directions))
        self.products += 1
        if not total.isfinite().all():
            raise BurnishError("the Hessian times a vector is not finite: is the loss finite at these parameters?")
        return total

    def gradient(self) -> Tensor:
        """The gradient of the loss, Tensor `[numel]`."""
        return self._mean(lambda loss: self._gradients(loss, create_graph=False))

    def _mean(self, part: Callable[[Callable[[], Tensor]], Gradients]) -> Tensor:
        """The mean of what is made of each loss; zero for a tensor that it makes nothing of."""
        total, count = torch.zeros_like(flatten(self.tensors)), 0
        for loss in self._losses:
            parts = zip(part(loss), self.tensors, strict=True)
            total += flatten(torch.zeros_like(tensor) if value is None else value for value, tensor in parts)
            count += 1
        if not count:
            raise ValueError("loss holds no function: give at least one")
        return total / count

    def _with_graph(self, loss: Callable[[], Tensor]) -> Gradients:
        if not self._single:
            return self._gradients(loss, create_graph=True)
        if self._graph is None:
            self._graph = self._gradients(loss, create_graph=True)
        return self._graph

    def _gradients(self, loss: Callable[[], Tensor], *, create_graph: bool) -> Gradients:
        """The gradients of one loss, perhaps with the graph to differentiate them again."""
        with _left_as_found(self._buffers), torch.enable_grad():
            value = loss()
            if value.numel() != 1 or not value.requires_grad:
                raise ValueError(
                    f"loss gives shape {list(value.shape)}, requires_grad={value.requires_grad}: expected a scalar that"
                    " depends on the parameters"
                )
            gradients = torch.autograd.grad(value.sum(), self.tensors, create_graph=create_graph, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError("the loss depends on none of params: give those of the model that it evaluates")
        return gradients

    def _differentiate(self, gradients: Gradients, directions: list[Tensor]) -> Gradients:
        """Derivative of <gradients, directions>; nothing where the loss is linear or does not depend on a tensor."""
        curved = [
            (gradient, direction)
            for gradient, direction in zip(gradients, directions, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not curved:
            return [None] * len(self.tensors)
        outputs, weights = zip(*curved, strict=True)
        with _left_as_found(self._buffers):
            return torch.autograd.grad(outputs, self.tensors, weights, retain_graph=self._single, allow_unused=True)


@contextmanager
def _left_as_found(buffers: list[Tensor]) -> Iterator[None]:
    """Random states and buffers survive; attention takes the one form that has a second derivative."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    with random_state_kept(), sdpa_kernel(SDPBackend.MATH):
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.data.copy_(value)  # `.data`, because a graph that holds the buffer would notice the write


def hessian_vector_product(loss: Loss, params: Parameters, vector: Tensor | Sequence[Tensor]) -> Tensor:
    """The Hessian of a loss times a vector.

    Args:
        loss: see `Loss`.
        params: see `Parameters`.
        vector: Tensor `[numel]`, or tensors in the shapes of the parameters.

    Returns:
        Tensor `[numel]`.

    Raises:
        ValueError: as `Hessian`.
        BurnishError: the product is not finite.

    Examples:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_vector_product(lambda: x[0] ** 2 * x[1], [x], torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """
    return Hessian(loss, params)(vector if isinstance(vector, Tensor) else flatten(vector))


def loss_gradient(loss: Loss, params: Parameters) -> Tensor:
    """The gradient of a loss, Tensor `[numel]`; `.grad` of the parameters is left alone."""
    return Hessian(loss, params).gradient()

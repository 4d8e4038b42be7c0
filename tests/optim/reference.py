"""Slow twins of the optimizers: the variables of the papers by name, float64, one matrix at a time, nothing in place.

Written from the papers and the released codes; nothing of burnish is imported. A twin holds the tensors of one group:
`step(gradients)` moves it (None: no gradient), `parameters` is where gradients are taken, `averaged` what is shipped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

KELLER_JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
SCHEMES = {"newton-schulz": (KELLER_JORDAN, 1.0), "gram": (KELLER_JORDAN, 1.0), "polar-express": (POLAR_EXPRESS, 1.02)}

SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda out, into: max(1, out / into) ** 0.5,
    "match_rms_adamw": lambda out, into: 0.2 * max(out, into) ** 0.5,
    "spectral": lambda out, into: (out / into) ** 0.5,
    "none": lambda out, into: 1.0,
}


def scalar_map(values: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """s -> a s + b s^3 + c s^5, for each (a, b, c) in turn."""
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def orthogonalized(matrix: Tensor, method: str = "newton-schulz", eps: float = 1e-7) -> Tensor:
    """Five steps of a method on [m, n], as what they do to the singular values."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if method == "svd":
        return u[:, s > 1e-12] @ vh[s > 1e-12]
    coefficients, margin = SCHEMES[method]
    norm = max(float(s.square().sum().sqrt()) * margin, eps)
    return u @ torch.diag(scalar_map(s / norm, coefficients)) @ vh


def matrices(
    tensor: Tensor, *, layout: str | None = None, transposed: bool = False, splits: Sequence[int] = (), heads: int = 0
) -> Iterator[Tensor]:
    """Views [out, in] of every matrix in a tensor that is orthogonalised on its own."""
    if layout == "flatten" or (layout is None and tensor.ndim > 3):
        tensor = tensor.reshape(len(tensor), -1)
    if tensor.ndim > 2:
        for part in tensor:
            yield from matrices(part, layout="batch", transposed=transposed, splits=splits, heads=heads)
        return
    matrix = tensor.T if transposed else tensor
    height = len(matrix)
    sizes = [height // heads] * heads if heads else list(splits) or [height]
    start = 0
    for size in sizes:
        yield matrix[start : start + size]
        start += size


class Momentum:
    """M_t = mu M + g ("accumulate") or mu M + (1 - mu) g ("ema"); Nesterov looks one step further."""

    def __init__(self, shape: torch.Size, momentum: float, nesterov: bool, form: str) -> None:
        self.mu, self.nesterov = momentum, nesterov
        self.gain = 1 - momentum if form == "ema" else 1.0
        self.buffer = torch.zeros(shape, dtype=torch.float64)

    def __call__(self, g: Tensor) -> Tensor:
        self.buffer = self.mu * self.buffer + self.gain * g
        return self.gain * g + self.mu * self.buffer if self.nesterov else self.buffer


class MatrixRule:
    """The scaled direction of one tensor: each matrix in it orthogonalised and multiplied by its own scale factor."""

    def __init__(self, shape: torch.Size, *, momentum: float = 0.95, nesterov: bool = True, form: str = "ema",
                 scale: str = "original", method: str = "newton-schulz", row_beta2: float | None = None,
                 **view: Any) -> None:  # fmt: skip
        self.momentum = Momentum(shape, momentum, nesterov, form)
        self.scale, self.method, self.view = SCALES[scale], method, view
        self.row_beta2, self.rows = row_beta2, {}

    def __call__(self, g: Tensor, t: int) -> Tensor:
        update = self.momentum(g).contiguous()
        out = torch.zeros_like(update)
        pairs = zip(matrices(update, **self.view), matrices(out, **self.view), strict=True)
        for index, (part, target) in enumerate(pairs):
            o = orthogonalized(part, self.method)
            if self.row_beta2 is not None:
                o = self.one_length(index, o)
            target.copy_(o * self.scale(*part.shape))
        return out

    def one_length(self, index: int, o: Tensor) -> Tensor:
        """NorMuon: V += (1 - b2)(mean_cols(O^2) - V); O / sqrt(V), brought back to the Frobenius norm of O."""
        before = self.rows.get(index, torch.zeros(len(o), 1, dtype=torch.float64))
        v = self.rows[index] = before + (1 - self.row_beta2) * ((o * o).mean(1, keepdim=True) - before)
        scaled = o / (v.sqrt() + 1e-10)
        return scaled * (o.norm() / (scaled.norm() + 1e-10))


class AdamRule:
    """g / (sqrt(v / (1 - b2^t)) + eps); without a first moment."""

    def __init__(self, shape: torch.Size, *, beta2: float = 0.999, eps: float = 1e-10) -> None:
        self.beta2, self.eps = beta2, eps
        self.v = torch.zeros(shape, dtype=torch.float64)

    def __call__(self, g: Tensor, t: int) -> Tensor:
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        return g / ((self.v / (1 - self.beta2**t)).sqrt() + self.eps)


class RectifiedRule(AdamRule):
    """As AdamRule, but the plain gradient while the rectification is not defined."""

    def __call__(self, g: Tensor, t: int) -> Tensor:
        direction = super().__call__(g, t)
        return direction if rectification_length(t, self.beta2) > 4 else g


class GradientRule:
    """The gradient itself."""

    def __init__(self, shape: torch.Size) -> None:
        pass

    def __call__(self, g: Tensor, t: int) -> Tensor:
        return g


def rectification_length(t: int, beta2: float) -> float:
    """rho_t = rho_inf - 2 t b2^t / (1 - b2^t)."""
    return 2 / (1 - beta2) - 1 - 2 * t * beta2**t / (1 - beta2**t)


def rectification(t: int, beta2: float) -> float:
    """The factor of lr, zero while rho_t <= 4."""
    rho, longest = rectification_length(t, beta2), 2 / (1 - beta2) - 1
    if rho <= 4:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))


class MuonTwin:
    """W <- (1 - eta lambda) W - eta O, with lambda only where W and O agree in sign if cautious."""

    def __init__(self, tensors: Sequence[Tensor], *, lr: float, weight_decay: float = 0.1, cautious: bool = False,
                 **rule: Any) -> None:  # fmt: skip
        self.parameters = [tensor.double().clone() for tensor in tensors]
        self.lr, self.weight_decay, self.cautious = lr, weight_decay, cautious
        self.rules = [MatrixRule(tensor.shape, **rule) for tensor in tensors]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for index, g in enumerate(gradients):
            if g is not None:
                w, o = self.parameters[index], self.rules[index](g, 0)
                where = (w.sign() == o.sign()).double() if self.cautious else 1.0
                self.parameters[index] = w - self.lr * self.weight_decay * w * where - self.lr * o


class AdamWTwin:
    """Decoupled weight decay, both moments corrected; a step counter for each tensor."""

    def __init__(self, tensors: Sequence[Tensor], *, lr: float, weight_decay: float, betas: tuple[float, float],
                 eps: float) -> None:  # fmt: skip
        self.parameters = [tensor.double().clone() for tensor in tensors]
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.t = [0] * len(tensors)
        self.m, self.v = ([torch.zeros_like(w) for w in self.parameters] for _ in range(2))

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        (b1, b2), m, v = self.betas, self.m, self.v
        for i, g in enumerate(gradients):
            if g is None:
                continue
            self.t[i] += 1
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            direction = m[i] / (1 - b1 ** self.t[i]) / ((v[i] / (1 - b2 ** self.t[i])).sqrt() + self.eps)
            self.parameters[i] = (1 - self.lr * self.weight_decay) * self.parameters[i] - self.lr * direction


class SGDTwin:
    """Heavy ball or Nesterov with decoupled weight decay."""

    def __init__(self, tensors: Sequence[Tensor], *, lr: float, weight_decay: float, momentum: float,
                 nesterov: bool) -> None:  # fmt: skip
        self.parameters = [tensor.double().clone() for tensor in tensors]
        self.lr, self.weight_decay = lr, weight_decay
        self.momenta = [Momentum(tensor.shape, momentum, nesterov, "accumulate") for tensor in tensors]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for i, g in enumerate(gradients):
            if g is not None:
                decayed = (1 - self.lr * self.weight_decay) * self.parameters[i]
                self.parameters[i] = decayed - self.lr * self.momenta[i](g)


class ScheduleFreeTwin:
    """X, Y and Z by name. t counts from 1; w_t = t^r (largest eta so far)^p; c_t = w_t / W_t.

    Z_{t+1} = (1 - eta lambda_z)(Z_t - eta lambda_y Y_t) - eta d(Y_t)
    X_{t+1} = (1 - c) X_t + c Z_{t+1};  Y_{t+1} = (1 - beta) Z_{t+1} + beta X_{t+1}
    """

    def __init__(self, tensors: Sequence[Tensor], rules: Sequence[Callable[[Tensor, int], Tensor]], *, lr: float,
                 beta: float, warmup_steps: int = 0, decay_z: float = 0.0, decay_y: float = 0.0, r: float = 0.0,
                 power: float = 2.0) -> None:  # fmt: skip
        self.rules, self.lr, self.beta, self.warmup_steps = list(rules), lr, beta, warmup_steps
        self.decay_z, self.decay_y, self.r, self.power = decay_z, decay_y, r, power
        self.X, self.Y, self.Z = ([tensor.double().clone() for tensor in tensors] for _ in range(3))
        self.t, self.W, self.eta_max, self.c = 0, 0.0, 0.0, 0.0

    @property
    def parameters(self) -> list[Tensor]:
        return self.Y

    @property
    def averaged(self) -> list[Tensor]:
        return self.X

    def eta(self) -> float:
        return self.lr * min(1.0, self.t / self.warmup_steps) if self.warmup_steps else self.lr

    def weight(self, eta: float) -> float:
        self.eta_max = max(self.eta_max, eta)
        return self.t**self.r * self.eta_max**self.power

    def next_beta(self) -> float:
        return self.beta

    def recover(self, i: int, beta: float) -> Tensor:
        """X before the step."""
        return self.X[i]

    def rest(self, i: int, beta: float) -> None:
        """A tensor without a gradient: X and Z stay."""
        self.Y[i] = (1 - beta) * self.Z[i] + beta * self.X[i]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        self.t += 1
        eta = self.eta()
        w = self.weight(eta)
        self.W += w
        self.c = w / self.W if self.W else 0.0
        self.beta = beta = self.next_beta()
        for i, g in enumerate(gradients):
            if g is None:
                self.rest(i, beta)
                continue
            x, z = self.recover(i, beta), self.Z[i] - eta * self.decay_y * self.Y[i]
            self.Z[i] = (1 - eta * self.decay_z) * z - eta * self.rules[i](g, self.t)
            self.X[i] = (1 - self.c) * x + self.c * self.Z[i]
            self.Y[i] = (1 - beta) * self.Z[i] + beta * self.X[i]


class RectifiedTwin(ScheduleFreeTwin):
    """The rectification takes the place of warmup, in the average's weights as well."""

    def __init__(self, *args: Any, beta2: float, silent: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.beta2, self.silent = beta2, silent

    def eta(self) -> float:
        if rectification_length(self.t, self.beta2) <= 4:
            return 0.0 if self.silent else self.lr
        return self.lr * rectification(self.t, self.beta2)


class AmuseTwin(ScheduleFreeTwin):
    """beta_t grows after T_0 = warmup_steps; weights follow eta down as well as up.

    "official": X is recovered from Y with the new beta, though Y was built with the one before, and a tensor without a
    gradient is not touched at all.
    """

    def __init__(self, *args: Any, rho: float, interpolation: str = "exact", averaging: str = "weighted",
                 beta_schedule: str = "weights", **options: Any) -> None:  # fmt: skip
        super().__init__(*args, **options)
        self.beta1, self.rho, self.official = self.beta, rho, interpolation == "official"
        self.uniform, self.by_steps, self.c0 = averaging == "uniform", beta_schedule == "steps", math.nan

    def weight(self, eta: float) -> float:
        if self.uniform:  # c_t = 1 / (t + 1)
            self.W = float(self.t)
            return 1.0
        return self.t**self.r * eta**self.power

    def next_beta(self) -> float:
        t, t0, c = self.t, self.warmup_steps, self.c
        if t == t0:
            self.c0 = c
        if t <= t0:
            return self.beta1
        shrink = (t0 - 1) / (t - 1) if self.by_steps else c * (1 - self.c0) / (self.c0 * (1 - c))
        return 1 - shrink**self.rho * (1 - self.beta1)

    @property
    def averaged(self) -> list[Tensor]:
        if self.official:
            return [self.recover(i, self.beta) for i in range(len(self.X))]
        return self.X

    def recover(self, i: int, beta: float) -> Tensor:
        return self.Z[i] + (self.Y[i] - self.Z[i]) / beta if self.official else self.X[i]

    def rest(self, i: int, beta: float) -> None:
        if not self.official:
            super().rest(i, beta)


def gradient(y: Tensor, t: int, index: int) -> Tensor:
    """Of a quadratic with unequal curvatures, with noise: it depends on where it is taken."""
    noise = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * t + index))
    return torch.linspace(0.2, 2.0, y.numel(), dtype=torch.float64).view(y.shape) * (y - 0.3) + 0.5 * noise


def rests(t: int, number: int, index: int) -> bool:
    """No gradient: for the second tensor of each group at the first step and twice later, for all of group 1 once."""
    return (index == 1 and t in (1, 3, 8, 9)) or (number == 1 and t == 7)


def lockstep(
    twins: Sequence[Any],
    build: Callable[[list[list[Tensor]]], torch.optim.Optimizer],
    *,
    steps: int = 14,
    resume: Sequence[int] = (),
    tolerance: float = 1e-12,
    before: Callable[[torch.optim.Optimizer, int], None] = lambda optimizer, t: None,
    sign: float = 1.0,
) -> torch.optim.Optimizer:
    """Step an optimizer beside its twins, one for each group, and compare after every step, also the averages.

    Args:
        twins: moved here.
        build: the optimizer, from a list of float64 parameters for each group.
        steps: how many.
        resume: after these steps, go on with a new optimizer from the saved state: at an odd one from training mode, at
            an even one from averaged mode.
        tolerance: largest difference, relative to the largest entry of a tensor.
        before: called before each step.
        sign: of the gradients that the optimizer gets.
    """

    def compare(what: str, twin_values: Callable[[Any], list[Tensor]]) -> None:
        for number, (tensors, twin) in enumerate(zip(parameters, twins, strict=True)):
            for index, (mine, theirs) in enumerate(zip(tensors, twin_values(twin), strict=True)):
                error = (mine.detach() - theirs).abs().max() / theirs.abs().max()
                assert error <= tolerance, f"{what} {index} of group {number} after step {t}: {error:.2e}"

    def resumed(mode: str) -> tuple[list[list[Tensor]], torch.optim.Optimizer]:
        fresh = [[torch.nn.Parameter(p.detach().clone()) for p in tensors] for tensors in parameters]
        other = build(fresh)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert {group.get("mode", mode) for group in other.param_groups} == {mode}
        return fresh, other

    parameters: list[list[Tensor]] = [[torch.nn.Parameter(w.clone()) for w in twin.parameters] for twin in twins]
    optimizer = build(parameters)
    for t in range(1, steps + 1):
        for number, (tensors, twin) in enumerate(zip(parameters, twins, strict=True)):
            gradients = [
                None if rests(t, number, index) else gradient(w, t, index) for index, w in enumerate(twin.parameters)
            ]
            for index, parameter in enumerate(tensors):
                resting = rests(t, number, index)
                parameter.grad = None if resting else sign * gradient(parameter.detach(), t, index)
            twin.step(gradients)
        before(optimizer, t)
        optimizer.step()
        compare("parameter", lambda twin: twin.parameters)
        if not hasattr(optimizer, "averaged"):
            parameters, optimizer = resumed("") if t in resume else (parameters, optimizer)
            continue
        with optimizer.averaged():
            compare("average", lambda twin: twin.averaged)
            fresh = resumed("averaged") if t in resume and t % 2 == 0 else None
        if fresh is not None:
            parameters, optimizer = fresh
            compare("average", lambda twin: twin.averaged)
            optimizer.train()
        elif t in resume:
            parameters, optimizer = resumed("training")
        compare("parameter", lambda twin: twin.parameters)
    return optimizer


def tensors(*shapes: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Random float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), dtype=torch.float64, generator=generator) for shape in shapes]

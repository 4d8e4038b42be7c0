"""How long a step of the matrix rule is: the factor that multiplies lr for a matrix of a shape.

An orthogonal m x n matrix of full rank has entries of root mean square 1/sqrt(max(m, n)), whatever the gradient was.
Each rule turns that into a length that carries over between shapes. To move a learning rate between rules, multiply it
by the ratio of their factors: for a square matrix of width d, lr under "match_rms_adamw" is lr under "original" divided
by 0.2 sqrt(d).
"""

from __future__ import annotations

import math
from collections.abc import Callable

SCALES: dict[str, Callable[[int, int], float]] = {
    # Muon and torch.optim.Muon: a wide matrix is left alone, a tall one gets the spectral factor.
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    # Moonlight (arXiv 2502.16982) and AMUSE: entries of RMS 0.2, as AdamW's, so that AdamW's lr and decay carry over.
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    # Dion's "spectral_norm": sqrt(fan_out / fan_in), so that the change of the output does not depend on the width.
    "spectral": lambda rows, cols: math.sqrt(rows / cols),
    # The polar factor itself: every singular value of the step is lr.
    "none": lambda rows, cols: 1.0,
}


def scale_factor(rule: str, rows: int, cols: int) -> float:
    """What lr is multiplied by for a matrix that maps `cols` numbers to `rows` numbers.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in SCALES:
        raise ValueError(f"scale={rule!r} is unknown: choose one of {', '.join(SCALES)}")
    return SCALES[rule](max(rows, 1), max(cols, 1))

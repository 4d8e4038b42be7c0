"""Numbers as people write them."""

from __future__ import annotations

import re

FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: int | str, name: str) -> int:
    """A whole number of tokens or parameters: `4B`, `1.5M`, `300k`, `1_000`, or an int.

    Args:
        value: what the user typed.
        name: of the option, for the error.

    Raises:
        ValueError: not a positive number.

    Examples:
        >>> parse_count("1.5M", "tokens")
        1500000
    """
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kKMBT]?)\s*", str(value))
    count = round(float(match[1].replace("_", "")) * FACTORS[match[2].upper()]) if match else 0
    if count < 1:
        raise ValueError(f"{name}={value!r}: write a positive number, such as 300M, 4B or 1000000")
    return count

"""Any page that burnish makes: the templates, their filters, and the writing of the page, whole or not at all."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from burnish.errors import OutputError
from burnish.report import figures
from burnish.report.records import Estimate
from burnish.runs.resources import write_text


def fill(template: str, **values: Any) -> str:
    """The HTML of a template: self-contained, no script, nothing fetched; the same values give the same bytes.

    Args:
        template: a file of this package that extends `base.html.j2` and fills its blocks `title`, `brand` (spans beside
            the name), `heading`, `how` (one line under the heading), `style` (rules of its own) and `main`. It may
            import the macros of `parts.html.j2`; the numbers of `figures` are filters.
        values: what the template names.
    """
    return _environment().get_template(template).render(values)


def write_page(page: Path, html: str, *, overwrite: bool = False) -> Path:
    """Write a page, whole or not at all, and return its path.

    Raises:
        OutputError: it exists and `overwrite` is false, or it cannot be written.
    """
    refuse_existing_page(page, overwrite=overwrite)
    try:
        write_text(page, html)
    except OSError as error:
        raise OutputError(f"{page} cannot be written: {error.strerror}") from None
    return page


def refuse_existing_page(page: Path, *, overwrite: bool) -> None:
    """Raise OutputError when the page exists and may not be replaced: to be called before the work starts."""
    if page.exists() and not overwrite:
        raise OutputError(f"{page} exists: choose another name, or pass --overwrite")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("burnish.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = ("count", "size", "duration", "number", "ratio")
    environment.filters |= {name: getattr(figures, name) for name in numbers}
    environment.filters |= {"plain": plain, "short": short, "estimate": estimate, "difference": difference}
    return environment


def short(name: str) -> str:
    """A model or data set as a reader knows it: not where on a disk it lay."""
    return Path(name).name if Path(name).is_absolute() else name


def plain(value: Any) -> str:
    """An option's value in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(plain(item) for item in value) if isinstance(value, list) else str(value)


def estimate(measured: Estimate, factor: float = 1.0) -> str:
    """A measured value, times a factor, with its standard error."""
    if measured.value is None:
        return "not finite"
    error = measured.standard_error
    return figures.with_error(factor * measured.value, None if error is None else factor * error)


def difference(measured: Estimate) -> str:
    """A measured difference with its sign and its standard error."""
    text = estimate(measured)
    return f"+{text}" if measured.value is not None and measured.value > 0 else text

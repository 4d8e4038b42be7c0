"""One self-contained HTML page from a run directory: what was done, what was kept, what it cost."""

from burnish.report.document import fill, write_page
from burnish.report.page import render, write_report
from burnish.report.records import Run, read_run

__all__ = ["Run", "fill", "read_run", "render", "write_page", "write_report"]

"""One self-contained HTML page from a run directory: what was done, what was kept, what it cost."""

from burnish.report.page import Run, read_run, render, write_report

__all__ = ["Run", "read_run", "render", "write_report"]

"""Run records, progress and resources: what was asked, what was used, what it cost."""

from burnish.runs.device import choose_device
from burnish.runs.environment import environment
from burnish.runs.progress import Progress
from burnish.runs.resources import peak_rss_bytes, return_freed_memory, write_json

__all__ = ["Progress", "choose_device", "environment", "peak_rss_bytes", "return_freed_memory", "write_json"]

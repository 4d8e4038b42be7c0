"""The model card of a checkpoint: what of it any descendant keeps."""

from __future__ import annotations

from burnish.checkpoint.source import Checkpoint


def front_matter(source: Checkpoint) -> dict[str, str]:
    """Keys of a checkpoint's own card that hold for what is made of it, such as its licence."""
    card = source.path / "README.md"
    return front_matter_of(card.read_text(encoding="utf-8", errors="replace")) if card.exists() else {}


def front_matter_of(card: str) -> dict[str, str]:
    """Licence and language lines of an existing card's front matter (one-line values only)."""
    kept = {}
    if card.startswith("---\n"):
        for line in card[4:].partition("\n---")[0].splitlines():
            key, separator, value = line.partition(":")
            if separator and key in ("license", "license_name", "license_link", "language", "pipeline_tag") and value:
                kept[key] = value.strip()
    return kept

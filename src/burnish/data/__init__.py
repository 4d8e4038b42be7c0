"""Text in, token blocks out: the data that calibration and evaluation run on."""

from burnish.data.text import Text, TokenBlocks, bundled_model, bundled_text, load_texts, token_blocks

__all__ = ["Text", "TokenBlocks", "bundled_model", "bundled_text", "load_texts", "token_blocks"]

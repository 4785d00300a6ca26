"""Files of the bundled model: today its tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_DIR = Path(__file__).parent / "tokenizer"
"""Folder in the format of transformers: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""

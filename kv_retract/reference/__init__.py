"""What is bundled: the reference model, its learned erasers and landmarks, and the tokenizer of the random models."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_DIR = Path(__file__).parent / "tokenizer"
"""Folder in the format of transformers: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""

MODEL_DIR = Path(__file__).parent / "model"
"""Weights and configuration of the reference model, and a tokenizer of 2048 entries counted in the corpus it is trained
on: names and short values are single tokens or two."""

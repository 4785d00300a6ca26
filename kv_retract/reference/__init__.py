"""Bundled tokenizers: of the random models, and of the small models that are trained on the corpus."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_DIR = Path(__file__).parent / "tokenizer"
"""Folder in the format of transformers: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""

CORPUS_TOKENIZER_DIR = Path(__file__).parent / "corpus_tokenizer"
"""The same, with 2048 entries counted in the corpus: names and short values are single tokens or two."""

"""The learned eraser: KVEraser (arXiv 2606.17034) and two variants of it. `config` says what it is, `eraser` uses it.

Importing this package needs no torch; the networks are in `model`.
"""

from .config import VARIANTS, KVEraserConfig
from .eraser import KVEraserEraser

__all__ = ["VARIANTS", "KVEraserConfig", "KVEraserEraser"]

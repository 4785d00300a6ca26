"""What moves, rotates and maps cached keys and values where they lie: torch for every device, Triton for CUDA.

Start with `base`. `kernels_for` says which ones a device gets.
"""

from .base import HeadMap, Kernels, PagedKV
from .choice import kernels_for

__all__ = ["HeadMap", "Kernels", "PagedKV", "kernels_for"]

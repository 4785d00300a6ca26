"""KV cache: a pool of pages, a prefix index over them, and the manager that joins the two.

Import from the modules: `base` (contracts) and `keys` (tombstones) need no torch; `pool` and `manager` do.
"""

"""Run by the SGLang environment's Python: the radix cache beside SGLang's own under the same operations.

After each one, both have to give the same results and sizes, SGLang's own checks have to pass, and the nodes that the
cache remembers have to be those of the tree. Fixtures are those that SGLang ships for its tests. Prints `OK`, counts.
"""

import random
import sys
import types
from array import array
from dataclasses import replace

NAMESPACES = [(None, None), ("t1", None), ("t1", "salt"), ("t2", None)]
SEEDS, STEPS = 12, 200


def without_inspection():
    """Make the kit use the Rust core as servers do: what inspects it is not in the wheel."""
    from sglang.srt.mem_cache.unified_cache.tree_core_registry import _TREE_CORE_REGISTRY
    from sglang.test.kits.unified_radix_cache import fixtures

    module, core = types.ModuleType("inspector"), _TREE_CORE_REGISTRY["rust"]
    module.RustUnifiedTreeCoreInspector = lambda params: core(params, None)
    sys.modules["sglang.test.kits.unified_radix_cache.rust_unified_tree_core_inspector"] = module
    fixtures.UnifiedTreeCoreInspectionInterface = object


class Side:
    """One cache, with what it holds."""

    def __init__(self, kind, config):
        from sglang.test.kits.unified_radix_cache import fixtures
        from sglang.test.kits.unified_radix_cache.mixins import UnifiedRadixCacheFixtures

        fixtures.UnifiedRadixCache = kind
        self.cache, self.allocator, self.pool = fixtures.build_fixture(config)
        assert type(self.cache) is kind
        self.requests, self.locks = UnifiedRadixCacheFixtures(), []
        self.requests.cfg = config

    def run(self, name, key, number, lock):
        """Do one operation; return what comes of it."""
        ids = list(key.token_ids)
        do = {
            "insert": lambda: self.insert(key, number % 3),
            "match": lambda: self.match(key, lock=lock),
            "touch": lambda: self.cache.touch_prefix(key),
            "unlock": lambda: self.unlock(number),
            "request": lambda: self.run_request(ids, (key.extra_key, key.cache_salt), min(len(ids), 1 + number)),
            "evict": lambda: self.evict(number),
            "reset": self.reset,
        }
        return do[name]()

    def insert(self, key, priority):
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams

        size = len(key.token_ids)
        slots = self.allocator.alloc(size)
        if slots is None:
            self.cache.evict(EvictParams(num_tokens=size))
            slots = self.allocator.alloc(size)
        if slots is None:
            return "full"
        return self.cache.insert(InsertParams(key=key, value=slots, priority=priority)).prefix_len

    def match(self, key, *, lock):
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        if lock and not self.cache.tree_core.is_root(found.last_device_node):
            self.locks.append(self.cache.lock(found.last_device_node))
        return found.device_prefix_len

    def run_request(self, ids, namespace, split):
        """Run a request in two chunks."""
        from sglang.test.mem_cache_utils import finish_req

        request, _ = self.requests._make_inflight_req(self.cache, self.allocator, self.pool, ids[:split], ids[split:])
        request.extra_key, request.cache_salt = namespace
        if split > 1:
            self.cache.checkpoint(request, up_to=split // 2)
        finish_req(self.cache, request, len(ids))
        self.pool.free(request)
        return request.kv.cache_protected_len

    def unlock(self, number):
        if self.locks:
            self.cache.unlock(self.locks.pop(number % len(self.locks)))

    def evict(self, count):
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        return self.cache.evict(EvictParams(num_tokens=count))

    def reset(self):
        while self.locks:
            self.unlock(0)
        self.cache.reset()
        self.allocator.clear()

    def sizes(self):
        cache = self.cache
        cache.sanity_check()
        return self.allocator.available_size(), cache.full_evictable_size(), cache.full_protected_size()


def check_nodes(cache):
    """The cache remembers each node of the tree, in one namespace."""
    known = {node for nodes in cache._nodes.values() for node in nodes}
    assert known == cache._home.keys() and all(cache._nodes.values())
    paths = cache.tree_core.collect_path_info(list(known))
    total = sum(path[-1].path_end - path[-1].path_start for path in paths)
    assert total == cache.full_evictable_size() + cache.full_protected_size()
    for namespace, nodes in cache._nodes.items():
        assert {node.node_id for node in cache.nodes_of(namespace)} == nodes.keys()


def fuzz(seed, config):
    """Return how often each operation was done."""
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from kv_retract.integrations.sglang.cache import RetractableRadixCache

    sides = [Side(kind, config) for kind in (UnifiedRadixCache, RetractableRadixCache)]
    rng, known, counts = random.Random(seed), [], {}
    for step in range(STEPS):
        namespace, ids = rng.choice(NAMESPACES), [rng.randrange(5) for _ in range(rng.randrange(1, 15))]
        if known and rng.random() < 0.7:
            before, namespace = rng.choice(known)
            ids = before[: rng.randrange(1, len(before) + 1)] + ids[: rng.randrange(len(ids) + 1)]
        key, number, lock = (
            RadixKey(array("q", ids), namespace[0], cache_salt=namespace[1]),
            rng.randrange(40),
            rng.random() < 0.4,
        )
        name = rng.choices(
            ("insert", "match", "touch", "unlock", "request", "evict", "reset"), weights=(35, 20, 10, 10, 10, 14, 1)
        )[0]
        if name == "request" and sides[0].allocator.available_size() <= len(ids) + 5:
            name = "evict"
        told = [(side.run(name, key, number, lock), side.sizes()) for side in sides]
        assert told[0] == told[1], (seed, step, name, told)
        check_nodes(sides[1].cache)
        counts[name] = counts.get(name, 0) + 1
        known = [] if name == "reset" else [*known, (ids, namespace)] if name in ("insert", "request") else known
    return counts


def main(core) -> None:
    """Fuzz with a tree core, `rust` or `python`, and each way of evicting."""
    from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
    from sglang.test.kits.unified_radix_cache import fixtures
    from sglang.test.kits.unified_radix_cache.config import CacheConfig

    fixtures.TREE_CORE_TEST_BACKEND, fixtures.get_device = core, lambda *args, **kwargs: "cpu"
    if core == "rust":
        without_inspection()
    config, total = CacheConfig(page_size=1, components=(ComponentType.FULL,), kv_size=200), {}
    for seed in range(SEEDS):
        for name, count in fuzz(seed, replace(config, eviction_policy=("lru", "priority", "lfu")[seed % 3])).items():
            total[name] = total.get(name, 0) + count
    print("OK", total)


if __name__ == "__main__":
    main(sys.argv[1])

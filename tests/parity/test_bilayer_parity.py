"""The bi-layer engine equals a slow twin: plain transformers, no pool, no index, every state computed anew."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from kv_retract.cache.keys import build_key
from kv_retract.cache.refill import PlainPooling
from kv_retract.engine.bilayer import BiLayer, BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.kernels.rope import rotate_keys
from kv_retract.landmarks import PooledLandmarks
from kv_retract.landmarks.net import LandmarkNet
from kv_retract.testing.models import tiny_model

SETTINGS = BiLayer(
    window=16,
    ratio=4,
    overlap=3,
    local=40,
    sinks=2,
    queries=8,
    refill=12,
    landmark_positions=12,
    max_tokens=320,
    rounds=2,
)


class Twin:
    """Follows `BiLayer` and the papers by the letter; a state is a token's K without rotation, and its V."""

    def __init__(self, model, rotary, s, net):
        self.model, self.rotary, self.s, self.net = model, rotary, s, net
        self.gap = 1.0  # the least by which one block won over the next: rounding decides where it is next to nothing
        self.local_at = s.sinks + s.landmark_positions + s.refill + s.overlap

    def run(self, past, ids, positions, seen, gate=None):
        """Run tokens on a past [(k, v, position)], all by hand; return logits, new states, queries by layer."""
        cache = DynamicCache()
        for layer in range(self.model.config.num_hidden_layers if past else 0):
            k = torch.stack([self.turn(k[layer], 0, at) for k, _, at in past])
            v = torch.stack([v[layer] for _, v, _ in past])
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
        queries, sdpa = [], torch.nn.functional.scaled_dot_product_attention

        def watched(q, *args, **kwargs):
            queries.append(q[0])
            return sdpa(q, *args, **kwargs)

        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
        torch.nn.functional.scaled_dot_product_attention = watched
        try:
            with torch.inference_mode():
                patch = self.net.attached(self.model, gate) if gate is not None else torch.inference_mode()
                with patch:
                    out = self.model(
                        input_ids=torch.tensor(ids)[None], position_ids=torch.tensor(positions)[None],
                        attention_mask=mask[None, None], past_key_values=cache, use_cache=True,
                    )  # fmt: skip
        finally:
            torch.nn.functional.scaled_dot_product_attention = sdpa
        states = []
        for n, at in enumerate(positions):
            row = len(past) + n
            k = torch.stack([self.turn(layer.keys[0, :, row], at, 0) for layer in cache.layers])
            states.append((k, torch.stack([layer.values[0, :, row] for layer in cache.layers])))
        return out.logits[0], states, queries

    def turn(self, k, old, new):
        return rotate_keys(k[None], torch.tensor([old]), torch.tensor([new]), self.rotary)[0]

    def before(self, windows, back=()):
        """Return [(k, v, position)] of what local tokens read, and how many landmarks are among it."""
        if not windows:
            return [], 0
        s, tokens = self.s, [t for w in windows for t in w[0]]
        landmarks = self.landmarks(windows) if self.net is not None and self.net.attended else []
        placed = [(k, v, at) for k, v, at in landmarks]
        placed += [(*tokens[n], n) for n in range(s.sinks)]
        placed += back
        placed += [(*t, self.local_at - s.overlap + n) for n, t in enumerate(tokens[-s.overlap :])]
        return placed, len(landmarks)

    def landmarks(self, windows):
        s, states = self.s, [state for w in windows for state in w[1]]
        space, n = s.landmark_positions, len(states)
        return [(*state, s.sinks + (i * space // n if n > space else space - n + i)) for i, state in enumerate(states)]

    def window(self, windows, ids):
        s, (past, _) = self.s, self.before(windows)
        blocks = len(ids) // s.ratio
        extra = blocks if self.net is not None else 0
        n, p = len(ids), len(past)
        seen = torch.zeros(n + extra, p + n + extra, dtype=torch.bool)
        seen[:, :p] = True
        positions = [self.local_at + i for i in range(n)]
        for i in range(n):
            seen[i, p : p + i + 1] = True
        for b in range(extra):
            seen[n + b, p : p + (b + 1) * s.ratio] = True
            seen[n + b, p + n : p + n + b + 1] = True
            positions.append(self.local_at + (b + 1) * s.ratio - 1)
        gate = torch.tensor([[False] * n + [True] * extra]) if extra else None
        _, states, _ = self.run(past, [*ids, *[0] * extra], positions, seen, gate)
        if self.net is not None:
            return states[:n], states[n:]
        means = []
        for b in range(blocks):
            part = states[b * s.ratio : (b + 1) * s.ratio]
            means.append(tuple(torch.stack([state[i] for state in part]).mean(0) for i in (0, 1)))
        return states, means

    def attention(self, layer, q, landmarks, others):
        """Largest share of attention of any query. Shape: (heads, landmarks)."""
        keys = [self.turn(k[layer], 0, at) for k, _, at in landmarks]
        keys += [self.turn(k[layer], 0, at) for k, _, at in others]
        most = np.zeros((q.shape[0], len(landmarks)))
        for head in range(q.shape[0]):
            kv = head * keys[0].shape[0] // q.shape[0]
            for query in q[head]:
                weights = torch.stack([query @ k[kv] for k in keys]).mul(query.shape[-1] ** -0.5).softmax(0)
                most[head] = np.maximum(most[head], weights[: len(landmarks)].numpy())
        return most

    def matches(self, layer, q, first, landmarks):
        """What a landmark's key has beyond the others' against each query. Shape: (heads, queries, landmarks)."""
        keys = [k[layer] - sum(k[layer] for k, _, _ in landmarks) / len(landmarks) for k, _, _ in landmarks]
        found = np.zeros((*q.shape[:2], len(landmarks)))
        for head in range(q.shape[0]):
            kv = head * keys[0].shape[0] // q.shape[0]
            for n, query in enumerate(q[head]):
                sought = self.turn(query[None], first + n, 0)[0]
                if self.net is not None:
                    sought = sought @ self.net.maps[layer, head]
                found[head, n] = [float(sought @ k[kv]) * query.shape[-1] ** -0.5 for k in keys]
        return found

    def logits(self, ids, num_last):
        s = self.s
        moved = max(0, -(-(len(ids) - s.local) // s.window))
        windows = []
        for w in range(moved):
            windows.append(self.window(windows, ids[w * s.window : (w + 1) * s.window]))
        local = list(ids[moved * s.window :])
        queries_at = len(local) - min(len(local), max(num_last, s.queries))
        past, count = self.before(windows)
        positions = [self.local_at + i for i in range(len(local))]
        _, states, queries = self.run(past, local, positions, causal(len(past), len(local)))
        known = [(*state, at) for state, at in zip(states, positions, strict=True)][:queries_at]
        queries = [q[:, queries_at:] for q in queries]
        tokens = [t for w in windows for t in w[0]]
        for _ in range(s.rounds):
            back = self.brought_back(windows, tokens, queries, positions[queries_at], past[count:] + known)
            past, _ = self.before(windows, back)
            both = past + known
            newest = local[queries_at:]
            logits, _, queries = self.run(both, newest, positions[queries_at:], causal(len(both), len(newest)))
        return logits[-num_last:]

    def brought_back(self, windows, tokens, queries, first, others):
        """Shares of attention: each layer's own choice. Else all layers' choice, with weighted heads where they learnt.

        All layers bring as many, so a row is (k of all layers, v of all layers, position).
        """
        s, landmarks = self.s, self.landmarks(windows)
        scores = []
        for layer, q in enumerate(queries):
            if s.pooling is not None:
                scores.append(self.attention(layer, q, landmarks, others).max(0))
            elif self.net is None:
                matches = self.matches(layer, q, first, landmarks)
                each = [match / match.std() for head in matches for match in head]
                scores.append(np.max(each, axis=0) if layer else np.zeros(len(landmarks)))
            else:
                scores.append(self.net.heads[layer].numpy() @ self.matches(layer, q, first, landmarks).max(1))
        if s.pooling is None:
            scores = [sum(scores)] * len(scores)
        rows_of_layer = []
        for score in scores:
            ordered = np.sort(score)
            self.gap = min([self.gap, *np.diff(ordered)[ordered[1:] > 1e-3]])
            free = [i for i in range(len(tokens)) if s.sinks <= i < len(tokens) - s.overlap]
            chosen = []
            for block in np.argsort(-score, kind="stable"):
                chosen += [i for i in free if i // s.ratio == block]
            rows_of_layer.append(sorted(chosen[: s.refill]))
        back, last = [], s.sinks + s.landmark_positions + s.refill
        for n in range(len(rows_of_layer[0])):
            k, v = (
                torch.stack([tokens[rows[n]][i][layer] for layer, rows in enumerate(rows_of_layer)]) for i in (0, 1)
            )
            back.append((k, v, last - len(rows_of_layer[0]) + n))
        return back


def causal(before, n):
    return torch.cat([torch.ones(n, before, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool).tril()], 1)


def trained(model, *, attended):
    net = LandmarkNet.for_model(model)
    net.attended = attended
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net.requires_grad_(False)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["shares", "pooled", "attended", "not attended"])
@pytest.mark.parametrize("length", [57, 100, 190])
def test_the_engine_equals_the_slow_twin(family, kind, length):
    model, settings = tiny_model(family), replace(SETTINGS, pooling=PlainPooling() if kind == "shares" else None)
    net = trained(model, attended=kind == "attended") if "attended" in kind else None
    engine = BiLayerEngine(HFEngine(model, max_tokens=600, chunk_size=11), settings, landmarks=net or PooledLandmarks())
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(3, 211, length)
        twin = Twin(model, engine.inner.rotary, settings, net)
        wanted = twin.logits(ids, 5)
        if twin.gap > 2e-6:
            break
    assert twin.gap > 2e-6, "in one of twenty threads no two blocks are as good as each other"
    engine.extend(build_key(ids[:50], ()))  # a shorter thread first: what it left must not matter
    found = engine.extend(build_key(ids, ()), num_last=5).logits
    error = (found - wanted).abs()
    print(f"{family} {kind} {length}: largest difference {error.max():.2e}, mean {error.mean():.2e}")
    assert error.max() <= 5e-4

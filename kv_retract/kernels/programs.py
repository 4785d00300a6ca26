# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Programs that run on the GPU, in Triton; `triton_kernels` launches them and says what their arguments are.

Arguments in capitals are constants of the compiled program. Addresses are those of `PagedKV.addresses`; slots and
positions are int64. One program takes TOKENS tokens of a layer, and in `map_kernel` of a head.
"""

import triton
import triton.language as tl


@triton.jit
def _layer(addresses, layer, TYPE: tl.constexpr):
    """Pointer to the first slot of a layer. Without the hint values are loaded one by one, not 16 bytes at once."""
    return tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(TYPE), bitcast=True), 16)


@triton.jit(do_not_specialize=["count"])
def move_kernel(
    k_from, v_from, k_to, v_to, from_slots, to_slots, count, ROW: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    NAMED_FROM: tl.constexpr, NAMED_TO: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy TOKENS slots of one layer, keys and values; a slot of -1 is read as zeros."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    layer = tl.program_id(1)
    real = token < count
    source = token
    target = token
    if NAMED_FROM:
        source = tl.load(from_slots + token, mask=real, other=-1)
    if NAMED_TO:
        target = tl.load(to_slots + token, mask=real, other=0)
    k_source = _layer(k_from, layer, FROM)
    v_source = _layer(v_from, layer, FROM)
    k_target = _layer(k_to, layer, TO)
    v_target = _layer(v_to, layer, TO)
    for begin in range(0, ROW, WIDTH):
        column = begin + tl.arange(0, WIDTH)
        inside = real[:, None] & (column < ROW)[None, :]
        there = inside & (source >= 0)[:, None]
        read = source[:, None] * ROW + column[None, :]
        write = target[:, None] * ROW + column[None, :]
        k = tl.load(k_source + read, mask=there, other=0.0)
        v = tl.load(v_source + read, mask=there, other=0.0)
        tl.store(k_target + write, k.to(TO), mask=inside)
        tl.store(v_target + write, v.to(TO), mask=inside)


@triton.jit
def _turned(angle, TURN: tl.constexpr):
    """Cosine and sine of a float64 angle, of which whole turns are taken away first."""
    rest = (angle - tl.floor(angle / TURN + 0.5) * TURN).to(tl.float32)
    return tl.cos(rest), tl.sin(rest)


@triton.jit
def _pairs(pair, HALF: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two dimensions of each pair. Those past the rotary ones are paired with their neighbours and turn by zero."""
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    elif 2 * HALF == DIM:
        first = pair
        second = pair + HALF
    else:
        first = tl.where(pair < HALF, pair, 2 * pair)
        second = tl.where(pair < HALF, pair + HALF, 2 * pair + 1)
    return first, second


@triton.jit(do_not_specialize=["count"])
def rotate_kernel(
    k_from, v_from, k_to, v_to, from_slots, to_slots, old, new, frequencies, count, heads, DIM: tl.constexpr,
    HALF: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, INTERLEAVED: tl.constexpr, NAMED_FROM: tl.constexpr,
    ROTATED: tl.constexpr, VALUES: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """Turn the keys of TOKENS tokens of one layer, and copy their values where VALUES says so."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    layer = tl.program_id(1)
    real = token < count
    source = token
    if NAMED_FROM:
        source = tl.load(from_slots + token, mask=real, other=0)
    target = tl.load(to_slots + token, mask=real, other=0)
    pair = tl.arange(0, PAIRS)
    frequency = tl.load(frequencies + pair, mask=pair < HALF, other=0.0)
    place = tl.load(new + token, mask=real, other=0).to(tl.float32)
    angle = (place[:, None] * frequency[None, :]).to(tl.float64)
    if ROTATED:
        before = tl.load(old + token, mask=real, other=0).to(tl.float32)
        angle -= (before[:, None] * frequency[None, :]).to(tl.float64)
    cos, sin = _turned(angle, TURN)
    first, second = _pairs(pair, HALF, DIM, INTERLEAVED)
    inside = real[:, None] & (pair < DIM // 2)[None, :]
    k_source = _layer(k_from, layer, FROM)
    k_target = _layer(k_to, layer, TO)
    for head in range(heads):
        read = k_source + (source[:, None] * heads + head) * DIM
        write = k_target + (target[:, None] * heads + head) * DIM
        a = tl.load(read + first[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(read + second[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(write + first[None, :], (a * cos - b * sin).to(TO), mask=inside)
        tl.store(write + second[None, :], (b * cos + a * sin).to(TO), mask=inside)
    if VALUES:
        v_source = _layer(v_from, layer, FROM)
        v_target = _layer(v_to, layer, TO)
        column = tl.arange(0, WIDTH)
        whole = real[:, None] & (column < DIM)[None, :]
        for head in range(heads):
            read = v_source + (source[:, None] * heads + head) * DIM
            write = v_target + (target[:, None] * heads + head) * DIM
            v = tl.load(read + column[None, :], mask=whole, other=0.0)
            tl.store(write + column[None, :], v.to(TO), mask=whole)


@triton.jit(do_not_specialize=["count"])
def map_kernel(
    k_all, v_all, from_slots, to_slots, positions, frequencies, w1, b1, w2, b2, count, heads, DIM: tl.constexpr,
    HALF: tl.constexpr, HIDDEN: tl.constexpr, TYPE: tl.constexpr, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TURN: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Map the states of TOKENS tokens of one head of one layer; CHUNK hidden units at a time."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    layer = tl.program_id(2)
    real = token < count
    source = tl.load(from_slots + token, mask=real, other=0)
    target = tl.load(to_slots + token, mask=real, other=0)
    pair = tl.arange(0, PAIRS)
    column = tl.arange(0, WIDTH)
    known = pair < DIM // 2
    inside = real[:, None] & known[None, :]
    whole = real[:, None] & (column < DIM)[None, :]
    first, second = _pairs(pair, HALF, DIM, INTERLEAVED)
    frequency = tl.load(frequencies + pair, mask=pair < HALF, other=0.0)
    place = tl.load(positions + token, mask=real, other=0).to(tl.float32)
    cos, sin = _turned((place[:, None] * frequency[None, :]).to(tl.float64), TURN)

    read = (source[:, None] * heads + head) * DIM
    keys = _layer(k_all, layer, TYPE)
    values = _layer(v_all, layer, TYPE)
    a = tl.load(keys + read + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(keys + read + second[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(values + read + column[None, :], mask=whole, other=0.0).to(tl.float32)
    bare_a = a * cos + b * sin
    bare_b = b * cos - a * sin
    k_square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / DIM
    v_square = tl.sum(v * v, axis=1) / DIM
    k_scale = (1.0 / tl.sqrt(k_square + EPSILON))[:, None]
    v_scale = (1.0 / tl.sqrt(v_square + EPSILON))[:, None]

    this = layer * heads + head
    w1 += this.to(tl.int64) * (2 * DIM) * HIDDEN
    w2 += this.to(tl.int64) * HIDDEN * (2 * DIM)
    b2 += this * (2 * DIM)
    change_a = tl.zeros((TOKENS, PAIRS), tl.float32) + tl.load(b2 + first, mask=known, other=0.0)[None, :]
    change_b = tl.zeros((TOKENS, PAIRS), tl.float32) + tl.load(b2 + second, mask=known, other=0.0)[None, :]
    change_v = tl.zeros((TOKENS, WIDTH), tl.float32)
    change_v += tl.load(b2 + DIM + column, mask=column < DIM, other=0.0)[None, :]
    for begin in range(0, HIDDEN, CHUNK):
        unit = begin + tl.arange(0, CHUNK)
        used = unit < HIDDEN
        from_a = tl.load(w1 + first[:, None] * HIDDEN + unit[None, :], mask=known[:, None] & used[None, :], other=0.0)
        from_b = tl.load(w1 + second[:, None] * HIDDEN + unit[None, :], mask=known[:, None] & used[None, :], other=0.0)
        from_v = tl.load(
            w1 + (DIM + column)[:, None] * HIDDEN + unit[None, :],
            mask=(column < DIM)[:, None] & used[None, :], other=0.0,
        )  # fmt: skip
        x = tl.dot(bare_a * k_scale, from_a, input_precision="ieee")
        x += tl.dot(bare_b * k_scale, from_b, input_precision="ieee")
        x += tl.dot(v * v_scale, from_v, input_precision="ieee")
        x += tl.load(b1 + this * HIDDEN + unit, mask=used, other=0.0)[None, :]
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        row = unit[:, None] * (2 * DIM)
        to_a = tl.load(w2 + row + first[None, :], mask=used[:, None] & known[None, :], other=0.0)
        to_b = tl.load(w2 + row + second[None, :], mask=used[:, None] & known[None, :], other=0.0)
        to_v = tl.load(w2 + row + (DIM + column)[None, :], mask=used[:, None] & (column < DIM)[None, :], other=0.0)
        change_a += tl.dot(x, to_a, input_precision="ieee")
        change_b += tl.dot(x, to_b, input_precision="ieee")
        change_v += tl.dot(x, to_v, input_precision="ieee")

    k_rms = tl.sqrt(k_square)[:, None]
    bare_a += k_rms * change_a
    bare_b += k_rms * change_b
    v += tl.sqrt(v_square)[:, None] * change_v
    write = (target[:, None] * heads + head) * DIM
    tl.store(keys + write + first[None, :], (bare_a * cos - bare_b * sin).to(TYPE), mask=inside)
    tl.store(keys + write + second[None, :], (bare_b * cos + bare_a * sin).to(TYPE), mask=inside)
    tl.store(values + write + column[None, :], v.to(TYPE), mask=whole)

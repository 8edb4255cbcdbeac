"""KV pruning in Triton kernels: what gpt2/attention/pruning_op.py computes by operations, without weights in memory.

The forward pass is one kernel, with a program for each sequence and head. It takes the blocks of rows in turn: decides at the
border what is dropped, goes over the keys once for log sum exp of each row, and once more for the sums of importance and the
output. A dropped token's sum is -inf from then on, so it stays the least. The backward pass makes weights anew from log sum
exp, and is two kernels, so that no sum needs an atomic: one takes a tile of columns and gives dk and dv, one takes a block of
rows and gives dq. Equal input gives equal bits. Keys and values:

    s = scale q k^T + log w,    p = exp(s - level),    y = p v,    ds = p (g v^T - rowsum(g y))

Values only, where w multiplies p instead:

    s = scale q k^T,    p = exp(s - level),    y = (w p) v,    ds = p (w g v^T - rowsum(g y))

A rank is counted, not sorted: of all candidates those before it, by importance and of equals by position, as
gpt2/attention/pruning_op.py `ranks` has it. Scores, softmax, sums and gradients are float32; the operands of products are in
the type of q. `log_weight` is log w, -inf where a token is dropped. Sizes need not divide anything: what lies beyond an end is
masked.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 64  # keys at a time; of numbers of four bytes half as many
RIVALS = 256  # candidates at a time that a rank is counted over
SMALLEST = 16  # side of a product that a GPU's matrix units take


@triton.jit
def _tile(x, at, stride, width, wide: tl.constexpr, inside):
    """Rows `at` of x, [len(at), wide]; 0 where they are not inside, and beyond `width`."""
    channel = tl.arange(0, wide)
    return tl.load(x + at[:, None] * stride + channel[None, :], mask=inside[:, None] & (channel[None, :] < width), other=0.0)


@triton.jit
def _scores(queries, keys, i, j, end, log_weight, scale, adds: tl.constexpr):
    """[rows, columns] of tokens i and j, -inf where j is later or not before `end`; log w is added if it `adds`."""
    s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if adds:
        s += tl.load(log_weight + j, mask=j < end, other=0.0)[None, :]
    return tl.where((j[None, :] <= i[:, None]) & (j[None, :] < end), s, -float("inf"))


@triton.jit
def _drop(sums, importance, rank, now, has_before, start, candidates, tokens, limit, most, width, floor: tl.constexpr,
          columns: tl.constexpr, rivals: tl.constexpr, soft: tl.constexpr):
    """At border `start`, of the first `candidates` tokens: which are dropped, in `sums`, and log w of all, `now`, which is
    a row of T after that of the block before. Those of a rank below `most` live on; a soft threshold is at `limit`."""
    for i0 in range(0, candidates, rivals):
        i = i0 + tl.arange(0, rivals)
        age = tl.where(i < candidates, start - i, 1).to(tl.float32)
        total = tl.load(sums + i, mask=i < candidates, other=0.0)
        tl.store(importance + i, tl.math.div_rn(total, age), mask=i < candidates)
    tl.debug_barrier()
    for j0 in range(0, candidates, columns):
        j = j0 + tl.arange(0, columns)
        own = tl.load(importance + j, mask=j < candidates, other=0.0)
        ahead = tl.zeros([columns], tl.int32)
        for i0 in range(0, candidates, rivals):
            i = i0 + tl.arange(0, rivals)
            other = tl.load(importance + i, mask=i < candidates, other=-float("inf"))[None, :]
            first = (other > own[:, None]) | ((other == own[:, None]) & (i[None, :] < j[:, None]))
            ahead += tl.sum(first.to(tl.int32), 1)
        tl.store(rank + j, ahead, mask=j < candidates)
    tl.debug_barrier()  # all are ranked before the first is dropped
    for j0 in range(0, tokens, columns):
        j = j0 + tl.arange(0, columns)
        at = tl.load(rank + j, mask=j < candidates, other=0).to(tl.float32)
        total = tl.load(sums + j, mask=j < candidates, other=0.0)
        total = tl.where((j >= candidates) | (at < most), total, -float("inf"))
        tl.store(sums + j, total, mask=j < candidates)
        if soft:
            x = (limit - at - 0.5) / width
            w = tl.where(j < candidates, tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x))), 0.0)
            w = tl.maximum(w + tl.load(now - tokens + j, mask=(j < tokens) & has_before, other=0.0), floor)
        else:
            w = tl.where(total == -float("inf"), total, 0.0)
        tl.store(now + j, w, mask=j < tokens)


@triton.jit
def _rows(q, k, v, sums, log_weight, y, level, start, end, scale, q_token, k_token, v_token, key_dim: tl.constexpr,
          dim: tl.constexpr, wide_key: tl.constexpr, wide: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
          attends: tl.constexpr, adds: tl.constexpr):
    """Rows [start, end): what they add to `sums`, and if it `attends`, y and log sum exp from their first on. log w `adds` to
    scores, or else multiplies what they become."""
    i = start + tl.arange(0, rows)
    inside = i < end
    queries = _tile(q, i, q_token, key_dim, wide_key, inside)
    top = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    for j0 in range(0, end, columns):
        j = j0 + tl.arange(0, columns)
        s = _scores(queries, _tile(k, j, k_token, key_dim, wide_key, j < end), i, j, end, log_weight, scale, adds)
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher > -float("inf"), higher, 0.0)  # all tokens so far may be dropped
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = higher
    log_sum = top + tl.log(total)
    out = tl.zeros([rows, wide], tl.float32)
    for j0 in range(0, end, columns):
        j = j0 + tl.arange(0, columns)
        s = _scores(queries, _tile(k, j, k_token, key_dim, wide_key, j < end), i, j, end, log_weight, scale, adds)
        p = tl.where(inside[:, None], tl.exp(s - log_sum[:, None]), 0.0)
        seen = tl.sum(p * (i + 1).to(tl.float32)[:, None], 0)
        tl.store(sums + j, tl.load(sums + j, mask=j < end, other=0.0) + seen, mask=j < end)
        if attends:
            if not adds:
                p *= tl.exp(tl.load(log_weight + j, mask=j < end, other=0.0))[None, :]
            out += tl.dot(p.to(v.dtype.element_ty), _tile(v, j, v_token, dim, wide, j < end), input_precision="ieee")
    if attends:
        row, channel = tl.arange(0, rows), tl.arange(0, wide)
        tl.store(y + row[:, None] * dim + channel[None, :], out.to(y.dtype.element_ty),
                 mask=inside[:, None] & (channel[None, :] < dim))
        tl.store(level + row, log_sum, mask=inside)


@triton.jit
def _forward(q, k, v, sums, importance, rank, limit, log_weight, y, level, first, block, tokens, heads, scale, width,
             q_sequence, q_head, q_token, k_sequence, k_head, k_token, v_sequence, v_head, v_token, w_head, floor: tl.constexpr,
             key_dim: tl.constexpr, dim: tl.constexpr, wide_key: tl.constexpr, wide: tl.constexpr, rows: tl.constexpr,
             columns: tl.constexpr, rivals: tl.constexpr, values_only: tl.constexpr, soft: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    b, h = head // heads, head % heads
    q += b * q_sequence + h * q_head
    k += b * k_sequence + h * k_head
    v += b * v_sequence + h * v_head
    sums += head * tokens
    importance += head * tokens
    rank += head * tokens
    now = log_weight + head * w_head
    y += head * (tokens - first) * dim
    level += head * (tokens - first)
    exactly, most = tl.load(limit), tl.load(limit + 1)
    for start in range(0, first, block):
        _rows(q, k, v, sums, now, y, level, start, tl.minimum(start + block, first), scale, q_token, k_token, v_token, key_dim,
              dim, wide_key, wide, rows, columns, False, False)
        tl.debug_barrier()
    for start in range(first, tokens, block):
        _drop(sums, importance, rank, now, start > first, start, start - block, tokens, exactly, most, width, floor, columns,
              rivals, soft)
        tl.debug_barrier()
        _rows(q, k, v, sums, now, y, level, start, tl.minimum(start + block, tokens), scale, q_token, k_token, v_token, key_dim,
              dim, wide_key, wide, rows, columns, True, not values_only)
        tl.debug_barrier()
        now += tokens
        y += block * dim
        level += block


@triton.jit
def _slopes(queries, keys, values, grads, mean, log_sum, i, j, end, log_weight, scale, values_only: tl.constexpr):
    """Of a tile [rows, columns]: what weighs the values, the loss's gradient of it, and the gradient of the scores."""
    s = _scores(queries, keys, i, j, end, log_weight, scale, not values_only)
    p = tl.where((i < end)[:, None], tl.exp(s - log_sum[:, None]), 0.0)
    gradient = tl.dot(grads, tl.trans(values), input_precision="ieee")
    if values_only:
        w = tl.exp(tl.load(log_weight + j, mask=j < end, other=0.0))[None, :]
        return p * w, gradient, p * (gradient * w - mean[:, None])
    return p, gradient, p * (gradient - mean[:, None])


@triton.jit
def _backward_columns(q, k, v, grad, log_weight, level, mean, dk, dv, gain, first, block, tokens, heads, scale, q_sequence,
                      q_head, q_token, k_sequence, k_head, k_token, v_sequence, v_head, v_token, w_head, key_dim: tl.constexpr,
                      dim: tl.constexpr, wide_key: tl.constexpr, wide: tl.constexpr, rows: tl.constexpr,
                      columns: tl.constexpr, values_only: tl.constexpr, soft: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    q += b * q_sequence + h * q_head
    k += b * k_sequence + h * k_head
    v += b * v_sequence + h * v_head
    later = tokens - first
    grad += head * later * dim
    level += head * later
    mean += head * later
    log_weight += head * w_head
    gain += head * w_head
    j0 = tl.program_id(0) * columns
    j = j0 + tl.arange(0, columns)
    keys = _tile(k, j, k_token, key_dim, wide_key, j < tokens)
    values = _tile(v, j, v_token, dim, wide, j < tokens)
    key_grad = tl.zeros([columns, wide_key], tl.float32)
    value_grad = tl.zeros([columns, wide], tl.float32)
    for m in range(tl.maximum(j0 - first, 0) // block, tl.cdiv(later, block)):
        start = first + m * block
        end = tl.minimum(start + block, tokens)
        i = start + tl.arange(0, rows)
        inside = i < end
        queries = _tile(q, i, q_token, key_dim, wide_key, inside)
        grads = _tile(grad, i - first, dim, dim, wide, inside)
        log_sum = tl.load(level + i - first, mask=inside, other=0.0)
        own = tl.load(mean + i - first, mask=inside, other=0.0)
        weights, gradient, ds = _slopes(queries, keys, values, grads, own, log_sum, i, j, end, log_weight + m * tokens, scale,
                                        values_only)
        value_grad += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision="ieee")
        key_grad += tl.dot(tl.trans(ds.to(queries.dtype)), queries, input_precision="ieee")
        if soft:
            tl.store(gain + m * tokens + j, tl.sum(weights * gradient if values_only else ds, 0), mask=j < tokens)
    at = head * tokens + j
    channel, value_channel = tl.arange(0, wide_key), tl.arange(0, wide)
    tl.store(dk + at[:, None] * key_dim + channel[None, :], (key_grad * scale).to(dk.dtype.element_ty),
             mask=(j < tokens)[:, None] & (channel[None, :] < key_dim))
    tl.store(dv + at[:, None] * dim + value_channel[None, :], value_grad.to(dv.dtype.element_ty),
             mask=(j < tokens)[:, None] & (value_channel[None, :] < dim))


@triton.jit
def _backward_rows(q, k, v, grad, log_weight, level, mean, dq, first, block, tokens, heads, scale, q_sequence, q_head, q_token,
                   k_sequence, k_head, k_token, v_sequence, v_head, v_token, w_head, key_dim: tl.constexpr, dim: tl.constexpr,
                   wide_key: tl.constexpr, wide: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
                   values_only: tl.constexpr):
    m, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    q += b * q_sequence + h * q_head
    k += b * k_sequence + h * k_head
    v += b * v_sequence + h * v_head
    later = tokens - first
    log_weight += head * w_head + m * tokens
    start = first + m * block
    end = tl.minimum(start + block, tokens)
    i = start + tl.arange(0, rows)
    inside = i < end
    queries = _tile(q, i, q_token, key_dim, wide_key, inside)
    grads = _tile(grad + head * later * dim, i - first, dim, dim, wide, inside)
    log_sum = tl.load(level + head * later + i - first, mask=inside, other=0.0)
    own = tl.load(mean + head * later + i - first, mask=inside, other=0.0)
    query_grad = tl.zeros([rows, wide_key], tl.float32)
    for j0 in range(0, end, columns):
        j = j0 + tl.arange(0, columns)
        keys = _tile(k, j, k_token, key_dim, wide_key, j < end)
        values = _tile(v, j, v_token, dim, wide, j < end)
        _, _, ds = _slopes(queries, keys, values, grads, own, log_sum, i, j, end, log_weight, scale, values_only)
        query_grad += tl.dot(ds.to(keys.dtype), keys, input_precision="ieee")
    channel = tl.arange(0, wide_key)
    tl.store(dq + (head * tokens + i)[:, None] * key_dim + channel[None, :], (query_grad * scale).to(dq.dtype.element_ty),
             mask=inside[:, None] & (channel[None, :] < key_dim))


def _shapes(q: torch.Tensor, v: torch.Tensor, block: int) -> dict[str, int]:
    def wide(size: int) -> int:
        return max(triton.next_power_of_2(size), SMALLEST)
    return {"key_dim": q.size(3), "dim": v.size(3), "wide_key": wide(q.size(3)), "wide": wide(v.size(3)), "rows": wide(block),
            "columns": COLUMNS, "num_warps": 4} | ({"columns": COLUMNS // 2, "num_warps": 8, "num_stages": 1}
                                                   if q.element_size() > 2 else {})


def _strides(*tensors: torch.Tensor) -> list[int]:
    if any(x.stride(3) != 1 for x in tensors):
        raise ValueError("channels must be contiguous")
    return [x.stride(axis) for x in tensors for axis in (0, 1, 2)]


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limit: torch.Tensor, first: int, block: int, scale: float,
            width: float, floor: float, values_only: bool, soft: bool, y: torch.Tensor, log_weight: torch.Tensor,
            level: torch.Tensor) -> None:
    """Writes y [B, H, T - first, D], log_weight [B, H, M, T] and level [B, H, T - first], the log sum exp of each row, of q, k
    [B, H, T, key_dim] and v [B, H, T, D], whose channels are contiguous. `limit` [] is float32; `width` is that of a soft
    threshold."""
    B, H, T, _ = q.shape
    sums = torch.zeros(B, H, T, dtype=torch.float32, device=q.device)
    importance, rank = torch.empty_like(sums), torch.empty_like(sums, dtype=torch.int32)
    limit = torch.stack([limit, limit.round()])
    with torch.cuda.device_of(q):
        _forward[(B * H,)](q, k, v, sums, importance, rank, limit, log_weight, y, level, first, block, T, H, scale, width,
                           *_strides(q, k, v), log_weight.stride(1), floor=floor, rivals=RIVALS, **_shapes(q, v, block),
                           values_only=values_only, soft=soft)


def backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_weight: torch.Tensor,
             level: torch.Tensor, mean: torch.Tensor, first: int, block: int, scale: float, values_only: bool,
             soft: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, and with `soft` that of log w [B, H, M, T], of `grad` [B, H, T - first, D], log_weight
    [B, H, M, T], and level and mean [B, H, T - first], all contiguous."""
    B, H, T, _ = q.shape
    M = log_weight.size(2)
    dq, dk, dv = q.new_zeros(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    gain = torch.zeros_like(log_weight) if soft else log_weight
    common = (first, block, T, H, scale, *_strides(q, k, v), M * T)
    shapes = _shapes(q, v, block)
    # The kernel of columns in stages, with blocks shorter than 64 rows: Triton 3.6 leaves products in flight on a Hopper while
    # it overwrites what they read, and dk was wrong, and another each time. In one stage it waits for each, and is as fast.
    one_stage = shapes | {"num_stages": 1}
    with torch.cuda.device_of(q):
        _backward_columns[(triton.cdiv(T, shapes["columns"]), B * H)](q, k, v, grad, log_weight, level, mean, dk, dv, gain,
                                                                      *common, **one_stage, values_only=values_only, soft=soft)
        _backward_rows[(M, B * H)](q, k, v, grad, log_weight, level, mean, dq, *common, **shapes, values_only=values_only)
    return dq, dk, dv, gain

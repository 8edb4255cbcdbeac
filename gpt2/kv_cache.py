"""The caches of cached decoding: preallocated, batched, one object a layer.

Invariant: after n positions were given, what the cache returns for them is exactly what the full forward pass computes.
`nbytes()` and `parts()` count the tensors that are held, not a formula, and the parts of a cache are all of its bytes. A
`codec` (gpt2/kvsplice.py) stores values in fewer channels: `codec.compress` [..., D] -> [..., k], `codec.decompress` back,
`codec.width` is k.
"""

from typing import Any

import torch


class LayerCache:
    """Keys [batch, heads, capacity, key_dim] and values [batch, heads, capacity, value_dim, or codec.width] of one layer."""

    def __init__(self, batch_size: int, n_head: int, capacity: int, key_dim: int, dtype: torch.dtype, device: torch.device,
                 value_dim: int | None = None,
                 codec: Any = None):
        shape = (batch_size, n_head, capacity)
        value_dim = key_dim if value_dim is None else value_dim
        self.keys = torch.empty(*shape, key_dim, dtype=dtype, device=device)
        self.values = torch.empty(*shape, value_dim if codec is None else codec.width, dtype=dtype, device=device)
        self.length, self.codec = 0, codec

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store n more positions, [batch, heads, n, key_dim] and [..., value_dim]; returns all so far, in the type given
        (views, where that is the cache's and there is no codec)."""
        end = end_after(self.length, keys.size(2), self.keys.size(2))
        self.keys[:, :, self.length:end] = keys
        self.values[:, :, self.length:end] = values if self.codec is None else self.codec.compress(values)
        self.length = end
        held = self.values[:, :, :end].to(values.dtype)
        return self.keys[:, :, :end].to(keys.dtype), held if self.codec is None else self.codec.decompress(held)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values

    def parts(self) -> dict[str, int]:
        return {"keys": nbytes(self.keys), "values": nbytes(self.values)}


class TokenCache:
    """One vector a token for all heads of a layer, [batch, capacity, width]; what it means, the attention knows."""

    def __init__(self, batch_size: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device):
        self.vectors = torch.empty(batch_size, capacity, width, dtype=dtype, device=device)
        self.length = 0

    def append(self, vectors: torch.Tensor) -> torch.Tensor:
        """Store n more positions, [batch, n, width]; returns all so far, in the type given (a view, where that is the
        cache's)."""
        end = end_after(self.length, vectors.size(1), self.vectors.size(1))
        self.vectors[:, self.length:end] = vectors
        self.length = end
        return self.vectors[:, :end].to(vectors.dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.vectors,)

    def parts(self) -> dict[str, int]:
        return {"latents": nbytes(self.vectors)}


class PrunedCache:
    """Of a layer that drops tokens by sequence and head (gpt2/attention/pruning.py): at most `keep` slots.

    values [batch, heads, slots, value_dim, or codec.width], position and importance [batch, heads, slots] of the tokens that
    have a slot, in the order of positions, slots = min(keep, capacity); keys [batch, heads, slots, key_dim], or with
    `values_only` those of all tokens, [batch, heads, capacity, key_dim]. `importance` holds sums over queries, not yet divided.
    `length` tokens were given, `filled` slots are taken. Which slots go, and when, the caller says.
    """

    def __init__(self, batch_size: int, n_head: int, capacity: int, key_dim: int, dtype: torch.dtype, device: torch.device,
                 value_dim: int | None = None,
                 codec: Any = None, *, keep: int, values_only: bool = False):
        slots = (batch_size, n_head, min(keep, capacity))
        value_dim = key_dim if value_dim is None else value_dim
        self.keys = torch.empty(batch_size, n_head, capacity if values_only else slots[2], key_dim, dtype=dtype, device=device)
        self.values = torch.empty(*slots, value_dim if codec is None else codec.width, dtype=dtype, device=device)
        self.position = torch.empty(slots, dtype=position_type(capacity), device=device)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.importance = torch.empty(slots, dtype=exact, device=device)
        self.keep, self.capacity, self.values_only, self.codec = keep, capacity, values_only, codec
        self.length = self.filled = 0

    def expect(self, count: int) -> None:
        """ValueError if there is no room for `count` more positions."""
        end_after(self.length, count, self.capacity)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store n more positions, [batch, heads, n, key_dim] and [..., value_dim], with no importance yet; returns the keys
        held, and the values of all slots taken, in the type given. The n slots must be free."""
        n = keys.size(2)
        self.expect(n)
        new, at = slice(self.filled, self.filled + n), slice(self.length, self.length + n)
        self.keys[:, :, at if self.values_only else new] = keys
        self.values[:, :, new] = values if self.codec is None else self.codec.compress(values)
        self.position[:, :, new] = torch.arange(at.start, at.stop, dtype=self.position.dtype, device=keys.device)
        self.importance[:, :, new] = 0
        self.length, self.filled = at.stop, new.stop
        held = self.values[:, :, :self.filled].to(values.dtype)
        return (self.keys[:, :, :self.length if self.values_only else self.filled].to(keys.dtype),
                held if self.codec is None else self.codec.decompress(held))

    def retain(self, slots: torch.Tensor) -> None:
        """Keep only these of the slots taken, int64 [batch, heads, n], ascending: they become the first n."""
        n = slots.size(2)
        for held in self.tensors()[self.values_only:]:
            where = slots if held.ndim == 3 else slots[..., None].expand(-1, -1, -1, held.size(3))
            held[:, :, :n] = held.gather(2, where)
        self.filled = n

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.position, self.importance

    def parts(self) -> dict[str, int]:
        """The index says which tokens have a slot, and how important they are."""
        return {"keys": nbytes(self.keys), "values": nbytes(self.values),
                "index": nbytes(self.position) + nbytes(self.importance)}


class NoCache:
    """Of a layer that has no attention: holds nothing."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()

    def parts(self) -> dict[str, int]:
        return {}


class KVCache:
    """A list of layer caches, anything with `tensors()` and `parts()` (their bytes, by what they hold); the model keeps
    `length`, the number of positions stored."""

    def __init__(self, layers: list):
        self.layers, self.length = layers, 0

    def nbytes(self) -> int:
        """Bytes of all tensors held, for the whole batch and full capacity."""
        return sum(nbytes(t) for layer in self.layers for t in layer.tensors())

    def parts(self) -> dict[str, int]:
        """The same bytes by what they hold, summed over layers, of parts that have any: "keys" (with what is stored beside
        a key to be one, e.g. the query of a transposed score), "values", "latents" that keys and values are made from,
        "queries", "features" of an MLP, and the "index" of pruning."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for name, size in layer.parts().items():
                found[name] = found.get(name, 0) + size
        return {name: size for name, size in found.items() if size}


def end_after(length: int, count: int, capacity: int) -> int:
    """The length after `count` more positions. ValueError if there is no room for them."""
    if length + count > capacity:
        raise ValueError(f"the cache holds {capacity} positions, {length + count} were asked for")
    return length + count


def nbytes(t: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return t.numel() * t.element_size()


def position_type(capacity: int) -> torch.dtype:
    """The smallest integer type for positions below `capacity`."""
    return torch.int16 if capacity <= 2 ** 15 else torch.int32

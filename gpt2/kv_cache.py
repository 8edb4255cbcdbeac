"""The key/value cache of cached decoding: preallocated, batched, one pair of tensors a layer.

Invariant: after `append` of n positions, `length` positions are valid and `keys[:, :, :length]` are exactly what the
full forward pass computes for them. `nbytes()` counts the tensors that are held, not a formula.
"""

import torch


class LayerCache:
    """Keys [batch, heads, capacity, key_dim] and values [batch, heads, capacity, value_dim] of one layer."""

    def __init__(self, batch_size: int, n_head: int, capacity: int, key_dim: int, dtype, device, value_dim: int | None = None):
        shape = (batch_size, n_head, capacity)
        self.keys = torch.empty(*shape, key_dim, dtype=dtype, device=device)
        self.values = torch.empty(*shape, key_dim if value_dim is None else value_dim, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys, values):
        """Store n more positions, [batch, heads, n, key_dim] and [..., value_dim]; returns views of all so far."""
        end = self.length + keys.size(2)
        if end > self.keys.size(2):
            raise ValueError(f"the cache holds {self.keys.size(2)} positions, {end} were asked for")
        self.keys[:, :, self.length:end] = keys
        self.values[:, :, self.length:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def tensors(self):
        return self.keys, self.values


class NoCache:
    """Of a layer that has no attention: holds nothing."""

    def tensors(self):
        return ()


class KVCache:
    """A list of layer caches, anything with `tensors()`; the model keeps `length`, the number of positions stored."""

    def __init__(self, layers: list):
        self.layers, self.length = layers, 0

    def nbytes(self) -> int:
        """Bytes of all tensors held, for the whole batch and full capacity."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

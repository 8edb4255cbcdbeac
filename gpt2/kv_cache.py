"""The key/value cache of cached decoding: preallocated, batched, one pair of tensors a layer.

Invariant: after `append` of n positions, `length` positions are valid and `keys[:, :, :length]` are exactly what the
full forward pass computes for them. `nbytes()` counts the tensors that are held, not a formula.
"""

import torch


class LayerCache:
    """Keys and values of one layer, each [batch, heads, capacity, head_dim]."""

    def __init__(self, batch_size: int, n_head: int, capacity: int, head_dim: int, dtype, device):
        shape = (batch_size, n_head, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys, values):
        """Store [batch, heads, n, head_dim] more positions; returns all keys and values so far (views)."""
        end = self.length + keys.size(2)
        if end > self.keys.size(2):
            raise ValueError(f"the cache holds {self.keys.size(2)} positions, {end} were asked for")
        self.keys[:, :, self.length:end] = keys
        self.values[:, :, self.length:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def tensors(self):
        return self.keys, self.values


class KVCache:
    """A list of layer caches; `length` is the number of positions every layer has stored."""

    def __init__(self, layers: list):
        self.layers = layers

    @property
    def length(self) -> int:
        return self.layers[0].length

    def nbytes(self) -> int:
        """Bytes of all tensors held, for the whole batch and full capacity."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

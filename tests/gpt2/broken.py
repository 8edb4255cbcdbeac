"""Attention and MLP modules with one planted defect each, for the tests of the laws."""

import copy

import torch
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.mlp.baseline import MLP


class Leaky(CausalSelfAttention):
    """Mixes in the mean over all positions, later ones included."""

    def combine(self, attended, values, x):
        return attended + 1e-3 * values.mean(2, keepdim=True)


class ShyLeak(CausalSelfAttention):
    """The same behind a gate that is 0 at the start."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.zeros(1))

    def combine(self, attended, values, x):
        return attended + self.gate * values.mean(2, keepdim=True)

    @staticmethod
    def extra_parameters(cfg):
        return 1


class LongLeak(CausalSelfAttention):
    """The same beyond 100 tokens only, as a border of a block that is drawn wrongly."""

    def combine(self, attended, values, x):
        return attended + 1e-3 * values.mean(2, keepdim=True) if values.size(2) > 100 else attended


class FirstKeyOnly(CausalSelfAttention):
    """In decoding, a single query sees position 0 only, as is_causal=True with one row would have it."""

    def forward(self, x, cache=None, context=None):
        if cache is None or not cache.length or x.size(1) > 1:
            return super().forward(x, cache)
        true_keys = cache.keys.clone()
        cache.keys[:, :, 1:cache.length] = 0
        out = super().forward(x, cache)
        cache.keys.copy_(true_keys)
        return out


class Undropped(MLP):
    """Leaves out the dropout."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dropout = nn.Identity()


class Dead(MLP):
    """Has a parameter that nothing uses."""

    def __init__(self, *args):
        super().__init__(*args)
        self.unused = nn.Parameter(torch.ones(3))

    @staticmethod
    def extra_parameters(cfg):
        return 3


class Detached(MLP):
    """Uses a parameter, but no gradient reaches it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(1))

    @staticmethod
    def extra_parameters(cfg):
        return 1

    def forward(self, x, attended=None):
        return super().forward(x) * (self.scale.detach() + 0.0 * self.scale)


class Uncounted(MLP):
    """Drops a bias without saying so."""

    def __init__(self, *args):
        super().__init__(*args)
        self.c_proj.bias = None


class OwnStart(MLP):
    """Draws a start of its own for a tensor that the baseline has too."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.c_fc.init_std
        with torch.no_grad():
            self.c_fc.weight.fill_(0.01)


class Forgetful(MLP):
    """Keeps state that is not in its state_dict."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = 0

    def forward(self, x, attended=None):
        if self.training:
            self.seen += 1
        return super().forward(x) * (1 + 0.01 * self.seen)


class Collapsing(MLP):
    """Is said to be equal to an MLP that it is not equal to."""

    def collapse(self):
        plain = copy.deepcopy(self)
        plain.c_proj.weight.data.mul_(1.01)
        return plain


class Shrinking(MLP):
    """Collapses to something of which nothing is stated."""

    def collapse(self):
        return MLP(self.c_fc.in_features, self.d_ff // 2)


class ReluMLP(MLP):
    """Has no defect: a feature that is off for every token of one sequence is on for tokens of another."""

    def forward(self, x, attended=None):
        return self.c_proj(torch.relu(self.c_fc(x)))

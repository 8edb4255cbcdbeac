"""A model with one of everything that grouping has to tell apart, and a configuration to build optimizers from."""

from types import SimpleNamespace

import torch
from torch import nn


class Gated(nn.Module):
    """A layer with gates: a vector, a matrix, and one it was built without."""

    gate_parameters = ("gate", "gate_matrix", "gate_absent")

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width, bias=False)
        self.gate = nn.Parameter(torch.ones(2 * width))
        self.gate_matrix = nn.Parameter(torch.ones(width, width))
        self.gate_absent = None

    def forward(self, x):
        return x + (self.back(torch.relu(self.proj(x)) * self.gate) @ self.gate_matrix)


class Routed(Gated):
    """A layer that also decides which path is computed: by a logit, a matrix, and one it was built without. The logit is
    declared as a gate, too."""

    gate_parameters = ("gate", "gate_matrix", "gate_absent", "skip")
    structure_parameters = ("skip", "router", "direction")

    def __init__(self, width):
        super().__init__(width)
        self.skip = nn.Parameter(torch.full((1,), 2.0))
        self.router = nn.Parameter(0.1 * torch.randn(2, width))
        self.direction = None

    def forward(self, x):
        return x + torch.sigmoid(self.skip + (x @ self.router.T).sum(-1, keepdim=True)) * (super().forward(x) - x)


class Positions(nn.Module):
    """An embedding that is no nn.Embedding, so it has to declare itself."""

    embedding_parameters = ("table",)

    def __init__(self, length, width):
        super().__init__()
        self.table = nn.Parameter(0.1 * torch.randn(length, width))

    def forward(self, x):
        return x + self.table


class Toy(nn.Module):
    """Tied head, two equal layers, a norm, a three-dimensional and a frozen parameter."""

    def __init__(self, vocab=11, length=6, width=8):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = Positions(length, width)
        self.layers = nn.ModuleList(Gated(width) for _ in range(2))
        self.kernel = nn.Parameter(0.1 * torch.randn(2, width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.wte.weight
        self.frozen = nn.Parameter(torch.eye(width), requires_grad=False)

    def forward(self, tokens):
        x = self.wpe(self.wte(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x + torch.einsum("btd,kde->bte", x, self.kernel)) @ self.frozen)


def toy(seed=0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def config(optimizer="adamwspam", **changes) -> SimpleNamespace:
    values = dict(OPTIMIZER=optimizer, LEARNING_RATE=1e-2, LEARNING_RATE_MULT=1.0, WEIGHT_DECAY=0.1, ADAM_BETA1=0.9,
                  ADAM_BETA2=0.95, SPAM_THETA=5000.0, SPAM_INTERVAL=500, SPAM_WARMUP_STEPS=150, SINKGD_ITERS=5,
                  SINKGD_L1=False, SINKGD_TAU=0.1, SINKGD_MATRIX_LR_MULT=0.05, GATE_LR_MULT=1.0, STRUCT_LR=0.02)
    assert not changes.keys() - values.keys()
    return SimpleNamespace(**{**values, **changes})


def train(model, optimizer, steps, start=0):
    """`steps` steps on data that depends on the step's number alone, so that a run can be continued."""
    for step in range(start, start + steps):
        tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()


def gradient(shape, step, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(step))

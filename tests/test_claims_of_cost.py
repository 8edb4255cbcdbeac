"""Proofs of claims of the source documents on what inference costs: what is computed, not how long it took somewhere."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.attention.direction import Direction
from gpt2.model import GPT
from lib.config import load
from tests.harness import ROOT

torch.set_num_threads(1)  # tests run side by side
PROMPT, NEW = 20, 6


class Work(TorchDispatchMode):
    """The operations, in order, each with the shapes of the tensors that it takes and gives."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, out))
        self.done.append((str(func), [(tuple(t.shape), t.dtype) for t in tensors if isinstance(t, torch.Tensor)]))
        return out


@torch.no_grad()
def work_of_decoding(model):
    """Of a prompt and of further tokens, one at a time, each the likeliest."""
    tokens = torch.randint(256, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    cache = model.eval().new_cache(1)
    with Work() as work:
        for _ in range(NEW):
            logits, _ = model(tokens, cache=cache)
            tokens = logits[:, -1:].argmax(-1)
    return work.done


def built(step):
    return GPT(load("gpt2-ra-direction-ablation+tiny", step, {"GPT2_BLOCK_SIZE": 32}))


@pytest.mark.parametrize("step", ["B0", "RAALL0"])
def test_decoding_is_the_same_work_whatever_the_perplexity(step):
    """A model learns a text by heart; its perplexity on it falls to less than a tenth, and its decoding stays what it was."""
    model = built(step)
    text = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    before, losses = work_of_decoding(model), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        loss = model.train()(text[:, :-1], text[:, 1:])[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 2.31, "perplexity by e^2.31 = 10"
    after = work_of_decoding(model)
    assert len(after) > 100 and after == before


@pytest.mark.parametrize("reciprocal", [True, False])
def test_a_learned_direction_decodes_with_the_products_of_the_baseline(reciprocal):
    """Once it is fixed; before that both directions are computed, which is more."""
    def products(model):
        kinds = ("mm", "bmm", "scaled_dot_product")
        return [one for one in work_of_decoding(model) if any(kind in one[0] for kind in kinds)]

    expected, model = products(built("B0")), built("RALEARN0")
    assert len(expected) >= 4 * NEW and len(products(model)) > len(expected)
    for module in model.modules():
        if isinstance(module, Direction):
            torch.nn.init.constant_(module.logit, 1.0 if reciprocal else -1.0)
            module.decide()
            assert module.reciprocal is reciprocal
    assert products(model) == expected


MOST_MEMORY = r"""
import re, sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)

def attend(backend, length):
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    with sdpa_kernel(backend):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    # Not ru_maxrss, which a process takes over from the one that has started it.
    return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])

context = int(sys.argv[1])
for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
    print(-attend(backend, 256) + attend(backend, context))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_the_fused_kernel_holds_no_matrix_of_scores():
    """Forward and backward at 6144 tokens, in a process of its own. The matrix of one head alone is 144 MiB there, which the
    fused kernel stays far below; the math fallback takes more than one of it."""
    done = subprocess.run([sys.executable, "-c", MOST_MEMORY, "6144"], cwd=ROOT, capture_output=True, text=True, check=True)
    fused, fallback = (int(kibibytes) / 1024 for kibibytes in done.stdout.split())
    matrix = 6144 ** 2 * 4 / 2 ** 20
    assert fused < matrix / 4 < matrix < fallback

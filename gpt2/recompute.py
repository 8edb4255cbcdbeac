"""Blocks whose activations are not kept: the backward pass computes them anew (GPT2_RECOMPUTE).

Kept of a block is its input alone, B x T x n_embd numbers a layer; all that its attention and MLP need for their gradients is
there for one block at a time. The price is a second forward pass of every block, about a third of a step's work.

Invariants: loss and gradients are those of the plain pass, bit for bit in eager mode, dropout included, because the second
pass draws from the same state of the generators. It sees what the first one saw, so `Context.handed` goes into a block and
comes out of it by value; and it leaves no trace: what modules remember of a pass (the router its mean, until `penalty` takes
it) is the first one's. Otherwise a graph of the second pass would live on, and all that it had just computed with it.

Source: gradient checkpointing, arXiv 1604.06174.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from gpt2.block import Context


def allow_in_programs() -> None:
    """Tell torch.compile what `recomputed` does in eager mode too: attributes are those of the first pass. It would not
    compile a block that sets one otherwise, and say nothing."""
    import torch._dynamo  # slow, and only needed here

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def recomputed(block: torch.nn.Module, x: torch.Tensor, context: Context, draws: bool) -> Any:
    """block(x) [B, T, n_embd] in training, without a cache; `context` is that of the pass. `draws` says whether the block draws
    random numbers (dropout): a state of the generators that is kept cannot be part of a CUDA graph."""
    run = _run if torch.compiler.is_compiling() else _leaving_no_second_trace()
    x, context.handed = checkpoint(run, block, x, context.embedding, context.handed, use_reentrant=False,
                                   preserve_rng_state=draws)
    return x


def _run(block: Any, x: torch.Tensor, embedding: torch.Tensor, handed: dict) -> Any:
    own = Context(embedding, dict(handed))
    return block(x, None, own), own.handed


def _leaving_no_second_trace() -> Any:
    """`_run` whose later calls leave the attributes of the block's modules as they were."""
    again = False

    def run(block: Any, *inputs: Any) -> Any:
        nonlocal again
        kept = [(module, dict(vars(module))) for module in block.modules()] if again else []
        again = True
        try:
            return _run(block, *inputs)
        finally:  # it ends in an exception as soon as the backward pass has all it needs
            for module, attributes in kept:
                vars(module).update(attributes)

    return run

"""Whether a model sees the future: how far outputs before a border move with tokens after it.

    moved = max over t <= border of |logits(x)_t - logits(x')_t| / max |logits|,    x and x' equal up to the border

x and every x' are rows of one batch, so the sums of a row are the same sums whatever stands in the others, and a causal model
moves by nothing but rounding. A sequence is as long as the caller gives it: what goes wrong only beyond a block of 64 tokens
is seen beyond 64 tokens. What this does not see: a leak at none of its borders, on none of its tokens, or in the other mode.
"""

from typing import TYPE_CHECKING

import torch

from lib import failures

if TYPE_CHECKING:
    from gpt2.model import GPT

WITHOUT_END = 1e9  # in a record, where no number is infinite


@torch.no_grad()
def moved(model: "GPT", tokens: torch.Tensor, borders: list[int] | None = None) -> tuple[float, int]:
    """(the largest movement, its border) of the model in its mode; tokens [T >= 2] on its device. Default borders: the middle,
    and a place that is no multiple of a power of two. A number that is not finite is a movement without end."""
    T = tokens.size(0)
    borders = sorted({min(T // 2, T - 2), min(5 * T // 8 + 1, T - 2)}) if borders is None else borders
    border = torch.tensor(borders, device=tokens.device)
    later = torch.arange(T, device=tokens.device) > border[:, None]
    logits = model(torch.cat([tokens[None], torch.where(later, (tokens + 1) % model.vocab_size, tokens)]))[0].float()
    if not logits.isfinite().all():
        return float("inf"), borders[0]
    movement = (logits[1:] - logits[:1]).abs().amax(2).masked_fill(later, 0).amax(1) / logits.abs().max()
    return movement.max().item(), borders[int(movement.argmax())]


def of_trained(model: "GPT", tokens: torch.Tensor) -> float | None:
    """`moved` of a model that has been trained, in evaluation mode and float32, without its compiled programs, which were not
    made for this; None where memory does not hold it."""
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.compiler.set_stance("force_eager"):
            return min(moved(model.eval(), tokens)[0], WITHOUT_END)
    except (MemoryError, RuntimeError) as error:
        if failures.kind(error) != failures.MEMORY:
            raise
        return None

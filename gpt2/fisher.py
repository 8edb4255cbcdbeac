"""The categorical Fisher matrix of attention: how spread out, and along how many keys, the attention of a head is.

    F_i = diag(p_i) - p_i p_i^T                 p_i: the softmax row of query position i, over T keys (0 beyond i)
    F   = mean of F_i over rows                 [T, T] a head and layer, float64
    trace = 1 - mean |p_i|^2,   eigmax = largest eigenvalue of F,   energy_r16 = share of the trace in the 16 largest

Rows: positions 1 to T - 1 of each window. Row 0 sees one key, its p is a delta by construction and its F_i is 0, so it would
only dilute the mean. p is taken from the model as it evaluates (no dropout), scores and softmax in float64.

How p is found: `F.scaled_dot_product_attention` is watched through torch's own TorchFunctionMode, so no module is changed and
none needs a second implementation that could differ from the first; p follows from the query, key, mask and scale that the
call was given. That holds for every mechanism whose heads are one such call a layer, however its weights were made (unified
RA, a reciprocal direction, tied keys, latents, lens). Which layers those are is not declared but tried, once a model: with
what the calls return replaced by zeros, no token may see another. Elsewhere the numbers are None, with the reason: a second
softmax beside the first (a direction that was never fixed), weights computed otherwise (latent band), another way between
tokens (random walk, pruned attention), attention that is switched off. What happens after the weighted sum (output gate,
self-restart, head weights of a router) is not in p.

Invariants: eigenvalues lie in [0, 1/2] and F 1 = 0, so F is singular and has no condition number; trace <= 1 - 1/T; with
T <= 17 energy_r16 is 1 by construction. An energy without a trace (every row a delta) is None.

Source: ra-mla-kvsplice-router-fim. What is not true of it: F is not the curvature of the loss. It is the Hessian of
logsumexp, and the Fisher information of one categorical distribution, in the scores of that row, and says nothing about
weights or about training. F of the mean also mixes rows: keys are counted by position, whatever token stands there, and rows
have different supports. Only the trace is the mean of the rows' own; eigmax is at most the mean of theirs, and a head that
attends sharply but elsewhere in each row looks flat. A "smoother" or "better conditioned" attention was read off one head
and random tokens. Heads have no identity over seeds: head 3 of one seed is not head 3 of another.
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gpt2.attention.baseline import causal_mask

if TYPE_CHECKING:
    from gpt2.model import GPT

METRICS = ("eigmax", "trace", "energy_r16")
RANK = 16
SUMS_BYTES = 2 ** 30  # of the matrices held at a time; a deeper model is passed over several times
ROUNDING = 1e-12  # a trace below this is that of deltas
LEAK = 1e-5  # of the largest logit: what float32 may differ by between two rows of a batch


class AttentionCalls(TorchFunctionMode):
    """While active, each scaled_dot_product_attention of `model` is answered by `answer(layer, query, key, value, ...)`."""

    def __init__(self, model: "GPT", answer: Callable[..., Any]):
        super().__init__()
        self.blocks, self.answer, self.hooks = model.transformer.h, answer, []
        self.layer: int | None = None

    def __enter__(self) -> Self:
        def enters(layer: int) -> Callable[..., None]:
            def hook(module: Any, inputs: Any) -> None:
                self.layer = layer
            return hook

        self.hooks = [block.register_forward_pre_hook(enters(layer)) for layer, block in enumerate(self.blocks)]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*raised)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return self.answer(self.layer, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def softmax_rows(query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
                 is_causal: bool = False, scale: float | None = None) -> torch.Tensor:
    """The weights [B, H, T, S], float64, with which such a call sums its values; without dropout."""
    scores = query.double() @ key.double().mT * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = causal_mask(query.size(-2), 0, query.device)
    if attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask.isfinite()
        scores = (scores if seen is attn_mask else scores + attn_mask).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1)


def covariances(p: torch.Tensor) -> torch.Tensor:
    """Sum over rows of diag(p) - p p^T: p [H, rows, T] -> [H, T, T]."""
    return torch.diag_embed(p.sum(1)) - p.mT @ p


def spectrum(matrices: torch.Tensor) -> dict:
    """{metric: [H]} of symmetric matrices [H, T, T], float64; an energy without a trace is nan."""
    values = torch.linalg.eigvalsh(matrices).clamp_min(0)  # ascending; below zero by rounding only
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    energy = (values[:, -RANK:].sum(1) / trace).clamp_max(1).masked_fill(trace < ROUNDING, torch.nan)
    return {"eigmax": values[:, -1], "trace": trace, "energy_r16": energy}


@torch.no_grad()
def undefined(model: "GPT", idx: torch.Tensor) -> dict[int, str]:
    """{layer: why its heads have no p of this form}; idx [1, T] is any window."""
    calls = Counter()

    def silent(layer: Any, query: torch.Tensor, key: torch.Tensor, value: Any, *args: Any, **options: Any) -> torch.Tensor:
        calls[layer] += 1
        return query.new_zeros(*query.shape[:-1], value.size(-1))

    with AttentionCalls(model, silent):
        every_other = torch.arange(idx.size(1), device=idx.device) % 2
        logits = model.eval()(torch.cat([idx, torch.where(every_other == 1, idx, (idx + 1) % model.vocab_size)]))[0]
    moved = (logits[0] - logits[1])[1::2].abs().max()
    leaks = not moved <= LEAK * logits.abs().max()
    found = {}
    for layer, block in enumerate(model.transformer.h):
        if not block.attn.on:
            found[layer] = "attention is switched off"
        elif block.attn.pruning is not None:
            found[layer] = "KV pruning takes its softmax block by block, over what is left"
        elif not calls[layer]:
            found[layer] = "its weights are not those of a scaled_dot_product_attention"
        elif calls[layer] > 1:
            found[layer] = f"it has {calls[layer]} softmaxes over positions"
        elif leaks:
            found[layer] = "tokens reach each other beside the softmax"
    return found


@torch.no_grad()
def mean_matrices(model: "GPT", windows: Any, layers: Any) -> dict:
    """{layer: F [H, T, T]} of these layers over windows [n, T]; one window at a time."""
    sums = {}

    def collect(layer: Any, query: torch.Tensor, key: torch.Tensor, value: Any, *args: Any, **options: Any) -> torch.Tensor:
        if layer in layers:
            p = softmax_rows(query, key, *args, **options)[:, :, 1:].transpose(0, 1).flatten(1, 2)
            sums[layer] = covariances(p) if layer not in sums else sums[layer].add_(covariances(p))
        return F.scaled_dot_product_attention(query, key, value, *args, **options)

    with AttentionCalls(model.eval(), collect):
        for window in windows:
            model(window[None])
    return {layer: total / (windows.size(0) * (windows.size(1) - 1)) for layer, total in sums.items()}


def measure(model: "GPT", windows: Any) -> tuple[dict, dict[int, str]]:
    """({metric name: number or None} of every head, {layer: why it has none}); windows [n, T] int64 on the model's device.

    Names are fisher/layer<l>/head<h>/<metric>. ValueError for windows of fewer than two tokens.
    """
    if windows.size(1) < 2:
        raise ValueError("a window of one token has no row but a delta")
    heads, reasons = model.transformer.h[0].attn.n_head, undefined(model, windows[:1])
    defined = [layer for layer in range(len(model.transformer.h)) if layer not in reasons]
    at_once = max(1, SUMS_BYTES // (8 * heads * windows.size(1) ** 2))
    numbers = {}
    for start in range(0, len(defined), at_once):
        matrices = mean_matrices(model, windows, defined[start:start + at_once])
        for layer in list(matrices):
            numbers[layer] = {name: values.tolist() for name, values in spectrum(matrices.pop(layer)).items()}
    found = {}
    for layer in range(len(model.transformer.h)):
        for head in range(heads):
            for name in METRICS:
                value = numbers[layer][name][head] if layer in numbers else None
                found[f"fisher/layer{layer}/head{head}/{name}"] = None if value != value else value
    return found, reasons

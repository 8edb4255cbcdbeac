"""What a token's route is worth: of each token and layer of a router (gpt2/attention/router.py), beside what the router saw.

    benefit_t = -(d sum of the next-token losses of the sequence) / (d p_full of token t in this layer)

by how much the losses fall, to first order, if this token alone is sent a little more through the full path here: its own and
those of the later tokens that read from it. One backward pass gives it for all tokens and layers. The shift of a token is
the router's first feature, |x - e|: how far context has moved it from its embedding.

    rho_shift    rank correlation (Spearman) of benefit and shift over tokens
    rho_p_full   of benefit and p_full, the choice: above 0 where the router sends to the full path who gains by it
    p_full       its mean

Position 0 is left out: nothing has moved it. Correlations of independent numbers would lie within 2 / sqrt(tokens) of 0;
tokens of a text are not independent, so it is the spread over seeds that says what is chance.

What is not true of it: that a benefit says what another router would have learned. It is a slope at the routes as they are.

Source of the question: ra-mla-kvsplice-router-fim, "Router-Based RA (Deprecated)".
"""

from typing import TYPE_CHECKING, Any

import torch

from gpt2.attention.router import RouterAttention, features

if TYPE_CHECKING:
    from gpt2.model import GPT

METRICS = ("rho_shift", "rho_p_full", "p_full")


def routers(model: "GPT") -> dict[int, RouterAttention]:
    """The layers that have one."""
    return {number: block.attn for number, block in enumerate(model.transformer.h) if isinstance(block.attn, RouterAttention)}


def benefits(model: "GPT", inputs: torch.Tensor, targets: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """{layer: {"benefit", "shift", "p_full"}}, each [n, T], of windows [n, T] in evaluation mode, a window at a time."""
    found: dict[int, dict[str, list]] = {layer: {"benefit": [], "shift": [], "p_full": []} for layer in routers(model)}
    seen: dict[int, tuple] = {}
    handles = []
    for layer, attention in routers(model).items():
        def keep(module: Any, arguments: tuple, p_full: torch.Tensor, layer: int = layer) -> torch.Tensor:
            p_full = p_full.detach().requires_grad_()  # the slope is in the choice, not in what chose it
            seen[layer] = (features(*(argument.detach().float() for argument in arguments))[..., 0], p_full)
            return p_full
        handles.append(attention.router.register_forward_hook(keep))
    try:
        for x, y in zip(inputs, targets, strict=True) if found else ():
            loss = model.eval()(x[None], y[None])[1] * x.numel()  # the sum over tokens
            slopes = torch.autograd.grad(loss, [p for _, p in seen.values()], materialize_grads=True)
            for (layer, (shift, p_full)), slope in zip(seen.items(), slopes, strict=True):
                for name, value in (("benefit", -slope), ("shift", shift), ("p_full", p_full.detach())):
                    found[layer][name].append(value.flatten())
    finally:
        for handle in handles:
            handle.remove()
    return {layer: {name: torch.stack(rows) for name, rows in one.items()} for layer, one in found.items()}


def measure(model: "GPT", inputs: torch.Tensor, targets: torch.Tensor) -> tuple[dict, dict[int, str]]:
    """({routing/layer<l>/<metric>: number or None}, {layer: why it has none})."""
    from scipy.stats import spearmanr

    found, undefined = {}, {}
    for layer, one in benefits(model, inputs, targets).items():
        benefit, shift, p_full = (one[name][:, 1:].flatten().double().cpu().numpy() for name in ("benefit", "shift", "p_full"))
        values: tuple = (None, None, None)
        if not routers(model)[layer].routing > 0:
            undefined[layer] = "routing never began"
        elif not benefit.std() > 0 or not p_full.std() > 0:
            undefined[layer] = "all tokens are routed alike"
        else:
            values = (spearmanr(benefit, shift).statistic, spearmanr(benefit, p_full).statistic, p_full.mean())
        found |= {f"routing/layer{layer}/{name}": None if value is None else float(value)
                  for name, value in zip(METRICS, values, strict=True)}
    return found, undefined

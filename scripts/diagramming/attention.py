"""Reciprocal attention: the rows of its folded projection, its operations beside the baseline's, one step of self-restart."""

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from scripts.diagramming.canvas import INK, NEUTRAL, REC, SOFT, STD, VALUE, WIDTH, Sheet, panels
from scripts.diagramming.sources import Sources

if TYPE_CHECKING:
    import torch
    from torch import nn

STUDY = "gpt2-ra-ablation"
TOKENS = 8  # of the matrices of self-restart


def folded_layout(sources: Sources) -> Figure:
    """Which rows of the fused projection are whose, and which blocks meet in a score."""
    step = sources.first(STUDY, "ATTENTION_UNIFIED_RA")
    attention: Any = sources.block(STUDY, step).attn
    d_std, low = attention.D_std, attention.R
    scale = attention.row_scale().detach()  # of the rows of Qf, head by head, then of Kf and of V
    g_std, g_low = float(scale[0]), float(scale[d_std])
    heads, width = attention.n_head, attention.n_embd
    rows, columns = attention.c_attn.weight.shape
    sheet = Sheet("Folded query and key layout", f"One head of {step}: {attention.head_dim} channels, {low} of them reciprocal "
                  f"(not to scale). Two block products make a score.", 4.7)
    left, whole = 1.0, 5.0
    split = whole * (0.62 if low * 2 < attention.head_dim else 0.5)
    for y, name, parts in ((3.3, "Qf", ("Q_std", "K_low")), (2.25, "Kf", ("K_std", "Q_low"))):
        sheet.text(left - 0.3, y + 0.25, name, fontweight="bold", fontsize=12)
        sheet.bar(left, y, split, 0.5, STD, f"{parts[0]}: {d_std} channels")
        sheet.bar(left + split, y, whole - split, 0.5, REC, f"{parts[1]}: {low} channels")
    for x, colour in ((left + split / 2, STD), (left + split + (whole - split) / 2, REC)):
        sheet.arrow((x, 3.3), (x, 2.75), colour, arrowstyle="<|-|>")
    sheet.text(left + split / 2 + 0.12, 3.02, f"w_std = {g_std ** 2:.4g} at the start", ha="left", fontsize=9.5)
    sheet.text(left + split + (whole - split) / 2 + 0.12, 3.02, f"w_rec = {g_low ** 2:.4g}", ha="left", fontsize=9.5)
    sheet.text(left + whole + 0.2, 3.55, "the gate's root\nmultiplies rows\nof Qf and of Kf", ha="left", fontsize=9.5,
               color=SOFT)
    sheet.text(left, 1.9, f"score_ij = ( w_std <q_std_i, k_std_j> + w_rec <k_low_i, q_low_j> ) / sqrt({attention.head_dim})",
               ha="left", fontsize=11)
    sheet.text(left, 1.4, f"The fused projection, {rows:,} x {columns:,}: one matmul", ha="left", fontsize=10, color=SOFT)
    third = (WIDTH - left - 0.4) / 3
    for i, (name, colour) in enumerate((("Qf", STD), ("Kf", STD), ("V", VALUE))):
        x = left + i * third
        sheet.bar(x, 0.72, third, 0.45, colour, "" if i < 2 else f"{heads} x {attention.head_dim}")
        if i < 2:  # the reciprocal rows of every head, to scale
            per_head = third / heads
            for head in range(heads):
                share = low / attention.head_dim
                sheet.bar(x + (head + 1 - share) * per_head, 0.72, share * per_head, 0.45, REC, share=0.9)
        sheet.text(x + third / 2, 0.5, f"{name}: rows {i * width:,} to {(i + 1) * width - 1:,}", fontsize=9.5)
    sheet.text(left, 0.2, f"orange: the reciprocal rows, to scale; {heads} heads x ({d_std} + {low})", ha="left", fontsize=9.5,
               color=SOFT)
    return sheet.figure


def operations(module: "nn.Module", batch: int, tokens: int, width: int) -> list[tuple[str, tuple, tuple]]:
    """(operation, shape in, shape out) of the matmuls and attentions of one forward pass, as the module really calls them."""
    import torch
    from torch.overrides import TorchFunctionMode

    found: list[tuple[str, tuple, tuple]] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = call(*args, **(kwargs or {}))
            name = getattr(call, "__name__", "")
            if name in ("linear", "scaled_dot_product_attention"):
                found.append((name, tuple(args[0].shape), tuple(out.shape)))
            return out

    with Recorder(), torch.no_grad():
        module(torch.empty(batch, tokens, width))
    return found


def forward_pass(sources: Sources) -> Figure:
    """The operations of both attentions on activations, recorded from a call, and what acts on the weight side."""
    step, base = sources.first(STUDY, "ATTENTION_UNIFIED_RA"), sources.baseline(STUDY)
    modules: dict[str, Any] = {one: sources.block(STUDY, one).attn for one in (base, step)}
    batch, tokens = 1, 16
    sheet = Sheet("Forward pass of the attention", "Matmuls and attentions recorded from a call of both modules; "
                  "B sequences of T tokens.", 4.75)
    of = {batch: "B", tokens: "T"}

    def shape(sizes: tuple) -> str:
        return " x ".join(of.get(n, str(n)) for n in sizes)

    def sized(name: str, at: int) -> tuple[str, str]:
        return {"linear": ("projection" if at == 0 else "output projection", NEUTRAL),
                "scaled_dot_product_attention": ("SDPA, causal", VALUE)}[name]

    for column, (one, module) in enumerate(modules.items()):
        x, w = 0.3 + column * 2.95, 2.5
        calls = operations(module, batch, tokens, module.n_embd)
        sheet.text(x + w / 2, 3.85, f"{one}: {len(calls)} operations", fontweight="bold", fontsize=11)
        y = 3.0
        sheet.box(x, y + 0.2, w, 0.38, f"x  {shape((batch, tokens, module.n_embd))}", INK, 0.03)
        for at, (name, _, out) in enumerate(calls):
            y -= 0.95
            word, colour = sized(name, at)
            sheet.arrow((x + w / 2, y + (1.15 if at == 0 else 0.95)), (x + w / 2, y + 0.65))
            sheet.box(x, y, w, 0.65, f"{word}\n{shape(out)}", colour)
    module = modules[step]
    gates = sum(getattr(module, name).numel() for name in module.gate_parameters)
    x = 0.3 + 2 * 2.95
    rows, columns = module.c_attn.weight.shape
    sheet.text(x + 1.1, 3.85, "weight side", fontweight="bold", fontsize=11)
    sheet.box(x + 0.2, 1.95, 1.8, 0.85, f"rows x gate\n{rows} x {columns}\n{gates} gates a layer", REC, fontsize=9.5)
    sheet.arrow((x + 0.2, 2.375), (x - 0.45, 2.375), REC)
    sheet.text(x + 1.1, 1.45, "as the weight is cast\nfor the matmul; no\nactivation is touched", fontsize=9.5, color=SOFT)
    return sheet.figure


def mixing(attention: Any, tokens: int, seed: int = 0) -> tuple["torch.Tensor", float]:
    """([T, T] weights that the first head's values are mixed with by the softmax alone, share a of self-restart), of a module
    as it starts, for random inputs of variance one, which is what a norm hands it."""
    import torch

    x = torch.randn(1, tokens, attention.n_embd, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        q, k, _ = attention.project(x)
        scores = q[0, 0] @ k[0, 0].T * attention.head_dim ** -0.5
        ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        return scores.masked_fill(ahead, float("-inf")).softmax(-1), float(attention.rwr_alpha[0])


def rwr_concept(sources: Sources) -> Figure:
    """What one step of self-restart does to the weights of the values."""
    import torch
    from matplotlib.colors import LinearSegmentedColormap

    from gpt2.attention.unified_ra import RESTART_MAX

    step = sources.first(STUDY, "RA_SELF_RESTART")
    weights, share = mixing(sources.block(STUDY, step).attn, TOKENS)
    own = torch.eye(TOKENS)
    figure, axes = panels(
        "One step of self-restart", f"out = (1 - a) A V + a V: {step}'s first head as it starts, on {TOKENS} random tokens.",
        3.6, columns=3, left=0.55, right=0.2, bottom=0.55, space=(0.22, 0), top=0.3)
    colours = LinearSegmentedColormap.from_list("paper to blue", ["#ffffff", STD])
    shown = ((0.0, "A, the softmax"), (share, f"a = {share:.2f}, the start"), (RESTART_MAX, f"a = {RESTART_MAX:g}, the bound"))
    for ax, (a, title) in zip(axes, shown, strict=True):
        mixed = (1 - a) * weights + a * own
        ax.imshow(mixed.numpy(), cmap=colours, vmin=0, vmax=1)
        for i in range(TOKENS):
            for j in range(i + 1):
                value = float(mixed[i, j])
                ax.text(j, i, f"{value:.2f}".removeprefix("0").removesuffix(".00"), ha="center", va="center", fontsize=7.5,
                        color="#ffffff" if value > 0.8 else INK, fontweight="bold" if i == j else "normal")
        ax.set_title(title, fontsize=10.5)
        ax.set_xticks(range(TOKENS), [str(t) for t in range(TOKENS)])
        ax.set_yticks(range(TOKENS), [str(t) for t in range(TOKENS)])
        ax.tick_params(length=0)
        ax.set_xlabel("value of token")
    axes[0].set_ylabel("output at token")
    return figure

"""The laws every step must obey, checked on the CPU in float32 in a second or two a step.

Sizes are checked on the full model on the meta device; behaviour on the same classes at the study's width and heads, cut
to 2 layers, a vocabulary of 512 and a context of 32, so that the borders between blocks of tokens are crossed. Architecture
is what they judge, so every step starts from the same streams, also one that trains under others (STREAMS).

A start hides things: a gate at 0 makes a step the baseline, and what it would let through is not there to be seen. So
causality and decoding are asked of the start, and again of weights far from it; and causality once more at the study's own
context, for what goes wrong only beyond some number of tokens.

A law is a function that takes a Subject and returns None, or one sentence on how the step breaks it. LAWS lists them in
order; scripts/check.py runs them.
"""

import io
import math
import pkgutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from gpt2.causality import moved
from gpt2.function_class import simplest
from gpt2.model import GPT, expected_parameters
from lib import optimizers

if TYPE_CHECKING:
    from lib.config import Config

SMALL = {"GPT2_N_LAYER": 2, "VOCAB_SIZE": 512, "GPT2_BLOCK_SIZE": 32, "STREAMS": 0, "GPT2_DROPOUT": 0.1}
BATCH = 1  # `causality` adds rows, and so shows that rows do not see each other
TOLERANCE = 2e-5  # of logits of size 1, between two orders of float32 sums
SEQUENCES = 16  # after how many of them what has no gradient is dead
SHAKEN = {1: 0.3, 2: 0.04}  # standard deviation of what is added to vectors, and to matrices (which start at 0.02)
CHUNKS = (9, 1, 1, 7)  # cached decoding: a prompt, single tokens, a chunk on a prefix, then the rest


@dataclass
class Subject:
    """A step under test. `reference` is the baseline's start; None for the baseline itself."""

    step: str
    cfg: "Config"
    equals: str | None = None
    reference: "Subject | None" = None
    depth: dict = field(default_factory=lambda: dict(SMALL))

    def __post_init__(self) -> None:
        self.small = self.cfg.replace(**self.depth)
        with torch.device("meta"):
            self.full = GPT(self.cfg)
        self.model = GPT(self.small)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH, self.small.GPT2_BLOCK_SIZE + 1)
        tokens = torch.randint(self.small.VOCAB_SIZE, shape, generator=generator)
        self.x, self.y = tokens[:, :-1], tokens[:, 1:]
        self.start_logits = self.logits(self.x)

    @property
    def parameters(self) -> int:
        """Parameters of the full model."""
        return sum(p.numel() for p in self.full.parameters())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the full model's cache for one sequence, in a 2-byte type."""
        return self.full.new_cache(1, dtype=torch.bfloat16).nbytes()

    @torch.no_grad()
    def logits(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return self.model.eval()(x, cache=cache)[0]


def parameter_count(s: Subject) -> str | None:
    found, expected = s.parameters, expected_parameters(s.cfg)
    return None if found == expected else f"the full model has {found} parameters, its formula says {expected}"


def cache_bytes(s: Subject) -> str | None:
    layer = pkgutil.resolve_name(s.cfg.BLOCK_CLASS).cache_bytes_per_token(s.cfg, itemsize=2)
    found, expected = s.cache_bytes, s.cfg.GPT2_N_LAYER * s.cfg.GPT2_BLOCK_SIZE * layer
    return None if found == expected else f"the cache holds {found} bytes, its formula says {expected}"


def same_start(s: Subject) -> str | None:
    """Equal starting points: what has the baseline's name and shape starts with the baseline's numbers."""
    for name, tensor in s.start.items():
        other = s.reference.start.get(name) if s.reference else None
        if other is not None and other.shape == tensor.shape and not torch.equal(other, tensor):
            return f"{name} does not start where the baseline's starts"
    return None


def dropout(s: Subject) -> str | None:
    """Every part of a block drops as much as the configuration says: an arm that drops less is another regulariser."""
    for number, block in enumerate(s.model.transformer.h):
        for name in ("attn", "mlp"):
            part = getattr(block, name)
            shares = [module.p for module in part.modules() if isinstance(module, torch.nn.Dropout)] if part is not None else []
            if part is not None and set(shares) != {s.small.GPT2_DROPOUT}:
                dropped = " and ".join(f"{share:g}" for share in sorted(set(shares))) or "nothing"
                return f"{name} of layer {number} drops {dropped} of what it puts out, not {s.small.GPT2_DROPOUT:g}"
    return None


def differs(s: Subject) -> str | None:
    """A step differs from the baseline in its parameters or its function, unless it declares to equal it."""
    if s.reference is None:
        return None
    shapes = [{name: t.shape for name, t in one.start.items()} for one in (s, s.reference)]
    same = shapes[0] == shapes[1] and torch.equal(s.start_logits, s.reference.start_logits)
    declared = s.equals is not None and s.equals in (s.reference.step, s.reference.equals)
    if same and not declared:
        return f"it is {s.reference.step} in disguise: the same parameters and the same function"
    return f"it declares to equal {s.equals}, but differs from it" if declared and not same else None


def initial_loss(s: Subject) -> str | None:
    loss = F.cross_entropy(s.start_logits.flatten(0, 1), s.y.flatten()).item()
    expected = math.log(s.small.VOCAB_SIZE)
    return None if abs(loss - expected) < 0.5 else f"the loss starts at {loss:.3f}, far from ln(vocabulary) = {expected:.3f}"


@torch.no_grad()
def causality(s: Subject) -> str | None:
    """No output at t depends on a token after t: rows that differ only after a border agree up to it."""
    T = s.x.size(1)
    if sentence := looks_ahead(s.model, s.x[0], [0, T // 2, T - 2]):
        return sentence
    s.model.train()
    outputs = []
    later = torch.arange(T) > T // 2
    for tokens in (s.x[:1], torch.where(later, (s.x[:1] + 1) % s.small.VOCAB_SIZE, s.x[:1])):
        torch.manual_seed(0)  # the same dropout in both
        outputs.append(s.model(tokens)[0][:, :T // 2 + 1])
    worst = (outputs[0] - outputs[1]).abs().max().item()
    return None if worst <= TOLERANCE else f"in train mode, outputs up to position {T // 2} move by {worst:.1e}"


def looks_ahead(model: GPT, tokens: torch.Tensor, borders: list[int] | None = None) -> str | None:
    movement, border = moved(model.eval(), tokens, borders)
    if movement <= TOLERANCE:
        return None
    return f"outputs up to position {border} move by {movement:.1e} of the largest logit with tokens after it"


def decoding(s: Subject) -> str | None:
    """Decoding with a cache, in chunks and single tokens, equals the full forward pass."""
    cache, whole, parts, at = s.model.new_cache(BATCH, dtype=torch.float32), s.logits(s.x), [], 0
    for size in (*CHUNKS, s.x.size(1) - sum(CHUNKS)):
        parts.append(s.logits(s.x[:, at:at + size], cache))
        at += size
    worst = ((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max().clamp_min(1.0)).item()
    return None if worst <= TOLERANCE else f"cached decoding differs from the full forward pass by {worst:.1e}"


def gradients(s: Subject) -> str | None:
    """Every parameter gets a finite gradient, in every row; declared exceptions are elements that cannot get one.

    A feature behind a ReLU may be off for all tokens of so short a sequence. For other tokens, or the negative of their
    embeddings, it is on; what has no gradient from any of them is dead.
    """
    embeddings = [s.model.transformer.wte.weight, s.model.transformer.wpe.weight]
    kept = [weight.detach().clone() for weight in embeddings]
    s.model.train()
    torch.manual_seed(0)
    for sequence in range(SEQUENCES):
        x, y = ((tokens + sequence) % s.small.VOCAB_SIZE for tokens in (s.x, s.y))
        s.model(x, y)[1].backward()  # adds to the gradients so far
        sentence = without_gradient(s.model)
        if sentence is None:
            break
        with torch.no_grad():
            torch._foreach_neg_(embeddings)
    with torch.no_grad():
        torch._foreach_copy_(embeddings, kept)
    return sentence


def without_gradient(model: torch.nn.Module) -> str | None:
    """The first parameter of the model that has no gradient, or none in some row, but for declared exceptions."""
    exempt = {f"{prefix}.{name}": part for prefix, module in model.named_modules() if hasattr(module, "dead_elements")
              for name, part in module.dead_elements().items()}
    for name, p in model.named_parameters():
        if p.grad is None:
            return f"{name} receives no gradient"
        if not torch.isfinite(p.grad).all():
            return f"{name} receives a gradient that is not finite"
        rows = p.grad.detach().flatten(1).norm(dim=1) if p.ndim > 1 else p.grad.detach().abs().clone()
        if name in exempt:
            rows[exempt[name]] = rows.max()
        dead = int((rows <= 1e-7 * rows.max()).sum()) if rows.max() > 0 else len(rows)
        if dead:
            return f"{dead} of {len(rows)} rows of {name} receive no gradient"
    return None


def optimizer_step(s: Subject) -> str | None:
    """One step of the study's optimizer moves every parameter and keeps it finite. Needs `gradients` before it."""
    optimizers.build(s.model, s.small).step()
    for name, p in s.model.named_parameters():
        if not torch.isfinite(p).all():
            return f"{name} is not finite after one step"
        if torch.equal(p, s.start[name]):
            return f"{name} does not move in one step"
    return None


def save_and_load(s: Subject) -> str | None:
    """The trained state, written and read back into a new model, computes the same bits."""
    file = io.BytesIO()
    torch.save(s.model.state_dict(), file)
    file.seek(0)
    few = s.x[:, :8]
    before = s.logits(few)
    with torch.device("meta"):
        fresh = GPT(s.small)
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=True)
    with torch.no_grad():
        after = fresh.eval()(few)[0]
    return None if torch.equal(before, after) else "a saved and loaded model computes something else"


@torch.no_grad()
def function_class(s: Subject) -> str | None:
    """The trained model, collapsed, is the simplest configuration's model in every tensor and computes the same logits."""
    plain = s.model.collapse()
    with torch.device("meta"):
        expected = GPT(simplest(s.small)[0])
    shapes, said = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (plain, expected))
    if different := sorted(name for name in shapes.keys() | said.keys() if shapes.get(name) != said.get(name)):
        return f"it collapses to another model than gpt2/function_class.py states: {different[0]}"
    worst = (plain.eval()(s.x)[0] - s.logits(s.x)).abs().max().item()
    return None if worst <= TOLERANCE else f"the model that it collapses to differs from it by {worst:.1e}"


@torch.no_grad()
def shake(model: GPT) -> GPT:
    """Move every parameter far from its start, by the same numbers each time."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=SHAKEN[min(p.ndim, 2)])
    return model


def away_from_the_start(s: Subject) -> str | None:
    """Causality and decoding of weights that a training could reach. Needs to be the last law that asks this model."""
    shake(s.model)
    for law in (causality, decoding):
        if sentence := law(s):
            return f"with weights away from their start, {sentence}"
    return None


def whole_context(s: Subject) -> str | None:
    """Causality at the study's own context, of weights away from their start."""
    T = s.cfg.GPT2_BLOCK_SIZE
    if T <= s.small.GPT2_BLOCK_SIZE:
        return None
    model = shake(GPT(s.small.replace(GPT2_BLOCK_SIZE=T)))
    tokens = torch.randint(s.small.VOCAB_SIZE, (T,), generator=torch.Generator().manual_seed(0))
    sentence = looks_ahead(model, tokens, [5 * T // 8 + 1])
    return sentence and f"at the context of {T}, {sentence}"


LAWS = (parameter_count, cache_bytes, same_start, dropout, differs, initial_loss, causality, decoding, gradients,
        optimizer_step, save_and_load, function_class, away_from_the_start, whole_context)


def broken_laws(subject: Subject) -> list[str]:
    """Every law the step breaks, as 'law: sentence'. A law that cannot be computed is broken."""
    found = []
    for law in LAWS:
        try:
            sentence = law(subject)
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}"
        if sentence:
            found.append(f"{law.__name__}: {sentence}")
    return found

"""GPT-2 in the files of Hugging Face's transformers: model.safetensors and config.json.

Contract: what `tensors` gives of a model, `read` gives back to the bit, and transformers' GPT2LMHeadModel computes the same
logits from it. Only what is GPT-2 in function can be written (`plain`); a step's gates, mixers and ranks are folded into the
weights. `start` lays such weights into a model of any step: a step that can represent them computes what they compute, with
its gates where its configuration starts them; tensors that they do not have keep their own start.

What differs between the two: transformers keeps the weights of products transposed (Conv1D), always has biases, and has no rows
for ids beyond the vocabulary. Source: transformers, models/gpt2 (configuration_gpt2, modeling_gpt2).
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2.coupling import set_ra_mlp_coupling_scale
from gpt2.function_class import PLAIN_ATTENTION, PLAIN_MLP, simplest
from gpt2.model import GPT, padded_vocabulary
from gpt2.rules import hidden_width
from lib.errors import UserError
from lib.paths import shown

if TYPE_CHECKING:
    from lib.config import Config

WEIGHTS, CONFIGURATION = "model.safetensors", "config.json"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, in older files
# What would make another function of the same tensors, with the value of GPT-2.
GPT2 = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function


LARGEST = 1_000_000  # of a size: a file may say anything
SIZES = ("n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size")


def _is_size(value: Any, name: str) -> bool:
    return name == "n_inner" and value is None or type(value) is int and 0 < value <= LARGEST


def plain(model: GPT, cfg: "Config") -> GPT:
    """GPT-2 itself that computes what `model` of the configuration `cfg` computes. UserError where no GPT-2 does."""
    simple, _ = simplest(cfg)
    parts = {"block": (simple.BLOCK_CLASS, "gpt2.block:Block"), "attention": (simple.ATTENTION_CLASS, PLAIN_ATTENTION),
             "MLP": (simple.MLP_CLASS, PLAIN_MLP), "KV pruning": (simple.KV_PRUNING_CLASS, None),
             "compression of values": (simple.KVSPLICE_CLASS, None)}
    other = [f"{part} ({there})" for part, (there, wanted) in parts.items() if (there or None) != wanted]
    if other:
        raise UserError(f"this step is no GPT-2 in function: its {', its '.join(other)} has no place in transformers' GPT-2.",
                        "use the cell's model.pt with this project (gpt2/trained.py), or export a step whose function class is "
                        "V0 or inside it (make list-steps).")
    found = GPT(simple)
    collapsed = model.collapse().state_dict()
    if {n: t.shape for n, t in collapsed.items()} != {n: t.shape for n, t in found.state_dict().items()}:
        raise UserError("parts of this model were switched off in training, so its tensors are not GPT-2's.",
                        "use the cell's model.pt with this project (gpt2/trained.py).")
    found.load_state_dict(collapsed)
    return found.eval()


def configuration(cfg: "Config", mark: int, **more: Any) -> dict:
    """config.json of a plain GPT-2 of this configuration; `mark` is the id between two documents."""
    dropout = float(cfg.GPT2_DROPOUT)
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": cfg.GPT2_N_LAYER, "n_head": cfg.GPT2_N_HEAD, "n_embd": cfg.GPT2_N_EMBD, "n_inner": hidden_width(cfg),
        "n_positions": cfg.GPT2_BLOCK_SIZE, "vocab_size": cfg.VOCAB_SIZE, "bos_token_id": mark, "eos_token_id": mark,
        "attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout, "initializer_range": 0.02, "dtype": "float32",
        **GPT2, **more}


def tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Those of a plain GPT-2 under transformers' names, in float32, without the padding of the vocabulary."""
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    found = {}
    for name, tensor in state.items():
        if name == "transformer.wte.weight":
            tensor = tensor[:model.vocab_size]
        found[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and bias not in state and name.split(".")[1] not in ("wte", "wpe"):
            found[bias] = torch.zeros(len(tensor))
    return found


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config.json, tensors under this project's names and in its layout, float32) of a folder as transformers writes it.

    UserError if it holds no GPT-2, or not what its configuration says.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("reading a folder of transformers needs safetensors, which is not installed.",
                        "pip install safetensors.") from None
    try:
        known = json.loads((folder / CONFIGURATION).read_text())
        kind = known.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{shown(folder)} holds no {CONFIGURATION} that can be read ({type(error).__name__}).",
                        "give a folder as transformers' save_pretrained or make export writes it.") from None
    if kind != "gpt2" or known.get("activation_function", "gelu_new") not in TANH_GELU:
        raise UserError(f"{shown(folder)} is not GPT-2: model_type {kind!r}, activation "
                        f"{known.get('activation_function', 'gelu_new')!r}.", "give a folder with a GPT-2 of the tanh GELU.")
    if other := [f"{name} {known[name]!r}" for name, value in GPT2.items() if known.get(name, value) != value]:
        raise UserError(f"{shown(folder)} is no plain GPT-2: {', '.join(other)}.", "give a folder with a GPT-2 as released.")
    if wrong := next((name for name in SIZES if name in known and not _is_size(known[name], name)), None):
        raise UserError(f"{shown(folder / CONFIGURATION)} has {wrong} {known[wrong]!r}.", "copy it anew.")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{shown(folder)} has no {WEIGHTS}; other files, and files in parts, are not read.",
                        "save it with save_pretrained(folder, safe_serialization=True, max_shard_size='100GB').")
    try:
        held = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{shown(folder / WEIGHTS)} cannot be read: {error}.", "copy it anew.") from None
    found = {}
    for name, tensor in held.items():
        if name == "lm_head.weight" or name.endswith(BUFFERS):
            continue
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        tensor = tensor.float()
        found[name] = (tensor.T if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor).contiguous()
    shapes = expected(known)
    wrong = next((n for n in sorted(shapes.keys() | found.keys())
                  if n not in found or tuple(found[n].shape) != shapes.get(n)), None)
    if wrong:
        raise UserError(f"{shown(folder / WEIGHTS)} is not what {CONFIGURATION} beside it says: {wrong} is "
                        f"{list(found[wrong].shape) if wrong in found else 'missing'}.", "copy both anew.")
    head = held.get("lm_head.weight")
    if head is not None and not torch.equal(head.float(), found["transformer.wte.weight"]):
        raise UserError(f"the head of {shown(folder)} is not its embedding, and here the two are one.",
                        "give a GPT-2 with tied embeddings.")
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise UserError(f"{shown(folder / WEIGHTS)} holds numbers that are not finite.", "give other weights.")
    return known, found


def expected(known: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, in this project's layout, that a config.json announces."""
    E, L = known.get("n_embd", 768), known.get("n_layer", 12)
    d_ff = known.get("n_inner") or 4 * E
    layer = {"ln_1.weight": (E,), "ln_1.bias": (E,), "attn.c_attn.weight": (3 * E, E), "attn.c_attn.bias": (3 * E,),
             "attn.c_proj.weight": (E, E), "attn.c_proj.bias": (E,), "ln_2.weight": (E,), "ln_2.bias": (E,),
             "mlp.c_fc.weight": (d_ff, E), "mlp.c_fc.bias": (d_ff,), "mlp.c_proj.weight": (E, d_ff), "mlp.c_proj.bias": (E,)}
    found = {"transformer.wte.weight": (known.get("vocab_size", 50257), E),
             "transformer.wpe.weight": (known.get("n_positions", 1024), E),
             "transformer.ln_f.weight": (E,), "transformer.ln_f.bias": (E,)}
    return found | {f"transformer.h.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}


def digest(folder: Path) -> str:
    """sha256 of the weights' file."""
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fitted(known: dict, held: dict[str, torch.Tensor], cfg: "Config", folder: Path) -> dict[str, torch.Tensor]:
    """The tensors for a model of `cfg`: the context cut, the vocabulary padded. UserError where sizes do not fit.

    A padding row is the mean of the others: pretrained logits lie far below zero, where a fresh row would not.
    """
    sizes = {"n_layer": cfg.GPT2_N_LAYER, "n_head": cfg.GPT2_N_HEAD, "n_embd": cfg.GPT2_N_EMBD, "vocab_size": cfg.VOCAB_SIZE,
             "n_inner": hidden_width(cfg)}
    defaults = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_inner": 4 * cfg.GPT2_N_EMBD}
    for name, wanted in sizes.items():
        if (there := known.get(name) or defaults[name]) != wanted:
            raise UserError(f"{shown(folder)} has {name} {there}, and this configuration {wanted}.",
                            "choose sizes and a data set's vocabulary that are those of the weights.")
    wte, wpe = held["transformer.wte.weight"], held["transformer.wpe.weight"]
    if len(wpe) < cfg.GPT2_BLOCK_SIZE:
        raise UserError(f"{shown(folder)} has {len(wpe)} positions, fewer than GPT2_BLOCK_SIZE={cfg.GPT2_BLOCK_SIZE}.",
                        f"set GPT2_BLOCK_SIZE to at most {len(wpe)}.")
    found = dict(held)
    if not cfg.GPT2_BIAS:
        lost = [name for name, tensor in held.items() if name.endswith("bias") and tensor.abs().max() > 0]
        if lost:
            raise UserError(f"{shown(folder)} has biases ({lost[0]}), and GPT2_BIAS is off.", "set GPT2_BIAS=y.")
        found = {name: tensor for name, tensor in found.items() if not name.endswith("bias")}
    padding = wte.mean(0, keepdim=True).expand(padded_vocabulary(cfg) - len(wte), -1)
    return found | {"transformer.wte.weight": torch.cat([wte, padding]), "transformer.wpe.weight": wpe[:cfg.GPT2_BLOCK_SIZE]}


@torch.no_grad()
def start(model: GPT, folder: Path, cfg: "Config") -> list[str]:
    """Lay the weights of `folder` into `model`; the names of its parameters that keep their own start.

    UserError if the folder does not fit `cfg`.
    """
    held = fitted(*read(folder), cfg, folder)
    if "coupling" in model.controllers:
        set_ra_mlp_coupling_scale(model, 0.0)  # as its schedule will at the first step: no gate acts, none is divided by
    own = {name: p.shape for name, p in model.named_parameters()}
    taken = {name: tensor for name, tensor in held.items() if own.get(name) == tensor.shape}
    for name, parameter in model.named_parameters():
        if name in taken:
            parameter.copy_(taken[name])
    for i, block in enumerate(model.transformer.h):
        for part, gated in (("attn", "c_attn"), ("mlp", "c_proj")):
            if f"transformer.h.{i}.{part}.{gated}.weight" in taken:
                getattr(block, part).divide_gates()
    return [name for name in own if name not in taken]

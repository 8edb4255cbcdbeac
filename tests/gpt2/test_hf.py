"""GPT-2 in transformers' files: the way there and back, who has no place in them, and steps that start from them."""

import json
import sys

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

from gpt2 import hf  # noqa: E402
from gpt2.coupling import set_ra_mlp_coupling_scale  # noqa: E402
from gpt2.model import GPT  # noqa: E402
from tests.harness import refusal  # noqa: E402


def logits(model, idx):
    with torch.no_grad():
        return model.eval()(idx)[0][..., :model.vocab_size]


@pytest.fixture(scope="module")
def idx():
    return torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(3))


def shaken(cfg):
    """A model whose every parameter has moved from its start."""
    model, draws = GPT(cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draws) * 0.05)
            p.mul_(1.5)
    return model


def write(folder, model, cfg, **more):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hf.tensors(hf.plain(model, cfg)), folder / hf.WEIGHTS)
    (folder / hf.CONFIGURATION).write_text(json.dumps(hf.configuration(cfg, 0, **more)))
    return folder


@pytest.mark.parametrize("step, symbols", [
    ("V0", {}), ("V0", {"GPT2_BIAS": False}), ("V1", {}), ("V3", {}), ("V4", {}), ("MLA0", {}), ("KT1", {}), ("RALEARN0", {})])
def test_what_is_gpt2_in_function_goes_there_and_back(configuration, tmp_path, idx, step, symbols):
    cfg = configuration(step, **symbols)
    model = shaken(cfg)
    folder = write(tmp_path / "hf", model, cfg)
    plain = configuration("V0", **symbols)
    again = GPT(plain)
    assert hf.start(again, folder, plain) == []
    assert torch.allclose(logits(again, idx), logits(model, idx), atol=2e-4)
    if step == "V0":
        assert all(torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), again.parameters(), strict=True)
                   if "wte" not in n)


def test_transformers_computes_the_same_and_what_it_saves_is_read(configuration, tmp_path, idx):
    transformers = pytest.importorskip("transformers")
    cfg = configuration("V3")
    model = shaken(cfg)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(write(tmp_path / "hf", model, cfg)).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, logits(model, idx), atol=2e-4)
    theirs.save_pretrained(tmp_path / "saved")
    again = GPT(configuration("V0"))
    hf.start(again, tmp_path / "saved", configuration("V0"))
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, logits(again, idx), atol=1e-5)


@pytest.mark.parametrize("step, part", [
    ("V2", "attention (gpt2.attention.unified_ra:UnifiedRAttention)"), ("V5", "MLP (gpt2.mlp.reciprocal:ReciprocalMLP)"),
    ("V14", "KV pruning (gpt2.attention.pruning:KVPruning)"), ("OG0", "attention (gpt2.attention.output_gate:"),
    ("L7", "MLP (gpt2.mlp.context:")])
def test_what_is_no_gpt2_is_refused(configuration, step, part):
    cfg = configuration(step)
    what, then = refusal(hf.plain, GPT(cfg), cfg)
    assert what.startswith("this step is no GPT-2 in function: its ") and part in what
    assert "model.pt" in then


@pytest.mark.parametrize("step, symbols", [
    *((step, {}) for step in ("V0", "V1", "V1T", "V3", "V4", "V6", "R1", "MLA0", "RALATE1", "RAALL1", "RALEARN0")),
    ("V2", {"COUPLING_WARMUP": True}), ("V3", {"COUPLING_DELAY": True}), ("V3", {"SKIP_GATES": True, "SKIP_START": "0.5"})])
def test_a_step_that_starts_from_weights_computes_what_they_compute(configuration, tmp_path, idx, step, symbols):
    """With its gates where its configuration starts them. V6's token gate starts at a factor of one, a coupling schedule at
    no gate at all."""
    cfg, base = configuration(step, **symbols), configuration("V0")
    source = shaken(base)
    folder = write(tmp_path / "hf", source, base)
    model, drawn = GPT(cfg), GPT(cfg)
    own = hf.start(model, folder, cfg)
    assert all(torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), drawn.parameters(), strict=True) if n in own)
    if "coupling" in model.controllers:
        set_ra_mlp_coupling_scale(model, 0.0)
    apart = (logits(model, idx) - logits(source, idx)).abs().max()
    if step in ("V1T", "MLA0"):
        assert any(".attn." in name for name in own) and apart > 0.1, "tied rows and latents hold no free ones"
    else:
        assert apart < 2e-4 and not any(name.endswith(("c_attn.weight", "c_fc.weight", "wte.weight")) for name in own)


def test_rows_of_the_padding_are_like_the_mean_of_the_others(configuration, tmp_path):
    cfg = configuration("V0")
    known = {"n_layer": cfg.GPT2_N_LAYER, "n_head": cfg.GPT2_N_HEAD, "n_embd": cfg.GPT2_N_EMBD, "vocab_size": 200,
             "n_positions": 64}
    drawn = {name: torch.randn(shape) for name, shape in hf.expected(known).items()}
    held = hf.fitted(known, drawn, cfg.replace(VOCAB_SIZE=200), tmp_path)
    wte = held["transformer.wte.weight"]
    assert len(wte) == 256 and torch.allclose(wte[200:], wte[:200].mean(0).expand(56, -1))
    assert len(held["transformer.wpe.weight"]) == cfg.GPT2_BLOCK_SIZE, "the context is cut"


def test_a_folder_that_does_not_fit_is_refused(configuration, tmp_path):
    base = configuration("V0")
    folder = write(tmp_path / "hf", shaken(base), base)

    def said(step="V0", where=folder, **symbols):
        cfg = configuration(step, **symbols)
        return refusal(hf.start, GPT(cfg), where, cfg)[0]

    (tmp_path / "empty").mkdir()
    assert said(where=tmp_path / "empty") == f"{tmp_path}/empty holds no config.json that can be read (FileNotFoundError)."
    assert said(GPT2_BLOCK_SIZE=64) == f"{folder} has 32 positions, fewer than GPT2_BLOCK_SIZE=64."
    assert said(MODEL_CUSTOM=True, GPT2_N_LAYER=1) == f"{folder} has n_layer 2, and this configuration 1."
    assert said(GPT2_MLP_EXPANSION=2) == f"{folder} has n_inner 512, and this configuration 256."
    assert said(GPT2_BIAS=False) == f"{folder} has biases (transformer.h.0.attn.c_attn.bias), and GPT2_BIAS is off."
    known = json.loads((folder / hf.CONFIGURATION).read_text())
    for change, what in (({"model_type": "llama"}, f"{folder} is not GPT-2: model_type 'llama', activation 'gelu_new'."),
                         ({"activation_function": "relu"}, f"{folder} is not GPT-2: model_type 'gpt2', activation 'relu'."),
                         ({"scale_attn_by_inverse_layer_idx": True},
                          f"{folder} is no plain GPT-2: scale_attn_by_inverse_layer_idx True."),
                         ({"n_layer": 3}, f"{folder}/model.safetensors is not what config.json beside it says: "
                                          "transformer.h.2.attn.c_attn.bias is missing.")):
        (folder / hf.CONFIGURATION).write_text(json.dumps(known | change))
        assert said() == what
    (folder / hf.CONFIGURATION).write_text(json.dumps(known))
    held = {name: tensor.clone() for name, tensor in load_file(folder / hf.WEIGHTS).items()}  # not the file itself
    (folder / hf.WEIGHTS).write_bytes(b"no")
    assert said().startswith(f"{folder}/model.safetensors cannot be read: ")
    (folder / hf.WEIGHTS).unlink()
    assert said() == f"{folder} has no model.safetensors; other files, and files in parts, are not read."
    # As on the hub: without the prefix, with causal masks.
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    save_file({n.removeprefix("transformer."): t for n, t in held.items()} | masks, folder / hf.WEIGHTS)
    assert hf.start(GPT(base), folder, base) == []


def test_weights_that_are_no_plain_gpt2_are_refused(configuration, tmp_path, monkeypatch):
    cfg = configuration("V0")
    folder = write(tmp_path / "hf", shaken(cfg), cfg)
    held = {name: tensor.clone() for name, tensor in load_file(folder / hf.WEIGHTS).items()}
    wte = held["transformer.wte.weight"]

    def said(changed, **more):
        save_file(changed, folder / hf.WEIGHTS)
        (folder / hf.CONFIGURATION).write_text(json.dumps(hf.configuration(cfg, 0, **more)))
        return refusal(hf.read, folder)[0]

    assert said(held | {"lm_head.weight": wte + 1}) == f"the head of {folder} is not its embedding, and here the two are one."
    assert said(held | {"transformer.ln_f.bias": torch.full((cfg.GPT2_N_EMBD,), float("nan"))}) == (
        f"{folder}/model.safetensors holds numbers that are not finite.")
    for size in ("2", 0, True, 2.0):
        assert said(held, n_layer=size) == f"{folder}/config.json has n_layer {size!r}."
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert said(held) == "reading a folder of transformers needs safetensors, which is not installed."

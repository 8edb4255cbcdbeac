"""A model of the user's own: what it is given, and files that are none."""

import pytest
import torch

from gpt2.model import padded_vocabulary
from lib.config import load
from scripts import bench_train
from scripts.benching.peer import USAGE, Peer
from tests.harness import refusal
from tests.scripts.benching.peers import MODEL, OPTIMIZER

CPU = torch.device("cpu")
TINY = "gpt2-ra-ablation+tiny"


def test_a_peer_gets_our_sizes_and_settings(peer_file):
    cfg = load(TINY, "V0", {"WEIGHT_DECAY": 0.3})
    peer = Peer(peer_file)
    model, optimizer = peer.build(cfg, CPU, 5)
    given = vars(peer.module.GPT.seen[-1])
    assert given == {"block_size": 128, "vocab_size": padded_vocabulary(cfg), "n_layer": 2, "n_head": 2, "n_embd": 128,
                     "dropout": 0.0, "bias": cfg.GPT2_BIAS}
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.3, 0.0, (cfg.ADAM_BETA1, cfg.ADAM_BETA2))
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in others["params"]} == {1}
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    again, _ = peer.build(cfg, CPU, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), "of one seed"


def test_a_peers_own_optimizer_is_asked_for_the_same(peer_file):
    peer_file.write_text(MODEL + OPTIMIZER)
    cfg, peer = load(TINY, "V0"), Peer(peer_file)
    peer.build(cfg, CPU, 5)
    assert peer.module.GPT.asked == [(cfg.WEIGHT_DECAY, cfg.LEARNING_RATE, (cfg.ADAM_BETA1, cfg.ADAM_BETA2), "cpu")]
    assert peer.record()["own_optimizer"]


@pytest.mark.parametrize("text, what", [
    ("x = 1", "{} has no GPT and no GPTConfig."),
    (MODEL.replace("class GPTConfig", "class Config"), "{} has no GPTConfig."),
    ("import nowhere_at_all", "{} cannot be imported (ModuleNotFoundError: No module named 'nowhere_at_all')."),
    (MODEL.replace("    bias: bool = False\n", ""), "GPT of {} cannot be built (TypeError: "),
    (MODEL.replace("return logits, F", "return F"), "GPT of {} does not give (logits, loss) of (idx, targets) ("),
])
def test_a_file_that_is_no_peer_is_refused_in_a_sentence(peer_file, text, what):
    peer_file.write_text(text)
    said, run = refusal(bench_train.main, ["--peer", str(peer_file)])
    assert said.startswith(what.format(peer_file)) and said.endswith(".") and run == USAGE

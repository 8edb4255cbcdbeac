"""MFU: the published count of GPT-2's FLOPs, and peaks by the names of devices."""

import pytest
import torch

from gpt2.model import GPT
from lib.config import load
from scripts.benching import mfu
from scripts.benching.peer import Peer


@pytest.mark.parametrize("bias", [False, True])
def test_flops_of_gpt2_are_the_published_count(bias):
    with torch.device("meta"):
        model = GPT(load("gpt2-ra-ablation", "V0", {"GPT2_BIAS": bias}))
    assert mfu.matmul_parameters(model) == 12 * 7_077_888 + 768 * 50304
    assert mfu.flops_per_token(model, 12, 768, 1024) == pytest.approx(854.7e6, rel=1e-4)


def test_a_head_counts_once_tied_or_not(peer_file):
    module = Peer(peer_file).module
    model = module.GPT(module.GPTConfig(block_size=4, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    assert mfu.matmul_parameters(model) == 12 * 64 + 80
    model.transformer["wte"] = torch.nn.Embedding(10, 8)
    assert mfu.matmul_parameters(model) == 12 * 64 + 80, "its own table is only looked up"


@pytest.mark.parametrize("device, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("Intel(R) Xeon(R) Processor @ 2.50GHz", None), ("NVIDIA A10G", None)])
def test_the_peak_is_that_of_dense_bfloat16_or_unknown(device, peak):
    assert mfu.peak_flops(device, "bfloat16") == peak and mfu.peak_flops(device, "float32") is None

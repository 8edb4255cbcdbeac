"""Decoding with a cache is the full forward pass, for every step there is: after every prefix, and in chunks."""

import functools

import pytest
import torch

from gpt2.kvsplice import codecs
from gpt2.kvsplice_calibrator import KVSpliceCalibrator
from gpt2.model import GPT
from lib.config import Study
from lib.kconfig import Assignment
from lib.steps import step_files

T = 32
SHARPER = 6  # weights of attention are this much larger than at the start, so that who attends to whom matters


@functools.cache
def study():
    return Study("gpt2-ra-ablation+tiny", overrides=[Assignment("GPT2_BLOCK_SIZE", str(T), "test")])


def built(step):
    """A model of the step, with its codecs fitted, if it has any."""
    cfg = study().resolve(step).config
    model = GPT(cfg).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_attn.weight"):
                p.mul_(SHARPER)
    if codecs(model):
        generator = torch.Generator().manual_seed(5)
        batches = [torch.randint(cfg.VOCAB_SIZE, (4, T), generator=generator).numpy() for _ in range(6)]
        KVSpliceCalibrator(cfg.replace(KVSPLICE_SAMPLES=600, KVSPLICE_EPOCHS=1)).fit(model, batches)
    return model.eval()


@pytest.mark.parametrize("step", step_files())
@torch.no_grad()
def test_any_prefix_and_any_chunks_give_the_full_forward(step):
    model = built(step)
    x = torch.randint(256, (4, T), generator=torch.Generator().manual_seed(2))
    full = model(x)[0]
    several = [(p, 1, T - p - 1) for p in range(1, T, 7)]  # a single token among them, as in decoding
    for batch, cuts in ((1, [*((p, T - p) for p in range(1, T)), 1, 3, 17]), (4, [*several, 3, 17])):
        for pieces in cuts:
            cache = model.new_cache(batch)
            found = torch.cat([model(part, cache=cache)[0] for part in x[:batch].split(pieces, 1)], 1)
            torch.testing.assert_close(found, full[:batch], rtol=0, atol=1e-5, msg=lambda m, at=pieces: f"{at}: {m}")

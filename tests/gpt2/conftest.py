"""Configurations of the steps, small enough for a test."""

import pytest
import torch

from lib.config import load

torch.set_num_threads(1)  # tests run side by side

V_STEPS = ("V0", "V1", "V2", "V3", "V4", "V5", "V6")
STEPS = (*V_STEPS, "V1T", "V12", "V16", "OG0", "KT1", "RALEARN0", "M2", "M4", "RT1", "G1", "G2A", "L5", "L7", "W1",
         "W2", "V14", "V18", "V19", "M3", "C2", "MLAKV0", "RAMLA0")  # one step of each architecture
SMALL = {"GPT2_BLOCK_SIZE": 32, "BATCH_SIZE": 2, "GPT2_EVAL_SAMPLES": 2, "GPT2_DROPOUT": "0.1",
         "EVALUATE_ONLY": False}


@pytest.fixture(scope="session")
def configuration():
    """configuration(step, **symbols): a tiny configuration of one step."""
    def build(step, **symbols):
        return load("gpt2-ra-ablation+tiny", step, SMALL | symbols)
    return build

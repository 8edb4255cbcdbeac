"""Configurations of the steps, small enough for a test."""

import pytest
import torch

from lib.config import Study
from lib.kconfig import Assignment, Schema

torch.set_num_threads(1)  # tests run side by side

V_STEPS = ("V0", "V1", "V2", "V3", "V4", "V5", "V6")
STEPS = (*V_STEPS, "V1T", "V12", "V16", "OG0", "KT1", "RALEARN0", "M2", "M4", "RT1", "G1", "G2A", "L5", "L7", "W1",
         "W2", "V14", "V18", "V19", "M3", "C2", "MLAKV0", "RAMLA0")  # one step of each architecture
SMALL = {"GPT2_BLOCK_SIZE": 32, "BATCH_SIZE": 2, "GPT2_EVAL_SAMPLES": 2, "GPT2_DROPOUT": "0.1",
         "EVALUATE_ONLY": False}


@pytest.fixture(autouse=True)
def own_precision():
    """A cell in this process sets the precision of matrix products; the next test is not to see it."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def configuration():
    """configuration(step, **symbols): a tiny configuration of one step. It is frozen, so each is resolved once."""
    schema, made = Schema(), {}

    def build(step, **symbols):
        key = step, repr(sorted(symbols.items()))  # repr tells True from 1
        if key not in made:
            overrides = [Assignment(name, "ny"[value] if isinstance(value, bool) else str(value), "overrides")
                         for name, value in (SMALL | symbols).items()]
            made[key] = Study("gpt2-ra-ablation+tiny", overrides=overrides, schema=schema).resolve(step).config
        return made[key]
    return build

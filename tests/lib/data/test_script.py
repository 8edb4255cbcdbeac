import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from lib.data import prepare
from lib.data.shards import write_corpus
from lib.paths import ROOT
from scripts import data


@pytest.fixture
def configured(monkeypatch):
    """configured(cfg): the configuration that lib.config gives to the script."""
    def put(cfg):
        module = ModuleType("lib.config")
        module.Study, module.announce = lambda: SimpleNamespace(config=cfg), lambda study: None
        module.refuse_study = lambda: None
        monkeypatch.setitem(sys.modules, "lib.config", module)
    return put


def test_help_needs_no_configuration():
    done = subprocess.run([sys.executable, "-m", "scripts.data", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "make data" in done.stdout


def test_the_embedded_data_set_is_described(config, configured, capsys):
    configured(config(DATASET="pystdlib", TOKENIZER="bytes", GPT2_EVAL_SAMPLES=20, BATCH_SIZE=8, GPT2_BLOCK_SIZE=128))
    data.main([])
    shown = capsys.readouterr().out
    assert "pystdlib: bytes tokens, vocabulary 256" in shown
    assert "20 batches of 8 x 128" in shown and "nats" in shown and "5.5452" in shown


def test_a_local_folder_is_described_and_a_missing_one_is_two_lines(config, configured, capsys, tmp_path):
    configured(config())
    with pytest.raises(SystemExit) as left:
        data.main([])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[1].startswith("  try: set DATA_LOCAL_DIR")
    (tmp_path / "local").mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(100, dtype="<u2").tofile(tmp_path / "local" / name)
    data.main([])
    assert "local: gpt2 tokens" in capsys.readouterr().out


def test_a_public_data_set_is_prepared_first(config, configured, capsys, tmp_path, monkeypatch):
    def write(cfg):
        folder = tmp_path / "data" / cfg.DATASET
        folder.mkdir(parents=True)
        write_corpus(folder, {"name": cfg.DATASET, "tokenizer": "gpt2", "source": "here"},
                     lambda split, skip: iter([np.arange(200, dtype=np.uint16)]), own_val=False)

    monkeypatch.setattr(prepare, "prepare", write)
    configured(config(DATASET="shakespeare"))
    data.main([])
    assert "shakespeare: gpt2 tokens" in capsys.readouterr().out

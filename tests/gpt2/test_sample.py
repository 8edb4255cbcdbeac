"""gpt2/sample.py: text from a cell's folder as the model generates it, the same for a seed, and one sentence for bad input."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gpt2 import sample
from gpt2.model import GPT
from lib import checkpoint
from lib.cells import expand
from lib.config import Study
from tests.harness import ROOT, finish, refusal

BLOCK = 16
CONFIG = ("MODEL_TINY=y", "DATA_PYSTDLIB=y", f"GPT2_BLOCK_SIZE={BLOCK}", "GPT2_MAX_ITERS=4", "DEVICE_CPU=y", "CPU_THREADS=1")


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """A folder as a cell of V1 leaves it, with a model that is surer than an untrained one."""
    folder = tmp_path_factory.mktemp("cell")
    (folder / "study").write_text("".join(f"CONFIG_{line}\n" for line in CONFIG))
    resolved = Study(config=folder / "study").resolve("V1")
    (folder / ".config").write_text(resolved.text)
    model = GPT(resolved.config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    checkpoint.save(folder / "model.pt", model=model.state_dict())
    return folder


def run(capsys, *arguments):
    sample.main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_a_seed_gives_the_same_text_and_another_seed_another(capsys, cell):
    one, again, other = (run(capsys, "--cell", cell, "--prompt", "def ", "--tokens", 30, "--seed", s) for s in (1, 1, 2))
    assert one == again != other and one.startswith("def ") and one.endswith("\n")


@torch.no_grad()
def test_the_text_is_what_generate_gives(capsys, cell):
    """Also beyond the context, and with a prompt that fills it."""
    model, _ = sample.load_model(cell, "cpu")
    for prompt in ("a", "x" * BLOCK):
        out = model.generate(torch.tensor([list(prompt.encode())]), 20, temperature=0)
        text = sample.Text(sample.Bytes())
        expected = "".join(text.of(t) for t in out[0].tolist()) + text.of(None) + "\n"
        assert run(capsys, "--cell", cell, "--prompt", prompt, "--tokens", 20, "--temperature", 0) == expected


def test_without_a_prompt_it_begins_after_the_mark_which_is_not_shown(capsys, cell):
    out = run(capsys, "--cell", cell, "--tokens", 5, "--temperature", 0)
    model, _ = sample.load_model(cell, "cpu")
    text = sample.Text(sample.Bytes())
    ids = model.generate(torch.tensor([[0]]), 5, temperature=0)[0, 1:].tolist()
    assert out == "".join(text.of(t) for t in ids) + text.of(None) + "\n"


class Says:
    """A model that says these tokens, and counts how many were asked for."""

    block_size = BLOCK

    def __init__(self, *tokens):
        self.tokens, self.given = tokens, 0
        self.transformer = SimpleNamespace(wte=SimpleNamespace(weight=torch.zeros(1)))

    def stream(self, idx, *rest):
        self.idx = idx
        for token in self.tokens:
            self.given += 1
            yield torch.tensor([[token]])


def said(model, prompt="", stop=False, tokenizer="bytes"):
    pieces = []

    def say(text):
        pieces.append((model.given, text))

    sample.write(model, SimpleNamespace(TOKENIZER=tokenizer), prompt, 3, 1.0, None, 0, stop, say)
    return pieces


def test_a_piece_is_given_as_soon_as_it_is_known_and_a_character_when_it_is_whole():
    model = Says(*"aé".encode(), 0xFF, 27, ord("\n"))
    assert said(model, "p") == [(0, "p"), (1, "a"), (2, ""), (3, "é"), (4, "\ufffd"), (5, "\ufffd"), (6, "\n"), (6, "\n")]
    assert said(Says(0xC3))[-1] == (1, "\ufffd\n"), "half a character at the end"


def test_the_mark_is_shown_or_ends_the_text():
    model = Says(ord("a"), 0, ord("b"))
    assert "".join(text for _, text in said(model)) == "a<|endoftext|>b\n" and model.idx.tolist() == [[0]]
    model = Says(ord("a"), 0, ord("b"))
    assert "".join(text for _, text in said(model, stop=True)) == "a\n" and model.given == 2


def test_gpt2_tokens(monkeypatch):
    """By the encoding of make data: the mark is GPT-2's, and a prompt that looks like it is text."""
    class Encoding:
        def encode_ordinary(self, text):
            return {"<|endoftext|>": [7, 8], "": []}.get(text, [9])

        def decode_single_token_bytes(self, token):
            return {7: b"A", 8: b"B", 9: "é".encode()[:1], 10: "é".encode()[1:]}[token]

    monkeypatch.setattr("lib.data.prepare.gpt2_encoding", Encoding)
    model = Says(10, 50256)
    assert "".join(text for _, text in said(model, "x", tokenizer="gpt2")) == "é<|endoftext|>\n" and model.idx.tolist() == [[9]]
    assert said(Says(), "<|endoftext|>", tokenizer="gpt2")[0][1] == "A"
    model = Says()
    said(model, tokenizer="gpt2")
    assert model.idx.tolist() == [[50256]]


def test_gpt2s_files_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_GPT2_DIR", str(tmp_path))
    assert refusal(sample.GPT2Tokens) == (
        f"TIKTOKEN_GPT2_DIR={tmp_path} does not hold GPT-2's vocab.bpe and encoder.json.",
        "set TIKTOKEN_GPT2_DIR to a folder with GPT-2's vocab.bpe and encoder.json.")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert refusal(sample.GPT2Tokens)[0] == "GPT-2's tokens need tiktoken, which is not installed."


def test_a_top_k_beyond_the_vocabulary_is_all_of_it(capsys, cell):
    common = ("--cell", cell, "--prompt", "a", "--tokens", 10)
    assert run(capsys, *common, "--top-k", 10 ** 9) == run(capsys, *common)
    assert run(capsys, *common, "--top-k", 1) == run(capsys, *common, "--temperature", 0)


def test_bad_input(cell, tmp_path, monkeypatch):
    def refused(*arguments):
        return refusal(sample.main, [str(a) for a in arguments])

    assert refused("--cell", tmp_path) == (f"{tmp_path} is no cell: it has no .config.",
                                           "give a folder test_<step>_<optimizer>_<pruning> of a study's results.")
    (tmp_path / ".config").write_text((cell / ".config").read_text())
    assert refused("--cell", tmp_path)[0].startswith(f"{tmp_path} has no model.pt: ")
    assert refused("--cell", cell, "--prompt", "x" * (BLOCK + 1)) == (
        f"the prompt has {BLOCK + 1} tokens, more than the context of {BLOCK}.", "shorten it.")
    with monkeypatch.context() as patch:
        patch.setenv("TOKENS", "abc")
        assert refused("--cell", cell) == ("TOKENS=abc is no whole number.", "make sample TOKENS=200.")
    assert refused("V1", "--cell", cell)[0] == "both a step and --cell were given."
    assert refused("--cell", cell, "--tokens", 0)[0] == "--tokens 0 is not 1 or more, or is too large."
    assert refused("--cell", cell, "--top-k", 0)[0] == "--top-k 0 is not 1 or more, or is too large."
    assert refused("--cell", cell, "--temperature", "nan")[0] == "--temperature nan is not 0 or more, or is too large."
    assert refused("--cell", cell, "--seed", 2 ** 63)[0] == f"--seed {2 ** 63} is not 0 or more, or is too large."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused("--cell", cell, "--device", "cuda")[0] == "--device cuda was given, but torch sees no GPU."


def test_the_configured_studys_cells_by_make(cell, dotconfig, tmp_path, monkeypatch):
    """make sample: a prompt of any characters arrives as it is; the baseline unless a step is named; what is not there."""
    dotconfig(*CONFIG, 'STUDY="mine"', 'ABLATION_STEPS="V0 V1"', 'SEEDS="1337"', f'OUTPUT_DIR="{tmp_path}/out"')
    assert refusal(sample.study_folder, None) == ("study mine has no finished cell of V0.", "run it with make.")
    assert refusal(sample.study_folder, "V2")[0] == "step V2 is not in study mine."
    cells = expand(Study())
    finish(tmp_path / "out", *cells)
    assert [sample.study_folder(step).name for step in (None, "V1")] == [c.name for c in cells]
    folder = sample.study_folder("V1")
    (folder / "model.pt").write_bytes((cell / "model.pt").read_bytes())
    done = subprocess.run(["make", "--no-print-directory", f"PYTHON={sys.executable}", "sample", "V1", "TOKENS=3",
                           """PROMPT=x="';echo"""], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("x=\"';echo")


def test_as_a_script_it_ends_with_two_lines_on_bad_input(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "gpt2/sample.py"), "--cell", str(tmp_path)], cwd="/", text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == f"error: {tmp_path} is no cell: it has no .config."


def test_a_stream_that_is_left_early_leaves_the_models_mode_alone(cell):
    model = GPT(Study(config=cell / ".config").config).train()
    stream = model.stream(torch.zeros(1, 2, dtype=torch.int64), 5)
    assert next(stream).shape == (1, 1) and not model.training
    stream.close()
    assert model.training


@torch.no_grad()
def test_the_last_positions_logits_alone_are_those_of_all(cell):
    model, _ = sample.load_model(cell, "cpu")
    x = torch.arange(14).view(2, 7)
    cache = model.new_cache(2)
    torch.testing.assert_close(model(x, last=True)[0], model(x)[0][:, -1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x, cache=cache, last=True)[0], model(x)[0][:, -1:], rtol=0, atol=1e-5)
    assert cache.length == 7


def test_a_terminal_of_another_encoding_gets_replacements(cell, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    sample.main(["--cell", str(cell), "--prompt", "é", "--tokens", "1", "--temperature", "0"])
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"?")


def test_every_tokenizer_of_the_data_sets_is_known():
    from lib.data.sources import VOCAB_SIZE

    assert sample.TOKENIZERS.keys() == VOCAB_SIZE.keys()

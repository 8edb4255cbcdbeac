"""A model as lm_eval asks it: text in, log-likelihoods and text out, against computations by hand."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
from gpt2.lm_eval_model import CellLM  # noqa: E402
from gpt2.sample import Bytes  # noqa: E402
from tests.gpt2.test_scoring import BLOCK, by_hand, model_of  # noqa: E402


def asks(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture
def lm(configuration):
    return CellLM(model_of(configuration, "V0"), Bytes(), rows=3)


def test_log_likelihoods_of_text(lm):
    """Spaces at the end of a context belong to the continuation; nothing stands for the mark between documents."""
    found = lm.loglikelihood(asks(("def f", "(x):"), ("def f ", "(x):"), ("", "import"), (" ", "a"), ("x" * 60, "yz")),
                             disable_tqdm=True)
    expected = [("def f", "(x):"), ("def f", " (x):"), ("\0", "import"), ("\0", " a"), ("x" * 60, "yz")]
    for (score, greedy), (context, continuation) in zip(found, expected, strict=True):
        hand = by_hand(lm.model, context.encode(), continuation.encode())
        assert score == pytest.approx(hand[0], abs=1e-3) and greedy is hand[1]


@torch.no_grad()
def test_a_document_is_predicted_once_in_windows_of_the_context(lm):
    text = "".join(chr(97 + (i * i) % 26) for i in range(BLOCK * 2 + 5))
    ids = [0, *text.encode()]  # after the mark
    expected = 0.0
    for first, last in ((1, BLOCK), (BLOCK + 1, 2 * BLOCK), (2 * BLOCK + 1, len(text))):  # tokens of a window, both included
        window = ids[max(0, last - BLOCK):last + 1]
        log_p = torch.log_softmax(lm.model(torch.tensor([window[:-1]]))[0][0].double(), -1)
        expected += sum(log_p[i - last + len(window) - 2, ids[i]].item() for i in range(first, last + 1))
    one, none, short = lm.loglikelihood_rolling(asks((text,), ("",), ("ab",)), disable_tqdm=True)
    assert one == pytest.approx(expected, abs=1e-3) and none == 0.0
    assert short == pytest.approx(by_hand(lm.model, b"\0", b"ab")[0], abs=1e-3)


def test_text_is_what_greedy_decoding_gives_up_to_a_stop_string(lm):
    """Contexts of one length together; a context is cut to leave room for what is written."""
    def greedy(context, count):
        out = lm.model.generate(torch.tensor([list(context.encode())]), count, temperature=0)[0, len(context):].tolist()
        return lm.tok_decode(out[:out.index(0)] if 0 in out else out)

    contexts = ["def", "abc", "x = 1 +", "z" * 40]
    whole = [greedy(c[-(BLOCK - 8):], 8) for c in contexts]
    assert lm.generate_until(asks(*((c, {"until": [], "max_gen_toks": 8}) for c in contexts)), disable_tqdm=True) == whole
    stop = whole[0][2:4]
    found = lm.generate_until(asks(*((c, {"until": stop, "max_gen_toks": 8}) for c in contexts)), disable_tqdm=True)
    assert found == [text.split(stop)[0] for text in whole] and found[0] != whole[0]
    beyond = lm.generate_until(asks(("q" * 40, {"until": [], "max_gen_toks": BLOCK + 5})), disable_tqdm=True)
    assert beyond == [greedy("q" * (BLOCK // 2), BLOCK + 5)]


def test_sampled_text_is_the_same_again(lm):
    ask = asks(("def ", {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 2.0}))
    one, again = (lm.generate_until(ask, disable_tqdm=True) for _ in range(2))
    greedy = lm.generate_until(asks(("def ", {"until": [], "max_gen_toks": 20})), disable_tqdm=True)
    assert one == again != greedy

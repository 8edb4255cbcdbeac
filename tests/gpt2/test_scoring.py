"""Log-likelihoods against a computation by hand: one pair at a time, one full forward pass, no cache, no batch."""

import random

import pytest
import torch

from gpt2.model import GPT
from gpt2.scoring import _batches, log_likelihoods
from tests.harness import refusal

BLOCK = 32
KINDS = ("V0", "V5", "MLAKV0", "V18", "V19", "C2", "G1", "L7", "KT1", "W2", "M3")  # every kind of cache; V18, M3 and C2 prune


def model_of(configuration, step):
    """Sharper than at its start, so that who attends to whom matters."""
    model = GPT(configuration(step, GPT2_BLOCK_SIZE=BLOCK)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(6 if name.endswith("c_attn.weight") else 3 if name.endswith("wte.weight") else 1)
    return model


@torch.no_grad()
def by_hand(model, context, continuation):
    """What is longer than the context is cut on the left."""
    both = (list(context) + list(continuation))[-(BLOCK + 1):]
    logits = model(torch.tensor([both[:-1]]))[0][0, :, :model.vocab_size].double()
    rows = logits[-len(continuation):]
    log_p = sum(torch.log_softmax(row, 0)[token].item() for row, token in zip(rows, continuation, strict=True))
    return log_p, rows.argmax(-1).tolist() == list(continuation)


def pairs_of(seed=0):
    """Four continuations of one context, contexts of one length and of several, single tokens, what fills the context, and what
    is longer than it."""
    draw = random.Random(seed)

    def ids(n):
        return [draw.randrange(256) for _ in range(n)]

    found = []
    for length in (1, 7, 7, 20, 21):
        context = ids(length)
        found += [(context, ids(n)) for n in (1, 3, 3, 9)]
    found += [(ids(BLOCK), ids(1)), (ids(20), ids(13)), (ids(50), ids(5)), (ids(3), ids(BLOCK)), (ids(90), ids(BLOCK - 1))]
    return found


@pytest.mark.parametrize("step", KINDS)
def test_they_are_those_of_the_full_forward_pass(configuration, step):
    model, pairs = model_of(configuration, step), pairs_of()
    for (found, greedy), (expected, likeliest) in zip(log_likelihoods(model, pairs, rows=6),
                                                      [by_hand(model, *pair) for pair in pairs], strict=True):
        assert found == pytest.approx(expected, abs=1e-3) and greedy is likeliest


@torch.no_grad()
def test_under_autocast_they_are_those_of_the_forward_pass_under_autocast(configuration):
    """As on a GPU: queries and keys are bfloat16, the cache holds them as float32."""
    model, pairs = model_of(configuration, "V0"), pairs_of()

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    found = log_likelihoods(model, pairs, autocast=autocast)
    with autocast():
        expected = [by_hand(model, *pair)[0] for pair in pairs]
    rounding = [abs(score - one) for (score, _), one in zip(found, expected, strict=True)]
    float32 = [abs(score - one) for (score, _), one in zip(log_likelihoods(model, pairs), expected, strict=True)]
    assert sum(rounding) < sum(float32) / 2


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else(configuration):
    model, context = model_of(configuration, "V0"), [5, 6, 7]
    written = model.generate(torch.tensor([context]), 6, temperature=0)[0, 3:].tolist()
    pairs = [(context, written[:n]) for n in range(1, 7)]
    pairs += [(context, [*written[:n], (written[n] + 1) % 256, *written[n + 1:]]) for n in range(6)]
    assert [greedy for _, greedy in log_likelihoods(model, pairs)] == [True] * 6 + [False] * 6


def test_neither_order_nor_company_plays_a_part(configuration):
    model, pairs = model_of(configuration, "V18"), pairs_of(1)
    expected = log_likelihoods(model, pairs)
    order = random.Random(2).sample(range(len(pairs)), len(pairs))
    counted = []
    shuffled = log_likelihoods(model, [pairs[i] for i in order], rows=3, done=counted.append)
    assert sum(counted) == len(pairs) and max(counted) <= 3
    for at, i in enumerate(order):
        alone = log_likelihoods(model, [pairs[i]])[0]
        assert shuffled[at][0] == pytest.approx(expected[i][0], abs=1e-3) == alone[0] and shuffled[at][1] == alone[1]


def test_a_context_is_read_once_for_all_its_continuations(configuration):
    model, read = model_of(configuration, "V0"), []
    model.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    log_likelihoods(model, [([1] * 20, [n, n]) for n in range(4)] + [([2] * 20, [n]) for n in range(2)])
    assert read == [(2, 20), (6, 1)]


def test_padding_of_the_vocabulary_is_no_token(configuration):
    model = model_of(configuration, "V0")
    model.vocab_size = 200
    assert log_likelihoods(model, [([1, 2], [3])])[0][0] == pytest.approx(by_hand(model, [1, 2], [3])[0], abs=1e-3)


def test_batches_keep_to_their_bounds():
    pairs = pairs_of(3)
    for batch in _batches(BLOCK, pairs, 5):
        assert len({len(context) for context, _ in batch}) == 1 and sum(len(members) for _, members in batch) <= 5
    long = [((0,), [1] * 1000)] * 32  # first windows of documents, after the mark between them
    assert [len(members) for batch in _batches(1024, long, 32) for _, members in batch] == [4] * 8, "so many logits fit"
    assert sorted(i for batch in _batches(BLOCK, pairs, 5) for _, members in batch for i in members) == list(range(len(pairs)))


def test_bad_input(configuration):
    model = model_of(configuration, "V0")
    assert log_likelihoods(model, [([1], [])]) == [(0.0, True)] and log_likelihoods(model, []) == []
    assert refusal(log_likelihoods, model, [([1], [2] * (BLOCK + 1))])[0] == (
        f"a continuation of {BLOCK + 1} tokens does not fit into the model's context of {BLOCK}.")
    with pytest.raises(ValueError):
        log_likelihoods(model, [([], [1])])

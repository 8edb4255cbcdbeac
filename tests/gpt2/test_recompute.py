"""Recomputed blocks: the same loss, gradients and state as kept ones, bit for bit, for less memory; in training alone."""

import copy

import pytest
import torch

from gpt2.model import GPT
from gpt2.skip import training_flops
from lib.mechanisms import Mechanisms, Moment
from tests.gpt2.conftest import STEPS


def trained(cfg):
    """A model after two backward passes, and the bytes that autograd kept for the second."""
    model = GPT(cfg).train()
    mechanisms, own = Mechanisms(model), {p.data_ptr() for p in model.parameters()}
    for iteration in range(2):
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        mechanisms.advance(Moment(iteration, iteration / 10, None, 5.0, 0.1))
        torch.manual_seed(iteration)
        x = torch.randint(256, (2, cfg.GPT2_BLOCK_SIZE + 1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x[:, :-1], x[:, 1:])[1] + mechanisms.penalty()
        bytes_kept = sum(storage.nbytes() for where, storage in kept.items() if where not in own)
        drawn = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), drawn), "a second pass draws nothing"
    model.loss, model.statistics = loss.detach(), mechanisms.statistics()
    return model, bytes_kept


@pytest.mark.parametrize("step", STEPS)
def test_loss_gradients_and_state_are_those_of_the_plain_pass(configuration, step):
    """With dropout, and with what blocks hand on, penalise and remember."""
    (plain, all_kept), (model, kept) = (trained(configuration(step, GPT2_RECOMPUTE=on)) for on in (False, True))
    assert torch.equal(plain.loss, model.loss) and plain.statistics == model.statistics
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert one.grad is None and other.grad is None or torch.equal(one.grad, other.grad), name
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), model.buffers(), strict=True))
    assert kept < all_kept / 3


def test_nothing_of_the_second_pass_is_left(configuration):
    """The router keeps its mean with its graph until the penalty takes it; the second pass's would keep that pass alive."""
    model, _ = trained(configuration("RT1", GPT2_RECOMPUTE=True))
    assert all(block.attn.pending is None for block in model.transformer.h)


def test_attention_runs_twice_in_training_and_once_elsewhere(configuration):
    model = GPT(configuration("V0", GPT2_RECOMPUTE=True))
    x, seen, layers = torch.zeros(1, 8, dtype=torch.int64), [], len(model.transformer.h)
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda *_: seen.append(None))

    def passes(call) -> int:
        seen.clear()
        call()
        return len(seen)

    assert passes(lambda: model.train()(x, x)[1].backward()) == 2 * layers
    with torch.no_grad():
        assert passes(lambda: model(x, x)) == layers
    assert passes(lambda: model(x, cache=model.new_cache(1))[0].sum().backward()) == layers
    assert passes(lambda: model.eval()(x, x)[1].backward()) == layers


def test_the_graph_can_be_used_twice_and_the_model_copied_after(configuration):
    model = GPT(configuration("G2A", GPT2_RECOMPUTE=True)).train()
    x = torch.arange(16)[None]
    loss = model(x, x)[1]
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(once, (p.grad for p in model.parameters() if p.grad is not None), strict=True))
    copy.deepcopy(model)


def test_what_skip_gates_save_is_counted_with_it(configuration):
    """The second pass is work that is really done."""
    plain, twice = (training_flops(configuration("M2", GPT2_RECOMPUTE=on)) for on in (False, True))
    assert 1.1 * plain < twice < 1.34 * plain


@pytest.mark.parametrize("step, layers", [("RT1", 1), ("G2A", 2)])
def test_a_compiled_model_is_one_program_with_the_same_gradients(configuration, step, layers):
    """Also of blocks that remember something of the pass, and of such that hand something on."""
    cfg, grads = configuration(step, GPT2_RECOMPUTE=True, GPT2_DROPOUT="0.0").replace(GPT2_N_LAYER=layers), []
    for compiled in (False, True):
        model = GPT(cfg).train()
        x = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
        run = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False) if compiled else model
        (run(x, x)[1] + Mechanisms(model).penalty()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert getattr(model.transformer.h[0].attn, "pending", None) is None
    torch._dynamo.reset()
    for eager, own in zip(*grads, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-6)


def test_with_dropout_there_is_no_cuda_graph(configuration):
    """The second pass draws as the first did, for which a generator's state is read, and that cannot be captured."""
    assert [configuration("V0", GPT2_RECOMPUTE=on, GPT2_DROPOUT=dropout).CUDA_GRAPHS
            for on, dropout in ((False, "0.1"), (True, "0.0"), (True, "0.1"))] == [True, True, False]

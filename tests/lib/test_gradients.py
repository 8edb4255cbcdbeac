"""The gradient of a micro-batch and its limit; replayed as a CUDA graph, where there is a GPU, the same numbers."""

import pytest
import torch

from gpt2.model import GPT
from lib import gradients, optimizers, runtime
from lib.config import load
from lib.errors import UserError
from lib.mechanisms import Mechanisms
from tests.gpu import DEVICES, needs_gpu

TINY = "gpt2-ra-ablation+tiny"


def example(device="cpu", step="V0", **symbols):
    sizes = {"GPT2_BLOCK_SIZE": 32, "BATCH_SIZE": 4, "GPT2_GRADIENT_ACCUMULATION": 2, "OPTIMIZER_ADAMW": True}
    if device == "cuda":
        sizes |= {"DEVICE_CUDA": True, "AMP_FLOAT32": True}
    cfg = load(TINY, step, sizes | symbols)
    runtime.setup(cfg)
    model = GPT(cfg).to(device).train()
    tokens = torch.randint(cfg.VOCAB_SIZE, (6, 4, 33), generator=torch.Generator().manual_seed(3)).to(device)
    return cfg, model, [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_micro_batches_add_up_to_the_gradient_of_the_mean_loss():
    cfg, model, batches = example()
    gradient = gradients.of(cfg, model, Mechanisms(model), torch.device("cpu"))
    losses = [gradient(*batches[i], i) for i in range(2)]
    found = grads(model)
    model.zero_grad()
    _, loss = model(torch.cat([batches[0][0], batches[1][0]]), torch.cat([batches[0][1], batches[1][1]]))
    loss.backward()
    torch.testing.assert_close(sum(losses) / 2, loss.detach())
    assert not losses[0].requires_grad
    for name, grad in grads(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_penalties_are_in_the_gradient_and_not_in_the_loss():
    class Penalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            return None, 3 * self.w

        def penalty(self):
            return 5 * self.w

    cfg, _, batches = example()
    model = Penalised()
    loss = gradients.Gradient(cfg, model, Mechanisms(model), torch.device("cpu"))(*batches[0])
    assert (loss.item(), model.w.grad.item()) == (3.0, 8.0)


def test_of_puts_the_model_into_training_mode():
    cfg, model, _ = example()
    gradients.of(cfg, model.eval(), Mechanisms(model), torch.device("cpu"))
    assert model.training


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e9])
def test_a_step_after_clip_is_one_after_clip_grad_norm(limit, device):
    after = []
    for own in (True, False):
        cfg, model, batches = example(device)
        optimizer = optimizers.build(model, cfg)
        for batch in batches[:3]:
            gradients.Gradient(cfg, model, Mechanisms(model), torch.device(device))(*batch)
            true = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            norm = gradients.clip(model, optimizer, limit) if own else torch.nn.utils.clip_grad_norm_(
                model.parameters(), limit or float("inf"))
            torch.testing.assert_close(norm, true)
            optimizer.step()
            optimizer.zero_grad()
        after.append({name: p.detach() for name, p in model.named_parameters()})
    for name, p in after[0].items():
        torch.testing.assert_close(p, after[1][name], rtol=1e-5, atol=1e-7, msg=name)


@needs_gpu
@pytest.mark.parametrize("step, recompute", [(step, False) for step in ("V0", "V5", "M1", "RALEARN0", "RT1", "V14", "W1")]
                         + [("V0", True), ("RT1", True)])
def test_replayed_steps_are_the_plain_ones(step, recompute):
    """Losses, gradients and buffers, with dropout and accumulation, over steps that differ in batch and seed."""
    cfg, model, batches = example("cuda", step, GPT2_DROPOUT=0.0 if step == "V14" or recompute else 0.1,
                                  GPT2_RECOMPUTE=recompute)
    device = torch.device("cuda")
    plain = gradients.Gradient(cfg, model, Mechanisms(model), device, 2)
    start = {name: t.clone() for name, t in model.state_dict().items()}

    def run(gradient):
        model.load_state_dict(start)
        found = []
        for number in range(3):
            torch.manual_seed(number)
            model.zero_grad()
            found += [gradient(*batches[2 * number + micro], micro).clone() for micro in range(2)]
            found += list(grads(model).values())
        return found + [t.clone() for t in model.state_dict().values()]

    run(plain)
    expected = run(plain)
    replayed = gradients.Replayed(plain, (4, 32), device)
    for own, other in zip(run(replayed), expected, strict=True):
        torch.testing.assert_close(own, other)
    assert 0 < replayed.forward_timer.milliseconds() < 1000 and replayed.peak_bytes > 0


@needs_gpu
def test_what_cannot_be_captured_is_refused_in_a_sentence():
    cfg, model, batches = example("cuda", "V14", GPT2_DROPOUT=0.1)
    plain = gradients.Gradient(cfg, model, Mechanisms(model), torch.device("cuda"))
    plain(*batches[0])
    with pytest.raises(UserError, match="cannot be captured as a CUDA graph") as refusal:
        gradients.Replayed(plain, (4, 32), torch.device("cuda"))
    assert "CUDA_GRAPHS=n" in refusal.value.run

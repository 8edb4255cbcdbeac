"""Curvature against Hessians that are known: quadratics, and a small model's own, entry by entry."""

import pytest
import torch
from torch import nn

from lib import curvature


def quadratic(values, seed=0):
    """(losses, parameters) whose Hessian has these eigenvalues; two losses, so that their mean counts."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator))[0]
    matrix = basis @ torch.diag(torch.tensor(values)) @ basis.T
    p = nn.Parameter(torch.ones(len(values)))
    return [lambda: 0.5 * p @ (1.5 * matrix) @ p, lambda: 0.5 * p @ (0.5 * matrix) @ p], [p], matrix


def test_extremes_and_trace_of_a_known_spectrum():
    values = [-2.0, *(0.01 * i for i in range(30)), 5.0, 9.0]
    losses, parameters, _ = quadratic(values)
    found = curvature.measure(losses, parameters, 33, 400)
    assert found["eigmax"] == pytest.approx(9.0, rel=1e-4) and found["eigmin"] == pytest.approx(-2.0, rel=1e-4)
    assert abs(found["trace"] - sum(values)) < 4 * found["trace_error"] and found["residual"] < 1e-3
    assert found["eigmax_over_mean"] == pytest.approx(9.0 * len(values) / found["trace"], rel=1e-3)


def test_few_iterations_say_how_far_they_are_off():
    losses, parameters, _ = quadratic([0.1 * i for i in range(1, 60)])
    found = curvature.measure(losses, parameters, 5, 1)
    assert 0 < (5.9 - found["eigmax"]) / 5.9 <= found["residual"] < 0.5 and found["trace_error"] is None


def test_a_trace_that_is_not_told_from_0_gives_no_ratio():
    losses, parameters, _ = quadratic([-3.0, -1.0, 1.0, 3.0])
    assert curvature.measure(losses, parameters, 4, 50)["eigmax_over_mean"] is None


def test_it_is_the_hessian_of_a_model_with_shared_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight  # tied: counted once, with both uses
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    parameters = list(net.parameters())
    hessian = curvature.Hessian([lambda: ((net(x) - y) ** 2).mean()], parameters)

    def loss(flat):
        w, b, c = flat[:9].view(3, 3), flat[9:12], flat[12:]
        return ((torch.tanh(x @ w.T + b) @ w.T + c - y) ** 2).mean()

    exact = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in parameters]))
    found = torch.stack([hessian.times(row) for row in torch.eye(hessian.size)])
    assert hessian.size == 15
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    found = curvature.measure(hessian.losses, parameters, 15, 2000)
    values = torch.linalg.eigvalsh(exact)
    assert found["eigmax"] == pytest.approx(values[-1].item(), rel=1e-4)
    assert found["eigmin"] == pytest.approx(values[0].item(), rel=1e-3)
    assert abs(found["trace"] - exact.trace().item()) < 4 * found["trace_error"]
    assert curvature.measure(hessian.losses, parameters, 15, 3) == curvature.measure(hessian.losses, parameters, 15, 3)


class Silent(torch.autograd.Function):
    """x^3 whose backward pass takes 3 x^2 for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x ** 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0].detach() ** 2


class Once(Silent):
    """The same, and says so."""

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError("there is no derivative of this backward pass")
        return Silent.backward(ctx, grad)


@pytest.mark.parametrize("function, why", [
    (Silent, "its second derivatives are not those of its gradient"), (Once, "there is no derivative of this backward pass")])
def test_an_operation_without_second_derivative_gives_no_number(function, why):
    p = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    with pytest.raises(curvature.NoSecondDerivative, match=why):
        curvature.measure([lambda: function.apply(p).sum()], [p], 3, 2)
    assert p.tolist() == [0.5, -1.0, 2.0], "parameters are as they were"
    assert curvature.measure([lambda: (p ** 3).sum()], [p], 3, 2)["eigmax"] == pytest.approx(12.0, rel=1e-4)

"""What modules may offer the loop, asked without one; how the loop uses it is in test_loop.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib.mechanisms import Mechanisms, Moment, layer_number


class Fixed(nn.Module):
    """Statistics that are always the same."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def stats(self) -> dict:
        return {name: torch.tensor(value) for name, value in self.values.items()}


class Speaking(nn.Module):
    def __init__(self, sentence=None):
        super().__init__()
        self.sentence = sentence

    def inactive(self) -> str | None:
        return self.sentence


class Advancing(nn.Module):
    def __init__(self, changes=False):
        super().__init__()
        self.changes, self.told = changes, []

    def advance(self, moment) -> bool:
        self.told.append(moment)
        return self.changes


class Penalised(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def penalty(self):
        return 2 * self.value


def model(**modules) -> nn.Module:
    """A model with these modules; "_" in a keyword stands for "." in the module's name."""
    root = nn.Module()
    for name, module in modules.items():
        *path, last = name.split("_")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)
    return root


def statistics(by_layer=False, **modules) -> dict:
    return Mechanisms(model(**modules)).statistics(by_layer)


# Advancing

@pytest.mark.parametrize("changes", [(False, False, False), (True, False, False), (False, True, True), (True, True, True)])
def test_every_module_is_told_of_every_moment_and_one_change_is_enough(changes):
    modules = [Advancing(one) for one in changes]
    mechanisms = Mechanisms(nn.Sequential(nn.Linear(2, 2), *modules))
    moments = [Moment(n, n / 3) for n in range(3)]
    assert [mechanisms.advance(moment) for moment in moments] == [any(changes)] * 3
    assert all(module.told == moments for module in modules)


def test_a_model_may_advance_itself_and_one_without_mechanisms_never_changes():
    assert Mechanisms(itself := Advancing(True)).advance(Moment(0, 0.0)) is True and len(itself.told) == 1
    assert Mechanisms(nn.Linear(2, 2)).advance(Moment(0, 0.0)) is False


# Penalties

def test_penalties_are_summed_and_have_a_gradient():
    parts = model(h_0_attn=Penalised(3.0), h_1_attn=Penalised(-1.0), h_1_mlp=nn.Linear(2, 2))
    total = Mechanisms(parts).penalty()
    assert total.shape == () and total.item() == 4.0
    total.backward()
    assert [p.grad.item() for n, p in parts.named_parameters() if n.endswith("value")] == [2.0, 2.0]
    assert Mechanisms(nn.Linear(2, 2)).penalty() == 0


# Silence

def test_a_model_may_speak_for_itself_and_silence_is_active():
    assert Mechanisms(Speaking("it stayed off")).inactive() == "it stayed off"
    assert Mechanisms(nn.Linear(2, 2)).inactive() is None
    assert Mechanisms(model(a=Speaking(), b=Speaking(""))).inactive() is None


def test_the_first_module_that_says_so_is_named():
    assert Mechanisms(model(h_0=Speaking(), h_1=Speaking("first"), h_2=Speaking("second"))).inactive() == "h.1: first"


# Statistics

@pytest.mark.parametrize("name, layer", [
    ("transformer.h.0.attn", 0), ("transformer.h.11.mlp", 11), ("h.3.heads.7", 3), ("7", 7), ("", None), ("attn", None),
    ("h2.attn", None), ("layer_3.x", None), ("a.-1.b", None),
])
def test_a_layer_is_the_first_whole_number_of_a_name(name, layer):
    assert layer_number(name) == layer


def test_only_modules_of_a_layer_have_a_mean_a_layer():
    found = statistics(True, controllers_coupling=Fixed(scale=0.5), h_3_heads_7=Fixed(w=[1.0, 2.0]))
    assert {name for name in found if "/" in name} == {"w/layer3"}


def test_what_several_modules_of_a_layer_call_the_same_is_one_mean_over_all_heads():
    found = statistics(True, h_0_attn=Fixed(w=[1.0, 2.0, 3.0], v=[5.0]), h_0_mlp=Fixed(w=[8.0]), h_1_attn=Fixed(w=[[0.0, 1.0]]))
    assert found["w/layer0"] == 3.5 and found["w/layer1"] == 0.5 and found["v/layer0"] == 5.0
    assert (found["w_min"], found["w_max"], found["w_mean"]) == (0.0, 8.0, 2.5)
    assert statistics(True) == {}


def test_a_statistic_without_heads_is_logged_under_its_own_name_as_the_mean_over_layers():
    found = statistics(h_0_attn=Fixed(p=1.0, w=[1.0]), h_1_attn=Fixed(p=0.0, w=[3.0]), h_2_attn=Fixed(p=0.5))
    assert found == {"p": 0.5, "w_mean": 2.0, "w_min": 1.0, "w_max": 3.0, "w_std": 1.0}
    found = statistics(True, h_0_attn=Fixed(p=1.0), h_1_attn=Fixed(p=0.0))
    assert found == {"p": 0.5, "p/layer0": 1.0, "p/layer1": 0.0}


def test_statistics_are_the_mean_over_ranks():
    """Here of this one and of another, whose numbers are three times as large."""
    group = SimpleNamespace(mean=lambda values: values.add_(3 * values).div_(2))
    parts = model(h_0_attn=Fixed(p=1.0, w=[1.0, 3.0]), h_1_attn=Fixed(p=0.0, w=[5.0]))
    found = Mechanisms(parts, group).statistics(by_layer=True)
    assert (found["p"], found["w_mean"], found["w_max"], found["w/layer1"]) == (1.0, 6.0, 10.0, 10.0)


def test_statistics_of_several_types_are_floats_without_a_graph():
    gate = nn.Parameter(torch.ones(2, dtype=torch.float64))
    one = Fixed()
    one.stats = lambda: {"a": gate * 2, "n": torch.tensor(3), "h": torch.tensor([0.5], dtype=torch.bfloat16)}
    found = Mechanisms(one).statistics()
    assert found["a_mean"] == 2.0 and found["n"] == 3.0 and found["h_max"] == 0.5
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("by_layer", [False, True])
def test_all_statistics_come_to_the_host_in_one_transfer(monkeypatch, by_layer):
    transfers = []

    def counted(name, real):
        def spy(self, *args):
            transfers.append(name)
            return real(self, *args)
        return spy

    for name in ("tolist", "item", "cpu", "numpy", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    modules = {f"h_{n}": Fixed(a=[1.0, 2.0], b=[3.0], c=4.0) for n in range(12)}
    assert len(statistics(by_layer, **modules)) == 2 * 4 + 1 + (3 * 12 if by_layer else 0)
    assert transfers == ["tolist"]

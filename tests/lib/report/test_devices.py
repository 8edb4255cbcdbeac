"""What GPUs have for all arms alike, taken out of speeds."""

from math import exp, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.plan import Options, Plan
from lib.report.content import content
from lib.report.devices import factors, levelled, note
from tests.harness import MEASURED, finish
from tests.lib.report.test_content import study  # noqa: F401  # a fixture


def record(speed, gpu, seconds=10.0):
    return {"tokens_per_second": speed, "train_seconds": seconds, "environment": {"device_id": gpu}}


@given(st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=4), st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=5))
def test_what_devices_have_for_all_arms_is_found_and_taken_out(gpus, arms):
    cells = [(f"V{a}", record(1e5 * exp(arm + gpu), f"gpu{g}", 20 / exp(arm + gpu)))
             for a, arm in enumerate(arms) for g, gpu in enumerate(gpus)]
    found = factors([*cells, ("C1", record(None, "gpu0")), ("C2", record(0.0, None, 0.0))])  # which train nothing
    assert prod(found.values()) == pytest.approx(1)
    for (g, gpu), (h, other) in zip(enumerate(gpus), enumerate(gpus[1:], 1), strict=False):
        assert found[f"gpu{h}"] / found[f"gpu{g}"] == pytest.approx(exp(other - gpu))
    for a, arm in enumerate(arms):
        level = [levelled([{"train_seconds": one["train_seconds"] / 2, "val_loss": 3.0}], one, found)
                 for name, one in cells if name == f"V{a}"]
        for rows, one in level:
            assert one["tokens_per_second"] == pytest.approx(1e5 * exp(arm + sum(gpus) / len(gpus)))
            assert one["train_seconds"] == pytest.approx(20 / exp(arm + sum(gpus) / len(gpus)))
            assert rows == [{"train_seconds": pytest.approx(one["train_seconds"] / 2), "val_loss": 3.0}]


@pytest.mark.parametrize("cells", [
    [("V0", record(1, "a")), ("V1", record(2, "a")), ("V0", record(1, "a"))],
    [("V0", record(1, "a")), ("V1", record(2, "b")), ("V0", record(1.1, "a")), ("V1", record(2.1, "b"))],
    [("V0", record(1, "a")), ("V1", record(2, "b")), ("V1", record(2, "a"))],
    [("V0", record(1, "a")), ("V1", record(2, "b")), ("V1", record(2, "a")), ("V0", record(1, None))],
    [("V0", record(1, "a")), ("V1", record(2, "b")), ("V1", record(2, "a")), ("V0", record(None, "b"))],
    [("V0", record(1, "a")), ("V0", record(1, "b")), ("V0", record(1, "b")), ("V1", {**record(1, "a"), "environment": None})],
    [],
], ids=["one device", "no chain of shared ones", "no cell to spare", "no device", "no speed", "no environment", "none"])
def test_what_cannot_be_told_apart_is_left_as_it_is(cells):
    found = factors(cells)
    assert found == {} and note(found) == []
    for _, one in cells:
        assert levelled([{"train_seconds": 1.0}], one, found) == ([{"train_seconds": 1.0}], one)


def test_a_report_compares_speeds_as_on_one_gpu(study):  # noqa: F811
    """V1 has .9 of V0's speed; the second GPU has .95 of the first one's, and the arms take turns on them."""
    plan = study(V0=[3.0, 3.1, 3.2, 3.3], V1=[3.0, 3.1, 3.2, 3.3], seeds="1 2 3 4")
    for cell in plan.common:
        second = (cell.step == "V1") == (cell.seed % 2 == 1)
        speed = 1000 * (0.9 if cell.step == "V1" else 1.0) * (0.95 if second else 1.0) * (1 + cell.seed / 1e4)
        (plan.out / cell.name / "metrics.json").unlink()
        finish(plan.out, cell, tokens_per_second=speed, train_seconds=1e5 / speed, val_loss=3 + cell.seed / 10,
               environment=MEASURED["environment"] | {"device_id": "b" if second else "a"})
    found = content(Plan(Options()))
    speed = found["steps"][1]["comparison"]["speed"]
    assert speed["ratio"] == pytest.approx(0.9, rel=1e-3) and speed["high"] - speed["low"] < 0.002, "not ± .08"
    assert found["steps"][0]["cells"][0]["tokens_per_second"] == pytest.approx(1000.1), "what was measured is kept"
    assert found["notes"] == ["of the 2 GPUs the fastest trains 5.3 % more tokens/s than the slowest with the same arm; ratios "
                              "of tokens/s and losses at equal seconds are of cells as a GPU of the mean speed would have run "
                              "them"]

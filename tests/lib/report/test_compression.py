"""What compressing a trained model's values cost, over seeds: which codec loses less, and when that is not known."""

import pytest

from lib.report import compression


def record(before, pca, after, error=0.1):
    layers = [{"error": error, "error_pca": 2 * error}, {"error": 3 * error, "error_pca": 4 * error}]
    return {"compression": {"val_loss_before": before, "val_loss_pca": pca, "val_loss": after, "layers": layers}}


CLEAR = [record(3.0, 3.20, 3.10), record(3.1, 3.31, 3.20), record(2.9, 3.11, 3.01)]


@pytest.mark.parametrize("records, wins", [
    (CLEAR, "codec"),
    ([record(3.0, 3.10, 3.20), record(3.1, 3.20, 3.31), record(2.9, 3.01, 3.11)], "PCA"),
    ([record(3.0, 3.10, 3.11), record(3.1, 3.20, 3.18), record(2.9, 3.01, 3.02)], "neither"),
    (CLEAR[:2], None),
])
def test_which_of_the_two_loses_less(records, wins):
    (row,) = compression.rows({"V0": [{"compression": None}], "C1": records}, "fixed")
    assert (row["name"], row["n"], row["wins"]) == ("C1", len(records), wins)
    assert row["error"] == pytest.approx(0.2) and row["error_pca"] == pytest.approx(0.3)
    assert row["error_ratio"] == pytest.approx({"low": 0.5, "high": 0.75})


def test_a_ratio_of_errors_that_are_not_known_is_none():
    one = record(3.0, 3.1, 3.2)
    one["compression"]["layers"] = [{"error": None, "error_pca": 0.1}, {"error": 0.1, "error_pca": 0}]
    assert compression.rows({"C1": [one]}, "fixed")[0]["error_ratio"] is None


def test_differences_are_paired_and_the_p_of_several_steps_corrected():
    one, two = compression.rows({"C1": CLEAR, "C2": CLEAR}, "fixed")
    assert one["codec"]["difference"] == pytest.approx(0.3100 / 3) and one["before"] == pytest.approx(3.0)
    assert one["codec"]["low"] < one["codec"]["difference"] < one["codec"]["high"]
    assert two["p_holm"] == one["p_holm"] == pytest.approx(2 * one["gain"]["p"])
    anytime = compression.rows({"C1": CLEAR}, "anytime")[0]["gain"]
    assert anytime["low"] < one["gain"]["low"]  # the interval that holds under looks is wider


def test_a_study_without_such_cells_has_no_section():
    assert compression.rows({"V0": [{"compression": None}], "V1": []}, "fixed") == []
    assert compression.section({}) is None


def test_the_section():
    text = compression.section({"compression": compression.rows({"C1": CLEAR, "C2": CLEAR[:1]}, "fixed")}).markdown()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[4:]]
    assert lines[0] == compression.HEADER
    assert lines[2][:3] == ["C1", "3", "3.0000"] and lines[2][6:] == ["codec", "30.0 %", "20.0 %"]
    assert lines[3][3:7] == ["+0.2000", "+0.1000", "-0.1000", "fewer than 3 seeds"]

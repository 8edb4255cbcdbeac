"""Where names stand: inside, beside their own point, on nothing else, and with a line that crosses nothing else."""

import itertools

import pytest

from lib.report import labels

SIZE = (400, 330)


def box(name, found):
    side, x, y, _ = found
    left = x if side == "left" else x - labels.wide(name)
    return left, y - labels.LINE / 2, left + labels.wide(name), y + labels.LINE / 2


def square(at, reach=labels.MARK):
    return at[0] - reach, at[1] - reach, at[0] + reach, at[1] + reach


def test_a_lone_name_stands_right_beside_its_point_on_the_side_that_has_room():
    assert labels.place({"V0": [(50, 100)]}, [], SIZE) == {"V0": ("left", 60, 100, False)}
    assert labels.place({"V0": [(395, 100)]}, [], SIZE) == {"V0": ("right", 385, 100, False)}


@pytest.mark.parametrize("marks", [
    {f"STEP{i}": [(200 + 4 * (i % 3), 160 + 3 * i)] for i in range(7)},
    {"MLA0@MLA_D_LATENT=1/6": [(314, 165)], "MLA0": [(297, 168)], "MLAKV0": [(305, 120)], "V0": [(339, 232)]},
    {"C1": [(288, 243), (288, 240)], "C2": [(279, 241), (279, 241)], "C3": [(273, 229), (273, 231)]}])
def test_nothing_is_hidden_and_no_name_is_beside_anothers_point(marks):
    found = labels.place(marks, [], SIZE)
    boxes = {name: box(name, one) for name, one in found.items()}
    assert boxes.keys() == marks.keys()
    for one, two in itertools.permutations(marks, 2):
        assert not labels.meet(boxes[one], boxes[two])
        assert not any(labels.meet(boxes[one], square(at)) for at in marks[one] + marks[two])
        if found[one][3]:
            assert not labels.crosses(marks[one][0], found[one][1:3], boxes[two])
    for left, top, right, bottom in boxes.values():
        assert left >= 0 and top >= 0 and right <= SIZE[0] and bottom <= SIZE[1]


def test_a_name_keeps_off_bars():
    free, on_bar = (labels.place({"V0": [(200, 100)]}, bars, SIZE)["V0"] for bars in ([], [(150, 98, 250, 102)]))
    assert not free[3] and on_bar[3] and not labels.meet(box("V0", on_bar), (150, 98, 250, 102))


def test_where_nothing_is_free_the_name_is_still_there():
    everywhere = [(0, 0, 400, 330)]
    assert labels.place({"V0": [(200, 100)]}, everywhere, SIZE)["V0"][0] == "left"
    assert labels.place({"A" * 99: [(200, 100)]}, [], SIZE)["A" * 99][3] is False, "wider than the panel"


def test_a_line_crosses_what_lies_between():
    assert labels.crosses((0, 0), (100, 100), square((50, 50), 3))
    assert not labels.crosses((0, 0), (100, 100), square((50, 80), 3))

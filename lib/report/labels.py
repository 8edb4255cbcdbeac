"""Where the names of points stand in a picture, so that none hides a point or another name, or reads as another point's.

All in pixels, y downwards; a box is (left, top, right, bottom). Names are placed one after the other, each on the nearest free
place beside its point; from further away a thin line leads to it, which crosses no other point either.
"""

import math

LETTER, CAPITAL, LINE = 6.7, 8.6, 15  # width of a letter, height of a name
GAP, GAPS = 10, (16, 40, 70)  # distance of a name beside its point, and of one that a line leads to
MARK, NEAR = 7, 18  # half a point; how far beside a point only its own name may stand


def wide(name: str) -> float:
    """About the width of a name; rather too much than too little."""
    return sum(CAPITAL if letter.isupper() or letter == "@" else LETTER for letter in name)


def place(marks: dict[str, list[tuple]], bars: list[tuple], size: tuple) -> dict[str, tuple]:
    """{name: (side, x, y, moved)} for marks {name: [(x, y), ...]}, of which the first is named and the others share its look;
    `side` of the text is at x, "left" or "right", y is its middle, and `moved` says that it needs a line. Where nothing is
    free it stands where it meets the fewest."""
    taken, found = list(bars), {}
    for name, own in marks.items():
        foreign = [at for other, points in marks.items() if other != name for at in points]
        blocked = [*taken, *((x - NEAR, y - LINE / 2, x + NEAR, y + LINE / 2) for x, y in foreign),
                   *((x - MARK, y - MARK, x + MARK, y + MARK) for x, y in own)]
        points = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in foreign]
        names = taken[len(bars):]
        best = None
        for side, moved, box in places(own[0], wide(name), size):
            met = sum(meet(box, other) for other in blocked)
            met += moved and sum(crosses(own[0], anchor(side, box), other) for other in [*points, *names])
            if best is None or met < best[0]:
                best = met, side, moved, box
        _, side, moved, box = best or (0, "left", False, beside(own[0], "left", GAP, 0, wide(name)))
        taken.append(box)
        found[name] = (side, *anchor(side, box), moved)
    return found


def places(at: tuple, width: float, size: tuple) -> list[tuple]:
    """(side, whether it needs a line, box) inside a panel of this size, nearest first."""
    shifts = [shift * LINE for step in range(1, 9) for shift in (-step, step)]
    tried = [(GAP, 0), *sorted(((gap, shift) for gap in GAPS for shift in [0, *shifts]), key=lambda p: math.hypot(*p))]
    found = [(side, gap != GAP, beside(at, side, gap, shift, width)) for gap, shift in tried for side in ("left", "right")]
    return [one for one in found if one[2][0] >= 0 and one[2][1] >= 0 and one[2][2] <= size[0] and one[2][3] <= size[1]]


def beside(at: tuple, side: str, gap: float, shift: float, width: float) -> tuple:
    left, y = at[0] + gap if side == "left" else at[0] - gap - width, at[1] + shift
    return left, y - LINE / 2, left + width, y + LINE / 2


def anchor(side: str, box: tuple) -> tuple:
    """Where the text begins or ends."""
    return box[0] if side == "left" else box[2], (box[1] + box[3]) / 2


def meet(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def crosses(start: tuple, end: tuple, box: tuple) -> bool:
    """Whether the line from a point to its name goes through a box."""
    steps = max(2, math.ceil(math.dist(start, end) / 3))
    line = [tuple(a + (b - a) * i / steps for a, b in zip(start, end, strict=True)) for i in range(steps + 1)]
    return any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in line)

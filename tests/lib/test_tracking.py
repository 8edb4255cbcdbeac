"""The event stream: strict rows, and listeners that fail. Trackers themselves are in trackers/."""

import json
import math

import pytest

from lib.tracking import MetricsLog


def test_rows_are_strict_json(tmp_path):
    log = MetricsLog(tmp_path)
    log.row(iteration=1, loss=math.nan, other=math.inf, fine=0.5)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"iteration": 1, "loss": None, "other": None, "fine": 0.5}


@pytest.mark.parametrize("call", ["log", "close"])
def test_a_tracker_that_fails_is_switched_off_with_one_warning(tmp_path, capsys, call):
    class Broken:
        def log(self, values):
            if call == "log":
                raise OSError("no network")

        def close(self):
            raise OSError("no network")

    log = MetricsLog(tmp_path, tracker=Broken())
    for i in range(3):
        log.row(iteration=i)
    log.close()
    assert capsys.readouterr().err == "warning: the tracker failed and is switched off: no network\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_resumed_log_drops_damaged_rows_and_says_so(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iterat\n\xff[]\n{"iteration": 4}\n{"iteration": 5}\n{"iteration": 6, "stale": 1}\n')
    log = MetricsLog(tmp_path, keep=5)
    log.row(iteration=6)
    log.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 4, 5, 6] and log.count == 4
    assert "metrics.jsonl holds only 3 whole rows of the 5 written before" in capsys.readouterr().out
    MetricsLog(tmp_path, keep=2).close()
    assert len(path.read_text().splitlines()) == 2 and capsys.readouterr().out == ""
    path.unlink()
    log = MetricsLog(tmp_path, keep=2)
    log.close()
    assert log.count == 0 and "holds only 0 whole rows of the 2" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [b'{"iteration" 3}\n', b'{"iteration": 3\x0b\n', b"\n", b"[3]\n"])
def test_no_row_after_the_checkpoint_takes_the_place_of_a_damaged_one(tmp_path, capsys, damaged):
    """As a resumed run finds it: ten rows, and one more that it computes again."""
    path, rows = tmp_path / "metrics.jsonl", [b'{"iteration": %d}\n' % number for number in range(1, 12)]
    rows[2] = damaged
    path.write_bytes(b"".join(rows))
    log = MetricsLog(tmp_path, keep=10)
    log.row(iteration=11)
    log.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, *range(4, 12)]
    assert "holds only 9 whole rows of the 10 written before" in capsys.readouterr().out


def test_a_damaged_newline_costs_its_two_rows_only(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2}\x1a{"iteration": 3}\n{"iteration": 4}\n{"iteration": 5}\n')
    MetricsLog(tmp_path, keep=4).close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 4]
    assert "holds only 2 whole rows of the 4" in capsys.readouterr().out

"""make bench-check: what it keeps of the seconds that it measured."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from lib.errors import UserError
from scripts import bench


def test_the_seconds_of_make_check_are_kept_with_their_machine(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    asked = []

    def check(command, env, **_):
        asked.append((command[1:], env["STUDY"]))
        return SimpleNamespace(returncode=0, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", check)
    out = tmp_path / "cpu.json"
    bench.check("gpt2-ra-ablation+tiny", 3, out)
    assert asked == [(["-m", "scripts.check"], "gpt2-ra-ablation+tiny")] * 3
    record = json.loads(out.read_text())
    environment = record.pop("environment")
    assert record == {"format": 1, "study": "gpt2-ra-ablation+tiny", "steps": 7, "runs": 3, "seconds": 3.0, "seconds_min": 2.0,
                      "seconds_max": 4.0}
    assert environment["device_type"] == "cpu" and environment["device"] and environment["threads"] >= 1
    assert "2.0 |    3.0 | 4.0" in capsys.readouterr().out


def test_a_check_that_fails_is_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="V1 is broken\n", stderr=""))
    with pytest.raises(UserError, match="make check failed on gpt2-ra-ablation: V1 is broken"):
        bench.check("gpt2-ra-ablation", 1, tmp_path / "cpu.json")
    assert not (tmp_path / "cpu.json").exists()

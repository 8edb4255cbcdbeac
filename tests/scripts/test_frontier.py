"""make frontier: which points there are, which are on the frontier, where labels stand, and the files it writes."""

import json

import pytest

from lib.cells import expand
from lib.config import Study
from lib.report import charts, frontier, labels
from scripts import frontier as tool
from tests.harness import finish, refusal

MIB = 2 ** 20


def record(step, seed, loss, mib, pca=None, optimizer="adamw"):
    return {"step": step, "seed": seed, "optimizer": optimizer, "val_loss": loss, "kv_cache_bytes": int(mib * MIB),
            "configuration": {"GPT2_BLOCK_SIZE": 64}, "compression": pca and {"val_loss_pca": pca, "val_loss": loss}}


def row(step, speed, mib, batch=8, context=64, **more):
    return {"step": step, "context": context, "batch": batch, "error": None, "cache_bytes": int(mib * MIB) * batch,
            "tokens_per_second": 1000 * speed, "speed": speed / 100, "speed_min": speed / 100 - 0.01,
            "speed_max": speed / 100 + 0.02} | more


RECORDS = [record("V0", 1, 3.0, 8), record("V0", 2, 3.2, 8), record("C1", 1, 3.15, 4, pca=3.3),
           record("C1", 2, 3.25, 4, pca=3.5), record("M", 1, 3.4, 2), record("X", 1, 3.5, 4)]
DECODE = {"format": 1, "baseline": "V0", "batches": [1, 8], "dtype": "float32",
          "environment": {"device": "a GPU", "torch": "2.13.0"},
          "rows": [row("V0", 100, 8), row("C1", 90, 4), row("M", 300, 2), row("X", 310, 4)]}


def test_a_point_a_step_and_one_a_plain_pca():
    found = {p["name"]: p for p in frontier.points(RECORDS, DECODE, 8)}
    assert list(found) == ["V0", "C1", "C1, plain PCA", "X", "M"], "most bytes first"
    v0, pca = found["V0"], found["C1, plain PCA"]
    assert (v0["n"], v0["low"], v0["high"], v0["by_seed"]) == (2, 3.0, 3.2, {"1": 3.0, "2": 3.2})
    assert v0["val_loss"] == pytest.approx(3.1) and (v0["tokens_per_second"], v0["speed"], v0["slowest"], v0["fastest"]) == (
        100_000, 1.0, 0.99, 1.02)
    assert pca["val_loss"] == pytest.approx(3.4) and pca["cache_bytes"] == 4 * MIB and pca["speed"] is None


def test_the_frontier_is_what_no_other_point_beats():
    found = {p["name"]: (p["on_bytes"], p["on_speed"]) for p in frontier.points(RECORDS, DECODE, 8)}
    assert found == {"V0": (True, True), "C1": (True, False), "C1, plain PCA": (False, False), "M": (True, True),
                     "X": (False, True)}
    twins = frontier.points([record("V0", 1, 3.0, 8), record("A0", 1, 3.0, 8)], DECODE, 8)
    assert all(p["on_bytes"] for p in twins), "equals do not beat each other"


ELSEWHERE = "the file has it at other contexts or batches than 64 and 8"


@pytest.mark.parametrize("other, why", [
    (row("V0", 100, 8, batch=1), ELSEWHERE), (row("V0", 100, 8, context=32), ELSEWHERE),
    (row("V0", 100, 4), "a sequence's cache has 4,096 KiB in the file and 8,192 here: another precision, or other sizes"),
    (row("V0@X=1", 100, 8), "it is not in the file"), (row("V0", 100, 8) | {"error": "out of memory"}, "out of memory"),
    ({"step": "V0", "context": 64, "batch": None, "error": "it does not fit"}, "it does not fit")])
def test_a_speed_of_another_size_is_not_taken_and_the_reason_is_given(other, why):
    (point,) = found = frontier.points(RECORDS[:2], {"rows": [other]}, 8)
    assert point["speed"] is None and not point["on_speed"] and point["on_bytes"]
    assert frontier.markdown(found, "mine", "Where.").endswith(f"\n\nNot timed:\n\n- V0: {why}\n")


def test_the_row_that_fits_is_taken_among_others_of_the_step():
    rows = [row("V0", 1, 8, batch=1), row("V0", 2, 4), row("V0", 100, 8)]
    (point,) = found = frontier.points(RECORDS[:2], {"rows": rows}, 8)
    assert point["speed"] == 1 and "Not timed" not in frontier.markdown(found, "mine", "Where.")


def test_several_optimizers_are_several_points():
    both = [record("V0", 1, 3.0, 8), record("V0", 1, 3.1, 8, optimizer="sinkgd")]
    assert [p["name"] for p in frontier.points(both, DECODE, 8)] == ["V0 adamw", "V0 sinkgd"]


def test_the_table():
    lines = frontier.markdown(frontier.points(RECORDS, DECODE, 8), "mine", "Where.").splitlines()
    assert lines[:4] == ["# Loss, cache and decoding speed, mine", "", "Where.", ""]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert cells[0][4] == "cache, MiB" and cells[2] == [
        "V0", "2", "3.1000", "3.0000 .. 3.2000", "8", "1.000", "100,000", "1.000", "0.990 .. 1.020", "bytes and speed"]
    assert cells[4] == ["C1, plain PCA", "2", "3.4000", "3.3000 .. 3.5000", "4", "0.500", "-", "-", "-", ""]


def test_means_over_fewer_seeds_are_named():
    assert "Of fewer seeds" not in frontier.markdown(frontier.points(RECORDS[:4], DECODE, 8), "mine", "Where.")
    found = frontier.points([*RECORDS[:4], record("X", 1, 3.5, 4)], DECODE, 8)
    assert "\n\nOf fewer seeds or of others, so not quite comparable: X.\n" in frontier.markdown(found, "mine", "Where.")


@pytest.mark.parametrize("log", [True, False])
def test_labels_stand_inside_and_neither_on_each_other_nor_on_points(log):
    at = [{"name": f"STEP{i}", "x": 2 + (i % 3) * 0.01, "val_loss": 3 + 0.001 * i, "low": 3 + 0.001 * i, "high": 3 + 0.001 * i}
          for i in range(7)]
    losses, ends = (2.9, 3.1), (1, 9)
    boxes = []
    for label in frontier.placed(at, losses, ends, log):
        x = (frontier.math.log(label["label_x"]) / frontier.math.log(9) if log else (label["label_x"] - 1) / 8) * frontier.WIDTH
        y = (losses[1] - label["label_y"]) / 0.2 * frontier.HEIGHT
        wide = labels.wide(label["name"])
        left = x if label["align"] == "left" else x - wide
        assert left >= -1e-6 and left + wide <= frontier.WIDTH + 1e-6
        boxes.append((left + 0.01, y - 7, left + wide - 0.01, y + 7))
    assert len(boxes) == 7
    assert not any(labels.meet(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_plain_pca_has_its_codecs_look_and_no_label_of_its_own():
    at = [{"name": name, "x": 2, "val_loss": loss, "low": loss, "high": loss}
          for name, loss in (("C1", 3.0), ("C1, plain PCA", 3.1))]
    assert [label["name"] for label in frontier.placed(at, (2.9, 3.2), (1, 9), False)] == ["C1"]


def test_a_label_does_not_stand_on_the_bar_of_rounds():
    at = {"name": "V0", "x": 0.5, "val_loss": 3.0, "low": 3.0, "high": 3.0}
    assert not frontier.placed([at], (2.9, 3.1), (0, 1), False)[0]["moved"]
    assert frontier.placed([at | {"x_low": 0.3, "x_high": 0.7}], (2.9, 3.1), (0, 1), False)[0]["moved"]


def test_the_picture_is_drawn_without_a_word_from_vega(capfd):
    spec = frontier.chart(frontier.points(RECORDS, DECODE, 8), "study", "where", "V0")
    assert len(spec["hconcat"]) == 2 and charts.png(spec).startswith(b"\x89PNG")
    untimed = frontier.points(RECORDS, {"rows": []}, 8)
    assert len(frontier.chart(untimed, "study", "where", "V0")["hconcat"]) == 1, "no speeds at all"
    said = capfd.readouterr()
    assert "WARN" not in said.out + said.err and "rror" not in said.err


def test_every_look_differs_and_plain_pca_is_the_hollow_form():
    names = [f"S{i}" for i in range(20)] + ["S3, plain PCA"]
    looks = frontier.looks([{"name": n} for n in names])
    assert len({looks[n] for n in names}) == 21 and looks["S3, plain PCA"] == (*looks["S3"][:2], 0)


@pytest.fixture
def study(tmp_path, dotconfig):
    dotconfig("MODEL_TINY=y", "DATA_PYSTDLIB=y", "GPT2_MAX_ITERS=250", "DEVICE_CPU=y", 'STUDY="mine"',
              'ABLATION_STEPS="V0 V1 V2"', f'OUTPUT_DIR="{tmp_path}/out"')
    cells = expand(Study())
    shape = {"configuration": {"GPT2_BLOCK_SIZE": 64}, "kv_cache_bytes": 4096}
    finish(tmp_path / "out", *(c for c in cells if c.step == "V0"), **shape, val_loss=3.0)
    finish(tmp_path / "out", *(c for c in cells if c.step == "V1"), **shape, val_loss=3.1)
    finish(tmp_path / "out", *(c for c in cells if c.step == "V2"), **shape, val_loss=2.0, inactive="never began")
    decode = DECODE | {"rows": [row("V0", 100, 4096 / MIB, batch=1)]}
    (tmp_path / "decode.json").write_text(json.dumps(decode))
    return tmp_path


@pytest.mark.parametrize("given", [True, False])
def test_the_files_of_a_folder_and_of_the_configured_study(study, capsys, given, monkeypatch):
    """A cell whose mechanism never acted takes no part; a step that was not timed is named."""
    monkeypatch.setenv("FILE", str(study / "decode.json"))
    tool.main([*([str(study / "out")] if given else []), "--batch", "1"])
    text = (study / "out/frontier.md").read_text()
    assert text in capsys.readouterr().out and (study / "out/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "Speed: relative to V0, timed beside each; batch 1, context 64, a GPU, torch 2.13.0, float32." in text
    assert "cache, KiB" in text
    assert "\n| V0 " in text and "\n| V1 " in text and "V2" not in text
    assert text.endswith("\nNot timed:\n\n- V1: it is not in the file\n")


def test_several_files_of_one_machine_are_one(tmp_path):
    rows = [[row("V0", 100, 8), row("C1", 90, 4)], [row("V0", 70, 8), row("M", 300, 2, batch=4)]]
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for path, some in zip(paths, rows, strict=True):
        path.write_text(json.dumps(DECODE | {"rows": some}))

    def read_all():
        return tool.joined({path: tool.read_decode(path) for path in paths})
    whole = read_all()
    assert [(r["step"], r["speed"]) for r in whole["rows"]] == [("V0", 1.0), ("M", 3.0), ("C1", 0.9)], "the first file's V0"
    assert whole["batches"] == [1, 8]
    for change, what in (({"dtype": "bfloat16"}, f"{paths[1]} has dtype bfloat16, {paths[0]} float32."),
                         ({"baseline": "B0"}, f"{paths[1]} has baseline B0, {paths[0]} V0."),
                         ({"environment": {"device": "a TPU", "torch": "2.13.0"}},
                          f"{paths[1]} is of a TPU, {paths[0]} of a GPU.")):
        paths[1].write_text(json.dumps(DECODE | {"rows": rows[1]} | change))
        assert refusal(read_all)[0] == what


def test_bad_input(study, tmp_path):
    decode, out = str(study / "decode.json"), str(study / "out")
    assert refusal(tool.main, [out])[0] == "no decoding speeds were given."
    assert refusal(tool.main, [out, "--decode", str(tmp_path / "no.json")])[0] == f"there is no {tmp_path}/no.json."
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert refusal(tool.main, [out, "--decode", str(broken)])[0].startswith(f"{broken} cannot be read: JSONDecodeError: ")
    for text in ("[]", "{}", '{"format": 1}'):
        broken.write_text(text)
        assert refusal(tool.main, [out, "--decode", str(broken)])[0].startswith(f"{broken} cannot be read: ")
    broken.write_text(json.dumps({"format": 1, "rows": [], "environment": {}}))
    assert refusal(tool.main, [out, "--decode", str(broken)])[0] == f"{broken} is not of make bench-decode."
    assert refusal(tool.main, [str(tmp_path / "no"), "--decode", decode])[0] == f"there is no folder {tmp_path}/no."
    (tmp_path / "empty").mkdir()
    assert refusal(tool.main, [str(tmp_path / "empty"), "--decode", decode]) == (
        f"{tmp_path}/empty has no finished cell that can be compared.", "make, then make frontier.")
    assert refusal(tool.main, [out, "--decode", decode, "--batch", "3"]) == (
        f"{decode} has no batch of 3.", "give one of 1, 8.")
    nowhere = tmp_path / "no"
    assert refusal(tool.main, [out, "--decode", decode, "--out", str(nowhere)])[0] == f"there is no folder {nowhere}."

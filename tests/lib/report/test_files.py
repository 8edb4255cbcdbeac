"""A report's files: all written, made anew only when something changed, and the command that writes them."""

import csv
import json
import subprocess
import sys

import pytest

from lib.plan import Options, Plan
from lib.report import files
from lib.report.content import content
from tests.harness import ROOT, run
from tests.lib.report.test_content import BELOW, V0, study  # noqa: F401  (the fixture)

FORMS = {"report.md", "report.csv", "report.json", "report.html"}


@pytest.fixture
def made(study, tmp_path, monkeypatch):  # noqa: F811
    """A report's content and a folder to write it to; pictures are made in no time."""
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    from lib.report import charts

    monkeypatch.setattr(charts, "drawn", charts.png, raising=False)
    monkeypatch.setattr(charts, "png", lambda spec: b"a picture")
    found = content(study("V0 V1", 'CONTROL_STEPS="A0"', V0=V0, V1=BELOW, A0=[3.01, 3.0, None]))
    return found, tmp_path / "report"


def test_every_form_is_written(made, monkeypatch):
    from lib.report import charts

    found, out = made
    monkeypatch.setattr(charts, "png", charts.drawn)
    text, left_out = files.write(out, found)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    names = {path.name for path in out.iterdir()}
    assert left_out is None and names >= FORMS and {"differences.png", "throughput.png"} <= names
    assert json.loads((out / "report.json").read_text()) == found and (out / "report.md").read_text() == text


def test_the_spreadsheet_has_a_row_a_step(made):
    found, _ = made
    rows = list(csv.DictReader(files.spreadsheet(found).splitlines()))
    assert [row["name"] for row in rows] == ["V0", "V1", "A0"] and rows[0]["word"] == "" and rows[2]["control"] == "null"
    assert (rows[1]["word"], float(rows[1]["difference"])) == ("BETTER", pytest.approx(-0.1))
    assert rows[2]["word"] == "INCOMPLETE" and rows[2]["p_holm"] == "" and float(rows[1]["speed_ratio"]) == 1.0


def test_contrasts_follow_in_the_spreadsheet(made):
    found, _ = made
    one = {"name": "A0 vs V1", "step": "A0", "comparison": found["steps"][1]["comparison"] | {"word": "WORSE"}}
    *_, row = csv.DictReader(files.spreadsheet(found | {"contrasts": [one]}).splitlines())
    assert (row["name"], row["step"], row["word"], row["val_loss"], row["seeds_done"]) == ("A0 vs V1", "A0", "WORSE", "", "")
    assert float(row["difference"]) == pytest.approx(-0.1)


def test_pictures_are_made_anew_only_if_the_content_changed(made):
    found, out = made
    files.write(out, found)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.[ph][nt]*")}
    files.write(out, found)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (out / "differences.png").unlink()
    files.write(out, found)
    assert (out / "differences.png").exists()
    files.write(out, found | {"notes": ["something new"]})
    assert "something new" in (out / "report.html").read_text()


def test_a_picture_without_data_goes_and_one_of_the_users_stays(made):
    found, out = made
    out.mkdir()
    for name in ("gates.png", "mine.png"):
        (out / name).write_bytes(b"old")
    files.write(out, found)
    assert not (out / "gates.png").exists() and (out / "mine.png").exists()


@pytest.mark.parametrize("module", files.NEEDED)
def test_without_the_drawing_packages_the_rest_is_written_and_said(made, monkeypatch, module):
    found, out = made
    monkeypatch.setitem(sys.modules, module, None)
    assert files.write(out, found)[1] == f"{module} is not installed, so report.html and the pictures were left out"
    assert {path.name for path in out.iterdir()} == FORMS - {"report.html"}


# The command

def drawing():
    """The command draws in a process of its own, so it needs the real thing."""
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")


@pytest.mark.parametrize("end, code, error", [
    ("diverged", 0, ""),
    ("failed", 1, "without a result: V1 seed 1 (failed); make resumes interrupted cells, make RETRY=1 runs failed "
     "ones again\n")])
def test_the_report_is_printed_written_and_fails_with_failed_cells(study, tmp_path, end, code, error):  # noqa: F811
    drawing()
    study(seeds="1", V0=[3.0], V1=[end])
    done = run("scripts.report")
    written = (tmp_path / "out/report.md").read_text()
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == f"\n{written}\nwritten to {tmp_path}/out/report.md, .csv, .json, .html\n"
    assert {path.name for path in (tmp_path / "out").glob("report.*")} == FORMS


def test_the_report_of_a_half_finished_study_is_written(study, tmp_path):  # noqa: F811
    drawing()
    study("V0 V1", V0=[3.0, None, None])
    done = run("scripts.report")
    assert done.returncode == 0 and "INCOMPLETE" in done.stdout and (tmp_path / "out/report.html").exists()


def test_a_report_that_cannot_be_written_is_two_lines(study, tmp_path):  # noqa: F811
    study(seeds="1")
    (tmp_path / "file").touch()
    done = run("scripts.report", KABLATE_OUT=tmp_path / "file/out")
    assert done.returncode == 2 and done.stderr == (f"error: {tmp_path}/file/out cannot be written: Not a directory.\n"
                                                    "  try: make report OUT=folder with a folder you may write to.\n")


def test_a_page_is_drawn_again_from_the_json_alone(made, tmp_path):
    found, out = made
    files.write(out, found)
    page = (out / "report.html").read_text()
    for path in list(out.iterdir()):
        if path.name != "report.json":
            path.unlink()
    done = run("scripts.report", FROM=out)
    assert done.returncode == 0 and done.stdout == f"written to {out}/report.html\n", done.stderr
    assert (out / "report.html").read_text() == page and {p.name for p in out.iterdir()} == {"report.json", "report.html"}


@pytest.mark.parametrize("text", [None, "{", "[]", '{"steps": 1}'])
def test_what_is_no_report_gives_two_lines(tmp_path, text):
    drawing()
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    done = run("scripts.report", FROM=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}/report.json gives no page: ")
    assert done.stderr.endswith("  try: make report FROM=folder with a folder that holds a report.json of make report.\n")
    assert not (tmp_path / "report.html").exists()


def test_without_scipy_two_lines_say_what_is_missing(study, tmp_path):  # noqa: F811
    study(seeds="1", V0=[3.0])
    code = "import sys; sys.modules['scipy'] = None; sys.modules['scipy.special'] = None; import runpy; " \
           "sys.argv[1:] = []; runpy.run_module('scripts.report', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "error: the report needs scipy, which is not installed.\n"
        "  try: pip install scipy, then make report (finished cells are kept).\n")
    assert Plan(Options()).status, "the plan does without"

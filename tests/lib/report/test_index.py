"""The index of all studies, and the server that shows it on this machine only."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lib.report import index, page
from tests.harness import ROOT, run_here
from tests.lib.report import made_up

pytest.importorskip("jinja2", reason="jinja2 is not installed")


@pytest.fixture
def studies(tmp_path):
    """A folder of studies in all states, and a secret beside it that links lead to."""
    root, outside = tmp_path / "studies", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (outside / "report.json").write_text(json.dumps(made_up.small()))
    for name, content in (("normal", made_up.normal()), ("large", made_up.large()), ("b&<i>", made_up.empty())):
        (root / name).mkdir(parents=True)
        (root / name / "report.json").write_text(json.dumps(content))
    (root / "normal" / "report.html").write_text(page.render(made_up.normal(), {}))
    (root / "large" / "report.html").write_text("<p>an older one")
    for cell in ("test_V0_adamw_none", "test_V1_adamw_none"):
        (root / "running" / cell).mkdir(parents=True)
    (root / "running" / "test_V0_adamw_none" / "metrics.json").write_text("{}")
    (root / "running" / "test_V0_adamw_none" / "training.log").write_text("step 1")
    for name, text in (("cut", "{"), ("list", "[]"), ("foreign", '{"format": 99}'), ("hollow", '{"format": 1}'),
                       ("nan", '{"format": 1, "steps": NaN}'), ("deep", "[" * 100_000),
                       ("odd", '{"format": 1, "title": 1, "steps": [{"cells": [{"name": []}]}]}')):
        (root / name).mkdir()
        (root / name / "report.json").write_text(text)
    (root / "nothing").mkdir()
    (root / "README.md").write_text("readme")
    (root / "away").symlink_to(outside)
    (root / "normal" / "link.txt").symlink_to(outside / "secret.txt")
    (root / "trap").mkdir()
    (root / "trap" / "index.html").symlink_to(outside / "secret.txt")
    return root


def by_name(rows):
    return {row["name"]: row for row in rows}


def test_verdicts_of_contrasts_are_counted_too(studies):
    before = by_name(index.collect(studies))["normal"]["words"]
    more = made_up.normal() | {"contrasts": [{"comparison": {"word": "BETTER"}}, {"comparison": {"word": "WORSE"}}]}
    (studies / "normal" / "report.json").write_text(json.dumps(more))
    after = by_name(index.collect(studies))["normal"]["words"]
    assert after == before | {"BETTER": before["BETTER"] + 1, "WORSE": before.get("WORSE", 0) + 1}


def test_each_study_is_a_row_and_a_damaged_one_says_so(studies):
    rows = by_name(index.collect(studies))
    damaged = {"cut", "hollow", "nan", "odd", "deep"}
    assert set(rows) == damaged | {"normal", "large", "b&<i>", "running", "away", "list", "foreign"}
    normal, large = rows["normal"], rows["large"]
    assert (normal["done"], normal["planned"], normal["report"], normal["problem"]) == (21, 21, "current", None)
    assert normal["words"]["BETTER"] == 1 and normal["device"] == "AMD EPYC 7B13"
    assert (large["done"], large["planned"], large["report"]) == (101, 128, "old") and large["words"]["INCOMPLETE"] == 1
    new, running = rows["b&<i>"], rows["running"]
    assert (new["done"], new["planned"], new["finished"]) == (0, 2, None)
    assert (running["done"], running["planned"], running["report"]) == (1, None, "missing")
    assert {rows[n]["problem"] for n in damaged} == {"report.json is damaged"}
    assert rows["list"]["problem"] == rows["foreign"]["problem"] == "report.json is not one of this program"
    assert rows["away"]["problem"] == "a link leads out of this folder" and rows["away"]["planned"] is None
    assert index.collect(studies)[0]["name"] == "large", "the latest result first"


def test_a_study_that_goes_on_is_counted_on_disk(studies):
    first, second = made_up.normal()["steps"][0]["cells"][:2]
    (studies / "normal" / first["name"]).mkdir()
    (studies / "normal" / "test_V9_new_none").mkdir()
    (studies / "normal" / "test_V9_new_none" / "metrics.json").write_text("{}")
    row = by_name(index.collect(studies))["normal"]
    assert (row["done"], row["planned"]) == (21, 22), "one is being run again, one is new and done"


def test_the_page_links_reports_and_escapes_names(studies):
    text = index.render(index.collect(studies))
    assert set(re.findall(r'href="([^"]+)"', text)) == {"./normal/report.html", "./large/report.html"}
    assert "<i>" not in text and "b&amp;&lt;i&gt;" in text and "make report" in text and "report.json is damaged" in text
    assert "1 BETTER" in text and "101/128" in text and "<script" not in text and "http://" not in text
    assert "There is no study here yet" in index.render([])


def test_an_unreadable_or_absent_folder_has_no_rows(tmp_path):
    assert index.collect(tmp_path / "absent") == [] and index.collect(tmp_path) == []


def browse(*arguments, port="", **options):
    environment = {k: v for k, v in os.environ.items() if k != "PORT"} | {"PORT": str(port), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "scripts.browse", *map(str, arguments)], cwd=ROOT, env=environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, folder, port):
        self.process = browse(folder, port=port)
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if match := re.match(r"http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(match[1])
                return
        raise AssertionError(self.process.stderr.read())

    def get(self, path, host=None, method="GET"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers


@pytest.fixture
def server(studies):
    made = Server(studies, free_port())
    yield made
    made.process.kill()
    made.process.communicate()


def test_the_folder_is_served_and_nothing_outside_it(server, studies):
    assert (studies / "index.html").read_text().startswith("<!doctype html>")
    status, text, headers = server.get("/")
    assert status == 200 and "101/128" in text and headers["X-Content-Type-Options"] == "nosniff"
    assert server.get("/normal/report.html")[0] == 200 and server.get("/", method="HEAD")[:2] == (200, "")
    status, text, headers = server.get("/running/test_V0_adamw_none/training.log")
    assert (status, text, headers["Content-Type"]) == (200, "step 1", "text/plain; charset=utf-8")
    for path in ("/../outside/secret.txt", "/%2e%2e/outside/secret.txt", "/..%2foutside/secret.txt", "/trap", "/trap/",
                 "/away/", "//outside/../../outside/secret.txt", "/away/secret.txt", "/normal/link.txt",
                 "/normal/../../outside/secret.txt"):
        status, text, _ = server.get(path)
        assert status == 404 and "secret" not in re.sub("secret.txt", "", text), path
    assert server.get("/", host="evil.example")[0] == 403 and server.get("/", host=f"localhost:{server.port}")[0] == 200
    assert server.get("/", host="evil.example:127.0.0.1")[0] == 403


def test_the_index_is_made_anew_at_each_visit(server, studies):
    assert "fresh" not in server.get("/")[1]
    (studies / "fresh" / "test_V0_x").mkdir(parents=True)
    assert "fresh" in server.get("/")[1] and "fresh" in server.get("/index.html")[1]


def test_only_loopback_is_bound(server):
    tables = [Path(f"/proc/{server.process.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    bound = [line.split()[1] for table in tables for line in table.splitlines()]
    assert [address for address in bound if address.endswith(f":{server.port:04X}")] == [f"0100007F:{server.port:04X}"]


def test_ctrl_c_ends_with_status_0(server):
    server.process.send_signal(signal.SIGINT)
    out, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and err == ""


def test_a_taken_port_gives_the_next_one(studies):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(studies, port)
        try:
            assert port < server.port <= port + 20 and f"port {port} is taken" in "".join(server.said)
        finally:
            server.process.kill()
            server.process.communicate()


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8e3", "999999999999", "\u0661\u0662"])
def test_a_bad_port_is_refused(studies, port, monkeypatch):
    monkeypatch.setenv("PORT", port)
    done = run_here("-m", "scripts.browse", studies)
    assert done.returncode == 2
    assert done.stderr == f"error: PORT='{port}' is not a port from 1 to 65535.\n  try: make browse PORT=8000.\n"


def test_no_serve_only_writes(studies):
    done = run_here("-m", "scripts.browse", "--no-serve", studies)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"written to {studies / 'index.html'}\n"
    done = run_here("-m", "scripts.browse", studies / "absent")
    assert done.returncode == 2 and "there is no folder" in done.stderr

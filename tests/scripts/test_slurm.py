"""make slurm as a person uses it: on a stand-in for Slurm's tools everywhere, on a real Slurm where one can be started."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lib import results
from scripts import slurm_box
from tests.harness import copy_tree_that_trains_nothing

pytest.importorskip("submitit")
STUDY = """CONFIG_MODEL_TINY=y
CONFIG_DATA_PYSTDLIB=y
CONFIG_GPT2_MAX_ITERS=40
CONFIG_DEVICE_CPU=y
CONFIG_CPU_THREADS=1
CONFIG_STUDY="micro"
CONFIG_STOP_SECONDS=30
CONFIG_SEEDS="2"
CONFIG_ABLATION_STEPS="V0 V19 C1"
"""
# sbatch, squeue, scancel and srun on a file: jobs wait until a test says what comes of them.
STAND_IN = """#!{python}
import json, os, re, sys
from pathlib import Path
name, here = Path(sys.argv[0]).name, Path(__file__).resolve().parent
path = here / "jobs.json"
jobs = json.loads(path.read_text()) if path.exists() else []
if name == "sbatch":
    given = dict(re.findall(r"#SBATCH --([a-z-]+)=(.*)", Path(sys.argv[1]).read_text()))
    if "partition" in given and given["partition"] == "none":
        sys.exit("sbatch: error: invalid partition specified: none")
    number = len({{job["array"] for job in jobs}}) + 1
    last = int(re.match(r"0-(\\d+)", given["array"])[1]) if "array" in given else None
    for index in range((last or 0) + 1):
        jobs.append(dict(given, array=number, index="N/A" if last is None else index, state="PENDING"))
        jobs[-1]["environ"] = dict(os.environ)
    print(f"Submitted batch job {{number}}")
elif name == "squeue":
    for job in jobs:
        print(job["array"], job["index"], job["state"], "", "None", job["comment"], sep="|")
elif name == "scancel":
    for job in jobs:
        if sys.argv[1:] and {{str(job["array"]), f"{{job['array']}}_{{job['index']}}"}} & set(sys.argv[1:]):
            job["state"] = "CANCELLED"
path.write_text(json.dumps(jobs))
"""


class Site:
    """A copy of the project whose trainer trains nothing, a study, and Slurm's tools in `tools`."""

    def __init__(self, folder: Path, environ: dict):
        self.tree, self.out = copy_tree_that_trains_nothing(folder / "tree"), folder / "out"
        self.config = folder / "dot.config"
        self.config.write_text(STUDY + f'CONFIG_OUTPUT_DIR="{self.out}"\n')
        (folder / "without").mkdir()
        (folder / "without/vl_convert.py").write_text("raise ModuleNotFoundError(name='vl_convert')\n")
        self.environ = os.environ | {"KCONFIG_CONFIG": str(self.config), "PYTHONPATH": str(folder / "without")} | environ

    def make(self, *goals, fails=False) -> str:
        done = subprocess.run(["make", "--no-print-directory", f"PYTHON={sys.executable}", *goals], cwd=self.tree, text=True,
                              capture_output=True, env=self.environ, timeout=120)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def states(self) -> dict:
        return {cell.name: (results.read(cell) or {}).get("state") for cell in sorted(self.out.glob("test_*"))}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "bin").mkdir()
    for name in ("sbatch", "squeue", "scancel", "srun"):
        (folder / "bin" / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / "bin" / name).chmod(0o755)
    site = Site(folder, {"PATH": f"{folder}/bin:{os.environ['PATH']}"})
    site.jobs = folder / "bin/jobs.json"
    return site


def jobs_of(site) -> list[dict]:
    return json.loads(site.jobs.read_text())


def test_what_is_missing_is_submitted_once_with_the_report_after_it(stand_in):
    said = stand_in.make("slurm", "SEEDS=1337 1338")
    jobs = jobs_of(stand_in)
    assert "6 of 6 cells to submit" in said and [job["array"] for job in jobs] == [1, 1, 1, 1, 2, 3, 4]
    assert [job.get("dependency") for job in jobs[4:]] == ["afterok:1_1", "afterok:1_3", "afterany:1:2:3"]
    assert all("requeue" not in job and job["signal"] == "USR2@90" and job["chdir"] == str(stand_in.tree) for job in jobs)
    assert all(not name.startswith(("KABLATE_", "MAKE", "MFLAGS", "KCONFIG")) for job in jobs for name in job["environ"])
    assert "0 of 6 cells to submit, 6 are in the queue" in stand_in.make("slurm") and len(jobs_of(stand_in)) == len(jobs)
    assert stand_in.make("slurm-status").count("| pending |") == 7
    jobs[-1]["state"] = "FAILED"  # or it was never submitted, because the disk was full after the cells were
    stand_in.jobs.write_text(json.dumps(jobs))
    assert "job 5: the report" in stand_in.make("slurm")
    assert [job.get("dependency") for job in jobs_of(stand_in)[len(jobs):]] == ["afterany:1:2:3"]


def test_a_task_runs_its_cell_and_status_tells(stand_in):
    environ = stand_in.environ | {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1",
                                  "SUBMITIT_EXECUTOR": "slurm", "MAKEFLAGS": "-n", "KABLATE_MAKE_PID": "1"}
    subprocess.run([sys.executable, "-m", "submitit.core._submit", str(stand_in.out / "slurm/jobs")], cwd=stand_in.tree,
                   env=environ, check=True, capture_output=True, timeout=120)
    assert stand_in.states() == {"test_V19_adamwspam_v": "done"}
    jobs = jobs_of(stand_in)
    jobs[1]["state"], jobs[0]["state"] = "COMPLETED", "FAILED"
    stand_in.jobs.write_text(json.dumps(jobs))
    said = stand_in.make("slurm-status")
    assert "1 of 6 cells" in said and "job failed" in said and said.count("| pending |") == 5


def test_what_was_lost_is_submitted_again_and_a_changed_study_is_refused(stand_in):
    stand_in.config.write_text(stand_in.config.read_text().replace("ITERS=40", "ITERS=50"))
    assert "under another configuration" in stand_in.make("slurm", fails=True)
    stand_in.config.write_text(stand_in.config.read_text().replace("ITERS=50", "ITERS=40"))
    said, jobs = stand_in.make("slurm"), jobs_of(stand_in)
    assert "1 of 6 cells to submit, 4 are in the queue" in said
    assert jobs[7]["state"] == "CANCELLED" and jobs[-1]["dependency"] == "afterany:1:2:3:6"  # the report waits for all
    stand_in.make("slurm-cancel")
    assert {job["state"] for job in jobs_of(stand_in)} == {"COMPLETED", "FAILED", "CANCELLED"}


def test_a_refusal_of_slurm_is_told(stand_in):
    before = stand_in.config.read_text()
    stand_in.config.write_text(before + 'CONFIG_CLUSTER_PARTITION="none"\n')
    assert "invalid partition" in (said := stand_in.make("slurm", "V0", fails=True)) and "Traceback" not in said
    stand_in.config.write_text(before)


@pytest.fixture
def slurm():
    if why := slurm_box.lacking():
        pytest.skip(f"no real Slurm: {why}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    slurm_box.start(folder / "box")
    yield Site(folder, slurm_box.environment(folder / "box"))
    slurm_box.stop(folder / "box")
    shutil.rmtree(folder)


def test_a_study_completes_on_a_real_slurm(slurm):
    """Undisturbed; that it completes when jobs are killed and nodes drained is for scripts.slurm_trial to show."""
    slurm.make("slurm", "C1", "SEEDS=1")
    begun = time.monotonic()
    while "0 jobs are in the queue" not in (said := slurm.make("slurm-status")):
        assert time.monotonic() - begun < 120, said
        time.sleep(2)
    assert set(slurm.states().values()) == {"done"} and len(slurm.states()) == 2, said
    assert (slurm.out / "report.md").exists()

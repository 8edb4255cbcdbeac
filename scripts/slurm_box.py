"""A real Slurm of two nodes on this one machine, to try make slurm without a cluster.

    python -m scripts.slurm_box start FOLDER      start it; prints the variables that its tools need
    python -m scripts.slurm_box stop FOLDER       stop what was started there
    python -m scripts.slurm_box trial FOLDER      start it, prove make slurm on it, stop it

Needs root and Debian's slurm-wlm and munge (other distributions name them alike). Everything of it is in FOLDER, its ports are
free ones, and no Slurm that is installed otherwise is touched. There are a partition `batch` and a partition `urgent`, whose
jobs take the place of those of `batch`, which are queued again. The trial is scripts/slurm_trial.py.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from lib import atomic
from lib.errors import UserError, reported

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
NODES, PARTITIONS = ("n1", "n2"), ("urgent", "batch")
START_SECONDS, STOP_SECONDS = 60.0, 30.0
SBIN = "/usr/sbin:/sbin"  # not in everybody's PATH
CONFIGURATION = """ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
SchedulerParameters=sched_min_interval=500000,batch_sched_delay=1,bf_interval=5
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def environment(folder: Path) -> dict[str, str]:
    """What Slurm's tools need to find this one."""
    return {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ.get('PATH', '')}:{SBIN}"}


def lacking() -> str | None:
    """Why a Slurm cannot be started here; None if it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")]
    if missing:
        return f"{missing[0]} is not installed (apt-get install slurm-wlm munge)"
    return "it takes root" if os.geteuid() else None


def start(folder: Path, cpus: int = 1) -> None:
    """Start it in `folder`, which is made; each node has `cpus`. UserError if it does not come up. The path is short and
    plain: it stands in slurm.conf, and a socket's has 107 characters at most."""
    if why := lacking():
        raise UserError(f"no Slurm can be started here: {why}.", "make test, which tries make slurm on a stand-in.")
    if (folder / "slurm.conf").exists():
        raise UserError(f"{folder} holds a Slurm already.", f"python -m scripts.slurm_box stop {folder}, or another folder.")
    for part in ("munge", "state", *(f"spool-{node}" for node in NODES)):
        (folder / part).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    host = socket.gethostname().partition(".")[0]
    control, *ports = free_ports(1 + len(NODES))
    nodes = "\n".join(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
                      for node, port in zip(NODES, ports, strict=True))
    key = folder / "munge/key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    munge = [f"--{option}={folder}/munge/{name}" for option, name in
             (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
    atomic.write_text(folder / "slurm.conf", CONFIGURATION.format(host=host, port=control, folder=folder, nodes=nodes))
    try:
        _run(folder, "munged", "--force", *munge)
        _run(folder, "slurmctld")
        for node in NODES:
            _run(folder, "slurmd", "-N", node)
        _wait_until_idle(folder)
    except BaseException:
        stop(folder)
        raise


def free_ports(number: int) -> list[int]:
    """So many ports of this machine that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_until_idle(folder: Path) -> None:
    begun = time.monotonic()
    while True:
        states = _run(folder, "sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T", fails=True).split()
        if states == ["idle"] * len(NODES):
            return
        if time.monotonic() - begun > START_SECONDS:
            raise UserError(f"Slurm's nodes are {' and '.join(states) or 'not there'} after {START_SECONDS:.0f} s.",
                            f"read {folder}/slurmctld.log and slurmd-n1.log.")
        time.sleep(0.5)


def stop(folder: Path) -> None:
    """Cancel the jobs of the Slurm in `folder`, end its daemons, and forget its configuration."""
    if (folder / "slurmctld.pid").exists():
        _cancel_all(folder)
    running = [int(path.read_text()) for path in [*folder.glob("slurm*.pid"), *folder.glob("munge/pid")]]
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    begun = time.monotonic()
    while any(_lives(pid) for pid in running) and time.monotonic() - begun < STOP_SECONDS:
        time.sleep(0.1)
    for pid in running:
        if _lives(pid):
            os.kill(pid, signal.SIGKILL)
    (folder / "slurm.conf").unlink(missing_ok=True)


def _cancel_all(folder: Path) -> None:
    """Until no job is left, or STOP_SECONDS have passed: a step would outlive its daemon."""
    begun = time.monotonic()
    for name in PARTITIONS:
        _run(folder, "scancel", f"--partition={name}", fails=True)
    while _run(folder, "squeue", "--noheader", fails=True).strip() and time.monotonic() - begun < STOP_SECONDS:
        time.sleep(0.2)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _run(folder: Path, *words: str, fails: bool = False) -> str:
    with open(folder / "start.log", "a") as log:
        done = subprocess.run(words, env=os.environ | environment(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=log, text=True, timeout=START_SECONDS)
    if done.returncode and not fails:
        raise UserError(f"{words[0]} ended with {done.returncode}.", f"read {folder}/start.log.")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.slurm_box", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "stop", "trial"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of each node (default 2)")
    args = parser.parse_args()
    folder = args.folder.absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a trial that is ended stops its Slurm
    if args.what == "stop":
        stop(folder)
        return 0
    start(folder, args.cpus)
    if args.what == "start":
        print(f"SLURM_CONF={folder}/slurm.conf")
        return 0
    from scripts import slurm_trial

    try:
        return slurm_trial.run(folder / "trial", os.environ | environment(folder))
    finally:
        stop(folder)


if __name__ == "__main__":
    with reported():
        sys.exit(main())

"""Slots: which of this machine's GPUs a cell may use while others run beside it, and whether any did.

A launcher takes the slots of its cell before the cell starts, and waits while none is free. A slot is a lock on a file in a
folder of this user on this machine. Invariants: the cell inherits what its launcher holds, so a slot is free again when both
have ended, however they did, and not before; a cell that has a GPU alone (CELLS_PER_GPU=1) shares it with no cell of another
make either, whatever that one's CELLS_PER_GPU is; of two cells that met on a device, both are marked, in their own folders,
so that a mark outlives an interruption. On a CPU nobody waits: its slots only tell who met.

GPUs are found without torch, which a launcher does not import. What other users or other programs do is not seen.
"""

import contextlib
import fcntl
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib import generations, ranks
from lib.errors import UserError
from lib.kconfig import SET
from lib.paths import shown

SLOT_VARIABLE = "KABLATE_SLOT"  # tells a cell that whom it met on its device is on record
MARK = ".shared_device"  # in the folder of a cell that is not finished: it has met another one
CPU = "cpu"
LISTED = re.compile(r"^( *)(?:GPU \d+:|MIG) (.*?)(?: +Device +\d+:)? \(UUID: ([\w/-]+)\)", re.M)  # by nvidia-smi -L
CARDS = Path("/proc/driver/nvidia/gpus")  # where the driver says it, should that program be missing
POLL_SECONDS = 0.5
PROGRAM_SECONDS = 30.0  # nvidia-smi, on a machine whose driver has to wake up first


@dataclass(frozen=True)
class Slot:
    """What a cell may use: its GPUs (none on a CPU), the descriptors that keep them, and what to set in its environment."""

    devices: tuple[str, ...]
    handles: tuple[int, ...]
    environment: dict[str, str]


def devices_of_cell(jobs: int, gpus: int, gpus_per_step: int, cells_per_gpu: int) -> int:
    """How many GPUs one cell gets on a machine that has `gpus`; 0 where it has none.

    `jobs` is N of make -jN (0: a -j without a number). GPUS_PER_STEP=0 is all of the box for cells that run one after the
    other. Where they may run side by side it is one GPU each, and not the box divided by N: the number of GPUs is a fact of
    the experiment, which another -j is not to change once more.
    """
    if gpus_per_step > gpus > 0:
        raise UserError(f"GPUS_PER_STEP={gpus_per_step}, but this machine has {gpus} to use.",
                        "set a smaller GPUS_PER_STEP in make menuconfig, or CUDA_VISIBLE_DEVICES to more GPUs.")
    if gpus == 0 or gpus_per_step:
        return min(gpus, gpus_per_step)
    return gpus if jobs == 1 and cells_per_gpu == 1 else 1


def cells_at_once(find_gpus: Callable[[], list[str]], gpus_per_step: int, cells_per_gpu: int) -> int:
    """How many cells have room side by side on the GPUs that `find_gpus()` gives: what make runs where nobody says -jN or
    JOBS. One, without looking, where it takes them all; and one where there is no GPU."""
    if not gpus_per_step and cells_per_gpu == 1:
        return 1
    return max(1, len(find_gpus()) // max(1, gpus_per_step) * cells_per_gpu)


def is_parallel() -> bool:
    """Whether the make that has started this process was given -j."""
    return bool(re.search(r"(^| )(-j|--jobserver)", os.environ.get("MAKEFLAGS", "")))


def jobs_of_make() -> int:
    """N of the make -jN that has started this process: 1 without -j, 0 for one without a number."""
    found = re.search(r"(?:^| )-j ?(\d*)(?= |$)", os.environ.get("MAKEFLAGS", "").partition(" -- ")[0])
    return 1 if found is None else int(found[1] or 0)


def gpus() -> list[str]:
    """The GPUs that a cell could use now, as CUDA_VISIBLE_DEVICES names them: by UUID, or by number where the machine's order
    and CUDA's may differ."""
    return _visible(_installed(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _installed() -> list[tuple[str, str]]:
    """(UUID, model) of each GPU of this machine in the order of its bus; of one that is split (MIG), its parts instead."""
    found = []
    if program := shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=True).stdout
            for indent, model, uuid in LISTED.findall(said):
                if indent and found and found[-1][0].startswith("GPU-"):
                    found.pop()
                found.append((uuid, model if not indent else f"part {len(found)}"))
            return found
    for card in sorted(CARDS.glob("*/information")):
        with contextlib.suppress(OSError):
            facts = dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", card.read_text(), re.M))
            found += [(facts["GPU UUID"], facts.get("Model", ""))] if "GPU UUID" in facts else []
    return found


def _visible(installed: list[tuple[str, str]], wanted: str | None) -> list[str]:
    """Of these, those that CUDA_VISIBLE_DEVICES leaves, which as in CUDA ends at the first word that names none."""
    uuids = [uuid for uuid, _ in installed]
    if wanted is None:
        return uuids
    alike = len({model for _, model in installed}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    left: list[str] = []
    for word in map(str.strip, wanted.split(",")):
        named = [uuid for uuid in uuids if word and uuid.startswith(word)]
        if re.fullmatch(r"[0-9]{1,4}", word) and int(word) < len(uuids):
            name = uuids[int(word)] if alike else word
        elif len(named) == 1:
            name = named[0]
        else:
            break
        if name in left:
            break
        left.append(name)
    return left


@contextlib.contextmanager
def held(config: str, folder: Path, title: str, ended: Callable[[], bool]) -> Iterator[Any]:
    """The slots of the cell in `folder`, for as long as the block (and the cell, which inherits their descriptors) runs; None
    if `ended()` came before one was free. `config` is the cell's .config, `title` what to call it while it waits.

    UserError if the machine cannot give the cell what it needs, ever.
    """
    symbol = {match[1]: match[2].strip('"') for match in map(SET.fullmatch, config.splitlines()) if match}
    per_gpu, per_step = (int(symbol.get(name, default)) for name, default in (("CELLS_PER_GPU", "1"), ("GPUS_PER_STEP", "0")))
    alone = {name: symbol.get(name) == "y" for name in ("EVALUATE_ONLY", "KVSPLICE")}
    asked = SimpleNamespace(**alone, INIT_FROM_STEP=symbol.get("INIT_FROM_STEP"))
    if ranks.one_process(asked):  # type: ignore[arg-type]  # as much of a configuration as is asked for
        per_step = 1  # it would leave the others idle
    there = [] if symbol.get("DEVICE") == "cpu" else gpus()
    needed = devices_of_cell(jobs_of_make(), len(there), per_step, per_gpu)
    _forget(folder)  # of a part that is lost
    handles: tuple[int, ...] = ()
    try:
        slot = _waited_for(there, needed, per_gpu, folder, title, ended) if needed else _on_cpu(folder)
        handles = slot.handles if slot else ()
        yield slot
    finally:
        for handle in handles:
            os.close(handle)  # never unlocked: the cell may still run, and what it inherited is the same lock
        _forget(folder)


def _forget(folder: Path) -> None:
    """Remove the mark of a cell that has nothing to resume from: it has a result, or starts anew."""
    if not generations.there(folder):
        with contextlib.suppress(OSError):
            (folder / MARK).unlink()


def shared(folder: Path) -> bool | None:
    """In a cell: whether another one has run on its device (a GPU of its own, or this machine's CPU) while it did; None if
    nobody has looked."""
    return (folder / MARK).exists() if os.environ.get(SLOT_VARIABLE) else None


def _waited_for(there: list[str], needed: int, per_gpu: int, folder: Path, title: str,
                ended: Callable[[], bool]) -> Slot | None:
    said = False
    while not ended():
        try:
            taken = _take(_home(), there, needed, per_gpu, folder)
        except OSError as error:
            raise UserError(f"GPU slots cannot be locked in {_home_path()}: {error.strerror or error}.",
                            "free space there, or set TMPDIR to a folder of this machine.") from None
        if taken:
            devices, handles = taken
            names = ",".join(devices)
            return Slot(devices, handles, {"CUDA_VISIBLE_DEVICES": names, SLOT_VARIABLE: names})
        if not said:
            print(f"{title}: waits until other cells leave it {needed} of {len(there)} GPUs", flush=True)
            said = True
        time.sleep(POLL_SECONDS)
    return None


def _on_cpu(folder: Path) -> Slot:
    """There is always room, so what goes wrong here stops nobody: it is then not known who met."""
    try:
        _, handles = _take(_home(), [CPU], 1, None, folder)
        return Slot((), handles, {SLOT_VARIABLE: CPU})
    except (OSError, UserError):
        return Slot((), (), {SLOT_VARIABLE: ""})


def _home_path() -> Path:
    """Not XDG_RUNTIME_DIR: a login has it and a job has not, and its files go with the last login while cells run on. The name
    of the machine is in it, should several have one temporary folder."""
    return Path(tempfile.gettempdir()) / f"kablate-slots-{os.getuid()}-{re.sub('[^A-Za-z0-9.-]', '_', platform.node())}"


def _home() -> Path:
    """The folder of this user's slots on this machine. It lies where everybody may write, so it is proved to be ours alone."""
    path = _home_path()
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(f"{shown(path)} is not a folder of yours alone, so GPU slots in it could be anybody's.",
                        "remove it, or set TMPDIR to a folder of this machine.")
    return path


def _take(home: Path, there: list[str], needed: int, places: int | None, folder: Path) -> Any:
    """(devices, handles) of `needed` devices with `places` slots each (None: any number), or None if there are not so many
    with a free one. Those with the fewest neighbours first. All or nothing, one taker at a time."""
    turn = os.open(home / "turn", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    taken: dict[str, list[int]] = {}
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)  # for an instant
        neighbours = {device: _neighbours(home, device) if places != 1 else [] for device in there}
        for device in sorted(there, key=lambda device: len(neighbours[device])):
            if len(taken) < needed and (handles := _locked(home, device, places, folder)):
                taken[device] = handles
        if len(taken) < needed:
            _close(taken)
            return None
        for other in {other for device in taken for other in neighbours[device]}:
            for one in (other, folder):
                with contextlib.suppress(OSError):
                    (one / MARK).touch()
        devices = tuple(device for device in there if device in taken)
        return devices, tuple(handle for device in devices for handle in taken[device])
    except BaseException:
        _close(taken)
        raise
    finally:
        os.close(turn)


def _close(taken: dict[str, list[int]]) -> None:
    for handles in taken.values():
        for handle in handles:
            os.close(handle)


def _locked(home: Path, device: str, places: int | None, folder: Path) -> list[int] | None:
    """The handles of one slot of a device; None if none is free. Who wants it alone locks the device, who shares it locks it
    together with others, and one of its places for itself."""
    whole = _flock(home / _file(device), fcntl.LOCK_EX if places == 1 else fcntl.LOCK_SH)
    if whole is None or places == 1:
        return None if whole is None else [whole]
    number = 0
    while places is None or number < places:
        if (place := _flock(home / f"{_file(device)}.{number}", fcntl.LOCK_EX)) is not None:
            os.ftruncate(place, 0)
            os.pwrite(place, os.fsencode(folder.absolute()), 0)  # where a neighbour leaves its mark
            return [whole, place]
        number += 1
    os.close(whole)
    return None


def _neighbours(home: Path, device: str) -> list[Path]:
    """The folders of the cells that hold a place of this device."""
    found = []
    for path in home.glob(f"{_file(device)}.*"):
        handle = _flock(path, fcntl.LOCK_EX)  # takers come one at a time, so this keeps a free place from nobody
        if handle is None:
            found.append(Path(os.fsdecode(path.read_bytes())))
        else:
            os.close(handle)
    return found


def _flock(path: Path, kind: int) -> int | None:
    """A new handle of a file that is locked so; None if somebody else's lock is in the way."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle


def _file(device: str) -> str:
    """A device's name in a file's: the older ones of MIG hold slashes."""
    return re.sub(r"[^A-Za-z0-9-]", "_", device)

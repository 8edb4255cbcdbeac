"""No test sees what the developer's shell or an outer make has set, and hypothesis gives the same examples every time."""

import os
import signal
import sys

import pytest
from hypothesis import settings

from lib import process

process.die_with_make()  # before the variable that tells of make is taken away
settings.register_profile("kablate", deadline=None, derandomize=True, database=None)
settings.load_profile("kablate")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, which the programs under test would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An image may have it set. Some hundred processes are started here, and each would compile the same modules anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LONG = ("test_make.py", "test_training.py")  # the files with the longest tests


def pytest_collection_modifyitems(items):
    """Long tests first: no worker ends alone with one, and none takes from another the tests that share a made study."""
    items.sort(key=lambda item: item.path.name not in LONG)


OF_THE_SHELL = ("KCONFIG_CONFIG", "RETRY", "NAME", "STUDY", "STEPS", "ALL", "FULL", "A", "B", "V", "TIME", "OUT", "SEEDS",
                "FILE", "PORT", "FROM", "PROMPT", "TOKENS", "KCONFIG_SEED", "TUNE", "KILLS", "SEED", "WHAT", "STEP", "CELL",
                "TO", "TASKS", "LIMIT", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "srctree")


@pytest.fixture(autouse=True, scope="module")
def limits_of_the_compiler():
    """Set back what a module's tests set: torch's configuration takes what monkeypatch puts back for removed."""
    if "torch" not in sys.modules:
        yield
        return
    from torch._dynamo import config

    with config.patch({name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}):
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("GPT2_MAX_", "KABLATE_")) or n in OF_THE_SHELL]:
        monkeypatch.delenv(name)


@pytest.fixture
def dotconfig(tmp_path, monkeypatch):
    """dotconfig("RA_R=8", ...): a .config with these lines, which everything reads instead of the developer's own."""
    path = tmp_path / "dot.config"
    monkeypatch.setenv("KCONFIG_CONFIG", str(path))

    def write(*assignments):
        path.write_text("".join(f"CONFIG_{a}\n" for a in assignments) or "# Nothing but defaults.\n")
        return path
    return write

"""The tables of a report that describe and hold no verdict, in the order in which every form of it shows them."""

from lib.report import caches, compression, downstream, mechanisms, positions
from lib.tables import Section

MODULES = (compression, caches, mechanisms, positions, downstream)


def sections(content: dict) -> list[Section]:
    """Those that the content of a report has something for, also one that is older than some of them."""
    return [found for module in MODULES if (found := module.section(content))]

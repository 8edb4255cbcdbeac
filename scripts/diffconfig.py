"""Show how two configurations differ: symbols only in one (-, +) and changed values (a -> b).

A and B come from the environment (make A=... B=...): each a study by name or a .config file. Without them: the study that
.config came from, and .config.
"""

import argparse
import os
import sys
from pathlib import Path

from lib.config import Study
from lib.errors import UserError, reported
from lib.kconfig import Schema
from lib.paths import ROOT


def values(source: str, schema: Schema) -> dict[str, str]:
    """Every set symbol of a study or .config file, as text."""
    is_file = "/" in source or Path(source).is_file()
    study = Study(None if is_file else source, config=Path(source) if is_file else None, schema=schema)
    schema.reset()
    schema.apply(study.base, verify=False)
    return {name: symbol.str_value for name, symbol in schema.symbols.items() if symbol.str_value not in ("", "n")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.diffconfig", description=__doc__)
    parser.add_argument("a", nargs="?", default=os.environ.get("A", ""))
    parser.add_argument("b", nargs="?", default=os.environ.get("B", ""))
    args = parser.parse_args()
    path = os.environ.get("KCONFIG_CONFIG") or str(ROOT / ".config")
    if (not args.a or not args.b) and not Path(path).exists():
        raise UserError("there is no .config to compare.", "make diffconfig A=study B=study.")
    schema = Schema()
    a = args.a or Study(config=Path(path), schema=schema).name
    b = args.b or path
    old, new = values(a, schema), values(b, schema)
    if old == new:
        print(f"no difference between {a} and {b}", file=sys.stderr)  # what reads the lines finds none
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            print(f"-{name} {old[name]}")
        elif name not in old:
            print(f"+{name} {new[name]}")
        elif old[name] != new[name]:
            print(f" {name} {old[name]} -> {new[name]}")


if __name__ == "__main__":
    with reported():
        main()

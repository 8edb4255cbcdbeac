"""Where pictures take their numbers from: studies resolved as a cell would be, models built from them, and committed results.

Models are built on torch's meta device, without memory; single modules that gates and starts are read from are built for
real, from the same configuration, with the streams of a cell's seed. `settings` are put on top of every step, as on a
command line: `RA_R=8` draws other pictures.
"""

import functools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cells import baseline, steps_of
from lib.config import Config, Study, parse_step
from lib.errors import UserError
from lib.kconfig import Assignment, Schema, read_layer
from lib.paths import ROOT
from lib.steps import step_path
from lib.tables import plural

if TYPE_CHECKING:
    from torch import nn

    from gpt2.model import GPT

RESULTS = ROOT / "docs/results"


class Waits(Exception):
    """A picture's results are not committed; the text names what is missing, below docs/results."""


def with_fewer_seeds(step: dict[str, Any], most: int) -> str:
    """The name of a report's step, with its count of seeds if that is below `most`."""
    done = step["seeds_done"]
    return step["name"] if done == most else f"{step['name']} ({plural(done, 'seed')})"


class Sources:
    """`settings`: "SYMBOL=VALUE" on top of every step, where the step sets it itself. `results`: the
    folder of committed results."""

    def __init__(self, settings: tuple[str, ...] = (), results: Path = RESULTS):
        self.schema, self.results = Schema(), results
        self.settings = [Assignment(*one.partition("=")[::2], "--set") for one in settings]
        if unknown := [a.name for a in self.settings if a.name not in self.schema.prompted]:
            raise UserError(f"there is no symbol {unknown[0]}.", "make menuconfig shows all (search with /).")

    # Configurations and models

    @functools.cache  # noqa: B019  # one object lives as long as the program
    def study(self, name: str) -> Study:
        return Study(name, schema=self.schema)

    def steps(self, study: str) -> list[str]:
        """The study's steps, as its defconfig lists them."""
        return steps_of(self.study(study))

    def baseline(self, study: str) -> str:
        return baseline(self.study(study))

    @functools.cache  # noqa: B019
    def configuration(self, study: str, step: str) -> Config:
        """The step as a cell has it, with those of the settings that it names itself: RA_R=8 leaves a plain MLP as it is."""
        name, inline = parse_step(step)
        said = {a.name for a in [*read_layer(step_path(name)), *inline]}
        return self.study(study).resolve(step, overrides=[a for a in self.settings if a.name in said]).config

    def first(self, study: str, *switches: str, without: tuple[str, ...] = ()) -> str:
        """The first step of the study in which these switches are on, and those others off."""
        for step in self.steps(study):
            cfg = self.configuration(study, step)
            if all(getattr(cfg, s) for s in switches) and not any(getattr(cfg, s) for s in without):
                return step
        raise UserError(f"no step of {study} has {', '.join(switches)}.", f"make show STUDY={study} shows what its steps have.")

    @functools.cache  # noqa: B019
    def model(self, study: str, step: str) -> "GPT":
        """The whole model, without memory."""
        import torch

        from gpt2.model import GPT

        with torch.device("meta"):
            return GPT(self.configuration(study, step))

    @functools.cache  # noqa: B019
    def block(self, study: str, step: str) -> "nn.Module":
        """The first block with real tensors, as a cell of the study's seed starts."""
        from gpt2.block import Block
        from gpt2.layers import init_weights

        cfg = self.configuration(study, step)
        block = Block(cfg, 0).eval()
        init_weights(block, cfg.SEED)
        return block

    # Committed results

    def read(self, folder: str, file: str) -> dict[str, Any]:
        """A JSON file of a folder of results."""
        path = self.results / folder / file
        if not path.exists():
            raise Waits(f"docs/results/{folder}/{file}")
        return json.loads(path.read_text())

    def curves(self, folder: str) -> Iterator[tuple[dict, list[dict]]]:
        """(metrics.json, rows of metrics.jsonl) of every cell that was packed with the results, in the order of names."""
        path = self.results / folder / "cells.tar.xz"
        if not path.exists():
            raise Waits(f"docs/results/{folder}/cells.tar.xz")
        with tarfile.open(path) as archive:
            texts = {member.name: file.read().decode() for member in archive.getmembers()
                     if member.name.endswith(("metrics.json", "metrics.jsonl")) and (file := archive.extractfile(member))}
        for name in sorted(texts):
            if name.endswith("metrics.json"):
                yield json.loads(texts[name]), [json.loads(row) for row in texts[f"{name}l"].splitlines()]

"""Damaged files: cut short, emptied, or with a bit flipped, between two makes.

What must come of it, case by case: the study *survives* (it completes, equal to the bit, and says what it found), or the file
is *refused* in one sentence that names it, nothing else is changed, and with the file restored the study completes. Nothing
half is ever read as good. Which bit is flipped is drawn from the seed.
"""

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import results
from scripts.torturing.arena import Arena, Failed, Reference, Study, interrupt, last_lines

SURVIVED, REFUSED, EITHER = "survived", "refused", "survived or refused"
CHILD = "TortureChild"
LOCAL = {"DATA_PYSTDLIB": None, "DATA_LOCAL": "y", "MODEL_TINY": None, "MODEL_CUSTOM": "y", "GPT2_N_LAYER": "1",
         "GPT2_N_HEAD": "2", "GPT2_N_EMBD": "32", "GPT2_MAX_ITERS": "40"}
TOKENS = 20_000


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[:len(data) // 2]


def empty(data: bytes, draw: random.Random) -> bytes:
    return b""


def flip(data: bytes, draw: random.Random) -> bytes:
    """One bit of the middle half, where the content of a large file lies."""
    at, changed = draw.randrange(len(data) // 4, 3 * len(data) // 4), bytearray(data)
    changed[at] ^= 1 << draw.randrange(7)
    return bytes(changed)


def flip_name(data: bytes, draw: random.Random) -> bytes:
    """One bit of the name of a symbol."""
    starts = [at + 1 for at in range(len(data) - 8) if data[at:at + 8] == b"\nCONFIG_"]
    at, changed = draw.choice(starts) + draw.randrange(10), bytearray(data)
    changed[at] ^= 1 << draw.randrange(5)
    return bytes(changed)


def cut_name(data: bytes, draw: random.Random) -> bytes:
    """The end, from within the name of a symbol on."""
    return data[:data.index(b"\nCONFIG_", len(data) // 2) + 11]


def cut_line(data: bytes, draw: random.Random) -> bytes:
    """The end, from the end of a line on: what is left reads well."""
    return data[:data.index(b"\n", len(data) // 2) + 1]


def flip_digit(data: bytes, draw: random.Random) -> bytes:
    """One bit of a digit of the validation loss, so that what stands there is a number still."""
    at, changed = data.index(b'"val_loss": ') + len(b'"val_loss": 0.'), bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def flip_token(data: bytes, draw: random.Random) -> bytes:
    """The lowest bit of a token: another word of the vocabulary."""
    at, changed = 2 * draw.randrange(len(data) // 4), bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def beyond(data: bytes, draw: random.Random) -> bytes:
    """The highest bit of a token, which leaves the vocabulary."""
    at, changed = 2 * draw.randrange(len(data) // 4) + 1, bytearray(data)
    changed[at] |= 0xE0
    return bytes(changed)


def odd(data: bytes, draw: random.Random) -> bytes:
    return data[:-1]


@dataclass(frozen=True)
class Case:
    """`file` (a pattern below the study's folder) of a study in `state` is damaged by `how`."""

    file: str
    how: Callable
    state: str  # interrupted, done, configured, parent or local: see Damages
    expected: str
    named: bool = True  # whether something that was said must name the file

    @property
    def name(self) -> str:
        return f"{self.file.removeprefix('out/').removeprefix('test_*/')} {self.how.__name__.replace('_', ' ')}, {self.state}"


CHECKPOINT, BOTH = "out/test_*/checkpoint.pt", "out/test_*/checkpoint*.pt"
CASES = (
    Case(CHECKPOINT, cut, "interrupted", EITHER),
    Case(CHECKPOINT, flip, "interrupted", EITHER),
    Case(CHECKPOINT, empty, "interrupted", EITHER),
    Case(BOTH, flip, "interrupted", EITHER),
    Case("out/test_*/metrics.jsonl", cut, "interrupted", EITHER),
    Case("out/test_*/.config", cut, "interrupted", SURVIVED, named=False),  # written anew by the launcher
    Case("out/test_*/.config", flip, "interrupted", SURVIVED, named=False),
    Case("out/test_*/provenance.json", cut, "interrupted", EITHER),
    Case("out/plan/*[0-9a-f].json", cut, "interrupted", EITHER, named=False),
    Case("out/plan/*[0-9a-f].json", flip, "interrupted", EITHER, named=False),
    Case("out/plan/design.json", cut, "interrupted", REFUSED),
    Case("out/plan/design.json", flip, "interrupted", REFUSED),
    Case("out/test_*/metrics.json", cut, "done", EITHER),
    Case("out/test_*/metrics.json", empty, "done", EITHER),
    Case("out/test_*/metrics.json", flip_digit, "done", EITHER),
    Case("dot.config", cut_name, "done", REFUSED, named=False),
    Case("dot.config", flip_name, "done", REFUSED, named=False),
    Case("dot.config", cut_line, "configured", REFUSED),
    Case("dot.config", empty, "configured", REFUSED),
    Case("out/test_*/model.pt", cut, "parent", REFUSED),
    Case("out/test_*/model.pt", flip, "parent", REFUSED),
    Case("data/train.bin", odd, "local", REFUSED),
    Case("data/train.bin", cut, "local", REFUSED, named=False),
    Case("data/train.bin", beyond, "local", REFUSED),
    Case("data/train.bin", flip_token, "local", REFUSED, named=False),
)


class Damages:
    """The cases, and the states they begin from, each of which is brought about once."""

    def __init__(self, arena: Arena, reference: Reference, seed: int):
        self.arena, self.reference, self.seed = arena, reference, seed
        self.lock = threading.RLock()
        self.states: dict[str, tuple[Study, Reference] | Failed] = {}

    def cases(self) -> Iterator[Any]:
        """(name, function) of each case; the function returns a sentence for the table."""
        for number, case in enumerate(CASES):
            yield case.name, lambda number=number, case=case: self.run(number, case)

    def run(self, number: int, case: Case) -> str:
        origin, reference = self._state(case.state)
        study = self._copy(origin, f"damaged-{number}")
        draw = random.Random(f"{self.seed} {case.name}")
        paths = sorted(study.folder.glob(case.file))
        if not paths:
            raise Failed(f"there is no {case.file} to damage")
        good = {path: path.read_bytes() for path in paths}
        for path in paths:
            path.write_bytes(case.how(good[path], draw))
        try:
            return self._judge(case, study, reference, good)
        finally:
            study.kill_all()

    def _judge(self, case: Case, study: Study, reference: Reference, good: dict[Path, bytes]) -> str:
        before = kept(study, good)
        code, said = study.make("cells")
        if "Traceback" in said:
            raise Failed(f"a traceback reaches the user: {last_lines(said, 3)}")
        records = {cell: results.read(cell) for cell in study.cells()}
        for record in records.values():
            said += f"\n{record['reason']}" if record and record["state"] == "failed" else ""
        said += "".join(log.read_text(errors="replace") for log in study.out.glob("test_*/training.log"))
        names = {path.name for path in good}
        done = code == 0 and all(record and record["state"] == "done" for record in records.values())
        if case.named and not any(name in text() for text in (lambda: said, lambda: archived(study),
                                                              lambda: study.make("plan")[1]) for name in names):
            raise Failed(f"{' and '.join(sorted(names))} is damaged, and nothing says so: {last_lines(study.said())}")
        if done:
            reference.check(study.out, rows="metrics.jsonl" not in names)
            if case.expected == REFUSED:
                raise Failed("the study goes on as if nothing were wrong")
            return "survived, equal to the bit"
        if case.expected == SURVIVED:
            raise Failed(f"the study does not survive it: {last_lines(said)}")
        changed = [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]
        if changed:
            raise Failed(f"refused, but {changed[0].name} is not what it was")
        sentence = next((line for line in said.splitlines() if line.startswith("error: ")), last_lines(said, 1))
        for path, content in good.items():
            path.write_bytes(content)
        code, said = study.make("cells", "RETRY=1")
        if code:
            raise Failed(f"with the file restored make ends with {code}: {last_lines(said)}")
        reference.check(study.out)
        return f"refused: {sentence.removeprefix('error: ').replace(f'{study.folder}/', '')}"

    def _copy(self, origin: Study, name: str) -> Study:
        """Another study in the same state."""
        symbols = {key: value for key, value in origin.symbols.items() if key != "OUTPUT_DIR"}
        if "DATA_LOCAL_DIR" in symbols:
            symbols["DATA_LOCAL_DIR"] = f'"{self.arena.root / name / "data"}"'
        study = self.arena.study(name, **symbols)
        study.config.write_text(origin.config.read_text().replace(f'"{origin.folder}/', f'"{study.folder}/'))
        shutil.copytree(origin.out, study.out)
        if (origin.folder / "data").exists():
            shutil.copytree(origin.folder / "data", study.folder / "data")
        return study

    def _state(self, name: str) -> tuple[Study, Reference]:
        with self.lock:
            if name not in self.states:
                try:
                    self.states[name] = getattr(self, f"_{name}")()
                except Failed as error:
                    self.states[name] = Failed(f"it cannot even be brought about: {error}")
            if isinstance(self.states[name], Failed):
                raise self.states[name]  # type: ignore[misc]  # a Failed
            return self.states[name]  # type: ignore[return-value]  # no Failed

    def _interrupted(self) -> tuple[Study, Reference]:
        """Stopped twice, so that there are two checkpoints where two are kept."""
        study = self.arena.study("interrupted", CHECKPOINT_INTERVAL="0")
        for _ in range(2):
            interrupt(study)
        return study, self.reference

    def _done(self) -> tuple[Study, Reference]:
        study = self.arena.study("done")
        study.finish(self.reference)
        return study, self.reference

    def _configured(self) -> tuple[Study, Reference]:
        """The same, with a .config that was not written by hand."""
        origin, reference = self._state("done")
        study = self._copy(origin, "configured")
        code, said = study.make("olddefconfig")
        if code:
            raise Failed(f"make olddefconfig ends with {code}: {last_lines(said)}")
        return study, reference

    def _parent(self) -> tuple[Study, Reference]:
        """A finished cell, and one planned that starts from its weights."""
        step = self._state("done")[0].symbols["ABLATION_STEPS"].strip('"')
        (self.arena.tree / f"gpt2/steps/{CHILD}.config").write_text(
            f'# Help: the baseline, continued\nCONFIG_INIT_FROM_STEP="{step}"\nCONFIG_GPT2_MAX_ITERS=2\n')
        steps = {"ABLATION_STEPS": f'"{step} {CHILD}"'}
        whole = Reference(self.arena.study("family", **steps), "cells")
        study = self.arena.study("parent", **steps)
        shutil.copytree(self._state("done")[0].out, study.out)
        return study, whole

    def _local(self) -> tuple[Study, Reference]:
        """An interrupted cell on data of the user's own."""
        studies = []
        for name in ("local-whole", "local"):
            folder = self.arena.root / name / "data"
            study = self.arena.study(name, DATA_LOCAL_DIR=f'"{folder}"', **LOCAL)
            folder.mkdir()
            draw = random.Random(1)
            for split in ("train", "val"):
                ids = [draw.randrange(50_000) for _ in range(TOKENS)]
                (folder / f"{split}.bin").write_bytes(b"".join(i.to_bytes(2, "little") for i in ids))
            studies.append(study)
        whole, study = studies
        interrupt(study)
        return study, Reference(whole, "cells")


def kept(study: Study, damaged: dict) -> dict[Path, bytes]:
    """What a refusal must leave as it is: everything of value that was not damaged itself."""
    return {path: path.read_bytes() for pattern in ("out/test_*/*.pt", "out/test_*/metrics.json")
            for path in study.folder.glob(pattern) if path not in damaged}


def archived(study: Study) -> str:
    """What was moved away instead of being overwritten."""
    return " ".join(path.name for path in study.out.glob("archive/*/*"))

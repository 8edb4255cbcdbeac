"""From a study and a step to one frozen, typed configuration, its identity and its provenance.

Layers, lowest first: the study (`.config`, or a defconfig merged with fragments, reduced to its minimal form, because a
full one would freeze conditional defaults), the step's fragment, the optimizer when it is a dimension, inline overrides
(`V1@RA_R=8`), overrides of the environment, the seed. Every layer is verified when it is applied.

*Identity* is what the numbers of a cell depend on: every prompted symbol outside the bookkeeping menu. It is kept as
two maps, symbols set and symbols at their default, so that a symbol that is added later at its default changes nothing.
This module does not import torch.
"""

import difflib
import hashlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.kconfig import BUDGET, Assignment, Schema, canonical, read_layer
from lib.paths import ROOT, shown
from lib.steps import step_path

DEFAULT_STUDY = "gpt2-ra-ablation+tiny"
# What the Makefile reads of its command line. Five of them are symbols too.
OF_MAKE = ("OUT", "SEEDS", "TIME", "UNTIL", "MAX_SEEDS", "JOBS", "LOOK", "TUNE", "RETRY", "NAME", "STUDY", "ALL", "FULL", "A",
           "B", "FILE", "PEER", "PORT", "FROM", "PROMPT", "TOKENS", "KCONFIG_SEED", "KILLS", "SEED", "WHAT", "STEP", "CELL",
           "TO", "TASKS", "LIMIT", "V", "PYTHON", "PYTHON3")
STEP_SPEC = re.compile(r"([A-Za-z][A-Za-z0-9_]*)(?:@(.+))?")
# What describes the study as a whole; in a step it would be silently without effect.
OF_THE_STUDY = ("SEED", "SEEDS", "STUDY", "ABLATION_STEPS", "BASELINE", "CONTRASTS", "OPTIMIZERS", "OUTPUT_DIR", "MARGIN",
                "CONTROL_STEPS", "MAX_SEEDS", "TUNE_LR", "JOBS", "BATCH_SIZE_AUTO", "CELLS_PER_GPU", "CLUSTER_JOBS")

# How the sequences of an optimizer step are split and drawn.
BATCH_SPLIT = ("BATCH_SIZE", "GPT2_GRADIENT_ACCUMULATION", "BATCH_DRAWN")


class Config:
    """A resolved configuration: `cfg.GPT2_BLOCK_SIZE`. Frozen; an unknown name is an AttributeError."""

    __slots__ = ("_values",)

    def __init__(self, values: dict):
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(f"no configuration symbol {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a configuration is frozen; resolve another one with lib.config.load(overrides=...)")

    def __deepcopy__(self, memo: dict) -> "Config":
        return self

    def __reduce__(self) -> tuple:
        return Config, (self._values,)

    def replace(self, **values: Any) -> "Config":
        """A copy with other values, outside Kconfig's rules: for checks and benchmarks that shrink a model."""
        unknown = values.keys() - self._values.keys()
        if unknown:
            raise AttributeError(f"no configuration symbol {sorted(unknown)}")
        return Config({**self._values, **values})

    def as_json(self) -> dict:
        """Every symbol with a JSON value; a ratio is written as the user writes it."""
        return {k: v if v is None or isinstance(v, bool | int | float | str) else str(v)
                for k, v in sorted(self._values.items())}


@dataclass(frozen=True)
class Resolved:
    """One cell's configuration: typed values, .config text, identity, and where each non-default value came from."""

    config: Config
    text: str
    identity: dict
    provenance: dict = field(default_factory=dict)

    def with_seed(self, seed: int) -> "Resolved":
        """The same configuration under another seed, without a second resolve."""
        values = dict(self.config._values, SEED=seed)
        text = re.sub(r"^CONFIG_SEED=\d+$", f"CONFIG_SEED={seed}", self.text, flags=re.M)
        identity = {part: dict(self.identity[part]) for part in ("set", "default")}  # of texts, so this copies all
        identity["default"].pop("SEED", None)
        identity["set"]["SEED"] = str(seed)
        return Resolved(Config(values), text, sealed(identity), dict(self.provenance, SEED=[str(seed), "the seed of the cell"]))


def sealed(identity: dict) -> dict:
    """The identity with its hash, which covers the symbols that differ from their defaults."""
    digest = hashlib.sha256(json.dumps(identity["set"], sort_keys=True).encode()).hexdigest()
    return {"hash": digest[:12], "set": identity["set"], "default": identity["default"]}


def identity_changes(old: dict, new: dict) -> list[str]:
    """What differs between two identities, a sentence each; empty if they are equal.

    A symbol that one side does not know counts as unchanged if the other has it at its default: adding a symbol to
    Kconfig reruns nothing, on either side of the commit that adds it.
    """
    changes = []
    before, after = {**old["default"], **old["set"]}, {**new["default"], **new["set"]}
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after:
            if before[name] != after[name]:
                changes.append(f"{name} {before[name]} -> {after[name]}")
        elif name in old["set"]:
            changes.append(f"{name} {before[name]} -> unset")
        elif name in new["set"]:
            changes.append(f"{name} unset -> {after[name]}")
    return changes


class Study:
    """A study as configured: its base layers, and `resolve` for any of its steps.

    `config` names a .config file (default: $KCONFIG_CONFIG or .config), `defconfig` a study by name ("gpt2-ra-ablation"
    or "gpt2-ra-ablation+tiny") instead. Without either and without a .config the default study is used, and
    `is_fallback` is true. `overrides` are assignments on top of every step (environment, command line). `found` are such
    that were found for the study as a whole, beneath them: the micro-batch of BATCH_SIZE_AUTO (lib/batch_size.py), which is
    off in what is resolved.
    """

    def __init__(self, defconfig: str | None = None, config: Path | None = None, overrides: Sequence[Assignment] = (),
                 schema: Schema | None = None):
        self.schema = schema or Schema()
        self.overrides, self.found = list(overrides), []
        path = Path(config or os.environ.get("KCONFIG_CONFIG") or ROOT / ".config")
        self.is_fallback = not defconfig and not path.exists()
        if config and self.is_fallback:
            raise UserError(f"there is no configuration {shown(path)}.", "make defconfig-NAME (see make list-defconfigs).")
        derived = []
        if defconfig or self.is_fallback:
            layers = defconfig_layers(defconfig or DEFAULT_STUDY)
            layers.append([Assignment("STUDY", defconfig or DEFAULT_STUDY, "the name of the study")])
        else:
            # A .config also lists symbols without a prompt; they are not set, they must agree with what they follow from.
            listed = read_layer(path)
            derived = [a for a in listed if a.name in self.schema.symbols and a.name not in self.schema.prompted]
            layers = [[a for a in listed if a not in derived]]
        self.schema.reset()
        for layer in layers:
            self.schema.apply(layer)
        self.schema.verify_derived(derived)
        self.config = Config(self.schema.values())  # the study's own values, before any step
        self.name = self.config.STUDY
        self.base = self._base_layer(layers)
        self._check(self.config, budget=not any(a.name in BUDGET for a in self.overrides))

    def _base_layer(self, layers: list[list[Assignment]]) -> list[Assignment]:
        """The study reduced to what differs from the defaults, each assignment with the file and line it came from."""
        where = {(a.name, a.value): a.where for layer in layers for a in layer}
        try:
            for layer in defconfig_layers(self.name):
                where |= {(a.name, a.value): a.where for a in layer}
        except UserError:
            pass  # a study of the user's own: the lines of .config are where its values come from
        return [Assignment(n, v, where.get((n, v), "a default of Kconfig")) for n, v in self.schema.minimal().items()]

    def text(self) -> str:
        """The study's full .config."""
        self.schema.reset()
        self.schema.apply(self.base, verify=False)
        return self.schema.text()

    def resolve(self, step: str | None = None, optimizer: str | None = None,
                overrides: list[Assignment] | None = None) -> Resolved:
        """Resolve a step ("V1" or "V1@RA_R=8") of this study; `overrides` replace the study's own."""
        layers = []
        if step:
            name, inline = parse_step(step)
            layers += [read_layer(step_path(name, self.config.STEPS_DIR)), inline]
            for a in (*layers[0], *inline):
                if a.name in OF_THE_STUDY:
                    raise UserError(f"{a.where}: {a.name} belongs to the study, a step cannot set it.",
                                    "set it in make menuconfig (SEEDS for seeds).")
                if self.config.BATCH_SIZE_AUTO and a.name in BATCH_SPLIT:
                    raise UserError(f"{a.where}: BATCH_SIZE_AUTO finds {a.name} for all steps alike, a step cannot set it.",
                                    "leave it out of the step, or set BATCH_SIZE_AUTO=n in make menuconfig.")
        if optimizer:
            layers.insert(1, [Assignment(f"OPTIMIZER_{optimizer.upper()}", "y", "OPTIMIZERS")])
        if self.config.BATCH_SIZE_AUTO:
            layers.append([Assignment("BATCH_SIZE_AUTO", "n", "resolved"), *self.found])
        layers.append(self.overrides if overrides is None else overrides)
        self.schema.reset()
        self.schema.apply(self.base, verify=False)
        for layer in layers:
            self.schema.apply(layer)
        config = Config(self.schema.values())
        self._check(config)
        minimal = self.schema.minimal()
        where = {a.name: a.where for layer in [self.base, *layers] for a in layer}
        everything = {n: canonical(self.schema.kinds[n], self.schema.symbols[n].str_value)
                      for n in sorted(self.schema.identity)}
        identity = {"set": {n: v for n, v in everything.items() if n in minimal},
                    "default": {n: v for n, v in everything.items() if n not in minimal and v != ""}}
        provenance = {n: [v, where.get(n, "a default of Kconfig")] for n, v in sorted(minimal.items())}
        provenance |= {a.name: [a.value, a.where] for a in self.found}  # also where it is the default
        return Resolved(config, self.schema.text(), sealed(identity), provenance)

    def _check(self, config: Config, budget: bool = True) -> None:
        if budget and sum(getattr(config, name) != 0 for name in BUDGET) != 1:
            given = ", ".join(f"{n}={getattr(config, n)}" for n in BUDGET)
            raise UserError(f"exactly one of seconds, iterations and tokens must be the budget, but {given}.",
                            "give one of them, e.g. GPT2_MAX_TIME=7200 make.")
        pkgutil.resolve_name(config.RULES)(config)


def announce(study: Study) -> None:
    """Say so when there is no .config and the default study is used. UserError for what stands on make's command line and
    would be a variable that nobody asks for: a symbol, or a name like one that is known. Any other name may be meant for what
    make starts, as CUDA_VISIBLE_DEVICES is."""
    given = re.findall(r"(?<!\\) (\w+)=", " " + os.environ.get("MAKEFLAGS", "").partition("-- ")[2])
    if idle := [name for name in given if name in study.schema.symbols and name not in (*BUDGET, *OF_MAKE)]:
        raise UserError(f"{idle[0]}= does nothing on make's command line: it is a symbol of the configuration.",
                        "set it in make menuconfig; for one step, ABLATION_STEPS takes STEP@SYMBOL=VALUE.")
    known = (*OF_MAKE, *BUDGET)
    for name in given:
        if name == "STEPS":
            raise UserError("STEPS= is no variable of make here.",
                            "name steps as goals (make plan V0 V1), or set ABLATION_STEPS.")
        near = [one for one in known if one.endswith(f"_{name}")] or difflib.get_close_matches(name, known, 2, 0.75)
        if name not in known and near:
            raise UserError(f"{name}= is no variable of make here.",
                            f"did you mean {' or '.join(f'{one}=' for one in near)} (make help)?")
    if study.is_fallback:
        print(f"no .config: using the study {DEFAULT_STUDY} (make list-defconfigs shows the others)", file=sys.stderr)


def refuse_study() -> None:
    """UserError for STUDY= on the command line of a goal that is about the configured study, where it would go unheard."""
    if study := os.environ.get("STUDY"):
        raise UserError(f"STUDY={study} names a study to look at (make check, show, bench-steps, ...), and this is about the "
                        "one in .config.", f"make defconfig-{study}, then this again without STUDY=.")


def load(defconfig: str | None = None, step: str | None = None, overrides: dict | None = None,
         config: Path | None = None) -> Config:
    """The configuration of one step (or of the study itself); `overrides` maps symbol names to values."""
    extra = [Assignment(n, _as_text(v), "overrides") for n, v in (overrides or {}).items()]
    return Study(defconfig, config, extra).resolve(step).config


def _as_text(value: Any) -> str:
    return {True: "y", False: "n"}[value] if isinstance(value, bool) else str(value)


def environment_overrides() -> list[Assignment]:
    """Budgets given in the environment (which holds make's command-line variables too)."""
    return [Assignment(n, os.environ[n].strip(), f"environment {n}") for n in BUDGET if os.environ.get(n, "").strip()]


def defconfig_names(folder: Path = ROOT / "defconfigs") -> dict[str, Path]:
    """Studies by name, those of defconfigs/old/ included."""
    return {p.name: p for d in (folder, folder / "old") if d.is_dir() for p in sorted(d.iterdir()) if p.is_file()}


def defconfig_layers(name: str) -> list[list[Assignment]]:
    """Layers of "study+fragment+fragment"."""
    study, *fragments = name.split("+")
    studies = defconfig_names()
    pieces = {p.name: p for p in sorted((ROOT / "defconfigs" / "fragments").iterdir())}
    for kind, wanted, known in [("defconfig", study, studies), *(("fragment", f, pieces) for f in fragments)]:
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5 if kind == "fragment" else 0.6)  # those are short
            raise UserError(f"there is no {kind} '{wanted}'.",
                            f"did you mean {near[0]}?" if near else "make list-defconfigs.")
    return [read_layer(studies[study]), *(read_layer(pieces[f]) for f in fragments)]


def parse_step(spec: str) -> tuple[str, list[Assignment]]:
    """'V1@RA_R=8,GPT2_BIAS=n' -> ('V1', its two assignments)."""
    match = STEP_SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"'{spec}' is no step.", "write a step as V1 or as V1@RA_R=8.")
    name, inline = match.groups()
    layer = []
    for part in inline.split(",") if inline else ():
        symbol, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"'{part}' in step '{spec}' is no override.", "write an override as V1@RA_R=8.")
        layer.append(Assignment(symbol.removeprefix("CONFIG_"), value, f"step {spec}"))
    return name, layer

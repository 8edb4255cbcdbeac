"""The claims ledger: what the source documents claim, and the evidence for or against each claim.

docs/claims.toml holds one [[claim]] table a claim. What a person writes there is the claim and where its evidence lies;
whether it holds is never typed: it is the outcome of a test (`proof` with `holds`: the suite passes only if the test shows
it), the word of a committed report (`artifact`), or what a comparison of committed figures with what the claim says of them
gives (`figures` with `says`, lib/figures.py), and without any of them the claim is untested.

`read` gives a Ledger or raises UserError for the first entry that is not right: every test, study, artifact and step that
an entry names must be there. `render` gives the page for people, docs/claims.md.
"""

import ast
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from lib.config import defconfig_names
from lib.errors import UserError
from lib.figures import RESULTS, WORDS, figure_at, report_at, saying
from lib.paths import ROOT
from lib.tables import table

NAME = "docs/claims.toml"
PAGE = "docs/claims.md"
KINDS = ("structural", "quantitative")
HOLDS, FAILS, MEASURED, UNTESTED = "holds by proof", "does not hold", "measured", "untested"
MEANINGS = {
    HOLDS: "a test of this repository shows that it is true",
    FAILS: "a test of this repository shows that it is false",
    # of figures: WORDS
    MEASURED: "a committed report compares the step with its baseline or with another; the word is the report's verdict",
    UNTESTED: "nothing here has tested it yet; the study or benchmark that will is named",
}

# Kinds of values, in the words that ask for one.
TEXT, TEXTS, TRUTH = "a line of text", "a line of text or a list of such", "true or false"
TABLE, LINES, TABLES = "a table", "a list of lines of text", "a list of tables"
NEEDED = {"id": TEXT, "document": TEXTS, "claim": TEXT, "kind": TEXT, "test": TEXT}
OPTIONAL = {"proof": TEXTS, "holds": TRUTH, "study": TEXT, "artifact": TEXT, "step": TEXT, "against": TEXTS,
            "figures": TEXTS, "says": TEXT, "note": TEXT}
OF_A_REPORT = ("artifact", "step", "against")
OF_FIGURES = ("figures", "says")


@dataclass(frozen=True)
class Claim:
    """One claim. Exactly one of `proofs` (with `holds`) and `study` is set; `artifact` is where
    `word` and `sentence` were read or computed from."""

    id: str
    documents: tuple[str, ...]
    claim: str
    kind: str
    test: str
    proofs: tuple[str, ...] = ()
    holds: bool | None = None
    study: str | None = None
    artifact: str | None = None
    note: str | None = None
    word: str | None = None
    sentence: str | None = None

    @property
    def state(self) -> str:
        """One of HOLDS, FAILS, MEASURED, UNTESTED."""
        if self.proofs:
            return HOLDS if self.holds else FAILS
        return MEASURED if self.artifact else UNTESTED


@dataclass(frozen=True)
class Ledger:
    """Claims in the file's order, titles of documents by file name, and texts that look like a measurement but are none."""

    documents: dict[str, str]
    claims: tuple[Claim, ...]
    constants: dict[str, str]


def read(root: Path = ROOT) -> Ledger:
    """The ledger of the tree at `root`; UserError if anything in it is not right."""
    try:
        content = tomllib.loads((root / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{NAME} cannot be read: {error}.", f"mend {NAME}.") from None
    _keys(content, NAME, {"documents": TABLE, "planned": LINES, "constant": TABLES, "claim": TABLES}, {})
    studies = defconfig_names(root / "defconfigs").keys() | set(content["planned"])
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(content["claim"], 1):
        where = f"{NAME}: claim {entry.get('id', number)}"
        claim = _claim(entry, where, content["documents"], studies, root)
        if claim.id in claims:
            raise UserError(f"{where} is there twice.", "give each claim an id of its own.")
        claims[claim.id] = claim
    for document in content["documents"]:
        if not any(document in claim.documents for claim in claims.values()):
            raise UserError(f"{NAME}: no claim is of {document}.", "add its claims, or take it out of [documents].")
    for study in content["planned"]:
        if not any(claim.study == study for claim in claims.values()):
            raise UserError(f"{NAME}: no claim waits for the planned study {study}.", "take it out of 'planned'.")
    return Ledger(content["documents"], tuple(claims.values()), _constants(content["constant"]))


def _constants(entries: list) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{NAME}: constant {entry.get('text', number)!r}"
        _keys(entry, where, {"text": TEXT, "reason": TEXT}, {})
        if entry["text"] in found:
            raise UserError(f"{where} is there twice.", "keep one of the two.")
        found[entry["text"]] = entry["reason"]
    return found


def _keys(entry: dict, where: str, needed: dict, optional: dict) -> None:
    """Every needed key is there and no unknown one, each of its kind."""
    known = needed | optional
    for key, value in entry.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise UserError(f"{where} has the unknown key '{key}'.",
                            f"did you mean '{near[0]}'?" if near else f"keep to {', '.join(known)}.")
        if not _fits(value, known[key]):
            raise UserError(f"{where}: '{key}' is {value!r}.", f"write {known[key]}.")
    if missing := [key for key in needed if key not in entry]:
        raise UserError(f"{where} has no '{missing[0]}'.", f"add '{missing[0]}'.")


def _fits(value: Any, kind: str) -> bool:
    if kind == TEXTS and isinstance(value, list):
        return value != [] and all(_fits(item, TEXT) for item in value)
    if kind in (TEXT, TEXTS):
        return isinstance(value, str) and value.strip() != "" and "\n" not in value
    if kind in (LINES, TABLES):
        return isinstance(value, list) and all(_fits(v, TEXT) if kind == LINES else isinstance(v, dict) for v in value)
    return isinstance(value, bool if kind == TRUTH else dict)


def _claim(entry: dict, where: str, documents: dict, studies: set, root: Path) -> Claim:
    _keys(entry, where, NEEDED, OPTIONAL)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry["id"]):
        raise UserError(f"{where}: the id is no slug.", "write it in small letters, digits and single hyphens.")
    if entry["kind"] not in KINDS:
        raise UserError(f"{where} is of the kind '{entry['kind']}'.", f"write {' or '.join(KINDS)}.")
    named = _texts(entry["document"])
    for document in named:
        if document not in documents:
            raise UserError(f"{where} is of the document '{document}', which [documents] does not list.",
                            f"write one of {', '.join(documents)}.")
    if ("proof" in entry) == ("study" in entry):
        raise UserError(f"{where} names {'both a proof and' if 'proof' in entry else 'neither a proof nor'} a study.",
                        "name the tests that settle it or the study that will measure it.")
    claim = Claim(entry["id"], named, entry["claim"], entry["kind"], entry["test"], note=entry.get("note"))
    if "proof" in entry:
        return replace(claim, **_proved(entry, where, root))
    if "holds" in entry:
        raise UserError(f"{where} says 'holds' without a proof.", "take it out: a study's verdict is read from its report.")
    if entry["study"] not in studies:
        near = get_close_matches(entry["study"], studies, n=1)
        raise UserError(f"{where} waits for '{entry['study']}', which is neither a defconfig nor in 'planned'.",
                        f"did you mean {near[0]}?" if near else "add it to 'planned'.")
    return replace(claim, study=entry["study"], **_measured(entry, where, root))


def _proved(entry: dict, where: str, root: Path) -> dict:
    if parts := [key for key in (*OF_A_REPORT, *OF_FIGURES) if key in entry]:
        raise UserError(f"{where} names a proof and parts of an artifact.", f"take out {', '.join(parts)}.")
    if "holds" not in entry:
        raise UserError(f"{where} does not say what its proof shows.", "add holds = true or holds = false.")
    proofs = _texts(entry["proof"])
    for proof in proofs:
        path, _, name = proof.partition("::")
        if not re.fullmatch(r"tests/[\w/]+\.py", path) or not (root / path).is_file():
            raise UserError(f"{where} is proved in '{path}', which is no file of tests.",
                            "write 'tests/FILE.py::test_name'.")
        try:
            tests = _tests(root / path)
        except SyntaxError:
            raise UserError(f"{where} is proved in '{path}', which is no Python.", "mend that file.") from None
        if name not in tests:
            near = get_close_matches(name, tests, n=1)
            raise UserError(f"{where} is proved by '{name}', which is no test in {path}.",
                            f"did you mean {near[0]}?" if near else "name a test that is there.")
    return {"proofs": proofs, "holds": entry["holds"]}


def _measured(entry: dict, where: str, root: Path) -> dict:
    """Artifact, word and sentence of the entry's figures or of its comparison; nothing when neither is named."""
    for kind, others in ((OF_A_REPORT, OF_FIGURES), (OF_FIGURES, OF_A_REPORT)):
        given = [key for key in kind if key in entry]
        if given and any(key in entry for key in others):
            raise UserError(f"{where} names parts of a report's comparison and figures.", f"take out {', '.join(OF_A_REPORT)}, "
                            f"or {' and '.join(OF_FIGURES)}.")
        if 0 < len(given) < len(kind):
            raise UserError(f"{where} has {' and '.join(given)} only.", f"give {', '.join(kind)} together, or none of them.")
    return _compared(entry, where, root) if "artifact" in entry else _said(entry, where, root) if "figures" in entry else {}


def _compared(entry: dict, where: str, root: Path) -> dict:
    """Words and sentences of the report's comparisons of `step` with its baseline, or of its contrasts with other steps."""
    artifact, step = entry["artifact"], entry["step"]
    if not _of_study(artifact, entry):
        raise UserError(f"{where}: the artifact '{artifact}' is not of the study {entry['study']}.",
                        f"write {RESULTS}{entry['study']}, or the study's name and its fragments.")
    report = f"{artifact}/report.json"
    content = report_at(report, where, root)
    contrasts = {(one.get("step"), one.get("reference")): one.get("comparison") for one in content.get("contrasts", [])}
    words, sentences = [], []
    for against in _texts(entry["against"]):
        if content.get("baseline") != against and (step, against) not in contrasts:
            raise UserError(f"{where}: {report} compares with {content.get('baseline')}, not with {against}.",
                            f"write against = \"{content.get('baseline')}\", if that is what was claimed.")
        found = contrasts.get((step, against)) or next(
            (s.get("comparison") for s in content.get("steps", []) if s.get("name") == step), None) or {}
        if not found.get("word") or not found.get("sentence"):
            raise UserError(f"{where}: {report} has no comparison of the step {step}.", "name a step that it compares.")
        words.append(found["word"])
        sentences.append(found["sentence"])
    return {"artifact": artifact, "word": ", ".join(dict.fromkeys(words)), "sentence": " ".join(sentences)}


def _said(entry: dict, where: str, root: Path) -> dict:
    """Word and sentence of the figures: what was claimed of each, and what was measured, on which device."""
    says = saying(entry["says"], where)
    for reference in _texts(entry["figures"]):
        if re.search(r"\.comparison\.(?!speed\.)", reference):
            raise UserError(f"{where}: '{reference}' is of a difference of losses, and figures have no error rate.",
                            f"give {', '.join(OF_A_REPORT)} instead.")
    found = [figure_at(reference, where, root) for reference in _texts(entry["figures"])]
    for one in found:
        if not _of_study(one.file.rpartition("/")[0], entry):
            raise UserError(f"{where}: the figures of {one.file} are not of the study {entry['study']}.",
                            f"write figures of {RESULTS}{entry['study']}, or the study that they are of.")
    word = says.word(found)
    devices = " and ".join(dict.fromkeys(one.device for one in found if one.device))
    sentence = f"claimed {says.text}, measured {', '.join(map(str, found))}{f' ({devices})' if devices else ''}: {word}."
    return {"artifact": ", ".join(dict.fromkeys(one.file for one in found)), "word": word, "sentence": sentence}


def _of_study(folder: str, entry: dict) -> bool:
    """Whether a folder holds results of the entry's study, with or without fragments."""
    return folder.startswith(RESULTS) and folder.removeprefix(RESULTS).partition("+")[0] == entry["study"]


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@cache
def _tests(path: Path) -> frozenset[str]:
    """Names of the test functions of a file, read without importing it."""
    found = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(n.name for n in found if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def render(ledger: Ledger) -> str:
    """docs/claims.md: what the states mean, how many claims are in each, and a table for each source document."""
    counts = Counter(_state(claim) for claim in ledger.claims)
    rows = [[name, str(counts[name]), WORDS.get(name.partition(": ")[2], meaning)] for state, meaning in MEANINGS.items()
            for name in sorted(counts) if name.partition(":")[0] == state]
    text = (f"<!-- Written by `make claims` from {NAME}; edit that. -->\n\n# Claims\n\n"
            f"The {len(ledger.claims)} quantitative and structural claims of the {len(ledger.documents)} source documents, and "
            "what is behind each. States are\ncomputed from tests and committed measurements. A claim that several documents "
            "make stands in the table of the first.\n\n" + table(["state", "claims", "meaning"], rows, "lrl"))
    told: set[str] = set()
    for document, title in ledger.documents.items():
        claims = [claim for claim in ledger.claims if document in claim.documents]
        new = [claim for claim in claims if claim.id not in told]
        text += f"\n## {title}\n\n`{document}`\n"
        if new:
            text += "\n" + table(["id", "claim", "what tests it", "state"], [_row(claim) for claim in new])
        if notes := [f"- `{claim.id}`: {said}\n" for claim in new for said in (claim.sentence, claim.note) if said]:
            text += "\n" + "".join(notes)
        if again := [f"`{claim.id}`" for claim in claims if claim.id in told]:
            text += f"\nAlso claimed here: {', '.join(again)}.\n"
        told |= {claim.id for claim in claims}
    return text


def _state(claim: Claim) -> str:
    return f"{MEASURED}: {claim.word}" if claim.state == MEASURED else claim.state


def _row(claim: Claim) -> list[str]:
    tests = ", ".join(f"`{proof.partition('::')[2]}`" for proof in claim.proofs)
    return [f"`{claim.id}`", claim.claim, claim.test, f"{_state(claim)} ({tests or claim.artifact or claim.study})"]

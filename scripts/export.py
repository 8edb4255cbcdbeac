"""Write a finished cell as a folder that Hugging Face's transformers loads as GPT2LMHeadModel.

    make export CELL=test_V1_adamwspam_none                 the configured study's cell, into its folder's hf/
    make export CELL=FOLDER TO=exported/v1                  any cell, anywhere

The folder holds model.safetensors, config.json, the tokenizer, and a card (README.md) with the study's verdict. Before it
appears its logits are compared with the cell's: as read back here, and by transformers where that is installed. A step's gates
are folded into the weights; a step that is no GPT-2 in function is refused.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lib import atomic, results
from lib.config import Study
from lib.errors import UserError, reported
from lib.paths import ROOT, shown
from lib.steps import step_header, step_path
from scripts.plan import cell_folder

if TYPE_CHECKING:
    import torch

    from gpt2.model import GPT
    from lib.config import Config

TOLERANCE = 1e-4  # of a logit, relative to the largest: weights are rounded once where gates are folded in
TOKENS = 128  # of the two random sequences on which logits are compared


def verdict(folder: Path, record: dict) -> str:
    """What the report of the cell's study, beside its folder, says of the arm that the cell is of: its step under its
    optimizer, which a study may have several of."""
    step = record["step"]
    try:
        report = json.loads((folder.parent / "report.json").read_text())
        found = next(one for one in report["steps"] if any(cell["name"] == folder.name for cell in one["cells"]))
        if found["is_baseline"]:
            return f"{step} is the baseline of the study {report['title']}: the others are compared with it."
        return f"{found['comparison']['sentence']} (study {report['title']})"
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return "No verdict: the study has no report of this step (make report)."


def card(folder: Path, record: dict, cfg: "Config", known: dict, tokenizer: str) -> str:
    """README.md of the exported folder. `tokenizer` is empty, or says why there is none."""
    step, data = record["step"], record["data"] or {}
    try:
        described = step_header(step_path(step.partition("@")[0], cfg.STEPS_DIR), "Help")
    except UserError:  # a step of another version
        described = None
    function = known["function_class"]
    budget = next(f"{value} {unit}" for value, unit in (
        (cfg.GPT2_MAX_TIME, "s"), (cfg.GPT2_MAX_ITERS, "iterations"), (cfg.GPT2_MAX_TOKENS, "tokens")) if value)
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2, kablate]", "---", "",
        f"# {step}{f': {described}' if described else ''}", "",
        f"A GPT-2 of {sum(known['parameters'].values()):,} parameters, trained as one cell of an ablation study by kablate. It "
        "is evidence for or against a mechanism, not a model for use.", "",
        f"**Verdict.** {verdict(folder, record)}", "",
        "| | |", "|---|---|",
        f"| study, step, seed | {record['study']}, {step}, {record['seed']} |",
        f"| function class | {function} |",
        f"| validation loss | {record['val_loss']:.4f} nats a token (perplexity {record['val_perplexity']:.2f}) |",
        f"| budget | {budget} |",
        f"| trained on | {record['tokens']:,} tokens of {data.get('name')} ({data.get('tokenizer')} tokens), "
        f"{record['train_seconds']:.0f} s |",
        f"| optimizer | {record['optimizer']} |",
        f"| training data, sha256 | {data.get('train_hash')} |",
        f"| cell's identity | {record['identity']['hash']} |", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer" if not tokenizer
        else "from transformers import AutoModelForCausalLM", "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        *(['tokenizer = AutoTokenizer.from_pretrained("this folder")'] if not tokenizer else []), "```", ""]
    if known["folded"]:
        lines += [f"What {step} adds to GPT-2 (gates, mixers, factors) is folded into the weights: the function is that of "
                  "the trained cell to rounding, the parameters are GPT-2's. Trained further, it is trained as a GPT-2.", ""]
    if tokenizer:
        lines += [f"There is no tokenizer here: {tokenizer}.", ""]
    lines += ["Weights are under the licence of what they were trained on; the code that made them is MIT.", ""]
    return "\n".join(lines)


def compared(name: str, ours: "torch.Tensor", theirs: "torch.Tensor") -> None:
    """UserError if logits differ by more than rounding."""
    apart = float((ours - theirs).abs().max() / ours.abs().max())
    if not apart <= TOLERANCE:
        raise UserError(f"the exported model's logits, {name}, differ from the cell's by {apart:.1g} of the largest.",
                        "use the cell's model.pt with this project (gpt2/trained.py); this is a defect worth a report.")


def by_transformers(folder: Path, idx: "torch.Tensor") -> "torch.Tensor | None":
    """Logits of what transformers loads from the folder; None where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import GPT2LMHeadModel, logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    return model(idx).logits


def write(folder: Path, cfg: "Config", model: "GPT", record: dict, target: Path) -> bool:
    """Fill the empty folder `target`; whether transformers has been asked too."""
    import torch
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("make export needs safetensors, which is not installed.", "pip install safetensors.") from None
    from gpt2 import hf, hf_tokenizer
    from gpt2.function_class import key, simplest
    from gpt2.model import GPT
    from gpt2.sample import Bytes
    from lib.data.prepare import END_OF_TEXT

    exported = hf.plain(model, cfg)
    held = hf.tensors(exported)
    tokenizer, missing = hf_tokenizer.files(cfg.TOKENIZER, cfg.GPT2_BLOCK_SIZE)
    mark = {"bytes": Bytes.mark, "gpt2": END_OF_TEXT}[cfg.TOKENIZER]  # known also where the vocabulary is not at hand
    relation = key(cfg)[1]
    folded = sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in exported.parameters())
    known = {"parameters": {name: t.numel() for name, t in held.items()}, "folded": folded or relation != "equal",
             "function_class": "GPT-2" if relation == "equal" else "inside GPT-2"}
    with atomic.replacing(target / hf.WEIGHTS) as temporary:
        save_file(held, temporary, metadata={"format": "pt"})
    origin = {"step": record["step"], "study": record["study"], "seed": record["seed"], "identity": record["identity"]["hash"]}
    tokenizer |= {hf.CONFIGURATION: json.dumps(hf.configuration(cfg, mark, kablate=origin), indent=2) + "\n",
                  "README.md": card(folder, record, cfg, known, missing)}
    for name, content in tokenizer.items():
        atomic.write_text(target / name, content)

    idx = torch.randint(cfg.VOCAB_SIZE, (2, min(TOKENS, cfg.GPT2_BLOCK_SIZE)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.eval()(idx)[0][..., :cfg.VOCAB_SIZE]
        again = GPT(simplest(cfg)[0])
        hf.start(again, target, cfg)
        compared("read back", ours, again.eval()(idx)[0][..., :cfg.VOCAB_SIZE])
        theirs = by_transformers(target, idx)
        if theirs is not None:
            compared("in transformers", ours, theirs)
    return theirs is not None


def export(folder: Path, target: Path) -> None:
    """Write the finished cell in `folder` to `target`, which appears whole or not at all."""
    from gpt2 import trained

    record = results.read(folder)
    if record is None or record["state"] != "done":
        raise UserError(f"{shown(folder)} is not finished.", "run it with make.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{shown(target)} is there already.", "remove it, or give another folder with TO=.")
    cfg = Study(config=folder / ".config").config
    model = trained.load(folder, cfg, record["identity"]["hash"]).float().eval()
    try:
        atomic.make_folder(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as made:
            filled = Path(made) / "whole"
            filled.mkdir()
            asked = write(folder, cfg, model, record, filled)
            if target.is_dir():
                target.rmdir()
            atomic.rename(filled, target)
    except OSError as error:
        raise UserError(f"{shown(target)} cannot be written: {error.strerror or error}.", "give another folder with TO=."
                        ) from None
    print(f"{shown(folder)} is in {shown(target)}; its logits are the cell's, as read back here"
          + (" and in transformers" if asked else " (transformers is not installed)"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", nargs="?", default=os.environ.get("CELL", ""), help="a cell's folder or name (default: $CELL)")
    parser.add_argument("to", nargs="?", default=os.environ.get("TO", ""),
                        help="the folder to write (default: $TO, or hf in the cell's)")
    args = parser.parse_args(arguments)
    if not args.cell:
        raise UserError("no cell was given.", "make export CELL=test_V0_adamwspam_none, or a cell's folder.")
    folder = cell_folder(args.cell)
    export(folder, ROOT / Path(args.to).expanduser() if args.to else folder / "hf")


if __name__ == "__main__":
    with reported():
        main()

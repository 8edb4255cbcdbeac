#!/usr/bin/env python3
"""Train one cell: a step of a study under one seed, in one folder.

    python gpt2/train_ra_mla.py --ra-mla-ablation-step V1 --dry-run      the laws of make check, for this step
    python gpt2/train_ra_mla.py --ra-mla-ablation-step V1 --out runs/v1  train it (in runs/v1)
    python gpt2/train_ra_mla.py --cell FOLDER                            what make runs: FOLDER/.config says everything

The folder ends up with .config, provenance.json, training.log (under make), metrics.jsonl, model.pt and, last,
metrics.json. Exit status: 0 done or diverged (metrics.json says which), 2 bad input, 75 interrupted (run it again to
resume).
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # run as a script, Python puts gpt2/ there, and modules would be found under two names

from lib.config import Resolved, Study, environment_overrides, parse_step  # noqa: E402
from lib.errors import UserError, reported  # noqa: E402
from lib.kconfig import Assignment  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", type=Path, metavar="FOLDER", help="train what FOLDER/.config says, in FOLDER")
    parser.add_argument("--ra-mla-ablation-step", metavar="STEP", help="a step, also with overrides: V1@RA_R=8")
    parser.add_argument("--defconfig", metavar="NAME", help="a study, also with fragments; without it .config is used")
    parser.add_argument("--seed", type=int, help="the seed (default: the study's base seed)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to train")
    parser.add_argument("--set", action="append", default=[], metavar="SYMBOL=value", help="override a symbol")
    parser.add_argument("--dry-run", action="store_true", help="check the step on the CPU instead of training it")
    args = parser.parse_args()
    if args.cell:
        return run_cell(args.cell)
    if not args.ra_mla_ablation_step:
        raise UserError("no step was given.", "add --ra-mla-ablation-step V1 (make list-steps shows them all).")
    overrides = environment_overrides() + parse_step("X@" + ",".join(args.set))[1] if args.set else environment_overrides()
    if args.seed is not None:
        overrides.append(Assignment("SEED", str(args.seed), "--seed"))
    study = Study(args.defconfig, overrides=overrides)
    if args.dry_run:
        from scripts.check import check_steps

        return check_steps(study, [args.ra_mla_ablation_step])
    resolved = study.resolve(args.ra_mla_ablation_step)
    if not args.out:
        raise UserError("no folder to train in was given.", "add --out FOLDER, or --dry-run to only check the step.")
    return run_by_hand(resolved, args.ra_mla_ablation_step, args.out)


def run_by_hand(resolved: Resolved, step: str, folder: Path) -> int:
    """One cell outside any study's folder, prepared the way make prepares it."""
    from lib.cells import Cell
    from lib.config import identity_changes
    from lib.launch import prepare

    cell = Cell(step, resolved.config.OPTIMIZER, resolved.config.SEED, folder.name, resolved)
    if (folder / "provenance.json").exists():
        found = json.loads((folder / "provenance.json").read_text())
        changes = identity_changes(found["identity"], cell.provenance()["identity"])
        if changes or (folder / "metrics.json").exists():
            raise UserError(f"{folder} already holds {'another cell: ' + '; '.join(changes) if changes else 'this result'}.",
                            "give another folder with --out.")
    try:
        prepare(folder, cell)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.", "give another folder with --out.") from None
    return run_cell(folder)


def run_cell(folder: Path) -> int:
    """Train the cell in `folder` to its end, from its checkpoint if there is one."""
    from lib import process

    process.die_with_launcher()
    try:
        provenance = json.loads((folder / "provenance.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/provenance.json cannot be read: {error}.", "run the cell through make.") from None
    cfg = Study(config=folder / ".config").config
    begun, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")

    # Imported here, so that bad input and --help do not wait for torch.
    from gpt2.model import GPT
    from lib import checkpoint, loop, optimizers, results, runtime, tracking
    from lib.data import open_corpus

    stop = loop.StopRequest()
    corpus = open_corpus(cfg)
    device = runtime.setup(cfg)
    model = GPT(cfg)
    if cfg.INIT_FROM_STEP:
        load_parent(model, folder, provenance, cfg.INIT_FROM_STEP)
    model.to(device)
    optimizer = optimizers.build(model, cfg)

    def open_log(keep):
        tracker = tracking.open_tracker(cfg, folder, provenance["study"], provenance["step"], folder.name)
        return tracking.MetricsLog(folder, keep, tracker)

    state, reason = "done", None
    progress = loop.Progress()
    entered = time.monotonic()
    try:
        loop.train(cfg, model, optimizer, corpus, folder, open_log, device, progress, stop)
    except loop.Interrupted:
        return process.EXIT_INTERRUPTED
    except loop.Diverged as error:
        state, reason = "diverged", str(error)
    loop_seconds = time.monotonic() - entered
    checkpoint.save(folder / "model.pt", model=model.state_dict(), configuration=cfg.as_json(),
                    step=provenance["step"], seed=cfg.SEED, identity=provenance["identity"]["hash"])
    clocks = progress.clocks
    results.write(
        folder, provenance, state, reason,
        val_loss=progress.val_loss, val_perplexity=loop.perplexity(progress.val_loss),
        best_val_loss=progress.best_val_loss, train_loss=progress.train_loss,
        iterations=progress.iteration, tokens=progress.iteration * loop.tokens_per_iteration(cfg),
        train_seconds=clocks["train"], tokens_per_second=progress.iteration * loop.tokens_per_iteration(cfg) / clocks["train"],
        budget_progress=loop.Budget.from_config(cfg).progress(progress.iteration, clocks["train"]),
        compile_seconds=clocks["compile"], eval_seconds=clocks["eval"], checkpoint_seconds=clocks["checkpoint"],
        setup_seconds=time.monotonic() - begun - loop_seconds, resumed=progress.resumed,
        parameters=sum(p.numel() for p in model.parameters()), sizes=model.sizes(),
        kv_cache_bytes=model.new_cache(1).nbytes(), peak_memory_bytes=runtime.peak_memory_bytes(device),
        data=corpus.record() | {"eval_hash": progress.eval_hash, "unigram_entropy": progress.unigram_entropy},
        environment=runtime.environment(cfg, device),
        configuration=cfg.as_json(), started=started, finished=datetime.now(UTC).isoformat(timespec="seconds"))
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return 0


def load_parent(model, folder: Path, provenance: dict, step: str) -> None:
    """Start from the trained model of `step` under the same seed; tensors it does not have keep their own start."""
    from lib import checkpoint

    if not provenance["parent"]:
        raise UserError(f"the cell starts from the model of {step}, but has no parent cell.", "run it through make.")
    path = folder.parent / provenance["parent"] / "model.pt"
    if not (path.parent / "metrics.json").exists() or not path.exists():
        raise UserError(f"parent {step} has left no trained model in {path.parent}.", "make RETRY=1 once it has one.")
    unexpected = model.load_state_dict(checkpoint.load(path)["model"], strict=False).unexpected_keys
    if unexpected:
        raise UserError(f"{path} holds {unexpected[0]}, which this step's model does not have.",
                        "start from a step whose mechanisms this one keeps.")


if __name__ == "__main__":
    with reported():
        sys.exit(main())

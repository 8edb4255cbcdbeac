#!/usr/bin/env python3
"""Train one cell: a step of a study under one seed, in one folder.

    python gpt2/train_ra_mla.py --ra-mla-ablation-step V1 --dry-run      the laws of make check, for this step
    python gpt2/train_ra_mla.py --ra-mla-ablation-step V1 --out runs/v1  train it (in runs/v1)
    python gpt2/train_ra_mla.py --cell FOLDER                            what make runs: FOLDER/.config says everything

The folder ends up with .config, provenance.json, training.log (under make), metrics.jsonl, model.pt (unless SAVE_MODEL is
off) and, last, metrics.json. Exit status: 0 done or diverged (metrics.json says which), 2 bad input, 75 interrupted (run it
again to resume).
"""

import argparse
import gc
import importlib
import json
import math
import os
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

BEGUN = time.perf_counter()  # before torch is imported: all of a cell's seconds are accounted for
ROOT = Path(__file__).resolve().parent.parent
KVSPLICE_FLAGS = {f"--kvsplice-{name}": f"KVSPLICE_{name.upper().replace('-', '_')}"
                  for name in ("k", "knots", "samples", "max-batches", "epochs", "lr")}
sys.path[0] = str(ROOT)  # run as a script, Python puts gpt2/ there, and modules would be found under two names

from lib import agent, failures, process, ranks  # noqa: E402
from lib.config import Resolved, Study, announce, environment_overrides, identity_changes  # noqa: E402
from lib.errors import UserError, reported  # noqa: E402
from lib.kconfig import BUDGET, Assignment  # noqa: E402

if TYPE_CHECKING:
    import torch

    from lib.config import Config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", type=Path, metavar="FOLDER", help="train what FOLDER/.config says, in FOLDER")
    parser.add_argument("--ra-mla-ablation-step", metavar="STEP", help="a step, also with overrides: V1@RA_R=8")
    parser.add_argument("--defconfig", metavar="NAME", help="a study, also with fragments; without it .config is used")
    parser.add_argument("--seed", type=int, help="the seed (default: the study's base seed)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to train")
    parser.add_argument("--set", action="append", default=[], metavar="SYMBOL=value", help="override a symbol")
    parser.add_argument("--kvsplice-enable", action="store_true", help="compress values by KVSplice, fitted after training")
    for flag, symbol in KVSPLICE_FLAGS.items():
        parser.add_argument(flag, metavar="VALUE", help=f"{symbol}, with --kvsplice-enable")
    parser.add_argument("--kvsplice-save", type=Path, metavar="FILE", help="copy the fit to FILE, with --kvsplice-enable")
    parser.add_argument("--init-from", metavar="gpt2-hf=FOLDER", help="start from the GPT-2 in FOLDER (INIT_FROM_HF)")
    parser.add_argument("--dry-run", action="store_true", help="check the step on the CPU instead of training it")
    args = parser.parse_args()
    if args.cell:
        return run_cell(args.cell)
    if not args.ra_mla_ablation_step:
        raise UserError("no step was given.", "add --ra-mla-ablation-step V1 (make list-steps shows them all).")
    settings = args.set + kvsplice_settings(vars(args)) + start_settings(args.init_from)
    study = Study(args.defconfig, overrides=by_hand_overrides(settings, args.seed))
    announce(study)
    if args.dry_run:
        from scripts.check import check_steps

        return check_steps(study, [args.ra_mla_ablation_step])
    resolved = study.resolve(args.ra_mla_ablation_step)
    if args.kvsplice_save and not args.kvsplice_save.parent.is_dir():
        raise UserError(f"there is no folder {args.kvsplice_save.parent}.", "make it, or give --kvsplice-save another file.")
    if not args.out:
        raise UserError("no folder to train in was given.", "add --out FOLDER, or --dry-run to only check the step.")
    status = run_by_hand(resolved, args.ra_mla_ablation_step, args.out)
    if args.kvsplice_save and status == 0:
        from gpt2.splicing import kvsplice_file

        fit = kvsplice_file(args.out, args.ra_mla_ablation_step)
        if not fit.exists():
            raise UserError("the cell diverged, so there is no fit to copy.", f"read {args.out}/metrics.json.")
        save_fit(fit, args.kvsplice_save)
    return status


def save_fit(fit: Path, target: Path) -> None:
    """Copy the fit, whole or not at all."""
    from lib import atomic

    try:
        atomic.copy(fit, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.", f"copy {fit} yourself.") from None


def kvsplice_settings(flags: dict) -> list[str]:
    """--kvsplice-* as settings of symbols."""
    given = {flag: flags[flag.removeprefix("--").replace("-", "_")] for flag in [*KVSPLICE_FLAGS, "--kvsplice-save"]}
    given = {flag: value for flag, value in given.items() if value is not None}
    if not flags["kvsplice_enable"]:
        if given:
            raise UserError(f"{next(iter(given))} is given without --kvsplice-enable.",
                            "add --kvsplice-enable, or leave it out.")
        return []
    return ["KVSPLICE=y"] + [f"{KVSPLICE_FLAGS[flag]}={value}" for flag, value in given.items() if flag in KVSPLICE_FLAGS]


def start_settings(text: str | None) -> list[str]:
    """--init-from as settings of symbols."""
    if text is None:
        return []
    kind, _, folder = text.partition("=")
    if kind != "gpt2-hf" or not folder:
        raise UserError(f"--init-from {text} names no start.", "write --init-from gpt2-hf=FOLDER.")
    return [f"INIT_FROM_HF={Path(folder).expanduser().absolute()}"]


def by_hand_overrides(settings: list[str], seed: int | None) -> list[Assignment]:
    """Budgets of the environment, --set and --seed. A budget that is set by hand replaces the environment's."""
    layer = []
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text} gives no value.", "write --set SYMBOL=value.")
        layer.append(Assignment(name.removeprefix("CONFIG_"), value, "--set"))
    if seed is not None:
        layer.append(Assignment("SEED", str(seed), "--seed"))
    if any(a.name in BUDGET for a in layer):
        return layer
    return environment_overrides() + layer


def run_by_hand(resolved: Resolved, step: str, folder: Path) -> int:
    """One cell outside any study's folder, prepared the way make prepares it."""
    from lib import results
    from lib.cells import Cell
    from lib.launch import prepare

    cell = Cell(step, resolved.config.OPTIMIZER, resolved.config.SEED, folder.name, resolved)
    if (folder / "provenance.json").exists():
        changes = identity_changes(read_provenance(folder)["identity"], cell.provenance()["identity"])
        record = results.read(folder)
        if record and record["state"] == "failed" and not changes:
            (folder / results.NAME).unlink()
        elif changes or record:
            raise UserError(f"{folder} already holds {'another cell: ' + '; '.join(changes) if changes else 'this result'}.",
                            "give another folder with --out.")
    try:
        prepare(folder, cell)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.", "give another folder with --out.") from None
    return run_cell(folder)


def run_cell(folder: Path) -> int:
    """Train the cell in `folder` to its end, from its checkpoint if there is one; where a step has several ranks, as the agent
    that starts them. One that runs out of memory says so in metrics.json, with its peak."""
    process.die_with_launcher()
    # Until the first step nearly everything that is made stays. Looking through it for garbage, again and again, takes a fifth
    # of the time that torch and its compiler take to import.
    gc.disable()
    provenance = read_provenance(folder)
    cfg = planned_configuration(folder, provenance["identity"])
    if (size := agent.wanted(cfg)) > 1 or agent.elsewhere(cfg):
        return agent.run([sys.executable, str(ROOT / "gpt2/train_ra_mla.py"), "--cell", str(folder)], size)
    if ranks.number() and ranks.one_process(cfg):
        return 0  # the first rank does it alone
    try:
        return train_cell(folder, cfg, provenance)
    except Exception as error:
        agent.record(error)
        if failures.kind(error) == failures.MEMORY:
            from lib import results, runtime

            peak = runtime.peak_memory_bytes(runtime.setup(cfg))
            reason = (f"{failures.sentence(error)} (peak {peak / 2 ** 30:.1f} GiB at {cfg.BATCH_SIZE} sequences at once, "
                      f"{cfg.GPT2_GRADIENT_ACCUMULATION} times a step)")
            results.write(folder, provenance, "failed", reason, peak_memory_bytes=peak, configuration=cfg.as_json())
        raise


def planned_configuration(folder: Path, identity: dict) -> "Config":
    """What FOLDER/.config says, if that is what the cell was planned with; otherwise its result would stand for another's."""
    study = Study(config=folder / ".config")
    found = study.resolve().identity
    # What the cell has of its parent is not in its own .config.
    planned = {part: {n: v for n, v in identity[part].items() if not n.startswith("PARENT.")} for part in ("set", "default")}
    if changes := identity_changes(planned, found):
        raise UserError(f"{folder}/.config is not what the cell was planned with: {'; '.join(changes)}.",
                        "make RETRY=1, which writes it anew.")
    return study.config


def train_cell(folder: Path, cfg: "Config", provenance: dict) -> int:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    # Imported here, so that bad input and --help do not wait for torch.
    import torch

    from gpt2 import causality, splicing
    from gpt2.kvsplice import codec_mode
    from gpt2.model import GPT
    from lib import checkpoint, finite, generations, loop, optimizers, results, runtime, slots, tracking
    from lib.data import evaluation_set, open_corpus
    from lib.schedule import Budget, tokens_per_iteration

    stop = loop.StopRequest()
    # The compiler is imported, which is Python, while data are looked through and weights drawn, which is mostly not.
    compiler = threading.Thread(target=importlib.import_module, args=("torch._inductor.compile_fx",))
    if cfg.GPT2_COMPILE:
        compiler.start()
    corpus = open_corpus(cfg)
    device = runtime.setup(cfg)
    group = ranks.join(cfg, device)
    environment = runtime.environment(cfg, device, group.size)
    model = GPT(cfg)
    parent = load_parent(model, folder, provenance, cfg.INIT_FROM_STEP) if cfg.INIT_FROM_STEP else None
    if parent and (digest := (parent["environment"] or {}).get("start_hash")):
        environment["start_hash"] = digest
    if cfg.INIT_FROM_HF:
        environment["start_hash"] = start_from_files(model, cfg, folder)
    model.to(device)
    if cfg.GPT2_COMPILE:
        compiler.join()
    optimizer = optimizers.build(model, cfg)

    def open_log(keep: int) -> Any:
        if not group.first:
            return tracking.NoLog()
        tracker = tracking.open_tracker(cfg, folder, provenance)
        return tracking.MetricsLog(folder, keep, tracker)

    state, reason, keeping, leak = "done", None, cfg.SAVE_MODEL, None
    progress = loop.Progress()
    clock = loop.Clock(progress, device, BEGUN)
    if cfg.EVALUATE_ONLY:  # what was trained is the parent's
        progress.iteration, progress.train_loss = parent["iterations"], parent["train_loss"]
        progress.clocks["train"] = parent["train_seconds"]

    def compress() -> Any:
        clock.switch("calibration")
        runtime.collect_garbage()
        found = splicing.compress(cfg, model, corpus, folder, provenance["step"], device)
        clock.switch("other")
        return found

    compression = compress() if cfg.KVSPLICE and parent else None
    try:
        with codec_mode(model, "splice" if parent else "off"):
            loop.train(cfg, model, optimizer, corpus, folder, provenance["identity"], open_log, clock, progress, stop,
                       save_at_end=cfg.KVSPLICE and not parent, group=group)
        group.leave()
        if not group.first:
            return 0
        if cfg.KVSPLICE and not parent:
            compression = compress()
            progress.val_loss, progress.best_val_loss = compression["val_loss"], None  # the best was uncompressed
            clock.switch("eval")
            with codec_mode(model, "splice"):
                progress.val_loss_by_position = loop.evaluate_by_position(cfg, model, evaluation_set(cfg, corpus), device)
            if not math.isfinite(progress.val_loss):
                raise loop.Diverged(f"the validation loss with compressed values is {progress.val_loss}")
        peak = max(progress.peak_memory_bytes, runtime.peak_memory_bytes(device))
        clock.switch("eval")
        with codec_mode(model, "splice" if cfg.KVSPLICE else "off"):
            first, _ = next(iter(evaluation_set(cfg, corpus)))
            leak = causality.of_trained(model, torch.from_numpy(first[0]).to(device))
    except loop.Interrupted:
        return process.EXIT_INTERRUPTED
    except loop.Diverged as error:
        if not group.first:
            return 0
        state, reason = "diverged", str(error)
        peak = max(progress.peak_memory_bytes, runtime.peak_memory_bytes(device))
        progress.val_loss = progress.val_loss_by_position = None  # a value from the middle of the run is no result
        if keeping and (name := finite.not_finite(dict(model.named_parameters()))):
            keeping, found = bring_back(model, folder)
            reason += f"; {name} is not finite, {found}"
    if keeping:
        checkpoint.save(folder / "model.pt", model=model.state_dict(), configuration=cfg.as_json(),
                        step=provenance["step"], seed=cfg.SEED, identity=provenance["identity"]["hash"])
    else:
        (folder / "model.pt").unlink(missing_ok=True)  # of an earlier try that failed after saving it
    clock.switch("other")
    cache = model.new_cache(1, dtype=model.cache_dtype or getattr(torch, runtime.precision(cfg, device)))
    clocks, tokens = progress.clocks, progress.iteration * tokens_per_iteration(cfg)
    results.write(
        folder, provenance, state, reason, inactive=progress.inactive,
        val_loss=progress.val_loss, val_perplexity=loop.perplexity(progress.val_loss), compression=compression,
        val_loss_by_position=progress.val_loss_by_position, best_val_loss=progress.best_val_loss,
        train_loss=progress.train_loss, future_leak=leak, iterations=progress.iteration, tokens=tokens,
        train_seconds=clocks["train"], tokens_per_second=tokens / clocks["train"] if clocks["train"] else None,
        budget_progress=Budget.from_config(cfg).progress(progress.iteration, clocks["train"]),
        start_seconds=progress.start_seconds, compile_seconds=clocks["compile"], eval_seconds=clocks["eval"],
        calibration_seconds=clocks["calibration"], checkpoint_seconds=clocks["checkpoint"],
        other_seconds=clocks["other"], resumed=progress.resumed, shared_device=slots.shared(folder),
        parameters=sum(p.numel() for p in model.parameters()), sizes=model.sizes(),
        kv_cache_bytes=cache.nbytes(), kv_cache_parts=cache.parts(),
        peak_memory_bytes=peak,
        data=corpus.record() | {"eval_hash": progress.eval_hash, "unigram_entropy": progress.unigram_entropy},
        environment=environment,
        configuration=cfg.as_json(), started=started, finished=datetime.now(UTC).isoformat(timespec="seconds"))
    generations.remove(folder)
    return 0


def bring_back(model: "torch.nn.Module", folder: Path) -> tuple[bool, str]:
    """Give `model` the state of the last checkpoint, which is finite: whether that went, and how to say it. That the run has
    diverged is its result either way, also where memory does not hold the checkpoint beside the model."""
    from lib import generations

    try:
        content = generations.load(folder, "cpu")
    except UserError:
        return False, "and no checkpoint can be read, so there is no model.pt"
    except (MemoryError, RuntimeError, OSError) as error:
        if failures.kind(error) != failures.MEMORY:
            raise
        return False, "and memory does not hold the checkpoint, so there is no model.pt"
    if content is None:
        return False, "and no checkpoint is there, so there is no model.pt"
    model.load_state_dict(content["model"])
    return True, f"so model.pt is the checkpoint of iteration {content['progress']['iteration']}"


def read_provenance(folder: Path) -> dict:
    try:
        provenance = json.loads((folder / "provenance.json").read_text())
        found = {key: provenance[key] for key in ("study", "step", "optimizer", "seed", "parent", "identity")}
        kinds = {"study": str, "step": str, "optimizer": str, "seed": int, "parent": str | None, "identity": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(found[key], kind)]
        if wrong or "/" in (found["parent"] or "") or not isinstance(found["identity"].get("hash"), str) or not all(
                isinstance(found["identity"].get(part), dict) for part in ("set", "default")):
            raise ValueError("it is not of a cell")
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/provenance.json cannot be read: {error}.", "run the cell through make.") from None


def start_from_files(model: Any, cfg: "Config", cell: Path) -> str:
    """Start from the weights in INIT_FROM_HF; their sha256. A cell that goes on from a checkpoint has started already, from
    what was there then."""
    from gpt2 import hf
    from lib import atomic, generations
    from lib.data.files import repo_path
    from lib.paths import shown

    begun = cell / "start.json"
    if generations.there(cell) and begun.is_file():
        return json.loads(begun.read_text())["sha256"]
    folder = repo_path(cfg.INIT_FROM_HF)
    own = hf.start(model, folder, cfg)
    kept = f"; {len(own)} tensors keep their own start: {' '.join(own)}" if own else ""
    print(f"starts from {shown(folder)}{kept}", flush=True)
    digest = hf.digest(folder)
    if not ranks.number():
        atomic.write_json(begun, {"sha256": digest})
    return digest


def load_parent(model: "torch.nn.Module", folder: Path, provenance: dict, step: str) -> dict:
    """Start from the trained model of `step` under the same seed; tensors it does not have keep their own start. Returns the
    parent's record."""
    from gpt2.kvsplice import KVSplice
    from lib import checkpoint, results

    if not provenance["parent"]:
        raise UserError(f"the cell starts from the model of {step}, but has no parent cell.", "run it through make.")
    path = folder.parent / provenance["parent"] / "model.pt"
    record = results.read(path.parent)
    if not record or record["state"] != "done":
        raise UserError(f"parent {step} has left no trained model in {path.parent}.", "make RETRY=1 once it has one.")
    if not path.exists():  # make sees that it is done, and would not run it again by itself
        raise UserError(f"parent {step} is done, but its model is not in {path.parent}: SAVE_MODEL was off, or it was unpacked "
                        "from an archive.", "set SAVE_MODEL=y, move that folder away, then make RETRY=1.")
    content = checkpoint.load(path)
    if content.get("identity") != record["identity"].get("hash"):
        raise UserError(f"{path} is not the model of the result beside it.",
                        "move that folder away, make, then make RETRY=1.")
    # A codec is fitted to the parent's values anew; the parent's own may be of another width.
    codecs = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, KVSplice))
    try:
        held = {name: tensor for name, tensor in content["model"].items() if not name.startswith(codecs)}
        unexpected = model.load_state_dict(held, strict=False).unexpected_keys
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:  # a tensor of another shape; no tensors at all
        unexpected = [str(error).splitlines()[-1].strip()]
    if unexpected:
        raise UserError(f"the model of {step} does not fit this step's: {unexpected[0]}.",
                        "start from a step whose mechanisms and sizes this one keeps.")
    return record


if __name__ == "__main__":
    with reported(), failures.disk_told_by_exit_status():
        status = main()
        if os.environ.get(process.LAUNCHER_VARIABLE):
            sys.stdout.flush()
            os._exit(status)  # all is on disk and every tracker is closed; taking torch apart takes seconds on a GPU
        sys.exit(status)

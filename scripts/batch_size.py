"""Find the configured study's micro-batch (BATCH_SIZE_AUTO) on this machine and keep it in OUT/batch_size.json.

make calls it before the study's first cell; by hand it shows what holds, and --again finds it anew, e.g. after other programs
have left the GPU. A cell that has begun keeps its micro-batch, and with it the study.

Every trial is a process of its own: a cell of two iterations on random tokens, through the training loop, in the share of the
GPU's memory that a cell may take.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lib import batch_size, own_process, process
from lib.cells import expand
from lib.config import Study, announce
from lib.errors import UserError, reported
from lib.paths import shown
from lib.plan import Plan
from scripts.plan import options_from_environment

if TYPE_CHECKING:
    from lib.config import Config

TOKENS = 100_000  # of the random corpus, beside one window


def trial_of(cfg: "Config", folder: Path, *words: Any) -> dict:
    """What this script prints with these options in a process of its own."""
    return own_process.run(cfg, folder, "trying a micro-batch", "scripts.batch_size", *words)


def in_a_process(share: float) -> Callable[..., Any]:
    """The probe for GPUs."""
    def probe(program: batch_size.Program, micro_batch: int) -> int | None:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / ".config"
            config.write_text(program.resolved.text)
            peak = trial_of(program.resolved.config, Path(folder), "--probe", str(config), "--batch", str(micro_batch),
                            "--share", str(share))["peak_bytes"]
        found = "does not fit" if peak is None else f"{peak / 2 ** 30:.1f} GiB"
        print(f"  {program.arms[0]}: {micro_batch} sequences: {found} ({time.monotonic() - begun:.0f} s)", flush=True)
        return peak
    return probe


def device(cfg: "Config") -> dict:
    """The device that cells of `cfg` run on."""
    import torch

    from lib import runtime

    where = runtime.setup(cfg)
    if where.type == "cpu":
        return {"type": "cpu", "name": runtime.processor(), "memory_bytes": None, "torch": torch.__version__}
    return {"type": "cuda", "name": torch.cuda.get_device_name(), "torch": torch.__version__,
            "memory_bytes": torch.cuda.get_device_properties(where).total_memory}


def trial(cfg: "Config", share: float, folder: Path) -> int | None:
    """Peak memory in bytes of a cell of two iterations of `cfg` in `folder`; None if it does not fit."""
    import torch

    from lib import loop, runtime

    where = runtime.setup(cfg)
    if where.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share)
    cfg = cfg.replace(GPT2_MAX_TIME=0, GPT2_MAX_TOKENS=0, GPT2_MAX_ITERS=2, GPT2_EVAL_SAMPLES=1, CHECKPOINT_INTERVAL=0,
                      GPT2_GRADIENT_ACCUMULATION=min(2, cfg.GPT2_GRADIENT_ACCUMULATION))  # a third adds nothing to two
    progress = loop.Progress()
    try:
        rehearse(cfg, where, folder, progress, SimpleNamespace(asked=False), time.perf_counter())
    except loop.Diverged:
        pass  # of memory it says nothing
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return None
        raise
    return max(progress.peak_memory_bytes, runtime.peak_memory_bytes(where))


def rehearse(cfg: "Config", where: Any, folder: Path, progress: Any, stop: Any, begun: float) -> None:
    """A cell of `cfg` on random tokens, on the device `where`, through the training loop, which keeps its account in
    `progress`. `begun` is the time.perf_counter() at which it began."""
    import numpy as np

    from gpt2.kvsplice import codec_mode
    from gpt2.model import GPT
    from lib import loop, optimizers, tracking
    from lib.data import Corpus, Tokens

    random = np.random.default_rng(0)
    tokens = [Tokens(random.integers(cfg.VOCAB_SIZE, size=TOKENS + cfg.GPT2_BLOCK_SIZE).astype(np.uint16), cfg.VOCAB_SIZE)
              for _ in range(2)]
    corpus, clock = Corpus("random", cfg.TOKENIZER, cfg.VOCAB_SIZE, *tokens), loop.Clock(progress, where, begun)
    model = GPT(cfg).to(where)
    with codec_mode(model, "splice" if cfg.INIT_FROM_STEP else "off"):
        loop.train(cfg, model, optimizers.build(model, cfg), corpus, folder, {"set": {}, "default": {}},
                   lambda keep: tracking.MetricsLog(folder, keep), clock, progress, stop)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.batch_size", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="find it anew, whatever is kept")
    parser.add_argument("--device", type=Path, metavar="CONFIG", help="only print the device of a configuration, as JSON")
    parser.add_argument("--probe", type=Path, metavar="CONFIG", help="only print the peak memory of one trial, as JSON")
    parser.add_argument("--batch", type=int, default=1, help="with --probe: the micro-batch (default: %(default)s)")
    parser.add_argument("--share", type=float, default=batch_size.MARGIN, help="with --probe: of the GPU's memory")
    args = parser.parse_args(arguments)
    if args.device or args.probe:
        process.die_with_launcher()
        cfg = Study(config=args.device or args.probe).config
        if args.device:
            print(json.dumps(device(cfg)))
            return
        accumulated = max(1, cfg.BATCH_SIZE * cfg.GPT2_GRADIENT_ACCUMULATION // args.batch)
        cfg = cfg.replace(BATCH_SIZE=args.batch, GPT2_GRADIENT_ACCUMULATION=accumulated,
                          BATCH_DRAWN=cfg.BATCH_DRAWN or cfg.BATCH_SIZE)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"peak_bytes": trial(cfg, args.share, Path(folder))}))
        return
    process.die_with_launcher()
    plan = Plan(options_from_environment())
    announce(plan.study)
    print(ensured(plan, args.again))


def ensured(plan: Plan, anew: bool = False) -> str:
    """Find and keep the micro-batch of a study that has none, or one that does not hold here; a sentence on which it is."""
    choice, study = plan.micro_batch, plan.study
    if choice is None:
        raise UserError(f"study {study.name} has BATCH_SIZE_AUTO off.", "set it in make menuconfig.")
    if choice.settled:
        return choice.sentence
    study.found = []  # what is tried is the study as configured
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / ".config"
        config.write_text(expand(study, [study.config.SEED])[0].resolved.text)
        here = trial_of(study.config, Path(folder), "--device", str(config))
    share = batch_size.MARGIN / study.config.CELLS_PER_GPU
    if here["type"] != "cpu":
        print(f"BATCH_SIZE_AUTO: looking for the largest micro-batch on {here['name']}", flush=True)
    batch_size.find(study, plan.out, here, share, in_a_process(share), anew)
    return f"{batch_size.settle(study, plan.out).sentence} ({shown(plan.out / batch_size.NAME)})"


if __name__ == "__main__":
    with reported():
        main()

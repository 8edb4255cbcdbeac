"""KVSplice in a cell: fit it to the trained model, keep the fit in the cell's folder, and say what it costs.

A cell that starts from a trained parent (INIT_FROM_STEP) fits before its first step, so that whatever it trains it trains with
compressed values; one without a parent trains uncompressed and fits at its end. Fitting and the losses beside it have a clock
of their own and are no part of the budget. What is used is what was read back from the file, so that the file is known to be
good; a resumed cell reads it instead of fitting again, unless it is damaged or of other weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from gpt2 import kvsplice
from gpt2.kvsplice_calibrator import KVSpliceCalibrator
from lib import loop, runtime
from lib.data import draw_size, evaluation_set, train_batch
from lib.errors import UserError
from lib.steps import file_name
from lib.streams import cell_seed, stream_seed

if TYPE_CHECKING:
    import torch

    from lib.config import Config
    from lib.data.sources import Corpus


def kvsplice_file(folder: Path, step: str) -> Path:
    """Where a cell keeps its fit."""
    return folder / f"kvsplice_{file_name(step)}.pt"


def compress(cfg: "Config", model: "torch.nn.Module", corpus: "Corpus", folder: Path, step: str,
             device: "torch.device") -> dict:
    """Fit the codecs of `model`, or take over the fit to these very weights that `folder` holds. Returns metrics.json's
    "compression":

    `val_loss_before`, `val_loss_pca` and `val_loss`, of the same weights without codec, with plain PCA of the same k, and with
    KVSplice, in nats; `rows`, how many values of a layer it was fitted to; `layers`, the reconstruction error of each.
    """
    path, values_of = kvsplice_file(folder, step), kvsplice.fingerprint(model)
    try:
        header = kvsplice.load(path, model, identity=values_of)
    except UserError:
        windows = (train_batch(corpus.train, stream_seed(cell_seed(cfg), "kvsplice"), number, 0, draw_size(cfg),
                               cfg.GPT2_BLOCK_SIZE)[0] for number in range(cfg.KVSPLICE_MAX_BATCHES))
        with runtime.autocast(cfg, device):
            report = KVSpliceCalibrator(cfg).fit(model, windows)
        kvsplice.save(path, model, step=step, seed=cfg.SEED, identity=values_of, report=report)
        header = kvsplice.load(path, model, identity=values_of)
    eval_set = evaluation_set(cfg, corpus)
    losses = {}
    for mode, name in (("off", "val_loss_before"), ("pca", "val_loss_pca"), ("splice", "val_loss")):
        with kvsplice.codec_mode(model, mode):
            losses[name] = loop.evaluate(cfg, model, eval_set, device)
    return losses | header["report"]

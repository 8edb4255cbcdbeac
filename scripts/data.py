"""Prepare and check the configured data set: python -m scripts.data (make data).

A public data set is downloaded, tokenized and written to DATA_DIR; interrupted, the next call continues. Any data set,
also the embedded one and a local folder, is then opened, checked and described.
"""

import argparse
import math

from lib.data import Corpus, EvalSet, evaluation_set, open_corpus, unigram_entropy
from lib.data.sources import PREPARED
from lib.errors import reported


def described(corpus: Corpus, eval_set: EvalSet) -> str:
    """Counts, hashes, and the losses of two predictors that know nothing of order."""
    record = corpus.record()
    entropy = unigram_entropy(corpus.train, eval_set)
    lines = [f"{corpus.name}: {corpus.tokenizer} tokens, vocabulary {corpus.vocab_size:,}"]
    lines += [f"  {split:<5} {record[f'{split}_tokens']:>15,} tokens  sha256 {record[f'{split}_hash']}"
              for split in ("train", "val")]
    lines += [f"  eval  {eval_set.n_tokens:>15,} tokens  sha256 {eval_set.hash}",
              f"        {eval_set.n_batches} batches of {eval_set.batch} x {eval_set.block}",
              f"  loss of token frequencies alone: {entropy:.4f} nats (a model must beat it); "
              f"of equal odds: {math.log(corpus.vocab_size):.4f}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    with reported():
        from lib.config import Study, announce, refuse_study  # after --help, which needs no configuration

        study = Study()
        announce(study)
        refuse_study()
        cfg = study.config
        if cfg.DATASET in PREPARED:
            from lib.data.prepare import prepare

            prepare(cfg)
        corpus = open_corpus(cfg)
        print(described(corpus, evaluation_set(cfg, corpus)))


if __name__ == "__main__":
    main()

"""A corpus is two sequences of token ids, and everything drawn from it is a function of the configuration.

- `open_corpus(cfg)` opens and checks a data set; it never downloads, never invents tokens.
- `train_batch(...)` is stateless: the position in the data is the step number, so resuming is exact.
- `evaluation_set(cfg, corpus)` is fixed: the same windows for every arm, seed and run.

Only numpy is needed here. `lib.data.prepare`, which makes the prepared data sets, is the one module that needs
`datasets` and `tiktoken`, and it imports them where they are used.
"""

from lib.data.batches import IGNORED, EvalSet, draw_size, evaluation_set, train_batch, unigram_entropy
from lib.data.sources import Corpus, open_corpus
from lib.data.tokens import Tokens

__all__ = ["IGNORED", "Corpus", "EvalSet", "Tokens", "draw_size", "evaluation_set", "open_corpus", "train_batch",
           "unigram_entropy"]

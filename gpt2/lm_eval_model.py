"""A finished cell as a model of lm-eval (the lm_eval package, 0.4): tasks ask it for log-likelihoods and for text.

Contract: texts are those of the cell's own data set, bytes or GPT-2's tokens, split between context and continuation as
lm_eval's TemplateLM does it. Log-likelihoods are those of gpt2/scoring.py; what is longer than the context is cut on the left.
A document of `loglikelihood_rolling` is read in windows of the whole context, each token predicted once, the first one after
the mark between documents. Generation decodes with the cache, greedily unless the task samples.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gpt2.scoring import ROWS, log_likelihoods

if TYPE_CHECKING:
    from gpt2.model import GPT

SEED = 1234  # of the draws of tasks that sample


class CellLM(TemplateLM):
    """`model` in evaluation mode on its device, `tokenizer` of gpt2/sample.py, `autocast()` the context of forward passes,
    `rows` continuations side by side."""

    def __init__(self, model: "GPT", tokenizer: Any, autocast: Callable = contextlib.nullcontext, rows: int = ROWS) -> None:
        super().__init__()
        self.model, self.tokens, self.autocast, self.rows = model, tokenizer, autocast, rows
        self._device = model.transformer.wte.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokens.mark

    @property
    def max_length(self) -> int:
        return self.model.block_size

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokens).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokens.ids(string)

    def tok_decode(self, ids: list[int]) -> str:
        return b"".join(map(self.tokens.piece, ids)).decode("utf-8", "replace")

    def loglikelihood(self, requests: list, disable_tqdm: bool | None = None) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)  # None: bars on a terminal only

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool | None = None,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        # a context of spaces alone has given them to the continuation
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="Scoring", disable=disable_tqdm) as bar:
            found = log_likelihoods(self.model, pairs, self.rows, self.autocast, bar.update)
        for (asked, _, _), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool | None = None) -> list[float]:
        windows, owner = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owner.append(number)
        found = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            found[number] += score
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def generate_until(self, requests: list, disable_tqdm: bool | None = None) -> list[str]:
        """Contexts of one length and the same options are continued together. A context is cut to leave room for what may be
        written, or, where that takes all of the model's, to half of it."""
        alike: dict[tuple, list[int]] = {}
        contexts, options = [], []
        for number, request in enumerate(requests):
            asked = normalize_gen_kwargs(request.args[1])
            room = self.max_length - asked["max_gen_toks"]
            context = self.tok_encode(request.args[0])[-(room if room > 0 else self.max_length // 2):]
            contexts.append(context or [self.prefix_token_id])
            options.append(asked)
            alike.setdefault((len(contexts[-1]), repr(sorted(asked.items()))), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="Writing", disable=disable_tqdm) as bar:
            for members in alike.values():
                for start in range(0, len(members), self.rows):
                    batch = members[start:start + self.rows]
                    for number, text in zip(batch, self._write([contexts[i] for i in batch], options[batch[0]]), strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return found

    def _write(self, contexts: list[list[int]], asked: dict) -> list[str]:
        """What follows each of these contexts of one length, up to its first stop string or the end of the document."""
        stops = [stop for stop in asked["until"] if stop]
        written: list[list[int]] = [[] for _ in contexts]
        texts: list[str | None] = [None] * len(contexts)
        draws = torch.Generator(self._device).manual_seed(SEED)
        temperature = float(asked.get("temperature", 1.0)) if asked.get("do_sample") else 0.0
        stream = self.model.stream(torch.tensor(contexts, device=self._device), asked["max_gen_toks"], temperature,
                                   asked.get("top_k"), draws)
        with self.autocast(), contextlib.closing(stream):
            for new in stream:
                for row, token in enumerate(new[:, 0].tolist()):
                    if texts[row] is not None:
                        continue
                    if token == self.eot_token_id:
                        texts[row] = self.tok_decode(written[row])
                        continue
                    written[row].append(token)
                    text = self.tok_decode(written[row])
                    if at := [text.index(stop) for stop in stops if stop in text]:
                        texts[row] = text[:min(at)]
                if None not in texts:
                    break
        return [self.tok_decode(ids) if text is None else text for ids, text in zip(written, texts, strict=True)]

"""The tokens of a data set as a tokenizer of Hugging Face's `tokenizers`: equal text, equal ids.

Contract: `files(name, context)` gives {file name: content} for a folder that transformers' AutoTokenizer reads, for the data
sets' vocabularies "bytes" and "gpt2"; {} and a sentence where the package or GPT-2's vocabulary is not at hand. Nothing is
downloaded that `make data` would not download. What it gives has been tried: `SAMPLE` gets the ids that training would see.
"""

import json
from functools import cache

from lib.errors import UserError

SAMPLE = "def main():\n\treturn 'naïve – 东京' #1  2\n"


@cache
def letters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary: itself where it can be seen, else one beyond 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]


def files(name: str, context: int) -> tuple[dict[str, str], str]:
    """({file: content}, "" or why there is none)."""
    from gpt2.sample import TOKENIZERS

    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        return {}, "the package tokenizers is not installed (pip install tokenizers)"
    try:
        tokens = TOKENIZERS[name]()
    except UserError as error:
        return {}, f"{error.what.rstrip('.')} ({error.run.rstrip('.')})"
    marks = {}
    if name == "bytes":
        vocabulary, merges = {letter: byte for byte, letter in enumerate(letters())}, []
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        vocabulary, merges = _byte_pairs(tokens.encoding._mergeable_ranks)
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        marks = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    if marks:
        made.add_special_tokens([marks["eos_token"]])
    if made.encode(SAMPLE).ids != tokens.ids(SAMPLE) or made.decode(tokens.ids(SAMPLE)) != SAMPLE:
        return {}, "the tokenizers package splits text otherwise than training did"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
                "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(settings | marks, indent=2) + "\n"}, ""


def _byte_pairs(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges in their order) of a byte-pair encoding that is given by the ranks of its tokens. What a token was
    merged from is what the merges before it make of its bytes."""
    of = letters()

    def written(token: bytes) -> str:
        return "".join(of[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda one: one[1]):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        merges.append((written(parts[0]), written(parts[1])))
    return {written(token): rank for token, rank in ranks.items()}, merges

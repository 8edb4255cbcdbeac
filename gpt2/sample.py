#!/usr/bin/env python3
"""Write text with a finished cell's model.

    python gpt2/sample.py V0 --prompt "def main"                     the configured study's cell of V0, its first seed
    python gpt2/sample.py --cell FOLDER --tokens 100 --temperature 0  any cell: FOLDER/.config and FOLDER/model.pt

The text goes to standard output as it is generated, the prompt before it. The same cell, prompt, options, seed and device give
the same text. Tokens are those of the cell's data set: bytes, or GPT-2's, which must be at hand. Without a prompt the model
begins after the mark between two documents (end of text; a zero byte among bytes). Such a mark in the text is written as
<|endoftext|>, or with --stop ends it. A prompt may fill the context; beyond it the model reads the last tokens only. Bytes
that are no text and control characters are written as U+FFFD.
"""

import argparse
import codecs
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # run as a script, Python puts gpt2/ there, and modules would be found under two names

from lib.cells import whole  # noqa: E402
from lib.config import Study  # noqa: E402
from lib.errors import UserError, reported  # noqa: E402
from lib.paths import shown  # noqa: E402

if TYPE_CHECKING:

    from gpt2.model import GPT
    from lib.config import Config

MARK = "<|endoftext|>"
LIMIT = 2 ** 63  # of a generator's seed, and beyond what anybody means by the others


class Bytes:
    """Text as UTF-8 bytes; documents of the byte data sets end with a zero byte."""

    mark = 0

    def ids(self, text: str) -> list[int]:
        return list(os.fsencode(text))  # a word of the command line that is no UTF-8 is given back as it was

    def piece(self, token: int) -> bytes:
        return bytes([token])


class GPT2Tokens:
    """GPT-2's byte-pair encoding; its files must be cached or named by TIKTOKEN_GPT2_DIR (lib/data/prepare.py)."""

    def __init__(self) -> None:
        from lib.data.prepare import END_OF_TEXT, gpt2_encoding

        try:
            self.encoding, self.mark = gpt2_encoding(), END_OF_TEXT
        except ImportError as error:
            raise UserError(f"GPT-2's tokens need {error.name}, which is not installed.",
                            f"pip install {error.name}.") from None
        except UserError as error:
            raise UserError(error.what, "set TIKTOKEN_GPT2_DIR to a folder with GPT-2's vocab.bpe and encoder.json.") from None

    def ids(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def piece(self, token: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token)


TOKENIZERS: dict[str, Any] = {"bytes": Bytes, "gpt2": GPT2Tokens}


class Text:
    """Tokens to text as they come: a character is given once its last byte is there."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, token: int | None) -> str:
        """What `token` adds; None ends the text."""
        if token is None:
            return self.decoder.decode(b"", final=True)
        if token == self.tokenizer.mark:
            return self.decoder.decode(b"", final=True) + MARK
        return "".join(map(harmless, self.decoder.decode(self.tokenizer.piece(token))))


def harmless(character: str) -> str:
    """A control character could steer the reader's terminal."""
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return "\N{REPLACEMENT CHARACTER}" if control else character


def study_folder(step: str | None) -> Path:
    """The folder of a finished cell of the configured study: of this step, or of the baseline."""
    from lib.cells import baseline
    from lib.plan import Plan
    from scripts.plan import options_from_environment

    plan = Plan(options_from_environment([step] if step else ()))
    step = step or baseline(plan.study)
    cells = [(cell, plan.status[cell.name].state) for cell in plan.cells if cell.step == step]
    if not cells:
        raise UserError(f"step {step} is not in study {plan.study.name}.", "add it to ABLATION_STEPS in make menuconfig.")
    done = next((cell for cell, state in cells if state == "done"), None)
    if done is None:
        raise UserError(f"study {plan.study.name} has no finished cell of {step}.", "run it with make.")
    return plan.out / done.name


def load_model(folder: Path, device: str) -> "tuple[GPT, Config]":
    """(the model of a cell on its device, its configuration)."""
    if not (folder / ".config").is_file():
        raise UserError(f"{shown(folder)} is no cell: it has no .config.",
                        "give a folder test_<step>_<optimizer>_<pruning> of a study's results.")
    cfg = Study(config=folder / ".config").config

    import torch

    from gpt2 import trained
    from lib import runtime

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was given, but torch sees no GPU.", "leave it out.")
    model = trained.load(folder, cfg)
    where = runtime.setup(cfg.replace(DEVICE=device, GPT2_AMP_DTYPE="float32"))
    return model.to(where).eval().bake(), cfg


def write(model: "GPT", cfg: "Config", prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int,
          stop: bool, say: Callable[[str], None]) -> None:
    """Give the prompt and `tokens` more to `say`, piece by piece."""
    import torch

    tokenizer: Any = TOKENIZERS[cfg.TOKENIZER]()
    given = tokenizer.ids(prompt)
    if len(given) > model.block_size:
        raise UserError(f"the prompt has {len(given)} tokens, more than the context of {model.block_size}.", "shorten it.")
    device = model.transformer.wte.weight.device
    idx = torch.tensor([given or [tokenizer.mark]], device=device)
    text = Text(tokenizer)
    for token in given:
        say(text.of(token))
    for new in model.stream(idx, tokens, temperature, top_k, torch.Generator(device).manual_seed(seed)):
        if stop and new.item() == tokenizer.mark:
            break
        say(text.of(int(new.item())))
    say(text.of(None) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", help="a step of the configured study (default: its baseline)")
    parser.add_argument("--cell", type=Path, metavar="FOLDER", help="a cell's folder instead")
    parser.add_argument("--prompt", default=os.environ.get("PROMPT", ""), metavar="TEXT", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=os.environ.get("TOKENS") or "200", metavar="N",
                        help="how many to generate (default: 200)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="below 1 safer, 0 always the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the draws (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument("--stop", action="store_true", help="end at the end of a document")
    if whole(os.environ.get("TOKENS") or "200") is None:
        raise UserError(f"TOKENS={os.environ['TOKENS']} is no whole number.", "make sample TOKENS=200.")
    args = parser.parse_args(arguments)
    if args.cell and args.step:
        raise UserError("both a step and --cell were given.", "give one of them.")
    for option, least in (("tokens", 1), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        value = getattr(args, option)
        if value is not None and not least <= value < LIMIT:  # a NaN is neither
            raise UserError(f"--{option.replace('_', '-')} {value} is not {least} or more, or is too large.",
                            "leave it out for the default.")
    model, cfg = load_model(args.cell or study_folder(args.step), args.device)

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal of another encoding
    write(model, cfg, args.prompt, args.tokens, args.temperature, args.top_k, args.seed, args.stop, say)


if __name__ == "__main__":
    with reported():
        main()

import json

import pytest

from lib.report import kept
from tests.harness import refusal


def fits(content):
    return content["format"] == 1


def read(path):
    return kept.read(path, "make something", "make something anew.", fits)


def test_what_fits_is_read(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"format": 1, "rows": []}))
    assert read(path) == {"format": 1, "rows": []}


@pytest.mark.parametrize(("text", "said"), [
    (None, "there is no {}."), ('{"format": 2}', "{} is not of make something."),
    ("{", "{} cannot be read: JSONDecodeError: "), ("[" * 100_000, "{} cannot be read: RecursionError: "),
    ("[]", "{} cannot be read: TypeError: "), ("{}", "{} cannot be read: KeyError: 'format'."),
    ("\udcff", "{} cannot be read: UnicodeDecodeError: ")])
def test_what_cannot_be_used_is_a_sentence_and_what_to_run(tmp_path, text, said):
    path = tmp_path / "kept.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    problem, advice = refusal(read, path)
    assert problem.startswith(said.format(path)) and advice == "make something anew."

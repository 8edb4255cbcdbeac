"""Archives that make pack has not written: each is refused by a sentence, and nothing is written anywhere."""

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib import bundle, results
from lib.bundle import unpack
from lib.cells import expand
from lib.config import Study
from lib.kconfig import Schema
from lib.plan import Options, Plan
from tests.harness import TINY, finish, refusal, snapshot
from tests.lib.test_bundle import DAMAGED, FILES, V0, V1, quick  # noqa: F401  # a fixture of all tests

SCHEMA = Schema()
FOREIGN = "get an archive that make pack has written; nothing was unpacked."


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """{name: bytes} of one honest cell, and the study it belongs to, configured in `config`."""
    folder = tmp_path_factory.mktemp("honest")
    config = folder / "dot.config"
    lines = [*TINY, 'ABLATION_STEPS="V0"', f'OUTPUT_DIR="{folder / "out"}"']
    config.write_text("".join(f"CONFIG_{line}\n" for line in lines))
    cell, = expand(Study(config=config, schema=SCHEMA))
    finish(folder / "made", cell)
    files = {f"{cell.name}/{p.name}": p.read_bytes() for p in (folder / "made" / cell.name).iterdir()}
    assert len(files) == 3
    return SimpleNamespace(files=files, config=config, folder=folder, out=folder / "out")


def member(name, content=b"", **fields):
    one = tarfile.TarInfo(name)
    one.size = len(content)
    for field, value in fields.items():
        setattr(one, field, value)
    return one, content


def tar_bytes(*members, form=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for one, content in members:
            tar.addfile(one, io.BytesIO(content))
    return buffer.getvalue()


def honest_members(honest, **other):
    return [member(name, other.get(name.rpartition("/")[2], content)) for name, content in sorted(honest.files.items())]


FORMATS = {"xz": lambda content: lzma.compress(content, preset=0), "gz": lambda content: gzip.compress(content, 1, mtime=0)}


def refused(honest, monkeypatch, content, compress=True):
    """Offer these bytes to the study, in both formats; returns the refusal, and proves that nothing was written anywhere."""
    if compress:
        found = {refused(honest, monkeypatch, packed(content), compress=False) for packed in FORMATS.values()}
        assert len(found) == 1, "whatever it was compressed with"
        return found.pop()
    monkeypatch.setenv("KCONFIG_CONFIG", str(honest.config))
    path = honest.folder / "offered.tar.xz"
    path.write_bytes(content)
    plan, before = Plan(Options()), snapshot(honest.folder)
    found = refusal(unpack, plan, path)
    assert snapshot(honest.folder) == before and not honest.out.exists()
    assert sorted(p.name for p in honest.folder.iterdir()) == ["dot.config", "made", "offered.tar.xz"]
    return found[0].replace(str(path), "X"), found[1]


@pytest.mark.parametrize("packed", FORMATS.values(), ids=FORMATS)
def test_the_honest_members_are_taken(honest, monkeypatch, tmp_path, packed):
    """Or the refusals below would prove nothing."""
    monkeypatch.setenv("KCONFIG_CONFIG", str(honest.config))
    (tmp_path / "x.tar.xz").write_bytes(packed(tar_bytes(*honest_members(honest))))
    assert unpack(Plan(Options(out=str(tmp_path / "out"))), tmp_path / "x.tar.xz").added == [V0]


@pytest.mark.parametrize("bad, said", [
    (member("/etc/cron.d/x"), "'/etc/cron.d/x', which is no file of a cell"),
    (member("../test_V0_adamwspam_none/.config"), "'../test_V0_adamwspam_none/.config', which is no file of a cell"),
    (member(f"{V0}/../../x"), f"'{V0}/../../x', which is no file of a cell"),
    (member("test_../metrics.json/../.config"), "'test_../metrics.json/../.config', which is no file of a cell"),
    (member(f"./{V0}/.config"), f"'./{V0}/.config', which is no file of a cell"),
    (member(f"{V0}/model.pt"), f"'{V0}/model.pt', which is no file of a cell"),
    (member(f"{V0}/checkpoint.pt"), f"'{V0}/checkpoint.pt', which is no file of a cell"),
    (member(f"{V0}/.lock"), f"'{V0}/.lock', which is no file of a cell"),
    (member("plan/x.json"), "'plan/x.json', which is no file of a cell"),
    (member("cells.mk"), "'cells.mk', which is no file of a cell"),
    (member(f"test_{'x' * 236}/.config"), f"'test_{'x' * 114}, which is no file of a cell"),
    (member(f"{V0}/training.log\n"), f"'{V0}/training.log\\n', which is no file of a cell"),
    (member("test_\u0660/.config"), "'test_\\u0660/.config', which is no file of a cell"),
    (member("test_\x1b[31m/.config"), "'test_\\x1b[31m/.config', which is no file of a cell"),
    (member(f"{V0}/training.log", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
     f"'{V0}/training.log', which is no regular file"),
    (member(f"{V0}/training.log", type=tarfile.LNKTYPE, linkname=f"{V0}/.config"),
     f"'{V0}/training.log', which is no regular file"),
    (member(f"{V0}/training.log", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
     f"'{V0}/training.log', which is no regular file"),
    (member(f"{V0}/training.log", type=tarfile.FIFOTYPE), f"'{V0}/training.log', which is no regular file"),
    (member(f"{V0}/training.log", type=tarfile.DIRTYPE), f"'{V0}/training.log', which is no regular file"),
    (member(f"{V0}/training.log", type=tarfile.CONTTYPE), f"'{V0}/training.log', which is no regular file"),
    (member(f"{V0}/training.log/"), f"'{V0}/training.log/', which is no file of a cell"),
    (member(f"{V0}/.config"), f"'{V0}/.config', twice"),
], ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("first", [True, False])
def test_a_member_that_pack_does_not_write_is_refused_wherever_it_stands(honest, monkeypatch, bad, said, first):
    if "twice" in said and first:
        pytest.skip("the second one is refused")
    members = honest_members(honest)
    what, run = refused(honest, monkeypatch, tar_bytes(*([bad, *members] if first else [*members, bad])))
    assert (what, run) == (f"X holds {said}.", FOREIGN)


@pytest.mark.parametrize("size", [64 * 2 ** 20 + 1, 2 ** 40, 2 ** 62])
def test_a_file_that_claims_to_be_huge_is_refused_by_its_header(honest, monkeypatch, size):
    one, _ = member(f"{V0}/training.log", size=size)
    assert refused(honest, monkeypatch, one.tobuf(tarfile.GNU_FORMAT) + bytes(1024)) == (
        f"X holds '{V0}/training.log', which has {size} bytes, more than 64 MiB.", FOREIGN)


def test_a_negative_size_is_refused_and_does_not_loop(honest, monkeypatch):
    one, _ = member(f"{V0}/training.log")
    block = bytearray(one.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + (-512 & 0xffff).to_bytes(2, "big")  # base 256, negative
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block[:512])
    found = refused(honest, monkeypatch, bytes(block) + bytes(1024))
    assert found == (f"X holds '{V0}/training.log', which has -512 bytes, more than 64 MiB.", FOREIGN) or (
        found[0].startswith("X cannot be read: ") and found[1] == DAMAGED), "newer versions of tarfile see it themselves"


def long_header(kind, size, content=b""):
    """A GNU long name or a pax header that claims `size` bytes."""
    one, _ = member("././@LongLink", type=kind, size=size)
    return one.tobuf(tarfile.GNU_FORMAT) + content


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [2 ** 21, 2 ** 40])
def test_a_huge_header_is_not_read_into_memory(honest, monkeypatch, kind, size):
    what, run = refused(honest, monkeypatch, long_header(kind, size, bytes(2 ** 22)))
    assert what == f"X cannot be read: a header of {size} bytes." and run == DAMAGED


@pytest.mark.parametrize("packed", FORMATS.values(), ids=FORMATS)
def test_ten_thousand_nested_headers_end_in_a_sentence(honest, monkeypatch, packed):
    content = packed(long_header(tarfile.GNUTYPE_LONGNAME, 512, b"x" * 512) * 10_000)
    what, run = refused(honest, monkeypatch, content, compress=False)
    assert what.startswith("X cannot be read: ") and run == DAMAGED


@pytest.mark.parametrize("sparse", [{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"GNU.sparse.size": "99999999999"},
                                    {"size": "junk"}, {"GNU.sparse.map": "0,5"}])
def test_sparse_files_are_no_regular_files(honest, monkeypatch, sparse):
    name = f"{V0}/training.log"
    one, content = member(name, b"1\n0\n5\n" + bytes(506 + 512))
    one.pax_headers = {"GNU.sparse.name": name, "GNU.sparse.realsize": "99999999999"} | sparse
    what, run = refused(honest, monkeypatch, tar_bytes((one, content), form=tarfile.PAX_FORMAT))
    assert (run in (FOREIGN, DAMAGED)) and what.startswith(("X holds '", "X cannot be read: "))


def test_a_bomb_is_refused_by_its_total(honest, monkeypatch):
    monkeypatch.setattr(bundle, "TOTAL_LIMIT", 3 * 2 ** 20)
    members = [*honest_members(honest), member(f"{V0}/training.log", bytes(4 * 2 ** 20))]
    assert refused(honest, monkeypatch, tar_bytes(*members)) == ("X cannot be read: it holds more than 3 MiB.", DAMAGED)


def test_too_many_files_are_refused(honest, monkeypatch):
    monkeypatch.setattr(bundle, "MEMBER_LIMIT", 2)
    assert refused(honest, monkeypatch, tar_bytes(*honest_members(honest))) == (
        "X cannot be read: it holds more than 2 files.", DAMAGED)


@pytest.mark.parametrize("packed", FORMATS.values(), ids=FORMATS)
def test_an_archive_that_is_cut_anywhere_is_refused(honest, monkeypatch, packed):
    """In its compressed form, and before it was compressed: tarfile itself takes the latter for whole."""
    whole = tar_bytes(*honest_members(honest))
    compressed = packed(whole)
    for cut in (0, 1, 9, 10, 20, len(compressed) // 2, len(compressed) - 8, len(compressed) - 1):
        what, run = refused(honest, monkeypatch, compressed[:cut], compress=False)
        assert what.startswith("X cannot be read: ") and run == DAMAGED, cut
    ends = [n * 512 for n in range(len(whole) // 512) if whole[n * 512:].strip(b"\0")]
    for cut in {0, 100, 511, 512, 513, *ends}:
        what, run = refused(honest, monkeypatch, whole[:cut])
        assert what.startswith("X cannot be read: ") and run == DAMAGED, cut


@pytest.mark.parametrize("content, compress, said", [
    (b"no archive at all", False, "X cannot be read: Not a gzipped file (b'no')."),
    (b"no archive at all", True, "X cannot be read: truncated header."),
    (b"\0" * 10240, True, "X holds no cell."),
])
def test_what_is_no_archive(honest, monkeypatch, content, compress, said):
    assert refused(honest, monkeypatch, content, compress)[0] == said


def test_damage_inside_and_after_the_end(honest, monkeypatch):
    whole = tar_bytes(*honest_members(honest))
    flipped = bytearray(gzip.compress(whole, 0, mtime=0))
    flipped[-2000] ^= 1  # stored, not compressed: only the checksum can tell
    assert refused(honest, monkeypatch, bytes(flipped), compress=False)[0].startswith("X cannot be read: CRC check failed")
    flipped = bytearray(lzma.compress(whole, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]))
    flipped[len(flipped) // 2] ^= 1
    assert refused(honest, monkeypatch, bytes(flipped), compress=False)[0].startswith("X cannot be read: ")
    assert refused(honest, monkeypatch, whole + b"more")[0] == "X cannot be read: something follows its end."
    assert refused(honest, monkeypatch, lzma.compress(whole) + b"more", compress=False)[0] == (
        "X cannot be read: something follows its end."), "lzma itself takes no notice"
    unchecked = lzma.compress(whole, check=lzma.CHECK_NONE)
    assert refused(honest, monkeypatch, unchecked, compress=False)[0] == "X cannot be read: it has no checksum."
    broken = bytearray(whole)
    broken[512 * (whole.index(f"{V0}/provenance.json".encode()) // 512) + 3] ^= 1  # a header's checksum
    assert refused(honest, monkeypatch, bytes(broken))[0] == "X cannot be read: it has no end."


def test_xz_may_not_ask_for_more_memory_than_any_preset_needs(honest, monkeypatch):
    asking = lzma.compress(tar_bytes(*honest_members(honest)), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2 ** 28}])
    assert refused(honest, monkeypatch, asking, compress=False) == ("X cannot be read: Memory usage limit exceeded.", DAMAGED)


@pytest.mark.parametrize("missing", bundle.NEEDED)
def test_a_cell_without_its_record_is_refused(honest, monkeypatch, missing):
    members = [m for m in honest_members(honest) if not m[0].name.endswith(f"/{missing}")]
    said = "it has no result" if missing == "metrics.json" else f"it has no {missing}"
    assert refused(honest, monkeypatch, tar_bytes(*members)) == (f"X holds {V0}, but {said}.", FOREIGN)


def changed(honest, file, **values):
    content = json.loads(honest.files[f"{V0}/{file}"]) | values
    if file == "metrics.json":
        content["checksum"] = results.checksum(content)
    return {file: json.dumps(content).encode()}


@pytest.mark.parametrize("change, said", [
    (lambda h: {"metrics.json": b"{"}, "its metrics.json cannot be read: Expecting property name enclosed in double quotes: "
                                       "line 1 column 2 (char 1)"),
    (lambda h: changed(h, "metrics.json", val_loss=None), "its metrics.json cannot be read: it is not of format 1"),
    (lambda h: changed(h, "metrics.json", state="failed", reason="it broke"), "it failed: it broke"),
    (lambda h: changed(h, "metrics.json", seed=7), "its provenance.json and metrics.json differ in seed"),
    (lambda h: changed(h, "metrics.json", step="V1"), "its provenance.json and metrics.json differ in step"),
    (lambda h: changed(h, "provenance.json", optimizer="adamw"), "its provenance.json and metrics.json differ in optimizer"),
    (lambda h: changed(h, "provenance.json", identity={"set": {}, "default": {}}),
     "its provenance.json and metrics.json differ in identity"),
    (lambda h: {"provenance.json": b"[]"}, "its provenance.json cannot be read"),
    (lambda h: {"provenance.json": b"[" * 100_000}, "its provenance.json cannot be read"),
    (lambda h: changed(h, "metrics.json", seed="../x") | changed(h, "provenance.json", seed="../x"),
     "its metrics.json cannot be read: its seed is no count"),
    (lambda h: changed(h, "metrics.json", seed=True) | changed(h, "provenance.json", seed=True),
     "its metrics.json cannot be read: its seed is no count"),
    (lambda h: changed(h, "metrics.json", seed=2 ** 31) | changed(h, "provenance.json", seed=2 ** 31),
     "its seed 2147483648 is none"),
])
def test_a_record_that_does_not_hold_together_is_refused(honest, monkeypatch, change, said):
    assert refused(honest, monkeypatch, tar_bytes(*honest_members(honest, **change(honest)))) == (
        f"X holds {V0}, but {said}.", FOREIGN)


def test_a_stored_configuration_that_is_not_its_own_hash_is_refused(honest, monkeypatch):
    """The next make would run what it says, whatever trainer that is."""
    content = b'{"trainer": "elsewhere/evil.py"}'
    name = f"plan/{hashlib.sha256(b'something else').hexdigest()[:16]}.json"
    assert refused(honest, monkeypatch, tar_bytes(*honest_members(honest), member(name, content))) == (
        f"X holds {name}, but its content does not have the hash in its name.", FOREIGN)
    for text in (b"[]", b"{}", b'[{"hash": "0", "seen": 0, "plan": {}}]', b"["):
        what, _ = refused(honest, monkeypatch, tar_bytes(*honest_members(honest), member("plan/design.json", text)))
        assert what.startswith("X holds plan/design.json, but it ")


SOME = st.one_of(
    st.text(max_size=60), st.from_regex(bundle.MEMBER, fullmatch=True),
    st.builds("/".join, st.lists(st.sampled_from([
        "..", ".", "", V0, "plan", ".config", "metrics.json", "model.pt", "test_", "~", "0123456789abcdef.json", "design.json",
        "C:", "\\", "\0"]), max_size=5)))


@given(SOME)
@example(f"{V0}/.config")
@example("test_..+../metrics.json")
def test_a_name_is_taken_only_if_it_is_a_file_right_below_a_cell_or_the_plan(name):
    folder = bundle.cell_of(name)
    if folder is None:
        return
    parts = name.split("/")
    assert len(parts) == 2 and name.isascii() and name.isprintable() and " " not in name and "\\" not in name
    assert os.path.normpath(name) == name and not os.path.isabs(name)
    known = parts[1] in (*FILES, "curvature.json", "routing.json") or (
        re.fullmatch(r"lm_eval(_[A-Za-z0-9_-]+\.jsonl|\.json)", parts[1]))
    assert (known and parts[0] == folder and folder.startswith("test_") and len(folder) <= 240
            ) or (parts[0] == "plan" and folder == "" and parts[1].endswith(".json"))


@given(SOME)
def test_whatever_a_member_is_called_nothing_is_written_but_cells_of_the_study(honest, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sync", lambda: None)
        try:
            content = tar_bytes(*honest_members(honest), member(name, b"x"), form=tarfile.PAX_FORMAT)
        except (ValueError, UnicodeError):
            return  # what no tar can hold
        if name.rstrip("/") in (f"{V0}/metrics.jsonl", f"{V0}/training.log"):
            return
        refused(honest, patch, content)

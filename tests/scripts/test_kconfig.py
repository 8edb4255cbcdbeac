"""The configuration goals, run as make runs them, on a .config of the test's own."""

import errno
import os

import pytest

import scripts.kconfig
from lib.config import Study, defconfig_names
from lib.errors import UserError
from lib.kconfig import Schema, read_layer
from tests.harness import ROOT, copy_tree, run

STUDIES = sorted(defconfig_names())


def kconfig(*arguments, **options):
    return run("scripts.kconfig", *arguments, **options)


def ok(*arguments, **options):
    done = kconfig(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def refused(*arguments, **options):
    done = kconfig(*arguments, **options)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 2
    return done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("copy") / "tree")


# defconfig

def test_defconfig_writes_the_study_and_keeps_the_old_one(dotconfig):
    path = dotconfig("SEED=5")
    assert ok("defconfig", "gpt2-ra-ablation+tiny") == f"{path} is now gpt2-ra-ablation+tiny: steps V0 V1 V2 V3 V4 V5 V6\n"
    assert path.with_name(path.name + ".old").read_text() == "CONFIG_SEED=5\n"
    study = Study()
    assert study.name == "gpt2-ra-ablation+tiny" and study.config.GPT2_N_LAYER == 2
    assert {"CONFIG_GPT2_MAX_ITERS=250", 'CONFIG_LEARNING_RATE="0.0015"', "# CONFIG_GPT2_COMPILE is not set",
            'CONFIG_OPTIMIZER="adamwspam"'} <= set(path.read_text().splitlines()), "the full form"
    before = path.read_text()
    ok("defconfig", "gpt2-ra-ablation+tiny")
    assert path.read_text() == before


@pytest.mark.parametrize("name, message", [
    ("gpt2-ra-ablatoin", "error: there is no defconfig 'gpt2-ra-ablatoin'.\n  try: did you mean gpt2-ra-ablation?\n"),
    ("gpt2-ra-ablation+tinny", "error: there is no fragment 'tinny'.\n  try: did you mean tiny?\n"),
])
def test_a_wrong_name_leaves_dotconfig_alone(dotconfig, name, message):
    path = dotconfig("SEED=5")
    assert refused("defconfig", name) == message
    assert path.read_text() == "CONFIG_SEED=5\n" and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    expected = (f"error: {tmp_path}/file/x cannot be read or written: Not a directory.\n"
                "  try: check its folder and permissions ($KCONFIG_CONFIG names another .config).\n")
    assert refused("defconfig", "gpt2-ra-ablation", KCONFIG_CONFIG=tmp_path / "file/x") == expected


def test_what_kconfiglibs_tools_write_is_whole_or_not_there(dotconfig, monkeypatch):
    """On a disk that is full: kconfiglib would have emptied the file, and its .old would be all there is."""
    path = dotconfig("SEED=5")
    before, schema = {p.name: p.read_bytes() for p in path.parent.iterdir()}, Schema(parse=scripts.kconfig.Whole)
    kconf = schema.kconf
    kconf.load_config(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        for write in (kconf.write_config, kconf.write_min_config):  # as menuconfig calls them
            with pytest.raises(OSError, match="No space left"):
                write(str(path))
        with pytest.raises(UserError, match="dot.config cannot be read or written: No space left on device."):
            patch.setattr("sys.argv", ["kconfig", "olddefconfig"])
            scripts.kconfig.main()
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    assert kconf.write_config(str(path)) == f"Configuration saved to '{path}'"
    assert kconf.write_config(str(path)) == f"No change to configuration in '{path}'"
    assert path.read_text() == schema.text() and "CONFIG_SEED=5\n" in schema.text()
    assert (path.parent / "dot.config.old").read_bytes() == before["dot.config"]
    assert kconf.write_min_config(str(path)) == f"Minimal configuration saved to '{path}'"
    assert [a.name for a in read_layer(path)] == ["SEED"]


def test_a_link_stays_one(dotconfig, tmp_path):
    path = dotconfig("SEED=5")
    (tmp_path / "link").symlink_to(path)
    ok("olddefconfig", KCONFIG_CONFIG=tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and "CONFIG_BATCH_SIZE=8\n" in path.read_text()


@pytest.mark.parametrize("goal", ["olddefconfig", "oldconfig", "listnewconfig", "menuconfig", "savedefconfig"])
def test_a_dotconfig_that_was_cut_short_is_refused_and_stays(dotconfig, goal):
    """At the end of a line, where what is left reads well; kconfiglib would fill it up with defaults."""
    path = dotconfig()
    ok("defconfig", "gpt2-ra-ablation")
    text = path.read_text()
    path.write_text(text[:text.index("\n", len(text) // 2) + 1])
    before = path.read_text()
    assert refused(goal) == (f"error: {path} is cut short: its end is missing.\n"
                             f"  try: restore it (the one before it is {path}.old), or make defconfig-NAME.\n")
    assert path.read_text() == before
    ok("defconfig", "gpt2-ra-ablation")
    assert path.read_text() == text


# savedefconfig

@pytest.mark.parametrize("name", STUDIES)
def test_the_round_trip_of_a_study_changes_no_byte(tree, dotconfig, name):
    path = defconfig_names(tree / "defconfigs")[name]
    before = path.read_bytes()
    ok("defconfig", name, tree=tree)
    assert ok("savedefconfig", tree=tree) == f"{path.relative_to(tree)} holds the study now\n"
    assert path.read_bytes() == before


def test_changes_land_in_the_study_among_its_comments(tmp_path, dotconfig):
    tree, path = copy_tree(tmp_path / "tree"), dotconfig()
    study = tree / "defconfigs/mine"
    study.write_text('# Mine.\nCONFIG_ABLATION_STEPS="V0 V1 V2"\n\n# Why so small.\nCONFIG_BATCH_SIZE=3\n'
                     "CONFIG_GPT2_MAX_ITERS=9\n# CONFIG_GPT2_COMPILE is not set\n# CONFIG_GPT2_MAX_TIME=7\n"
                     'CONFIG_LEARNING_RATE="6e-4"\n')
    ok("defconfig", "mine", tree=tree)
    text = path.read_text()
    for old, new in [("CONFIG_BATCH_SIZE=3", "CONFIG_BATCH_SIZE=4"),
                     ("# CONFIG_GPT2_COMPILE is not set", "CONFIG_GPT2_COMPILE=y"),
                     ('CONFIG_OUTPUT_DIR=""', 'CONFIG_OUTPUT_DIR="a \\"b\\" \\\\"'),
                     ("CONFIG_GPT2_BIAS=y", "# CONFIG_GPT2_BIAS is not set"),
                     ("CONFIG_GPT2_MAX_ITERS=9", "CONFIG_GPT2_MAX_ITERS=0"),
                     ("CONFIG_GPT2_MAX_TIME=0", "CONFIG_GPT2_MAX_TIME=60"),
                     ('CONFIG_LEARNING_RATE="6e-4"', 'CONFIG_LEARNING_RATE="0.0006"')]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    ok("savedefconfig", tree=tree)
    assert study.read_text() == (
        '# Mine.\nCONFIG_ABLATION_STEPS="V0 V1 V2"\n\n# Why so small.\nCONFIG_BATCH_SIZE=4\n# CONFIG_GPT2_MAX_TIME=7\n'
        '# CONFIG_GPT2_BIAS is not set\nCONFIG_GPT2_MAX_TIME=60\nCONFIG_OUTPUT_DIR="a \\"b\\" \\\\"\n')
    before = Study().config.as_json()
    ok("defconfig", "mine", tree=tree)
    assert Study().config.as_json() == before


def test_a_merged_study_is_saved_only_under_a_name(tree, dotconfig):
    ok("defconfig", "gpt2-ra-ablation+tiny", tree=tree)
    assert refused("savedefconfig", tree=tree) == (
        "error: gpt2-ra-ablation+tiny is a study merged with fragments, which has no file of its own.\n"
        "  try: make savedefconfig NAME=study-name.\n")
    assert ok("savedefconfig", tree=tree, NAME="laptop") == "defconfigs/laptop holds the study now\n"
    text = (tree / "defconfigs/laptop").read_text()
    assert text.startswith("# laptop\n") and "CONFIG_MODEL_TINY=y\n" in text and "CONFIG_STUDY" not in text
    assert not list((tree / "defconfigs").glob("*+*"))
    ok("defconfig", "laptop", tree=tree)
    assert Study().name == "laptop" and Study().config.GPT2_MAX_ITERS == 250
    (tree / "defconfigs/laptop").unlink()


@pytest.mark.parametrize("name", ["../x", "a b", ".hidden"])
def test_a_name_that_is_no_name(tree, dotconfig, name):
    dotconfig("SEED=5")
    before = sorted((tree / "defconfigs").rglob("*"))
    assert refused("savedefconfig", tree=tree, NAME=name) == (
        f"error: '{name}' is no name for a study.\n  try: use letters, digits, dots, dashes and underscores.\n")
    assert sorted((tree / "defconfigs").rglob("*")) == before


def test_without_a_dotconfig_there_is_nothing_to_save(tree, tmp_path):
    assert refused("savedefconfig", tree=tree, KCONFIG_CONFIG=tmp_path / "none") == (
        f"error: there is no {tmp_path}/none.\n  try: make defconfig-NAME (see make list-defconfigs).\n")


# olddefconfig, oldconfig, listnewconfig

def test_olddefconfig_fills_in_and_says_what_no_longer_holds(dotconfig):
    path = dotconfig("BATCH_SIZE=3", "GONE=7", "RA_R=9", 'OPTIMIZER="adamw"')
    done = kconfig("olddefconfig")
    assert done.returncode == 0 and done.stderr == (
        f"{path}:2: GONE is no symbol any more and is dropped\n{path}:3: RA_R=9 does not hold, it is now nothing\n"
        f"{path}:4: OPTIMIZER=adamw does not hold, it is now adamwspam\n")
    assert done.stdout.endswith(f"Configuration saved to '{path}'\n")
    assert Study().config.BATCH_SIZE == 3 and Study().config.GPT2_MAX_TIME == 7200
    assert "GONE" not in path.read_text() and 'CONFIG_OPTIMIZER="adamwspam"\n' in path.read_text()
    before = path.read_text()
    ok("olddefconfig")
    assert path.read_text() == before


def test_listnewconfig_lists_what_dotconfig_does_not_say(dotconfig):
    path = dotconfig()
    path.write_text(Study("gpt2-ra-ablation").text())
    assert ok("listnewconfig") == ""
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()
                            if "CONFIG_BATCH_SIZE=" not in line and "CONFIG_MODEL_" not in line))
    listed = ok("listnewconfig").splitlines()
    assert listed == ["MODEL_TINY=n", "MODEL_GPT2=y", "MODEL_GPT2_MEDIUM=n", "MODEL_GPT2_LARGE=n", "MODEL_GPT2_XL=n",
                      "MODEL_CUSTOM=n", "BATCH_SIZE=8"]
    assert "BATCH_SIZE=" not in path.read_text(), "it only lists"


def test_oldconfig_asks_for_what_is_new_and_nothing_else(dotconfig):
    path = dotconfig()
    text = Study("gpt2-ra-ablation").text()
    path.write_text(text.replace("CONFIG_BATCH_SIZE=8\n", "").replace('CONFIG_GPT2_DROPOUT="0.1"\n', ""))
    done = kconfig("oldconfig", text="0.25\n\n")
    assert done.returncode == 0 and done.stderr == "" and "Dropout probability" in done.stdout and "Layers" not in done.stdout
    assert Study().config.GPT2_DROPOUT == 0.25 and Study().config.BATCH_SIZE == 8
    assert read_layer(path)[-1].name, "and what it wrote can be read"


def test_oldconfig_without_answers_is_two_lines(dotconfig):
    path = dotconfig("SEED=5")
    done = kconfig("oldconfig", text="")
    assert done.returncode == 2 and done.stderr == ("error: the input ended before every new symbol had a value.\n"
                                                    "  try: make olddefconfig, which asks nothing.\n")
    assert path.read_text() == "CONFIG_SEED=5\n"


def test_a_broken_dotconfig_is_named_with_its_line(dotconfig):
    path = dotconfig()
    path.write_text("CONFIG_SEED=5\nnonsense\n")
    assert refused("savedefconfig").startswith(f"error: {path}:2: 'nonsense' is no assignment.\n")
    done = kconfig("olddefconfig")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {path}:2: 'nonsense' is no assignment.\n")
    assert path.read_text() == "CONFIG_SEED=5\nnonsense\n"


def test_the_configuration_goals_do_not_touch_the_projects_own_files(dotconfig):
    """All of the above went to files of the test."""
    names = {".config", ".config.old"}
    before = {n: (ROOT / n).stat().st_mtime_ns for n in names if (ROOT / n).exists()}
    dotconfig()
    ok("defconfig", "gpt2-ra-ablation")
    ok("olddefconfig")
    assert {n: (ROOT / n).stat().st_mtime_ns for n in names if (ROOT / n).exists()} == before


def test_usage_errors_are_argparses():
    for arguments in (["defconfig"], ["nonsense"]):
        done = kconfig(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("usage: python -m scripts.kconfig")

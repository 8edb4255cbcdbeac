"""What surrounds the code: its metadata agree, its hooks work without a network, its image is made of files that are there, and
the types of what is public are checked without exceptions that nobody gave a reason for."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.harness import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for folder in ("lib", "gpt2", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
# Whose arguments are Triton's.
KERNELS = {"gpt2/attention/pruning_kernel.py", "gpt2/softmax_kernel.py", "lib/optimizers/spike_kernel.py"}


def read_yaml(name):
    return pytest.importorskip("yaml").safe_load((ROOT / name).read_text())


def test_citation_and_changelog_are_of_the_projects_version_and_licence():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"]
    assert citation["title"] == PROJECT["project"]["name"]
    assert str(citation["version"]) == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] and all(author["name"] in (ROOT / "LICENSE").read_text() for author in citation["authors"])
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == "Unreleased" and (versions[1:2] or [PROJECT["project"]["version"]]) == [PROJECT["project"]["version"]]


def test_hooks_are_of_this_environment_and_download_nothing():
    clientlib = pytest.importorskip("pre_commit.clientlib")
    config = clientlib.load_config(str(ROOT / ".pre-commit-config.yaml"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    assert {"ruff", "mypy", "claims"} <= hooks.keys()
    for hook in hooks.values():
        assert hook["language"] == "system" and "additional_dependencies" not in hook
        assert hook["entry"].startswith(".ci/python -m ")


@pytest.mark.parametrize("given", [True, False])
def test_a_hook_runs_with_the_projects_interpreter(tmp_path, given):
    """$PYTHON first, then what make set up."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci/python"
    script.write_text((ROOT / ".ci/python").read_text())
    script.chmod(0o755)
    assert os.access(ROOT / ".ci/python", os.X_OK)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\necho of make, $1\n")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | ({"PYTHON": sys.executable} if given else {})
    done = subprocess.run([script, "-c", "import os; print('given', os.getcwd())"], env=environment, text=True,
                          capture_output=True, check=True)
    assert done.stdout.strip() == (f"given {tmp_path.resolve()}" if given else "of make, -c")


def test_the_hook_of_ruff_refuses_a_fault(tmp_path):
    """The rules of pyproject.toml hold in it, by their file: an unused import and a return that says nothing."""
    pytest.importorskip("ruff")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "faulty.py").write_text("import os\n\n\ndef f(x):\n    if x:\n        return 1\n    else:\n        return 2\n")
    done = subprocess.run([ROOT / ".ci/python", "-m", "ruff", "check", "--no-cache", "--output-format", "concise",
                           "--config", tmp_path / "pyproject.toml", tmp_path / "faulty.py"],
                          env=os.environ | {"PYTHON": sys.executable}, text=True, capture_output=True)
    assert done.returncode == 1 and "F401" in done.stdout and "RET505" in done.stdout


def test_all_functions_have_types_for_mypy_to_check():
    bare = []
    for path in SOURCES:
        if str(path.relative_to(ROOT)) in KERNELS:
            continue
        tree = ast.parse(path.read_text())
        methods = {f for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"):
                a = f.args
                given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in f.decorator_list)
                if f.returns is None or any(x.annotation is None for x in given[f in methods and not static:]):
                    bare.append(f"{path.relative_to(ROOT)}:{f.lineno} {f.name}")
    assert bare == []


def test_mypy_is_told_to_overlook_nothing_without_a_name_and_a_reason():
    mypy = PROJECT["tool"]["mypy"]
    assert set(mypy["files"]) == {"lib", "gpt2", "scripts"} and mypy["disallow_untyped_defs"] and mypy["check_untyped_defs"]
    for part in (mypy, *mypy["overrides"]):
        assert not part.keys() & {"ignore_errors", "follow_imports", "exclude"} and "*" not in part.get("module", [])
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert "type: ignore" not in line or re.search(r"# type: ignore\[[a-z, -]+\]  # \S", line), f"{path}:{number}"


def test_the_image_is_made_of_what_is_here_and_does_not_run_as_root():
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    said = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    base = re.search(r"^ARG BASE=python:(\d+)\.(\d+)-slim$", text, re.M)
    least = re.search(r"(\d+)\.(\d+)", PROJECT["project"]["requires-python"])
    assert tuple(map(int, base.groups())) >= tuple(map(int, least.groups()))
    taken = [word for kind, rest in said if kind == "COPY" for word in rest.split()[:-1] if not word.startswith("--")]
    assert "." in taken and all((ROOT / word).exists() for word in taken)
    assert said.index(["USER", "kablate"]) < [kind for kind, _ in said].index("ENTRYPOINT")
    entry, goal = (json.loads(dict(said)[kind]) for kind in ("ENTRYPOINT", "CMD"))
    done = subprocess.run([*entry, "-n", *goal], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "scripts.listing goals" in done.stdout


def test_nothing_that_is_made_here_goes_into_the_image():
    """What git ignores, but for folders below the first level, which docker's patterns name otherwise."""
    left_out = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")}
    made = {line.replace("!/", "!").strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert made - {"!test_matrix_results/README.md", "__pycache__", "*.pyc"} <= left_out
    assert {"**/__pycache__", "**/*.pyc", "!test_matrix_results/README.md"} <= left_out

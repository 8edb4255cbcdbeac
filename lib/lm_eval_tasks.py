"""Tasks of lm-eval, by name or from a local folder, and what a result on one of them depends on.

Contract: nothing is asked of a network unless the user has set HF_HUB_OFFLINE=0, and nothing is told to anybody. A word is the
name of a task, group or tag of the lm_eval package, a YAML file of a task, or a folder of such files; relative paths of data in
a local file are relative to that file's folder. A task brings code (its templates, and functions that its YAML names), and that
code is run.
"""

import contextlib
import hashlib
import inspect
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.paths import ROOT, shown

FEWSHOT_SEED = 1234  # lm_eval's own default
FEWSHOT_HASHED = 1000  # of the items that examples are drawn from
INSTALL = "pip install lm_eval."
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object, another one each time


def stay_offline() -> None:
    """Set what the libraries behind lm_eval read when they are imported, unless the user has."""
    offline = os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, offline)
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # the package evaluate tells where it is used
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_DATASETS_DISABLE_PROGRESS_BARS",
                 "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def load(words: list[str]) -> dict:
    """{name: task of lm_eval} in the order asked for. UserError for a task that is not known, or whose data is not here."""
    stay_offline()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm-eval needs {error.name}, which is not installed.", INSTALL) from None
    found, known = {}, None
    for word in words:
        path = ROOT / word
        if path.is_dir():
            manager = TaskManager(include_path=str(path), include_defaults=False)
            names = [(name, manager.task_index[name].yaml_path.parent) for name in manager.all_subtasks]
            if not names:
                raise UserError(f"there is no task in {shown(path)}.", "give a folder with YAML files of lm-eval tasks.")
        elif path.is_file():
            manager, names = TaskManager(include_defaults=False), [(str(path), path.parent)]
        else:
            manager = known = known or TaskManager()  # which reads all files of the package: seconds
            names = [(word, None)]
            if word not in manager.task_index:
                raise UserError(f"there is no task {word}, and no such file or folder.",
                                "lm_eval ls tasks lists the names; docs/lm-eval.md says how to write one.")
        for name, folder in names:
            found |= _loaded(manager, name, folder)
    return found


def _loaded(manager: Any, name: str, folder: Path | None) -> dict:
    """The tasks of one name, with their data."""
    with contextlib.chdir(folder) if folder else contextlib.nullcontext():
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # whatever a task's own code, its YAML, its templates or its data set may raise
            said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if folder:
                raise UserError(f"{shown(folder / name)} cannot be loaded: {said}.",
                                "mend the task; docs/lm-eval.md shows one.") from None
            raise UserError(f"the data of task {name} cannot be had: {said}.",
                            "HF_HUB_OFFLINE=0 make lm-eval once where there is a network, or a local copy (docs/lm-eval.md)."
                            ) from None
    for one, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {one} runs code that a model has written, which is not supported.", "leave it out.")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


def digest(task: Any, limit: int | None) -> str:
    """16 hex digits of what is asked: the task's configuration with its code, its items up to `limit`, and lm_eval's version;
    not where on this machine the task lies."""
    from importlib.metadata import version

    asked, configured = hashlib.sha256(), task.dump_config()
    configured["metadata"] = {key: value for key, value in (configured.get("metadata") or {}).items() if key != "config_source"}
    shown_before = itertools.islice(task.fewshot_docs(), FEWSHOT_HASHED) if task.get_config("num_fewshot") else ()
    for part in (version("lm_eval"), configured, *itertools.islice(task.eval_docs, limit), *shown_before):
        asked.update(ADDRESS.sub("", json.dumps(part, sort_keys=True, default=_described)).encode() + b"\n")
    return asked.hexdigest()[:16]


def _described(value: object) -> str:
    """What JSON has no form for: of a function its source."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
    return repr(value)


def evaluate(task: Any, name: str, model: Any, limit: int | None) -> tuple[dict, list[dict]]:
    """({metric: {"value", "stderr"}}, one dict an item) of a task on a model (lm_eval's LM).

    Metrics after a filter have its name behind a comma. An item has its id, hashes, target, log-likelihoods or responses, and
    its own value of each metric.
    """
    from lm_eval.evaluator import evaluate as evaluated

    task.set_fewshot_seed(FEWSHOT_SEED)  # for each cell: the sampler goes on where it was
    result = evaluated(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1000)
    metrics: dict[str, dict] = {}
    for key, value in result["results"][name].items():
        metric, _, after = key.partition(",")
        if not after:
            continue
        base = metric.removesuffix("_stderr")
        entry = metrics.setdefault(_named(base, after), {"value": None, "stderr": None})
        entry["value" if base == metric else "stderr"] = finite(value)
    items: dict[int, dict] = {}
    for sample in result["samples"][name]:
        item = items.setdefault(sample["doc_id"], {key: sample[key] for key in ("doc_id", "doc_hash", "prompt_hash")}
                                | {"target": sample["target"]})
        answers = [responses[0] for responses in sample["resps"]]
        if "acc_mutual_info" in sample["metrics"]:  # whose requests without a context follow those of the choices
            answers = answers[:len(answers) // 2]
        if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
            item |= {"log_likelihoods": [finite(score) for score, _ in answers], "greedy": [bool(g) for _, g in answers]}
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            item |= {"log_likelihoods": [finite(score) for score in answers]}
        else:
            item["responses"] = answers
        item |= {_named(metric, sample["filter"]): _plain(sample[metric]) for metric in sample["metrics"]}
    return metrics, [items[number] for number in sorted(items)]


def _named(metric: str, after: str) -> str:
    return metric if after == "none" else f"{metric},{after}"


def finite(value: Any) -> float | None:
    """A number of strict JSON; None of "N/A", NaN, or an infinity."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if abs(value) < float("inf") else None


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return finite(value)

"""Read what is logged by step: logs of training programs, trainer states of Hugging Face, and exported charts.

Each becomes one row per run and step. The losses are called `val_loss` and `train_loss`, because a column `loss` of a
training program is that of the training data, and a run table's `loss` is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.formats.raw import RawTable, decode_text, format_number

if TYPE_CHECKING:
    import pandas as pd

# Names of files and folders that do not say which run they hold.
GENERIC_NAME = re.compile(
    r"(trainer_state|main|logs?|train|training|results?|progress|metrics|history|stats|output|stdout|stderr|summary|"
    r"wandb-summary|data|eval|events\.out.*|version_\d+|checkpoint-\d+|lightning_logs|files|tb|tensorboard|runs?)",
    re.IGNORECASE,
)
ENDINGS = re.compile(r"(\.(gz|bz2|xz|zst|csv|tsv|txt|jsonl?|ndjson|log|out|err|parquet|xlsx))+$", re.IGNORECASE)

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NUMBER = r"([+-]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|[+-]?inf)\b"
STEP = re.compile(
    r"(?:\b(?:global[_ ]?step|step|iter(?:ation)?|num_updates|update)s?\b\s*[:=#]?\s*|(?<![\w.])s:)(\d[\d,]*)"
    r"|^\s*(\d+) \| (?=loss\b)",
    re.IGNORECASE,
)
SETS = {"train": "train_", "training": "train_", "trn": "train_"} | dict.fromkeys(
    ("val", "valid", "validation", "eval", "evaluation", "dev", "test", "heldout"), "val_"
)
LOSS = re.compile(
    rf"(?:\b({'|'.join(sorted(SETS, key=len, reverse=True))})[ _/:-]+)?(?<![a-z])(?:lm |ce |smooth )?"
    r"(loss|bpb|perplexity|ppl|nll|cross[ _]entropy)\b"
    rf"(?:[ _]*(?:value|ppl))?(?:[ _-]+({'|'.join(sorted(SETS, key=len, reverse=True))}))?\s*[:=]?\s*{NUMBER}",
    re.IGNORECASE,
)
# "train 4.83, val 4.96" is a pair of losses without the word.
BARE_LOSSES = re.compile(
    rf"\btrain(?:ing)?[ :=]+{NUMBER},?\s+(?:val|valid|validation|eval)[ :=]+{NUMBER}", re.IGNORECASE
)
# A word before the name belongs to it: the norm in "grad norm: 1.1" is not called "norm".
PAIR = re.compile(rf"(?<![A-Za-z)] )\b([A-Za-z][\w./-]*)\s*[:=]\s*{NUMBER}", re.IGNORECASE)
# Names of several words that logs separate by bars or commas.
PHRASES = re.compile(rf"\b(learning rate|global batch size|consumed (?:samples|tokens)|tokens seen)\s*[:=]\s*{NUMBER}")
# llm.c writes test and train losses under these names.
LLM_C = {"tel": "val_loss", "trl": "train_loss"}
EVALUATION = re.compile(r"\b(val|valid|validation|validate|eval|evaluation)\b", re.IGNORECASE)
# Settings that nanoGPT and nanochat print once: tokens per step, and the number of parameters.
BATCH_TOKENS = re.compile(
    r"\b(?:tokens per (?:iteration|step)(?: will be)?|total batch size)\D{0,9}?(\d[\d,]*)", re.IGNORECASE
)
PARAMETERS = re.compile(
    r"\bnumber of (?:model |trainable )?parameters(?: of the model)?\s*[:=]\s*(\d[\d,.]*\s*[KMBT]?)\b", re.IGNORECASE
)
# Lines at the beginning of a file by which a log is told from a table.
LEAST_LINES = 1


def name_run(path: Path) -> str:
    """Return the name of the run that a file or folder holds: its own, or that of the nearest folder that has one."""
    path = path.absolute()
    for part in (path, *path.parents):
        stem = ENDINGS.sub("", part.name)
        if stem and not GENERIC_NAME.fullmatch(stem):
            return stem
    return ENDINGS.sub("", path.name)


def read_log(data: bytes, path: Path) -> RawTable | None:
    """Read the log of a training program: lines that name a step and a loss.

    It knows the lines of llm.c, nanoGPT, nanochat, modded-nanogpt, torchtitan and Megatron-LM, and similar ones.

    Args:
        data: The log, in any encoding.
        path: Its path.

    Returns:
        One row per step, with `run_id`, `step`, `val_loss`, `train_loss` and what else the lines give by name. None if
        no line names both a step and a loss.
    """
    text = decode_text(data, str(path))[0].decode("utf-8", "replace")
    rows, settings, lines = list[dict[str, Any]](), dict[str, str](), 0
    for line in text.splitlines():
        if not line.strip():
            continue
        lines += 1
        line = ESCAPES.sub("", line)
        if match := BATCH_TOKENS.search(line):
            settings.setdefault("batch_tokens", match[1].replace(",", ""))
        if match := PARAMETERS.search(line):
            settings.setdefault("n_params", match[1])
        if row := _read_line(line):
            rows.append(row)
    if len(rows) < LEAST_LINES:
        return None
    merged = merge_steps(rows, "step")
    import pandas as pd

    names = list(dict.fromkeys(name for row in merged for name in row))
    cells = pd.DataFrame({name: pd.Series([row.get(name) for row in merged], dtype=object) for name in names})
    cells.insert(0, "run_id", name_run(path))
    for name, value in settings.items():
        cells[name] = value
    remarks = [f"{path.name} is read as a log: {len(rows)} of {lines} lines name a step and a loss"]
    if "n_params" in settings:
        remarks.append(
            f"n_params is the number of parameters in the log, {settings['n_params']}; it does not say which"
        )
    return _suggest_curve(cells, "step", remarks)


def read_trainer_state(document: dict[str, Any], path: Path) -> RawTable:
    """Read the history in a trainer_state.json of Hugging Face.

    The `loss` of its rows is that of the training data, and becomes `train_loss`.
    """
    import pandas as pd

    from scaling.formats.raw import raise_problems

    history = document["log_history"]
    wrong = [f"log_history, entry {i}: needed an object" for i, row in enumerate(history) if not isinstance(row, dict)]
    raise_problems(wrong[:5], str(path))
    rows = []
    for entry in history:
        # The last entry sums the training up; its train_loss is a mean over all steps. Predictions have no step.
        if "train_runtime" not in entry and not ("step" not in entry and "predict_runtime" in entry):
            rows.append({"train_loss" if name == "loss" else name: value for name, value in entry.items()})
    if not rows:
        raise ValueError(f"{path} cannot be used: no rows (its log_history is empty)")
    merged = merge_steps(rows, "step")
    names = list(dict.fromkeys(name for row in merged for name in row))
    cells = pd.DataFrame({name: pd.Series([row.get(name) for row in merged], dtype=object) for name in names})
    if "run_id" not in cells:
        cells.insert(0, "run_id", str(document.get("trial_name") or name_run(path)))
    raw = _suggest_curve(cells, "step", ["the file is a trainer state of Hugging Face, read with one row per step"])
    seen = cells.get("num_input_tokens_seen")
    if seen is not None and any(isinstance(v, int | float) and v > 0 for v in seen):
        raw.mapping["D"] = "num_input_tokens_seen"
    return raw


def read_chart(raw: RawTable, path: Path) -> RawTable:
    """Return one row per run and step of the CSV export of a chart; other tables are returned as they are.

    The trials of Ray are told apart by `trial_id`. Weights & Biases writes one column per run, "RUN - METRIC", with two
    more for the least and greatest value of a step that was averaged. TensorBoard writes the columns "Wall time",
    "Step" and "Value" of one run.
    """
    columns = [str(c) for c in raw.cells.columns]
    if columns == ["Wall time", "Step", "Value"]:
        match = re.fullmatch(r"(?:run-)?(.*?)-?tag-(.*)", ENDINGS.sub("", path.name))
        run, tag = (match[1], match[2]) if match and match[1] else (name_run(path), match[2] if match else "")
        raw.cells.insert(0, "run_id", run)
        raw.remarks.append(f"the file is a curve of TensorBoard{f', {tag}' if tag else ''}: the run is {run}")
        raw.mapping |= {"D": "Step:steps"} | ({} if _is_training_loss(tag) else {"loss": "Value"})
        return raw
    if {"training_iteration", "trial_id"} <= set(columns):
        # The history of a trial of Ray.
        raw.mapping.setdefault("run_id", "trial_id")
    bounds = [c for c in columns if c.endswith(("__MIN", "__MAX"))]
    curves = [c for c in columns if " - " in c and c not in bounds]
    axes = [c for c in columns if " - " not in c]
    if not curves or len(axes) != 1 or not (bounds or all(c.rsplit(" - ", 1)[1] == _metric(curves[0]) for c in curves)):
        return raw
    return _melt_chart(raw, axes[0], curves)


def merge_steps(rows: Sequence[dict[str, Any]], step: str) -> list[dict[str, Any]]:
    """Return one row per step: lines of one step that hold different values, such as two losses, are joined.

    A step that comes again with a value that it already has starts a new row, as when a run was resumed.
    """
    merged: list[dict[str, Any]] = []
    for row in rows:
        last = merged[-1] if merged else {}
        same = last and step in row and last.get(step) == row[step]
        if same and all(last.get(name, value) == value for name, value in row.items()):
            last.update(row)
        else:
            merged.append(dict(row))
    return merged


def _read_line(line: str) -> dict[str, Any] | None:
    """Return the step, the losses and other named numbers of a line of a log; None if there is no step or no loss."""
    line = line.replace("'", "").replace('"', "")
    step = STEP.search(line)
    if not step:
        return None
    row: dict[str, Any] = {"step": int((step[1] or step[2]).replace(",", ""))}
    for name, value in PHRASES.findall(line):
        row[name.replace(" ", "_")] = value.replace(",", "")
    losses: dict[str, str] = {}
    for before, what, after, value in LOSS.findall(line):
        kind = SETS.get((before or after).lower()) or ("val_" if EVALUATION.search(line) else "train_")
        losses.setdefault(kind + what.lower().replace(" ", "_"), value.replace(",", ""))
    if not losses and (bare := BARE_LOSSES.search(line)):
        losses = {"train_loss": bare[1].replace(",", ""), "val_loss": bare[2].replace(",", "")}
    for name, value in PAIR.findall(line):
        if name in LLM_C:
            losses[LLM_C[name]] = value.replace(",", "")
        elif (
            name.lower() not in SETS
            and not STEP.match(f"{name}:1")
            and not re.search(r"loss|bpb|ppl|perplexity", name, re.IGNORECASE)
        ):
            row.setdefault(name, value.replace(",", ""))
    return row | losses if losses else None


def _suggest_curve(cells: pd.DataFrame, step: str, remarks: list[str]) -> RawTable:
    """Return the table of a curve with the mapping that its names imply, and a remark on the losses that it has."""
    losses = [c for c in map(str, cells.columns) if c in ("val_loss", "eval_loss", "train_loss")]
    held_out = [c for c in losses if c != "train_loss"]
    mapping = {"D": f"{step}:steps"} if step in cells else {}
    if held_out:
        mapping["loss"] = held_out[0]
    counts = ", ".join(f"{c} at {format_number(int(cells[c].notna().sum()), 'step')}" for c in losses)
    if counts:
        remarks.append(counts + ("" if held_out else "; a validation loss is not in it"))
    if "learning_rate" in cells:
        mapping["lr"] = "learning_rate"
    advice = "the file is the history of one run: give what it lacks by --set N=NUMBER and --set batch_tokens=NUMBER"
    return RawTable(cells, remarks, mapping, advice=advice)


def _melt_chart(raw: RawTable, axis: str, curves: Sequence[str]) -> RawTable:
    import pandas as pd

    runs: dict[str, dict[str, str]] = {}
    for column in curves:
        run, metric = column.rsplit(" - ", 1)
        # W&B repeats the axis for each run.
        if metric != axis:
            runs.setdefault(run, {})[metric] = column
    parts = []
    for run, sources in runs.items():
        part = raw.cells[[axis, *sources.values()]].set_axis([axis, *sources], axis="columns")
        values = [m for m in sources if not m.startswith("_")] or list(sources)
        part = part[part[values].notna().any(axis=1)]
        part.insert(0, "run_id", run)
        parts.append(part)
    cells = pd.concat(parts, ignore_index=True)
    metrics = [m for m in dict.fromkeys(_metric(c) for c in curves) if not m.startswith("_")]
    found = f"{format_number(len(runs), 'run')}, read with one row per {axis} of {', '.join(metrics)}"
    remarks = [*raw.remarks, f"the file is a chart of Weights & Biases: {found}"]
    is_mean = any(
        f"{c}{end}" in raw.cells and _differ(raw.cells[c], raw.cells[f"{c}{end}"])
        for c in curves
        for end in ("__MIN", "__MAX")
    )
    if is_mean:
        remarks.append("its values are means over several steps or runs (__MIN and __MAX differ from them)")
    mapping = {"run_id": "run_id"}
    if re.fullmatch(r"(trainer/|train/)?(global_)?_?step", axis, re.IGNORECASE):
        mapping["D"] = f"{axis}:steps"
    losses = [m for m in metrics if "loss" in m.lower() and not _is_training_loss(m)]
    if len(losses) == 1:
        mapping["loss"] = losses[0]
    advice = (
        "a chart holds no settings of its runs. Runs of one size: --set N=NUMBER. Several sizes: add a column "
        f'"{next(iter(runs))} - N" for each run, with its N in every row, or export the table of runs instead'
    )
    return RawTable(cells, remarks, mapping, advice=advice)


def _differ(first: pd.Series, second: pd.Series) -> bool:
    return bool((first.notna() & second.notna() & first.astype(str).ne(second.astype(str))).any())


def _metric(column: str) -> str:
    return column.rsplit(" - ", 1)[1]


def _is_training_loss(name: str) -> bool:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return bool(words & {"train", "training"}) and not words & {"val", "valid", "validation", "eval", "test"}

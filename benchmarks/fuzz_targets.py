"""What is fuzzed: every reader of files that others may have written, each with a few valid files to start from.

A reader gets bytes and an empty folder. It may read the bytes, or refuse them with a ValueError or OSError whose
message names the file. Anything else that it raises is a bug.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Reader = Callable[[bytes, Path], None]


@dataclass(frozen=True)
class Kind:
    """One reader, and valid files for it."""

    name: str
    seeds: tuple[bytes, ...]
    read: Reader


def make_targets(name: str, folder: Path) -> list[Kind]:
    """Return the kinds of one target. What they need beside their inputs is created in `folder`."""
    return {"study": make_study, "runs": make_runs, "journal": make_journal, "checkpoint": make_checkpoint}[name](
        folder
    )


NAMES = ("study", "runs", "journal", "checkpoint")


def write_input(data: bytes, path: Path) -> Path:
    """Write an input and return its path."""
    path.write_bytes(data)
    return path


# --- study files ------------------------------------------------------------------------------------------------------

OURS = """seed = 0
[search]
tokens = { min = 8192, max = 73_728 }
eta = 3
seeds = [1, 1, 2]
[space]
lr = { low = 5e-4, high = 0.25, log = true }
batch_seqs = { low = 1, high = 16, log = true, type = "int" }
beta2 = { choices = [0.9, 0.95] }
[belief.lr]
value = 0.01
at = { N = 1e4, D = 1e5 }
exponent_D = -0.1
[trainer]
use = "proxies:ProxyFamily"
widths = [16, 32]
n_layers = 1
d_head = 16
base_width = 16
seq_len = 32
warmup_tokens = 1024
corpus = "CORPUS"
[target]
d_model = 64
tokens = 147_456
[workers]
count = 2
"""
COMMAND = """[search]
tokens = { min = 100, max = 900 }
budget = 4.5
sampler = "random"
[space]
lr = { low = 1e-4, high = 0.1, log = true }
batch = { low = 2, high = 32, type = "int", step = 2.0 }
[trainer]
use = "proxies:CommandFamily"
command = "{python} train.py --lr {lr} --tokens {tokens} --width {width} --batch {batch} --seed {seed} '{not}'"
seq_len = 64
sizes = [{ width = 16, N = 6_144 }, { width = 32, N = 16_384 }]
fixed = { not = "x" }
environment = { A = "b" }
tokens_per_second = [1e4, 5e3]
[target]
width = 128
N = 163_840
tokens = 393_216
"""


def make_study(folder: Path) -> list[Kind]:
    from hpo.study.config import load_study
    from hpo.study.schema import TrainerTable

    find = TrainerTable.find

    # A mutated name must not import whatever has that name.
    def find_own(table: Any) -> Any:
        if table.use not in ("proxies:ProxyFamily", "proxies:CommandFamily"):
            raise ImportError("another module")
        return find(table)

    TrainerTable.find = find_own  # type: ignore[method-assign]
    corpus = write_input(b"some text of a few words. " * 4000, folder / "corpus.txt")
    seeds = (OURS.replace("CORPUS", str(corpus)).encode(), COMMAND.encode())
    return [Kind("study", seeds, lambda data, here: ignore(load_study(write_input(data, here / "x.toml"))))]


def ignore(*_: object) -> None:
    """Discard a reader's result."""


# --- run tables -------------------------------------------------------------------------------------------------------

ROWS = [
    {
        "N": 1e6 * (1 + i % 3),
        "D": 2e7 * (1 + i % 2),
        "loss": 3.0 - 0.01 * i,
        "lr": 2.0 ** -(6 + i % 4),
        "batch_tokens": 4096,
        "run_id": f"r{i}",
    }
    for i in range(12)
]
FOREIGN_TEXTS = (
    b"sep=;\nN;D;loss\n1.000.000;2e7;3,1\n2.000.000;2e7;2,95\n",
    b"| N | D | loss |\n|---|:-:|---|\n| 1M | 20M | **3.1** |\n| 2M | 20M | 2.95 |\n",
    "Runs of March\nN\tD\tloss\n(M)\t(M)\tnats\n1\t20\t3.1\n# next\n2\t20\t2.95\n".encode("utf-16"),
)
ORIENTATIONS: tuple[Literal["columns", "index", "split", "table"], ...] = ("columns", "index", "split", "table")
LOGS = (
    b"number of parameters: 1.00M\ntokens per iteration will be: 4,096\nstep 5: train loss 3.1, val loss 3.2\n",
    b"number of parameters: 1000000\ntotal batch size: 4096\ns:5 trl:3.1 lr:0.1\ns:5 tel:3.2\ns:9 tel:3.0\n",
)
CHART = (
    b'"Step","a - val/loss","a - val/loss__MIN","a - val/loss__MAX","a - N","a - batch_tokens"\n'
    b'"5","3.1","3.1","3.1","1e6","4096"\n"9","3.0","3.0","3.0","1e6","4096"\n'
)
WANDB = {"N": "params", "D": "tokens:millions", "loss": "val_loss", "batch_tokens": "bs:sequences", "seq_len": "seq"}


def make_runs(folder: Path) -> list[Kind]:
    import pandas as pd

    from scaling.runs.importer import import_runs, read_mapping
    from scaling.runs.io import load_runs

    def reader(suffix: str, mapping: Mapping[str, str] | None) -> Reader:
        def read(data: bytes, here: Path) -> None:
            path = write_input(data, here / f"x{suffix}")
            import_runs(path, mapping=mapping) if mapping else load_runs(path)

        return read

    def wandb(row: dict[str, Any], i: int) -> dict[str, Any]:
        config = {"params": row["N"], "bs": {"value": 16}, "seq": 256, "lr": row["lr"]}
        return {
            "Name": f"run {i}",
            "State": "finished" if i else "crashed",
            "config": config,
            "summary": {"val_loss": row["loss"], "tokens": 20 + i},
        }

    exported = [wandb(row, i) for i, row in enumerate(ROWS)]
    table, parquet = pd.DataFrame(ROWS), io.BytesIO()
    table.to_parquet(parquet)
    printed = pd.DataFrame([{k: str(v) for k, v in row.items()} for row in exported]).to_csv(index=False).encode()
    lines = "\n".join(json.dumps(row) for row in exported).encode()
    mapping = b"[map]\nN = 'params'\nD = \"tokens:millions\"\n[set]\nseq_len = 256\nlr = 1e-3\n"
    return [
        Kind("csv", (table.to_csv(index=False).encode(),), reader(".csv", None)),
        Kind("csv of W&B", (printed,), reader(".csv", WANDB)),
        Kind("jsonl of W&B", (lines,), reader(".jsonl", WANDB)),
        Kind("json", (json.dumps(exported).encode(),), reader(".json", WANDB)),
        Kind("jsonl", ("\n".join(json.dumps(row) for row in ROWS).encode(),), reader(".jsonl", None)),
        Kind("parquet", (parquet.getvalue(),), reader(".parquet", None)),
        Kind("text", FOREIGN_TEXTS, reader(".txt", None)),
        Kind("shapes of json", tuple(table.to_json(orient=o).encode() for o in ORIENTATIONS), reader(".json", None)),
        Kind("log", LOGS, reader(".log", {"N": "n_params", "D": "step:steps", "loss": "val_loss"})),
        Kind("chart", (CHART,), reader(".csv", {"N": "N", "D": "Step:steps", "loss": "val/loss"})),
        Kind("compressed", (gzip.compress(table.to_csv(index=False).encode(), mtime=0),), reader(".csv.gz", None)),
        Kind("mapping", (mapping,), lambda data, here: ignore(read_mapping(write_input(data, here / "x.toml")))),
    ]


# --- journals, and other files of a study that are read line by line --------------------------------------------------


def make_journal(folder: Path) -> list[Kind]:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    from hpo.search.search import Search
    from hpo.storage.trial_attributes import Stopped
    from proxies.growth.runs import read_rows
    from proxies.launch.arms import ArmResult
    from proxies.launch.plan import read_plan
    from scaling.tracking import sender, spool

    space: dict[str, Any] = {"lr": FloatDistribution(1e-4, 1e-1, log=True), "kind": CategoricalDistribution(["a", "b"])}

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def open_search(path: Path, worker: str) -> Search:
        return Search(
            space, tokens=(100, 900), sizes=(10.0, 20.0), iterations=1, sampler="random", storage=path, worker=worker
        )

    def read_search(data: bytes, here: Path) -> None:
        search = open_search(write_input(data, here / "study.journal"), "other")
        search.plan()
        ignore(search.progress, search.finished)
        if job := search.ask():
            search.tell(job, 1.0)

    rng, search = random.Random(0), open_search(folder / "study.journal", "me")
    for i in range(30):
        job = search.ask()
        if job is None:
            break
        if i % 9 == 4:
            search.stop(job, Stopped(50, 3.0, 2.9, 0.1))
        elif i % 9 != 8:
            search.tell(job, float("nan") if i % 7 == 6 else rng.random())
    search.extend(2700)
    whole = (folder / "study.journal").read_bytes()

    row = {"run": "abc", "tokens": 100, "loss": 2.5, "seconds": 1.0, "start": "scratch", "at": 20.0, "repeat": 0}
    head = {"study": "s", "name": "config-0001", "role": "proxy", "params": {"lr": "0.1"}, "commit": "abc", "at": 17}
    records = [
        {"at": 18, "step": 100, "metrics": {"loss": 2.5}},
        {"at": 19, "tags": {"rung_0/checkpoint": "x.pt"}},
        {"at": 20, "status": "FINISHED"},
    ]

    def read_records(data: bytes, here: Path) -> None:
        """A damaged record must not hold up those behind it, so this reader never refuses."""
        path = write_input(data, here / f"1{spool.SPOOL_SUFFIX}")
        if left := sender.send_spooled_records(here, "nowhere"):
            raise AssertionError(f"{left} records of {path.name} cannot be sent")

    vars(sender).update(make_mlflow())
    plan = {
        "study": "s",
        "command": "train --lr {lr} --tokens {tokens}",
        "values": {"lr": 0.1, "tokens": 100, "N": 1e6},
        "tokens": 100,
        "because": {"N": 1e6, "D": 100, "lr": 0.1, "loss": 2.0, "loss_interval": [1.9, 2.1], "mass": 0.9},
    }
    ended = {"loss": 2.0, "tokens": 100, "seconds": 3.0, "left": None}

    def read_ended(data: bytes, here: Path) -> None:
        write_input(data, here / "scratch.json")
        ArmResult.read(here, "scratch")

    def lines(*rows: dict[str, Any]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    return [
        Kind("journal", (whole, whole[: len(whole) // 2]), read_search),
        Kind(
            "ladders",
            (lines(row, row | {"tokens": 200, "loss": None}),),
            lambda data, here: ignore(read_rows(write_input(data, here / "ladders.jsonl"))),
        ),
        Kind("records", (lines(head, *records),), read_records),
        Kind(
            "plan",
            (json.dumps(plan).encode(),),
            lambda data, here: ignore(str(read_plan(write_input(data, here / "plan.json")))),
        ),
        Kind("ended", (json.dumps(ended).encode(),), read_ended),
    ]


def make_mlflow() -> dict[str, Any]:
    """Return functions that accept every record of the right kind, in place of those that the sender imports."""

    @contextmanager
    def fail_fast(_: float = 0.0) -> Iterator[None]:
        yield

    def log_records(_: Any, __: str, records: Any, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
        assert all(isinstance(v, int | float) for values, step, at in records for v in (step, at, *values.values()))
        assert all(isinstance(v, str) for v in (*tags.values(), *params.values()))

    def accept(*_: Any, **__: Any) -> str:
        return "x"

    return {
        "fail_fast": fail_fast,
        "log_records": log_records,
        "is_refusal": lambda _: False,
        "import_mlflow": accept,
        "_connect_once": accept,
        "connect": accept,
        "find_or_create_study_run": accept,
        "prepare_child_run": lambda *given, **_: ("x", given[4]),
        "set_run_status": accept,
        "delete_empty_duplicates": accept,
    }


# --- checkpoints ------------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> list[Kind]:
    import torch

    from proxies.config.proxy import ProxyConfig
    from proxies.growth.files import open_trained, read_grown, write_grown
    from proxies.training.checkpoints import HEADER, load_model, load_state, write_run, write_state
    from proxies.training.loop import train
    from proxies.training.shards import TABLE, compute_checksums

    shape: dict[str, Any] = {
        "n_layers": 1,
        "d_head": 4,
        "base_width": 4,
        "vocab": 256,
        "seq_len": 8,
        "ff_mult": 1,
        "eval_windows": 2,
        "batch_seqs": 2,
        "warmup_tokens": 8,
    }
    config = ProxyConfig(d_model=4, corpus=str(write_input(b"a few words " * 4000, folder / "corpus.txt")), **shape)
    for _point in train(config, 160, save=folder / "run.pt"):
        pass
    write_run(load_state(folder / "run.pt"), folder / "run")
    large = config.model_copy(update={"d_model": 8})
    write_grown(open_trained(folder / "run.pt"), large, folder / "grown.pt")

    def read(path: Path) -> None:
        """Read a checkpoint in every way that there is; the first refusal counts."""
        load_state(path)
        load_model(path)
        for which in ("annealed", "trunk"):
            trained = open_trained(path, which)  # type: ignore[arg-type]
            ignore([t.sum() for t in trained.weights.values()], [t.sum() for t in (trained.moments or {}).values()])
        points = train(config, 240, resume=path)
        next(points)
        points.close()

    def read_file(data: bytes, here: Path) -> None:
        read(write_input(data, here / "x.pt"))

    def extract_pickle(path: Path) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))

    def pack(data: bytes, like: Path, path: Path) -> Path:
        """Write the file `like` with this pickle in it and valid checksums."""
        # torch looks for tensors where its own writer puts them.
        writer = torch._C.PyTorchFileWriter(str(path))
        with zipfile.ZipFile(like) as archive:
            for name in archive.namelist():
                record, part = name.partition("/")[2], data if name.endswith("data.pkl") else archive.read(name)
                if record not in ("version", ".data/serialization_id"):
                    writer.write_record(record, part, len(part))
        writer.write_end_of_file()
        return path

    def read_grown_file(data: bytes, here: Path) -> None:
        start = read_grown(pack(data, folder / "grown.pt", here / "x.pt"), large)
        ignore([t.sum() for t in (start.weights or {}).values()])

    header = torch.load(folder / "run" / HEADER, weights_only=True)
    table = folder / "run" / header["data"] / TABLE
    tensors = next(path for path in table.parent.iterdir() if path != table)

    def make_part_reader(part: Path) -> Reader:
        """Return a reader of one part of a folder with valid checksums."""

        def read_part(data: bytes, here: Path) -> None:
            path = here / "x"
            shutil.copytree(folder / "run", path)
            if part.name == HEADER:
                pack(data, folder / "run" / HEADER, path / HEADER)
            else:
                changed = write_input(data, path / header["data"] / part.name)
                write_state(header | {"files": header["files"] | compute_checksums([changed])}, path / HEADER)
            read(path)

        return read_part

    return [
        Kind("file", ((folder / "run.pt").read_bytes(),), read_file),
        Kind(
            "pickle of a file",
            (extract_pickle(folder / "run.pt"),),
            lambda data, here: read(pack(data, folder / "run.pt", here / "x.pt")),
        ),
        Kind("pickle of a grown file", (extract_pickle(folder / "grown.pt"),), read_grown_file),
        Kind(
            "header of a folder", (extract_pickle(folder / "run" / HEADER),), make_part_reader(folder / "run" / HEADER)
        ),
        Kind("table of a folder", (table.read_bytes(),), make_part_reader(table)),
        Kind("tensors of a folder", (tensors.read_bytes(),), make_part_reader(tensors)),
    ]


warnings.simplefilter("ignore")

"""What docs/security.md promises.

No password is shown or recorded, no name becomes markup, and no file runs code or exposes more than it should.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import io
import json
import os
import pickle
import shlex
import sqlite3
import stat
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing
from html.parser import HTMLParser
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import URL
from typer.testing import CliRunner

from scaling.common.redact import find_secrets, redact_passwords

ROOT = Path(__file__).parents[1]
PACKAGES = ("scaling", "hpo", "proxies", "studies", "benchmarks")
# The password in every URL of these tests.
HUSH = "hush%40x"
mlflow_warns = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


# --- passwords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("http://127.0.0.1:5000/#/experiments?a=b", "http://127.0.0.1:5000/#/experiments?a=b"),
        ("postgresql://me@h/d", "postgresql://me@h/d"),
        (
            "postgresql+psycopg2://me:p@h:5432/d?sslmode=require",
            "postgresql+psycopg2://me:***@h:5432/d?sslmode=require",
        ),
        ("postgresql://me:p@s/w:rd@h/d", "postgresql://me:***@h/d"),
        ("postgresql://me@host:p@h/d", "postgresql://me@host:***@h/d"),
        ("mysql://:p@h/d", "mysql://:***@h/d"),
        ("postgresql://h/d?user=me&password=p&sslpassword=q", "postgresql://h/d?user=me&password=***&sslpassword=***"),
        ("postgresql://h/d?pass%77ord=p", "postgresql://h/d?pass%77ord=***"),
        ("https://ghp_1@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("http://me:p@h:1/api?token=t&page=2", "http://***@h:1/api?token=***&page=2"),
        ("host=h password='a b' user=me", "host=h password=*** user=me"),
        ("fetch a://u:p@h and b://u:q@h, please", "fetch a://u:***@h and b://u:***@h, please"),
        ("tokens=5 key=7 --eos-token=x", "tokens=5 key=7 --eos-token=x"),
    ],
)
def test_a_url_is_shown_without_its_credentials(text: str, shown: str) -> None:
    assert redact_passwords(text) == shown
    assert redact_passwords(shown) == shown


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(["postgresql+psycopg2", "mysql", "mssql+pyodbc"]),
    st.text("abcXYZ0_", min_size=1),
    st.text(min_size=1).filter(lambda p: p != "***" and not any(0xD800 <= ord(c) < 0xE000 for c in p)),
    st.sampled_from([None, 1, 5432]),
)
def test_a_password_of_any_characters_is_hidden_as_sqlalchemy_hides_it(
    driver: str, user: str, password: str, port: int | None
) -> None:
    url = URL.create(driver, user, password, "db.example.org", port, "runs", {"sslmode": "require"})
    assert redact_passwords(url.render_as_string(hide_password=False)) == url.render_as_string(hide_password=True)


def test_settings_that_are_credentials_are_named_and_no_others() -> None:
    table = {
        "trainer": {
            "tokenizer": "bpe",
            "environment": {"HF_TOKEN": "x", "TOKENIZERS_PARALLELISM": "0", "STORE": f"s3://a:{HUSH}@h"},
        },
        "list": [{"api_key": "y"}, {"eos_token": "</s>", "password": ""}],
        "tokens": {"min": 1},
    }
    assert [line.split(":")[0] for line in find_secrets(table)] == [
        "trainer.environment.HF_TOKEN",
        "trainer.environment.STORE",
        "list.0.api_key",
    ]


def test_a_study_or_plan_with_a_credential_is_refused_before_it_is_recorded(tmp_path: Path) -> None:
    from hpo.study.config import StudyError, load_study
    from proxies.launch.plan import read_plan

    text = (ROOT / "studies" / "external.toml").read_text()
    (tmp_path / "x.toml").write_text(
        text.replace("[target]", "[trainer.environment]\nWANDB_API_KEY = 'hush'\n[target]")
    )
    with pytest.raises(StudyError, match=r"trainer\.environment\.WANDB_API_KEY: is a credential") as refused:
        load_study(tmp_path / "x.toml")
    assert "hush" not in str(refused.value)
    plan = PLAN | {"environment": {"STORE": f"postgresql://me:{HUSH}@h/d"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"environment\.STORE: holds a password"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"environment": {}}))
    assert read_plan(tmp_path / "plan.json").command


PLAN: dict[str, Any] = {
    "study": "s",
    "command": "train --lr {lr} --tokens {tokens}",
    "values": {"lr": 0.1, "tokens": 100, "N": 1e6},
    "tokens": 100,
    "because": {"N": 1e6, "D": 100, "lr": 0.1, "loss": 2.0, "loss_interval": [1.9, 2.1], "mass": 0.9},
}


@mlflow_warns
@pytest.mark.parametrize("uri", [f"http://me:{HUSH}@127.0.0.1:1", f"foo://me:{HUSH}@127.0.0.1:1/d"])
@pytest.mark.parametrize(
    "words",
    [
        ("hpo", "launch", "studies/external.toml"),
        ("scaling", "fit", "external"),
        ("scaling", "recommend", "external", "--target"),
        ("scaling", "report", "external"),
        ("proxies", "launch", "studies/external.toml"),
    ],
    ids=" ".join,
)
def test_no_command_shows_the_password_of_a_store_that_fails(
    words: tuple[str, ...], uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow quotes such an address in full."""
    (tmp_path / "studies").mkdir()
    for name in ("external.toml", "external.py"):
        (tmp_path / "studies" / name).write_text((ROOT / "studies" / name).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    app = __import__(f"{words[0]}.__main__", fromlist=["app"]).app
    result = CliRunner().invoke(app, [*words[1:], "--tracking-uri", uri])
    assert result.exit_code in (1, 2)
    assert "127.0.0.1:1" in result.output
    assert "hush" not in result.output + "".join(traceback.format_exception(result.exception))
    assert "hush" not in "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())


def test_optuna_does_not_quote_the_password_of_a_storage() -> None:
    from hpo.storage.connect import open_storage

    for url in (
        f"foo://me:{HUSH}@h/d",
        f"postgresql://me:{HUSH}@127.0.0.1:1/d",
        f"postgresql://me:{HUSH}@h:port/d",
    ):
        with pytest.raises(Exception) as failed:  # noqa: PT011 - three libraries raise three errors
            open_storage(url, None)
        assert "hush" not in redact_passwords("".join(traceback.format_exception(failed.value))), url


@mlflow_warns
def test_the_records_hold_neither_addresses_nor_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the database nor the records that wait for it, in a repository whose remote has a token."""
    from scaling.tracking import recorder, sender
    from scaling.tracking.client import connect

    monkeypatch.chdir(tmp_path)
    for words in ("init -q", f"remote add origin https://{HUSH}@example.org/x.git"):
        subprocess.run(["git", *shlex.split(words)], check=True)
    monkeypatch.setenv("HF_TOKEN", HUSH)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for uri, folder in ((store, "sent"), (f"http://me:{HUSH}@127.0.0.1:1", "waiting")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with recorder.Recorder(None, "s", "run", role="proxy", params={"lr": 0.1}, folder=tmp_path / folder) as run:
            run.set_tag("note", "x")
            run.finish()
    assert "127.0.0.1" in (logged := capfd.readouterr().err)
    assert "hush" not in logged
    assert sender.send_spooled_records(tmp_path / "waiting", store) == 0
    connect(store)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
        assert "run" in (dumped := "\n".join(db.iterdump()))
    assert "hush" not in dumped
    assert not list((tmp_path / "waiting").glob("*.jsonl"))


def test_a_password_is_on_no_command_line(tmp_path: Path) -> None:
    """Every user of a machine can read the command lines of all processes."""
    from proxies.launch.arms import build_commands, format_commands
    from proxies.launch.plan import LaunchPlan

    plan, uri = LaunchPlan.model_validate(PLAN), f"postgresql://me:{HUSH}@h/d"
    (words,) = build_commands(plan, tmp_path / "plan.json", "scratch", uri=uri)
    assert "hush" not in shlex.join(words)
    text = format_commands(plan, tmp_path / "plan.json", ["scratch"], uri=uri)
    assert (
        text.splitlines()[0]
        == "# first, on each node, with its password: export MLFLOW_TRACKING_URI=postgresql://me:***@h/d"
    )
    assert "hush" not in text


# --- markup -----------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Collect the kinds of elements of a page, each with the names of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.kinds: dict[str, set[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.setdefault(tag, set()).update(name for name, _ in attrs)


NAMES = (
    "</text></svg><script>x</script>",
    "\"><img src=x onerror='y'>",
    "a & b &lt;b&gt; <!--",
    "$\\frac{<b>$ {{ 7 * 7 }}",
)


def test_no_name_becomes_an_element_of_a_report() -> None:
    """Whatever runs, studies, notes and arms are called, the page has the elements and attributes of a harmless one."""
    harmless, hostile = render_page(["name"] * len(NAMES)), render_page(NAMES)
    assert Elements(hostile).kinds == Elements(harmless).kinds
    assert not {"script", "img", "iframe", "object", "link", "a", "b"} & Elements(hostile).kinds.keys()
    assert len(hostile.split("<svg")) == len(harmless.split("<svg"))
    assert all(name in html.unescape(hostile) for name in NAMES)


def render_page(names: Sequence[str]) -> str:
    """Render a report in which everything that can have a name has one of these."""
    from scaling.advice.flags import Flag
    from scaling.advice.recommendation import recommend
    from scaling.curves.backtest import RunCurve
    from scaling.report.figures import TargetCurve
    from scaling.report.html import render_report
    from tests.test_scaling.test_report import plant_curves, plant_runs

    runs = plant_runs((1e4, 1e5), parametrization="mup", config="1", rung=0, checkpoint="x.pt")
    answer = recommend(runs, N=6e5, D=3e6)
    turns = cycle(names)
    for column in ("run_id", "name", "config", "checkpoint", "arm"):
        runs[column] = list(islice(turns, len(runs)))
        next(turns)
    runs.loc[:3, "excluded"] = names
    a, b, c, d = names
    flags = (*answer.flags, *(Flag(name, name, name == a) for name in names))
    more = {a: [b, {c: d}], b: a, c: {d: [a]}}
    answer = dataclasses.replace(answer, flags=flags, provenance=answer.provenance | more, next_run=more)
    lines = [
        RunCurve(f"{i} {name}", c.N, c.tokens, c.loss)
        for (i, c), name in zip(enumerate(plant_curves()), cycle(names), strict=False)
    ]
    targets = [TargetCurve(name, [1e5, 1e6], [3.0, 2.5], 3e6, 2.0) for name in names]
    return render_report(a, runs, recommendation=answer, targets=targets, warm_start=more, curves=lines)


# --- permissions ------------------------------------------------------------------------------------------------------

WRITE_FILES = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from optuna.distributions import FloatDistribution
from hpo.search.search import Search
from hpo.worker.results import write_result
from proxies.launch.arms import ArmResult
from proxies.training.checkpoints import FORMAT, write_run
from proxies.growth.runs import append_row
from proxies.launch.plan import LaunchPlan, write_plan
from proxies.data.token_files import cache_text
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_or_create_study_run
from scaling.tracking.log import log_file
from scaling.tracking.recorder import Recorder
import json, torch

here, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
store = f"sqlite:///{here}/mlflow.db"
space = {"lr": FloatDistribution(1e-3, 1.0)}
search = Search(space, tokens=(100, 900), sampler="random", storage=here / "study" / "study.journal")
search.tell(search.ask(), 1.0)
Search(space, tokens=(100, 900), sampler="random", storage=f"sqlite:///{here}/optuna.db").ask()
write_run({"format": FORMAT, "weights": {"a": torch.ones(3)}}, here / "run.pt")
write_run({"format": FORMAT, "weights": {"a": torch.ones(3)}}, here / "run")
write_plan(LaunchPlan.model_validate(plan), here / "target" / "plan.json")
ArmResult(2.0, 100, 1.0, None).write(here / "target", "scratch")
write_result(here / "result.json", 1.0)
append_row(here / "ladders.jsonl", {})
cache_text("key", ".txt", lambda: "text")
run = Recorder("http://127.0.0.1:1", "s", "run", role="proxy", params={}, folder=here / "records")
run.finish()
run.close()
client = connect(store)
parent = find_or_create_study_run(client, "s", artifacts=here / "artifacts")
log_file(client, parent, here / "result.json")
"""


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    """A private study stays private, and in a shared folder each member of the group can write what others made."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MUSCALE_CACHE": str(tmp_path / "cache"),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    words = [sys.executable, "-c", WRITE_FILES, str(tmp_path), json.dumps(PLAN)]
    done = subprocess.run(words, env=env, umask=umask, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [p for p in tmp_path.rglob("*") if not p.is_symlink()]
    names = {p.name for p in written}
    assert {
        "study.journal",
        "optuna.db",
        "mlflow.db",
        "run.pt",
        "header",
        ".metadata",
        "plan.json",
        "scratch.json",
        "ladders.jsonl",
        "key.txt",
    } <= names
    assert any(name.endswith(".spool.jsonl") for name in names)
    assert any("artifacts" in p.parts and p.name == "result.json" for p in written)
    rights = {str(p.relative_to(tmp_path)): stat.S_IMODE(p.stat().st_mode) for p in written}
    assert not {name for name, mode in rights.items() if mode & umask}
    # SQLite creates optuna.db, through Optuna, without the group's right to write.
    narrower = {name: oct(mode) for name, mode in rights.items() if mode | 0o111 != (0o777 & ~umask) | 0o111}
    assert narrower == ({"optuna.db": "0o644"} if umask == 0o002 else {})


# --- what is executed -------------------------------------------------------------------------------------------------


def test_a_trainer_is_named_before_its_module_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hpo.study.config import StudyError, load_study
    from scaling.common.logs import configure_logging

    configure_logging()
    (tmp_path / "loud_trainer.py").write_text(
        "import sys\nprint('imported', file=sys.stderr)\nraise RuntimeError('at import')\n"
    )
    text = (
        (ROOT / "studies" / "quickstart.toml")
        .read_text()
        .replace("[trainer]", '[trainer]\nuse = "loud_trainer:Trainer"')
    )
    (tmp_path / "x.toml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StudyError, match=r"trainer\.use: cannot import 'loud_trainer:Trainer' \(at import\)"):
        load_study(tmp_path / "x.toml")
    assert capsys.readouterr().err == "importing the trainer loud_trainer:Trainer\nimported\n"


def test_a_command_is_shown_in_full_with_its_folder_and_variables(tmp_path: Path) -> None:
    from proxies.trainers.command_family import CommandFamily
    from scaling.laws.compute import Fidelity

    family = CommandFamily(
        command="train --lr {lr} {tokens}", sizes=[{"N": 10}], cwd=tmp_path, environment={"LD_PRELOAD": "a b.so"}
    )
    shown = family.example({"lr": "1; rm x"}, Fidelity(10, 100))
    assert shown == f"cd {tmp_path} && env 'LD_PRELOAD=a b.so' train --lr '1; rm x' 100"


@pytest.mark.parametrize("field", ["{lr.__class__}", "{lr.__init__.__globals__}", "{lr[0]}", "{lr!r}", "{lr:>30}"])
def test_a_name_in_a_command_is_a_name_and_no_more(field: str) -> None:
    from proxies.trainers.command import resolve_command

    with pytest.raises(ValueError, match=r"a \{name\} and no more between braces"):
        resolve_command(f"train {field}", {"lr": 0.1})
    assert resolve_command("train '{\"a\": {lr}}' {a: 1}", {"lr": 0.1}) == ["train", '{"a": 0.1}', "{a:", "1}"]


def find_calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Return every call in a file with the name of what is called, as written."""
    tree = ast.parse(path.read_text())
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_only_the_restricted_readers_unpickle() -> None:
    wrong = []
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        for name, call in find_calls(path):
            options = {k.arg: ast.unparse(k.value) for k in call.keywords}
            end = name.split(".")[-1]
            bad = (
                (name in ("torch.load", "load_state_dict_from_url") and options.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False")
                or (
                    name.startswith(("pickle.", "marshal.", "joblib.", "dill.", "shelve."))
                    and end in ("load", "loads", "open", "Unpickler")
                )
                or name in ("eval", "exec", "pd.read_pickle", "yaml.load", "os.system", "os.popen")
                or options.get("shell", "False") != "False"
            )
            if bad:
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert wrong == []
    text = {
        str(p.relative_to(ROOT))
        for package in PACKAGES
        for p in (ROOT / package).rglob("*.py")
        if "Unpickler" in p.read_text()
    }
    assert text == {"proxies/training/shards.py"}


# --- run folders from an attacker who can compute checksums
# ------------------------------------------------------------


class FolderTrap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickle_text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


METADATA = pickle_text("torch.distributed.checkpoint.metadata") + pickle_text("Metadata") + b"\x93"
TRAPS = {
    "os.mkdir": pickle_text("posix") + pickle_text("mkdir") + b"\x93" + pickle_text("ran") + b"\x85R.",
    "builtins.eval": pickle_text("builtins") + pickle_text("eval") + b"\x93" + pickle_text("1") + b"\x85R.",
    "a module that torch has imported": pickle_text("torch.distributed.checkpoint.filesystem")
    + pickle_text("os.mkdir")
    + b"\x93"
    + pickle_text("ran")
    + b"\x85R.",
    "torch's own loader": pickle_text("torch") + pickle_text("load") + b"\x93" + pickle_text("x.pt") + b"\x85R.",
    "a writer": pickle_text("torch.distributed.checkpoint.filesystem")
    + pickle_text("FileSystemWriter")
    + b"\x93"
    + pickle_text("ran")
    + b"\x85R.",
    "a bytes entry": pickle_text("torch.distributed.checkpoint.metadata")
    + pickle_text("BytesStorageMetadata")
    + b"\x93)\x81.",
    "an attribute of a class": METADATA + b"N}" + pickle_text("planner_data") + b"K\x01s\x86b.",
    "an attribute of a function": pickle_text("torch.serialization")
    + pickle_text("_get_layout")
    + b"\x93}"
    + pickle_text("x")
    + b"K\x01sb.",
    "a persistent object": b"Pid\n.",
    "an extension": b"\x82\x01.",
    "a memo of 34 GB": b"Nr\xff\xff\xff\x7f.",
    "a bytearray of 2 EB": b"\x96" + b"\xff" * 7 + b"\x1f.",
    "nothing": b"N.",
    "a stack that is empty": b"R.",
    "a depth": b"]" * 50_000 + b"a" * 49_999 + b".",
}


@pytest.mark.parametrize("which", TRAPS)
def test_a_table_of_tensors_executes_nothing(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    from proxies.training.shards import TABLE, open_tensors

    monkeypatch.chdir(tmp_path)
    before = dict(vars(Metadata))
    (tmp_path / TABLE).write_bytes(b"\x80\x04" + TRAPS[which])
    with pytest.raises(ValueError, match=f"{tmp_path}, whose table is damaged"):
        open_tensors(tmp_path)
    assert dict(vars(Metadata)) == before
    assert [p.name for p in tmp_path.iterdir()] == [TABLE]


def test_a_tensor_that_a_table_calls_bytes_is_not_unpickled(tmp_path: Path) -> None:
    """torch reads such an entry with weights_only=False, whatever the caller asked for."""
    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    from proxies.training.checkpoints import FORMAT, HEADER, load_state, write_run, write_state
    from proxies.training.shards import TABLE, compute_checksums

    path = tmp_path / "run"
    write_run({"format": FORMAT, "trunk": {"c": torch.ones(3, 2)}}, path)
    header = torch.load(path / HEADER, weights_only=True)
    folder = path / header["data"]
    table: Any = pickle.loads((folder / TABLE).read_bytes())
    trap = io.BytesIO()
    torch.save(FolderTrap(tmp_path / "ran"), trap)
    (part,) = (p for p in folder.iterdir() if p.name != TABLE)
    part.write_bytes(trap.getvalue())
    (info,) = table.storage_data.values()
    info.offset, info.length = 0, len(trap.getvalue())
    table.state_dict_metadata = {"trunk/c": BytesStorageMetadata()}
    table.storage_data = {MetadataIndex("trunk/c"): info}
    (folder / TABLE).write_bytes(pickle.dumps(table))
    write_state(header | {"files": compute_checksums(folder.iterdir())}, path / HEADER)
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        load_state(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [{"data": "../other"}, {"data": ".."}, {"files": {"../x": (1, 2)}}, {"files": None}, {"run": 3}, {"data": None}],
)
def test_a_header_names_nothing_outside_its_folder(change: dict[str, Any], tmp_path: Path) -> None:
    import torch

    from proxies.training.checkpoints import FORMAT, HEADER, load_state, write_run, write_state

    path = tmp_path / "run"
    write_run({"format": FORMAT, "trunk": {"c": torch.ones(3, 2)}}, path)
    write_state(torch.load(path / HEADER, weights_only=True) | change, path / HEADER)
    with pytest.raises(ValueError, match=f"{path}, whose header is damaged"):
        load_state(path)


# --- names and paths --------------------------------------------------------------------------------------------------


@mlflow_warns
@pytest.mark.parametrize("name", ["/tmp/elsewhere", "../elsewhere", "a/b"])
def test_an_experiment_whose_name_is_a_path_is_not_written_to_that_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Databricks names experiments by paths, and anyone who can write to a shared store can."""
    from scaling.__main__ import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scaling.runs.io.load_runs", lambda *_, **__: None)
    result = CliRunner().invoke(app, ["report", name, "--tracking-uri", f"sqlite:///{tmp_path}/x.db"])
    assert result.exit_code == 2
    assert "is not the name of a folder in studies/: give --out" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_opened_is_bad_input(tmp_path: Path) -> None:
    from hpo.__main__ import app

    (tmp_path / "x.toml").mkdir()
    (tmp_path / "y.toml").write_bytes(b"\xff")
    for name, reason in (("x.toml", "no study file"), ("y.toml", "not TOML")):
        result = CliRunner().invoke(app, ["validate", str(tmp_path / name)])
        assert (result.exit_code, reason in result.output, str(tmp_path / name) in result.output) == (2, True, True)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), [("exp_avg", (0, 4)), ("exp_avg_sq", (2, 4)), ("step", (0,))])
def test_moments_of_another_shape_are_refused_before_torch_writes_out_of_bounds(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """torch's fused Adam does not check shapes: on CPU it crashes or writes to memory that it does not own."""
    import torch

    from proxies.config.proxy import ProxyConfig
    from proxies.training.checkpoints import load_state, write_state
    from proxies.training.loop import train

    (tmp_path / "corpus.txt").write_text("a few words " * 4000)
    small: dict[str, Any] = {
        "d_model": 4,
        "n_layers": 1,
        "d_head": 4,
        "base_width": 4,
        "seq_len": 8,
        "eval_windows": 2,
        "batch_seqs": 2,
        "warmup_tokens": 8,
    }
    config, path = ProxyConfig(corpus=str(tmp_path / "corpus.txt"), **small), tmp_path / "run.pt"
    for _ in train(config, 160, save=path):
        pass
    state = load_state(path)
    moments = state["trunk"]["optimizer"]["state"]
    which = next(i for i in moments if moments[i]["exp_avg"].shape == (4, 4))
    moments[which][name] = torch.zeros(shape)
    write_state(state, path)
    with pytest.raises(ValueError, match=rf"{path}, in which .*the optimizer's {name}: needed a tensor of shape"):
        next(train(config, 240, resume=path))

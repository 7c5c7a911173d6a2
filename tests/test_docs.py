"""The documentation is right: code blocks run or parse, links work, and the API reference has every public name."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hpo.__main__ import app

ROOT = Path(__file__).parent.parent
PACKAGES = ("hpo", "scaling", "proxies")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHELLS = ("sh", "bash", "console")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1``` *$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- *(run|not run)\b(?:: *(.*?))? *-->")
SMALL_STUDY = """
[search]
tokens = { min = 16_384, max = 49_152 }
[space]
lr = { low = 1e-3, high = 0.5, log = true }
batch_seqs = { low = 2, high = 8, log = true, type = "int" }
[trainer]
widths = [16, 32, 48]
seq_len = 64
warmup_tokens = 2048
eval_windows = 32
[target]
d_model = 64
tokens = 65_536
[workers]
count = 2
"""


@dataclass(frozen=True)
class FencedBlock:
    """A code block of a page, with the mark on the line before it."""

    page: Path
    # Number of the line that opens the block.
    line: int
    language: str
    text: str
    # "run", "not run" or nothing.
    mark: str
    reason: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> Iterator[FencedBlock]:
    text = page.read_text()
    lines = text.splitlines()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        mark = MARK.fullmatch(lines[line - 2].strip()) if line > 1 else None
        code = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        yield FencedBlock(page, line, match[2], code, mark[1] if mark else "", (mark[2] or "") if mark else "")


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def select(*languages: str, marks: tuple[str, ...] = ("", "run", "not run")) -> list[FencedBlock]:
    return [block for block in BLOCKS if block.language in languages and block.mark in marks]


def parametrize(blocks: list[FencedBlock]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", blocks, ids=[block.place for block in blocks])


# --- commands ---------------------------------------------------------------------------------------------------------


def read_commands(block: FencedBlock) -> Iterator[tuple[int, str]]:
    """Yield the commands of a shell block, each with its line number; in a console block the lines after a prompt."""
    lines = block.text.splitlines()
    if block.language == "console":
        lines = [line[2:] if line.startswith("$ ") else "" for line in lines]
    command, start = "", 0
    for number, line in enumerate(lines, block.line + 1):
        start = start if command else number
        command += line.removesuffix("\\")
        if not line.endswith("\\"):
            if command.strip():
                yield start, command
            command = ""


def split_command(command: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a line, without comments, redirections and assignments."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                words = words[1:]
            if words:
                yield words
            words = []
        else:
            words.append(word)


def complain_about_options(words: list[str], *, whole: bool) -> str:
    """Return what is wrong with a command of ours, or nothing.

    Args:
        words: The command, for example `["hpo", "best", "quickstart"]`.
        whole: Arguments must be complete and have values of the right type, as in a command that can be run.
    """
    package, *rest = words
    group: Any = get_command(import_module(f"{package}.__main__").app)
    if not rest or rest[0].startswith("-"):
        return "" if rest == ["--help"] or not whole else f"`{package}` needs a sub-command"
    name, *arguments = rest
    if name not in group.commands:
        return f"`{package}` has no sub-command {name!r}"
    command = group.commands[name]
    if whole and "--help" not in arguments:
        try:
            command.make_context(name, list(arguments))
        except Exception as error:
            return f"`{' '.join(words)}`: {getattr(error, 'message', error)}"
        return ""
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in arguments if word.startswith("-") and not word[1:2].isdigit()}
    unknown = sorted(given - known - {"--help", "-", "--"})
    return f"`{package} {name}` has no option {', '.join(unknown)}" if unknown else ""


def complain_about_command(words: list[str]) -> str:
    """Return what is wrong with a command in a block that is not marked, or nothing."""
    program, *arguments = words
    if program in PACKAGES:
        return complain_about_options(words, whole=True)
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = [word for word in arguments if word not in targets and "=" not in word]
        return f"the Makefile has no target {', '.join(unknown)}" if unknown else ""
    if program in ("python", "python3") and arguments:
        path = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        if not (ROOT / path).is_file():
            return f"there is no file {path}"
        source = (ROOT / path).read_text()
        unknown = [
            word for word in arguments[1:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source
        ]
        return f"{path} has no option {', '.join(unknown)}" if unknown else ""
    if program == "pytest":
        missing = [word for word in arguments if word.startswith("tests") and not (ROOT / word).exists()]
        return f"there is no {', '.join(missing)}" if missing else ""
    if program == "pip":
        extras = {name for word in arguments for list_ in re.findall(r"\[(.*)\]", word) for name in list_.split(",")}
        unknown = sorted(extras - PROJECT["project"]["optional-dependencies"].keys())
        return f"muscale has no extra {', '.join(unknown)}" if unknown else ""
    if program in ("export", "cd", ".", "source", "ruff", "mypy", "mkdocs", "pre-commit"):
        return ""
    return f"`{program}` is not checked by any test"


def complain_about_shell(block: FencedBlock) -> Iterator[str]:
    """Yield what is wrong with the commands of a block. Those of ours must parse even in a block that is not run."""
    for line, command in read_commands(block):
        for words in split_command(command):
            if block.mark == "":
                complaint = complain_about_command(words)
            else:
                # A launcher may stand in front, such as srun.
                start = next((i for i, word in enumerate(words) if word in PACKAGES), None)
                complaint = "" if start is None else complain_about_options(words[start:], whole=True)
            if complaint:
                yield f"{block.page.relative_to(ROOT)}:{line}: {complaint}"


def test_every_block_has_a_language_that_is_checked_and_every_mark_a_reason() -> None:
    checked = (*SHELLS, "python", "toml")
    complaints = []
    for block in BLOCKS:
        if block.mark == "not run" and not block.reason:
            complaints.append(f"{block.place}: `<!-- not run: REASON -->` needs a reason")
        if block.mark and block.language not in checked:
            complaints.append(f"{block.place}: only blocks of {', '.join(checked)} can be marked")
        if block.language == "" and re.match(rf"(\$ )?({'|'.join(PACKAGES)}) ", block.text):
            complaints.append(f"{block.place}: a block of commands needs a language: write ```sh")
    assert not complaints, "\n" + "\n".join(complaints)


def test_every_command_in_a_block_exists_with_its_options() -> None:
    complaints = [complaint for block in select(*SHELLS) for complaint in complain_about_shell(block)]
    assert not complaints, (
        "\n"
        + "\n".join(complaints)
        + "\nFix the command, or write <!-- not run: REASON --> on the line before its block."
    )


def test_every_command_in_running_text_exists_with_its_options() -> None:
    complaints = []
    for page in PAGES:
        text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())
        for match in re.finditer(r"`((?:hpo|scaling|proxies) [^`]*)`", text):
            words = match[1].split()
            if complaint := complain_about_options(words, whole=False):
                complaints.append(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {complaint}")
    assert not complaints, "\n" + "\n".join(complaints)


# --- studies ----------------------------------------------------------------------------------------------------------


def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {to_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


def complete_study(tables: dict[str, Any]) -> dict[str, Any]:
    """Return a whole study with these tables; studies/quickstart.toml supplies what is missing.

    A block with [space] and [trainer] is a study of its own, which lacks at most the search and the workers. Any other
    block is a fragment whose keys replace those of the quickstart.
    """
    base = tomllib.loads((ROOT / "studies" / "quickstart.toml").read_text())
    if {"space", "trainer"} <= tables.keys():
        return {name: base[name] for name in ("seed", "search", "workers")} | tables
    return base | {
        name: base.get(name, {}) | value if isinstance(value, dict) else value for name, value in tables.items()
    }


@parametrize(select("toml", marks=("", "run")))
def test_a_study_in_the_documentation_is_valid(
    block: FencedBlock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = complete_study(tomllib.loads(block.text))
    shutil.copytree(
        ROOT / "studies",
        tmp_path / "studies",
        ignore=lambda folder, _: [path.name for path in Path(folder).iterdir() if path.is_dir()],
    )
    (tmp_path / "studies" / "documented.toml").write_text(
        "\n".join(f"{json.dumps(name)} = {to_toml(value)}" for name, value in tables.items())
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["validate", "studies/documented.toml"])
    assert done.exit_code == 0, f"{block.place}:\n{done.output}\n{done.exception!r}"


@parametrize(select("toml", "python", marks=("not run",)))
def test_a_block_that_is_not_run_has_at_least_correct_syntax(block: FencedBlock) -> None:
    if block.language == "toml":
        tomllib.loads(block.text)
    else:
        ast.parse(block.text, filename=block.place)


# --- Python -----------------------------------------------------------------------------------------------------------


def run_python(page: Path, blocks: list[FencedBlock], folder: Path) -> None:
    """Run blocks in one namespace, as if they were one program in this folder, and report all failures at the end.

    They run in this process, because a new one would spend most of its time on imports. What a program sets for its
    whole process is set back.
    """
    namespace = {"__name__": "__main__"}
    failures = []
    verbosity = optuna.logging.get_verbosity()
    with (
        warnings.catch_warnings(action="default"),
        mock.patch.dict(os.environ, clean_environment(), clear=True),
        chdir(folder),
    ):
        for block in blocks:
            try:
                exec(compile("\n" * block.line + block.text, str(page.relative_to(ROOT)), "exec"), namespace)
            except Exception:
                failures.append(traceback.format_exc())
    optuna.logging.set_verbosity(verbosity)
    assert not failures, "\n".join(failures)


def clean_environment() -> dict[str, str]:
    """Return the environment without settings for MLflow and muscale, and with our commands first on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MUSCALE_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    return environment | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}


def pages_with(blocks: list[FencedBlock]) -> pytest.MarkDecorator:
    pages = sorted({block.page for block in blocks})
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


@pages_with(select("python", marks=("",)))
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """Blocks share a namespace, and run in an empty folder."""
    run_python(page, [block for block in select("python", marks=("",)) if block.page == page], tmp_path)


# --- blocks that are run beside a finished study ----------------------------------------------------------------------


def run_shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=600
    )


def write_sweep(path: Path) -> None:
    """Write the table of a planted sweep, as another program might: parameters, steps, batch in sequences of 2048."""
    rows = ["params,step,bs,lr,loss"]
    for N, steps, bs, shift in product((1e7, 3e7, 1e8, 3e8), (2000, 6000, 18_000), (8, 32, 128), (-2, -1, 0, 1, 2)):
        D = steps * bs * 2048
        best_lr, best_bs = 1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571 / 2048
        excess = 0.01 * shift**2 + 0.01 * math.log(bs / best_bs) ** 2
        loss = 1.69 + 406 / N**0.34 + 411 / D**0.28 + excess
        rows.append(f"{N:.0f},{steps},{bs},{best_lr * 2.0**shift:.6g},{loss:.5f}")
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sweep.csv and the small studies `quickstart` and `mine`, finished and with a recommendation.

    A study that no marked block names is left out.
    """
    folder = tmp_path_factory.mktemp("finished")
    write_sweep(folder / "sweep.csv")
    (folder / "studies").mkdir()
    marked = " ".join(block.text for block in select(*SHELLS, "python", marks=("run",)))
    for name in {"quickstart", "mine"} & set(re.findall(r"\w+", marked)):
        (folder / "studies" / f"{name}.toml").write_text(SMALL_STUDY)
        done = run_shell(f"hpo launch studies/{name}.toml", folder)
        assert done.returncode == 0, done.stderr
        done = run_shell(f"scaling recommend {name} --target", folder)
        assert done.returncode in (0, 3), done.stderr
    return folder


def is_new_launch(words: list[str]) -> bool:
    return words[:2] == ["hpo", "launch"] and "--dry-run" not in words


@pytest.mark.slow
@pages_with(select(*SHELLS, "python", marks=("run",)))
def test_the_marked_blocks_of_a_page_run_beside_a_finished_study(page: Path, finished: Path, tmp_path: Path) -> None:
    """Shell blocks run one after the other, then all Python of the page.

    Exit code 3 is accepted: a recommendation for so small a study may have doubts.
    """
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for block in [block for block in select(*SHELLS, marks=("run",)) if block.page == page]:
        script = []
        for line, command in read_commands(block):
            # A study that exists is not launched again, so it is removed first.
            for words in split_command(command):
                if is_new_launch(words):
                    script.append(f"hpo forget {Path(words[2]).stem} --yes >&2")
            failure = f'{{ echo "line {line}: exit code $code" >&2; exit 1; }}'
            script.append(f"{command}\ncode=$?; [ $code -eq 0 ] || [ $code -eq 3 ] || {failure}")
        done = run_shell("\n".join(script), folder)
        assert done.returncode == 0, f"{block.place}:\n{done.stderr}"
    if any(block.page == page for block in select("python", marks=("run",))):
        run_python(page, [block for block in select("python", marks=("", "run")) if block.page == page], folder)


# --- links and names --------------------------------------------------------------------------------------------------


def make_anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CHANGELOG.md", ROOT / "studies" / "LOG.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_link_to_a_file_of_the_repository_leads_there(page: Path) -> None:
    complaints = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            complaints.append(f"there is no file {link}")
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.MULTILINE)
            if anchor not in map(make_anchor, headings):
                complaints.append(f"there is no heading for {link}")
    assert not complaints, "\n".join(complaints)


def test_files_and_modules_that_the_text_names_exist() -> None:
    complaints = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"\b((?:hpo|scaling|proxies|tests|benchmarks|docs)/[\w/]+\.(?:py|md))\b", text):
            if not (ROOT / match[1]).exists():
                complaints.append(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[1]}")
        for match in re.finditer(r"`((?:hpo|scaling|proxies)(?:\.\w+)+)", text):
            if not is_name(match[1]):
                complaints.append(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[1]}")
        # Such as: `PARAMETERS` and `fit_form` in `scaling/fitting/forms.py`.
        for match in re.finditer(r"`(\w+)`(?:\s+and\s+`(\w+)`)?\s+in\s+`([\w/]+\.py)`", text):
            for name in filter(None, match.groups()[:2]):
                if not re.search(rf"^(?:def |class )?{name}\b", (ROOT / match[3]).read_text(), re.MULTILINE):
                    complaints.append(f"{page.relative_to(ROOT)}: {name} in {match[3]}")
    assert not complaints, "no such file or name:\n" + "\n".join(complaints)


def is_name(dotted: str) -> bool:
    """Whether a dotted name leads to a module, or to an attribute of one."""
    first, *rest = dotted.split(".")
    value: Any = import_module(first)
    path = first
    for part in rest:
        path = f"{path}.{part}"
        try:
            value = import_module(path) if not hasattr(value, part) else getattr(value, part)
        except ModuleNotFoundError:
            return False
    return True


@pytest.mark.parametrize("package", PACKAGES)
def test_the_api_reference_has_every_public_name(package: str) -> None:
    entries = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference" / f"{package}.md").read_text(), re.MULTILINE)
    public = {f"{package}.{name}" for name in import_module(package).__all__}
    assert public - set(entries) == set(), "add a line `::: NAME` for each"
    assert len(entries) == len(set(entries))
    assert [entry for entry in entries if not is_name(entry)] == []


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    # What is not released yet stands first.
    assert headings[headings[0] == "Unreleased"] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_fits_the_page() -> None:
    assert [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if len(line) > 120] == []

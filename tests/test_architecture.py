"""The structure of the packages: the order of imports, where big dependencies are imported, help of the commands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# Each subpackage may import those before it. A comma joins subpackages that may not import each other.
ORDER = {
    "scaling": (
        "common",
        "laws",
        "tracking",
        "fitting",
        "formats",
        "runs",
        "curves",
        "advice",
        "report",
        "cli",
        "__main__",
    ),
    "hpo": (
        "surrogate, storage",
        "samplers, planning",
        "search",
        "study",
        "worker",
        "launch",
        "confirm",
        "cli",
        "__main__",
    ),
    "proxies": (
        "config",
        "data, model",
        "training",
        "trainers, diagnostics",
        "growth",
        "launch",
        "cli",
        "__main__",
    ),
}
PACKAGES = tuple(ORDER)
LONGEST_MODULE = 450
MODULES_IN_A_SUBPACKAGE = 12
COMMANDS = {
    "hpo": ("plan", "validate", "launch", "resume", "extend", "worker", "status", "best", "forget", "confirm"),
    "scaling": ("import", "fit", "recommend", "report"),
    "proxies": ("check", "transfer", "train", "recipe", "grow", "launch", "autolrs"),
}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file, which tests only read."""
    return ast.parse(path.read_text())


@cache
def walk(path: Path) -> list[ast.AST]:
    return list(ast.walk(parse(path)))


@cache
def list_runtime_imports(path: Path) -> set[str]:
    """Return the first parts of the names that a file imports anywhere, except for type checking."""
    only_types = {
        inner
        for node in walk(path)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names = set[str]()
    for node in walk(path):
        if isinstance(node, ast.Import) and node not in only_types:
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node not in only_types:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@cache
def list_calls(path: Path) -> set[str]:
    """Return what a file calls, as it is written there."""
    return {ast.unparse(node.func) for node in walk(path) if isinstance(node, ast.Call)}


MODULES = {name_of(path): path for package in PACKAGES for path in files(package)}


@cache
def imports(path: Path, *, everywhere: bool) -> tuple[str, ...]:
    """Dotted names that a file imports: at module level, or anywhere, deferred and type-only imports included."""

    def visit(node: ast.AST) -> Iterator[str]:
        if not everywhere and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES or f"{inner}.__init__" in MODULES else node.module
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return tuple(visit(parse(path)))


def tops(path: Path, *, everywhere: bool) -> set[str]:
    return {name.split(".")[0] for name in imports(path, everywhere=everywhere)}


def internal() -> Iterator[tuple[str, str]]:
    """Each (module, module that it imports) within the three packages; a package's own __init__ only re-exports."""
    for module, path in MODULES.items():
        if module.count(".") == 1 and module.endswith("__init__"):
            continue
        for name in imports(path, everywhere=True):
            if name.split(".")[0] in PACKAGES:
                yield module, name


def position(module: str) -> tuple[int, str]:
    """Return the position of a module's subpackage in the order, and its name."""
    package, subpackage = module.split(".")[:2]
    return next(i for i, subpackages in enumerate(ORDER[package]) if subpackage in subpackages.split(", ")), subpackage


def test_packages_import_only_lower_packages() -> None:
    forbidden = {
        "scaling": {"hpo", "proxies", "torch", "optuna", "botorch", "gpytorch"},
        "hpo": {"proxies"},
        "proxies": {"hpo", "optuna"},
    }
    up = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, names in forbidden.items()
        for path in files(package)
        for name in tops(path, everywhere=package == "scaling") & names
    ]
    assert up == []


def test_subpackages_import_only_those_before_them() -> None:
    up = []
    for module, other in internal():
        if module.split(".")[0] != other.split(".")[0] or module.count(".") == 1:
            continue
        # `import scaling` names no subpackage: the public interface is for users, not for the packages themselves.
        if other.count(".") == 0:
            up.append(f"{module} imports the package {other}")
            continue
        (here, subpackage), (there, other_subpackage) = position(module), position(other)
        if other_subpackage != subpackage and there >= here:
            up.append(f"{module} imports {other}")
    assert up == []


# Modules that only re-export what scripts for version 0.1 import from them.
OLD_NAMES = {"scaling": {"compute.py"}}
# Subpackages that were modules then, and lend such a name.
OLD_MODULES = {"proxies/data"}


def test_every_folder_is_a_subpackage_in_the_order() -> None:
    for package, subpackages in ORDER.items():
        folders = {p.name for p in (ROOT / package).iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert folders == {subpackage for names in subpackages for subpackage in names.split(", ")} - {"__main__"}
        modules = {p.name for p in (ROOT / package).glob("*.py")} - OLD_NAMES.get(package, set())
        assert modules == {"__init__.py", "__main__.py"}


def test_no_circle_of_modules() -> None:
    """Deferred and type-only imports included: a circle that works today is one reordering from an ImportError."""
    graph: dict[str, set[str]] = {}
    for module, other in internal():
        graph.setdefault(module, set()).add(other)
    assert list(TopologicalSorter(graph).static_order())


def test_a_subpackage_has_one_paragraph_and_a_few_modules_of_a_readable_length() -> None:
    for package in PACKAGES:
        for subpackage in (p for p in (ROOT / package).iterdir() if p.is_dir() and p.name != "__pycache__"):
            paragraph, *more = parse(subpackage / "__init__.py").body
            assert not more or subpackage.relative_to(ROOT).as_posix() in OLD_MODULES
            assert isinstance(paragraph, ast.Expr), (
                f"{subpackage.name}/__init__.py holds its paragraph and nothing else"
            )
            assert isinstance(paragraph.value, ast.Constant)
            assert "\n\n" not in str(paragraph.value.value)
            assert len(list(subpackage.glob("*.py"))) - 1 <= MODULES_IN_A_SUBPACKAGE, subpackage
    long = {module: n for module, p in MODULES.items() if (n := len(p.read_text().splitlines())) > LONGEST_MODULE}
    assert long == {}


@pytest.mark.parametrize(
    ("dependency", "subpackages"),
    [
        ("mlflow", {"scaling.tracking"}),
        ("botorch", {"hpo.surrogate", "proxies.training"}),
        ("gpytorch", {"hpo.surrogate", "proxies.training"}),
    ],
)
def test_big_dependencies_are_imported_in_one_place(dependency: str, subpackages: set[str]) -> None:
    """Imports for type checking aside. AutoLRS in proxies.training has a Gaussian process of its own."""
    importers = set()
    for module, path in MODULES.items():
        if dependency in list_runtime_imports(path):
            importers.add(".".join(module.split(".")[:2]))
    assert importers == subpackages


def test_torch_is_imported_where_it_may_be() -> None:
    hpo = {
        module.split(".")[1]
        for module, p in MODULES.items()
        if "torch" in tops(p, everywhere=True) and "hpo." in module
    }
    assert hpo == {"surrogate"}
    config = [module for module in MODULES if module.startswith("proxies.config.")]
    assert len(config) > 1
    assert [m for m in config if "torch" in tops(MODULES[m], everywhere=True)] == []


@pytest.mark.parametrize("package", [*PACKAGES, "proxies.config.proxy"])
def test_importing_a_package_imports_no_heavy_library(package: str) -> None:
    heavy = ("torch", "optuna", "mlflow", "botorch")
    code = f"import sys, {package}; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_packages_are_built_and_each_has_its_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == [
        f"{p}*" for p in ("hpo", "scaling", "proxies")
    ]
    assert project["project"]["scripts"] == {p: f"{p}.__main__:app" for p in ("hpo", "scaling", "proxies")}


@pytest.mark.parametrize(("package", "command"), [(p, c) for p, names in COMMANDS.items() for c in names])
def test_every_command_has_help_that_ends_with_an_example(package: str, command: str) -> None:
    from typer.main import get_command

    module = __import__(f"{package}.__main__", fromlist=["app"])
    group: Any = get_command(module.app)
    assert command in group.commands, f"`{package} {command}` is documented but does not exist"
    text = group.commands[command].help or ""
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"Example: {package} {command}"), text


@pytest.mark.parametrize("package", PACKAGES)
def test_every_command_in_the_readme_exists(package: str) -> None:
    texts = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    said = {m for t in texts for m in re.findall(rf"`{package} ([a-z]+)", t.read_text())}
    assert said <= set(COMMANDS[package]), f"documented but unknown: {said - set(COMMANDS[package])}"


@pytest.mark.parametrize("package", PACKAGES)
def test_help_answers_without_the_heavy_libraries(package: str) -> None:
    heavy = ("torch", "mlflow", "botorch", "optuna", "pandas", "scipy")
    code = f"import sys, {package}.__main__; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there(package: str) -> None:
    module = __import__(package)
    for name in module.__all__:
        assert callable(getattr(module, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense


def test_no_subpackage_hides_a_public_function() -> None:
    """`import scaling.x` sets scaling.x, so a lazily imported function of that name would turn into a module."""
    for package in PACKAGES:
        subpackages = {p.name for p in (ROOT / package).iterdir() if p.is_dir()}
        assert subpackages.isdisjoint(__import__(package).__all__)


def test_a_class_name_has_one_meaning() -> None:
    homes: dict[str, list[str]] = {}
    for folder in (*PACKAGES, "tests", "benchmarks"):
        for path in files(folder):
            for node in walk(path):
                if isinstance(node, ast.ClassDef):
                    homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


@pytest.mark.parametrize(
    ("call", "homes"),
    [
        ("signal.signal", {"scaling.common.signals"}),
        ("difflib.get_close_matches", {"scaling.common.suggest"}),
        # A folder of shards is renamed as a whole when it is complete.
        ("os.replace", {"scaling.common.atomic", "proxies.training.checkpoints"}),
    ],
)
def test_what_is_shared_is_written_once(call: str, homes: set[str]) -> None:
    callers = {module for module, path in MODULES.items() if call in list_calls(path)}
    assert callers == homes


def test_libraries_log_and_only_commands_print() -> None:
    """Another program's output, which a trainer passes through, is not ours to log."""
    printing = {module for module, path in MODULES.items() if list_calls(path) & {"print", "say", "sys.stdout.write"}}
    commands = {module for module in printing if module.endswith("__main__") or ".cli." in module}
    assert printing - commands == {"scaling.common.cli", "proxies.trainers.command"}


def test_docs_and_text_files_have_short_lines() -> None:
    """Ruff checks the code. A link or a table of a page may not be wider either."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "studies" / "LOG.md"]
    pages += sorted((ROOT / "docs").rglob("*.md"))
    long = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []

"""The house itself: imports point down, doors are single, every documented command exists and has help with an example."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("hpo", "scaling", "proxies")
COMMANDS = {
    "hpo": ("validate", "launch", "resume", "extend", "worker", "status", "best", "forget", "confirm"),
    "scaling": ("import", "fit", "recommend", "report"),
    "proxies": ("check", "transfer", "train", "recipe", "grow", "launch", "autolrs"),
}


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Top-level names of the packages that a file imports: at module level, or anywhere in it (not for type checking)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_imports_only_point_down() -> None:
    forbidden = {
        "scaling": {"hpo", "proxies", "torch", "optuna", "botorch", "gpytorch"},
        "hpo": {"proxies"},
        "proxies": {"hpo", "optuna"},
    }
    up = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, names in forbidden.items()
        for path in files(package)
        for name in imports(path, everywhere=package == "scaling") & names
    ]
    assert up == []


def test_each_big_dependency_has_its_doors() -> None:
    doors = {
        "mlflow": {"scaling/tracking.py"},
        "botorch": {"hpo/surrogate.py", "hpo/neural.py", "proxies/stagewise.py"},
        "gpytorch": {"hpo/surrogate.py", "hpo/kernels.py", "hpo/neural.py", "proxies/stagewise.py"},
    }
    through = {
        name: {
            str(p.relative_to(ROOT))
            for package in PACKAGES
            for p in files(package)
            if name in imports(p, everywhere=True)
        }
        for name in doors
    }
    assert through == doors


def test_hpo_knows_torch_only_in_its_model() -> None:
    model = {"kernels.py", "surrogate.py", "neural.py", "acquisition.py"}
    assert {p.name for p in files("hpo") if "torch" in imports(p, everywhere=True)} == model


def test_the_packages_are_listed_by_name_and_each_has_its_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(PACKAGES)
    assert project["project"]["scripts"] == {p: f"{p}.__main__:app" for p in PACKAGES}


@pytest.mark.parametrize(("package", "command"), [(p, c) for p, names in COMMANDS.items() for c in names])
def test_every_command_has_help_that_ends_with_an_example(package: str, command: str) -> None:
    from typer.main import get_command

    module = __import__(f"{package}.__main__", fromlist=["app"])
    group = get_command(module.app)
    assert command in group.commands, f"`{package} {command}` is documented but does not exist"  # type: ignore[attr-defined]
    text = group.commands[command].help or ""  # type: ignore[attr-defined]
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


def test_no_module_hides_a_public_function() -> None:
    """`import scaling.x` sets scaling.x, so a lazily imported function of that name would turn into a module."""
    for package in PACKAGES:
        modules = {p.stem for p in files(package)}
        assert modules.isdisjoint(__import__(package).__all__)

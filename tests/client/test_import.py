"""What the package imports and what it promises to export."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import chestct

PACKAGE = Path(chestct.__file__).parent
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if "web" not in path.relative_to(PACKAGE).parts
)
ALLOWED = {"PIL", "chestct", "grpc", "numpy", "pydicom", "tritonclient"}
# Of the extras, for the functions that need them.
EXTRAS = {"highdicom", "pyarrow", "pynetdicom", "ray", "shtab", "uvicorn"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_roots(nodes: Iterable[ast.AST], path: Path) -> set[str]:
    roots = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            roots.add(str(node.module).split(".")[0])
    return roots


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_declared_dependencies_are_imported(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert imported_roots(tree.body, path) - sys.stdlib_module_names <= ALLOWED
    assert imported_roots(ast.walk(tree), path) - sys.stdlib_module_names <= ALLOWED | EXTRAS


def test_all_modules_are_looked_at() -> None:
    names = {module_name(path).split(".")[1] for path in MODULES if path.parent != PACKAGE}
    assert names == {"batch", "cli", "imaging", "inference", "pacs", "results"}


def in_order(names: list[str]) -> list[str]:
    """Constants, then classes, then functions, as ruff sorts `__all__`."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


@pytest.mark.parametrize(
    "path", [path for path in MODULES if "__all__" in path.read_text()], ids=module_name
)
def test_all_is_sorted_and_there(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    assert module.__all__ == in_order(module.__all__)
    assert all(hasattr(module, exported) for exported in module.__all__)


def test_package_exports_everything_that_it_names() -> None:
    public = set(chestct.__all__)
    assert all(getattr(chestct, name) is not None for name in public)
    assert set(dir(chestct)) >= public
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = chestct.nothing
    for module in ("client", "errors", "imaging.prepare", "inference.predictions"):
        assert set(importlib.import_module(f"chestct.{module}").__all__) <= public


def run_python(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_imports_nothing_else() -> None:
    run_python(
        "import logging, sys, warnings\n"
        "import chestct\n"
        "heavy = {'numpy', 'PIL', 'pydicom', 'tritonclient', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import numpy  # which has filters of its own\n"
        "filters = list(warnings.filters)\n"
        "import chestct.cli.__main__, chestct.client, chestct.pacs.reports, chestct.web.settings\n"
        "assert warnings.filters == filters\n"
        "changed = [name for name, each in logging.root.manager.loggerDict.items()\n"
        "           if isinstance(each, logging.Logger) and (each.level or each.handlers)]\n"
        "assert not changed, changed\n"
        "assert not logging.root.handlers\n"
    )


def test_import_is_light_and_silent() -> None:
    run_python(
        "import sys, chestct.cli.__main__\n"
        "heavy = {'tritonclient', 'grpc', 'gevent', 'pydicom'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )

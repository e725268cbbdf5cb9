"""What importing may cost: the brain never sees torch, clocks or I/O, and ``import foretell`` loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import foretell

PACKAGE = Path(foretell.__file__).parent
HEAVY = (
    "fastapi",
    "msgspec",
    "llguidance",
    "torch",
    "transformers",
    "tokenizers",
    "gguf",
    "safetensors",
    "huggingface_hub",
    "rich",
    "typer",
    "jinja2",
)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_foretell_loads_nothing_heavy() -> None:
    assert not loaded_by("import foretell") & {*HEAVY, "numpy"}


def test_the_load_generator_loads_neither_torch_nor_a_server() -> None:
    assert not loaded_by("import foretell.loadgen.command, foretell.loadgen.plot") & {"torch", "fastapi", "uvicorn"}


def test_the_planner_decides_without_torch() -> None:
    modules = [f"foretell.plan.{p.stem}" for p in (PACKAGE / "plan").glob("*.py") if p.stem != "__init__"]
    assert len(modules) >= 12
    assert not loaded_by(f"import {', '.join(modules)}") & {"torch", "fastapi", "uvicorn"}


def test_core_and_virtual_executor_import_neither_torch_nor_numpy() -> None:
    modules = [f"foretell.core.{p.stem}" for p in (PACKAGE / "core").glob("*.py") if p.stem != "__init__"]
    assert len(modules) >= 7
    statement = "import foretell.executor.virtual, foretell.executor.replay, " + ", ".join(modules)
    assert not loaded_by(statement) & {*HEAVY, "numpy"}


def test_the_core_knows_no_clock_and_no_io() -> None:
    forbidden = {
        "time",
        "datetime",
        "os",
        "io",
        "socket",
        "threading",
        "asyncio",
        "random",
        "pathlib",
        "torch",
        "numpy",
    }
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("open", "print", "input"), f"{path.name} does I/O"
            roots = {name.split(".")[0] for name in names}
            assert not roots & forbidden, f"{path.name} imports {roots & forbidden}"
            outside = {
                n for n in names if n.startswith("foretell.") and n.split(".")[1] not in ("core", "config", "errors")
            }
            assert outside <= {"foretell.executor.base"}, f"{path.name} imports {outside}"  # for types only


def test_public_names_exist() -> None:
    for name in foretell.__all__:
        assert getattr(foretell, name).__name__ == name


def test_nothing_unpickles_and_nothing_evaluates() -> None:
    """No pickle, no eval, no trust_remote_code anywhere in the package."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {n.split(".")[0] for n in names} & {"pickle", "marshal", "shelve", "dill"}, path
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                on_torch = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch"
                assert called not in ("eval", "exec"), path
                assert not (on_torch and called == "load"), path

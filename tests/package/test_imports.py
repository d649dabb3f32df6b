"""Who may know whom: imports inside the package, those within functions too, make no circle."""

import ast
import graphlib
from pathlib import Path

import quantops

ROOT = Path(quantops.__file__).parent


def _imports(path):
    """Modules of the package that a file imports, as "quantops.x"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                f"{node.module}.{a.name}" if _file(f"{node.module}.{a.name}") else node.module for a in node.names
            }
    return {name for name in found if name.split(".")[0] == "quantops"}


def _file(module):
    """The file of a module of the package, or None."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


def _modules():
    """{file: files it imports}"""
    files = [p for p in ROOT.rglob("*.py") if p.name != "__main__.py"]
    return {p: {_file(name) for name in _imports(p)} for p in files}


def test_no_module_imports_itself_by_a_detour():
    modules = _modules()
    assert len(modules) > 40
    graphlib.TopologicalSorter(modules).prepare()  # raises CycleError, which names the circle


def test_checks_know_no_op():
    allowed = ("quantops.checks", "quantops.layout", "quantops.reference")
    for path in (ROOT / "checks").glob("*.py"):
        strangers = [name for name in _imports(path) if not name.startswith(allowed)]
        assert not strangers, f"{path.name} imports {strangers}"


def test_libraries_of_integrations_are_imported_only_there():
    for path in ROOT.rglob("*.py"):
        if path.parent in (ROOT / "integrations", ROOT / "demo"):  # the demo has examples of their use
            continue
        found = [
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        ]
        libraries = {"transformers", "lightning", "pytorch_lightning", "peft", "accelerate", "tensorboard"}
        assert not [name for name in found if name.split(".")[0] in libraries or "quantops.integrations" in name], path

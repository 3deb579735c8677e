"""The package's shape: which module may import which, what an import costs, and that everything is described."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ksm
import ksm._core

PACKAGE = Path(ksm.__file__).parent
ROOT = Path(__file__).parents[1]
CORE_SOURCE = ROOT / "ksm" / "_core.pyx"  # not there when a wheel is tested

# A module imports only from the lines above its own; a package counts as one, and its modules import each other.
LAYERS = [
    {"errors", "constants", "units", "threads"},
    {"charts", "html"},  # know colours and tables, and nothing of what they show
    {"_core"},  # knows buffers of bytes, and nothing of who made them
    {"pages"},  # drives the hash that _core holds
    {"cost", "keyed", "stats"},
    {"sysfs"},
    {"check", "ksmd", "stepper", "vmas"},
    {"machine"},  # holds its ksmd
    {"sources", "linux"},
    {"census"},
    {"observe"},
    {"saved", "passes"},
    {"rules"},
    {"estimate", "advise", "trace", "tune", "exporter", "policies", "optin"},
    {"tuner"},
    {"simulation"},
    {"plan", "sweep"},
    {"patterns"},
    {"calibrate"},
    {"ksm"},  # the public names
    {"fleet"},
    {"report"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What these two may know, more strictly than the lines above.
ONLY = {"sources": {"errors", "pages"}, "machine": set(LEVEL) - {"sources", "linux"}}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """`ksm.sources.raw` belongs to `sources`; `ksm` itself is `ksm`."""
    return module.split(".")[1] if "." in module else module


def imported(path: Path) -> Iterator[str]:
    """The modules of ksm that a file imports, wherever in it, for types only too."""
    if path.suffix == ".pyx":
        yield from re.findall(r"^\s*from (ksm[\w.]*) import", path.read_text(), re.MULTILINE)
        return
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ksm")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    package.split(".")[: len(package.split(".")) - node.level + 1] + ([base] if base else [])
                )
            if base.split(".")[0] != "ksm":
                continue
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir() or alias.name == "_core"
                yield f"{base}.{alias.name}" if is_module else base


def test_every_module_has_its_place() -> None:
    assert {unit(module_name(path)) for path in python_files()} - set(LEVEL) == set()


def test_imports_go_one_way() -> None:
    wrong = []
    for path in [*python_files(), *([CORE_SOURCE] if CORE_SOURCE.exists() else [])]:
        here = "_core" if path == CORE_SOURCE else unit(module_name(path))
        for module in sorted(set(imported(path))):
            there = unit(module)
            allowed = there in ONLY.get(here, LEVEL) and LEVEL.get(there, len(LAYERS)) < LEVEL.get(here, 0)
            if there != here and not allowed:
                wrong.append(f"{path.name} ({here}) imports {module} ({there})")
    assert not wrong, "\n".join(wrong)


def test_kernels_know_only_each_other() -> None:
    for path in (PACKAGE / "_cy").glob("*.pxd"):
        known = re.findall(r"^from (\S+) cimport", path.read_text(), re.MULTILINE)
        assert all(name.startswith(("libc.", "ksm._cy.")) for name in known), (path.name, known)


def test_import_is_light(run_python: Callable[[str], str]) -> None:
    """`import ksm` brings numpy and the standard library, nothing else, and none of what only commands need."""
    script = (
        "import json, sys; before = set(sys.modules); import ksm; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    stdlib = set(json.loads(run_python("import json, sys; print(json.dumps(sorted(sys.stdlib_module_names)))")))
    loaded = json.loads(run_python(script))
    tops = {name.split(".")[0] for name in loaded}
    made_by_cython = {name for name in tops if name.startswith(("_cython_", "cython_runtime"))}
    assert tops - stdlib - made_by_cython <= {"ksm", "numpy"}
    assert not [
        name for name in loaded if name.startswith(("ksm.cli", "ksm.report", "ksm.fleet", "asyncio", "multiprocessing"))
    ]


def described(text: str | None) -> bool:
    first = (text or "").split("\n")[0]
    return 10 < len(first) <= 120 and first.rstrip("`").endswith((".", ":"))


def test_every_module_names_its_job() -> None:
    wrong = [path.name for path in python_files() if not described(ast.get_docstring(ast.parse(path.read_text())))]
    kernels = [*(PACKAGE / "_cy").glob("*.pxd"), *([CORE_SOURCE] if CORE_SOURCE.exists() else [])]
    for path in [*kernels, PACKAGE / "_core.pyi"]:
        if path.name == "__init__.pxd":
            continue
        found = re.match(r'(?:#.*\n)*"""(.*)', path.read_text())
        if not found or not described(found[1].split('"""')[0]):
            wrong.append(path.name)
    assert not wrong


def public_functions() -> Iterator[tuple[str, object]]:
    """The functions of every module of the library, and the public names that are functions or classes."""
    for path in python_files():
        name = module_name(path)
        if unit(name) in ("cli", "report") or path.name == "__main__.py":
            continue
        for key, value in vars(importlib.import_module(name)).items():
            if inspect.isfunction(value) and not key.startswith("_") and value.__module__ == name:
                yield f"{name}.{key}", value
    for key in public_names():
        value = getattr(ksm, key)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield f"ksm.{key}", value


def public_names() -> list[str]:
    return [name for name in getattr(ksm, "__all__", dir(ksm)) if not name.startswith("_")]


def test_public_functions_are_described_with_an_example() -> None:
    wrong = []
    for name, value in public_functions():
        text = inspect.getdoc(value) or ""
        if inspect.isclass(value):
            own = [member for key, member in vars(value).items() if not key.startswith("_")]
            text += "".join(
                inspect.getdoc(member) or "" for member in own if callable(member) or isinstance(member, property)
            )
        if not described(inspect.getdoc(value)):
            wrong.append(f"{name}: no docstring, or its first line is no sentence")
        elif ">>>" not in text:
            wrong.append(f"{name}: no example")
    assert not wrong, "\n".join(wrong)


def test_public_methods_are_described() -> None:
    wrong = []
    for name in public_names():
        value = getattr(ksm, name)
        if not inspect.isclass(value) or not value.__module__.startswith("ksm"):
            continue
        for key, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(function) and not described(inspect.getdoc(function)):
                wrong.append(f"ksm.{name}.{key}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", public_names())
def test_public_names_are_tested(name: str) -> None:
    if isinstance(getattr(ksm, name), ModuleType | int | str):
        return  # constants and modules are named, not tested one by one
    used = re.compile(rf"\b{name}\b")
    files = [path for path in Path(__file__).parent.rglob("*.py") if path.name != Path(__file__).name]
    assert any(used.search(path.read_text()) for path in files), f"no test mentions ksm.{name}"


# ---- the stub of the extension -----------------------------------------------------------------


def parameters(node: ast.FunctionDef) -> list[tuple[str, bool]]:
    """(name, has a default) of a stub's function, without self."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    first_default = len(arguments) - len(node.args.defaults)
    found = [(a.arg, i >= first_default) for i, a in enumerate(arguments)]
    found += [(a.arg, d is not None) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return [pair for pair in found if pair[0] != "self"]


def compare(where: str, body: list[ast.stmt], real: object, wrong: list[str]) -> None:
    stubbed = set()
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            stubbed.add(node.target.id)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            stubbed.add(node.name)
        else:
            continue
        name = node.target.id if isinstance(node, ast.AnnAssign) else node.name
        if not hasattr(real, name):
            wrong.append(f"{where}.{name} is in the stub only")
            continue
        value = getattr(real, name)
        if isinstance(node, ast.ClassDef):
            compare(f"{where}.{name}", node.body, value, wrong)
        elif isinstance(node, ast.FunctionDef) and inspect.isroutine(value) and name != "__init__":
            signature = inspect.signature(value)
            there = [(p.name, p.default is not p.empty) for p in signature.parameters.values() if p.name != "self"]
            if there != parameters(node):
                wrong.append(f"{where}.{name}: stub {parameters(node)}, module {there}")
    for name, value in vars(real).items():
        foreign = inspect.ismodule(value) or getattr(value, "__module__", None) not in ("ksm._core", None)
        if not name.startswith("_") and name not in stubbed and not foreign:
            wrong.append(f"{where}.{name} is not in the stub")


def test_stub_and_extension_agree() -> None:
    wrong: list[str] = []
    compare("_core", ast.parse((PACKAGE / "_core.pyi").read_text()).body, ksm._core, wrong)
    assert not wrong, "\n".join(wrong)

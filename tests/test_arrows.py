"""Who may import whom, who may read the environment, and how long a file and a function may be."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("sparsefx", "passes", "codegen")
EVERYTHING = (*PRODUCT, "tests", "examples", "benchmarks")

# sparsefx/ is the language, passes/ and codegen/ are written in it; api/ joins them.
JOINS = {
    *(str(p.relative_to(ROOT)) for p in (ROOT / "sparsefx/api").glob("*.py")),
    "sparsefx/cli.py",
}
TOUCHES_ENVIRONMENT = {
    "sparsefx/debug.py",  # the one reader
    "codegen/triton/aot_worker.py",  # a process of its own: sets TRITON_INTERPRET for Triton
}
# A foreign package ships its weights only as .pth; an example, never the product, reads them with
# torch's restricted unpickler (weights_only=True), which makes tensors and runs no code.
RESTRICTED = {"examples/real_models.py"}
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

FILE_LINES = 400
FUNCTION_LINES = 60


@dataclass(frozen=True)
class Use:
    """A dotted name that a file imports or spells, and where."""

    name: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}"

    def within(self, package: str) -> bool:
        return self.name == package or self.name.startswith(f"{package}.")


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), filename=file)


def files(*folders: str) -> list[str]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def imports_of(tree: ast.Module, file: str) -> Iterator[Use]:
    """Every imported name, in any scope: `from a import b` counts as `a` and as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Use(alias.name, file, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield Use(module, file, node.lineno)
            yield from (Use(f"{module}.{alias.name}", file, node.lineno) for alias in node.names)


def attributes_of(tree: ast.Module, file: str) -> Iterator[Use]:
    """Every dotted name that is spelled out, such as `torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield Use(ast.unparse(node), file, node.lineno)


def uses_of(file: str) -> list[Use]:
    tree = parse(file)
    return [*imports_of(tree, file), *attributes_of(tree, file)]


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A @triton.jit function: one kernel, one function, however long."""
    return any("triton.jit" in ast.unparse(mark) for mark in function.decorator_list)


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last statement, the docstring not counted."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def listed(offences: list[Use]) -> str:
    return "\n".join(map(str, offences))


def test_walks_the_real_tree() -> None:
    """The other tests are worth nothing if they look at no files."""
    assert {"sparsefx/spec.py", "passes/__init__.py", "codegen/__init__.py"} <= set(files(*PRODUCT))


@pytest.mark.parametrize(
    ("folder", "other"),
    [("passes", "sparsefx.codegen"), ("codegen", "sparsefx.passes")],
)
def test_passes_and_codegen_do_not_know_each_other(folder: str, other: str) -> None:
    offences = [use for file in files(folder) for use in uses_of(file) if use.within(other)]
    assert not offences, listed(offences)


def test_only_the_api_joins_the_language_with_passes_and_codegen() -> None:
    offences = [
        use
        for file in files("sparsefx")
        if file not in JOINS
        for use in uses_of(file)
        if use.within("sparsefx.passes") or use.within("sparsefx.codegen")
    ]
    assert not offences, listed(offences)


def test_passes_and_codegen_do_not_reach_up_to_the_api() -> None:
    upward = ("sparsefx.api", "sparsefx.cli")
    offences = [
        use
        for file in files("passes", "codegen")
        for use in imports_of(parse(file), file)
        if any(use.within(module) for module in upward)
    ]
    assert not offences, listed(offences)


def test_the_root_folders_are_imported_by_their_package_name() -> None:
    """`import passes` works from the repository root only, and makes every class twice."""
    offences = [
        use
        for file in files(*EVERYTHING)
        for use in imports_of(parse(file), file)
        if use.within("passes") or use.within("codegen")
    ]
    assert not offences, listed(offences)


def test_no_relative_imports() -> None:
    offences = [
        use
        for file in files(*EVERYTHING)
        for use in imports_of(parse(file), file)
        if use.name.startswith(".")
    ]
    assert not offences, listed(offences)


def test_debug_alone_reads_the_environment() -> None:
    forbidden = ("os.environ", "os.getenv", "os.environb")
    offences = [
        use
        for file in files(*PRODUCT)
        if file not in TOUCHES_ENVIRONMENT
        for use in uses_of(file)
        if any(use.within(name) for name in forbidden)
    ]
    assert not offences, listed(offences)


def test_nothing_is_unpickled() -> None:
    names = UNPICKLES | {"torch.load", "torch.package.PackageImporter"}
    offences = [
        use
        for file in files(*EVERYTHING)
        for use in uses_of(file)
        if any(use.within(name) for name in names)
        and not (file in RESTRICTED and use.name == "torch.load")
    ]
    assert not offences, listed(offences)


@pytest.mark.parametrize("file", sorted(RESTRICTED))
def test_restricted_unpickling_is_restricted(file: str) -> None:
    calls = [
        node
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    uses = [use for use in uses_of(file) if use.within("torch.load")]
    assert len(calls) == len(uses) == 1, listed(uses)
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in calls[0].keywords]
    assert file not in files(*PRODUCT)


@pytest.mark.parametrize("file", files(*EVERYTHING))
def test_sizes(file: str) -> None:
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= FILE_LINES, f"{file} has {lines} lines, more than {FILE_LINES}: split it"
    long = [
        f"{file}:{function.lineno}: {function.name} has {length(function)} lines"
        for function in functions_of(parse(file))
        if length(function) > FUNCTION_LINES and not is_kernel(function)
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("file", files(*PRODUCT))
def test_modules_say_what_they_are(file: str) -> None:
    tree = parse(file)
    assert ast.get_docstring(tree) or not tree.body, f"{file} has no docstring"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import sparsefx.codegen.cpp as c", "sparsefx.codegen"),
        ("from sparsefx import codegen", "sparsefx.codegen"),
        ("def f():\n    from sparsefx.codegen import cpp", "sparsefx.codegen"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("from os import environ", "os.environ"),
        ("from torch import load", "torch.load"),
    ],
)
def test_the_walk_sees_every_spelling(text: str, name: str) -> None:
    tree = ast.parse(text)
    found = [*imports_of(tree, "example"), *attributes_of(tree, "example")]
    assert any(use.within(name) for use in found), listed(found)

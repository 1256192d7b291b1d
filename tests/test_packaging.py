"""The wheel, built from the tree and from the sdist, installs and works in a clean environment."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGES = {"sparsefx": "sparsefx", "passes": "sparsefx/passes", "codegen": "sparsefx/codegen"}

PROBE = """
import importlib, json, torch
names = ("sparsefx", "sparsefx.passes", "sparsefx.codegen")
files = {name: importlib.import_module(name).__file__ for name in names}
print(json.dumps({"files": files, "backends": torch._dynamo.list_backends()}))
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shipped_files() -> set[str]:
    """Where every source and data file of the tree must lie inside the installed package."""
    return {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree: setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    # Without --wheel, `build` makes the sdist and then the wheel from the sdist alone.
    forms = ["--wheel"] if request.param == "tree" else []
    shutil.rmtree(source / "build", ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", *forms, "--outdir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and this one's other packages behind it on the path."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    offline = ("--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel)
    # A folder named by a .pth is searched, but its own .pth files (the editable install) are not.
    (site_packages(folder) / "behind.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def test_every_file_is_shipped(clean: Path) -> None:
    missing = {name for name in shipped_files() if not (site_packages(clean) / name).is_file()}
    assert not missing, (
        f"not in the wheel: {sorted(missing)}; list the package in [tool.setuptools] packages, "
        "or the file in [tool.setuptools.package-data]"
    )
    assert "sparsefx/py.typed" in shipped_files()


def test_nothing_else_is_shipped(clean: Path) -> None:
    folder = site_packages(clean)
    installed = {
        str(path.relative_to(folder))
        for path in (folder / "sparsefx").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert installed == shipped_files()


def test_imports_and_torch_backend(clean: Path) -> None:
    seen = json.loads(run(clean / "bin" / "python", "-I", "-c", PROBE))
    folder = site_packages(clean)
    assert seen["files"] == {
        "sparsefx": str(folder / "sparsefx/__init__.py"),
        "sparsefx.passes": str(folder / "sparsefx/passes/__init__.py"),
        "sparsefx.codegen": str(folder / "sparsefx/codegen/__init__.py"),
    }
    assert "sparsefx" in seen["backends"]


def test_shell_command(clean: Path) -> None:
    text = run(clean / "bin" / "sparsefx", "--help")
    assert all(command in text for command in ("explain", "sparsify", "export", "bench"))


def test_metadata(clean: Path) -> None:
    (info,) = site_packages(clean).glob("sparsefx-*.dist-info")
    metadata = importlib.metadata.Distribution.at(info).metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_pins_satisfy_the_requirements() -> None:
    """constraints/runtime.txt pins every runtime dependency, inside the range it declares."""
    pins = {}
    for line in (ROOT / "constraints/runtime.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition(";")[0].partition("==")
            pins[name] = version.strip()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert pins[requirement.name] in requirement.specifier, text

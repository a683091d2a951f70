"""The package as it is installed: what is in it, what importing it costs, and that nobody tests the checkout by mistake."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import ckptstore

ROOT = Path(__file__).parent.parent

HEAVY = ["asyncio", "awscrt", "boto3", "botocore", "fsspec", "numpy", "torch", "tqdm"]

MAY_IMPORT_TORCH = {
    "capture",
    "hostcopy",
    "hostmemory",
    "integrations",
    "loading",
    "mapped",
    "ondevice",
    "overlap",
    "plaintensor",
    "rebuild",
    "rng",
    "sampler",
    "still",
    "torchfile",
    "torchload",
    "unpicklable",
}
"""Modules of ckptstore that import torch when they are imported; all others work without."""


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter that imports the same ckptstore, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert run_python(f"import sys, ckptstore; print(sorted(set({HEAVY}) & set(sys.modules)))") == "[]\n"


def test_only_the_torch_modules_import_torch() -> None:
    modules = [m.name for m in pkgutil.walk_packages(ckptstore.__path__, "ckptstore.") if not m.name.endswith("__main__")]
    assert "ckptstore.backends.local" in modules
    without = [name for name in modules if name.split(".")[1] not in MAY_IMPORT_TORCH]
    code = f"""
import sys
from importlib import import_module
for name in {without}:
    import_module(name)
    if "torch" in sys.modules:
        sys.exit(name + " imports torch")
"""
    run_python(code)


def test_a_backend_whose_package_is_missing_says_what_to_install() -> None:
    code = """
import sys
sys.modules["botocore"] = None
from ckptstore import Store
try:
    Store("s3://bucket/run")
except ValueError as exc:
    print(exc)
"""
    said = run_python(code)
    assert "pip install 'ckptstore[s3]'" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ckptstore.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ckptstore, name) is not None
    assert name in dir(ckptstore)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ckptstore' has no attribute 'Shop'"):
        ckptstore.Shop  # type: ignore[attr-defined]  # noqa: B018


def test_the_backends_folder_is_no_package_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", "import backends"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "ckptstore.backends" in done.stderr


def test_no_library_file_grows_far_beyond_400_lines() -> None:
    files = [p for folder in ("ckptstore", "backends") for p in (ROOT / folder).rglob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert "backends/local.py" in lengths
    assert {path: n for path, n in lengths.items() if n > 450} == {}


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "ckptstore", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verify" in done.stdout


@pytest.mark.skipif("CKPTSTORE_INSTALLED" not in os.environ, reason="about an installed wheel: set by tox")
class TestInstalled:
    def test_the_wheel_is_what_is_tested(self) -> None:
        assert "site-packages" in Path(ckptstore.__file__).parts
        assert metadata.version("ckptstore") == ckptstore.__version__

    def test_the_wheel_holds_the_library_and_nothing_else(self) -> None:
        files = {str(f) for f in metadata.files("ckptstore") or ()}
        info = f"ckptstore-{ckptstore.__version__}.dist-info"
        assert {f.split("/")[0] for f in files if not f.startswith("..")} == {"ckptstore", info}  # "..": the command
        assert {"ckptstore/py.typed", f"{info}/licenses/LICENSE"} <= files
        modules = {str(p.relative_to(ROOT)) for p in (*ROOT.glob("ckptstore/**/*.py"), *ROOT.glob("ckptstore/backends/*.py"))}
        assert "ckptstore/backends/local.py" in modules
        assert {f for f in files if f.endswith(".py")} == modules

"""Both ways to make fingerprints: by numpy, and by compiled code, as installed or built for the tests."""

import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from checkpoint.format import compiled, summing
from checkpoint.format.fingerprint import Summing

SOURCE = Path(compiled.__file__).with_name("_fingerprint.c")
WAYS = ("numpy", "compiled code")


def summing_by(way: str) -> Summing:
    """Return one of the ways; skip the test where this machine cannot have compiled code."""
    return summing if way == "numpy" else _compiled()


def build(source: str, *flags: str) -> Path:
    """Compile a library; skip the test without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = Path(tempfile.mkdtemp(prefix="holdfast-compiled-"))
    (folder / "sums.c").write_text(source, encoding="utf-8")
    library = folder / "sums.so"
    plain = [compiler, "-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags]
    subprocess.run([*plain, folder / "sums.c", "-o", library], check=True)
    return library


@cache
def _compiled() -> Summing:
    if sys.byteorder != "little":
        pytest.skip("compiled code is for little-endian machines")
    found = compiled.find_compiled() or compiled.load_compiled(str(build(SOURCE.read_text("utf-8"))))
    assert found is not None, "the compiled code gives other sums than numpy"
    return found

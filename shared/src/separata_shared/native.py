"""Compiles C++ kernels on first use, with torch's extension loader.

A kernel file holds ``extern "C"`` functions of pointers, sizes and strides and includes no header
of torch, so it compiles in seconds. Libraries are kept beside torch's own extensions; the name of
one holds a hash of everything that it depends on.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

# OpenMP's library is the one that torch has loaded, so threads are shared. Apple's compiler has no
# OpenMP; there the kernels use one core.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", *OPENMP]


class UnavailableError(RuntimeError):
    """Why a kernel cannot be compiled or loaded here."""


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """Load the library of a C++ file, compiled the first time.

    Args:
        source: The file.

    Raises:
        UnavailableError: There is no compiler, or it fails; the message says what to do.
    """
    library = library_path(source)
    try:
        if not library.exists():
            build(source)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UnavailableError(
            f"{library} cannot be loaded ({error}); delete it to compile it again"
        ) from None


def library_path(source: Path) -> Path:
    """Where the library of a C++ file is kept."""
    extension = _extension_loader()
    headers = [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]
    parts = (source.read_bytes(), *headers, *FLAGS, torch.__version__, platform.machine())
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    name = f"separata_{source.parent.name}_{digest}.so"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or extension.get_default_build_root()
    return Path(root) / "separata" / name


def build(source: Path) -> Path:
    """Compile a C++ file and return its library.

    Each build has a folder of its own and ends with a rename: several processes may build at the
    same time, and one that is killed leaves no lock behind.

    Raises:
        UnavailableError: There is no compiler, or it fails.
    """
    library = library_path(source)
    extension = _extension_loader()
    print(f"separata: compiling {source.parent.name}/{source.name}, once", file=sys.stderr)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder, _own_tools_first():
            extension.load(
                library.stem,
                [str(source)],
                extra_cflags=FLAGS,
                extra_ldflags=OPENMP,
                build_directory=folder,
                is_python_module=False,
            )
            (Path(folder) / f"{library.stem}.so").replace(library)
    except (RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "error: " in line), lines[0])
        raise UnavailableError(
            f"{source.name} could not be compiled ({reason}); it needs a C++ compiler and ninja"
        ) from None
    return library


@contextlib.contextmanager
def _own_tools_first() -> Iterator[None]:
    """Ninja may be installed beside this Python, whose folder need not be on the path."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _extension_loader() -> ModuleType:
    """Import the extension loader, which takes a second, so only where it is needed."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise UnavailableError(f"torch's extension loader cannot be imported: {error}") from None
    return cpp_extension

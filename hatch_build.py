"""The build hook that compiles the C kernels, `src/zotune/noise/native.c`, into the package.

Each width of vectors is a shared library of its own, and the package loads the widest that the processor has, so one
wheel serves any processor of an architecture. Where no C compiler works, the wheel has no library, is a wheel for any
platform, and torch operations do the work of the kernels.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src", "zotune", "noise", "native.c")

# No fused multiply-add and no fast-math: each would change bits. Nobody reads errno or traps.
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=default")
# The kernels take their threads from the OpenMP runtime that torch has loaded; a compiler without OpenMP makes kernels
# of one thread.
THREADS = (("-fopenmp",), ())
_AVX2 = ("-mavx2", "-mf16c", "-mfma", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
# The instructions of each width, as torch requires them for kernels of its own (`torch.backends.cpu`).
WIDTHS: dict[str, tuple[str, ...]] = {"baseline": (), "avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)}


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled kernels to a wheel; in an editable installation they lie beside their source."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what the wheel holds and which platform it is for."""
        source, editable = Path(self.root) / SOURCE, version == "editable"
        self._aside = Path(tempfile.mkdtemp(prefix="zotune-native-"))
        libraries = compile_kernels(source, self._aside)
        if editable:
            for old in source.parent.glob("native-*.so"):
                old.unlink()
        if not libraries:
            self.app.display_warning("zotune: no working C compiler; torch operations will replace the C kernels")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(libraries)}"
        for library in libraries:
            if editable:
                shutil.move(library, source.parent / library.name)
            else:
                build_data["force_include"][str(library)] = str(Path("zotune", "noise", library.name))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled aside."""
        shutil.rmtree(self._aside, ignore_errors=True)


def compile_kernels(source: Path, folder: Path, widths: Iterable[str] = WIDTHS) -> list[Path]:
    """Compile the kernels for widths of vectors into a folder; the libraries, none without a C compiler.

    A library is named by a hash of its source and by its width: `native-5f2a60b2c3d1-avx2.so`. `CC` names the compiler.
    """
    command = compiler()
    if command is None or not sys.platform.startswith("linux"):
        return []
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    if platform.machine() not in ("x86_64", "AMD64"):
        widths = ("baseline",)

    def compiled(width: str) -> Path | None:
        library = folder / f"native-{digest}-{width}.so"
        commands = ([*command, *FLAGS, *WIDTHS[width], *threads] for threads in THREADS)
        return library if any(_compiles(each, source, library) for each in commands) else None

    with ThreadPoolExecutor() as pool:
        return [library for library in pool.map(compiled, widths) if library is not None]


def compiler() -> list[str] | None:
    """The words of `CC`, else the first compiler on the PATH."""
    for command in filter(None, (os.environ.get("CC"), *(() if os.environ.get("CC") else ("cc", "gcc", "clang")))):
        words = shlex.split(command)
        if words and shutil.which(words[0]) is not None:
            return words
    return None


def _compiles(command: list[str], source: Path, library: Path) -> bool:
    """Compile and link one library; whether that worked.

    It is linked with no OpenMP runtime: the functions of GCC's are found in the one that torch loaded, whatever its
    file is called. With a second runtime two pools of threads would compete for the processors. Only clang's runtime,
    which torch does not bring, is linked.
    """
    made = library.with_suffix(".o")
    try:
        subprocess.run([*command, "-c", str(source), "-o", str(made)], capture_output=True, check=True, timeout=300)
        clang = ["-fopenmp"] if b"__kmpc_" in made.read_bytes() else []
        linking = [command[0], "-shared", str(made), "-o", str(library), *clang]
        subprocess.run(linking, capture_output=True, check=True, timeout=300)
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        made.unlink(missing_ok=True)
    return library.is_file()


def platform_tag(libraries: list[Path]) -> str:
    """The platform of a wheel with these libraries, by the newest version of glibc whose functions they call (PEP 600).

    Without any (another C library) or with a runtime beyond those that PEP 600 allows, the tag says Linux alone.
    """
    machine, text = platform.machine(), b"".join(library.read_bytes() for library in libraries)
    versions = [tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", text)]
    if not versions or b"libomp" in text:
        return f"linux_{machine}"
    major, minor = max(*versions, (2, 17))
    return f"manylinux_{major}_{minor}_{machine}"

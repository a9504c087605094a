"""Makes the lock: exact versions of everything that `make quickstart` and `make test` install, with every hash.

    make lock

It needs uv and packaging, and reads pyproject.toml. It resolves for Linux and macOS and every supported Python at once,
always to the newest versions that the ranges allow, and writes beside itself:

- `llm.txt`: what `make quickstart` installs, and the build backend, without torch;
- `dev.txt`: the same packages and those of `make test`;
- `oldest.txt`: the lower end of every range, for `make test-oldest`; what the ranges leave open is newest there too;
- `uv.txt`: uv, which installs `llm.txt` and `dev.txt`;
- `torch-cuda.txt`: torch's build of PyPI and the NVIDIA libraries that it asks for;
- `torch-cpu.txt`: torch's CPU build, whose hashes come from PyTorch's own index. Where that index cannot be reached,
  the file stays as it is as long as it holds the version asked for.
"""

import html
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from pathlib import Path

from packaging.requirements import Requirement

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"
TORCH = "torch==2.13.0"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"

# pip skips a requirement whose marker is false without a word, so the Makefile refuses every other Python.
MACHINES = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
ENVIRONMENTS = [
    f"sys_platform == '{system}' and platform_machine == '{machine}' and python_version < '3.15'"
    for system, machine in MACHINES
]

# The first and the last version of each Python, on each machine.
PLACES = [
    {
        "sys_platform": system,
        "platform_machine": machine,
        "python_full_version": f"{python}.{patch}",
        "python_version": python,
    }
    for system, machine in MACHINES
    for python in PYTHONS
    for patch in (0, 99)
]

OF_CUDA = re.compile(r"torch|triton|(nvidia|cuda)-[a-z0-9-]+")
TAGS = "|".join(f"cp{python.replace('.', '')}" for python in PYTHONS)
WHEEL = re.compile(
    rf"torch-{re.escape(TORCH.removeprefix('torch=='))}(\+cpu)?"
    rf"-({TAGS})-\2-(manylinux_2_28_(x86_64|aarch64)|macosx_\w+_arm64)\.whl"
)


def main() -> None:
    """Writes the six files."""
    project = tomllib.loads(PROJECT.read_text())
    # hatchling itself asks for editables when it installs a source tree in place.
    build = [*project["build-system"]["requires"], "editables>=0.5"]

    dev = resolve(["llm", "dev"], [TORCH, *build, "uv"], "--generate-hashes")
    llm_names = {name_of(entry) for entry in resolve(["llm"], [TORCH, *build], constraints=dev)}
    oldest = resolve(["llm", "dev"], build, "--resolution=lowest-direct")

    cuda = [entry for entry in dev if OF_CUDA.fullmatch(name_of(entry))]
    rest = [entry for entry in dev if not OF_CUDA.fullmatch(name_of(entry)) and name_of(entry) != "uv"]
    # The tests run the CUDA kernels in Triton's interpreter, so they need Triton without a GPU too.
    triton = [entry for entry in dev if name_of(entry) == "triton"]

    write("llm.txt", "What `make quickstart` installs besides torch.", [e for e in rest if name_of(e) in llm_names])
    write("dev.txt", "What `make test` installs besides torch.", sorted(rest + triton, key=name_of))
    write("uv.txt", "The installer of the files beside it.", [entry for entry in dev if name_of(entry) == "uv"])
    write("torch-cuda.txt", "torch for NVIDIA GPUs, and what it needs there.", cuda)
    write(
        "oldest.txt",
        "The lower end of every range of pyproject.toml, for `make test-oldest`; torch is the Makefile's.",
        [e for e in oldest if not OF_CUDA.fullmatch(name_of(e)) or name_of(e) == "triton"],
    )
    write_cpu_build()
    print(f"{len({name_of(entry) for entry in dev})} packages are locked.")


def resolve(extras: list[str], also: list[str], *options: str, constraints: list[str] | None = None) -> list[str]:
    """The project with some extras and further requirements, resolved: one entry for each package and version."""
    with tempfile.TemporaryDirectory() as folder:
        project, fixed, asked = (Path(folder, name) for name in ("pyproject.toml", "constraints.txt", "asked.in"))
        project.write_text(f"{PROJECT.read_text()}\n[tool.uv]\nenvironments = {ENVIRONMENTS}\n")
        fixed.write_text("\n".join(constraints or []))
        asked.write_text("\n".join(also))
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0], "--no-header"]
        command += ["--no-annotate", "--only-binary=:all:", "--constraints", str(fixed), *options]
        command += [word for extra in extras for word in ("--extra", extra)]
        command += [str(project), str(asked)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=folder)
    if done.returncode:
        sys.exit("The ranges of pyproject.toml cannot be resolved; uv says above which of them exclude each other.")
    entries = re.split(r"\n(?=\S)", done.stdout.strip("\n"))
    return [shortened(entry) for entry in entries if "==" in entry]


def shortened(entry: str) -> str:
    """An entry without its marker if that holds wherever the lock does."""
    pin, _, hashes = entry.partition(" \\\n")
    marker = Requirement(pin).marker
    if marker and all(marker.evaluate(place) for place in PLACES):
        pin = pin.split(" ;")[0]
    return f"{pin} \\\n{hashes}" if hashes else pin


def name_of(entry: str) -> str:
    """A package's name out of its entry."""
    return entry.split("==")[0]


def write(name: str, purpose: str, entries: list[str]) -> None:
    """A file of the lock."""
    head = f"# {purpose}\n# Made by `make lock` out of pyproject.toml; do not edit.\n--only-binary :all:\n"
    (FOLDER / name).write_text(head + "".join(f"{entry}\n" for entry in entries))


def write_cpu_build() -> None:
    """`torch-cpu.txt` from PyTorch's index; the file at hand serves where the index cannot be reached."""
    path = FOLDER / "torch-cpu.txt"
    try:
        with urllib.request.urlopen(CPU_INDEX, timeout=20) as page:
            hashes = hashes_of_wheels(page.read().decode())
    except OSError as error:
        if not path.exists() or TORCH not in path.read_text().split():
            sys.exit(f"{path.name} needs the hashes of {TORCH} out of {CPU_INDEX}, which cannot be reached: {error}")
        print(f"{CPU_INDEX} cannot be reached ({error}); {path.name} already holds {TORCH} and stays as it is.")
        return
    lines = " \\\n".join([TORCH, *(f"    --hash=sha256:{digest}" for digest in sorted(hashes))])
    write(path.name, "torch without CUDA: the CPU build of PyTorch's index on Linux, PyPI's on macOS.", [lines])


def hashes_of_wheels(page: str) -> set[str]:
    """The digests of the supported wheels on a page of PyTorch's index.

    Linux's are builds for the CPU (`+cpu`), macOS's have no such mark. Each has to be there.
    """
    links = re.findall(r'href="([^"#]*/)?([^"#/]+\.whl)#sha256=([0-9a-f]{64})"', page)
    found = {html.unescape(name).replace("%2B", "+"): digest for _, name, digest in links}
    wheels = {
        name: digest
        for name, digest in found.items()
        if (match := WHEEL.fullmatch(name)) and bool(match[1]) == ("linux" in name)
    }
    if len(wheels) != 3 * len(PYTHONS):
        sys.exit(f"{CPU_INDEX} has to list {3 * len(PYTHONS)} wheels of {TORCH}; these were found: {sorted(wheels)}")
    return set(wheels.values())


if __name__ == "__main__":
    main()

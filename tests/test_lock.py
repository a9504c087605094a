"""The lock and the ranges of pyproject.toml say the same, and nothing can be installed that the lock does not name."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = PROJECT["project"]["optional-dependencies"]

PLACES = [
    {
        "sys_platform": system,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.9",
        "extra": "",
    }
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in ("3.11", "3.12", "3.13", "3.14")
]
FILES = ["llm.txt", "dev.txt", "uv.txt", "torch-cpu.txt", "torch-cuda.txt"]


def entries(name):
    """The requirements of a file of the lock, each with the hashes that stand with it."""
    text = (LOCK / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "--only-binary"))]
    return [(Requirement(line.split(" --hash")[0].strip()), re.findall(r"--hash=(\S+)", line)) for line in lines]


def installed(names, place):
    """The versions that files of the lock install at a place: a list for each package."""
    found = {}
    for requirement, _ in [entry for name in names for entry in entries(name)]:
        if requirement.marker is None or requirement.marker.evaluate(place):
            (specifier,) = requirement.specifier
            found.setdefault(canonicalize_name(requirement.name), set()).add(specifier.version)
    return found


def declared(extras):
    """The requirements of the project and of extras, with those that extras of its own stand for."""
    requirements = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, EXTRAS[extra]):
            own = canonicalize_name(requirement.name) == "zotune"
            requirements += declared(sorted(requirement.extras)) if own else [requirement]
    return requirements


def unmet(requirements, names, place):
    found = installed(names, place)
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate(place)]
    return [
        f"{requirement}: {found.get(canonicalize_name(requirement.name))}"
        for requirement in wanted
        if not any(requirement.specifier.contains(v) for v in found.get(canonicalize_name(requirement.name), []))
    ]


@pytest.mark.parametrize("build", ["cpu", "cuda"])
@pytest.mark.parametrize(("name", "extras"), [("llm.txt", ["llm"]), ("dev.txt", ["llm", "dev"])])
def test_the_lock_meets_every_range_on_every_supported_python_and_machine(name, extras, build):
    wanted = declared(extras) + [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    for place in PLACES:
        assert not unmet(wanted, [name, f"torch-{build}.txt"], place), place


def test_one_version_of_a_package_is_installed_at_a_place():
    for place in PLACES:
        for build in ("cpu", "cuda"):
            found = installed(["llm.txt", "dev.txt", f"torch-{build}.txt"], place)
            assert not {package: versions for package, versions in found.items() if len(versions) > 1}


@pytest.mark.parametrize("name", FILES)
def test_every_package_of_the_lock_is_exact_and_has_hashes(name):
    found = entries(name)
    assert found
    for requirement, hashes in found:
        assert [s.operator for s in requirement.specifier] == ["=="]
        assert "*" not in str(requirement.specifier)
        assert not requirement.url
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes)
        assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("name", [*FILES, "oldest.txt"])
def test_the_lock_has_no_numba_and_no_source_distribution(name):
    assert not {"numba", "llvmlite"} & {canonicalize_name(requirement.name) for requirement, _ in entries(name)}
    assert "--only-binary :all:" in (LOCK / name).read_text().splitlines()


def test_quickstart_installs_a_part_of_what_the_tests_install():
    for place in PLACES:
        few, many = installed(["llm.txt"], place), installed(["dev.txt"], place)
        assert few.items() <= many.items()


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges():
    place = PLACES[0]
    found = installed(["oldest.txt"], place)
    torch = re.search(r"^OLDEST_TORCH := torch==(\S+)\.\*$", MAKEFILE, re.MULTILINE)[1]
    wanted = {canonicalize_name(r.name): r for r in declared(["llm", "dev"])}
    assert str(wanted.pop("torch").specifier) == f">={torch}"
    for name, requirement in wanted.items():
        if requirement.marker is None or requirement.marker.evaluate(place):
            (version,) = found[name]
            assert requirement.specifier.contains(version)
            lower = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
            # A range may begin at "6.0" where only "6.0.1" can be had.
            assert all(version == low or version.startswith(f"{low}.") for low in lower), f"{requirement}: {version}"


def test_the_makefile_installs_from_the_lock_alone():
    locked = re.search(r"^LOCKED := (.*)$", MAKEFILE, re.MULTILINE)[1]
    assert "--require-hashes --no-deps" in locked
    editable = re.search(r"^EDITABLE := (.*)$", MAKEFILE, re.MULTILINE)[1]
    assert "--no-deps --no-build-isolation" in editable
    for stamp in ("torch", "llm", "dev"):
        recipe = re.search(rf"^\$\(VENV\)/{stamp}: .*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
        installs = [line for line in recipe.splitlines() if "$(BIN)/" in line]
        assert installs
        assert all(re.match(r"\t\$\(BIN\)/\$\((LOCKED|LOCKED_TORCH|EDITABLE)\)", line) for line in installs)

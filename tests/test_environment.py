"""The extras in pyproject.toml, constraints.txt and environment.yml describe one environment."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

CHECKOUT = Path(__file__).parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
REQUIREMENTS = {
    f"{group}: {line}": Requirement(line)
    for group, lines in {"core": PROJECT["dependencies"], **EXTRAS}.items()
    for line in lines
}
LINES = [
    line
    for line in (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PINS = {canonicalize_name(name): version for name, _, version in (s.partition("==") for s in LINES)}
# What every environment brings in a version of its own.
INSTALLERS = {"pip", "wheel"}
# What the Makefile installs besides the extras, without what it asks for.
ALONE = re.findall(
    r"pip install .*--no-deps ([a-z0-9 -]+)$",
    (CHECKOUT / "Makefile").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)


def installed() -> dict[str, metadata.Distribution]:
    return {canonicalize_name(d.name): d for d in metadata.distributions()}


def needs(distribution: metadata.Distribution, extras: set[str]) -> list[Requirement]:
    """The requirements of a distribution that apply to this Python and platform."""
    requirements = [Requirement(line) for line in distribution.requires or []]
    return [
        r
        for r in requirements
        if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras | {""})
    ]


def test_every_constraint_is_one_exact_public_version() -> None:
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line
    assert len(PINS) == len(LINES), "a package is pinned twice"
    assert not INSTALLERS & PINS.keys() and "sam-lab" not in PINS
    assert not [name for name in PINS if name.startswith(("nvidia", "triton"))]


@pytest.mark.parametrize("requirement", REQUIREMENTS.values(), ids=REQUIREMENTS.keys())
def test_every_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin, prereleases=True)


@pytest.mark.parametrize("requirement", REQUIREMENTS.values(), ids=REQUIREMENTS.keys())
def test_bounds_are_lower_bounds(requirement: Requirement) -> None:
    operators = sorted(s.operator for s in requirement.specifier)
    # Jupyter Book 2 reads neither _config.yml nor _toc.yml.
    assert operators == (["<", ">="] if requirement.name == "jupyter-book" else [">="])


def test_the_pins_are_complete_and_agree_with_each_other() -> None:
    """All that the requirements need in their turn is pinned, at a version that satisfies."""
    found = installed()
    todo = [(r.name, frozenset(r.extras), "pyproject.toml") for r in REQUIREMENTS.values()]
    seen: set[tuple[str, frozenset[str], str]] = set()
    walked = 0
    while todo:
        item = todo.pop()
        name, extras, parent = canonicalize_name(item[0]), item[1], item[2]
        if item in seen or name in INSTALLERS:
            continue
        seen.add(item)
        assert name in PINS, f"{parent} needs {name}, which constraints.txt does not pin"
        if name not in found:
            continue
        walked += 1
        for r in needs(found[name], set(extras)):
            key = canonicalize_name(r.name)
            if key in PINS:
                assert r.specifier.contains(PINS[key], prereleases=True), (
                    f"{name} needs {r}, and constraints.txt pins {PINS[key]}"
                )
            todo.append((r.name, frozenset(r.extras), name))
    assert walked > len(REQUIREMENTS) / 2


def test_what_is_installed_alone_finds_all_it_needs_but_what_nothing_else_agrees_with() -> None:
    """Only for the version of requests is torchattacks not in an extra, as other packages are."""
    assert ALONE == ["torchattacks"]
    assert not {r.name for r in REQUIREMENTS.values()} & set(ALONE)
    distribution = installed().get("torchattacks")
    if distribution is None:
        pytest.skip("torchattacks is not installed")
    refused = [
        r.name
        for r in needs(distribution, set())
        if not r.specifier.contains(PINS[canonicalize_name(r.name)], prereleases=True)
    ]
    assert refused == ["requests"]


def test_installed_versions_are_the_pinned_ones() -> None:
    """Local labels such as the +cpu of a CPU build of torch are the same release."""
    got = {name: Version(d.version).public for name, d in installed().items() if name in PINS}
    assert {"torch", "numpy", "pytest"} <= got.keys()
    assert got == {name: PINS[name] for name in got}


def test_the_installed_package_is_this_checkout() -> None:
    import sam_lab

    assert Path(sam_lab.__file__).parent == CHECKOUT / "sam_lab"
    assert metadata.version("sam-lab") == sam_lab.__version__


def test_conda_builds_the_same_environment() -> None:
    conda = yaml.safe_load((CHECKOUT / "environment.yml").read_text(encoding="utf-8"))
    *packages, pip = conda["dependencies"]
    assert [re.split(r"[<>=]", p)[0] for p in packages] == ["python", "pip"]
    python = SpecifierSet(packages[0].removeprefix("python"))
    supported = {c.rsplit(" ", 1)[-1] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    minors = {f"3.{minor}" for minor in range(30)}
    assert {m for m in minors if python.contains(m)} == supported
    assert min(supported, key=Version) == PROJECT["requires-python"].removeprefix(">=")
    constraints, package = pip["pip"]
    assert constraints == "-c constraints.txt" and (CHECKOUT / "constraints.txt").is_file()
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", package)
    assert extras and extras[1].split(",") == ["book", "test"] and {"book", "test"} <= EXTRAS.keys()

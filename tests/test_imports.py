"""The house's floors: a module imports from its own floor and those below it, and never in a circle. And what is
imported from elsewhere is declared.
"""

import ast
import configparser
import re
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top down. A name is a package or a module; on one line, each imports only what stands to its right.
FLOORS = (
    ("sweep",),
    ("train", "evaluate", "sample", "prepare", "show_init", "export", "import_hf", "api"),
    ("analysis", "plan", "hf", "inference"),
    ("training",),
    ("report",),
    ("run",),
    ("config_file", "command", "validation"),
    ("model",),
    ("data",),
    ("parallel",),
    ("resolution", "config", "durable", "console", "paths", "errors"),
)
RANK = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "spannorm_jax").rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Modules of this package that a module imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports by a relative name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES and name not in ("spannorm_jax", module)}


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "spannorm_jax"])
def test_imports_go_down(module):
    assert room(module) in RANK, f"{module} stands on no floor: give it one"
    up = {name for name in imports_of(module) if room(name) != room(module) and RANK[room(name)] < RANK[room(module)]}
    assert not up, f"{module} imports what stands above it: {sorted(up)}"


def test_imports_go_in_no_circle():
    TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()


def test_every_room_is_on_a_floor_and_every_floor_has_its_rooms():
    assert {room(module) for module in MODULES if module != "spannorm_jax"} == set(RANK)


def declared(*extras: str) -> set[str]:
    """Distributions that setup.cfg asks for, with these extras."""
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = [package["options"]["install_requires"], *(package["options.extras_require"][extra] for extra in extras)]
    return {_plain(name) for text in listed for name in re.findall(r"^[\w-]+", text, re.MULTILINE)}


def foreign(folder: str) -> set[str]:
    """Names of packages that the Python files of a folder import, which are neither Python's nor of this repository."""
    paths = list((ROOT / folder).rglob("*.py"))
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    own = {"spannorm_jax", "experiments", "configs", "_typeshed"} | {path.stem for path in paths}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - own


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


DISTRIBUTIONS = packages_distributions()


def of(name: str) -> set[str]:
    """Distributions that may hold a package."""
    return {_plain(distribution) for distribution in DISTRIBUTIONS.get(name, [name])}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("spannorm_jax", ["eval"]),
        ("configs", []),
        ("experiments", []),
        ("tests", ["test", "test-buckets", "eval", "hf"]),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    assert {name for name in foreign(folder) if not of(name) & declared(*extras)} == set()


def test_what_the_library_declares_it_imports():
    """But for what tensorflow-datasets imports without declaring it."""
    assert declared() - set.union(*map(of, foreign("spannorm_jax"))) == {"importlib-resources"}

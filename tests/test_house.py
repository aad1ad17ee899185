"""The house: imports run downwards, and nowhere in a circle.

A room is a folder or a module of `hcp_jax`. Imports are read from the source, those inside functions
and under TYPE_CHECKING included. What is still wrong is listed by name, with what will mend it; a
line that is no longer true must be deleted.
"""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import hcp_jax

ROOT = pathlib.Path(hcp_jax.__file__).parent

# From the top of the house to the ground. Rooms on one line may import each other, in no circle.
FLOORS = [
    ["cli"],
    ["commands"],
    ["verify", "support", "program_cache"],
    ["planner"],
    ["train"],
    ["pipeline"],
    ["models"],
    ["attention", "recurrence"],
    ["viz"],
    ["compiled"],
    ["parallel"],
    ["kernels"],
    ["dynamic"],
    ["cost"],
    ["hardware"],
    ["sequence"],
    ["compat"],
    ["base"],
]
FLOOR = {name: depth for depth, names in enumerate(FLOORS) for name in names}

# Modules of one room that still import each other, and what will end it.
KNOWN_CIRCLES: dict[str, dict[frozenset[str], str]] = {
    "rooms": {},
    "modules": {},
}


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The modules below a folder by dotted name; a package goes by its own name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]  # the face, which names everything
    return found


def imported(path: pathlib.Path, known: dict[str, pathlib.Path]) -> Iterator[str]:
    """The modules that a file imports, as written anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: write imports in full"
            # `from package import module` imports the module; other names are of the package.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("hcp_jax.") in known else node.module for n in inside]
        else:
            continue
        for name in names:
            short = name.removeprefix("hcp_jax.")
            if name.startswith("hcp_jax.") and short in known:
                yield short


def missing(root: pathlib.Path) -> list[str]:
    """Imports of modules of the library that do not exist; mypy passes over them."""
    known = modules(root) | {"": root}
    return [
        f"{path.relative_to(root)}: {node.module}"
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hcp_jax"
        if (node.module or "").removeprefix("hcp_jax").removeprefix(".") not in known
    ]


def graph(root: pathlib.Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def rooms(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of modules, one node for each room."""
    found: dict[str, set[str]] = {}
    for name, others in modules.items():
        room = name.split(".")[0]
        found.setdefault(room, set()).update({o.split(".")[0] for o in others} - {room})
    return found


def upward(rooms: dict[str, set[str]], floor: dict[str, int]) -> list[tuple[str, str]]:
    known = {a: rooms[a] & set(floor) for a in rooms if a in floor}
    return [(a, b) for a in known for b in known[a] if floor[b] < floor[a]]


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of nodes each of which reaches all others of its set."""
    reached = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        reached[start] = seen
    return {
        frozenset({a} | {b for b in reached[a] if a in reached[b]})
        for a in graph
        if a in reached[a]
    }


MODULES = graph(ROOT)


def test_every_import_names_a_module_that_exists(tmp_path):
    assert missing(ROOT) == []
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("def f():\n    from hcp_jax.gone import b  # late")
    assert missing(tmp_path) == ["a.py: hcp_jax.gone"]


def test_every_room_has_a_floor():
    assert set(rooms(MODULES)) == set(FLOOR), "give each new room a floor; delete what is gone"


def test_imports_run_downwards():
    assert upward(rooms(MODULES), FLOOR) == []


@pytest.mark.parametrize("nodes", KNOWN_CIRCLES)
def test_there_is_no_circle_but_those_that_are_known(nodes):
    found = circles(rooms(MODULES) if nodes == "rooms" else MODULES)
    assert found == set(KNOWN_CIRCLES[nodes]), "mend what is new; delete what is gone"


def written(folder: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "__init__.py").write_text("")
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "import hcp_jax.up",
        "from hcp_jax import up",
        "from hcp_jax.up import thing",
        "def f():\n    from hcp_jax.up.inner import thing",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hcp_jax.up.inner",
    ],
)
def test_an_import_upwards_is_found_however_it_is_written(tmp_path, text):
    files = {"up/__init__.py": "", "up/inner.py": "", "down.py": text}
    found = rooms(graph(written(tmp_path, files)))
    assert upward(found, {"up": 0, "down": 1}) == [("down", "up")]
    assert upward(found, {"up": 1, "down": 1}) == []


def test_a_circle_is_found_sideways_and_through_others(tmp_path):
    files = {"a.py": "import hcp_jax.b", "b.py": "import hcp_jax.c", "d.py": "import hcp_jax.a"}
    assert circles(graph(written(tmp_path, files | {"c.py": ""}))) == set()
    found = graph(written(tmp_path, files | {"c.py": "from hcp_jax import a"}))
    assert circles(found) == {frozenset("abc")}


def test_only_pictures_import_matplotlib():
    drawing = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if re.search(r"^\s*(from|import) matplotlib", path.read_text(), re.M)
    }
    assert drawing
    assert {name.split("/")[0] for name in drawing} == {"viz"}


def test_importing_the_library_alone_imports_neither_jax_nor_numpy():
    code = "import sys, hcp_jax; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_schedule_is_made_without_jax():
    code = "import sys, hcp_jax as hcp; hcp.dynamic.schedule([9, 5], 2, 8, cost=hcp.dynamic.model_cost('llama3-8b')); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_merge_was_left_half_done():
    files = [p for end in ("*.py", "*.md", "*.yaml") for p in ROOT.parent.rglob(end)]
    ours = [p for p in files if not p.relative_to(ROOT.parent).parts[0].startswith(".")]
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    assert not [p for p in ours if any(x.startswith(marks) for x in p.read_text().splitlines())]


WITHOUT_JAX = """
import sys
sys.modules["jax"] = None  # importing it is an error
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
import hcp_jax as hcp
mask = hcp.documents([3, 3, 5, 0], padding_id=0) & hcp.causal() & hcp.from_dense([[True] * 4])
from hcp_jax.sequence import placed_mask, placement
placed = placed_mask.place(mask, placement.Streams("zigzag", 2), 4, 4).windowed(1)
print(mask.intervals(4).end.tolist(), placed.intervals.start.tolist())
"""


def test_the_lower_rooms_work_where_there_is_no_jax():
    rooms = ("base", "hardware", "sequence", "cost", "dynamic")
    names = [f"hcp_jax.{name}" for name in modules(ROOT) if name.split(".")[0] in rooms]
    command = [sys.executable, "-c", WITHOUT_JAX, *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "[[1, 2, 3, 3]] [[0, 3, 1, 2]]\n"


def test_every_name_of_the_face_exists_and_dir_shows_no_other():
    for name in hcp_jax.__all__:
        assert getattr(hcp_jax, name).__doc__
    assert dir(hcp_jax) == sorted(hcp_jax.__all__)
    assert not [name for name in dir(hcp_jax) if name.startswith("_")]
    assert {"plan", "dynamic", "xla_flags", "ContextParallel"} <= set(dir(hcp_jax))


def test_plan_is_a_function_also_after_its_room_was_imported():
    code = "import hcp_jax.planner.search, hcp_jax.commands.plan, hcp_jax as hcp; assert hcp.plan.__name__ == 'plan'"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        hcp_jax.plans  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()

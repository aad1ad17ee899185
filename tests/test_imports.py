"""The house: imports run downwards, and `dynamic` never imports jax."""

import ast
import pathlib
import subprocess
import sys

import hcp_jax

ROOT = pathlib.Path(hcp_jax.__file__).parent

# From the top of the house to the ground; what stands on one line may import sideways.
FLOORS = [
    ["cli"],
    ["verify", "support", "plot"],
    ["plan"],
    ["train"],
    ["models"],
    ["attention"],
    ["parallel", "microbatch"],
    ["context", "describe", "placing"],
    ["roll"],
    ["mesh", "spmd"],
    ["kernels"],
    ["dynamic"],
    ["layout", "mask", "compat", "datasheet", "host_memory"],
]
FLOOR = {name: depth for depth, names in enumerate(FLOORS) for name in names}


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_downwards():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        home = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        assert home in FLOOR, f"{home} has no floor in the house: give it one here"
        for name in imported(path):
            parts = name.split(".")
            floor = FLOOR.get(parts[1]) if parts[0] == "hcp_jax" and len(parts) > 1 else None
            if floor is not None and floor < FLOOR[home]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_importing_the_library_alone_does_not_import_jax():
    code = "import sys, hcp_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_of_the_face_exists():
    for name in hcp_jax.__all__:
        assert getattr(hcp_jax, name).__doc__

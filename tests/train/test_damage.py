"""Damage of many kinds to every file of a checkpoint: never believed, never a traceback.

What is restored has the bits of a checkpoint that was written: those of the newest one, where the
damage is in something that nobody reads (Orbax keeps copies and times), or those of the one before,
and then that is told.
"""

import collections
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.train.checkpoint.manager import Checkpoints
from tests.train.checkpoint.test_manager import MODEL, make_state, mesh, save

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROUNDS = 1
"""How often each kind of damage is done to each file; more were tried by hand."""


def flip(path, rng):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut_off(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path, rng):
    path.unlink()


def fill_with_zeros(path, rng):
    content = bytearray(path.read_bytes())
    begin = rng.randrange(len(content))
    content[begin:] = bytes(rng.randint(1, len(content) - begin)).ljust(len(content) - begin, b"\0")
    path.write_bytes(content)


def swap_with_another(path, rng):
    """Of the same checkpoint, or of the one before."""
    others = [p for p in sorted(path.parents[-1 - depth_of(path)].rglob("*")) if p.is_file()]
    swap(path, rng.choice(others))


def take_from_the_one_before(path, rng):
    """The file of the same name, whole; if names have random parts, any file."""
    before = pathlib.Path(str(path).replace("/checkpoints/6/", "/checkpoints/3/"))
    if not before.exists():
        before = rng.choice([p for p in sorted(before.parent.glob("*")) if p.is_file()] or [path])
    shutil.copyfile(before, path) if before != path else None


def replace_by_a_folder(path, rng):
    path.unlink()
    path.mkdir()


def depth_of(path):
    return path.parts.index("checkpoints")


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


DAMAGE = [
    flip,
    cut_off,
    delete,
    fill_with_zeros,
    swap_with_another,
    take_from_the_one_before,
    replace_by_a_folder,
]


@pytest.fixture(scope="module")
def sharding():
    return NamedSharding(mesh(8), PartitionSpec("a"))


@pytest.fixture(scope="module")
def states(sharding):
    return {step: make_state(sharding, seed=step) for step in (3, 6)}


def data_of(step):
    return {"epoch": 0, "next": step, "left_over": [[step, 7], [8, 9]]}


@pytest.fixture(scope="module")
def written(tmp_path_factory, states):
    folder = tmp_path_factory.mktemp("written")
    for step, state in states.items():
        save(folder, state, step, data_of(step))
    return folder


def restored(folder, states):
    """The step of the checkpoint whose bits come back; None if each is told to be damaged."""
    checkpoints = Checkpoints(folder, MODEL)
    try:
        found = checkpoints.restore(states[3])
    except ValueError as error:
        if "none of the checkpoints in" not in str(error):
            raise
        return None
    finally:
        checkpoints.close()
    for step, state in states.items():
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), found.state, state)
        if all(jax.tree.leaves(same)) and found.data == data_of(step):
            return step
    return "bits that nobody saved"


def files_of_the_newest(folder):
    return [p for p in sorted((folder / "checkpoints" / "6").rglob("*")) if p.is_file()]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_no_damage_is_silent_or_a_traceback(damage, written, states, tmp_path, caplog):
    outcomes = collections.Counter()
    for number in range(ROUNDS):
        for i, name in enumerate(p.relative_to(written) for p in files_of_the_newest(written)):
            folder = tmp_path / f"{number}-{i}"
            shutil.copytree(written, folder)
            damage(folder / name, random.Random(f"{damage.__name__} {number} {i}"))
            caplog.clear()
            step = restored(folder, states)
            told = "checkpoint of step 6" in caplog.text and "is damaged" in caplog.text
            aside = (folder / "checkpoints-damaged" / "6").is_dir()
            fine = [(6, False, False), (3, True, True)]
            # Of two files that were swapped, the other one may be of the checkpoint before.
            fine += [(None, True, False)] if damage is swap_with_another else []
            assert (step, told, aside) in fine, (name, number)
            outcomes[step] += 1
            shutil.rmtree(folder)
    # Some copies equal the file that they replace, how many depends on the random names of files.
    assert outcomes.total() - outcomes[6] >= 3


@pytest.mark.parametrize("item", ["about", "data", "state", "."])
def test_a_whole_item_of_another_checkpoint_is_damage(item, written, states, tmp_path, caplog):
    """Each of them is whole by itself, with all of Orbax's own checksums."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "6" / item
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "checkpoints" / "3" / item, newest)
    assert restored(tmp_path, states) == 3
    assert "checkpoint of step 6" in caplog.text

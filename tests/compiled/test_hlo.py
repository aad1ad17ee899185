"""The reader of compiled HLO, on programs whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hcp_jax.compiled import hlo

ROWS, WIDTH = 16, 32
SHARD_BYTES = ROWS * WIDTH * 4


def mesh_2x4():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("out", "in"), (AxisType.Auto,) * 2)


def compiled(local, mesh):
    """HLO of `local` on one float32 shard of [ROWS, WIDTH] per device."""
    spec = P(("out", "in"))
    f = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(f).lower(x).compile().as_text()


COLLECTIVES = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "in"), "in", SHARD_BYTES, 3 * SHARD_BYTES),
    "all-reduce": (lambda x: jax.lax.psum(x, "out"), "out", SHARD_BYTES, SHARD_BYTES),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "in", 1, 0, tiled=True),
        "in",
        SHARD_BYTES,
        SHARD_BYTES * 3 / 4,
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "out", [(0, 1), (1, 0)]),
        "out",
        SHARD_BYTES,
        SHARD_BYTES,
    ),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "in", tiled=True),
        "in",
        SHARD_BYTES,
        SHARD_BYTES * 3 / 4,
    ),
}
GROUPS = {"in": ((0, 1, 2, 3), (4, 5, 6, 7)), "out": ((0, 4), (1, 5), (2, 6), (3, 7))}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_each_kind_is_found_once_with_its_bytes_and_its_groups(kind):
    local, axis, put_in, sent = COLLECTIVES[kind]
    (found,) = hlo.collectives(compiled(lambda x: x + jnp.sum(local(x)), mesh_2x4()))
    assert (found.kind, found.count, found.bytes, found.sent_bytes) == (kind, 1, put_in, sent)
    assert found.groups == GROUPS[axis]


def test_a_loop_counts_its_collective_as_often_as_it_runs():
    def local(x):
        def body(x, _):
            def inner(x, _):
                return jnp.sin(jax.lax.ppermute(x, "out", [(0, 1), (1, 0)])), None

            x, _ = jax.lax.scan(inner, x, length=3)
            return x - jax.lax.pmax(x, "in"), None

        return jax.lax.scan(body, x, length=5)[0]

    found = {c.kind: c.count for c in hlo.collectives(compiled(local, mesh_2x4()))}
    assert found == {"collective-permute": 15, "all-reduce": 5}


def test_a_program_without_collectives_has_none():
    assert hlo.collectives(compiled(jnp.sin, mesh_2x4())) == []


def test_a_collective_in_each_branch_is_found_in_each():
    def local(x):
        branches = [lambda x: jax.lax.psum(x, "in"), lambda x: jax.lax.psum(x, "out")]
        return jax.lax.switch(jnp.int32(x[0, 0]) % 2, branches, x)

    found = hlo.collectives(compiled(local, mesh_2x4()))
    assert sorted(c.groups for c in found) == sorted(GROUPS.values())


ASYNC = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[4,8]) -> f32[1,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %rs = f32[1,8]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (x: f32[4,8], y: bf16[2,2]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = bf16[2,2]{1,0} parameter(1)
  %start = TUPLE all-reduce-start(%x, %y), replica_groups={GROUPS}, metadata={op_name="a(b)c"}
  %kernel = f32[4,8]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %done = (f32[4,8]{1,0}, bf16[2,2]{1,0}) all-reduce-done(%start)
  %wrap-start = ((f32[4,8]{1,0}), f32[1,8]{1,0}) async-start(%x), calls=%wrapped
  %wrap-update = ((f32[4,8]{1,0}), f32[1,8]{1,0}) async-update(%wrap-start)
  %after = f32[4,8]{1,0} add(%kernel, %kernel)
  %wrap-done = f32[1,8]{1,0} async-done(%wrap-update)
  ROOT %out = f32[4,8]{1,0} add(%after, %after)
}
""".replace("TUPLE", "(f32[4,8]{1,0}, /*index=1*/bf16[2,2]{1,0})")


def groups_of(text):
    return hlo.collectives(ASYNC.replace("{GROUPS}", text))[0].groups


def test_what_stands_between_start_and_done_is_told():
    reduce, scatter = hlo.collectives(ASYNC.replace("{GROUPS}", "{}"))
    assert (reduce.bytes, reduce.between, reduce.op_name) == (136, ("kernel",), "a(b)c")
    assert (scatter.kind, scatter.bytes) == ("reduce-scatter", 128)
    assert scatter.between == ("wrap-update", "after")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", (tuple(range(8)),)),
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['o'=2,'i'=4] {'i'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['o'=2,'i'=4] {'o'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['o'=2,'i'=4] {'o','i'}", (tuple(range(8)),)),
        ("mesh['o'=2,'i'=4], device_ids=([4,2]T(1,0)) {'o'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['o'=2,'i'=2], device_ids=(3,1,2,0) {'i'}", ((3, 1), (2, 0))),
        ("mesh['o'=2,'i'=4] {'i':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['o'=2,'i'=4] {'i':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ],
)
def test_every_way_of_writing_groups_is_read(text, groups):
    assert groups_of(text) == groups


def test_groups_of_an_unknown_form_are_an_error_and_not_a_guess():
    with pytest.raises(ValueError, match="not known to this reader"):
        groups_of("mesh['o'=2], device_ids=(x) {'o'}")


def test_a_text_that_is_no_module_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing\n")


def test_sizes_of_types():
    assert hlo.shape_bytes("(s4[3]{0}, pred[2]{0}, f8e4m3fn[5]{0}, u32[], token[])") == 13 + 0
    assert hlo.shape_bytes("bf16[1048576,8,128]{2,1,0}") == 2**31

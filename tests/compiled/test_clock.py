"""The clock, on schedules whose times are known."""

import math

import pytest

from hcp_jax import hardware
from hcp_jax.compiled import clock, hlo
from hcp_jax.hardware import Path

H200 = hardware.gpu("h200")
PATH = Path(hardware.BETWEEN, 1e9, 1e-3)
BYTES = 4 * 1024 * 64 * 128 * 2  # of one permute of K
SENT_S = 1e-3 + BYTES / 1e9
HEAD = "HloModule m, is_scheduled=true, num_partitions=2\n\n"
KV = "bf16[4,1024,64,128]{3,2,1,0}"
PAIRS = "source_target_pairs={{0,1},{1,0}}"


def start(name):
    scope = f'metadata={{op_name="jit(f)/ring_hop/{name}"}}'
    return f"  %{name} = ({KV}, {KV}) collective-permute-start(%k), {PAIRS}, {scope}\n"


def done(name):
    return f"  %{name}-done = {KV} collective-permute-done(%{name})\n"


def kernel(name, tokens=1024, scope="attend"):
    q = f"bf16[4,{tokens},64,128]{{3,2,1,0}}"
    return (
        f"  %{name}-q = {q} parameter(1)\n"
        f"  %{name} = f32[4,{tokens},64,128]{{3,2,1,0}} custom-call(%{name}-q, %k), "
        f'custom_call_target="__gpu$xla.gpu.triton", metadata={{op_name="jit(f)/{scope}/call"}}\n'
    )


def entry(*lines):
    return f"ENTRY %main (k: {KV}) -> {KV} {{\n  %k = {KV} parameter(0)\n{''.join(lines)}}}\n"


def walk(text, density=1.0):
    module = hlo.parse(HEAD + text)
    return clock.simulate(module, clock.Costs(H200, "triton", density, lambda _: PATH))


def attention_s(tokens=1024, density=1.0):
    flops = 4.0 * 4 * tokens * 64 * 128 * 1024 * density
    return flops / H200.attention_rate("triton", "forward").value


def test_a_transfer_with_nothing_beside_it_is_waited_for_in_full():
    found = walk(entry(start("a"), done("a")))
    assert found.flights["a"].exposed == pytest.approx(SENT_S)
    assert found.step_s == pytest.approx(SENT_S)


def test_a_transfer_behind_a_kernel_that_lasts_is_not_waited_for():
    tokens = 1024 * math.ceil(2 * SENT_S / attention_s())
    found = walk(entry(start("a"), kernel("x", tokens), done("a")))
    assert found.flights["a"].exposed == 0
    assert found.flights["a"].attention > found.flights["a"].until
    assert found.flights["a"].behind == ("call",)


def test_of_a_transfer_behind_a_short_kernel_the_rest_is_waited_for():
    found = walk(entry(start("a"), kernel("x"), done("a")))
    assert found.flights["a"].exposed == pytest.approx(SENT_S - attention_s() - clock.LAUNCH_S)


def test_transfers_queue_on_their_link():
    found = walk(entry(start("a"), start("b"), done("a"), done("b")))
    assert found.flights["a"].until == pytest.approx(SENT_S)
    assert found.flights["b"].until == pytest.approx(2 * SENT_S)
    assert found.exposed_s == pytest.approx(2 * SENT_S)


def test_a_kernel_before_the_start_hides_nothing():
    found = walk(entry(kernel("x", 2**20), start("a"), done("a")))
    assert found.flights["a"].attention == 0
    assert found.flights["a"].exposed == pytest.approx(SENT_S)


def test_a_loop_takes_as_long_as_all_its_trips():
    body = (
        f"%body (p: {KV}) -> {KV} {{\n  %k = {KV} parameter(0)\n{start('a')}{kernel('x')}"
        f"{done('a')}}}\n\n"
    )
    loop = (
        f"  %w = {KV} while(%k), condition=%c, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}\n'
    )
    once, five = walk(body + entry(start("a"), kernel("x"), done("a"))), walk(body + entry(loop))
    assert five.step_s == pytest.approx(5 * once.step_s)
    assert five.exposed_s == pytest.approx(5 * once.exposed_s)
    assert five.compute_s["attention"] == pytest.approx(5 * once.compute_s["attention"])
    assert len(five.spans) == 5 * len(once.spans)


def test_a_loop_waits_once_for_what_was_sent_before_it_and_its_later_trips_do_not():
    tokens = 1024 * math.ceil(2 * SENT_S / attention_s())
    body = (
        f"%body (p: {KV}) -> {KV} {{\n  %k = {KV} parameter(0)\n{start('a')}"
        f"{kernel('x', tokens)}{done('a')}}}\n\n"
    )
    loop = (
        f"  %w = {KV} while(%k), condition=%c, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}\n'
    )
    # Two transfers before the loop keep the link busy until the kernel of the first trip is over.
    found = walk(body + entry(start("b"), start("c"), loop, done("b"), done("c")))
    kernel_s = attention_s(tokens) + clock.LAUNCH_S
    wait = 3 * SENT_S - kernel_s
    assert 0 < wait < SENT_S
    assert found.exposed_s == pytest.approx(wait)
    assert found.flights["a"].exposed == pytest.approx(wait / 5)
    assert found.step_s == pytest.approx(5 * kernel_s + wait)
    assert found.compute_s["attention"] == pytest.approx(5 * kernel_s)
    assert len(found.spans) == 2 + 5 * 2


def test_a_branch_does_not_wait_for_the_transfers_of_another():
    branches = [
        f"%branch{i} (p: {KV}) -> {KV} {{\n  %k = {KV} parameter(0)\n{start(f'a{i}')}"
        f"{done(f'a{i}')}}}\n\n"
        for i in range(2)
    ]
    conditional = (
        f"  %c = {KV} conditional(%i, %k, %k), branch_computations={{%branch0, %branch1}}\n"
    )
    found = walk("".join(branches) + entry(conditional))
    assert found.step_s == pytest.approx(SENT_S)
    assert len(found.flights) == 1  # the other one is never sent


def test_of_a_dispatch_to_experts_the_first_round_counts_alone():
    more = f"%more (p: {KV}) -> {KV} {{\n  %k = {KV} parameter(0)\n{start('a')}{done('a')}}}\n\n"
    none = f"%none (p: {KV}) -> {KV} {{\n  %k = {KV} parameter(0)\n}}\n\n"
    scope = 'metadata={op_name="jit(f)/expert_rounds/cond"}'
    conditional = (
        f"  %c = {KV} conditional(%i, %k, %k), branch_computations={{%none, %more}}, {scope}\n"
    )
    found = walk(more + none + entry(conditional))
    assert (found.step_s, found.flights) == (0, {})


def test_masked_pairs_take_no_time():
    full, half = walk(entry(kernel("x"))), walk(entry(kernel("x")), density=0.5)
    launch = clock.LAUNCH_S
    assert half.step_s - launch == pytest.approx((full.step_s - launch) / 2)


def test_the_two_kernels_of_backward_take_what_backward_takes():
    found = walk(
        entry(
            kernel("x", scope="attend_grads").replace("/call", "/dq_kernel"),
            kernel("y", scope="attend_grads").replace("/call", "/dkv_kernel"),
        )
    )
    forward, rate = attention_s(), H200.attention_rate("triton", "backward").value
    backward = 2.5 * forward * H200.attention_rate("triton", "forward").value / rate
    assert found.compute_s["attention"] == pytest.approx(backward + 2 * clock.LAUNCH_S)


PRODUCT = """%fused (a: bf16[4096,4096], b: bf16[4096,8192]) -> bf16[4096,8192] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = bf16[4096,8192]{1,0} parameter(1)
  ROOT %d = bf16[4096,8192]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[4096,4096], y: bf16[4096,8192]) -> bf16[4096,8192] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %y = bf16[4096,8192]{1,0} parameter(1)
  ROOT %f = bf16[4096,8192]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused
}
"""


def test_a_product_in_a_fusion_takes_its_flops():
    seconds = 2.0 * 4096 * 4096 * 8192 / H200.product_rate.value
    found = walk(PRODUCT)
    assert found.compute_s["product"] == pytest.approx(seconds + clock.LAUNCH_S)
    assert found.compute_s["attention"] == 0


SLICED = """%fused (s: f32[64,1048576], i: s32[]) -> f32[1,1048576] {
  %s = f32[64,1048576]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,1048576]{1,0} dynamic-slice(%s, %i, %z), dynamic_slice_sizes={1,1048576}
}

ENTRY %main (x: f32[64,1048576], i: s32[]) -> f32[1,1048576] {
  %x = f32[64,1048576]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,1048576]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""


# The same in the form of a start and a done; the type of a start lists the operands as well.
SLICED_ASYNC = SLICED.replace(
    "ROOT %f = f32[1,1048576]{1,0} fusion(",
    "%f = ((f32[64,1048576]{1,0}, s32[]), f32[1,1048576]{1,0}, u32[]) fusion-start(",
).replace("calls=%fused\n", "calls=%fused\n  ROOT %g = f32[1,1048576]{1,0} fusion-done(%f)\n")


@pytest.mark.parametrize("text", [SLICED, SLICED_ASYNC], ids=["fusion", "start and done"])
def test_a_slice_of_a_stack_reads_the_slice_alone(text):
    seconds = 2 * 4 * 2**20 / H200.memory_bandwidth
    assert walk(text).step_s == pytest.approx(seconds + clock.LAUNCH_S, rel=0.01)


def test_of_two_branches_the_longer_one_counts():
    branches = [
        f"%branch{i} (p: {KV}) -> {KV} {{\n  %k = {KV} parameter(0)\n{kernel(f'x{i}', tokens)}}}\n\n"
        for i, tokens in enumerate((1024, 8192, 2048))
    ]
    conditional = (
        f"  %c = {KV} conditional(%i, %k, %k, %k), "
        "branch_computations={%branch0, %branch1, %branch2}\n"
    )
    found = walk("".join(branches) + entry(conditional))
    assert found.step_s == pytest.approx(attention_s(8192) + clock.LAUNCH_S)


@pytest.mark.parametrize(("name", "products"), [("dq", 3), ("dkv", 4)])
def test_each_kernel_of_backward_takes_its_share_of_the_products(name, products):
    text = entry(kernel("x", scope="attend_grads").replace("/call", f"/{name}_kernel"))
    rate = H200.attention_rate("triton", "backward").value
    backward = 2.5 * 4.0 * 4 * 1024 * 64 * 128 * 1024 / rate
    assert walk(text).step_s - clock.LAUNCH_S == pytest.approx(products / 7 * backward)

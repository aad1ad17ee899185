"""The check of kernels on the user's own GPU, run here with an implementation for CPUs."""

import functools

import jax.numpy as jnp
import pytest

from hcp_jax.kernels import blockwise, expert_triton, self_check
from hcp_jax.kernels.expert_product import How
from hcp_jax.kernels.self_check import Finding


def found() -> list[Finding]:
    return list(self_check.findings("blockwise", length=96, head_sizes=(16,)))


def test_right_kernels_pass_every_case():
    results = found()
    assert len(results) == 2 * 6 * 5  # soft caps, masks, results
    assert [x for x in results if not x.passed] == []
    assert self_check.judge(results, own_seconds=1.0, other_seconds=2.0).passed


def test_a_kernel_that_misses_a_block_of_keys_is_noticed(monkeypatch):
    right = blockwise.forward

    def wrong(spec, q, k, v, intervals, runs):
        return right(spec, q, k.at[:, 32:48].set(0), v, intervals, runs)

    monkeypatch.setattr(blockwise, "forward", wrong)
    results = found()
    cases = {x.case for x in results if not x.passed}
    # Every case but those in which nothing is seen.
    assert len(cases) == 2 * 5
    verdict = self_check.judge(results, own_seconds=1.0, other_seconds=2.0)
    assert not verdict.passed
    assert "out of head size 16, causal, which differs" in verdict.reason


def test_a_wrong_gradient_is_noticed(monkeypatch):
    right = blockwise.backward

    def wrong(*args):
        dq, dk, dv = right(*args)
        return dq, dk, dv.at[:, -1].mul(1.5)

    monkeypatch.setattr(blockwise, "backward", wrong)
    bad = [x for x in found() if not x.passed]
    assert {x.result for x in bad} == {"dv"}


def test_results_that_are_not_numbers_are_no_small_error():
    nothing, right = jnp.full(3, jnp.nan), jnp.full(3, 2.0)
    assert not self_check._compare("case", "out", nothing, right, nothing, 0.01).passed
    assert self_check._compare("case", "out", right, right, right, 0.01).passed


def test_slower_kernels_are_not_taken():
    right = [Finding("case", "out", 0.0, 0.01, True)]
    assert self_check.judge(right, own_seconds=1.0, other_seconds=1.5).passed
    verdict = self_check.judge(right, own_seconds=1.0, other_seconds=0.8)
    assert not verdict.passed
    assert "triton takes 0.80 of their time" in verdict.reason


def test_bits_that_change_from_call_to_call_are_noticed():
    changing = [Finding("case", "dk", 0.0, 0.01, False)]
    verdict = self_check.judge(changing, own_seconds=1.0, other_seconds=2.0)
    assert not verdict.passed
    assert "changes from call to call" in verdict.reason


def products(**sizes) -> list[Finding]:
    how = How("triton", interpret=True)
    return list(self_check.product_findings(how, shapes=((29, 5, 11, 20),), **sizes))


def test_right_products_of_experts_pass_every_case():
    results = products(dtypes=("bfloat16", "float32"))
    assert len(results) == 2 * 4 * 3  # dtypes, loads, results
    assert [x for x in results if not x.passed] == []
    verdict = self_check.judge(results, 2.0, 1.0, "ragged_dot")
    assert not verdict.passed
    assert "but ragged_dot takes 0.50 of their time" in verdict.reason


@pytest.mark.parametrize(("name", "result"), [("multiply", "dx"), ("weight_gradients", "dw")])
def test_wrong_products_of_experts_are_noticed(monkeypatch, name, result):
    """Each is wrong where an expert ends, as with a mask that is off by one row."""
    right = getattr(expert_triton.Call, name)

    @functools.wraps(right)
    def wrong(call, x, other, sizes, **transposed):
        if name == "multiply" and not transposed["transposed"]:
            return right(call, x, other, sizes, **transposed)
        return right(call, x, other, jnp.maximum(sizes - 1, 0), **transposed)

    monkeypatch.setattr(expert_triton.Call, name, wrong)
    bad = [x for x in products(dtypes=("bfloat16",)) if not x.passed]
    assert {x.result for x in bad} == {result}
    assert len(bad) == 3  # every load but that without rows

"""Facts of a tick compiled for a cluster: what leaves a stage, and what is hidden."""

import json

import pytest

from tests.compiled import needs_cuda_compiler
from tests.planner.test_audit import audited

SMALL = """
steps: 100
batch_size: 3
accumulation: 3
seq_len: 64K
optimizer: {warmup_steps: 10}
model: {vocab_size: 4096, num_layers: 2, hidden_size: 1024, intermediate_size: 2048, num_heads: 8,
        num_kv_heads: 8, remat: none, compute_dtype: bfloat16}
parallel: {pp: 2, cp_outer: 2, cp_inner: 2}
"""


@needs_cuda_compiler
@pytest.mark.slow
def test_sends_between_stages_are_hidden_and_nothing_else_but_sums_leaves_a_stage(capsys, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    where = ["--gpu", "h200", "--hosts", "4", "--gpus-per-host", "2"]
    told = json.loads(audited(capsys, str(file), *where, "--json", "-"))
    moved, memory = told["collectives"], told["memory"]
    # Of 8 devices' 2 stages, each holds parameters, and besides two moments of the same bytes.
    assert 0 < memory["beside_bytes"] < 2 * memory["argument_bytes"]
    between = [one for one in moved if "pp" in one["axes"]]
    # Never together with axes of a stage.
    assert {(*one["axes"], one["what"]) for one in between} == {("pp", "stages")}
    sends = [one for one in between if one["kind"] == "collective-permute"]
    activation = 65536 // 4 * 1024 * 2
    assert [(one["bytes"], one["count"], one["hidden"]) for one in sends] == [(activation, 2, True)]
    assert (told["sends"], told["sends_hidden"]) == (2, 2)
    # The embedding, the last stage's output, and the gradients of both.
    sums = [one for one in between if one["bytes"] > 16 * 1024]
    assert {one["kind"] for one in sums} == {"collective-permute", "all-reduce"}
    assert sum(one["count"] for one in sums if one["kind"] == "all-reduce") == 4

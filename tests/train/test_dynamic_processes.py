"""Two processes of four devices each train on groups that go over both as one process does."""

import io

import pytest
import rich.console

from hcp_jax.train import config as configuration
from hcp_jax.train import loop
from hcp_jax.train.metrics import metrics
from tests.train.test_processes import Pair, losses

pytestmark = pytest.mark.slow

CONFIG = """
steps: 8
batch_size: 3
seq_len: 128
model: {num_layers: 1, hidden_size: 32, intermediate_size: 64, num_heads: 4, num_kv_heads: 2}
parallel:
  cp_outer: 4
  cp_inner: 2
  dynamic:
    {enabled: true, max_tokens_per_device: 16, menu: [8, 4, 2], lookahead: 2}
optimizer: {learning_rate: 1e-2, warmup_steps: 2}
"""


def test_two_processes_train_on_groups_to_the_losses_of_one(tmp_path):
    text = "\n".join(f'{{"text": "{"abc " * (2 + i * i % 29)}{i}"}}' for i in range(100))
    (tmp_path / "text.jsonl").write_text(text)
    path = tmp_path / "groups.yaml"
    path.write_text(CONFIG + f"data: {{path: {tmp_path / 'text.jsonl'}}}\n")
    folder = tmp_path / "two" / "groups-001"
    with Pair(tmp_path, tmp_path / "cache", str(path), f"--run_dir={folder.parent}") as pair:
        ended = pair.ended()
    assert ended.codes == [0, 0], ended
    config = configuration.load(path, [("run_dir", str(tmp_path / "one"))])
    alone = loop.train(config, console=rich.console.Console(file=io.StringIO()))
    assert losses(folder) == pytest.approx(losses(alone.folder), abs=2e-5)
    assert len(losses(folder)) == 8
    used = [
        {k: line[k] for k in ("tokens", "microbatches", "groupings", "fill")}
        for line in metrics.read(folder)
    ]
    assert used == [{k: line[k] for k in used[0]} for line in metrics.read(alone.folder)]
    assert max(line["groupings"] for line in used) > 1

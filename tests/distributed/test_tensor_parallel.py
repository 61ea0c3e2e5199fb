"""Two processes share a factored model; the bytes that they send are counted."""

import json
import os
import subprocess
import sys

import pytest
from torch import nn

from lowrank_ft.conversion.convert import convert
from lowrank_ft.errors import ConfigError
from lowrank_ft.integrations.tensor_parallel import tensor_parallel_plan
from tests.conftest import ROOT, tiny_llama

TOKENS, RANK, WIDTH, FLOAT64 = 3 * 11, 8, 32, 8


@pytest.mark.parametrize("form", ["factors", "pivoted"])
def test_outputs_and_gradients_are_those_of_one_process_and_only_ranks_are_sent(tmp_path, form):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "tests.distributed.tensor_parallel_driver", str(tmp_path), form],
        capture_output=True, text=True, cwd=ROOT, env=env, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        facts = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert facts["world"] == 2
        assert facts["logits"] < 1e-12
        assert facts["gradients"] < 1e-9
        # Both blocks' o_proj and one down_proj are factored row layers; the other down_proj is dense, and costs more.
        assert facts["forward"] == {"_c10d_functional::all_reduce": TOKENS * (3 * RANK + WIDTH) * FLOAT64}
        # q, k, v, gate and up in both blocks.
        assert facts["backward"] == {"_c10d_functional::all_reduce": TOKENS * 10 * RANK * FLOAT64}
        shapes = facts["local"]
        assert shapes["model.layers.0.self_attn.q_proj.U.weight"] == [WIDTH // 2, RANK]
        assert shapes["model.layers.0.self_attn.o_proj.V.weight"] == [RANK, WIDTH // 2]
        # Pivoted on the side that is split: the outputs of k and v, and the inputs of o, which is square as q is.
        kinds = {name.rpartition(".")[2] for name in facts["unpivoted"]}
        assert kinds == ({"k_proj", "v_proj", "o_proj"} if form == "pivoted" else set())
        for whole in ("q_proj.V.weight", "o_proj.U.weight", "o_proj.bias"):
            assert f"model.layers.0.self_attn.{whole}" not in facts["split"]


def test_what_cannot_be_split_is_an_error():
    model = tiny_llama()
    convert(model, rank=8)
    with pytest.raises(ConfigError, match="num_attention_heads=4, which 3 processes do not divide"):
        tensor_parallel_plan(model, 3)
    with pytest.raises(ConfigError, match="as 'packed_colwise'"):
        tensor_parallel_plan(model, 2, {"model.layers.*.mlp.up_proj": "packed_colwise"})
    with pytest.raises(ConfigError, match="is a LlamaMLP"):
        tensor_parallel_plan(model, 2, {"model.layers.*.mlp": "colwise"})
    with pytest.raises(ConfigError, match="give the roles"):
        tensor_parallel_plan(nn.Sequential(), 2)
    guided = tiny_llama()
    convert(guided, rank=8, guide="residual")
    with pytest.raises(ConfigError, match="end guidance first"):
        tensor_parallel_plan(guided, 2)

"""What launchers may be configured for, and which modules become units. Real sharding is in tests/distributed."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from lowrank_ft.checkpoints.sharded import read
from lowrank_ft.conversion.convert import convert
from lowrank_ft.errors import CheckpointError, ConfigError, OutputError
from lowrank_ft.nn import end_guidance
from lowrank_ft.training import TrainArguments, make_accelerator
from lowrank_ft.training import fsdp as sharding
from tests.conftest import tiny_gpt2, tiny_llama


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")  # the plugin sets these; here they are put back
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def fsdp(**options):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **options})
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state, parallelism_config=None)


def guided(make=tiny_llama):
    model = make()
    convert(model, rank=8, guide="residual")
    return model


def test_deepspeed_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed, which cannot remove a guide during a run; use FSDP2"):
        make_accelerator(TrainArguments(output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_version": 1}, "set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "set it to false"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10}, "set TRANSFORMER_BASED_WRAP"),
        ({"activation_checkpointing": True}, "use gradient_checkpointing"),
    ],
)
def test_settings_under_which_guides_would_stay_or_be_lost_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        sharding.set_up(fsdp(**options))
    sharding.set_up(fsdp())


def test_other_kinds_of_parallelism_are_refused():
    for kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        with pytest.raises(ConfigError, match=f"configured for {kind.value}; training runs on one process, with DDP"):
            sharding.set_up(SimpleNamespace(distributed_type=kind, parallelism_config=None))
    with pytest.raises(ConfigError, match="tp_size=2"):
        mesh = SimpleNamespace(tp_size=2)
        sharding.set_up(SimpleNamespace(distributed_type=DistributedType.FSDP, parallelism_config=mesh))


@pytest.mark.parametrize(("make", "block"), [(tiny_llama, "LlamaDecoderLayer"), (tiny_gpt2, "GPT2Block")])
@pytest.mark.parametrize("policy", ["NO_WRAP", "TRANSFORMER_BASED_WRAP"])
def test_blocks_and_guides_are_the_units(make, block, policy):
    accelerator, model = fsdp(auto_wrap_policy=policy), guided(make)
    blocks = sharding.block_classes(model, accelerator)
    sharding.choose_units(model, accelerator, blocks)
    assert accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == sorted(["GuideLinear", block])
    end_guidance(model)
    assert sharding.block_classes(model, accelerator) == blocks == {block}
    sharding.choose_units(model, accelerator, blocks)  # accelerate refuses the name of a class that is not there
    assert accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == [block]


def test_units_that_are_not_known_are_an_error():
    named = fsdp(auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=["LamaBlock"])
    with pytest.raises(ConfigError, match=r"names LamaBlock, and the model has no such module; .*LlamaDecoderLayer"):
        sharding.block_classes(guided(), named)
    with pytest.raises(ConfigError, match="Sequential does not say which of its modules are blocks"):
        sharding.block_classes(nn.Sequential(nn.Linear(2, 2)), fsdp())


def test_gradients_are_summed_in_float32_under_mixed_precision():
    accelerator = fsdp(mixed_precision_policy="bf16")
    sharding.choose_units(guided(), accelerator, {"LlamaDecoderLayer"})
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_a_skeleton_has_the_shape_and_the_ties_but_no_weights():
    model = tiny_llama(tie_word_embeddings=True)
    convert(model, rank=8, guide="residual")
    empty = sharding.skeleton(model)
    assert [(n, p.shape, p.requires_grad) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    end_guidance(empty)
    end_guidance(model)
    filled = sharding.gather_into(empty, model, keep=True)
    assert filled.lm_head.weight is filled.model.embed_tokens.weight
    for (name, a), b in zip(filled.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_missing_tensors_are_an_error(tmp_path):
    (tmp_path / "model-shards").mkdir()
    with pytest.raises(CheckpointError, match="holds no shards"):
        read(tmp_path, "model")
    (tmp_path / "optimizer.safetensors").write_bytes(b"no safetensors")
    for name in ("optimizer", "absent"):
        with pytest.raises(CheckpointError, match=f"holds no readable {name}"):
            read(tmp_path, name)


@pytest.mark.parametrize("blind", [0, 2])
def test_a_folder_that_some_processes_do_not_see_is_an_error(tmp_path, blind):
    seen = []
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=4, device=torch.device("cpu"), wait_for_everyone=lambda: None,
        reduce=lambda value, how: seen.append((value.item(), how)) or value + blind,
    )  # fmt: skip
    if blind:
        with pytest.raises(OutputError, match="is not the same folder on 2 of 4 processes"):
            sharding.require_shared_folder(tmp_path / "run", accelerator)
    else:
        sharding.require_shared_folder(tmp_path / "run", accelerator)
    assert seen == [(0.0, "sum")]  # this process sees it
    assert not list((tmp_path / "run").iterdir())
    accelerator.is_main_process = False  # and one on another disk does not
    with pytest.raises(OutputError):
        sharding.require_shared_folder(tmp_path / "elsewhere", accelerator)

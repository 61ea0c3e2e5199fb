"""Experts of a model that was trained, not drawn: what factoring them costs in perplexity.

    PYTHONPATH=. python tests/benchmarks/moe.py --work build/moe --output tests/benchmarks/results/moe.json

1. A mixture of experts is made of a small dense Llama: each expert takes a random half of the feed-forward neurons, with
   twice their weight on the way down, and a router is drawn. It is trained on text for a few minutes, with a loss that
   keeps the experts in use, until they differ.
2. It is converted to 0.8 and 0.6 of the parameters of its linears and experts: by plain SVD with uniform ranks; calibrated
   (``--method activation``, ranks by loss), which trains nothing; and by default, with distillation.
3. How many tokens an expert needs, and with what damping: each expert is fitted to the first tokens that it received, and
   judged by later ones.

Every stage is kept in ``--work`` or in the output, and a run that was broken off goes on.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import lowrank_ft
from lowrank_ft.console import print_table
from lowrank_ft.conversion.batches import to_batches
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.factorization.solvers import Regression, truncated_svd
from lowrank_ft.factorization.targets import find_linears
from lowrank_ft.nn import fold_experts, stored_form, unfold_experts
from lowrank_ft.nn.unfolded import UnfoldedExperts
from tests.benchmarks import common

RATIOS = (0.8, 0.6)
EXPERTS, CHOSEN = 8, 2
SHARES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
DATA = common.SHARED / "data"
TRAINED_ON, CALIBRATED_ON = ("calibration.txt", "wikitext2-valid.txt"), "calibration.txt"
JUDGED_BY = ("wikitext2-test.txt", "heldout.txt")


def upcycled(dense: Any, seed: int) -> MixtralForCausalLM:
    """A mixture of experts whose experts are halves of the feed-forward networks of ``dense``."""
    torch.manual_seed(seed)
    c = dense.config
    width = c.intermediate_size // 2
    config = MixtralConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=width, head_dim=c.head_dim,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=c.tie_word_embeddings, num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, router_aux_loss_coef=0.02, output_router_logits=True, bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id, rope_parameters=c.rope_parameters, sliding_window=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    known = {k: v for k, v in dense.state_dict().items() if ".mlp." not in k}
    # The experts are new; what else is missing is refused below.
    missing, unexpected = model.load_state_dict(known, strict=False)
    assert not unexpected, unexpected
    assert all(".mlp." in k for k in missing), missing
    with torch.no_grad():
        for old, new in zip(dense.model.layers, model.model.layers, strict=True):
            for e in range(EXPERTS):
                taken = torch.randperm(c.intermediate_size)[:width]
                gate, up = old.mlp.gate_proj.weight[taken], old.mlp.up_proj.weight[taken]
                new.mlp.experts.gate_up_proj[e] = torch.cat([gate, up])
                new.mlp.experts.down_proj[e] = 2 * old.mlp.down_proj.weight[:, taken]
    return model


def trained(options: argparse.Namespace, blocks: Tensor) -> MixtralForCausalLM:
    """The model after ``options.steps`` steps; saved every 25 of them."""
    state = options.work / "training.pt"
    model = upcycled(common.load(options.model, "cpu"), options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01, betas=(0.9, 0.95))
    first, seconds, losses = 0, 0.0, []
    if state.is_file():
        kept = torch.load(state)
        first, seconds, losses = kept["step"], kept["seconds"], kept["losses"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
    order = torch.cat([
        torch.randperm(len(blocks), generator=torch.Generator().manual_seed(options.seed + i)) for i in range(40)
    ])  # fmt: skip
    model.train()
    start = time.process_time()
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / options.steps)
        ids = blocks[order[step * options.batch_size : (step + 1) * options.batch_size]]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        if (step + 1) % 25 == 0 or step + 1 == options.steps:
            print(f"step {step + 1}: loss {sum(losses[-25:]) / len(losses[-25:]):.4f}", flush=True)
            torch.save({
                "step": step + 1, "seconds": seconds + time.process_time() - start, "losses": losses,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            }, state)  # fmt: skip
    model.config.output_router_logits = False
    return model.eval()


def measured(model: Any, texts: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Perplexities, and the size in bfloat16."""
    row: dict[str, Any] = {"perplexity": {n: round(common.perplexity(model, b), 3) for n, b in texts.items()}}
    row["parameters"] = common.stored_parameters(model, "pivoted")
    if stored_form(model)[0]:
        save_compact(model, folder, overwrite=True, dtype=torch.bfloat16)
    else:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    return row | {"bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}


def convert_all(model: Any, texts: dict[str, Tensor], rows: Tensor, options: argparse.Namespace, report: Any) -> None:
    bare = Calibration(to_batches(rows), distill_epochs=0.0, refine_epochs=0, source=CALIBRATED_ON)
    distilled = Calibration(
        to_batches(rows[:-4]), held_out=to_batches(rows[-4:]), distill_epochs=1.0, refine_epochs=0, source=CALIBRATED_ON
    )
    ways = {
        "plain SVD": {"method": "svd"}, "calibrated": {"method": "activation", "calibration": bare},
        "calibrated and distilled": {"method": "activation", "calibration": distilled},
    }  # fmt: skip
    if "dense" not in report["models"]:
        report["models"]["dense"] = measured(model, texts, options.work / "dense")
        common.write_json(options.output, report)
    for way, how in ways.items():
        for ratio in RATIOS:
            name = f"{way}, {ratio:g}"
            if name in report["models"]:
                continue
            converted, start = copy.deepcopy(model), time.process_time()
            plan = lowrank_ft.convert(converted, param_ratio=ratio, **how)
            row = {"way": way, "param_ratio": ratio, "cpu_seconds": round(time.process_time() - start, 1)}
            stacks = [p for p in plan.linears if p.experts]
            row["experts_ratio"] = round(sum(p.parameters for p in stacks) / sum(p.dense_parameters for p in stacks), 4)
            report["models"][name] = row | measured(converted, texts, options.work / "compact")
            common.write_json(options.output, report)
            print(name, report["models"][name], flush=True)


@torch.no_grad()
def fitted_to_few(model: Any, rows: Tensor, ratio: float = 0.6) -> dict[str, Any]:
    """Mean over experts of the squared relative error on later tokens, by how many were fitted to."""
    plan = make_plan(model, param_ratio=ratio)
    unfold_experts(model, [s.name for s in find_linears(model) if s.experts])
    received: dict[str, list[Tensor]] = {}
    hooks = []
    for name, experts in model.named_modules():
        for leaf in experts.unfolded if isinstance(experts, UnfoldedExperts) else ():
            for e, linear in enumerate(getattr(experts, leaf)):
                hook = lambda _, a, n=f"{name}.{leaf}.{e}": received.setdefault(n, []).append(a[0])  # noqa: E731
                hooks.append(linear.register_forward_pre_hook(hook))
    for ids in rows.split(4):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    found: dict[str, dict[str, list[float]]] = {}
    for name, parts in received.items():
        x = torch.cat(parts).double()
        weight, (stack, _, _) = model.get_submodule(name).weight.double(), name.rpartition(".")
        kind, rank, width = stack.rpartition(".")[2], plan.ranks[stack], x.shape[1]
        judge, fit = x[-4 * width :], x[: -4 * width]
        size = (judge @ weight.T).square().sum()

        def error(factors: Any) -> float:
            lost = judge @ (weight - factors.U.double() @ factors.V.double()).T  # noqa: B023
            return float(lost.square().sum() / size)  # noqa: B023

        rows_of = found.setdefault(kind, {})
        rows_of.setdefault("plain SVD", []).append(error(truncated_svd(weight, rank)))
        for share in SHARES:
            some = fit[: int(share * width)]
            for damping in (0.01, 1 / share) if len(some) == int(share * width) else ():
                column = f"{share:g} tokens for each input, damped by {'width / tokens' if damping > 0.01 else damping}"
                found_here = error(Regression(some.T @ some, None, damping)(weight, rank))
                rows_of.setdefault(column, []).append(found_here)
    fold_experts(model)
    return {
        kind: {k: {"error": round(sum(v) / len(v), 4), "experts": len(v)} for k, v in columns.items()}
        for kind, columns in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(parser)
    parser.add_argument("--work", type=Path, default=Path("build/moe"), help="where the trained model is kept")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "moe.json")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--eval-tokens", type=int, default=16_384, help="of each text")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def blocks(*names: str) -> Tensor:
        return common.blocks_of("\n".join(map(common.read_text, (str(DATA / n) for n in names))), tokenizer, 256)

    training = blocks(*TRAINED_ON)
    torch.set_num_threads(1)
    model = trained(options, training)
    texts = {name: blocks(name)[: options.eval_tokens // 256] for name in JUDGED_BY}
    rows = blocks(CALIBRATED_ON)[: options.tokens // 256]
    report: dict[str, Any] = {"models": {}}
    if options.output.is_file():
        report = json.loads(options.output.read_text(encoding="utf-8"))
    kept = torch.load(options.work / "training.pt")
    report |= {
        "machine": common.machine("cpu"), "origin": Path(options.model).name, "experts": EXPERTS, "chosen": CHOSEN,
        "training": {
            "steps": options.steps, "tokens": options.steps * options.batch_size * 256, "text": list(TRAINED_ON),
            "cpu_seconds": round(kept["seconds"]), "loss_first_25": round(sum(kept["losses"][:25]) / 25, 4),
            "loss_last_25": round(sum(kept["losses"][-25:]) / 25, 4),
        },
        "calibration": {"text": CALIBRATED_ON, "tokens": rows.numel()}, "eval_tokens": options.eval_tokens,
    }  # fmt: skip
    if "few_tokens" not in report:
        report["few_tokens"] = fitted_to_few(model, training[: 2 * len(rows)])
        common.write_json(options.output, report)
    convert_all(model, texts, rows, options, report)
    common.write_json(options.output, report)
    first = report["models"]["dense"]
    print_table(
        ("model", "parameters", "bytes", *(f"perplexity, {n}" for n in JUDGED_BY), "nats lost"),
        [
            (name, f"{m['parameters']:,}", f"{m['bytes']:,}", *(f"{m['perplexity'][n]:.2f}" for n in JUDGED_BY),
             f"{math.log(m['perplexity'][JUDGED_BY[0]] / first['perplexity'][JUDGED_BY[0]]):.3f}")
            for name, m in report["models"].items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()

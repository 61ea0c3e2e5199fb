"""``lowrank-ft convert``: a dense checkpoint in, a compact one out."""

import argparse
import sys
from pathlib import Path

from lowrank_ft_cli.options import device_of, dtype_of, hub_target, shard_size, size_options, source_of
from lowrank_ft_cli.plan import print_plan, refuse_compact

from lowrank_ft.console import shown_command
from lowrank_ft.conversion import METHODS, convert, spectrum_of
from lowrank_ft.errors import RankError, TargetError
from lowrank_ft.hub.export import save_compact
from lowrank_ft.hub.output import check_output_dir
from lowrank_ft.hub.push import push
from lowrank_ft.hub.source import check_finite, check_runs, first_line, load_model, skeleton
from lowrank_ft.plan import Plan, make_plan
from lowrank_ft.schedule import require_choice


def run(options: argparse.Namespace) -> None:
    source = source_of(options)
    # Everything that can be wrong is looked at before weights are read.
    require_choice("--method", options.method, tuple(METHODS))
    shard_size(options)
    check_output_dir(options.output_dir, options.overwrite, keep=source.folder)
    repo_id, device = hub_target(options), device_of(options)
    config = source.load_config()
    refuse_compact(config, source)
    sizes = size_options(options)
    plan: Plan | None = None
    if options.plan is not None:
        given = [k for k, v in sizes.items() if v]
        if given:
            raise RankError(f"--plan says everything already; leave --{given[0].replace('_', '-')} out")
        plan = Plan.load(options.plan)
    elif options.energy is None:
        plan = make_plan(skeleton(config, source.name, source.trust_remote_code), **sizes)

    model = load_model(source, dtype_of(options), device)
    check_finite(model)
    if plan is None:
        plan = make_plan(model, **sizes, spectrum=spectrum_of(model))
    print_plan(plan, to_stderr=True)
    if not plan.ranks:
        raise RankError(f"every one of the {len(plan.linears)} targeted linears stays dense; lower the rank")
    ran = check_runs(model) is None
    convert(model, plan, method=options.method, progress=True)
    if ran and (error := check_runs(model)) is not None:
        raise TargetError(
            f"{type(model).__name__} ran before the conversion and fails after it ({first_line(error)}); one of its "
            "modules reads a weight as a matrix, leave that linear dense with --exclude-modules"
        )
    save_compact(
        model.to("cpu"), options.output_dir, companions_from=source.download(), base_model=source.name,
        overwrite=options.overwrite, max_shard_size=shard_size(options),
        command=shown_command("lowrank-ft", sys.argv[1:]),
    )  # fmt: skip
    print(Path(options.output_dir))
    if repo_id is not None:
        print(push(options.output_dir, repo_id, private=options.private, token=options.token))

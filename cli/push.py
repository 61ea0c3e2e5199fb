"""``lowrank-ft push``: upload a finished folder to the Hub."""

import argparse

from lowrank_ft.checkpoints.push import push


def run(options: argparse.Namespace) -> None:
    print(
        push(
            options.folder, options.repo_id, private=options.private, revision=options.revision,
            commit_message=options.commit_message, token=options.token,
        )
    )  # fmt: skip

"""``lowrank-ft push``: upload a finished folder to the Hub."""

import argparse

HELP = "upload a finished checkpoint to the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder that convert, finetune or export wrote")
    parser.add_argument("--repo-id", required=True, help="name of the repository, such as me/llama-lowrank")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument(
        "--create-pr", action="store_true", help="open a pull request to a repository that exists, instead of a commit"
    )
    parser.add_argument("--commit-message", help="message of the commit")
    parser.add_argument("--token", help="Hub token (default: the stored one)")


def run(options: argparse.Namespace) -> None:
    from lowrank_ft.checkpoints.push import push

    print(
        push(
            options.folder, options.repo_id, private=options.private, revision=options.revision,
            commit_message=options.commit_message, create_pr=options.create_pr, token=options.token,
        )
    )  # fmt: skip

"""`parameternet publish NAME.TAG|DIR --to ORG/REPO`: put a checkpoint on the Hub."""

import click

from parameternet import hub
from parameternet.cli.output import echo, print_table


@click.command()
@click.argument("checkpoint")
@click.option("--to", "repository", required=True, help="The repository, ORG/NAME; it is made if there is none.")
@click.option("--revision", help="The branch; it is made from main if there is none.  [default: main]")
@click.option("--private", is_flag=True, help="Nobody else may see a repository that is made.")
@click.option("--dry-run", is_flag=True, help="Show what would go, and send nothing.")
@click.option("--yes", is_flag=True, help="Replace other weights without asking.")
def publish(checkpoint: str, repository: str, revision: str | None, private: bool, dry_run: bool, yes: bool) -> None:
    """Put CHECKPOINT (a name, folder, file or hf-hub:ORG/NAME) on the Hub in one commit: card, config, weights, recipe.

    Files that are there already do not go again. Log in first: hf auth login, or HF_TOKEN.
    """
    planned = hub.publish(checkpoint, repository, revision, dry_run=True)
    rows = [(file.path, f"{file.bytes:,}", file.state) for file in planned.files]
    print_table(("file", "bytes", repository), rows, right=("bytes",))
    if dry_run:
        return
    if planned.replaces_weights and not yes:
        click.confirm(f"{repository} holds other weights. Replace them?", abort=True)
    done = hub.publish(checkpoint, repository, revision, overwrite=planned.replaces_weights, private=private)
    echo(done.commit or "Nothing to commit: all of it is there already.")

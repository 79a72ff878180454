"""`parameternet publish NAME.TAG|DIR --to ORG/REPO`: put a checkpoint on the Hub."""

import click

from parameternet import hub
from parameternet.cli.output import echo, print_table


@click.command()
@click.argument("checkpoint")
@click.option("--to", "repository", required=True, help="Repository ORG/NAME; created if it does not exist.")
@click.option("--revision", help="Branch; created from main if it does not exist.  [default: main]")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and upload nothing.")
@click.option("--yes", is_flag=True, help="Replace other weights without asking.")
def publish(checkpoint: str, repository: str, revision: str | None, private: bool, dry_run: bool, yes: bool) -> None:
    """Put CHECKPOINT (a name, folder, file or hf-hub:ORG/NAME) on the Hub in one commit: card, config, weights, recipe.

    Unchanged files are not uploaded again. Log in first: hf auth login, or HF_TOKEN.
    """
    planned = hub.publish(checkpoint, repository, revision, dry_run=True)
    rows = [(file.path, f"{file.bytes:,}", file.state) for file in planned.files]
    print_table(("file", "bytes", repository), rows, right=("bytes",))
    if dry_run:
        return
    if planned.replaces_weights and not yes:
        click.confirm(f"{repository} holds other weights. Replace them?", abort=True)
    done = hub.publish(checkpoint, repository, revision, overwrite=planned.replaces_weights, private=private)
    echo(done.commit or "Nothing to commit: the repository has the same files.")

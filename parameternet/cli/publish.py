"""`parameternet publish NAME.TAG|DIR --to ORG/REPO`: publish a checkpoint on the Hub."""

import click

from parameternet import hub
from parameternet.cli.output import echo, print_table


@click.command()
@click.argument("checkpoint")
@click.option("--to", "repository", required=True, help="Repository ORG/NAME; created if it does not exist.")
@click.option("--revision", help="Branch; created from main if it does not exist.  [default: main]")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded, without uploading it.")
@click.option("--yes", is_flag=True, help="Replace different weights without asking.")
def publish(checkpoint: str, repository: str, revision: str | None, private: bool, dry_run: bool, yes: bool) -> None:
    """Upload CHECKPOINT (a name, folder, file or hf-hub:ORG/NAME) to the Hub: card, config, weights, recipe.

    The upload is a single commit and skips unchanged files. Log in first: hf auth login, or HF_TOKEN.
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

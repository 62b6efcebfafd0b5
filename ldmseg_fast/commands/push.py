"""`ldmseg push MODEL_DIR owner/name` sends a model to the Hugging Face Hub."""

from __future__ import annotations

import argparse

EXAMPLES = (
    "ldmseg push MODEL_DIR owner/name --dry-run",
    "ldmseg push MODEL_DIR owner/name --private --license apache-2.0 --dataset coco",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", help="model folder, or name of a shipped model")
    parser.add_argument("repository", metavar="owner/name", help="on the Hub; it is made where it is missing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument(
        "--revision", "--branch", default="main", help="branch (default main); a missing one is made from main"
    )
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request against main instead")
    parser.add_argument(
        "--license", metavar="ID", help="of the weights, such as apache-2.0; default what the card says"
    )
    parser.add_argument("--base-model", metavar="owner/name", help="that training started from")
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME", help="for the card; may be repeated")
    parser.add_argument("--widget", action="append", default=[], metavar="URL", help="picture to try the model on")
    parser.add_argument("--new-card", action="store_true", help="replace the model card that the repository has")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")


def run(args: argparse.Namespace) -> int:
    """Sends what has changed, prints its address, and returns 0."""
    from ldmseg_fast.checkpoints.hub_card import CardFacts
    from ldmseg_fast.checkpoints.hub_push import PushSettings, push
    from ldmseg_fast.checkpoints.shipped import resolve_model_dir

    settings = PushSettings(
        private=args.private,
        revision=args.revision,
        message=args.message,
        create_pr=args.create_pr,
        new_card=args.new_card,
        dry_run=args.dry_run,
        facts=CardFacts(args.license, args.base_model, args.dataset, args.widget),
    )
    print(push(resolve_model_dir(args.model_dir), args.repository, settings))
    return 0

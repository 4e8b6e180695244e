"""nv-embed distill: a static twin of the served model, in a folder."""

from __future__ import annotations

import argparse

from nv_embed_client.cli import Commands
from nv_embed_client.cli.texts import texts_of
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.errors import InvalidInput


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "distill",
        parents=[server],
        help="make a static model that imitates the served one",
        description="Make a folder with a static model that imitates the served one. Only making it needs the server: "
        "model2vec and sentence-transformers load it without one. The licence of the served model may bind it.",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make; it must not exist, or be empty")
    parser.add_argument(
        "--texts",
        metavar="FILE",
        help="texts like those that the twin will see, one a line; '-': the standard input; FILE.jsonl: a JSON string, "
        'or an object with "text", on each line; FILE.csv, FILE.tsv, FILE.parquet: the column "text"',
    )
    parser.add_argument("--vocabulary", metavar="FILE", help="words that the twin must know whole, one a line")
    parser.add_argument("--dimensions", type=int, default=256, help="of the twin's vectors (default: %(default)s)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Make the twin and say where it is; returns the exit code."""
    if parsed.texts is None and parsed.vocabulary is None:
        raise InvalidInput.of(expected="--texts, --vocabulary or both", got="neither", remedy="add one")
    from nv_embed_client.distill import distill, licence_note  # needs the extra

    with NVEmbedClient(parsed.url, parsed.model_name) as client:
        twin = distill(
            client,
            parsed.out,
            texts_of(parsed.texts) if parsed.texts else (),
            vocabulary=texts_of(parsed.vocabulary) if parsed.vocabulary else (),
            dimensions=parsed.dimensions,
            progress=True,
        )
    print(f"{parsed.out}: {twin}")
    print(licence_note(parsed.model_name))
    return 0

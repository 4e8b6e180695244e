"""nv-embed load: what a bulk job made, into LanceDB."""

from __future__ import annotations

import argparse
import sys

from nv_embed_client.cli import Commands
from nv_embed_client.extras import needs_extra


def add_to(commands: Commands) -> None:
    """Add the subcommand, which needs no server."""
    parser = commands.add_parser(
        "load",
        help="put what bulk made into LanceDB",
        description="Put what nv-embed bulk made into a table of LanceDB, in place of rows with the same ids. Doing it "
        "twice changes nothing.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="of nv-embed bulk, finished")
    parser.add_argument("folder", metavar="FOLDER", help="of LanceDB; made if it is not there")
    parser.add_argument("--table", default="texts", metavar="NAME", help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Load and say what is there; returns the exit code."""
    with needs_extra("bulk"):
        from nv_embed_client.bulk.lance import load

    try:
        done = load(parsed.output, parsed.folder, parsed.table, progress=sys.stderr.isatty())
    except OSError as error:
        print(f"nv-embed: {error}; the same command continues", file=sys.stderr)
        return 1
    print(
        f"{parsed.folder}: {done.num_rows} rows in {parsed.table}; {done.num_inserted} are new, {done.num_updated} "
        "were there"
    )
    return 0

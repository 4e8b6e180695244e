"""nv-embed bulk: a corpus to vectors in Parquet, on one machine or a cluster of Ray."""

from __future__ import annotations

import argparse
import sys

from nv_embed_client.bulk import PATIENCE_SECONDS, ROWS_PER_FILE, WORKERS
from nv_embed_client.cli import Commands
from nv_embed_client.embedding_type import EMBEDDING_TYPES
from nv_embed_client.errors import NVEmbedError
from nv_embed_client.extras import needs_extra


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "bulk",
        parents=[server],
        help="embed a corpus into Parquet; may be killed and started again at any time",
        description="Embed a corpus into Parquet, with Ray. The same command continues what was killed, and leaves "
        "what is finished as it is. Texts that fail are listed in OUTPUT/_failed/. docs/scale.md says more.",
    )
    parser.add_argument(
        "input", metavar="INPUT", help="a file or a folder of .parquet, .jsonl, .csv or .txt, or its address"
    )
    parser.add_argument("output", metavar="OUTPUT", help="a folder or an address, such as s3://bucket/folder")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument(
        "--id-column", metavar="NAME", help="unique strings or integers; without it, ids are made of file and row"
    )
    parser.add_argument("--embedding-type", default="float", choices=EMBEDDING_TYPES, help="(default: float)")
    parser.add_argument("--instruction", metavar="TEXT", help="stands before each text, in place of the model's prompt")
    parser.add_argument(
        "--rows-per-file", type=int, default=ROWS_PER_FILE, metavar="N", help="of OUTPUT, and of what a kill may cost "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster, or 'auto'; without it, this machine")
    parser.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N", help="that send requests; two or more for each server "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=float, default=PATIENCE_SECONDS, metavar="SECONDS", help="how long a server may be away "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Embed and say what is there; returns the exit code."""
    with needs_extra("bulk"):
        from nv_embed_client.bulk.job import embed_corpus
        from nv_embed_client.bulk.plan import Wish

    wish = Wish(
        parsed.input,
        parsed.text_column,
        parsed.id_column,
        parsed.embedding_type,
        parsed.instruction,
        parsed.rows_per_file,
    )
    try:
        done = embed_corpus(
            wish,
            parsed.output,
            url=parsed.url,
            model_name=parsed.model_name,
            ray_address=parsed.ray_address,
            workers=parsed.workers,
            patience_seconds=parsed.patience,
            progress="bar" if sys.stderr.isatty() else "lines",
        )
    except NVEmbedError:
        raise
    except OSError as error:
        print(f"nv-embed: {error}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nv-embed: stopped; the same command continues", file=sys.stderr)
        return 130
    print(f"{parsed.output}: {done.num_rows} vectors, {done.num_before} texts were done before")
    if done.num_tokens:
        rate = done.num_tokens / done.seconds
        print(f"{done.num_tokens:,} tokens in {done.seconds:.0f} s: {rate:,.0f} tokens/s")
    if done.num_failed:
        print(f"{parsed.output}/_failed: {done.num_failed} texts that have no vector, and why")
    return 0

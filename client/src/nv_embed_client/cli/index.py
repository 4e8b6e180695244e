"""nv-embed index: a folder of text files, ready to be searched."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from nv_embed_client.cli import Commands
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.outcome import AHEAD, Embedder
from nv_embed_client.retry import PATIENT

DEFAULT_STORE = ".nv-embed"


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "index",
        parents=[server],
        help="embed the text files of a folder, to search them",
        description="Embed the passages of text files, and keep them in a folder that nv-embed search reads. Another "
        "run embeds only what has changed, and removes what is gone. Hidden and binary files are left out. "
        "The exit code is 1 if a file or a passage failed.",
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", help="folders and files")
    add_store(parser)
    parser.set_defaults(run=run)


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where an index is."""
    parser.add_argument(
        "--store", default=DEFAULT_STORE, metavar="FOLDER", help="where the index is (default: %(default)s)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Bring the index up to date and say what was done; returns the exit code."""
    from nv_embed_client.index import Store, TextFiles, index  # needs the extra

    files = TextFiles(parsed.paths, parsed.store)
    with NVEmbedClient(parsed.url, parsed.model_name) as client:
        info = client.model_info()
    with (
        Store.to_index(parsed.store, info) as store,
        ThreadPoolExecutor(AHEAD) as pool,
        NVEmbedClient(parsed.url, parsed.model_name, retry=PATIENT) as client,
        tqdm(unit=" passages", disable=None) as bar,  # None: shown on a terminal only
    ):
        summary = index(store, files, Embedder(client, info, embedding_type="float16"), pool, bar.update)
    for error in files.unread.values():
        print(f"nv-embed: {error}", file=sys.stderr)
    for place, failure in summary.failures:
        print(f"nv-embed: {place}: {failure}", file=sys.stderr)
    print(
        f"files: {summary.files:,}; passages: {summary.embedded:,} embedded, {summary.copied:,} copied, "
        f"{summary.unchanged:,} unchanged, {summary.removed:,} removed, {len(summary.failures):,} failed"
    )
    if summary.split:
        print(f"too long for the model, so stored in parts: {summary.split:,}")
    print(f"left out: {files.num_hidden:,} hidden, {files.num_binary:,} not text, {len(files.unread):,} unreadable")
    return 1 if files.unread or summary.failures else 0

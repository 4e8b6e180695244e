"""nv-embed search: the passages of an index that answer a question."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import orjson

from nv_embed_client.cli import Commands
from nv_embed_client.cli.index import add_store
from nv_embed_client.cli.instruction import add_instruction, instruction_in
from nv_embed_client.cli.printing import one_line, place, warn_of_cut
from nv_embed_client.cli.texts import text_argument
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.errors import InvalidInput


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "search",
        parents=[server],
        help="search what was indexed",
        description="Print the passages of an index that fit a question best: score, place and text, a line for each.",
    )
    parser.add_argument("question", metavar="QUESTION", nargs="+", type=text_argument, help="one or more words")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="passages to print (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON lines: score, file, line, text")
    add_store(parser)
    add_instruction(parser)
    parser.set_defaults(run=run, query=True)


def run(parsed: argparse.Namespace) -> int:
    """Search and print; returns the exit code."""
    if parsed.top < 1:
        raise InvalidInput.of(expected="--top of at least 1", got=str(parsed.top), remedy="correct it")
    instruction = instruction_in(parsed)
    from nv_embed_client.index import Store  # needs the extra

    with NVEmbedClient(parsed.url, parsed.model_name) as client:
        store = Store(parsed.store, client.model_info())
        query = client.embed(
            [" ".join(parsed.question)], input_type="query", instruction=instruction, is_truncated=True
        )
    warn_of_cut(query)
    for hit in store.search(query.embeddings[0], parsed.top):
        if parsed.json:
            sys.stdout.buffer.write(orjson.dumps(asdict(hit), option=orjson.OPT_APPEND_NEWLINE))
        else:
            start = f"{hit.score:6.3f}  {place(hit.file, hit.line)}  "
            print(start + one_line(hit.text, len(start)))
    return 0

"""nv-embed compare: how similar a few texts are."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import orjson

from nv_embed_client.cli import Commands
from nv_embed_client.cli.instruction import add_instruction, instruction_in
from nv_embed_client.cli.printing import one_line, warn_of_cut
from nv_embed_client.cli.texts import text_argument, texts_of
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.errors import InvalidInput


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "compare",
        parents=[server],
        help="compare a few texts",
        description="Print the cosine of each two texts. With --query the first text is a question, and the others are "
        "printed with their scores, the best first.",
    )
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", type=text_argument, help="two or more, with those of --file"
    )
    parser.add_argument("--file", metavar="FILE", help="of more texts, as nv-embed embed reads it; a text on each line")
    parser.add_argument("--query", action="store_true", help="the first text is a query")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of scores for each text, in order")
    add_instruction(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compare and print; returns the exit code."""
    texts: list[str] = parsed.texts + (list(texts_of(parsed.file)) if parsed.file is not None else [])
    if len(texts) < 2:
        raise InvalidInput.of(
            expected="two or more texts", got="one" if texts else "none", remedy="add another, each in quotes"
        )
    if parsed.instruction is not None and not parsed.query:
        raise InvalidInput.of(
            expected="--query beside --instruction", got="--instruction alone", remedy="add --query, or leave it out"
        )
    instruction = instruction_in(parsed)
    with NVEmbedClient(parsed.url, parsed.model_name) as client:
        if parsed.query:
            query = client.embed(texts[:1], input_type="query", instruction=instruction, is_truncated=True)
            texts = texts[1:]
            documents = client.embed(texts, is_truncated=True)
            warn_of_cut(query, documents)
            scores = query.embeddings @ documents.embeddings.T
        else:
            documents = client.embed(texts, is_truncated=True)
            warn_of_cut(documents)
            scores = documents.embeddings @ documents.embeddings.T
    if parsed.json:
        rows = scores[0] if parsed.query else scores
        options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        sys.stdout.buffer.write(orjson.dumps(np.ascontiguousarray(rows), option=options))
    elif parsed.query:
        for i in np.argsort(-scores[0], kind="stable"):
            print(f"{scores[0, i]:6.3f}  {one_line(texts[i], 8)}")
    else:
        width = len(str(len(texts)))
        print(" " * width + "".join(f"{number:8}" for number in range(1, len(texts) + 1)))
        for number, (row, text) in enumerate(zip(scores, texts, strict=True), 1):
            start = f"{number:{width}}" + "".join(f"{score:8.3f}" for score in row) + "  "
            print(start + one_line(text, len(start)))
    return 0

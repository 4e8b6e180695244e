"""nv-embed embed: the vectors of a file's texts, in a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from nv_embed_client.cli import Commands
from nv_embed_client.cli.instruction import add_instruction, instruction_in
from nv_embed_client.cli.outputs import Output, partial_path_of
from nv_embed_client.cli.row import Rows
from nv_embed_client.cli.rows import FORMATS, OF_SUFFIXES, format_of, num_rows_of, rows_of
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.columns import ADDED
from nv_embed_client.embedding_type import EMBEDDING_TYPES
from nv_embed_client.errors import InvalidInput, NVEmbedError
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.outcome import AHEAD, Embedder, in_order
from nv_embed_client.retry import PATIENT

_DEFAULT_ENDINGS = {"lines": ".npy", "jsonl": ".jsonl", "csv": ".parquet", "tsv": ".parquet", "parquet": ".parquet"}


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "embed",
        parents=[server],
        help="embed the texts of a file",
        description="Embed each text of a file. A text that fails is named on the standard error, and keeps its row: "
        "null in .jsonl, NaN (0 in types without it) in .npy and .parquet. The exit code is then 1.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="texts: FILE.jsonl (also .ndjson, .json), FILE.csv, FILE.tsv, FILE.parquet, any other file with a text on "
        "each line, or '-', the standard input",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help="OUT.npy, OUT.jsonl, OUT.parquet, or '-', JSON lines on the standard output (default: '-' for '-', else "
        "FILE.embeddings with .npy for lines, .jsonl for .jsonl, and .parquet)",
    )
    parser.add_argument("--format", choices=FORMATS, help="of the input (default: as its name says; '-' has lines)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of the texts (default: %(default)s)")
    parser.add_argument("--query", action="store_true", help="the texts are queries and not documents")
    add_instruction(parser)
    parser.add_argument(
        "--embedding-type", choices=EMBEDDING_TYPES, default="float", help="of the vectors (default: %(default)s)"
    )
    parser.add_argument(
        "--truncate", choices=("END", "NONE"), default="END",
        help="cut texts that are too long, or refuse them (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Embed the file; returns the exit code, 1 if a text failed."""
    instruction = instruction_in(parsed)
    format = parsed.format or format_of(parsed.file)
    out = parsed.out or _default_out(parsed.file, format)
    if parsed.file == "-" and format == "parquet":
        raise InvalidInput.of(expected="a file of Parquet", got="the standard input", remedy="write it to a file first")
    for written in () if out == "-" else (out, partial_path_of(out)):
        if os.path.exists(written) and os.path.exists(parsed.file) and os.path.samefile(written, parsed.file):
            raise InvalidInput.of(
                expected="another file to write than the input", got=repr(written), remedy="change --out"
            )
    with NVEmbedClient(parsed.url, parsed.model_name) as client:
        info = client.model_info()
    counts: Counter[str] = Counter()
    with (
        ThreadPoolExecutor(AHEAD) as pool,
        NVEmbedClient(parsed.url, parsed.model_name, retry=PATIENT) as client,
        # None: shown on a terminal only.
        tqdm(total=None, unit=" texts", disable=None) as bar,
    ):
        embedder = Embedder(
            client,
            info,
            input_type="query" if parsed.query else "passage",
            instruction=instruction,
            truncate=parsed.truncate,
            embedding_type=parsed.embedding_type,
        )
        if not bar.disable:
            bar.reset(num_rows_of(parsed.file, format))
        rows_with_outcomes = in_order(
            pool, lambda rows: embedder.outcome(rows.texts), _checked(rows_of(parsed.file, parsed.text_column, format))
        )
        with Output(out, embedder.width, embedder.dtype, _metadata(info, parsed, instruction)) as output:
            try:
                for rows, outcome in rows_with_outcomes:
                    for position, error in sorted(outcome.errors.items()):
                        place = rows.places[position]
                        message = str(error) if place in str(error) else f"{place}: {error}"
                        tqdm.write(f"nv-embed: {message}", file=sys.stderr)
                    output.write(rows, outcome)
                    counts["failed"] += len(outcome.errors)
                    counts["cut"] += int(outcome.is_truncated.sum())
                    bar.update(len(rows.texts))
            except (NVEmbedError, KeyboardInterrupt):
                if out != "-" and output.num_rows:
                    tqdm.write(f"nv-embed: {output.partial_path} has the first {output.num_rows} rows", file=sys.stderr)
                raise
    where = "" if out == "-" else f" in {out}"
    print(
        f"nv-embed: rows{where}: {output.num_rows:,}, failed: {counts['failed']:,}, cut: {counts['cut']:,}",
        file=sys.stderr,
    )
    return 1 if counts["failed"] else 0


def _default_out(path: str, format: str) -> str:
    if path == "-":
        return "-"
    stem = Path(path).with_suffix("") if Path(path).suffix in (".txt", *OF_SUFFIXES) else path
    return f"{stem}.embeddings{_DEFAULT_ENDINGS[format]}"


def _checked(parts: Iterator[Rows]) -> Iterator[Rows]:
    """The same rows, if the new columns find room beside theirs."""
    for rows in parts:
        if taken := rows.names.intersection(ADDED):
            raise InvalidInput.of(
                expected=f"columns other than {', '.join(ADDED)}, which the output adds",
                got=f"{', '.join(sorted(taken))} from {rows.places[0]} on",
                remedy="rename or remove them",
            )
        yield rows


def _metadata(info: ModelInfo, parsed: argparse.Namespace, instruction: str | None) -> dict[str, str]:
    if instruction is None:
        instruction = info.query_prompt if parsed.query else info.document_prompt
    about = asdict(info.identity) | {"embedding_type": parsed.embedding_type, "instruction": instruction}
    return {"nv_embed": json.dumps(about, ensure_ascii=False)}

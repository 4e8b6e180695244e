"""nv-embed: what the client does, from a shell."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from nv_embed_client.cli import bulk, compare, distill, embed, index, load, search, status
from nv_embed_client.connection import DEFAULT_MODEL_NAME, DEFAULT_URL
from nv_embed_client.errors import InvalidInput, NVEmbedError, Unavailable

URL_VARIABLE = "TRITON_URL"
_CLOSED_PIPE = 141  # as a shell names the end by SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one subcommand. Returns the exit code: 0, 2 for what the caller can mend, 1 for any other failure."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Whatever the locale. Names of files may have any bytes.
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if words[:1] == ["gateway"]:  # it parses its own arguments, as `nv-embed-gateway` does
            from nv_embed_client.gateway.__main__ import main as serve

            return serve(words[1:])
        parsed = _parser().parse_args(words)
        try:
            code: int = parsed.run(parsed)
            sys.stdout.flush()
            return code
        except Unavailable as error:
            raise Unavailable(
                f"expected a server at {parsed.url}; got: {error}; start it, or give another address with --url or "
                f"{URL_VARIABLE}: its gRPC port, by default 8001 (8000 is HTTP)"
            ) from error
    except (NVEmbedError, ModuleNotFoundError) as error:
        print(f"nv-embed: {error}", file=sys.stderr)
        return 2 if isinstance(error, (InvalidInput, ModuleNotFoundError)) else 1
    except BrokenPipeError:
        # Whoever read has read enough, as `head` does. What Python flushes at its end must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except OSError as error:
        print(
            f"nv-embed: expected files that can be read and written; got {error}; correct that, and try again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    """Each subcommand adds its parser, whose default `run` maps the parsed arguments to an exit code."""
    parser = argparse.ArgumentParser(prog="nv-embed", description="A served embedding model, from a shell.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--url",
        default=os.environ.get(URL_VARIABLE, DEFAULT_URL),
        help="the server's gRPC address; separate several with commas; dns:///host:port means every server behind "
        f"that name; default: ${URL_VARIABLE}, else {DEFAULT_URL}",
    )
    server.add_argument("--model-name", default=DEFAULT_MODEL_NAME, help="as Triton knows it (default: %(default)s)")
    for command in (embed, index, search, compare, status, bulk, distill):
        command.add_to(commands, server)
    load.add_to(commands)
    commands.add_parser("gateway", add_help=False, help="serve OpenAI's embeddings API, as nv-embed-gateway does")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""nv-embed-gateway: the OpenAI-style door as a process."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

import uvicorn

from nv_embed_client.connection import TLS
from nv_embed_client.errors import InvalidInput
from nv_embed_client.gateway.app import create_app
from nv_embed_client.gateway.settings import GatewaySettings

API_KEY_VARIABLE = "GATEWAY_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; requests on their way are answered first. Returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        settings = _settings(parsed)
        # A browser cannot open 0.0.0.0 everywhere.
        app = create_app(settings, f"http://{parsed.host.replace('0.0.0.0', 'localhost')}:{parsed.port}/")
    except InvalidInput as error:
        print(f"nv-embed-gateway: {error}", file=sys.stderr)
        return 2
    if settings.api_key is None and parsed.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"nv-embed-gateway: no {API_KEY_VARIABLE}: anybody who reaches {parsed.host} may use it", file=sys.stderr)
    # When uvicorn is done it raises the signal again for whoever handled it before: that must be nobody's end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    logging.getLogger("uvicorn.error").addFilter(_is_no_upgrade)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            # With httptools, which uvicorn prefers where it is installed, a request that offers an upgrade (the JDK's
            # client offers h2c) loses its body.
            http="h11",
            ws="none",
            host=parsed.host,
            port=parsed.port,
            access_log=parsed.access_log,
            timeout_keep_alive=75,  # longer than clients and proxies keep idle connections: let them close first
            timeout_graceful_shutdown=int(settings.request_timeout_seconds) + 1,
        )
    )
    server.run()
    return 0 if server.started else 1


def _is_no_upgrade(record: logging.LogRecord) -> bool:
    """Whether a line is worth logging: clients may offer an upgrade with each request, and need none."""
    return not str(record.msg).startswith(("Unsupported upgrade request", "No supported WebSocket library"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nv-embed-gateway",
        description="OpenAI's embeddings API in front of NV-Embed-v2 and other models on Triton.",
        epilog=f"{API_KEY_VARIABLE} in the environment is the key that clients must send as a bearer token; "
        "without it anybody may ask.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = GatewaySettings()
    parser.add_argument(
        "--triton-url",
        default=defaults.triton_url,
        help="Triton's gRPC address; several with commas, or dns:///host:port",
    )
    parser.add_argument("--triton-tls", action="store_true", help="connect to Triton with TLS")
    parser.add_argument("--triton-root-certificates", help="PEM file of who may have signed its certificate")
    parser.add_argument("--triton-private-key", help="PEM file, for mutual TLS")
    parser.add_argument("--triton-certificate-chain", help="PEM file, for mutual TLS")
    parser.add_argument(
        "--triton-header", action="append", default=[], metavar="NAME=VALUE", help="sent with every request to Triton"
    )
    parser.add_argument(
        "--model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="as Triton knows it, and as clients ask for it; the first is meant where a request names none; without "
        f"this option {defaults.default_model}",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=9000, help="port to listen on")
    parser.add_argument(
        "--request-timeout", type=float, default=defaults.request_timeout_seconds, help="seconds for one request"
    )
    parser.add_argument("--max-body-bytes", type=int, default=defaults.max_body_bytes, help="of one request")
    parser.add_argument("--max-inputs", type=int, default=defaults.max_inputs, help="texts of one request")
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a further name of the model; VALUE: a known name, as nv-embed-v2-query, or an instruction, as "
        "'Instruct: ...\\nQuery: '; with several models 'MODEL=Instruct: ...\\nQuery: '",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages in a browser may ask, as https://example.org; '*': all",
    )
    parser.add_argument(
        "--ignore-unknown-fields", action="store_true", help="of requests, instead of refusing the requests"
    )
    parser.add_argument("--access-log", action="store_true", help="log a line for each request")
    return parser


def _settings(parsed: argparse.Namespace) -> GatewaySettings:
    headers = {}
    for header in parsed.triton_header:
        name, separator, value = header.partition("=")
        if not separator:
            raise InvalidInput.of(expected="--triton-header NAME=VALUE", got="no '='", remedy="add it")
        headers[name] = value
    certificates = (parsed.triton_root_certificates, parsed.triton_private_key, parsed.triton_certificate_chain)
    if any(certificates) and not parsed.triton_tls:
        raise InvalidInput.of(
            expected="--triton-tls beside certificates", got="certificates alone", remedy="add it, or leave them out"
        )
    tls = TLS(*certificates) if parsed.triton_tls else None
    return GatewaySettings(
        triton_url=parsed.triton_url,
        triton_tls=tls,
        triton_headers=headers,
        model_names=tuple(parsed.model_name) or GatewaySettings().model_names,
        api_key=os.environ.get(API_KEY_VARIABLE),
        request_timeout_seconds=parsed.request_timeout,
        max_body_bytes=parsed.max_body_bytes,
        max_inputs=parsed.max_inputs,
        aliases=tuple(parsed.alias),
        cors_origins=tuple(parsed.cors_origin),
        ignore_unknown_fields=parsed.ignore_unknown_fields,
    )


if __name__ == "__main__":
    sys.exit(main())

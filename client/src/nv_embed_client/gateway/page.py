"""/: the page to try the models on, and the policy that lets a browser run its script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

import orjson
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from nv_embed_client.gateway.settings import GatewaySettings
from nv_embed_client.instructions import TASK_INSTRUCTIONS

_FACTS = '<script type="application/json" id="facts">{}</script>'  # in page.html, to be filled in


def add_to(app: FastAPI, settings: GatewaySettings) -> None:
    """Answer GET at /."""
    source = resources.files("nv_embed_client.gateway").joinpath("page.html").read_text("utf-8")
    assert source.count(_FACTS) == 1
    # "<" could end the element. JSON has it nowhere but in strings, and there it may be written so.
    facts = orjson.dumps(_facts(settings)).decode().replace("<", "\\u003c")
    html = source.replace(_FACTS, _FACTS.replace("{}", facts))
    headers = {
        "Content-Security-Policy": _policy(source),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", summary="A page that ranks texts", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """For people: ranks passages for a question, and shows what an instruction changes."""
        return HTMLResponse(html, headers=headers)


def _facts(settings: GatewaySettings) -> dict[str, object]:
    """What the page knows before it asks, so nothing that a key protects.

    Names of other machines stay here: the page says where Triton is only if that is the gateway's machine.
    """
    host, _, port = settings.triton_url.rpartition(":")
    is_one = "," not in settings.triton_url
    is_here = is_one and (host in ("localhost", "[::1]") or host.startswith("127.")) and settings.triton_tls is None
    return {"tasks": dict(TASK_INSTRUCTIONS), "grpc_port": int(port) if is_here else None}


def _policy(source: str) -> str:
    """The Content-Security-Policy: this style, this script, this origin. No text becomes HTML."""

    def hash_of(tag: str) -> str:
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hash_of('script')}",
            f"style-src {hash_of('style')}",
            "connect-src 'self'",
            "img-src data:",  # the icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )

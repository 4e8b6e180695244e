"""/docs: the OpenAPI page for people, as HTML that loads nothing: no script, no font, no picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

# A browser that is told so loads nothing, whatever the page says.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem;
       color-scheme: light dark }
h2 { margin-top: 2.5rem; border-bottom: 1px solid gray } code, pre { font-family: ui-monospace, monospace }
pre { padding: .75rem; border: 1px solid gray; overflow-x: auto } td, th { text-align: left; vertical-align: top;
       padding: .25rem 1rem .25rem 0 }
"""


def html(page: Mapping[str, Any]) -> str:
    """The whole page, from what /openapi.json says."""
    return "\n".join(_lines(page))


def _lines(page: Mapping[str, Any]) -> Iterator[str]:
    title = escape(page["info"]["title"])
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(page['info']['description'])} "
    yield 'For programs: <a href="openapi.json">openapi.json</a>.</p>'
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation['summary'])}. {escape(operation['description'])}</p>"
            if (body := operation.get("requestBody")) is not None:
                schema = _resolved(body["content"]["application/json"]["schema"], page)
                yield "<table><tr><th>Field<th>Value<th>Meaning</tr>"
                for name, field in schema["properties"].items():
                    needed = " (required)" if name in schema["required"] else ""
                    yield f"<tr><td><code>{escape(name)}</code>{needed}<td>{escape(_kind(field))}"
                    yield f"<td>{escape(field.get('description', ''))}</tr>"
                yield "</table>"
                sent = f'{{"{schema["required"][0]}": ["a text", "another"]}}'
                command = f"curl http://localhost:9000{path} -H 'Content-Type: application/json' -d '{sent}'"
                yield f"<pre>{escape(command)}</pre>"
            yield "<table>"
            for status, answer in operation["responses"].items():
                yield f"<tr><td><code>{status}</code><td>{escape(answer['description'])}</tr>"
            yield "</table>"
    yield "</body></html>"


def _resolved(schema: Mapping[str, Any], page: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _kind(field: Mapping[str, Any]) -> str:
    """What a field may hold, in words."""
    if "anyOf" in field:
        return " or ".join(_kind(alternative) for alternative in field["anyOf"])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    return f"list of {_kind(field['items'])}" if field["type"] == "array" else str(field["type"])

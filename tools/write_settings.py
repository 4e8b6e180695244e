"""Writes the declarations of nv_embed/settings.py into config.pbtxt, docs/settings.md and the Helm chart's schema.

Run it after a change of a declaration: python tools/write_settings.py [ROOT]. ROOT is the repository's root.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "model_repository" / "nv-embed-v2" / "1"))

from nv_embed.settings import DECLARED  # noqa: E402

_BEGIN = "tools/write_settings.py writes all lines below from 1/nv_embed/settings.py.\n\n"
_TABLE_BEGIN = "<!-- tools/write_settings.py writes this table from nv_embed/settings.py. -->\n\n"
_TABLE_END = "\n<!-- The table ends here. -->\n"
_OF_THE_CHART = ("model_path", "device")  # which it sets from `weights` and `gpus`


def parameters() -> str:
    """The parameters of config.pbtxt, each below its meaning."""
    parts = []
    for name, setting in DECLARED.items():
        comment = textwrap.fill(
            setting.meaning.replace("`", ""), width=120, initial_indent="# ", subsequent_indent="# ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        parts.append(f'{comment}\nparameters {{ key: "{name}" value {{ string_value: "{setting.default}" }} }}\n')
    return "".join(parts)


def table() -> str:
    """The table of docs/settings.md."""
    rows = [
        f"| `{name}` | `{setting.default}` | {setting.unit} | {setting.meaning} |"
        for name, setting in DECLARED.items()
    ]  # fmt: skip
    return "\n".join(["| parameter | default | unit | meaning |", "|---|---|---|---|", *rows, ""])


def with_settings(schema: str) -> str:
    """The schema of the chart's values, with the settings that users may give there."""
    values = json.loads(schema)
    values["properties"]["settings"]["properties"] = {
        name: {"type": ["string", "integer"], "description": f"{setting.meaning} Default: {setting.default}."}
        for name, setting in DECLARED.items()
        if name not in _OF_THE_CHART
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else REPO
    for path, begin, text, end in (
        (root / "model_repository" / "nv-embed-v2" / "config.pbtxt", _BEGIN, parameters(), ""),
        (root / "docs" / "settings.md", _TABLE_BEGIN, table(), _TABLE_END),
    ):
        before, mark, rest = path.read_text(encoding="utf-8").partition(begin)
        if not mark or end not in rest:
            sys.exit(f"{path}: expected {begin + end!r}; got a file without these lines; put them back")
        after = rest[rest.index(end) + len(end) :] if end else ""
        path.write_text(before + begin + text + end + after, encoding="utf-8")
    schema = root / "deploy" / "helm" / "nv-embed" / "values.schema.json"
    schema.write_text(with_settings(schema.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The documentation says what is true: tables are complete, files exist, links lead somewhere, logs look as shown.

Its examples run in test/client/test_readme.py, where the client is installed.
"""

from __future__ import annotations

import re
import subprocess

import pytest
from nv_embed.metrics import Metric
from serving import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "client" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
VARIABLE = re.compile(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`)? ?\|", re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_every_page_is_linked_from_the_readme():
    for page in ROOT.glob("docs/*.md"):
        assert f"](docs/{page.name}" in text_of("README.md"), page.name


def test_every_metric_is_documented_as_it_is_declared():
    rows = re.findall(r"^\| `nv_embed_.*$", text_of("docs/operations.md"), re.MULTILINE)
    assert rows == [f"| `{metric.metric_name}` | {metric.kind} | {metric.description} |" for metric in Metric]


def test_promql_asks_for_series_that_exist():
    series = {metric.metric_name for metric in Metric}
    for metric in Metric:
        if metric.kind == "histogram":
            series |= {f"{metric.metric_name}_{part}" for part in ("bucket", "sum", "count")}
    queries = re.findall(r"```promql\n(.*?)```", text_of("docs/operations.md"), re.DOTALL)
    assert queries
    for query in queries:
        names = re.findall(r"nv_embed_\w+", query)
        assert names, query
        assert set(names) <= series, query


def test_every_variable_of_serve_sh_is_documented_with_its_default():
    lines = re.findall(r"^([A-Z_]+)=\$\{\1:-(.*)\}(?: *#.*)?$", text_of("serve.sh"), re.MULTILINE)
    assert lines
    declared = {}
    for name, default in lines:  # what comes later depends on what was set
        declared.setdefault(name, "" if default.startswith("${") else default)
    assert dict(VARIABLE.findall(text_of("docs/settings.md"))) == declared


def test_the_file_tree_lists_files_that_exist_and_every_room_of_the_repository():
    (tree,) = re.findall(r"## Files\n\n```text\n(.*?)```", text_of("README.md"), re.DOTALL)
    folders, listed = [], set()
    for line in tree.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+)  .*", line).groups()
        folders[len(indent) // 2 :] = [name]
        path = ROOT.joinpath(*folders)
        assert path.exists(), path
        listed.add(path)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    rooms = {ROOT / name.partition("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    rooms |= {(ROOT / name).parent for name in tracked if "/nv_embed/" in name}
    for room in rooms:
        assert any(room in (path, *path.parents) for path in listed), room


def test_a_started_server_prints_what_the_readme_shows(mini_server):
    (shown,) = re.findall(r"A started server\s+prints.*?```text\n(.*?)```", text_of("README.md"), re.DOTALL)
    printed = {masked(line) for line in mini_server.log_text().splitlines()}
    for line in shown.splitlines():
        assert masked(line) in printed


def masked(line: str) -> str:
    """A line of the log without what differs between starts and machines."""
    return re.sub(r"\d+", "#", line)

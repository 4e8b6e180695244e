"""The README says what is true: its Python runs and prints what it shows, its tables are complete, its files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from nv_embed.metrics import Metric
from nv_embed.settings import ServingConfig
from serving import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCORE = re.compile(r" *-?\d\.\d{3}")


def test_the_session_prints_what_the_readme_shows(mini_server):
    sessions = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    assert sessions
    for code, shown in sessions:
        assert "localhost:8001" in code
        command = [sys.executable, "-W", "error", "-c", code.replace("localhost:8001", mini_server.url)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
        assert SCORE.sub("#", printed) == SCORE.sub("#", shown)
        for ours, theirs in zip(SCORE.findall(printed), SCORE.findall(shown), strict=True):
            assert float(ours) == pytest.approx(float(theirs), abs=0.002)


def test_every_python_block_is_part_of_a_session_that_runs():
    assert README.count("```python") == len(re.findall(r"```python\n.*?```\n\n```text\n", README, re.DOTALL))


def test_every_parameter_metric_and_setting_is_documented():
    for field in fields(ServingConfig):
        assert f"`{field.name}`" in README
    for metric in Metric:
        assert f"| `{metric.metric_name}` | {metric.kind} | {metric.description} |" in README
    script = (ROOT / "serve.sh").read_text(encoding="utf-8")
    for setting in re.findall(r"^([A-Z_]+)=\$\{\1:-", script, re.MULTILINE):
        assert f"`{setting}`" in README, setting


def test_the_file_tree_lists_files_that_exist_and_every_module_of_the_model():
    (tree,) = re.findall(r"## Files\n\n```text\n(.*?)```", README, re.DOTALL)
    folders, listed = [], set()
    for line in tree.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+)  .*", line).groups()
        folders[len(indent) // 2 :] = [name]
        path = ROOT.joinpath(*folders)
        assert path.exists(), path
        listed.add(path)
    package = ROOT / "model_repository" / "nv-embed-v2" / "1" / "nv_embed"
    assert {path for path in package.glob("*.py") if path.name != "__init__.py"} <= listed


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target

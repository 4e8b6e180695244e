"""Every example of the documentation does what it says: run in order, with the output that stands below it."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, eventually, is_computing
from nv_embed_client import NVEmbedEncoder
from nv_embed_client.gateway.__main__ import _parser
from nv_embed_client.gateway.names import names_of

CLIENT_README = REPO / "client" / "README.md"
# The recipes need packages that this environment does not have.
PAGES = [
    page for page in (REPO / "README.md", CLIENT_README, *sorted(REPO.glob("docs/*.md"))) if page.stem != "recipes"
]
NUMBER = re.compile(r"-?\d+\.\d*")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n\n?(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
SESSION = re.compile(r"^```console\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*\n(?:> .*\n)*)((?:(?!\$ ).*\n)*)", re.MULTILINE)


def examples(page: Path) -> list[tuple[str, str, str]]:
    """(language, source, expected output) in order: all Python, and what asks a server. The rest of bash only starts
    or installs something."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [block for block in blocks if block[0] == "python" or block[1].startswith("curl -s ")]


def assert_same_output(got: str, expected: str) -> None:
    """Equal but for spaces, and for numbers with a fraction, which may differ a little between processors."""
    assert NUMBER.sub("#", got).split() == NUMBER.sub("#", expected).split(), got
    for one, other in zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True):
        assert float(one) == pytest.approx(float(other), abs=0.03), got


def commands(page: Path) -> list[tuple[str, str]]:
    """(command, expected output) of the page's sessions in a shell, in order."""
    sessions = SESSION.findall(page.read_text(encoding="utf-8"))
    found = [command for session in sessions for command in COMMAND.findall(session)]
    assert sum(map(len, sessions)) == sum(len("$ " + source + output) for source, output in found)
    return [(source.replace("\n> ", "\n"), output) for source, output in found]


def run(language: str, source: str, page: Path, namespace: dict[str, object]) -> str:
    if language == "bash":
        return subprocess.run(["bash", "-c", source], capture_output=True, text=True, check=True, timeout=60).stdout
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, str(page), "exec"), namespace)
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_example_runs_and_prints_what_stands_below_it(page, server, gateway, default_checkpoint):
    namespace: dict[str, object] = {}
    addresses = {"localhost:8000": f"localhost:{server.http}", "localhost:8001": server.url}
    addresses |= {"localhost:8002": f"localhost:{server.metrics}", "http://localhost:9000": gateway}
    for language, source, expected in examples(page):
        assert expected, f"expected an output below this example:\n{source}"
        for address, real in addresses.items():
            source = source.replace(address, real)
        output = run(language, source, page, namespace)
        if default_checkpoint:
            assert_same_output(output, expected)
    for value in namespace.values():
        if isinstance(value, NVEmbedEncoder):
            value.close()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_session_in_a_shell_runs_and_prints_what_stands_there(page, server, default_checkpoint, tmp_path):
    eventually(lambda: not is_computing(server))  # what other tests left: a session prints what waits
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "TRITON_URL": server.url, "NO_COLOR": "1"}
    for source, expected in commands(page):
        source = source.replace("localhost:8002", f"localhost:{server.metrics}")
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1\n{source}"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        if default_checkpoint:
            assert_same_output(done.stdout.replace(server.url, "localhost:8001"), expected)


@pytest.mark.parametrize(
    "page",
    [REPO / "README.md", CLIENT_README, REPO / "docs" / "contract.md", REPO / "docs" / "gateway.md"],
    ids=lambda p: p.stem,
)
def test_no_example_is_overlooked(page):
    text = page.read_text(encoding="utf-8")
    assert 0 < len(examples(page)) == text.count("```python\n") + text.count("\ncurl -s ")


def test_every_option_of_the_gateway_is_documented_with_its_default():
    rows = re.findall(
        r"^\| `(--[a-z-]+)` \| (?:`(.*?)`)? ?\|", (REPO / "docs/gateway.md").read_text("utf-8"), re.MULTILINE
    )
    command = [Path(sys.executable).parent / "nv-embed-gateway", "--help"]
    page = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "999"})
    options = re.findall(r"^  (--[a-z-]+).*?\(default: ([^)]*)\)$", page.stdout, re.MULTILINE | re.DOTALL)
    assert options
    assert dict(rows) == {name: "" if default in ("None", "False", "[]") else default for name, default in options}


def test_the_commands_that_start_the_gateway_are_ones_it_understands():
    pages = (CLIENT_README, REPO / "docs" / "gateway.md")
    blocks = [block for page in pages for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
    commands = [source for _, source, _ in blocks if source.startswith("nv-embed-gateway")]
    first, second, third = (_parser().parse_args(shlex.split(command.replace("\\\n", ""))[1:]) for command in commands)
    assert (first.triton_url, first.host, first.port) == ("localhost:8001", "127.0.0.1", 9000)
    names = names_of(["nv-embed-v2"], second.alias)
    assert names["text-embedding-3-large"] == names["nv-embed-v2-query"]
    assert names["claims"].meaning.instruction.endswith("it\nQuery: ")
    assert names_of(third.model_name, third.alias)["riddles"].model == "other"

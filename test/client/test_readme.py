"""Every block of the client's README does what it says: run in order, with the output that stands below it."""

import contextlib
import io
import re
import shlex
import subprocess

import pytest
from conftest import REPO
from nv_embed_client.gateway.__main__ import _parser

README = REPO / "client" / "README.md"
NUMBER = re.compile(r"-?\d+\.\d*")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def blocks():
    """(language, source, expected output or None) in order."""
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def assert_same_output(got, expected):
    """Equal but for spaces, and for numbers with a fraction, which may differ a little between processors."""
    assert NUMBER.sub("#", got).split() == NUMBER.sub("#", expected).split(), got
    for one, other in zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True):
        assert float(one) == pytest.approx(float(other), abs=0.03), got


def run(language, source, namespace):
    if language == "bash":
        return subprocess.run(["bash", "-c", source], capture_output=True, text=True, check=True, timeout=60).stdout
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, str(README), "exec"), namespace)
    return output.getvalue()


def test_every_block_runs_and_prints_what_stands_below_it(server, gateway, default_checkpoint):
    namespace, num_run = {}, 0
    for language, source, expected in blocks():
        if language == "bash" and not source.startswith("curl"):
            continue
        source = source.replace("localhost:8001", server.url).replace("http://localhost:9000", gateway)
        output = run(language, source, namespace)
        num_run += 1
        if default_checkpoint:
            assert_same_output(output, expected)
    namespace["model"].close()
    assert num_run >= 8


def test_the_command_that_starts_the_gateway_is_one_it_understands():
    commands = [source for language, source, _ in blocks() if source.startswith("nv-embed-gateway")]
    assert len(commands) == 1
    parsed = _parser().parse_args(shlex.split(commands[0])[1:])
    assert (parsed.triton_url, parsed.host, parsed.port) == ("localhost:8001", "127.0.0.1", 9000)

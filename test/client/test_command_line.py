"""`nv-embed` as a shell runs it: files of each format, an index of a folder, scores, and the state of a server."""

import contextlib
import csv
import datetime
import fcntl
import json
import os
import re
import resource
import struct
import subprocess
import sys
import termios
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MAX_SEQUENCE_TOKENS, eventually, is_computing
from corpus import DOCUMENTS, QUERIES
from nv_embed_client import TASK_INSTRUCTIONS, packed
from nv_embed_client.cli.__main__ import main
from nv_embed_client.embedding_type import EMBEDDING_TYPES
from started_server import free_ports

COMMAND = Path(sys.executable).parent / "nv-embed"
TEXTS = [*DOCUMENTS.values(), "  indented", 'said "yes", and left', "日本語", "a\ttab"]
SECONDS = 180
TOO_LONG = "the bread " * MAX_SEQUENCE_TOKENS


@pytest.fixture
def nv_embed(server, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; gives its exit code, output, and lines of errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_URL", server.url)

    def run(*arguments):
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture(scope="module")
def vectors(client):
    return client.embed_documents(TEXTS)


def write(path, texts, name="text"):
    """A file of the format that its name says, with the texts and their numbers."""
    match Path(path).suffix:
        case ".txt":
            Path(path).write_text("".join(f"{text}\r\n" for text in texts), encoding="utf-8-sig", newline="")
        case ".jsonl" | ".ndjson":
            lines = [json.dumps({name: text, "number": i} if i % 2 else text) for i, text in enumerate(texts)]
            Path(path).write_text("\n\n".join(lines), encoding="utf-8")
        case ".csv" | ".tsv" as suffix:
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
                writer.writerows([("number", name), *((f"{i:03}", text) for i, text in enumerate(texts))])
        case ".parquet":
            pq.write_table(pa.table({"number": range(len(texts)), name: texts}), path)


def embeddings_in(path):
    """The rows of an output of any format; NaN for null."""
    match Path(path).suffix:
        case ".npy":
            return np.load(path)
        case ".jsonl":
            rows = [json.loads(line)["embedding"] for line in Path(path).read_text("utf-8").splitlines()]
        case _:
            rows = pq.read_table(path)["embedding"].to_pylist()
    width = len(next(row for row in rows if row is not None))
    return np.array([[np.nan] * width if row is None else row for row in rows], np.float32)


def summary_of(errors):
    """Rows, failed and cut, as the last line counts them."""
    found = re.fullmatch(r"nv-embed: rows.*: ([\d,]+), failed: (\d+), cut: (\d+)", errors[-1])
    return tuple(int(number.replace(",", "")) for number in found.groups())


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("a.txt", "npy"),
        ("a.jsonl", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.csv", "parquet"),
        ("a.tsv", "parquet"),
        ("a.parquet", "parquet"),
    ],
)
def test_each_format_is_read_and_each_is_written_with_a_row_for_each_text(name, default, nv_embed, vectors):
    write(name, TEXTS)
    for out in (f"a.embeddings.{default}", "b.npy", "b.jsonl", "b.parquet"):
        code, printed, errors = nv_embed("embed", name, *(() if "embeddings" in out else ("-o", out)))
        assert (code, printed, summary_of(errors)) == (0, "", (len(TEXTS), 0, 0))
        np.testing.assert_allclose(embeddings_in(out), vectors, atol=1e-5)
    assert not list(Path.cwd().glob("*.partial"))
    table = pq.read_table("b.parquet")
    assert table["text"].to_pylist() == TEXTS
    assert table["embedding"].type == pa.list_(pa.field("element", pa.float32()), vectors.shape[1])
    assert table["num_tokens"].to_pylist()[0] > 10
    assert not any(table["is_truncated"].to_pylist())
    told = json.loads(table.schema.metadata[b"nv_embed"])
    assert (told["dimension"], told["embedding_type"]) == (vectors.shape[1], "float")
    assert re.fullmatch("[0-9a-f]{32}", told["fingerprint"])
    if name.endswith(("csv", "tsv")):
        assert table["number"].to_pylist()[7] == "007"  # CSV has no numbers
    records = [json.loads(line) for line in Path("b.jsonl").read_text("utf-8").splitlines()]
    assert [record["text"] for record in records] == TEXTS


@pytest.mark.parametrize("embedding_type", EMBEDDING_TYPES)
def test_vectors_have_the_type_that_was_asked_for(embedding_type, nv_embed, vectors):
    write("a.txt", TEXTS)
    expected = packed(vectors, embedding_type)
    for out in ("b.npy", "b.parquet"):
        assert nv_embed("embed", "a.txt", "-o", out, "--embedding-type", embedding_type)[0] == 0
    written = np.load("b.npy")
    assert (written.shape, written.dtype) == (expected.shape, expected.dtype)
    column = pq.read_table("b.parquet")["embedding"]
    assert column.type.list_size == expected.shape[1]
    assert column.type.value_type == pa.from_numpy_dtype(expected.dtype)
    np.testing.assert_array_equal(np.array(column.to_pylist(), expected.dtype), written)
    if embedding_type in ("float", "float16"):
        np.testing.assert_allclose(written, expected, atol=1e-3)
    else:
        assert np.mean(written == expected) > 0.99  # a number at the border of two steps may be either


def test_a_row_that_fails_is_named_and_keeps_its_place(nv_embed, vectors):
    lines = [
        b'"%s"',
        b"not JSON",
        b'{"text": null}',
        b'"half \\ud83d"',
        b'"caf\xe9"',
        b"NaN",
        b'{"text": "%s", "n": 1}',
    ]
    lines[0], lines[-1] = (line % text.encode() for line, text in zip((lines[0], lines[-1]), TEXTS, strict=False))
    Path("a.jsonl").write_bytes(b"\n".join(lines))
    for out in ("b.npy", "b.jsonl", "b.parquet"):
        code, _, errors = nv_embed("embed", "a.jsonl", "-o", out)
        assert code == 1
        assert summary_of(errors) == (7, 5, 0)
        for number, error in zip(range(2, 7), errors, strict=False):
            assert re.match(rf"nv-embed: expected .*; got .*line {number} of a.jsonl.*; ", error), error
        rows = embeddings_in(out)
        assert np.isnan(rows[1:-1]).all()
        np.testing.assert_allclose(rows[[0, -1]], vectors[:2], atol=1e-5)
    assert nv_embed("embed", "a.jsonl", "-o", "b.npy", "--embedding-type", "int8")[0] == 1
    assert not np.load("b.npy")[1:-1].any()


def test_a_row_of_a_table_that_fails_is_named_and_keeps_its_place(nv_embed):
    Path("a.csv").write_bytes(b'text,n\nfirst,1\nfew\n"two\nlines",2\ncaf\xe9,3\nlast,4\n')
    code, _, errors = nv_embed("embed", "a.csv")
    assert (code, summary_of(errors)) == (1, (5, 2, 0))
    assert "expected 2 columns, as in the header; got 1 on line 3 of a.csv" in errors[0]
    assert "expected UTF-8; got line 6 of a.csv" in errors[1]
    table = pq.read_table("a.embeddings.parquet").to_pylist()
    assert [row["text"] for row in table if row["num_tokens"]] == ["first", "two\nlines", "last"]

    pq.write_table(pa.table({"text": ["first", None, "last"]}), "b.parquet")
    code, _, errors = nv_embed("embed", "b.parquet")
    assert (code, summary_of(errors)) == (1, (3, 1, 0))
    assert "null on row 2 of b.parquet" in errors[0]
    table = pq.read_table("b.embeddings.parquet")
    assert table["num_tokens"].is_null().to_pylist() == [False, True, False]
    assert np.isnan(table["embedding"].to_pylist()[1]).all()


def test_json_that_is_unusual_comes_through_as_it_is(nv_embed):
    deep = json.loads("[" * 300 + "]" * 300)
    rows = [{"text": "a", "n": 10**30}, {"text": "b", "deep": deep}, {"text": "c", "n": -(2**63)}]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = nv_embed("embed", "a.jsonl")
    assert (code, summary_of(errors)) == (0, (3, 0, 0))
    written = [json.loads(line) for line in Path("a.embeddings.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in row if name in ("text", "n", "deep")} for row in written] == rows
    np.testing.assert_allclose(np.linalg.norm(embeddings_in("a.embeddings.jsonl"), axis=1), 1, atol=1e-5)


def test_texts_that_were_cut_are_counted_or_refused(nv_embed):
    write("a.txt", ["short", TOO_LONG])
    assert summary_of(nv_embed("embed", "a.txt", "-o", "b.parquet")[2]) == (2, 0, 1)
    assert pq.read_table("b.parquet")["is_truncated"].to_pylist() == [False, True]
    code, _, errors = nv_embed("embed", "a.txt", "--truncate", "NONE")
    assert (code, summary_of(errors)) == (1, (2, 1, 0))
    assert errors[0].startswith("nv-embed: line 2 of a.txt: expected texts of at most 512 tokens")
    assert nv_embed("embed", "a.txt", "--truncate", "NONE", "-o", "b.parquet")[0] == 1
    assert pq.read_table("b.parquet")["num_tokens"].to_pylist() == [3, None]


def test_queries_have_the_models_instruction_or_the_one_that_was_asked_for(nv_embed, client):
    write("a.txt", QUERIES.values())
    task = "Given a question, retrieve the name of the animal"
    for options, instruction in (
        ([], None),
        (["--instruction", "Q: "], "Q: "),
        (["--task", "SciFact"], TASK_INSTRUCTIONS["SciFact"]),
        (["--task", task], f"Instruct: {task}\nQuery: "),
    ):
        assert nv_embed("embed", "a.txt", "--query", *options)[0] == 0
        expected = client.embed_queries(QUERIES.values(), instruction=instruction)
        np.testing.assert_allclose(np.load("a.embeddings.npy"), expected, atol=1e-5)


def test_columns_of_parquet_come_through_as_they_are(nv_embed):
    table = pa.table(
        {
            "body": pa.array(["one", "two"], pa.large_string()),
            "at": pa.array([1, None], pa.timestamp("ns", "UTC")),
            "price": [Decimal("1.50"), None],
            "tags": [["a", "b"], []],
            "raw": [b"\xff", b""],
        },
        metadata={"made by": "a test"},
    )
    pq.write_table(table, "a.parquet")
    assert nv_embed("embed", "a.parquet", "--text-column", "body", "-o", "b.parquet")[0] == 0
    written = pq.read_table("b.parquet")
    assert written.select(table.schema.names).equals(pq.read_table("a.parquet"))
    assert written.schema.metadata[b"made by"] == b"a test"
    pq.write_table(pa.table({"text": ["one"], "day": [datetime.date(2026, 1, 2)]}), "c.parquet")
    assert nv_embed("embed", "c.parquet", "-o", "-")[1].startswith('{"text":"one","day":"2026-01-02","embedding":[')
    code, _, errors = nv_embed("embed", "a.parquet", "--text-column", "body", "-o", "b.jsonl")
    assert code == 2
    assert "write Parquet: --out NAME.parquet" in errors[0]
    assert not Path("b.jsonl.partial").exists()


def test_many_rows_keep_their_order(nv_embed, client):
    """More than are read at once, so that several parts are on their way together."""
    some = [f"{i} bottles" for i in range(50)]
    numbers = [i % 7 if i % 100 else i // 100 for i in range(3000)]
    write("a.parquet", [some[number] for number in numbers])
    assert nv_embed("embed", "a.parquet")[0] == 0
    table = pq.read_table("a.embeddings.parquet")
    assert table["number"].to_pylist() == list(range(3000))
    rows = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(rows, client.embed_documents(some)[numbers], atol=1e-5)


def test_a_pipe_is_read_and_written_and_may_be_closed(server):
    environ = {**os.environ, "TRITON_URL": server.url}

    def shell(line):
        return subprocess.run(
            ["bash", "-c", line.replace("nv-embed", str(COMMAND))],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )

    done = shell("""printf '"one"\\n{"text": "two", "id": 7}\\n' | nv-embed embed - --format jsonl""")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["one", "two"]
    assert done.stderr == "nv-embed: rows: 2, failed: 0, cut: 0\n"
    done = shell("yes 'the same' | head -20000 | nv-embed embed - | head -1; echo ${PIPESTATUS[2]}")
    assert done.stdout.startswith('{"text":"the same","embedding":[')
    assert (done.stdout.splitlines()[1], done.stderr) == ("141", "")


def test_a_terminal_shows_progress_and_lines_that_fit(server, tmp_path):
    environ = {**os.environ, "TRITON_URL": server.url}
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    leader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    for arguments in (["embed", tmp_path / "a.txt"], ["compare", "--query", "why?", "many words " * 20]):
        subprocess.run([COMMAND, *arguments], env=environ, stdin=terminal, stdout=terminal, stderr=terminal, check=True)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # that is how a terminal without writers ends
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert b"3/3" in shown
    last = shown.decode().rstrip().splitlines()[-1]
    assert len(last) == 60
    assert last.endswith("…")


def test_utf_8_is_read_and_printed_in_any_locale(server):
    environ = {**os.environ, "TRITON_URL": server.url, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [COMMAND, "compare", "--query", "été", "日本語", "ü"], env=environ, capture_output=True, check=True
    )
    assert {line.split()[-1] for line in done.stdout.decode().splitlines()} == {"日本語", "ü"}


def test_the_input_is_never_overwritten_by_what_the_output_is_called_meanwhile(nv_embed):
    Path("a.npy.partial").write_text("a text\n")
    code, _, errors = nv_embed("embed", "a.npy.partial", "--out", "a.npy")
    assert (code, errors) == (
        2, ["nv-embed: expected another file to write than the input; got 'a.npy.partial'; change --out"],
    )  # fmt: skip
    assert Path("a.npy.partial").read_text() == "a text\n"


def test_a_disk_without_room_is_said_in_one_line(server, tmp_path):
    write(tmp_path / "a.txt", [f"{number} {'x' * 1400}\n" for number in range(20)])

    def have_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    for arguments in (("index", "a.txt"), ("embed", "a.txt")):
        done = subprocess.run(
            [COMMAND, *arguments], cwd=tmp_path, env=os.environ | {"TRITON_URL": server.url}, text=True,
            capture_output=True, timeout=SECONDS, check=False, preexec_fn=have_little_room,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("nv-embed: expected files that can be read and written; got ")
        assert "File too large" in line
    assert not (tmp_path / "a.embeddings.npy").exists()


def test_two_commands_never_write_one_output(server, nv_embed):
    with subprocess.Popen(
        [COMMAND, "embed", "-", "--out", "a.npy"], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"TRITON_URL": server.url},
    ) as first:  # fmt: skip
        first.stdin.write(b"the first\n")
        first.stdin.flush()
        eventually(Path("a.npy.partial").exists)
        Path("b.txt").write_text("the second\nhas two lines\n")
        code, _, (error,) = nv_embed("embed", "b.txt", "--out", "a.npy")
        assert (code, error) == (
            2, "nv-embed: expected nobody else who writes a.npy.partial; got another nv-embed embed; wait until it is "
            "done, or change --out",
        )  # fmt: skip
        first.communicate(timeout=SECONDS)
    assert first.returncode == 0
    assert len(np.load("a.npy")) == 1
    assert nv_embed("embed", "b.txt", "--out", "a.npy")[0] == 0
    assert len(np.load("a.npy")) == 2


def test_compare_prints_the_cosines_of_all_or_ranks_them_for_a_query(nv_embed, client):
    texts = list(DOCUMENTS.values())[:3]
    cosines = (rows := client.embed_documents(texts)) @ rows.T
    code, printed, _ = nv_embed("compare", *texts)
    assert code == 0
    header, *lines = printed.splitlines()
    assert header.split() == ["1", "2", "3"]
    for number, line in enumerate(lines):
        assert line.split()[0] == str(number + 1)
        np.testing.assert_allclose([float(word) for word in line.split()[1:4]], cosines[number], atol=1e-3)
        assert line.endswith(f"  {texts[number]}")
    np.testing.assert_allclose(json.loads(nv_embed("compare", "--json", *texts)[1]), cosines, atol=1e-5)

    scores = (client.embed_query("Why?", instruction="Q: ") @ rows.T)[0]
    code, printed, _ = nv_embed("compare", "--query", "--instruction", "Q: ", "Why?", *texts)
    assert code == 0
    assert [line.split("  ")[-1] for line in printed.splitlines()] == [texts[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([float(line.split()[0]) for line in printed.splitlines()], -np.sort(-scores), atol=1e-3)


def test_a_text_that_is_cut_is_named(nv_embed):
    code, _, (error,) = nv_embed("compare", "short", TOO_LONG)
    assert code == 0
    assert error.startswith("nv-embed: expected texts that the model reads to their ends; got longer ones: 2; ")
    code, _, (error,) = nv_embed("compare", "--query", TOO_LONG, "short", TOO_LONG)
    assert "got longer ones: 1, 3; " in error


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_file_without_rows_makes_one_without_rows(name, nv_embed, vectors):
    write(name, pa.array([], pa.string()))
    for out in ("b.npy", "b.jsonl", "b.parquet"):
        assert summary_of(nv_embed("embed", name, "-o", out)[2]) == (0, 0, 0)
    assert np.load("b.npy").shape == (0, vectors.shape[1])
    assert Path("b.jsonl").read_bytes() == b""
    assert pq.read_table("b.parquet").schema.field("embedding").type.list_size == vectors.shape[1]


def test_what_could_change_the_terminal_is_not_printed(nv_embed):
    _, printed, _ = nv_embed("compare", "a\x1b[31m red\ntext", "another\r\u202etext")
    assert [line.split("  ")[-1] for line in printed.splitlines()[1:]] == ["a [31m red text", "another text"]
    Path("notes").mkdir()
    Path("notes/a\x1b[31m\n.txt").write_text("a text")
    assert nv_embed("index", "notes")[0] == 0
    assert nv_embed("search", "?")[1].endswith("  notes/a?[31m?.txt:1  a text\n")


def test_status_says_what_is_served_and_what_waits(nv_embed, server, client):
    eventually(lambda: not is_computing(server))  # what other tests left
    code, printed, errors = nv_embed("status", "--metrics-url", f"http://localhost:{server.metrics}/metrics")
    assert (code, errors) == (0, [])
    info = client.model_info()
    for words in (
        f"{server.url}, ready",
        info.fingerprint,
        f"up to {MAX_SEQUENCE_TOKENS} tokens",
        "waiting     0 tokens",
    ):
        assert words in printed
    code, printed, _ = nv_embed("status", "--json")
    told = json.loads(printed)
    assert (code, told["ready"], told["fingerprint"], told["dimension"]) == (0, True, info.fingerprint, info.dimension)
    code, printed, errors = nv_embed("status", "--json", "--model-name", "absent")
    assert (code, json.loads(printed)["ready"], len(errors)) == (1, False, 1)


def test_status_of_an_absent_server_is_code_1_at_once(nv_embed):
    url = f"localhost:{free_ports(1)[0]}"
    code, printed, (error,) = nv_embed("status", "--url", url)
    assert (code, printed) == (1, "")
    assert error.startswith(f"nv-embed: expected a server at {url}; got: ")
    assert "its gRPC port, by default 8001 (8000 is HTTP)" in error
    assert json.loads(nv_embed("status", "--url", url, "--json")[1]) == {
        "url": url,
        "ready": False,
        "servers": [{"url": url, "ready": False, "state": "no answer"}],
    }


def test_status_has_a_line_for_each_server_and_code_0_if_one_is_ready(nv_embed, server):
    absent = [f"localhost:{port}" for port in free_ports(2)]
    both = f"{absent[0]},{server.url}"
    code, printed, errors = nv_embed("status", "--url", both)
    assert (code, errors) == (0, [])
    lines = printed.splitlines()
    assert lines[:2] == [f"server      {absent[0]}: no answer", f"server      {server.url}, ready"]
    assert lines[2].startswith("model ")
    told = json.loads(nv_embed("status", "--url", both, "--json")[1])
    assert (told["ready"], [each["ready"] for each in told["servers"]]) == (True, [False, True])
    code, printed, errors = nv_embed("status", "--url", ",".join(absent))
    assert (code, printed.splitlines(), len(errors)) == (1, [f"server      {url}: no answer" for url in absent], 1)


def test_the_http_port_is_answered_with_the_grpc_port(nv_embed, server):
    code, _, (error,) = nv_embed("status", "--url", f"localhost:{server.http}")
    assert code == 1
    assert error.endswith("TRITON_URL: its gRPC port, by default 8001 (8000 is HTTP)")


def test_compare_takes_texts_of_a_file_too(nv_embed):
    texts = list(DOCUMENTS.values())[:3]
    write("a.txt", texts)
    assert nv_embed("compare", "--query", "Why?", "--file", "a.txt") == nv_embed("compare", "--query", "Why?", *texts)


def test_a_question_needs_no_quotes(nv_embed):
    write("a.txt", list(DOCUMENTS.values())[:3])
    nv_embed("index", "a.txt")
    assert nv_embed("search", "how", "do", "bees", "--json") == nv_embed("search", "how do bees", "--json")
    assert nv_embed("search", "how", "do", "bees")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "absent"], "expected a file that can be read; got 'absent': No such file or directory"),
        (["embed", "a.txt", "-o", "b.xls"], "expected a file to write that ends in .npy, .jsonl or .parquet, or '-'"),
        (["embed", "a.txt", "-o", "absent/b.npy"], "expected a file that can be written; got 'absent/b.npy': No such"),
        (["embed", "a.jsonl", "-o", "a.jsonl"], "expected another file to write than the input; got 'a.jsonl'"),
        (["embed", "a.csv", "--text-column", "b"], "expected a column 'b'; got 'text', 'embedding' in a.csv"),
        (["embed", "a.csv"], "got embedding from line 2 of a.csv on; rename or remove them"),
        (["embed", "double.csv"], "expected columns with different names; got ['text', 'text'] in double.csv"),
        (["embed", "double.parquet"], "expected columns with different names; got ['text', 'text'] in double.parquet"),
        (["embed", "a.txt", "-o", "folder.npy"], "expected a file to write; got the folder 'folder.npy'; change --out"),
        (["embed", "numbers.parquet"], "expected strings in the column 'text'; got int64 in numbers.parquet"),
        (["embed", "lines.parquet"], "expected a Parquet file; got 'lines.parquet'"),
        (["embed", "-", "--format", "parquet"], "expected a file of Parquet; got the standard input"),
        (["embed", "a.txt", "--query", "--task", "SciFcat"], "expected a sentence, or one of ArguAna, "),
        (["embed", "a.txt", "--task", "SciFact"], "expected --query beside --task"),
        (["embed", "a.txt", "--query", "--instruction", "many " * MAX_SEQUENCE_TOKENS], "shorten the instruction"),
        (["compare", "one"], "expected two or more texts; got one; add another"),
        (["compare", "one", "two", "--instruction", "Q: "], "expected --query beside --instruction"),
        (["search", "why?"], "expected an index to search; got none at .nv-embed; make one with nv-embed index FOLDER"),
        (["search", "why?", "--top", "0"], "expected --top of at least 1; got 0"),
        (["index", "absent"], "expected folders or files that exist; got "),
        (["index", "folder.npy", "--store", "folder.npy"], "expected folders or files other than the index"),
        (["index", ".", "--store", "a.txt"], "expected a folder that can be made and changed; got 'a.txt'"),
        (["status", "--metrics-url", "localhost:8002"], "expected http:// or https:// as --metrics-url"),
        (["status", "--url", "http://localhost:8001"], "leave out the scheme"),
    ],
)  # fmt: skip
def test_what_the_caller_can_mend_ends_with_one_line_and_code_2(arguments, message, nv_embed):
    write("a.txt", ["a text"])
    write("a.jsonl", ["a text"])
    Path("a.csv").write_text("text,embedding\na,b\n")
    Path("double.csv").write_text("text,text\na,b\n")
    Path("lines.parquet").write_text("a text\n")
    pq.write_table(pa.table({"text": [1]}), "numbers.parquet")
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), "double.parquet")
    Path("folder.npy").mkdir()
    code, printed, errors = nv_embed(*arguments)
    assert (code, printed, len(errors)) == (2, "", 1), errors
    assert errors[0].startswith("nv-embed: expected ")
    assert message in errors[0]
    assert not list(Path.cwd().glob("*.partial"))

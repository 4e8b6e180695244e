"""Jobs of `nv-embed bulk` as users run them: real Ray, real servers, real kills; then `nv-embed load`."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import MINI, TOY, eventually
from nv_embed_client import NVEmbedClient, packed
from nv_embed_client.cli.__main__ import main
from serving import Server
from started_server import Ports, free_ports

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray.cluster_utils import Cluster

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),  # about its own settings
]
COMMAND = (sys.executable, "-m", "nv_embed_client.cli")
NUM_TEXTS = 900
ROWS_PER_FILE = 30
SECONDS = 600


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of Ray on this machine; tests may kill one that they add."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts in three files, two of which cannot have a vector."""
    folder = tmp_path_factory.mktemp("corpus")
    words = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split()
    rows = [{"key": i, "text": f"{i} " + " ".join(words[i % 700 : i % 700 + 20]), "n": i / 2} for i in range(NUM_TEXTS)]
    rows[99]["text"] = rows[800]["text"] = None
    for number in range(3):
        table = pa.Table.from_pylist(rows[number::3])
        pa.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=70)
    return folder, rows


def bulk(server_url, *arguments):
    """Exit code and the whole output of the command, in this process."""
    return main(["bulk", "--url", server_url, "--workers", "2", *map(str, arguments)])


@contextmanager
def started(*arguments, log):
    """The command in a process of its own, killed when left."""
    with log.open("ab") as output:
        process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def workers(cluster):
    """The processes that embed on the nodes of this cluster."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                is_worker = (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker(MapBatches(Worker))")
                if is_worker and cluster.address.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def parts(output):
    return sorted(output.glob("part-*.parquet"))


def assert_complete(output, rows, client, embedding_type="float"):
    """Each id once, with the columns and the vector of its text; the others are listed with a reason."""
    table = pa.dataset.dataset(output).to_table().sort_by("key")
    with_text = [row for row in rows if row["text"] is not None]
    assert table.select(["key", "text", "n"]).to_pylist() == with_text
    kind = table.schema.field("embedding").type
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), kind.list_size)
    texts = [row["text"] for row in with_text[::50]]
    expected = client.embed(texts, token_counts=True)
    assert vectors.dtype == packed(expected.embeddings, embedding_type).dtype
    got, wanted = (v.astype(np.float64) for v in (vectors[::50], packed(expected.embeddings, embedding_type)))
    np.testing.assert_allclose(got, wanted, atol=1e-4 if embedding_type == "float" else 1)
    assert table["num_tokens"].to_pylist()[::50] == expected.token_counts.tolist()
    failed = [json.loads(line) for path in output.glob("_failed/*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(line["id"] for line in failed) == [row["key"] for row in rows if row["text"] is None]
    assert {line["reason"] for line in failed} == {"expected a text; got none; add it"}


def test_kills_of_server_worker_node_and_driver_leave_each_id_once(cluster, corpus, logs, tmp_path, default_checkpoint):
    folder, rows = corpus
    ports, log, output = Ports(*free_ports(3)), logs / "bulk.log", tmp_path / "out"
    venv = {"VENV": os.environ.get("NV_EMBED_SERVER_VENV") or os.environ.get("VENV") or str(MINI.parents[1] / ".venv")}
    checkpoint = MINI if default_checkpoint else TOY
    server = Server(logs / "bulk-server.log", checkpoint, venv, ports=ports).wait_until_ready()
    node = cluster.add_node(num_cpus=1)
    job = ["bulk", folder, output, "--id-column", "key", "--url", server.url, "--rows-per-file", ROWS_PER_FILE]
    job += ["--ray-address", cluster.address, "--workers", "3"]

    def kill_server():
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()

    try:
        with started(*job, log=log) as driver:
            eventually(lambda: len(parts(output)) >= 2 or driver.poll() is not None, SECONDS)
            kill_server()  # from here on nothing is finished, so that the driver dies on the way
            assert driver.poll() is None, log.read_text()
        before = {path: path.stat().st_mtime_ns for path in parts(output)}
        assert len(before) < NUM_TEXTS / ROWS_PER_FILE
        server = Server(logs / "bulk-server.log", checkpoint, venv, ports=ports).wait_until_ready()
        with started(*job, log=log) as driver:
            eventually(lambda: len(parts(output)) > len(before) + 3 or driver.poll() is not None, SECONDS)
            kill_server()  # the same for the others
            os.kill(eventually(lambda: workers(cluster))[0], signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)
            assert driver.poll() is None, log.read_text()
            server = Server(logs / "bulk-server.log", checkpoint, venv, ports=ports).wait_until_ready()
            assert driver.wait(SECONDS) == 0, log.read_text()
        assert f"{output}: {NUM_TEXTS - 2} vectors, " in log.read_text()
        assert {path: path.stat().st_mtime_ns for path in before} == before  # done once
        with NVEmbedClient(server.url) as client:
            assert_complete(output, rows, client)
        assert {path.name for path in output.iterdir() if path.suffix != ".parquet"} == {
            "_SUCCESS", "_plan.json", "_failed",
        }  # fmt: skip
    finally:
        server.stop()


@pytest.fixture(scope="module")
def finished(cluster, corpus, server, tmp_path_factory):
    """An OUTPUT of the first file."""
    output = tmp_path_factory.mktemp("finished") / "out"
    folder, _ = corpus
    arguments = ("--id-column", "key", "--ray-address", cluster.address, "--embedding-type", "int8")
    assert bulk(server.url, folder / "0.parquet", output, *arguments) == 0
    return output, arguments


def test_a_finished_output_is_left_as_it_is_and_needs_no_server(finished, corpus, client, capsys):
    output, arguments = finished
    folder, rows = corpus
    assert_complete(output, rows[::3], client, "int8")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (port,) = free_ports(1)
    assert bulk(f"localhost:{port}", folder / "0.parquet", output, *arguments) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 299 vectors, 300 texts were done before")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--embedding-type", "float"], "expected embedding_type 'int8', with which {output} was begun; got 'float'; "),
        (["--instruction", "x"], "expected instruction None, with which {output} was begun; got 'x'; ask for the same"),
    ],
)
def test_another_wish_is_not_added_to_what_is_there(finished, corpus, server, capsys, more, message):
    output, arguments = finished
    assert bulk(server.url, corpus[0] / "0.parquet", output, *arguments, *more) == 2
    assert message.format(output=output) in capsys.readouterr().err


def test_another_models_vectors_and_another_input_are_not_added(finished, corpus, server, tmp_path, capsys):
    output, arguments = finished
    begun = tmp_path / "begun"
    begun.mkdir()
    plan = json.loads((output / "_plan.json").read_text())
    plan["model"]["fingerprint"] = "0" * 32
    (begun / "_plan.json").write_text(json.dumps(plan))
    assert bulk(server.url, corpus[0] / "0.parquet", begun, *arguments) == 2
    assert (
        f"expected the model whose vectors {begun} holds: nv-embed-v2 with fingerprint {'0' * 32}, "
        in capsys.readouterr().err
    )
    plan["files"][0]["size"] += 1
    (begun / "_plan.json").write_text(json.dumps(plan))
    assert bulk(server.url, corpus[0] / "0.parquet", begun, *arguments) == 2
    assert "got 1 new, changed or missing files, such as 0.parquet; restore them, or" in capsys.readouterr().err
    assert parts(begun) == []


def test_ids_must_be_unique_and_columns_there_before_anything_is_computed(cluster, server, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.csv"):
        with (tmp_path / "in" / name).open("w") as file:
            csv.writer(file).writerows([["id", "text"], [name, "one"], ["both", "two\nlines"]])
    ray_address = ("--ray-address", cluster.address)
    for more, message in {
        ("--id-column", "id"): "got 1 ids in several rows: 'both' in 2 rows; make them different",
        ("--id-column", "key"): "expected a column 'key' in the input; got id, text; name it with --id-column",
        ("--text-column", "body"): "expected a column 'body' in the input; got id, text; name it with --text-column",
        (): "expected an input without the columns that are added to it; got id; rename them; if 'id' has ids, say",
    }.items():
        assert bulk(server.url, tmp_path / "in", tmp_path / "out", *ray_address, *more) == 2
        assert message in capsys.readouterr().err
    assert not parts(tmp_path / "out")
    (tmp_path / "twice").mkdir()
    pa.parquet.write_table(pa.table([[1], ["a"], ["b"]], names=["id", "text", "text"]), tmp_path / "twice/a.parquet")
    assert bulk(server.url, tmp_path / "twice", tmp_path / "out", *ray_address, "--id-column", "id") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("different names of columns; got ['id', 'text', 'text'] in a.parquet; rename one")


def test_it_starts_ray_by_itself_and_makes_ids(server, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": "one"}\n{"text": "another"}\n')
    (tmp_path / "in/b.jsonl").touch()  # as programs write that share out their rows
    (tmp_path / "in/c.jsonl").write_text('{"text": null}\n')
    job = ["bulk", str(tmp_path / "in"), "out", "--url", server.url, "--workers", "1"]
    done = subprocess.run([*COMMAND, *job], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == "out: 2 vectors, 0 texts were done before"
    num_tokens = sum(pa.parquet.read_table(tmp_path / "out" / "part-000000.parquet")["num_tokens"].to_pylist())
    assert re.fullmatch(rf"{num_tokens} tokens in \d+ s: [\d,]+ tokens/s", second)
    assert third == "out/_failed: 1 texts that have no vector, and why"
    assert "rror" not in done.stderr
    assert "Set ray log level" not in done.stderr
    assert pa.parquet.read_table(tmp_path / "out" / "part-000000.parquet")["id"].to_pylist() == [
        "a.jsonl:0",
        "a.jsonl:1",
    ]


def test_lines_of_text_are_a_corpus_and_a_log_gets_lines_of_progress(cluster, server, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\nthree" + b"\nmore" * 17)
    arguments = ("--ray-address", cluster.address, "--rows-per-file", "2")
    assert bulk(server.url, tmp_path / "a.txt", tmp_path / "out", *arguments) == 0
    rows = {row["id"]: row["text"] for row in pa.dataset.dataset(tmp_path / "out").to_table().to_pylist()}
    assert rows == {f"a.txt:{i}": text for i, text in enumerate(["one", "", "three", *["more"] * 17])}
    shown = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" tokens/s")]
    assert [line.partition(" texts, ")[0] for line in shown] == [f"{2 * i} of 20" for i in range(1, 10)]


def test_a_job_that_is_interrupted_says_that_the_same_command_continues(cluster, corpus, server, tmp_path):
    folder, _ = corpus
    log, output = tmp_path / "log", tmp_path / "out"
    job = ["bulk", folder, output, "--id-column", "key", "--url", server.url, "--ray-address", cluster.address]
    with started(*job, "--rows-per-file", "5", log=log) as driver:
        eventually(lambda: parts(output) or driver.poll() is not None, SECONDS)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(SECONDS) == 130, log.read_text()
    assert log.read_text().endswith("nv-embed: stopped; the same command continues\n")
    assert not (output / "_SUCCESS").exists()


def test_what_is_not_begun_by_this_command_is_not_touched(server, corpus, tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert bulk(server.url, corpus[0], tmp_path) == 2
    assert f"expected an empty folder, or one that this command began; got '{tmp_path}'" in capsys.readouterr().err
    assert bulk(server.url, corpus[0], tmp_path / "out", "--workers", "0") == 2
    assert bulk(server.url, corpus[0], corpus[0] / "out") == 2
    assert "expected an OUTPUT outside INPUT, because all files there are read; got" in capsys.readouterr().err
    assert bulk(server.url, corpus[0], tmp_path / "out", "--ray-address", "127.0.0.1:1") == 2
    assert "expected a cluster of Ray at --ray-address; got '127.0.0.1:1'" in capsys.readouterr().err


def test_a_search_in_what_load_made_says_how_to_search_it(finished, server, tmp_path):
    store = tmp_path / "lance"
    assert load(finished[0], store)[0] == 0
    done = subprocess.run(
        [*COMMAND, "search", "why", "--store", store, "--url", server.url],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"got the table 'texts' of nv-embed load at {store}; search it with LanceDB, as docs/scale.md" in done.stderr


def load(*arguments):
    """The command's output; in a process of its own, because LanceDB dislikes forks."""
    done = subprocess.run(
        [*COMMAND, "load", *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_loading_twice_changes_nothing_and_another_models_vectors_are_refused(finished, tmp_path):
    output, _ = finished
    store = tmp_path / "lance"
    code, said = load(output, store)
    assert (code, said.splitlines()[-1]) == (0, f"{store}: 299 rows in texts; 299 are new, 0 were there")
    first = table_of(store)
    assert load(output, store) == (0, f"{store}: 299 rows in texts; 0 are new, 299 were there\n")
    second = table_of(store)
    assert first == second
    assert second["metadata"]["embedding_type"] == "int8"
    other = tmp_path / "other"
    other.mkdir()
    (other / "_SUCCESS").write_text('{"num_rows": 1, "num_failed": 0}')
    table = pa.parquet.read_table(parts(output)[0]).slice(0, 1)
    told = json.loads(table.schema.metadata[b"nv_embed"]) | {"fingerprint": "other"}
    pa.parquet.write_table(table.replace_schema_metadata({"nv_embed": json.dumps(told)}), other / "part-000000.parquet")
    code, said = load(other, store)
    assert code == 2
    assert "got 'other'; choose another --table" in said
    told = json.loads(table.schema.metadata[b"nv_embed"])
    for wrong, what in (
        (table.append_column("more", pa.array(["a column"])), "'more' as no column; got string"),
        (table.drop_columns(["n"]), "'n' as double; got no column"),
        (table.set_column(0, "key", pa.array(["a string"])), "'key' as int64; got string"),
    ):
        pa.parquet.write_table(
            wrong.replace_schema_metadata({"nv_embed": json.dumps(told)}), other / "part-000000.parquet"
        )
        code, said = load(other, store)
        assert code == 2
        assert said.startswith("nv-embed: expected the columns of 'texts' in ")
        assert f", so {what}; choose another --table" in said
    assert table_of(store) == first
    code, said = load(output, store, "--table", "a/b")
    assert code == 2
    assert "got 'a/b'; choose another name" in said


def test_two_loads_at_once_leave_each_id_once(finished, tmp_path):
    output, _ = finished
    with ThreadPoolExecutor(2) as pool:
        done = sorted(pool.map(lambda _: load(output, tmp_path), range(2)))
    assert done[0][0] == 0
    assert done[1][0] == 0 or "expected nobody else who loads into 'texts' in " in done[1][1], done
    assert len({row["key"] for row in table_of(tmp_path)["rows"]}) == len(table_of(tmp_path)["rows"]) == 299


def table_of(store):
    """Rows and metadata, read by a process that does nothing else."""
    script = (
        "import json, lancedb, sys; table = lancedb.connect(sys.argv[1]).open_table('texts');"
        "rows = sorted(table.to_arrow().to_pylist(), key=lambda row: row['key']);"
        "print(json.dumps({'rows': rows, 'metadata': json.loads(table.schema.metadata[b'nv_embed'])}))"
    )
    return json.loads(subprocess.check_output([sys.executable, "-c", script, store], text=True, timeout=SECONDS))


def test_only_what_is_finished_is_loaded(tmp_path):
    code, said = load(tmp_path, tmp_path / "lance")
    assert code == 2
    assert said.startswith(f"nv-embed: expected the OUTPUT of a finished nv-embed bulk; got '{tmp_path}'; run that")

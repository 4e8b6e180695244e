"""What a bulk job costs and survives: WordNet's texts, three nodes of Ray, two servers, and kills on the way.

    python benchmarks/bulk.py --wordnet FOLDER                     # everything: about 160,000 texts, twice
    python benchmarks/bulk.py --wordnet FOLDER --texts 4000 --rows-per-file 100     # the same in small

FOLDER is /usr/share/wordnet of Debian's wordnet-base. It needs the client with its extra `bulk`.

First one call of one client embeds the texts with one server, and then with both. Then `nv-embed bulk` embeds them with
both, undisturbed, on three nodes of Ray on this machine. Then it does so once more, and on the way a server is killed
and started again, a node is killed, and the driver is killed and started again, each with SIGKILL. In both outputs each
id must be there once, with the same vector as from one call to a cosine of 0.999; exit code 1 if not. The server's
cache is off, so that every text is computed each time. Prints a table, and what was measured where, as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
from machine import machine
from nv_embed_client import NVEmbedClient
from ray.cluster_utils import Cluster
from started_server import Ports, StartedServer, end_on_sigterm, free_ports, progress

FILES = ("noun", "verb", "adj", "adv")
NODES = 3
WORKERS = 4
LEAST_COSINE = 0.999  # in bfloat16, texts of other batches are rounded elsewhere; other texts are far below it


def texts_of(wordnet: Path) -> dict[str, str]:
    """Every definition and every example, by an id of synset and place."""
    texts = {}
    for part in FILES:
        for line in (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            synset, gloss = f"{part}-{line[:8]}", line.partition(" | ")[2]
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = re.sub(r';?\s*"[^"]*"?', "", gloss).strip(" ;")
            texts |= {f"{synset}-{place}": text for place, text in enumerate([definition, *examples]) if text}
    return texts


class Servers:
    """Two servers, either of which may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = [Ports(*free_ports(3)) for _ in range(2)]
        self._started: dict[int, StartedServer] = {}

    @property
    def urls(self) -> list[str]:
        return [ports.url for ports in self._ports]

    def start(self, number: int) -> None:
        settings = {"DEVICE": "cpu", "NV_EMBED_CACHE_MEBIBYTES": "0"}
        log = self._folder / f"server-{number}.log"
        self._started[number] = StartedServer(log, settings, ports=self._ports[number]).wait_until_ready()

    def kill(self, number: int) -> None:
        os.killpg(self._started[number].process.pid, signal.SIGKILL)
        self._started.pop(number).process.wait()

    def stop(self) -> None:
        for server in self._started.values():
            server.stop()

    def waiting_tokens(self) -> float | None:
        """Of the server that has the fewest; None while one is away."""
        found = []
        for ports in self._ports:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{ports.metrics}/metrics", timeout=5) as page:
                    values = re.findall(r"^nv_embed_queue_tokens\{.*\} (\S+)$", page.read().decode(), re.MULTILINE)
                found.append(float(values[0]))
            except (OSError, IndexError):
                return None
        return min(found)


@contextmanager
def busy_share(servers: Servers) -> Iterator[Callable[[], float]]:
    """How often both servers had tokens waiting, of the times that they were asked."""
    samples: list[bool] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            waiting = servers.waiting_tokens()
            if waiting is not None:
                samples.append(waiting > 0)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield lambda: sum(samples) / max(len(samples), 1)
    finally:
        done.set()
        thread.join()


class Job:
    """`nv-embed bulk` in a process of its own."""

    def __init__(self, source: Path, output: Path, urls: str, cluster: Cluster, rows: int, log: Path) -> None:
        self.output, self._log = output, log
        self._command = [
            *(sys.executable, "-m", "nv_embed_client.cli", "bulk", source, output, "--id-column", "id", "--url", urls),
            *("--ray-address", cluster.address, "--rows-per-file", str(rows), "--workers", str(WORKERS)),
        ]
        self.num_parts = -(-pa.parquet.read_metadata(source / "texts.parquet").num_rows // rows)
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([*map(str, self._command)], stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def parts(self) -> dict[str, int]:
        """When each was written."""
        return {path.name: path.stat().st_mtime_ns for path in self.output.glob("part-*.parquet")}

    def wait_for_share(self, share: float) -> None:
        """Until so much is done, or it ended."""
        while self.process.poll() is None and len(self.parts()) < share * self.num_parts:
            time.sleep(0.2)

    def finish(self) -> None:
        code = self.process.wait()
        if code:
            raise RuntimeError(f"expected exit code 0 of nv-embed bulk; got {code}: {self._log.read_text()[-3000:]}")


def problems_of(output: Path, texts: dict[str, str], expected: dict[str, Any]) -> list[str]:
    """What is wrong with the vectors of an output."""
    table = pa.dataset.dataset(output).to_table(columns=["id", "text", "embedding"])
    ids = table["id"].to_pylist()
    found = []
    if len(ids) != len(set(ids)):
        found.append(f"{len(ids) - len(set(ids))} ids twice")
    if set(ids) != set(texts):
        found.append(f"{len(set(texts) - set(ids))} ids missing, {len(set(ids) - set(texts))} foreign")
    if dict(zip(ids, table["text"].to_pylist(), strict=True)) != texts:
        found.append("other texts")
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
    cosines = (vectors * np.stack([expected[id_] for id_ in ids])).sum(axis=1)
    wrong = int((~(cosines >= LEAST_COSINE)).sum())
    if wrong:
        found.append(f"{wrong} other vectors")
    if list(output.glob("_failed/*")):
        found.append("failed texts")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="the folder with data.noun and the like")
    parser.add_argument("--texts", type=int, help="only so many, evenly spread (default: all)")
    parser.add_argument("--rows-per-file", type=int, default=1024)
    parser.add_argument("--one-server", action="store_true", help="for clients that take one address only")
    arguments = parser.parse_args()
    end_on_sigterm()
    texts = texts_of(arguments.wordnet)
    if arguments.texts:
        kept = np.linspace(0, len(texts) - 1, min(arguments.texts, len(texts))).astype(int)
        texts = {id_: texts[id_] for id_ in np.array(list(texts))[kept].tolist()}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        (folder / "in").mkdir()
        table = pa.table({"id": list(texts), "text": list(texts.values())})
        pa.parquet.write_table(table, folder / "in" / "texts.parquet")
        servers = Servers(folder)
        stack.callback(servers.stop)
        servers.start(0)
        servers.start(1)
        both = servers.urls[0] if arguments.one_server else ",".join(servers.urls)
        rows, problems = measured(texts, folder, servers, both, arguments.rows_per_file)
    print(report(rows, problems, len(texts)))
    return 1 if problems else 0


def measured(
    texts: dict[str, str], folder: Path, servers: Servers, both: str, rows_per_file: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """The rows of the table, and what went wrong."""
    rows: list[tuple[str, str]] = []
    problems: list[str] = []

    def one_call(urls: str, name: str) -> dict[str, Any]:
        progress(f"{name} ...")
        with NVEmbedClient(urls, max_in_flight=16) as client, busy_share(servers) as busy:
            began = time.perf_counter()
            result = client.embed(list(texts.values()), token_counts=True)
            seconds = time.perf_counter() - began
            assert result.token_counts is not None
            tokens = int(result.token_counts.sum())
            info = client.model_info()
            rate = f"{len(texts) / seconds:,.0f} texts/s, {tokens / seconds:,.0f} tokens/s"
            rows.append((f"{name}, {info.dtype}", rate))
            if "two" in name:
                rows.append(("- both servers had tokens waiting", f"{busy():.0%} of the time"))
        return dict(zip(texts, result.embeddings, strict=True))

    expected = one_call(servers.urls[0], "one call, one server")
    one_call(both, "one call, two servers")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(NODES - 1)]
        for name, disturbed in (("nv-embed bulk, two servers", False), ("the same with kills", True)):
            progress(f"{name} ...")
            began = time.perf_counter()
            with busy_share(servers) as busy:
                job = Job(
                    folder / "in", folder / f"out-{disturbed}", both, cluster, rows_per_file,
                    folder / f"bulk-{disturbed}.log",
                )  # fmt: skip
                job.wait_for_share(1e-9)
                first = time.perf_counter()
                kills = disturb(job, servers, cluster, nodes[-1]) if disturbed else []
                job.finish()
                seconds = time.perf_counter() - began
                written = sorted(job.parts().values())
                rows.append((name, f"{len(texts) / seconds:,.0f} texts/s from start to end, {seconds:,.0f} s"))
                if not disturbed:
                    steady = (written[-1] - written[0]) / 1e9
                    rate = len(texts) * (len(written) - 1) / len(written) / max(steady, 1e-9)
                    rows += [
                        ("- from the first file to the last", f"{rate:,.0f} texts/s, {steady:,.0f} s"),
                        ("- until the first file: Ray, the plan, actors, one part", f"{first - began:,.1f} s"),
                        ("- both servers had tokens waiting", f"{busy():.0%} of the time"),
                    ]
                rows += [(f"- {kill}", "survived") for kill in kills]
            problems += [f"{name}: {problem}" for problem in problems_of(job.output, texts, expected)]
            told = json.loads((job.output / "_SUCCESS").read_text(encoding="utf-8"))
            rows.append((f"- ids in {name!r}", f"{told['num_rows']:,}, each once; {told['num_failed']} failed"))
    finally:
        cluster.shutdown()
    return rows, problems


def disturb(job: Job, servers: Servers, cluster: Cluster, node: Any) -> list[str]:
    """Kill a server, a node and the driver on the way; what was killed, and when."""
    kills = []

    def when() -> str:
        return f"with {len(job.parts()) / job.num_parts:.0%} done"

    job.wait_for_share(0.2)
    kills.append(f"server killed {when()}, started again")
    servers.kill(0)
    servers.start(0)
    job.wait_for_share(0.4)
    kills.append(f"node killed {when()}")
    cluster.remove_node(node, allow_graceful=False)
    job.wait_for_share(0.6)
    kills.append(f"driver killed {when()}, started again")
    job.kill()
    before = job.parts()
    job.start()
    job.wait_for_share(1)
    if any(job.parts()[name] != at for name, at in before.items()):
        raise RuntimeError("expected files of the first run to stay as they were; got new ones; read the log")
    return kills


def report(rows: list[tuple[str, str]], problems: list[str], num_texts: int) -> str:
    lines = [
        f"`python benchmarks/bulk.py {shlex.join(sys.argv[1:])}`: {num_texts:,} texts", "",
        "| what | seen |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        *(f"- **wrong:** {problem}" for problem in problems),
        ", ".join(f"{name} {value}" for name, value in machine().items() if value),
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

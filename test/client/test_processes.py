"""Clients in more than one process: forked, pickled, started anew; and at the end of one. A real server, real forks."""

import os
import subprocess
import sys

import pytest
from nv_embed_client import NVEmbedClient

PRELUDE = """
import asyncio, copy, faulthandler, multiprocessing, os, pickle, sys, threading
import numpy as np
from nv_embed_client import *

url = sys.argv[1]
texts = [f"text {number}" for number in range(600)]  # three requests
fork = multiprocessing.get_context("fork")

def telling(begun):
    begun.set()  # a call takes its first text, and sends before it waits
    yield from texts

def in_child(work):
    def body():
        faulthandler.dump_traceback_later(120, exit=True)
        work()
    process = fork.Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode
"""


def run(tmp_path, url, body, *options, prelude=PRELUDE, **environment):
    """Runs a script of its own process. Fails when it fails; gives what it wrote to stderr."""
    script = tmp_path / "script.py"
    script.write_text(prelude + body, encoding="utf-8")
    environment = {**os.environ, **environment}
    command = [sys.executable, *options, script, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


FORKS = {
    "a client": """
client = NVEmbedClient(url)
expected = client.embed_documents(texts)
def work():
    np.testing.assert_allclose(client.embed_documents(texts, timeout=60), expected, atol=1e-5)
for _ in range(3):
    in_child(work)
work()
""",
    "a client, after a fork amid calls of other threads": """
client = NVEmbedClient(url, max_texts_per_request=50)
stop = threading.Event()
def busy(number):
    count = 0
    while not stop.is_set():
        count += 1
        client.embed_documents([f"{number} {count} {text}" for text in texts[:100]])
threads = [threading.Thread(target=busy, args=(number,), daemon=True) for number in range(4)]
for thread in threads:
    thread.start()
client.embed_documents(texts)
def work():
    assert client.embed_documents(texts, timeout=60).shape[0] == 600
    client.close()
for _ in range(8):
    in_child(lambda: None)  # gRPC allows it no more; the parent's calls go on
stop.set()
for thread in threads:
    thread.join()
in_child(work)
assert client.embed_query("the parent's is open").shape[0] == 1
""",
    "a client, by hand, in a grandchild, with a normal exit": """
client = NVEmbedClient(url)
client.embed_documents(texts)
for generation in range(2):
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        sys.exit(0 if status == 0 else 1)
    assert client.embed_documents(texts, timeout=60).shape[0] == 600
""",
    "an async client, open in the parent": """
client = AsyncNVEmbedClient(url)
async def embed():
    return await client.embed_documents(texts, timeout=60)
expected = asyncio.run(embed())
def work():
    np.testing.assert_allclose(asyncio.run(embed()), expected, atol=1e-5)
    np.testing.assert_allclose(NVEmbedClient(url).embed_documents(texts, timeout=60), expected, atol=1e-5)
for _ in range(3):
    in_child(work)
work()
""",
    "an async client, forked inside an event loop that has used it": """
client = AsyncNVEmbedClient(url, max_texts_per_request=20)
async def embed():
    return await client.embed_documents(texts, timeout=60)
def work():
    done = []
    thread = threading.Thread(target=lambda: done.append(asyncio.run(embed()).shape))
    thread.start()
    thread.join()
    assert done[0][0] == 600
async def main():
    for _ in range(3):
        await embed()
        in_child(work)
    await embed()
asyncio.run(main())
""",
    "an encoder": """
model = NVEmbedEncoder(url)
expected = model.encode(texts)
in_child(lambda: np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5))
""",
    "the adapters": """
from nv_embed_client.langchain import NVEmbedEmbeddings
from nv_embed_client.llama_index import NVEmbedEmbedding
chain, index = NVEmbedEmbeddings(url), NVEmbedEmbedding(url)
def work():
    rows = chain.embed_documents(texts[:3])
    np.testing.assert_allclose(index.get_text_embedding_batch(texts[:3]), rows, atol=1e-5)
    np.testing.assert_allclose(asyncio.run(chain.aembed_documents(texts[:3])), rows, atol=1e-5)
    np.testing.assert_allclose(asyncio.run(index.aget_text_embedding_batch(texts[:3])), rows, atol=1e-5)
work()
in_child(work)
work()
""",
    "datasets.map with two processes": """
from datasets import Dataset
client = NVEmbedClient(url)
client.embed_documents(texts)
table = Dataset.from_dict({"text": texts})
embedded = table.map(
    lambda rows: {"vector": client.embed_documents(rows["text"], timeout=60)}, batched=True, num_proc=2
)
np.testing.assert_allclose(embedded.with_format("numpy")["vector"][:], client.embed_documents(texts), atol=1e-5)
""",
}


@pytest.mark.parametrize("used", FORKS)
def test_what_the_parent_used_works_in_a_forked_child(used, tmp_path, server):
    run(tmp_path, server.url, FORKS[used])


def test_a_fork_works_where_grpcs_own_handling_of_forks_is_on(tmp_path, server):
    run(tmp_path, server.url, FORKS["a client"], GRPC_ENABLE_FORK_SUPPORT="1")


COPIES = """
from nv_embed_client.langchain import NVEmbedEmbeddings
from nv_embed_client.llama_index import NVEmbedEmbedding

def settings_of(client):
    return {name: getattr(client, name) for name in ("url", "headers", "request_timeout", "max_in_flight", "retry")}

def rows_of(each):
    match each:
        case NVEmbedClient():
            return each.embed_documents(["a", "b"])
        case AsyncNVEmbedClient():
            return asyncio.run(each.embed_documents(["a", "b"]))
        case NVEmbedEncoder():
            return each.encode(["a", "b"], prompt_name="mine")
        case NVEmbedEmbeddings():
            return [each.embed_query("a"), asyncio.run(each.aembed_query("a"))]
        case NVEmbedEmbedding():
            return [each.get_query_embedding("a"), asyncio.run(each.aget_query_embedding("a"))]

def child(objects, settings, expected, closed):
    for each, rows in zip(objects, expected, strict=True):
        np.testing.assert_allclose(rows_of(each), rows, atol=1e-5)
    assert [settings_of(objects[0]), settings_of(objects[1]), settings_of(objects[2].client)] == settings
    try:
        closed.embed_query("a")
    except ClientClosed:
        return
    raise AssertionError("a closed client was open in the child")

if __name__ == "__main__":
    faulthandler.dump_traceback_later(500, exit=True)
    told = {"headers": {"x-key": "secret"}, "request_timeout": 50.0, "retry": RetryPolicy(max_attempts=3)}
    sync, awaited = NVEmbedClient(url, max_in_flight=2, **told), AsyncNVEmbedClient(url, max_in_flight=2, **told)
    index = NVEmbedEmbedding(url, query_instruction="Find: ", client_settings=told)
    objects = [
        sync, awaited, NVEmbedEncoder(sync, prompts={"mine": "Find: "}),
        NVEmbedEmbeddings(url, query_instruction="Find: ", **told), index,
    ]
    assert "secret" not in str(index.to_dict()) + repr(index)
    expected = [rows_of(each) for each in objects]  # all are connected now
    settings = [settings_of(sync), settings_of(awaited), settings_of(sync)]
    closed = NVEmbedClient(url)
    closed.embed_query("a")
    closed.close()
    for copies in (
        [copy.copy(each) for each in objects],
        [copy.deepcopy(each) for each in objects],
        [pickle.loads(pickle.dumps(each)) for each in objects],
    ):
        child(copies, settings, expected, copy.deepcopy(closed))
    copy.copy(sync).close()
    rows_of(sync)  # a copy has a connection of its own
    process = multiprocessing.get_context("spawn").Process(target=child, args=(objects, settings, expected, closed))
    process.start()
    process.join()
    assert process.exitcode == 0
"""


def test_copies_arrive_in_another_process_with_their_settings(tmp_path, server):
    run(tmp_path, server.url, COPIES)


# What each leaves open when the interpreter ends.
LEFT_OPEN = {
    "a client and its copy": "client = NVEmbedClient(url); client.embed_documents(texts); other = copy.copy(client)",
    "an async client": "client = AsyncNVEmbedClient(url); asyncio.run(client.embed_documents(texts))",
    "an event loop with a call": """
client = AsyncNVEmbedClient(url)
async def main():
    begun = asyncio.Event()
    task = asyncio.create_task(client.embed_documents(telling(begun)))
    await begun.wait()
asyncio.run(main())
""",
    "threads inside calls": """
client = NVEmbedClient(url)
client.embed_query("connected")
def work():
    while True:
        client.embed_documents(texts)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
client.embed_documents([text * 2 for text in texts])
""",
    "an encoder, in a process that knows mteb": """
import mteb
model = NVEmbedEncoder(url)
model.encode("a")
""",
}


@pytest.mark.parametrize("left", LEFT_OPEN)
def test_the_end_of_a_process_is_silent(left, tmp_path, server):
    options = ["-X", "dev", "-W", "error::ResourceWarning", "-W", "ignore::DeprecationWarning"]
    errors = run(tmp_path, server.url, LEFT_OPEN[left], *options)
    ours = [line for line in errors.splitlines() if "mteb" not in line]
    assert ours == [], errors


def test_a_client_is_collected_with_its_connection(server):
    def num_sockets():
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links)

    NVEmbedClient(server.url).embed_query("a")
    before = num_sockets()
    for _ in range(20):
        NVEmbedClient(server.url).embed_query("a")
    assert num_sockets() < before + 10

"""An index of files: what a second run embeds, what it forgets, and what a search finds."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI
from corpus import DOCUMENTS, QUERIES
from nv_embed_client import InvalidInput, MockTransport, NVEmbedClient, RetryPolicy, ServerFailure, Unavailable
from nv_embed_client.cli.__main__ import main
from nv_embed_client.index import Store, TextFiles, index
from nv_embed_client.index.passages import MAX_CHARACTERS, passages_of
from nv_embed_client.outcome import Embedder

PARAGRAPHS = [f"{text} ".ljust(1400, "x") for text in DOCUMENTS.values()]  # no two fit into one passage


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


def counts_of(printed):
    """Files, and passages embedded, copied, unchanged, removed and failed, of a run of `nv-embed index`."""
    line = printed.splitlines()[0]
    pattern = r"files: (\d+); passages: (\d+) embedded, (\d+) copied, (\d+) unchanged, (\d+) removed, (\d+) failed"
    return tuple(map(int, re.fullmatch(pattern, line).groups()))


def test_a_second_run_embeds_only_what_has_changed_and_forgets_what_is_gone(nv_embed):
    Path("docs/deep").mkdir(parents=True)
    Path("docs/all.md").write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    Path("docs/deep/b.py").write_text("# é\n" + PARAGRAPHS[0], encoding="utf-8")
    Path("docs/c.txt").write_text("a text", encoding="utf-8")
    code, printed, errors = nv_embed("index", "docs")
    assert (code, errors) == (0, [])
    assert counts_of(printed) == (3, 12, 0, 0, 0, 0)
    assert counts_of(nv_embed("index", "docs")[1]) == (3, 0, 0, 12, 0, 0)

    Path("docs/all.md").write_text("\n\n".join(["A new one.", *PARAGRAPHS]), encoding="utf-8")  # all move down
    Path("docs/c.txt").rename("docs/d.txt")
    Path("docs/deep/b.py").unlink()
    assert counts_of(nv_embed("index", "docs")[1]) == (2, 1, 10, 0, 12, 0)
    assert counts_of(nv_embed("index", "docs/d.txt")[1]) == (1, 0, 0, 1, 0, 0)  # the rest stays
    assert counts_of(nv_embed("index", ".")[1]) == (2, 0, 0, 11, 0, 0)
    places = {json.loads(line)["file"] for line in nv_embed("search", "?", "--json", "--top", "99")[1].splitlines()}
    assert {os.path.relpath(place) for place in places} == {"docs/all.md", "docs/d.txt"}

    Path("moved").mkdir()
    Path("docs").rename("moved/docs")
    Path(".nv-embed").rename("moved/.nv-embed")
    os.chdir("moved")
    assert counts_of(nv_embed("index", "docs")[1]) == (2, 0, 0, 11, 0, 0)


def test_search_prints_score_place_and_text_of_the_best(nv_embed, client, default_checkpoint):
    for name, text in DOCUMENTS.items():
        Path(f"{name}.md").write_text(f"\n\n  {text[:20]}\n{text[20:]}\n", encoding="utf-8")
    assert nv_embed("index", ".")[0] == 0
    question = QUERIES["q-bread"]
    code, printed, errors = nv_embed("search", question, "--top", "3")
    assert (code, errors) == (0, [])
    lines = [re.fullmatch(r" ([0-9. ]{5})  ([a-z]+)\.md:3  (.*)", line).groups() for line in printed.splitlines()]
    assert len(lines) == 3
    if default_checkpoint:
        assert lines[0][1] == "bread"
    found = [json.loads(line) for line in nv_embed("search", question, "--top", "99", "--json")[1].splitlines()]
    assert len(found) == len(DOCUMENTS)
    rows = client.embed_documents([hit["text"] for hit in found]) @ client.embed_query(question)[0]
    assert [hit["score"] for hit in found] == pytest.approx(rows.tolist(), abs=2e-3)
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    assert [f"{hit['score']:.3f}" for hit in found[:3]] == [score.strip() for score, _, _ in lines]
    instructed = json.loads(nv_embed("search", question, "--json", "--top", "1", "--instruction", "Q: ")[1])
    assert instructed["score"] != pytest.approx(found[0]["score"], abs=1e-3)


def test_a_passage_that_the_model_would_cut_is_stored_in_parts(nv_embed, client):
    words = " ".join(f"w{i}x{i * i}" for i in range(140))  # so many tokens that 1,500 characters are too many
    assert client.embed([words], is_truncated=True).is_truncated.all()
    Path("a.txt").write_text(f"first line\n{words}", encoding="utf-8")
    code, printed, _ = nv_embed("index", "a.txt")
    assert (code, counts_of(printed)[1]) == (0, 1)
    assert "too long for the model, so stored in parts: 1\n" in printed
    parts = [json.loads(line) for line in nv_embed("search", words[-30:], "--json")[1].splitlines()]
    assert len(parts) > 1
    assert sorted(" ".join(part["text"] for part in parts).split()) == sorted(["first", "line", *words.split()])
    assert not client.embed([part["text"] for part in parts], is_truncated=True).is_truncated.any()
    assert counts_of(nv_embed("index", "a.txt")[1])[1:4] == (0, 0, 1)
    Path("a.txt").rename("b.txt")
    assert counts_of(nv_embed("index", ".")[1])[1:5] == (0, 1, 0, 1)
    assert len(nv_embed("search", "?", "--json")[1].splitlines()) == len(parts)


def test_what_is_no_text_is_left_out_and_counted(nv_embed):
    for name, content in {
        "a.txt": b"\xef\xbb\xbfa text", ".hidden": b"x", ".git/config": b"x", "b.png": b"\x89PNG\0",
        "c.txt": b"caf\xe9", "e.txt": b"  \n", "store/x": b"x",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    os.mkfifo("pipe")
    Path("loop").symlink_to(".")
    Path(os.fsdecode(b"\xff.txt")).write_text("a text")
    code, printed, (error,) = nv_embed("index", ".", "--store", "store")
    assert code == 1
    assert error.startswith("nv-embed: expected a name in UTF-8; got ")
    assert counts_of(printed) == (2, 1, 0, 0, 0, 0)
    assert printed.splitlines()[-1] == "left out: 2 hidden, 3 not text, 1 unreadable"
    assert nv_embed("search", "?", "--store", "store")[1].endswith("a.txt:1  a text\n")


def indexed(folder, transport, model=None):
    """What a run over the files of a folder did, with a server that is not there."""
    store = Store.to_index(str(folder / ".nv-embed"), model or MockTransport(dimension=8).info)
    transport.info = transport.info or MockTransport(dimension=8).info
    once = RetryPolicy(max_attempts=1)
    with store as store, ThreadPoolExecutor(2) as pool, NVEmbedClient(transport=transport, retry=once) as client:
        files = TextFiles([str(folder)], store.folder)
        embedder = Embedder(client, client.model_info(), embedding_type="float16")
        return index(store, files, embedder, pool, lambda _: None)


def test_one_at_a_time_changes_an_index_and_others_search_it(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    folder, info = str(tmp_path / ".nv-embed"), MockTransport(dimension=8).info
    assert indexed(tmp_path, MockTransport(dimension=8)).embedded == 1
    with Store.to_index(folder, info):
        with pytest.raises(
            InvalidInput, match=r"expected no other process that changes .*; got another nv-embed index; wait"
        ):
            indexed(tmp_path, MockTransport(dimension=8))
        assert [hit.text for hit in Store(folder, info).search(np.ones(8), 5)] == ["a text"]
    assert indexed(tmp_path, MockTransport(dimension=8)).unchanged == 1


def test_another_models_vectors_are_never_added_or_searched(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    info = MockTransport(dimension=8).info
    assert indexed(tmp_path, MockTransport(dimension=8)).embedded == 1
    for other in (
        replace(info, fingerprint="1" * 32),
        replace(info, dimension=16),
        replace(info, document_prompt="passage: "),
    ):
        with pytest.raises(InvalidInput, match=r"expected the model whose vectors .* holds: nv-embed-v2 with fingerpr"):
            Store(str(tmp_path / ".nv-embed"), other)
        with pytest.raises(InvalidInput, match="; give the address of a server with that model, or choose"):
            indexed(tmp_path, MockTransport(dimension=8), other)
    assert indexed(tmp_path, MockTransport(dimension=8), replace(info, name="another-name")).unchanged == 1


@pytest.mark.parametrize("dimension", [8, 16])
def test_a_server_that_comes_back_with_another_model_adds_nothing(tmp_path, dimension):
    (tmp_path / "a.txt").write_text("a text")
    info, other = MockTransport(dimension=8).info, MockTransport(dimension=dimension)

    def changes(request):
        if request.texts == ("text",):
            return MockTransport(dimension=8).embed(request, 1)
        transport.info = replace(info, fingerprint="1" * 32, dimension=dimension)
        return other.embed(request, 1)

    transport = MockTransport(changes)
    with pytest.raises(InvalidInput, match=r"expected the same model until all is done, with fingerprint '0{32}'"):
        indexed(tmp_path, transport)
    assert indexed(tmp_path, MockTransport(dimension=8)).embedded == 1


def test_a_run_that_is_interrupted_keeps_what_it_has_embedded(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("\n\n".join(f"{i:02} {j} {'x' * 1400}" for j in range(50)))
    server = MockTransport(dimension=8)

    def dies(request):
        if "20" < request.texts[-1] < "40":  # not yet among those that are embedded first
            raise Unavailable("expected a server; got none; start it")
        return server.embed(request, 1)

    with pytest.raises(Unavailable):
        indexed(tmp_path, MockTransport(dies))
    summary = indexed(tmp_path, server)
    assert summary.embedded + summary.unchanged == 2000
    assert summary.unchanged > 0
    assert summary.failures == []
    assert indexed(tmp_path, server).unchanged == 2000


def test_a_passage_that_fails_is_named_and_is_tried_again_by_the_next_run(tmp_path):
    (tmp_path / "a.md").write_text("# One\n\ntext\n# Two\n\nbad\n# Three\n\ntext")
    (tmp_path / "b.md").write_text("# Two\n\nbad")
    server = MockTransport(dimension=8)

    def fails(request):
        if any("bad" in text for text in request.texts):
            raise ServerFailure("INTERNAL: expected finite numbers; got others for text 0; see the log")
        return server.embed(request, 1)

    summary = indexed(tmp_path, MockTransport(fails))
    assert (summary.embedded, [place for place, _ in summary.failures]) == (
        2, [f"{tmp_path}/a.md:4", f"{tmp_path}/b.md:1"],
    )  # fmt: skip
    assert "got others for a text; see" in str(summary.failures[0][1])
    summary = indexed(tmp_path, server)
    assert (summary.embedded, summary.copied, summary.unchanged, summary.failures) == (1, 1, 2, [])


def test_the_reason_of_each_text_is_known_also_if_all_fail():
    def refuses(request):
        if request.texts != ("text",):
            raise InvalidInput.of(expected="more", got=f"text 0, {request.texts[0]}", remedy="write more")
        return MockTransport(dimension=8).embed(request, 1)

    transport = MockTransport(refuses)
    transport.info = MockTransport(dimension=8).info
    with NVEmbedClient(transport=transport) as client:
        outcome = Embedder(client, transport.info, truncate="NONE").outcome(["a", InvalidInput("no text"), "b"])
    assert [str(outcome.errors[i]) for i in range(3)] == [
        "expected more; got a text, a; write more", "no text", "expected more; got a text, b; write more",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", [*(path.read_text("utf-8") for path in MINI.glob("*.md")), "x" * 9999, "é. " * 3000, ""]
)
def test_passages_are_bounded_and_leave_nothing_out(text):
    for max_characters in (MAX_CHARACTERS, 100, 1):
        passages = list(passages_of(text, max_characters))
        assert all(0 < len(passage.text) <= max_characters for passage in passages)
        assert "".join("".join(passage.text.split()) for passage in passages) == "".join(text.split())
        lines = text.split("\n")
        for passage in passages:
            assert passage.text.split("\n")[0].strip() in lines[passage.line - 1]


def test_passages_end_where_a_reader_would_end_them():
    text = "# One\n\nFirst. Second.\n\n## Two\n" + "A sentence of some words. " * 80 + "\n\nThe end.\n"
    first, *rest = passages_of(text)
    assert (first.line, first.text) == (1, "# One\n\nFirst. Second.")
    assert (rest[0].line, rest[0].text[:6]) == (5, "## Two")
    assert all(passage.text.endswith(".") for passage in rest)
    assert [part.line for part in rest[0].parts()][:1] == [5]
    assert len(rest[0].parts()) >= 2

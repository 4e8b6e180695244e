"""A corpus in parts: what a part's rows are, which ids there may be, and what a text fails of. None starts Ray."""

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import REPO
from nv_embed_client import InvalidInput, MockTransport, NVEmbedClient, ServerFailure, packed
from nv_embed_client.bulk import ids, parts, source
from nv_embed_client.bulk.folder import Folder, absolute
from nv_embed_client.bulk.plan import Plan, Wish
from nv_embed_client.bulk.source import texts_of
from nv_embed_client.bulk.vectors import Embedder, Vectors
from nv_embed_client.cli.__main__ import main
from nv_embed_client.embedding_type import EMBEDDING_TYPES
from nv_embed_client.model_info import Identity

ROWS = [
    {"id": f"{number:03}", "text": f'line {number}\nof "text", \u65e5\u672c\u8a9e ' + "x" * (number * 37 % 500)}
    for number in range(137)
]


def written(folder, form):
    """The rows in one file of that form."""
    table = pa.Table.from_pylist(ROWS)
    match form:
        case "parquet":
            pa.parquet.write_table(table, folder / "a.parquet", row_group_size=31)
        case "csv" | "csv.gz":
            sink = pa.BufferOutputStream()
            pa.csv.write_csv(table, sink)
            content = sink.getvalue().to_pybytes()
            (folder / f"a.{form}").write_bytes(content if form == "csv" else gzip.compress(content))
        case "jsonl" | "jsonl.gz":
            content = "\n".join(map(json.dumps, ROWS)).encode()  # without a last line's end
            (folder / f"a.{form}").write_bytes(content if form == "jsonl" else gzip.compress(content))
    return f"a.{form}"


@pytest.mark.parametrize("max_rows", [1, 10, 31, 100, 1000])
@pytest.mark.parametrize("form", ["parquet", "csv", "csv.gz", "jsonl", "jsonl.gz"])
def test_the_pieces_of_a_file_are_its_rows_each_once_and_in_order(form, max_rows, tmp_path):
    name = written(tmp_path, form)
    folder = Folder.at(str(tmp_path))
    cut = list(source.pieces_of(folder, name, max_rows))
    schema = source.unified(columns(None).schema for _, columns in cut)
    found = []
    for piece, columns in cut:
        assert piece.first_row == len(found)
        assert piece.num_rows <= max_rows
        found += source.rows_of(folder, piece, schema).to_pylist()
        assert columns(["id"]).num_rows == piece.num_rows
    assert found == ROWS
    assert [piece for piece, _ in source.pieces_of(folder, name, max_rows)] == [piece for piece, _ in cut]


def test_json_keeps_what_looks_like_a_date_and_a_type_that_comes_late(tmp_path):
    lines = ['{"text": "a", "day": "2024-01-01", "n": 1, "more": [{"at": "2024-01-01T00:00:00Z"}]}', '{"n": 2.5}']
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    folder = Folder.at(str(tmp_path))
    cut = [(piece, columns(None)) for piece, columns in source.pieces_of(folder, "a.jsonl", 1)]
    schema = source.unified(table.schema for _, table in cut)
    rows = [row for piece, _ in cut for row in source.rows_of(folder, piece, schema).to_pylist()]
    assert rows == [
        {"text": "a", "day": "2024-01-01", "n": 1.0, "more": [{"at": "2024-01-01T00:00:00Z"}]},
        {"text": None, "day": None, "n": 2.5, "more": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,text\n1,b\n2\n", "expected csv in a.csv; got 1 fields in row 1, and 2 names of columns; repair"),
        ("a.csv", b'id,text\n1,"b\n', "expected csv in a.csv; got unexpected end of data"),
        ("a.csv", b"id,text\n1,caf\xe9\n", "expected csv in a.csv; got 'utf-8' codec"),
        ("a.csv", b"id,id\n", "expected different names of columns in the first line; got ['id', 'id'] in a.csv"),
        ("a.csv", b"", "expected names of columns in the first line; got nothing in a.csv; add them"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "expected jsonl in a.jsonl; got JSON parse error"),
        ("a.jsonl", b'"a"\n', "expected jsonl in a.jsonl; got JSON parse error"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "expected jsonl in a.jsonl.gz; got "),
        ("a.txt", b"\xff\n", "expected txt in a.txt; got 'utf-8' codec can't decode"),
        ("a.parquet", b"PAR1", "expected parquet in a.parquet; got "),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput) as refused:
        list(source.pieces_of(Folder.at(str(tmp_path)), name, 10))
    assert str(refused.value).startswith(message)


def test_a_corpus_is_of_one_format_and_leaves_out_hidden_and_other_files(tmp_path):
    for name in ("b/part.csv", "a.csv.gz", "README.md", "_failed/x.csv", ".cache/x.csv", "x.parquet.gz", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, others = source.corpus_of(Folder.at(str(tmp_path)), "here")
    assert [file.name for file in files] == ["a.csv.gz", "b/part.csv"]
    assert [other.name for other in others] == ["README.md", "x.parquet.gz", "notes.txt"]
    (file,), _ = source.corpus_of(Folder.at(str(tmp_path / "a.csv.gz")), "here")
    assert file.name == "a.csv.gz"
    (file,), _ = source.corpus_of(Folder.at(str(tmp_path / "_failed" / "x.csv")), "here")
    assert file.name == "x.csv"  # a hidden one, too, if it is named
    (tmp_path / "c.parquet").touch()
    with pytest.raises(InvalidInput, match=r"expected files of one format.*; got csv and parquet at 'here'; give"):
        source.corpus_of(Folder.at(str(tmp_path)), "here")
    with pytest.raises(InvalidInput, match="got none at 'absent'"):
        source.corpus_of(Folder.at(str(tmp_path / "absent")), "absent")


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])  # the last is one of fsspec's
def test_a_file_is_replaced_as_a_whole_on_every_file_system(scheme, tmp_path):
    folder = Folder.at(f"{scheme}{tmp_path}/new/folder")
    assert folder.is_empty()
    assert folder.read("a/b.txt") is None
    for content in (b"one", b"another"):
        folder.write("a/b.txt", content)
        assert folder.read("a/b.txt") == content
    assert [(entry.name, entry.size) for entry in folder.entries()] == [("a/b.txt", 7)]
    folder.tidy()
    folder.remove("a/b.txt")
    folder.remove("a/b.txt")
    assert folder.entries() == []
    assert absolute(f"s3://bucket{scheme}") == f"s3://bucket{scheme}"


def test_a_file_without_rows_does_not_keep_others_from_having_one_schema(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert list(source.pieces_of(Folder.at(str(tmp_path)), "empty.jsonl", 10)) == []
    assert source.unified([]) == pa.schema([])
    text = pa.schema([("text", pa.string())])
    assert source.unified([source.unified([]), text]) == text


def test_an_address_that_nobody_knows_is_refused():
    with pytest.raises(InvalidInput, match="expected a path, or an address that pyarrow or fsspec reads; got 'x1://y'"):
        Folder.at("x1://y")


def test_repeated_ids_are_found_across_files_though_only_hashes_are_compared():
    one, other = pa.array(["7", "8", "9"]), pa.array([10, 9, 11])
    shards = zip(ids.hashes_of(one), ids.hashes_of(other), strict=True)
    suspicious = [hashes for hashes in (ids.repeated(*shard) for shard in shards) if len(hashes)]
    suspects = [id_ for hashes in suspicious for array in (one, other) for id_ in ids.with_hashes(array, hashes)]
    assert suspects == ["9", "9"]
    with pytest.raises(InvalidInput, match="expected another id in 'key' of each row; got 1 ids in several rows: '9'"):
        ids.check_unique(suspects, "key")
    ids.check_unique(["7", "8"], "key")  # two ids with the same hash


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", None]), "expected an id in 'key' of each row; got none in row 11 of a.csv; add it"),
        (pa.array([1.0, 2.0]), "expected strings or integers as ids in 'key'; got double in a.csv; convert it"),
    ],
)
def test_what_cannot_be_an_id_is_refused(column, message):
    with pytest.raises(InvalidInput) as refused:
        ids.ids_of(pa.table({"key": column}), source.Piece("a.csv", 0, 0, 10, 2), "key")
    assert str(refused.value) == message


def test_a_plan_knows_the_width_of_rows_also_of_signs_that_fill_no_whole_byte():
    widths = {
        embedding_type: Plan(
            Wish("in", embedding_type=embedding_type), Identity("m", "f", 300, ""), (), pa.schema([]), ()
        ).width
        for embedding_type in EMBEDDING_TYPES
    }
    assert widths == dict.fromkeys(("float", "float16", "int8", "uint8"), 300) | {"binary": 38, "ubinary": 38}


def test_ids_are_made_of_file_and_row():
    made = ids.ids_of(pa.table({"text": ["a", "b"]}), source.Piece("f/a.csv", 0, 0, 10, 2), None)
    assert made.to_pylist() == ["f/a.csv:10", "f/a.csv:11"]


@pytest.mark.parametrize("embedding_type", ["float", "float16", "int8", "ubinary"])
def test_a_part_keeps_columns_of_any_type_and_says_whose_its_vectors_are(embedding_type, tmp_path):
    table = pa.table(
        {
            "text": pa.array(["a", "b", "a"]).dictionary_encode(),
            "more": [[{"x": 1}], [], None],
            "empty": pa.nulls(3),
            "a.b": pa.array([1, 2, 3], pa.int16()),
            "bytes": [b"\0", None, b""],
        }
    )
    (tmp_path / "in").mkdir()
    pa.parquet.write_table(table, tmp_path / "in" / "a.parquet")
    folder, source_folder = Folder.at(str(tmp_path / "out")), Folder.at(str(tmp_path / "in"))
    schema = source.schema_of(source_folder, "a.parquet")
    pieces = tuple(piece for piece, _ in source.pieces_of(source_folder, "a.parquet", 10))
    plan = Plan(
        Wish(str(tmp_path / "in"), embedding_type=embedding_type),
        Identity("name", "print", 16, ""),
        tuple(source_folder.entries()),
        schema,
        pieces,
    )
    plan.write(folder)
    assert Plan.read(folder) == plan
    table = source.rows_of(source_folder, pieces[0], plan.schema)
    assert texts_of(table, "text") == ["a", "b", "a"]
    rows = packed(np.eye(3, 16, dtype=np.float32), embedding_type)
    reasons = {1: "it failed"}
    kept = Vectors(np.array([0, 2]), rows[[0, 2]], np.array([1, 2], np.int32), np.array([True, False]), reasons)
    for _ in range(2):
        parts.write(folder, plan, 0, table, kept)
    read = pa.parquet.read_table(tmp_path / "out" / "part-000000.parquet")
    assert read.select(table.column_names).to_pylist() == table.take([0, 2]).to_pylist()
    assert read["id"].to_pylist() == ["a.parquet:0", "a.parquet:2"]
    assert np.array_equal(np.stack(read["embedding"].to_numpy()), rows[[0, 2]])
    assert read.schema.field("embedding").type.list_size == rows.shape[1]
    assert json.loads(read.schema.metadata[b"nv_embed"]) == {
        "name": "name", "fingerprint": "print", "dimension": 16, "document_prompt": "",
        "embedding_type": embedding_type, "instruction": None, "id_column": "id",
    }  # fmt: skip
    assert json.loads(folder.read("_failed/part-000000.jsonl")) == {"id": "a.parquet:1", "reason": "it failed"}
    assert parts.finished(folder, range(2)) == {0: 2}
    (tmp_path / "out" / "part-000001.parquet").write_bytes(b"PAR1 without an end")
    assert parts.finished(folder, range(2)) == {0: 2}
    everything = Vectors(np.arange(3), rows, np.ones(3, np.int32), np.zeros(3, np.bool_), {})
    parts.write(folder, plan, 0, table, everything)
    assert folder.read("_failed/part-000000.jsonl") is None


def test_an_empty_file_is_no_piece(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.csv").write_text("id,text\n")
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        assert list(source.pieces_of(Folder.at(str(tmp_path)), name, 10)) == []
    assert source.unified([]) == pa.schema([])


class Moody(MockTransport):
    """Fails the texts that say so, and everything while it is `down`; each vector has its text's number."""

    def __init__(self):
        super().__init__(self._answer)
        self.down = 0

    def _answer(self, request):
        if self.down:
            self.down -= 1
            raise ServerFailure("INTERNAL: the stub is not healthy")
        if any("poison" in text for text in request.texts):
            raise ServerFailure("INTERNAL: it does not fit into memory")
        if any("refused" in text for text in request.texts):
            raise InvalidInput("expected less; got more; shorten it")
        return [[float(text) if text.isdigit() else 0.0] for text in request.texts]


def test_a_text_fails_for_a_reason_of_its_own_and_takes_no_other_with_it():
    texts = [None if i == 5 else "poison" if i == 300 else "refused" if i == 301 else str(i) for i in range(700)]
    with NVEmbedClient(transport=Moody()) as client:
        vectors = Embedder(client).vectors_of(texts, 1)
    assert vectors.reasons == {
        5: "expected a text; got none; add it",
        300: "INTERNAL: it does not fit into memory",
        301: "expected less; got more; shorten it",
    }
    assert vectors.rows.tolist() == [i for i in range(700) if i not in (5, 300, 301)]
    np.testing.assert_array_equal(vectors.embeddings[:, 0], vectors.rows)
    assert vectors.num_tokens.tolist() == [1] * 697
    assert not vectors.is_truncated.any()


def test_a_server_that_fails_everything_for_a_while_costs_no_text():
    transport = Moody()
    transport.down = 12
    with NVEmbedClient(transport=transport) as client:
        vectors = Embedder(client).vectors_of([str(i) for i in range(20)], 1)
    assert vectors.reasons == {}
    np.testing.assert_array_equal(vectors.embeddings[:, 0], np.arange(20))


def test_patience_with_a_server_that_computes_nothing_ends():
    transport = Moody()
    transport.down = 10**9
    with NVEmbedClient(transport=transport) as client, pytest.raises(ServerFailure, match="the stub is not healthy"):
        Embedder(client, patience_seconds=0.5).vectors_of(["a"], 1)


def test_no_text_at_all_is_no_row():
    with NVEmbedClient(transport=Moody()) as client:
        vectors = Embedder(client, "int8").vectors_of([None], 3)
    assert vectors.embeddings.shape == (0, 3)
    assert vectors.embeddings.dtype == np.int8


def test_every_option_is_documented_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    with pytest.raises(SystemExit, match="0"):
        main(["bulk", "--help"])
    options = re.findall(r"^  (--[a-z-]+).*?(?:\(default: ([^)]*)\))?$", capsys.readouterr().out, re.MULTILINE)
    page = (REPO / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = {name: row for row, name in re.findall(r"^(\| `(--[a-z-]+).*)$", page, re.MULTILINE)}
    assert rows.keys() == {name for name, _ in options} - {"--model-name"}
    for name, default in options:
        if default and name not in ("--url", "--model-name"):
            assert default in rows[name].replace(",", ""), name

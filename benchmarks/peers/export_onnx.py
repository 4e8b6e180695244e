"""Writes a BERT of sentence-transformers as ONNX, for infinity's engine `optimum`.

    python benchmarks/peers/export_onnx.py FOLDER TARGET

infinity's ONNX engine cuts texts at the network's longest, and not where the model's own folder says. So the longest is
set to that: all servers compute the same tokens.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModel

folder, target = map(Path, sys.argv[1:])
target.mkdir()
for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
    if (folder / name).is_file():
        shutil.copy(folder / name, target)
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
limits = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
config["max_position_embeddings"] = limits["max_seq_length"]
(target / "config.json").write_text(json.dumps(config), encoding="utf-8")


class Network(torch.nn.Module):
    """The model with its inputs in a fixed order, and one output."""

    def __init__(self):
        super().__init__()
        self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    def forward(self, input_ids, attention_mask, token_type_ids):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.model(**inputs).last_hidden_state


inputs, output = ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"
example = torch.tensor([[101, 102, 0], [101, 1000, 102]])
torch.onnx.export(
    Network(), (example, (example > 0).long(), torch.zeros_like(example)), str(target / "model.onnx"),
    input_names=inputs, output_names=[output], opset_version=17,
    dynamic_axes={name: {0: "batch", 1: "tokens"} for name in (*inputs, output)},
    dynamo=False,  # the newer way needs another package
)  # fmt: skip

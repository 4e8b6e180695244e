"""The student's first weights: two of the teacher's six layers, rewritten in the student's form.

BERT normalizes after every addition, has biases and a table of positions, and its MLPs are not gated; the student
normalizes what a layer reads, has no biases, rotates, and gates. No identity makes one into the other, so what a
layer reads is fitted: the teacher's states and the student's stream are followed side by side through sample texts,
and each matrix that reads the stream is the one that comes nearest, by least squares, to what the teacher's reads.
What that leaves, training repairs. Positions are left out; training learns them through the rotation.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from product import CheckpointConfig
from student import Layer, Student
from teacher import Teacher
from torch import Tensor, nn
from vocabulary import Vocabulary

LAYERS = (0, 5)  # the first reads tokens, the last says what the teacher says
RIDGE = 0.03
GELU_AS_SILU = 1.702  # gelu(x) is about silu(1.702 x) / 1.702


@dataclass(slots=True)
class Stream:
    """What runs through the student's layers, over all sample tokens, beside what runs through the teacher's.

    The teacher's state is, nearly, `scale` x `values` + a constant: each of its norms changes the scale. One dimension,
    of little use to the teacher, is a constant of the student's own: what biases are read from.
    """

    values: Tensor  # [tokens, C]
    scale: Tensor  # [C]
    constant: int

    @property
    def others(self) -> Tensor:
        return torch.arange(len(self.scale)) != self.constant

    def read(self, norm: nn.RMSNorm) -> Tensor:
        """The stream behind `norm`, whose weights are set to make its usual values ones: [tokens, C]."""
        out = self.values * self.values.square().mean(1, keepdim=True).rsqrt()
        norm.weight.fill_(1 / out[:, self.others].square().mean().sqrt())
        norm.weight[self.constant] = 1 / out[:, self.constant].mean()
        return out * norm.weight.double()

    def writing(self, weight: Tensor) -> Tensor:
        """A matrix of the teacher's that adds to its state, as one that adds to the stream."""
        return weight / self.scale[:, None] * self.others[:, None]

    def add(self, written: Tensor) -> None:
        """Add what the teacher adds to its state."""
        self.values = self.values + self.others * written / self.scale


Seen = dict[nn.Module, Tensor]  # what each of the teacher's modules is given, [tokens, C]


@torch.no_grad()
def graft(c: CheckpointConfig, teacher: Teacher, vocabulary: Vocabulary, texts: list[str]) -> Student:
    """A student to train on, in the place of a random one; `texts`: a thousand samples to fit it on.

    At first it is no nearer to the teacher than the teacher without its other four layers; training goes on from there.
    """
    bert = deepcopy(teacher.model).cpu().double()
    sizes = (bert.config.hidden_size, bert.config.num_attention_heads, bert.config.intermediate_size, len(LAYERS))
    assert sizes == (c.hidden_size, c.num_heads, 4 * c.hidden_size, c.num_layers)
    assert c.num_kv_heads * c.head_dim == c.hidden_size  # a head of keys and values for each of queries
    bert.encoder.layer = nn.ModuleList(bert.encoder.layer[i] for i in LAYERS)
    begins = token_states(bert)
    seen, values, last = follow(bert, begins, [e.ids for e in teacher.tokenizer.encode_batch(texts)])
    stream = Stream(values, torch.ones(c.hidden_size, dtype=torch.float64), int(last.var(0).argmin()))
    student = Student(c)
    encoder = student.embedding_model

    level = values[:, stream.others].square().mean().sqrt() * c.hidden_size**0.5
    vectors = token_vectors(begins, teacher, vocabulary)
    vectors[:, stream.constant] = values[:, stream.constant] = level
    encoder.embed_tokens.weight.copy_(vectors)
    lower, upper = zip(bert.encoder.layer, encoder.layers, strict=True)
    graft_attention(*lower, stream, seen)
    graft_mlp(*lower, stream, seen)
    graft_attention(*upper, stream, seen)
    # The last MLP becomes the pooling head's, which has its size, its gelu and biases; the layer's own starts silent.
    upper[1].mlp.down_proj.weight.zero_()
    graft_head(upper[0], student, stream, seen, last)
    return student


def graft_attention(old: nn.Module, new: Layer, stream: Stream, seen: Seen) -> None:
    attention, out = old.attention.self, old.attention.output
    state, summed = seen[attention], seen[out.LayerNorm]
    inputs = stream.read(new.input_layernorm)
    new.self_attn.q_proj.weight.copy_(fit(inputs, attention.query(state)))
    new.self_attn.k_proj.weight.copy_(fit(inputs, attention.key(state)))
    new.self_attn.v_proj.weight.copy_(fit(inputs, attention.value(state)))
    new.self_attn.o_proj.weight.copy_(stream.writing(out.dense.weight))
    # The values' biases came with v_proj; of all that is constant only changes matter, norms take the rest.
    stream.add(summed - state - out.dense.bias)
    stream.scale = stream.scale * usual_scale(out.LayerNorm, summed)


def graft_mlp(old: nn.Module, new: Layer, stream: Stream, seen: Seen) -> None:
    """Those of the teacher's units that say most, what the others say fitted to them."""
    state, out = seen[old.intermediate], old.output
    before = old.intermediate.dense(state)
    active = nn.functional.gelu(before)
    inputs = stream.read(new.post_attention_layernorm)
    count = new.mlp.gate_proj.out_features
    kept = (active.var(0) * out.dense.weight.square().sum(0)).topk(count).indices
    write = fit(active[:, kept], (active - active.mean(0)) @ out.dense.weight.T)
    new.mlp.gate_proj.weight.copy_(GELU_AS_SILU * fit(inputs, before[:, kept]))
    new.mlp.up_proj.weight.zero_()
    new.mlp.up_proj.weight[:, stream.constant] = 1 / GELU_AS_SILU
    new.mlp.down_proj.weight.copy_(stream.writing(write))
    stream.add(active[:, kept] @ write.T)
    stream.scale = stream.scale * usual_scale(out.LayerNorm, seen[out.LayerNorm])


def graft_head(old: nn.Module, student: Student, stream: Stream, seen: Seen, last: Tensor) -> None:
    """The teacher's last MLP and norm as the pooling head; attention to the latents starts silent."""
    attend, feed = student.latent_attention_model.cross_attend_blocks
    expand, _, contract = feed.fn.net
    attend.fn.to_out.weight.zero_()
    before = old.intermediate.dense(seen[old.intermediate])
    scale = usual_scale(old.output.LayerNorm, seen[old.output.LayerNorm])
    wrote = (nn.functional.gelu(before) @ old.output.dense.weight.T) * scale
    wrote, target = wrote - wrote.mean(0), last - last.mean(0)
    norm = student.embedding_model.norm
    inputs = stream.read(norm)
    varies = inputs - inputs.mean(0)
    slope = (varies * (target - wrote)).mean(0) / varies.square().mean(0).clamp(min=1e-9) * stream.others
    norm.weight.mul_(slope)
    pooled = inputs * slope
    inputs = nn.functional.layer_norm(pooled, pooled.shape[1:])
    gates = fit(torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1), before)  # the last column: biases
    width = len(gates)
    expand.weight.zero_()
    expand.bias[:width] = 1.0
    expand.weight[width:], expand.bias[width:] = gates[:, :-1].float(), gates[:, -1].float()
    contract.weight.copy_(old.output.dense.weight * scale[:, None])
    said = pooled + nn.functional.gelu(gates[:, :-1] @ inputs.T + gates[:, -1:]).T @ contract.weight.double().T
    contract.bias.copy_((last - said).mean(0))


def fit(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The matrix [outputs, inputs] of least squares, with a ridge."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE**2 * inputs.square().mean() * len(inputs))
    return torch.linalg.solve(gram, inputs.T @ outputs).T


def usual_scale(norm: nn.LayerNorm, inputs: Tensor) -> Tensor:
    """What a norm multiplies by, [C], once its standard deviation is taken for what it is on average.

    Where the norm's weight is next to nothing the stream would have to hold next to everything: bounded.
    """
    weight = norm.weight
    return weight.sign() * weight.abs().clamp(min=0.2) / inputs.std(1).mean()


def token_states(bert: nn.Module) -> Tensor:
    """[teacher's vocabulary, C]: what each of its tokens begins as, at no place in particular."""
    table = bert.embeddings
    place = table.position_embeddings.weight[1:24].mean(0)
    return table.LayerNorm(table.word_embeddings.weight + place + table.token_type_embeddings.weight[0])


def token_vectors(begins: Tensor, teacher: Teacher, vocabulary: Vocabulary) -> Tensor:
    """[vocabulary, C]: for each of the student's tokens the mean over the teacher's pieces of the same text.

    What is inside a word but is no such piece of the teacher's is cut as if it began one.
    """
    known = teacher.tokenizer.get_vocab()
    vectors = begins.mean(0).repeat(vocabulary.size, 1)
    vectors[1], vectors[2] = begins[known["[CLS]"]], begins[known["[SEP]"]]
    for token, (word, starts_word) in enumerate(vocabulary.words()):
        inside = known.get("##" + word)
        pieces = [inside] if inside and not starts_word else teacher.tokenizer.encode(word).ids[1:-1]
        if pieces:
            vectors[token] = begins[pieces].mean(0)
    return vectors


def follow(bert: nn.Module, begins: Tensor, rows: list[list[int]]) -> tuple[Seen, Tensor, Tensor]:
    """What modules of the teacher are given, what its tokens begin as and what comes out, each [tokens, C]."""
    taken: dict[nn.Module, list[Tensor]] = {}

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken.setdefault(module, []).append(inputs[0].flatten(0, 1))

    for layer in bert.encoder.layer:
        for module in (layer.attention.self, layer.attention.output.LayerNorm, layer.intermediate,
                       layer.output.LayerNorm):  # fmt: skip
            module.register_forward_pre_hook(take)
    last = torch.cat([bert(torch.tensor([row]))[0][0] for row in rows])
    stream = torch.cat([begins[row] for row in rows])
    return {module: torch.cat(parts) for module, parts in taken.items()}, stream, last

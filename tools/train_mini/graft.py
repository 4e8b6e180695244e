"""The student's first weights: two of the teacher's six layers, rewritten in the student's form.

BERT normalizes after every addition, has biases and a table of positions, and its MLPs are not gated; the student
normalizes what a layer reads, has no biases, rotates, and gates. No identity makes one into the other, so what a
layer reads is fitted: the teacher's states and the student's stream are followed side by side through sample texts,
and each matrix that reads the stream is the one that comes nearest, by least squares, to what the teacher's reads.
What that leaves, training repairs. Positions are left out; training learns them through the rotation.
"""

from copy import deepcopy

import torch
from student import Config, Student
from teacher import Teacher
from torch import Tensor, nn
from vocabulary import Vocabulary

LAYERS = (0, 5)  # the first reads tokens, the last says what the teacher says
RIDGE = 0.03
GELU_AS_SILU = 1.702  # gelu(x) is about silu(1.702 x) / 1.702


@torch.no_grad()
def graft(c: Config, teacher: Teacher, vocabulary: Vocabulary, texts: list[str]) -> Student:
    """A student to train on, in the place of a random one; `texts`: a thousand samples to fit it on.

    It is as little like the teacher, at first, as the teacher without its other layers is; but it learns from there.
    """
    assert (len(LAYERS), c.num_heads) == (c.num_layers, c.num_kv_heads)
    bert = deepcopy(teacher.model).cpu().double()
    bert.encoder.layer = nn.ModuleList(bert.encoder.layer[i] for i in LAYERS)
    begins = token_states(bert)
    seen, stream, last = follow(bert, begins, [e.ids for e in teacher.tokenizer.encode_batch(texts)])
    student = Student(c)
    encoder, (attend, feed) = student.embedding_model, student.latent_attention_model.blocks

    # One dimension of the stream, of little use to the teacher, is a constant: what biases are read from.
    constant = int(last.var(0).argmin())
    others = torch.arange(c.hidden_size) != constant
    level = stream[:, others].square().mean().sqrt() * c.hidden_size**0.5
    vectors = token_vectors(begins, teacher, vocabulary)
    vectors[:, constant] = stream[:, constant] = level
    encoder.embed_tokens.weight.copy_(vectors)

    def read(norm: nn.RMSNorm) -> Tensor:
        """The stream behind `norm`, whose weights are set to make its usual values ones."""
        out = stream * stream.square().mean(1, keepdim=True).rsqrt()
        norm.weight.fill_(1 / out[:, others].square().mean().sqrt())
        norm.weight[constant] = 1 / out[:, constant].mean()
        return out * norm.weight.double()

    # The teacher's state is, nearly, scale x stream + a constant: each of its norms changes the scale.
    scale = torch.ones(c.hidden_size, dtype=torch.float64)
    for number, (old, new) in enumerate(zip(bert.encoder.layer, encoder.layers, strict=True)):
        attention, out = old.attention.self, old.attention.output
        state, summed = seen[attention], seen[out.LayerNorm]
        inputs = read(new.input_layernorm)
        for old_map, new_map in (
            (attention.query, new.self_attn.q_proj), (attention.key, new.self_attn.k_proj),
            (attention.value, new.self_attn.v_proj),
        ):  # fmt: skip
            new_map.weight.copy_(fit(inputs, old_map(state)))
        new.self_attn.o_proj.weight.copy_(out.dense.weight / scale[:, None] * others[:, None])
        # The values' biases came with v_proj; of all that is constant only changes matter, norms take the rest.
        stream = stream + others * (summed - state - out.dense.bias) / scale
        scale = scale * usual_scale(out.LayerNorm, summed)

        state, summed = seen[old.intermediate], seen[old.output.LayerNorm]
        active = nn.functional.gelu(old.intermediate.dense(state))
        if number == c.num_layers - 1:
            break
        inputs = read(new.post_attention_layernorm)
        kept = (active.var(0) * old.output.dense.weight.square().sum(0)).topk(c.intermediate_size).indices
        write = fit(active[:, kept], (active - active.mean(0)) @ old.output.dense.weight.T)
        new.mlp.gate_proj.weight.copy_(GELU_AS_SILU * fit(inputs, old.intermediate.dense(state)[:, kept]))
        new.mlp.up_proj.weight.zero_()
        new.mlp.up_proj.weight[:, constant] = 1 / GELU_AS_SILU
        new.mlp.down_proj.weight.copy_(write / scale[:, None] * others[:, None])
        stream = stream + others * (active[:, kept] @ write.T) / scale
        scale = scale * usual_scale(old.output.LayerNorm, summed)

    # The last MLP becomes the pooling head's, which has its size, its gelu and biases; the layer's own starts silent,
    # and so does attention to the latents.
    new.mlp.down_proj.weight.zero_()
    attend.fn.to_out.weight.zero_()
    norm = old.output.LayerNorm
    wrote = (active @ old.output.dense.weight.T) * usual_scale(norm, summed)
    wrote, target = wrote - wrote.mean(0), last - last.mean(0)
    inputs = read(encoder.norm)
    varies = inputs - inputs.mean(0)
    slope = (varies * (target - wrote)).mean(0) / varies.square().mean(0).clamp(min=1e-9) * others
    encoder.norm.weight.mul_(slope)
    pooled = inputs * slope
    inputs = nn.functional.layer_norm(pooled, pooled.shape[1:])
    width = 4 * c.hidden_size
    gates = fit(torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1), old.intermediate.dense(state))
    feed.fn.expand.weight.zero_()
    feed.fn.expand.bias[:width] = 1.0
    feed.fn.expand.weight[width:], feed.fn.expand.bias[width:] = gates[:, :-1].float(), gates[:, -1].float()
    feed.fn.contract.weight.copy_(old.output.dense.weight * usual_scale(norm, summed)[:, None])
    said = pooled + nn.functional.gelu(gates[:, :-1] @ inputs.T + gates[:, -1:]).T @ feed.fn.contract.weight.double().T
    feed.fn.contract.bias.copy_((last - said).mean(0))
    return student


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
    states: Tensor = table.LayerNorm(table.word_embeddings.weight + place + table.token_type_embeddings.weight[0])
    return states


def token_vectors(begins: Tensor, teacher: Teacher, vocabulary: Vocabulary) -> Tensor:
    """[vocabulary, C]: for each of the student's tokens the mean over the teacher's pieces of the same text."""
    known = teacher.tokenizer.get_vocab()
    vectors = begins.mean(0).repeat(vocabulary.size, 1)
    vectors[1], vectors[2] = begins[known["[CLS]"]], begins[known["[SEP]"]]
    for token, (word, starts_word) in enumerate(vocabulary.words()):
        inside = known.get("##" + word)
        pieces = [inside] if inside and not starts_word else teacher.tokenizer.encode(word).ids[1:-1]
        if pieces:
            vectors[token] = begins[pieces].mean(0)
    return vectors


def follow(bert: nn.Module, begins: Tensor, rows: list[list[int]]) -> tuple[dict[nn.Module, Tensor], Tensor, Tensor]:
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

"""The first weights: token vectors of the teacher's, the attention of two of its layers, the MLP of its last.

BERT normalizes after every addition, has biases and a table of positions, and its MLPs are not gated; the student
normalizes what a layer reads, has no biases, rotates, and gates. So the copy does not compute what the teacher does,
but it learns that far sooner than random weights.
"""

import torch
from student import Student
from teacher import Teacher
from torch import Tensor
from vocabulary import Vocabulary

LAYERS = (0, 5)  # of six: the first, which reads token vectors, and the last, which makes the teacher's own
POSITION = 5  # any but the first, which is unlike the others: the student has no table of positions


@torch.no_grad()
def token_vectors(vocabulary: Vocabulary, teacher: Teacher) -> Tensor:
    """[vocabulary, C]: for each token the mean of what BERT's embedding layer makes of its word pieces.

    A token without text has the mean over all pieces. One inside a word, where BERT has no such piece, is cut as if it
    began the word.
    """
    known = teacher.tokenizer.get_vocab()
    ids = torch.arange(len(known), device=teacher.bert.device)[:, None]
    embedded = teacher.bert.embeddings(ids, position_ids=torch.full_like(ids, POSITION))[:, 0].cpu()
    vectors = embedded.mean(0).repeat(vocabulary.size, 1)
    vectors[1], vectors[2] = embedded[known["[CLS]"]], embedded[known["[SEP]"]]  # <s>, </s>
    for token, (word, starts_word) in enumerate(vocabulary.words()):
        inside = known.get("##" + word)
        pieces = [inside] if inside and not starts_word else teacher.tokenizer.encode(word).ids[1:-1]
        if pieces:
            vectors[token] = embedded[pieces].mean(0)
    return vectors


@torch.no_grad()
def copy_teacher(student: Student, vocabulary: Vocabulary, teacher: Teacher) -> Student:
    """The student with the teacher's weights; the student's own MLPs and its attention to the latents start silent."""
    tokens, layers = token_vectors(vocabulary, teacher), teacher.bert.encoder.layer
    student.token_vectors.weight.copy_(tokens)
    before = [tokens.square().mean().sqrt(), layers[LAYERS[1] - 1].output.LayerNorm.weight]  # the scale of what is read
    for i, scale, new in zip(LAYERS, before, student.embedding_model.layers, strict=True):
        old = layers[i].attention
        new.input_layernorm.weight.copy_(scale)
        for to, source in (("q_proj", old.self.query), ("k_proj", old.self.key), ("v_proj", old.self.value),
                           ("o_proj", old.output.dense)):  # fmt: skip
            new.self_attn.get_submodule(to).weight.copy_(source.weight)
        new.mlp.down_proj.weight.zero_()
    # The last layer's MLP becomes the pooling head's, which has its size, its gelu and biases.
    attend, feed = student.latent_attention_model.cross_attend_blocks
    attend.fn.to_out.weight.zero_()
    last, read = layers[LAYERS[1]], layers[LAYERS[1]].attention.output.LayerNorm
    said = last.output.LayerNorm
    student.embedding_model.norm.weight.copy_(read.weight * said.weight)
    feed.norm.load_state_dict(read.state_dict())
    expand, _, contract = feed.fn.net
    dense = last.intermediate.dense
    # The first half of what it gives is a factor, here always one.
    expand.weight.copy_(torch.cat([torch.zeros_like(dense.weight), dense.weight]))
    expand.bias.copy_(torch.cat([torch.ones_like(dense.bias), dense.bias]))
    contract.weight.copy_(last.output.dense.weight * said.weight[:, None])
    contract.bias.copy_(last.output.dense.bias * said.weight + said.bias)
    return student

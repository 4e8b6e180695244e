"""The choice of an attention kernel: what is named must run, and must compute attention."""

from __future__ import annotations

import pytest
import torch
from nv_embed.compute import attention
from nv_embed.compute.attention import attend_each, attend_short_together, choose_attention, prove
from nv_embed.compute.pieces import Whole
from nv_embed.errors import DeviceError
from nv_embed.models.protocol import Heads, PackedBatch
from torch.nn import functional

CPU = torch.device("cpu")
HEADS = Heads(12, 12, 32)  # of the default checkpoint


def attend_masked(q, k, v, batch, work):
    """All at once, with a mask that keeps sequences apart: written differently from the product."""
    owner = torch.repeat_interleave(torch.arange(len(batch.seqlens)), torch.tensor(batch.seqlens))
    groups = q.shape[1] // k.shape[1]
    q, k, v = (t.float().transpose(0, 1) for t in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(owner[:, None] != owner, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def attend_causally(q, k, v, batch, work):
    """What flash attention does when asked the wrong way."""
    out, start = torch.empty_like(q), 0
    groups = q.shape[1] // k.shape[1]
    tensors = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    for n in batch.seqlens:
        parts = (t[start : start + n].transpose(0, 1) for t in tensors)
        out[start : start + n] = functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(0, 1)
        start += n
    return out


def test_a_cpu_computes_short_sequences_together_unless_told_otherwise():
    assert choose_attention("auto", HEADS, CPU, torch.float32) is attend_short_together
    assert choose_attention("sdpa", HEADS, CPU, torch.float32) is attend_each


@pytest.mark.parametrize("seqlens", [(7,), (1, 5, 3), (64, 1, 40, 64), (1, 65), (60, 1, 1, 1, 1), (20,) * 9])
@pytest.mark.parametrize("num_kv_heads", [2, 6])
def test_short_sequences_computed_together_attend_to_themselves_alone(seqlens, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(seqlens), 6 + 2 * num_kv_heads, 8, generator=generator)
    q, k, v = qkv.split_with_sizes((6, num_kv_heads, num_kv_heads), dim=1)
    nothing = torch.empty(0, dtype=torch.int32)
    batch = PackedBatch(nothing, nothing, nothing, max(seqlens), seqlens, nothing, seqlens)
    attended = attend_short_together(q, k, v, batch, Whole())
    torch.testing.assert_close(attended, attend_masked(q, k, v, batch, Whole()), atol=1e-5, rtol=1e-5)
    rounded = attend_short_together(q.bfloat16(), k.bfloat16(), v.bfloat16(), batch, Whole())
    torch.testing.assert_close(rounded.float(), attended, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("seqlens", "head_dim", "num_calls"),
    [
        ((1, 5, 3), 8, 0), ((20,) * 9, 8, 0), ((48, 1, 40, 48), 32, 0), ((12, 5, 12), 128, 0),
        ((7,), 8, 1), ((60, 1, 1, 1, 1), 8, 5), ((48, 49), 32, 2), ((12, 5, 13), 128, 3),
    ],
)  # fmt: skip
def test_only_sequences_of_few_numbers_a_head_and_about_one_length_are_computed_together(
    seqlens, head_dim, num_calls, monkeypatch
):
    calls, attend = [], functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(1)
        return attend(*arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    q, k, v = torch.randn(sum(seqlens), 3, 4, head_dim).unbind(dim=1)
    nothing = torch.empty(0, dtype=torch.int32)
    batch = PackedBatch(nothing, nothing, nothing, max(seqlens), seqlens, nothing, seqlens)
    attend_short_together(q, k, v, batch, Whole())
    assert len(calls) == num_calls


def test_many_short_sequences_are_computed_in_parts(monkeypatch):
    seqlens = (9, 3, 8, 9, 5, 7, 2, 9)
    q, k, v = torch.randn(sum(seqlens), 3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(dim=1)
    nothing = torch.empty(0, dtype=torch.int32)
    batch = PackedBatch(nothing, nothing, nothing, 9, seqlens, nothing, seqlens)
    expected = attend_masked(q, k, v, batch, Whole())
    for most_scores in (1, 4 * 9 * 9 * 3, 4 * 9 * 9 * 8):  # one sequence, three and all at a time
        monkeypatch.setattr(attention, "_MOST_SCORES", most_scores)
        torch.testing.assert_close(attend_short_together(q, k, v, batch, Whole()), expected, atol=1e-5, rtol=1e-5)


def test_a_part_of_many_short_sequences_copies_its_own_tokens_alone(monkeypatch):
    seqlens = (9, 3, 8, 9, 5, 7, 2, 9) * 20
    q, k, v = torch.randn(sum(seqlens), 3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(dim=1)
    nothing = torch.empty(0, dtype=torch.int32)
    batch = PackedBatch(nothing, nothing, nothing, 9, seqlens, nothing, seqlens)
    expected = attend_masked(q, k, v, batch, Whole())
    num_tokens, select = 0, torch.Tensor.index_select

    def counted(tensor, dim, index):  # torch copies all of a tensor that is not contiguous
        nonlocal num_tokens
        num_tokens += tensor.shape[dim]
        return select(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counted)
    monkeypatch.setattr(attention, "_MOST_SCORES", 4 * 9 * 9 * 2)  # of two sequences
    attended = attend_short_together(q, k, v, batch, Whole())
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
    assert num_tokens <= 3 * sum(seqlens) + len(seqlens) * 9, "those of q, k and v once, and all that is attended once"


def test_short_sequences_are_computed_one_after_the_other_where_together_they_are_not_right(monkeypatch, caplog):
    monkeypatch.setattr(attention, "attend_short_together", attend_causally)
    assert choose_attention("auto", HEADS, CPU, torch.float32) is attend_each
    assert "attention one sequence after the other, which is slower, because: it differs" in caplog.text


def test_a_sequence_that_is_not_finite_spoils_no_other():
    seqlens = (3, 9, 5)
    q, k, v = torch.randn(17, 3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(dim=1)
    nothing = torch.empty(0, dtype=torch.int32)
    batch = PackedBatch(nothing, nothing, nothing, 9, seqlens, nothing, seqlens)
    expected = attend_each(q, k, v, batch, Whole())
    k[3:12], v[3:12] = torch.nan, torch.inf
    attended = attend_short_together(q, k, v, batch, Whole())
    torch.testing.assert_close(attended[:3], expected[:3])
    torch.testing.assert_close(attended[12:], expected[12:])


@pytest.mark.parametrize("name", ["varlen", "flash-attn"])
def test_a_named_kernel_that_does_not_run_here_stops_the_start(name):
    with pytest.raises(DeviceError, match=f"expected '{name}' to run on cpu in float32; got: .*; install .* 'auto'"):
        choose_attention(name, HEADS, CPU, torch.float32)


def test_a_kernel_that_computes_attention_is_accepted():
    prove(attend_masked, HEADS, CPU, torch.float32)


@pytest.mark.parametrize(
    "kernel", [attend_causally, lambda q, k, v, batch, work: q, lambda q, k, v, batch, work: q * torch.nan],
    ids=["causal", "nothing", "NaN"],
)  # fmt: skip
def test_a_kernel_that_computes_something_else_is_refused(kernel):
    with pytest.raises(ValueError, match="differs from the reference"):
        prove(kernel, HEADS, CPU, torch.float32)


@pytest.mark.parametrize("num_rows", [1, 7, 50, 100, 139])
def test_attention_in_pieces_of_heads_and_queries_is_attention(num_rows):
    class Few:
        def pieces(self, total, multiply_adds, fewest_rows=1):
            return [slice(start, min(start + num_rows, total)) for start in range(0, total, num_rows)]

    seqlens = (1, 5, 70, 33)
    nothing = torch.empty(0, dtype=torch.int32)
    batch = PackedBatch(nothing, nothing, nothing, max(seqlens), seqlens, nothing, seqlens)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(seqlens), heads, 8, generator=generator) for heads in (6, 2, 2))
    expected = attend_masked(q, k, v, batch, Few())
    torch.testing.assert_close(attend_each(q, k, v, batch, Few()), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_computes_all_sequences_at_once(dtype):
    device = torch.device("cuda:0")
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("flash attention needs capability 8.0")
    assert choose_attention("varlen", HEADS, device, dtype) is not attend_each  # proved against the readable kernel

"""Attention of every sequence of a packed row over itself; the only file that knows kernels.

A kernel is chosen once, at the start, and proved against the readable one before it is used.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from nv_embed.compute.pieces import Whole
from nv_embed.errors import DeviceError, in_short
from nv_embed.models.protocol import Attend, Heads, PackedBatch, Work

logger = logging.getLogger(__name__)

_FEWEST_QUERIES = 768  # of a piece: with fewer, the CPU's kernel takes smaller blocks
_SMALL_HEAD = 48 * 32  # numbers of a sequence's head; with more, one after the other is up to twice as fast
_MOST_SCORES = 2**20  # at once: 4 MiB
_LARGEST_DIFFERENCE = 0.05  # of a kernel in half precision from float32, of values up to 4
_FLASH = "varlen", "flash-attn"
_OLDEST_CAPABILITY = (8, 0)  # of GPUs that flash attention runs on: Ampere


def attend_each(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, work: Work) -> Tensor:
    """One sequence after the other, on any device: what every other kernel is compared with.

    A text too long for one piece is attended head by head, because a kernel is faster with many queries of one head
    than with few of all.
    """
    out = torch.empty_like(q)
    num_kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    start = 0
    for seqlen in batch.seqlens:
        tokens = slice(start, start + seqlen)
        cost = 2 * seqlen * groups * q.shape[2]
        for piece in work.pieces(num_kv_heads * seqlen, cost, fewest_rows=_FEWEST_QUERIES):
            for heads, queries in _parts(piece, num_kv_heads, seqlen):
                rows = slice(start + queries.start, start + queries.stop)
                q_heads = slice(heads.start * groups, heads.stop * groups)
                # [1, heads, seqlen, head_dim]: SDPA wants the sequence next to last
                q_part = q[rows, q_heads].transpose(0, 1)[None]
                k_part, v_part = (x[tokens, heads].transpose(0, 1)[None] for x in (k, v))
                if q.is_cuda:  # where its only kernel for grouped heads is missing, it would hold every score
                    k_part, v_part = (x.repeat_interleave(groups, dim=1) for x in (k_part, v_part))
                attended = functional.scaled_dot_product_attention(q_part, k_part, v_part, enable_gqa=not q.is_cuda)
                out[rows, q_heads] = attended[0].transpose(0, 1)
        start += seqlen
    return out


def _parts(piece: slice, num_kv_heads: int, seqlen: int) -> Iterator[tuple[slice, slice]]:
    """Heads and queries of a piece, which counts the queries of the first head, then those of the second, and so on."""
    if piece.stop - piece.start == num_kv_heads * seqlen:
        yield slice(0, num_kv_heads), slice(0, seqlen)
        return
    for head in range(piece.start // seqlen, -(-piece.stop // seqlen)):
        first = head * seqlen
        yield slice(head, head + 1), slice(max(piece.start - first, 0), min(piece.stop - first, seqlen))


def attend_short_together(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, work: Work) -> Tensor:
    """Sequences with few numbers a head together, padded to the longest, in float32; others one after the other.

    A kernel's call for a short sequence takes longer than what it computes. Each call also waits for Python's lock
    while other threads receive requests and send answers. SDPA with a mask would take all at once, too, but two to
    three times as long as plain products, which it computes in half precision.
    """
    num_sequences, longest = len(batch.seqlens), batch.max_seqlen
    num_heads, head_dim = q.shape[1:]
    if num_sequences == 1 or longest * head_dim > _SMALL_HEAD or num_sequences * longest > 2 * len(q):
        return attend_each(q, k, v, batch, work)
    padding = batch.padding
    attended = q.new_empty(num_sequences * longest, num_heads, head_dim)
    at_once = max(_MOST_SCORES // (num_heads * longest**2), 1)
    for first in range(0, num_sequences, at_once):
        bias = padding.bias[first : first + at_once]
        tokens = slice(first * longest, (first + len(bias)) * longest)
        attended[tokens] = _attend_padded(q, k, v, padding.sources[tokens], bias)
    return attended.index_select(0, padding.places)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, sources: Tensor, bias: Tensor) -> Tensor:
    """Those of S sequences, L places each, of which `sources` and `bias` are as in `Padding`: [S * L, H, D] float32."""
    num_heads, head_dim = q.shape[1:]
    groups, longest = num_heads // k.shape[1], bias.shape[2]
    own = slice(int(sources[0]), int(sources[-1]) + 1)  # their tokens: `index_select` copies all that it is given
    sources = sources - own.start

    def padded(x: Tensor, groups: int = 1) -> Tensor:
        """[T, heads, D] to [heads * groups * S, L, D]."""
        rows = x[own].transpose(0, 1).index_select(1, sources).float()
        rows = rows if groups == 1 else rows.repeat_interleave(groups, 0)  # which copies
        return rows.view(-1, longest, head_dim)

    bias = bias.expand(num_heads, -1, -1, -1).reshape(-1, 1, longest)
    scores = torch.baddbmm(bias, padded(q), padded(k, groups).transpose(1, 2), alpha=head_dim**-0.5)
    return (scores.softmax(dim=-1) @ padded(v, groups)).view(num_heads, -1, head_dim).transpose(0, 1)


def choose_attention(name: str, heads: Heads, device: torch.device, dtype: torch.dtype) -> Attend:
    """The kernel for a network's heads on a device in a precision.

    Args:
        name: 'sdpa', one sequence after the other; 'varlen', torch's flash attention for all at once; 'flash-attn', the
            package of that name; or 'auto': varlen where it runs, on a CPU `attend_short_together`, else sdpa. The log
            says which and why.
        heads: of the network, with which the kernel is proved.

    Raises:
        DeviceError: the kernel named is missing, does not run here or computes something else.
    """
    if name == "sdpa":
        logger.info("%s: attention one sequence after the other", device)
        return attend_each
    kernel = name
    if name == "auto":
        kernel = "sdpa, short sequences together" if device.type == "cpu" else "varlen"
    try:
        attend = attend_short_together if kernel not in _FLASH else _flash(kernel, device, dtype)
        prove(attend, heads, device, dtype)
    except torch.AcceleratorError as error:  # nothing can be computed on this device any more
        raise DeviceError(f"attention: {kernel} broke {device}: {in_short(error)}; set attention to 'sdpa'") from None
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = in_short(error)
        if name == "auto":
            logger.warning("%s: attention one sequence after the other, which is slower, because: %s", device, reason)
            return attend_each
        raise DeviceError(
            f"attention: expected {name!r} to run on {device} in {str(dtype).removeprefix('torch.')}; got: {reason}; "
            "install what is missing, or set attention to 'auto' or 'sdpa'"
        ) from None
    logger.info("%s: attention by %s", device, kernel)
    return attend


def _flash(kernel: str, device: torch.device, dtype: torch.dtype) -> Attend:
    """A kernel for all sequences at once; raises where there is none."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        raise RuntimeError("it needs a CUDA device of capability 8.0 or later")
    if dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("it needs half precision")
    if kernel == "flash-attn":
        flash_attn_varlen_func = import_module("flash_attn").flash_attn_varlen_func

        def attend_by_package(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, work: Work) -> Tensor:
            cu_seqlens, max_seqlen = batch.cu_seqlens, batch.max_seqlen
            return flash_attn_varlen_func(  # type: ignore[no-any-return]
                q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=False
            )

        return attend_by_package
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    # The full window is the default of every torch version that has this; grouped heads came later.
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": True} if knows_groups else {}

    def attend_by_torch(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, work: Work) -> Tensor:
        if not knows_groups:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        cu_seqlens, max_seqlen = batch.cu_seqlens, batch.max_seqlen
        return varlen_attn(  # type: ignore[no-any-return]
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **grouped
        )

    return attend_by_torch


def prove(attend: Attend, heads: Heads, device: torch.device, dtype: torch.dtype) -> None:
    """Compare with the readable kernel, in float32, on short sequences, on one token, and on more than a block.

    Raises:
        ValueError: the kernel computes something else.
    """
    for seqlens in ((3, 5, 4), (1, 5, 300)):
        cu_seqlens = torch.tensor([0, *seqlens], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        batch = PackedBatch(nothing, nothing, cu_seqlens, max(seqlens), seqlens, nothing, seqlens)
        sizes = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        generator = torch.Generator(device).manual_seed(0)
        # Strided, as they are in the network: parts of a product, or of what was rotated.
        fused = torch.randn(sum(seqlens), sum(sizes), heads.head_dim, device=device, dtype=dtype, generator=generator)
        q, k, v = fused.split_with_sizes(sizes, dim=1)
        expected = attend_each(q.float(), k.float(), v.float(), batch, Whole())
        difference = (attend(q, k, v, batch, Whole()).float() - expected).abs().max().item()
        if not difference < _LARGEST_DIFFERENCE:  # NaN is not smaller either
            raise ValueError(f"it differs from the reference by {difference:.3g}")

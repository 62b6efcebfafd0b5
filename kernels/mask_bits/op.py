"""Runs Triton on CUDA and the reference elsewhere; opaque to torch.compile."""

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import exporting, get_backend, in_format, require, require_same_device, runs_reference
from ldmseg_fast.kernels.mask_bits import reference

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_BITS = 16


def encode_mask_bits(
    segment_ids: Tensor,
    num_bits: int = 7,
    table: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    check_ids: bool = True,
    category_ids: Tensor | None = None,
    category_bits: int = 0,
) -> Tensor:
    """Encodes segment ids as bit planes, least significant first (Chen et al., "Analog Bits", arXiv 2208.04202).

    Args:
        segment_ids: [B, H, W], uint8, int16, int32 or int64; 0 is void.
        num_bits: K, 1 to 16.
        table: [B, T] integer, or None: id i of image b becomes table[b, i] first, so that the random ids of training
            cost no pass of their own.
        dtype: float16, bfloat16 or float32.
        channels_last: memory format of the result.
        check_ids: look at the values for ids that do not fit. On CUDA that waits for the device, so a loop which made
            the ids itself passes False; an id without an entry in the table is void then, and bits from K on are lost.
        category_ids: integer [B, H, W], or None: what each pixel is, 0 void. Its planes follow those of the ids.
        category_bits: Kc, 1 to 16 with `category_ids` and 0 without.

    Returns:
        [B, K + Kc, H, W] in {-1, +1}, 0 where the new id, or the category, is 0.

    Raises:
        ValueError: wrong shape, dtype or device, an id outside the table, an id or a category of too many bits.
    """
    if exporting():
        return reference.encode_mask_bits(
            segment_ids, num_bits, table, dtype, channels_last, category_ids, category_bits
        )
    return encode_op(segment_ids, num_bits, table, dtype, channels_last, check_ids, category_ids, category_bits)


def decode_mask_bits(bits: Tensor) -> Tensor:
    """Decodes bit planes to ids by sign: bit k of the id is `bits[:, k] > 0`, so void decodes to 0.

    Args:
        bits: [B, K, H, W] float, K up to 16, contiguous or channels_last.

    Returns:
        int32 [B, H, W].

    Raises:
        ValueError: wrong shape or dtype.
    """
    if runs_reference("mask_bits", bits):
        check_decode(bits)
        return reference.decode_mask_bits(bits)
    return decode_op(bits)


def check_encode(
    segment_ids: Tensor,
    num_bits: int,
    table: Tensor | None,
    dtype: torch.dtype,
    category_ids: Tensor | None = None,
    category_bits: int = 0,
) -> None:
    """Refuses what the op does not take: ids are integer [B, H, W], arguments as in `encode_mask_bits`.

    Raises:
        ValueError: the message starts with the argument's name.
    """
    require(segment_ids.ndim == 3, "segment_ids: expected [B, H, W], got shape {}", segment_ids.shape)
    require(segment_ids.dtype in INTEGERS, "segment_ids: expected an integer tensor, got {}", segment_ids.dtype)
    require(1 <= num_bits <= MAX_BITS, "num_bits: expected 1 to {}, got {}", MAX_BITS, num_bits)
    require(dtype in FLOATS, "dtype: expected float16, bfloat16 or float32, got {}", dtype)
    if table is not None:
        require(
            table.ndim == 2 and table.shape[0] == segment_ids.shape[0] and table.shape[1] > 0,
            "table: expected one row for each of {} images, got shape {}",
            segment_ids.shape[0],
            table.shape,
        )
        require(table.dtype in INTEGERS, "table: expected an integer tensor, got {}", table.dtype)
        require_same_device(segment_ids, table=table)
    if category_ids is None:
        require(category_bits == 0, "category_bits: {} without category_ids; expected 0", category_bits)
        return
    require(1 <= category_bits <= MAX_BITS, "category_bits: expected 1 to {}, got {}", MAX_BITS, category_bits)
    require(
        category_ids.shape == segment_ids.shape,
        "category_ids: expected {} as segment_ids, got shape {}",
        segment_ids.shape,
        category_ids.shape,
    )
    require(category_ids.dtype in INTEGERS, "category_ids: expected an integer tensor, got {}", category_ids.dtype)
    require_same_device(segment_ids, category_ids=category_ids)


def check_values(
    segment_ids: Tensor,
    num_bits: int,
    table: Tensor | None,
    category_ids: Tensor | None = None,
    category_bits: int = 0,
) -> None:
    """Refuses ids that do not fit; free where the dtypes rule that out, one wait for the device otherwise.

    Args:
        segment_ids: integer [B, H, W].
        num_bits: K.
        table: integer [B, T], or None.
        category_ids: integer [B, H, W], or None.
        category_bits: Kc.

    Raises:
        ValueError: an id outside the table, a negative id or category, one of more than K or Kc bits.
    """
    codes, name = segment_ids, "segment_ids"
    if table is not None:
        codes, name = table, "table"
        if not (segment_ids.dtype == torch.uint8 and table.shape[1] >= 256):
            low, high = _range(segment_ids)
            message = "segment_ids: id {} is outside the table, which holds ids 0 to {}"
            require(low >= 0, message, low, table.shape[1] - 1)
            require(high < table.shape[1], message, high, table.shape[1] - 1)
    _check_bits(codes, name, num_bits, "num_bits")
    if category_ids is not None:
        _check_bits(category_ids, "category_ids", category_bits, "category_bits")


def _check_bits(codes: Tensor, name: str, bits: int, what: str) -> None:
    if not (codes.dtype == torch.uint8 and bits >= 8):
        low, high = _range(codes)
        require(low >= 0, "{}: holds a negative id, {}", name, low)
        require(high < 2**bits, "{}: {} bits hold ids up to {}, {} has {}", what, bits, 2**bits - 1, name, high)


def _range(ids: Tensor) -> tuple[int, int]:
    if not ids.numel():
        return 0, 0
    low, high = torch.stack(ids.aminmax()).tolist()
    return low, high


def check_decode(bits: Tensor) -> None:
    """Refuses what `decode_mask_bits` does not take: it takes float [B, K, H, W].

    Raises:
        ValueError: wrong shape or dtype.
    """
    require(bits.ndim == 4, "bits: expected [B, K, H, W], got shape {}", bits.shape)
    require(bits.is_floating_point(), "bits: expected a float tensor, got {}", bits.dtype)
    require(1 <= bits.shape[1] <= MAX_BITS, "bits: expected 1 to {} planes, got {}", MAX_BITS, bits.shape[1])


@torch.library.custom_op("ldmseg_fast::encode_mask_bits", mutates_args=())
def encode_op(
    segment_ids: Tensor,
    num_bits: int,
    table: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    check_ids: bool,
    category_ids: Tensor | None = None,
    category_bits: int = 0,
) -> Tensor:
    """Runs `encode_mask_bits` on integer [B, H, W]; the strides of its result are those of `torch.empty`.

    Raises:
        ValueError: see `check_encode` and `check_values`.
    """
    check_encode(segment_ids, num_bits, table, dtype, category_ids, category_bits)
    if check_ids:
        check_values(segment_ids, num_bits, table, category_ids, category_bits)
    if segment_ids.is_cuda and get_backend("mask_bits") != "torch":
        from ldmseg_fast.kernels.mask_bits import host  # Triton is imported on CUDA only

        return host.encode_mask_bits(segment_ids, num_bits, table, dtype, channels_last, category_ids, category_bits)
    bits = reference.encode_mask_bits(segment_ids, num_bits, table, dtype, channels_last, category_ids, category_bits)
    return in_format(bits, torch.channels_last) if channels_last else bits


@encode_op.register_fake
def _(
    segment_ids: Tensor,
    num_bits: int,
    table: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    check_ids: bool,
    category_ids: Tensor | None = None,
    category_bits: int = 0,
) -> Tensor:
    check_encode(segment_ids, num_bits, table, dtype, category_ids, category_bits)
    batch, height, width = segment_ids.shape
    return torch.empty(
        (batch, num_bits + category_bits, height, width),
        dtype=dtype,
        device=segment_ids.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


@torch.library.custom_op("ldmseg_fast::decode_mask_bits", mutates_args=())
def decode_op(bits: Tensor) -> Tensor:
    """Runs `decode_mask_bits`: float [B, K, H, W] to int32 [B, H, W].

    Raises:
        ValueError: see `check_decode`.
    """
    check_decode(bits)
    return reference.decode_mask_bits(bits)


@decode_op.register_kernel("cuda")
def _(bits: Tensor) -> Tensor:
    from ldmseg_fast.kernels.mask_bits import host

    check_decode(bits)
    return host.decode_mask_bits(bits)


@decode_op.register_fake
def _(bits: Tensor) -> Tensor:
    check_decode(bits)
    batch, _, height, width = bits.shape
    return torch.empty((batch, height, width), dtype=torch.int32, device=bits.device)

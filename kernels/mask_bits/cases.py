"""Lists the shapes of the kernel that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ldmseg_fast.kernels.case import Case, meta, normal, random_ids
from ldmseg_fast.kernels.mask_bits import host, reference


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    pixels, bits = 512 * 512, 7
    for batch in (1, 16):
        for channels_last in (False, True):
            for remap in (False, True):

                def make_ids(device, batch=batch, remap=remap, last=channels_last):
                    table = torch.randint(0, 128, (batch, 256), device=device, dtype=torch.uint8)
                    return random_ids(batch, 512, device), bits, table if remap else None, torch.bfloat16, last

                yield Case(
                    "mask_bits",
                    f"encode{' remapped' if remap else ''}{' channels_last' if channels_last else ''} 512x512",
                    torch.bfloat16,
                    batch,
                    make_ids,
                    host.encode_mask_bits,
                    reference.encode_mask_bits,
                    batch * pixels * (1 + 2 * bits),
                    headline=batch == 16 and remap,
                )
        for channels_last in (False, True):

            def make_both(device, batch=batch, last=channels_last):
                table = torch.randint(0, 128, (batch, 256), device=device, dtype=torch.uint8)
                categories = torch.randint(0, 134, (batch, 512, 512), device=device, dtype=torch.uint8)
                return random_ids(batch, 512, device), bits, table, torch.bfloat16, last, categories, 8

            yield Case(
                "mask_bits",
                f"encode with categories{' channels_last' if channels_last else ''} 512x512",
                torch.bfloat16,
                batch,
                make_both,
                host.encode_mask_bits,
                reference.encode_mask_bits,
                batch * pixels * (2 + 2 * (bits + 8)),
            )
    for channels_last in (False, True):

        def make_bits(device, last=channels_last):
            return (normal(16, bits, 512, 512, device=device, dtype=torch.float16, channels_last=last),)

        yield Case(
            "mask_bits",
            f"decode{' channels_last' if channels_last else ''} 512x512",
            torch.float16,
            16,
            make_bits,
            host.decode_mask_bits,
            reference.decode_mask_bits,
            16 * pixels * (2 * bits + 4),
        )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch each kernel on meta tensors whose sizes are all 1."""
    ids, table = meta(1, 1, 1, dtype=torch.uint8), meta(1, 1, dtype=torch.uint8)
    for channels_last in (False, True):
        yield partial(host.encode_mask_bits, ids, 1, table, torch.float16, channels_last)
        yield partial(host.encode_mask_bits, ids, 1, table, torch.float16, channels_last, ids, 1)
    yield partial(host.decode_mask_bits, meta(1, 1, 1, 1))

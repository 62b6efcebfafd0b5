"""Segment ids <-> analog bits: the mask auto-encoder's input format."""

from ldmseg_fast.kernels.mask_bits.op import decode_mask_bits, encode_mask_bits

__all__ = ["decode_mask_bits", "encode_mask_bits"]

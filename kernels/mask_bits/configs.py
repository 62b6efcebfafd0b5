"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "encode_mask_bits": {
        80: {"planes": make_config(4, 1, BLOCK=1024), "channels_last": make_config(4, 1, BLOCK=1024)},
    },
    "decode_mask_bits": {80: {"all": make_config(4, 1, BLOCK=1024)}},
}

CANDIDATES: Candidates = {
    "encode_mask_bits": [make_config(warps, 1, BLOCK=b) for b, warps in product((512, 1024, 2048, 4096), (2, 4, 8))],
    "decode_mask_bits": [make_config(warps, 1, BLOCK=b) for b, warps in product((256, 512, 1024, 2048), (4, 8))],
}

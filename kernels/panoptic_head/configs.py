"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "panoptic_head": {
        80: {
            "q128_channels_last": make_config(4, 1, BLOCK_X=32, BLOCK_Y=16),
            "q128_planes": make_config(4, 1, BLOCK_X=32, BLOCK_Y=16),
            "q256_channels_last": make_config(8, 1, BLOCK_X=32, BLOCK_Y=16),
            "q256_planes": make_config(8, 1, BLOCK_X=32, BLOCK_Y=16),
        },
        90: {
            "q128_channels_last": make_config(4, 2, BLOCK_X=64, BLOCK_Y=16),
            "q128_planes": make_config(8, 1, BLOCK_X=64, BLOCK_Y=16),
            "q256_channels_last": make_config(8, 1, BLOCK_X=64, BLOCK_Y=16),
            "q256_planes": make_config(8, 1, BLOCK_X=32, BLOCK_Y=16),
        },
    },
    "panoptic_statistics": {80: {"all": make_config(1, 1, BLOCK_X=32, BLOCK_Y=16)}},
    "panoptic_filter": {80: {"all": make_config(8, 1, BLOCK=1024)}},
}

CANDIDATES: Candidates = {
    "panoptic_head": [
        make_config(warps, stages, BLOCK_X=x, BLOCK_Y=y)
        for x, y, warps, stages in product((32, 64), (8, 16), (4, 8), (1, 2))
    ],
}

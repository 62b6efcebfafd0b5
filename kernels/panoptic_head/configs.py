"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "panoptic_head": {
        80: {
            "q128_half_channels_last": make_config(4, 1, BLOCK_X=32, BLOCK_Y=16, BY_EQUALITY=0),
            "q128_half_planes": make_config(4, 1, BLOCK_X=32, BLOCK_Y=16, BY_EQUALITY=0),
            "q128_channels_last": make_config(4, 1, BLOCK_X=32, BLOCK_Y=16, BY_EQUALITY=0),
            "q128_planes": make_config(4, 1, BLOCK_X=32, BLOCK_Y=16, BY_EQUALITY=0),
            "q256_channels_last": make_config(8, 1, BLOCK_X=32, BLOCK_Y=16, BY_EQUALITY=0),
            "q256_planes": make_config(8, 1, BLOCK_X=32, BLOCK_Y=16, BY_EQUALITY=0),
        },
        90: {
            "q128_half_channels_last": make_config(4, 1, BLOCK_X=64, BLOCK_Y=16, BY_EQUALITY=0),
        },
    },
    "panoptic_statistics": {80: {"all": make_config(1, 1, BLOCK_X=32, BLOCK_Y=16)}},
    "panoptic_filter": {80: {"all": make_config(8, 1, BLOCK=1024)}},
}

CANDIDATES: Candidates = {
    "panoptic_head": [
        make_config(4, stages, BLOCK_X=x, BLOCK_Y=16, BY_EQUALITY=equality)
        for x, stages, equality in product((32, 64), (1, 2), (0, 1))
    ]
    + [
        make_config(8, 1, BLOCK_X=x, BLOCK_Y=y, BY_EQUALITY=equality)
        for x, y, equality in product((32, 64), (8, 16), (0, 1))
    ],
}

"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "group_norm_silu_forward": {
        80: {"small": make_config(4, 1), "large": make_config(16, 1), "tiled": make_config(4, 1, ELEMENTS=8192)},
    },
    "group_norm_silu_backward": {
        80: {"small": make_config(4, 1), "large": make_config(16, 1), "tiled": make_config(4, 1, ELEMENTS=2048)},
    },
    "group_norm_silu_reduce": {80: {"all": make_config(4, 1)}},
    "group_norm_silu_affine": {80: {"all": make_config(1, 1, BLOCK_C=32)}},
}

_TILES = [make_config(warps, 1, ELEMENTS=e) for e, warps in product((1024, 2048, 4096, 8192), (4, 8))]
CANDIDATES: Candidates = {"group_norm_silu_forward": _TILES, "group_norm_silu_backward": _TILES}

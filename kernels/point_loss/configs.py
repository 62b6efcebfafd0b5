"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "point_logits": {
        80: {
            "channels_last": make_config(4, 1, BLOCK_P=16, BLOCK_Q=128),
            "planes": make_config(8, 1, BLOCK_P=64, BLOCK_Q=8),
        },
    },
    "slot_logits": {80: {"all": make_config(4, 1, BLOCK_P=256)}},
    "sample_ce": {
        80: {
            "channels_last": make_config(4, 1, BLOCK_P=8, BLOCK_Q=128),
            "uneven channels_last": make_config(4, 1, BLOCK_P=8, BLOCK_Q=64),
            "planes": make_config(4, 1, BLOCK_P=64, BLOCK_Q=8),
        },
        90: {
            "channels_last": make_config(4, 1, BLOCK_P=16, BLOCK_Q=128),
            "planes": make_config(4, 1, BLOCK_P=64, BLOCK_Q=8),
        },
    },
    "sample_bce_dice_forward": {80: {"all": make_config(8, 1, BLOCK_P=1024)}},
    "sample_bce_dice_backward": {80: {"all": make_config(4, 1, BLOCK_P=256)}},
}

_BLOCKS = [make_config(4, 1, BLOCK_P=p, BLOCK_Q=q) for p, q in product((8, 16, 32, 64), (8, 32, 128))]
CANDIDATES: Candidates = {"point_logits": _BLOCKS, "sample_ce": _BLOCKS}

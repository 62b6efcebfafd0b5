"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "added_group_norm": {
        80: {"small": make_config(4, 1), "large": make_config(16, 1), "tiled": make_config(4, 1, ELEMENTS=4096)},
    },
    "added_layer_norm": {80: {"all": make_config(4, 1, ELEMENTS=2048)}},
}

CANDIDATES: Candidates = {
    "added_group_norm": [make_config(w, 1, ELEMENTS=e) for e, w in product((1024, 2048, 4096, 8192), (4, 8))],
    "added_layer_norm": [make_config(w, 1, ELEMENTS=e) for e, w in product((1024, 2048, 4096), (2, 4, 8))],
}

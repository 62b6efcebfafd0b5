"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {"added_layer_norm": {80: {"all": make_config(4, 1, ELEMENTS=2048)}}}

CANDIDATES: Candidates = {
    "added_layer_norm": [make_config(w, 1, ELEMENTS=e) for e, w in product((1024, 2048, 4096), (2, 4, 8))],
}

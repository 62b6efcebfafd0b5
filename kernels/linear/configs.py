"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

# where moments are asked for, a block of rows is one chunk of them, and its columns are whole groups
TABLE: Table = {
    "linear": {
        80: {
            "plain": make_config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
            "normalised": make_config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
            "gated": make_config(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        },
    },
    "linear_moments": {80: {"all": make_config(8, 2, BLOCK_K=64)}},
}

CANDIDATES: Candidates = {
    "linear": [
        make_config(w, s, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
        for m, n, k, s, w in product((64, 128), (64, 128), (32, 64), (2, 3), (8,))
    ],
    "linear_moments": [make_config(w, s, BLOCK_K=k) for k, s, w in product((32, 64), (2, 3), (4, 8))],
}

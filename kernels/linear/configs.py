"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

ENTRIES = {
    "plain": make_config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLITS=1),
    "normalised": make_config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLITS=1),
    "gated": make_config(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLITS=1),
}
# where moments are asked for, a block of rows is one chunk of them, and its columns are whole groups
MOMENTS = {"all": make_config(8, 2, BLOCK_K=64, SPLITS=1)}

# "few" tiles: see `host.FEW_TILES`
TABLE: Table = {
    "linear": {80: ENTRIES},
    "linear_few": {80: ENTRIES},
    "linear_moments": {80: MOMENTS},
    "linear_moments_few": {80: MOMENTS},
}

CANDIDATES: Candidates = {
    "linear": [
        make_config(8, s, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLITS=1)
        for m, n, k, s in product((64, 128), (64, 128), (32, 64), (2, 3))
    ],
    "linear_few": [
        make_config(w, s, BLOCK_M=64, BLOCK_N=n, BLOCK_K=64, SPLITS=splits)
        for n, splits, s, w in product((32, 64), (2, 4), (2, 3), (4, 8))
    ],
    "linear_moments": [make_config(w, s, BLOCK_K=k, SPLITS=1) for k, s, w in product((32, 64), (2, 3), (4, 8))],
    "linear_moments_few": [
        make_config(w, s, BLOCK_K=64, SPLITS=splits) for splits, s, w in product((2, 4), (2, 3), (4, 8))
    ],
}

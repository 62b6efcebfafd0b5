"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

MANY = {
    "half": make_config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, SPLITS=1),
    "fp8": make_config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, SPLITS=1),
}
FEW = {
    "half": make_config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLITS=1),
    "fp8": make_config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, SPLITS=1),
}
# where moments are asked for, a block of rows is one chunk of them, and its columns are whole groups
MOMENTS = {"half": make_config(8, 3, BLOCK_K=64, SPLITS=1), "fp8": make_config(8, 3, BLOCK_K=128, SPLITS=1)}

# "few" tiles: see `linear.host.FEW_TILES`
TABLE: Table = {
    "convolution": {80: MANY},
    "convolution_few": {80: FEW},
    "convolution_moments": {80: MOMENTS},
    "convolution_moments_few": {80: MOMENTS},
}

CANDIDATES: Candidates = {
    "convolution": [
        make_config(8, s, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLITS=1)
        for m, n, k, s in product((64, 128), (64, 128), (64, 128), (3, 4))
        if m * n * k < 128**3
    ],
    "convolution_few": [
        make_config(4, s, BLOCK_M=64, BLOCK_N=n, BLOCK_K=k, SPLITS=splits)
        for n, k, splits, s in product((32, 64), (64, 128), (2, 4), (3, 4))
    ],
    "convolution_moments": [
        make_config(w, s, BLOCK_K=k, SPLITS=1) for k, s, w in product((32, 64, 128), (2, 3), (4, 8))
    ],
    "convolution_moments_few": [
        make_config(w, s, BLOCK_K=k, SPLITS=splits) for k, splits, s, w in product((64, 128), (2, 4), (2, 3), (4, 8))
    ],
}

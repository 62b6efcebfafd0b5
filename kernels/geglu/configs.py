"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {"geglu": {80: {"all": make_config(4, 1, BLOCK=1024)}}}

CANDIDATES: Candidates = {"geglu": [make_config(w, 1, BLOCK=b) for b, w in product((256, 512, 1024, 2048), (2, 4, 8))]}

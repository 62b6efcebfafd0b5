"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "ddim_step": {80: {"all": make_config(4, 1, BLOCK=128)}},
}

CANDIDATES: Candidates = {}

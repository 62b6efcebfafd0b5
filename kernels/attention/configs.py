"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {
    "attention_forward": {
        80: {
            "d48": make_config(4, 3, BLOCK_M=64, BLOCK_N=64, PADDED=0),
            "d96": make_config(4, 3, BLOCK_M=64, BLOCK_N=32, PADDED=0),
            "d128": make_config(8, 2, BLOCK_M=128, BLOCK_N=32, PADDED=0),
            "d160": make_config(4, 2, BLOCK_M=64, BLOCK_N=16, PADDED=0),
        },
        90: {
            "d48": make_config(8, 3, BLOCK_M=128, BLOCK_N=64, PADDED=0),
            "d96": make_config(8, 3, BLOCK_M=128, BLOCK_N=64, PADDED=0),
            "d128": make_config(8, 2, BLOCK_M=128, BLOCK_N=64, PADDED=0),
            "d160": make_config(8, 2, BLOCK_M=128, BLOCK_N=64, PADDED=0),
        },
    },
    "attention_delta": {
        80: {
            "d48": make_config(4, 1, BLOCK_M=64),
            "d96": make_config(4, 1, BLOCK_M=32),
            "d128": make_config(4, 1, BLOCK_M=32),
            "d160": make_config(4, 1, BLOCK_M=16),
        },
    },
    "attention_backward_kv": {
        80: {
            "d48": make_config(4, 2, BLOCK_M=32, BLOCK_N=64),
            "d96": make_config(8, 2, BLOCK_M=32, BLOCK_N=64),
            "d128": make_config(8, 2, BLOCK_M=64, BLOCK_N=32),
            "d160": make_config(4, 2, BLOCK_M=32, BLOCK_N=16),
        },
        90: {
            "d48": make_config(4, 2, BLOCK_M=64, BLOCK_N=64),
            "d96": make_config(8, 2, BLOCK_M=64, BLOCK_N=64),
            "d128": make_config(8, 2, BLOCK_M=32, BLOCK_N=64),
            "d160": make_config(8, 2, BLOCK_M=32, BLOCK_N=64),
        },
    },
    "attention_backward_q": {
        80: {
            "d48": make_config(4, 2, BLOCK_M=64, BLOCK_N=32),
            "d96": make_config(4, 2, BLOCK_M=64, BLOCK_N=32),
            "d128": make_config(8, 2, BLOCK_M=128, BLOCK_N=32),
            "d160": make_config(4, 2, BLOCK_M=32, BLOCK_N=16),
        },
        90: {
            "d48": make_config(8, 2, BLOCK_M=128, BLOCK_N=64),
            "d96": make_config(8, 2, BLOCK_M=128, BLOCK_N=64),
            "d128": make_config(8, 2, BLOCK_M=128, BLOCK_N=32),
            "d160": make_config(8, 2, BLOCK_M=128, BLOCK_N=32),
        },
    },
    "attention_fp8_prepare": {89: {"all": make_config(4, 1, ELEMENTS=8192)}},
    "attention_fp8": {
        89: {
            "d48": make_config(4, 3, BLOCK_M=64, BLOCK_N=64),
            "d96": make_config(4, 3, BLOCK_M=64, BLOCK_N=64),
            "d128": make_config(8, 2, BLOCK_M=128, BLOCK_N=64),
            "d160": make_config(8, 2, BLOCK_M=128, BLOCK_N=32),
        },
        90: {
            "d48": make_config(8, 3, BLOCK_M=128, BLOCK_N=128),
            "d96": make_config(8, 3, BLOCK_M=128, BLOCK_N=64),
            "d128": make_config(8, 3, BLOCK_M=128, BLOCK_N=64),
            "d160": make_config(8, 3, BLOCK_M=128, BLOCK_N=64),
        },
    },
}

# tall tiles with whole stages of the pipeline; the small ones are for heads that need the registers
_BLOCKS = [
    *(make_config(w, s, BLOCK_M=128, BLOCK_N=n) for n, w, s in product((64, 128), (4, 8), (2, 3))),
    *(make_config(4, s, BLOCK_M=64, BLOCK_N=n) for n, s in product((32, 64), (2, 3))),
    *(make_config(8, s, BLOCK_M=128, BLOCK_N=32) for s in (2, 3)),
    make_config(8, 2, BLOCK_M=32, BLOCK_N=64),
    make_config(4, 2, BLOCK_M=64, BLOCK_N=16),
]
# forward, a head of 40 may also be one product of 64 columns: fewer waits, more multiplications
_FORWARD = [
    *(make_config(w, s, BLOCK_M=128, BLOCK_N=n, PADDED=0) for n, w, s in product((64, 128), (4, 8), (2, 3))),
    *(make_config(4, s, BLOCK_M=64, BLOCK_N=n, PADDED=0) for n, s in product((32, 64), (2, 3))),
    *(make_config(8, s, BLOCK_M=128, BLOCK_N=n, PADDED=1) for n, s in product((64, 128), (2, 3))),
]
CANDIDATES: Candidates = {
    "attention_forward": _FORWARD,
    "attention_fp8": [config for config in _BLOCKS if config.constants["BLOCK_N"] >= 32],
    "attention_backward_kv": _BLOCKS,
    "attention_backward_q": _BLOCKS,
}

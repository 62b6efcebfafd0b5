"""Lists the launch configurations, and what `benchmarks/bench_kernels.py --tune` tries."""

from itertools import product

from ldmseg_fast.kernels.configs import Candidates, Config, Table, make_config


def _forward(warps: int, stages: int, block_m: int, block_n: int, **switches: int) -> Config:
    """Forward: PADDED heads are one product, DELAYED values are multiplied a block later, QUARTERS of the exponentials
    are polynomials, keys and values are copied by DESCRIBED tiles; all are off where a table does not say so."""
    off = {"PADDED": 0, "DELAYED": 0, "QUARTERS": 0, "DESCRIBED": 0}
    return make_config(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, **(off | switches))


TABLE: Table = {
    "attention_forward": {
        80: {
            "d48": _forward(4, 3, 64, 64),
            "d96": _forward(4, 3, 64, 32),
            "d128": _forward(8, 2, 128, 32),
            "d160": _forward(4, 2, 64, 16),
        },
        90: {
            "d48": _forward(8, 3, 128, 64),
            "d96": _forward(8, 3, 128, 64),
            "d128": _forward(8, 2, 128, 64),
            "d160": _forward(8, 2, 128, 64),
        },
    },
    # "few" programs: see `host.FEW_PROGRAMS`
    "attention_forward_few": {
        80: {
            "d48": _forward(4, 3, 64, 64),
            "d96": _forward(4, 3, 64, 32),
            "d128": _forward(8, 2, 64, 32),
            "d160": _forward(4, 2, 64, 16),
        },
        90: {
            "d48": _forward(4, 3, 64, 64),
            "d96": _forward(4, 3, 64, 64),
            "d128": _forward(4, 2, 64, 64),
            "d160": _forward(4, 2, 64, 64),
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
    *(_forward(w, s, 128, n) for n, w, s in product((64, 128), (4, 8), (2, 3))),
    *(_forward(4, 3, 64, n) for n in (32, 64)),
    *(_forward(8, 2, 128, n, PADDED=1, DESCRIBED=d) for n, d in ((64, 0), (128, 0), (64, 1))),
    *(_forward(8, 2, 128, 64, **{switch: 1}) for switch in ("DELAYED", "QUARTERS", "DESCRIBED")),
]
_FORWARD_FEW = [
    *(_forward(4, s, 64, n) for n, s in product((32, 64, 128), (2, 3)) if n * s < 384),
    *(_forward(w, s, 32, n) for n, w, s in product((32, 64), (2, 4), (2, 3))),
    *(_forward(4, 2, 64, 64, **{switch: 1}) for switch in ("PADDED", "DELAYED", "DESCRIBED")),
]
CANDIDATES: Candidates = {
    "attention_forward": _FORWARD,
    "attention_forward_few": _FORWARD_FEW,
    "attention_fp8": [config for config in _BLOCKS if config.constants["BLOCK_N"] >= 32],
    "attention_backward_kv": _BLOCKS,
    "attention_backward_q": _BLOCKS,
}

"""The table of launch configurations, recorded launches, and what the roofline makes of the cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldmseg_fast.kernels import configs, launch, roofline
from ldmseg_fast.kernels.attention import host as attention
from ldmseg_fast.kernels.backend import KERNELS
from ldmseg_fast.kernels.case import all_cases

ROOT = Path(__file__).resolve().parents[2]


def test_the_nearest_older_architecture_is_taken():
    table = configs.all_configs()["attention_forward"]
    for sm, entry in ((80, 80), (86, 80), (89, 80), (90, 90), (100, 90), (120, 80)):
        with configs.architecture(sm):
            assert configs.find_config("attention_forward", "d48") is table[entry]["d48"]
    with configs.architecture(90):
        only = configs.all_configs()["ddim_step"][80]["all"]
        assert configs.find_config("ddim_step", "all") is only
        with pytest.raises(KeyError, match="no configuration of ddim_step"):
            configs.find_config("ddim_step", "other")


def test_every_kernel_has_an_entry_for_the_oldest_architecture():
    for kernel, per_sm in configs.all_configs().items():
        classes = {name for entry in per_sm.values() for name in entry}
        assert set(per_sm[89 if kernel.startswith("attention_fp8") else 80]) == classes, kernel


def test_a_file_overrides_the_table(tmp_path, monkeypatch):
    mine = configs.Config({"BLOCK": 64}, num_warps=2, num_stages=1)
    path = tmp_path / "configs.json"
    path.write_text(configs.dump_configs({"ddim_step": {90: {"all": mine}}}))
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    configs._overrides.cache_clear()
    shipped = configs.all_configs()
    try:
        with configs.architecture(90):
            assert configs.find_config("ddim_step", "all") == mine
            assert configs.find_config("attention_forward", "d48") is shipped["attention_forward"][90]["d48"]
        with configs.architecture(80):
            assert configs.find_config("ddim_step", "all") is shipped["ddim_step"][80]["all"]
    finally:
        configs._overrides.cache_clear()


BROKEN = {
    "{": "not a table",
    "[1]": "not a table",
    '{"ddim_step": {"90": {"all": {"warps": 4}}}}': "warps",
    '{"a": {"b": {}}}': "invalid literal",
    '{"dim_step": {"90": {"all": {"constants": {}}}}}': r"dim_step 'all': one of .*ddim_step",
    '{"ddim_step": {"90": {"small": {"constants": {}}}}}': "ddim_step 'small': one of all expected",
    '{"ddim_step": {"90": {"all": {"constants": {"BLOCKS": 1}}}}}': "constants BLOCKS, expected BLOCK",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_named(content, tmp_path):
    path = tmp_path / "configs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"configs\.json.*" + BROKEN[content]):
        configs.load_configs(path)
    with pytest.raises(ValueError, match=r"missing\.json"):
        configs.load_configs(tmp_path / "missing.json")


def test_what_tuning_writes_is_what_is_looked_up(tmp_path):
    """Every candidate of --tune fits the table's entry, under the architecture that the GPU is looked up by."""
    for sm, expected in ((80, 80), (90, 90), (120, 89)):
        with configs.architecture(sm):
            assert configs.table_architecture() == expected
    table = {}
    for kernel, candidates in configs.all_candidates().items():
        assert len(candidates) <= 16, f"{kernel}: tuning has minutes"
        entries = configs.all_configs()[kernel].values()
        shipped = {name: config for classes in entries for name, config in classes.items()}
        for name, config in shipped.items():
            fitting = [c for c in candidates if c.constants.keys() == config.constants.keys()]
            assert fitting or not config.constants, f"{kernel} {name}"
            if fitting:
                table.setdefault(kernel, {}).setdefault(90, {})[name] = fitting[0]
    for switch in ("PADDED", "DELAYED", "QUARTERS", "DESCRIBED"):
        assert {c.constants[switch] for c in configs.all_candidates()["attention_forward"]} == {0, 1}
    path = tmp_path / "tuned.json"
    path.write_text(configs.dump_configs(table))
    assert configs.load_configs(path) == table


def test_recorded_launches_start_nothing():
    q = torch.empty(2, 100, 2, 40, dtype=torch.float16, device="meta")
    with configs.architecture(90), launch.record() as launches:
        out, logsumexp = attention.attention_forward(q, q, q, 1.0)
    assert out.is_meta and logsumexp.shape == (2, 2, 100)
    (only,) = launches
    assert only.kernel is attention.attention_forward_kernel
    assert only.grid == (2, 4) and only.constants["D"] == 40 and only.constants["BLOCK_M"] == 64


def test_views_with_whole_units_are_read_in_place():
    base = torch.zeros(2, 6, 4, 16, dtype=torch.float16)
    assert launch.in_units(base[:, ::2]).data_ptr() == base.data_ptr()
    for odd in (base[..., 1:9], base.transpose(2, 3), torch.zeros(2, 3, 4, 12, dtype=torch.float16)[..., :8]):
        assert launch.in_units(odd).is_contiguous()


def test_cases_cover_every_kernel():
    assert {case.kernel for case in all_cases()} == set(KERNELS)
    names = [(case.kernel, case.name, case.dtype, case.batch) for case in all_cases()]
    assert len(names) == len(set(names))


def test_floors():
    """A memory-bound case by hand, and the exponentials of attention."""
    cases = {(case.kernel, case.name, case.batch): case for case in all_cases()}
    h200 = roofline.find_gpu("NVIDIA H200")
    assert h200 is not None and roofline.find_gpu("GeForce RTX 4090").name == "4090"
    assert roofline.find_gpu("Some GPU") is None and roofline.find_gpu(None) is None
    encode = cases["mask_bits", "encode 512x512", 16]
    assert encode.bytes_moved == 16 * 512 * 512 * 15
    assert roofline.floor_us(encode, h200) == pytest.approx(1e6 * encode.bytes_moved / 4.8e12)
    forward = cases["attention", "forward [1, 4096, 8, 40]", 1]
    assert forward.exponentials == 8 * 4096**2 and forward.operations == 4 * 8 * 4096**2 * 40
    assert roofline.floor_us(forward, h200) == pytest.approx(1e6 * forward.exponentials / h200.exponentials)


def test_roofline_prints_every_case(capsys, tmp_path):
    path = tmp_path / "rows.json"
    assert roofline.main(["--only", "mask_bits", "ddim_step", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {row["kernel"] for row in rows} == {"mask_bits", "ddim_step"}
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
    assert all(floor > 0 for row in rows for floor in row["floor_us"].values())


@pytest.mark.parametrize(
    ("sm", "architectures", "headline"),
    [
        pytest.param("90", ["90"], ["--headline"], id="headline"),
        pytest.param("90", ["90"], [], id="sm_90", marks=pytest.mark.soak),
        pytest.param("80", ["80", "89"], [], id="sm_80", marks=pytest.mark.soak),
    ],
)
def test_kernels_build_ahead_of_time(sm, architectures, headline, tmp_path):
    """Registers, shared memory and spills of every kernel, with no GPU; of every configuration too in the soak."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "builds.json"
    command = [sys.executable, "-m", "ldmseg_fast.kernels.aot", "--sm", sm, "--json", str(path), *headline]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    builds = json.loads(path.read_text())
    assert {build["kernel"] for build in builds} == set(KERNELS)
    by_function = {build["function"]: build for build in builds}
    if sm == "90":
        assert by_function["attention_forward_kernel"]["wgmma"] > 0
        assert by_function["attention_fp8_kernel"]["wgmma"] > 0
    assert all(0 < build["registers"] <= 255 and build["spill_bytes"] == 0 for build in builds)
    rows = [tuple(line.split()[:2]) for line in done.stdout.splitlines()]
    for kernel in KERNELS:
        expected = architectures if kernel in ("attention", "convolution") else [sm]  # those that have e4m3 products
        assert [built for name, built in rows if name == kernel] == expected


def test_every_build_is_collected_once():
    """Triton would read a second one from its cache, with no word of ptxas. Cases reach every configuration."""
    code = """
from triton.compiler import ASTSource
from ldmseg_fast.kernels.aot import collect, specialise
launches, unreached = collect(90)
assert not unreached, unreached
def key(launch):
    signature, constants, attributes = specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source.hash(), launch.config.num_warps, launch.config.num_stages
assert len({key(launch) for _, launch, _ in launches}) == len(launches) > 200
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("fault", ["spill_bytes", "shared_memory", "error"])
def test_faults_of_a_build(fault):
    from ldmseg_fast.kernels.aot import Build

    about = {"kernel": "k", "function": "f", "sm": 90, "constants": {}, "num_warps": 4, "num_stages": 1}
    value = {"spill_bytes": 4, "shared_memory": 227 * 1024 + 1, "error": "no"}[fault]
    assert not Build(**about, shared_memory=227 * 1024).faults
    assert len(Build(**about, **{fault: value}).faults) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_machine_instructions_are_counted():
    from ldmseg_fast.kernels.sass import count_sass

    lines = ["Function:f", "--:-:-:Y:1\t@!P0 BRA 0x10;", "01:-:0:-:4\tWARPGROUP.DEPBAR.LE gsb0, 0x0;"]
    assert count_sass("\n".join([*lines, ".L_1:", "--:-:-:Y:0\tIMAD.MOV.U32 R1, RZ, RZ, R2;", "--:-:-:Y:0\tNOP;"])) == (
        3,
        1,
        0,
    )


def test_benchmark_without_a_gpu_prints_floors():
    command = [sys.executable, "benchmarks/bench_kernels.py", "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert {row.split()[0] for row in rows} == set(KERNELS)
    assert all("not measured (no CUDA device)" in row and "H200" in row for row in rows)


def test_tables_tuned_before_a_switch_came_have_it_off(tmp_path):
    table = {"attention_forward": {"90": {"d48": {"constants": {"BLOCK_M": 64, "BLOCK_N": 64}, "num_warps": 4}}}}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(table))
    found = configs.load_configs(path)["attention_forward"][90]["d48"].constants
    assert found == {"BLOCK_M": 64, "BLOCK_N": 64, "PADDED": 0, "DELAYED": 0, "QUARTERS": 0, "DESCRIBED": 0}


def test_descriptors_get_memory_in_a_context_of_their_own(monkeypatch):
    """What other kernels of the process allocate by stays."""
    from triton.runtime import _allocation

    seen = []

    class Kernel:
        arg_names = ("x", "DESCRIBED")

        def __getitem__(self, grid):
            return lambda *_, **constants: seen.append(_allocation._allocator.get())

    before = _allocation._allocator.get()
    for switch in (1, 0):
        launch.launch(Kernel(), (1,), torch.zeros(1), config=configs.make_config(4, 2, DESCRIBED=switch))
    assert seen == [launch._scratch, before] and _allocation._allocator.get() is before

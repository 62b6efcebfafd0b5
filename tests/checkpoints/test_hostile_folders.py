"""Every hostile model folder loads or gives one error in seconds and bounded memory; none runs without end."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config, load_index
from ldmseg_fast.checkpoints.tensors import WEIGHTS, load_weights
from ldmseg_fast.config import load_config
from ldmseg_fast.errors import CheckpointError, UserError
from ldmseg_fast.training.stages import OneStepStage
from tests.checkpoints.hostile_folders import LFS, make_hostile, zip_bomb

SECONDS, MEBIBYTES = (
    10,
    400,
)  # of processor time, and of memory, for a folder of half a megabyte; the first one brings PyTorch's own buffers along
PICTURE = np.zeros((20, 30, 3), np.uint8)


def attempt(folder: Path) -> str:
    """Loads a folder as `predict` and as `model.init_from` do: "loaded", or the error in words."""
    try:
        pipe = LDMSegPipeline.from_pretrained(folder, device="cpu")
        if pipe.info.image_size <= 256:
            pipe([PICTURE], 1)
        pipe.save_pretrained(folder.with_name(folder.name + "-copy"))
        OneStepStage(load_config("tiny", [f"model.init_from={folder}", "few_step.matching=none"]))
    except UserError as error:
        return str(error)
    return "loaded"


def try_folders(good: Path, out: Path, seeds: range) -> dict[str, int]:
    """Counts what became of the hostile folders of `seeds`; an error that is none of ours is raised."""
    counts = {"loaded": 0, "refused": 0, "slow": 0, "large": 0, "unclear": 0}
    for seed in seeds:
        folder = out / f"model-{seed}"
        note = make_hostile(good, folder, seed)
        begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = attempt(folder)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {note}") from error
        counts["loaded" if said == "loaded" else "refused"] += 1
        wrong = {
            "slow": time.process_time() - begun > SECONDS,
            "large": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MEBIBYTES << 10,
            "unclear": "\n" in said or len(said) > 2000,
        }
        for kind in (kind for kind, found in wrong.items() if found):
            counts[kind] += 1
            print(f"seed {seed} is {kind}: {note}: {said[:300]}")
        for path in out.glob(f"model-{seed}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return counts


@pytest.fixture(scope="module")
def good(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    LDMSegPipeline.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def test_the_good_folder_loads(good):
    assert attempt(good) == "loaded"


def test_a_few_hostile_folders(good, tmp_path):
    counts = try_folders(good, tmp_path, range(5000, 5060))
    assert counts["slow"] == counts["large"] == counts["unclear"] == 0
    assert counts["loaded"] > 0 and counts["refused"] > 40


@pytest.mark.soak
def test_500_hostile_folders(good, tmp_path, record_property):
    counts = try_folders(good, tmp_path, range(500))
    for name, count in counts.items():
        record_property(f"folders_{name}", count)
    assert counts["slow"] == counts["large"] == counts["unclear"] == 0
    assert counts["loaded"] + counts["refused"] == 500


LAYERS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.errors import UserError
try:
    LDMSegPipeline.from_pretrained(sys.argv[1], device="cpu")
except UserError as error:
    print(error)
"""


def edit(folder: Path, name: str, **values: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


def test_a_configuration_allocates_no_more_than_the_weights_hold(good, tmp_path):
    """A terabyte of a network, and 10^5 layers of one, in a process that may have 6 GiB."""
    for name, values in (
        ("wide", {"block_out_channels": [16384, 16384], "norm_groups": 8, "num_heads": [8, 8]}),
        ("deep", {"layers_per_block": 1024, "transformer_layers": 1024}),
    ):
        folder = shutil.copytree(good, tmp_path / name)
        edit(folder, "unet/config.json", **values)
        begun = time.monotonic()
        command = [sys.executable, "-c", LAYERS, str(folder)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert "unet" in said and "another architecture" in said
        assert time.monotonic() - begun < 30
        with pytest.raises(CheckpointError, match="unet"):
            OneStepStage(load_config("tiny", [f"model.init_from={folder}", "few_step.matching=none"]))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("model_index.json", {"image_size": "large"}, r"model_index\.json: image_size='large': a whole number"),
        ("model_index.json", {"image_size": 10**9}, "image_size=1000000000: from 1 to"),
        ("model_index.json", {"image_size": 63}, r"image_size=63 must be a multiple of"),
        ("model_index.json", {"image_size": None}, "image_size=None"),
        ("model_index.json", {"self_condition": "perhaps"}, "true or false expected"),
        ("model_index.json", {"components": ["../../etc"]}, "components"),
        ("model_index.json", {"components": "unet"}, "no image_vae, mask_vae, scheduler"),
        ("model_index.json", {"num_inference_steps": 10**6}, "num_inference_steps"),
        ("model_index.json", {"postprocess": {"mask_threshold": float("nan")}}, "mask_threshold=nan: from 0 to 1"),
        ("model_index.json", {"image_sizes": 64, "image_size": 64}, "image_size"),
        ("model_index.json", {"image_sise": 64}, "unknown setting image_sise; did you mean image_size"),
        ("model_index.json", {"resolution": 64}, "unknown setting resolution; remove it, or update"),
        ("model_index.json", {"_class_name": "Other"}, "_class_name='Other': a model of another program"),
        ("model_index.json", {"_class_name": []}, r"_class_name=\[\]: a model of another program"),
        ("model_index.json", {"postprocess": {}}, r"no postprocess\.mask_threshold, postprocess\.count_threshold, "),
        (
            "model_index.json",
            {"postprocess": {"mask_threshold": 0.1, "overlap_threshold": 0.5}},
            "no postprocess.count",
        ),
        ("model_index.json", {"id_assignment": "odd"}, "id_assignment='odd'"),
        ("scheduler/config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000"),
        ("scheduler/config.json", {"beta_start": 0.5, "beta_end": 0.1}, "beta_start=0.5"),
        ("scheduler/config.json", {"beta_start": 0, "beta_end": 0}, "beta_end=0: no noise"),
        ("scheduler/config.json", {"rescale_zero_snr": True, "prediction_type": "epsilon"}, "rescale_zero_snr"),
        ("mask_vae/config.json", {"scaling_factor": 0}, "scaling_factor=0"),
        ("mask_vae/config.json", {"num_slots": 64}, "num_bits=5 cannot name 64 slots"),
        ("mask_vae/config.json", {"norm_groups": 7}, "mask_vae.*norm_groups=7"),
        ("image_vae/config.json", {"downsampling": 8}, "downsampling=8, its 3 levels make 4"),
        ("unet/config.json", {"num_heads": [4]}, "equally long"),
        ("unet/config.json", {"in_channels": 17}, "unet.in_channels=17"),
        ("unet/config.json", {"conditioning": "learned"}, "no conditioning among its components"),
        ("unet/config.json", {"sample_size": "x" * 10**6}, "sample_size='xxx"),
    ],
)
def test_settings_have_ranges(name, values, message, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "model")
    if "image_sizes" in values:
        text = (folder / name).read_text().replace('"image_size"', '"image_sizes"')
        (folder / name).write_text(text)
    else:
        edit(folder, name, **values)
    with pytest.raises(CheckpointError, match=message) as error:
        read_model_info(folder)
    assert len(str(error.value)) < 1000


def test_a_setting_that_is_missing_is_no_default(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "model")
    path = folder / "scheduler" / "config.json"
    values = json.loads(path.read_text())
    del values["prediction_type"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"scheduler/config\.json: damaged, no prediction_type"):
        load_component_config(folder, "scheduler")
    path = folder / "model_index.json"
    whole = json.loads(path.read_text())
    for name in ("components", "postprocess"):
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with pytest.raises(CheckpointError, match=rf"model_index\.json: .*no {name} in it"):
            read_model_info(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "git lfs pull"),
        (b"[" * 200_000, "no JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "no JSON"),
        (b"null", "a mapping of settings"),
        (b"", "no JSON"),
    ],
)
def test_settings_that_are_no_json(content, message, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "model")
    for name in ("model_index.json", "unet/config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_model_info(folder)
        (folder / name).write_bytes(whole)


def test_files_that_are_none(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "model")
    for name in ("unet/config.json", f"unet/{WEIGHTS}"):
        path = folder / name
        whole = path.read_bytes()
        path.unlink()
        path.mkdir()
        with pytest.raises(CheckpointError, match=name):
            load_component(folder, "unet")
        path.rmdir()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match=name):
            load_component(folder, "unet")
        path.unlink()
        path.symlink_to(path)
        with pytest.raises(CheckpointError, match="leads to itself"):
            load_component(folder, "unet")
        path.unlink()
        path.write_bytes(whole)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="model_index"):
        load_index(folder)


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_weights_that_are_damaged_or_something_else(good, tmp_path):
    path = tmp_path / WEIGHTS
    whole = (good / "unet" / WEIGHTS).read_bytes()
    header, body = header_of(good / "unet" / WEIGHTS)
    first, second = sorted(header)[:2]

    def with_entry(**values: object) -> bytes:
        text = json.dumps(header | {first: header[first] | values}).encode()
        return struct.pack("<Q", len(text)) + text + body

    for content, message in (
        (b"", "it is empty"),
        (LFS, r"a pointer of Git LFS.*git lfs pull"),
        (zip_bomb(), "a pickle under the name"),
        (whole[:100], "damaged"),
        (struct.pack("<Q", 2**60) + whole[8:], "damaged"),
        (struct.pack("<Q", 2**64 - 1) + whole[8:], "damaged"),
        (whole[:-1], "damaged"),
        (whole + b"more", "damaged"),
        (with_entry(data_offsets=header[second]["data_offsets"]), "damaged"),
        (with_entry(data_offsets=[0, 2**62]), "damaged"),
        (with_entry(shape=[2**62]), "damaged"),
        (with_entry(shape=[-1]), "damaged"),
        (with_entry(dtype="X"), "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_weights(path)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int32, r"of another type: conv_out\.bias torch\.int32"),
        (torch.float8_e4m3fn, "of another type"),
        (torch.bool, "of another type"),
    ],
)
def test_weights_of_another_type(dtype, message, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "model")
    state = load_file(folder / "unet" / WEIGHTS)
    save_file(state | {"conv_out.bias": state["conv_out.bias"].to(dtype)}, folder / "unet" / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_component(folder, "unet")


def test_int8_scales_make_nothing_larger(tmp_path):
    scales = {"a": torch.zeros(1, 1 << 16, dtype=torch.int8), "a.int8_scale": torch.ones(1 << 16)}
    save_file(scales, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"a\.int8_scale does not fit its tensor"):
        load_weights(tmp_path / WEIGHTS)
    save_file({"a": torch.zeros(1, 8, dtype=torch.int8), "a.int8_scale": torch.ones(1) * 1j}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"a\.int8_scale does not fit its tensor"):
        load_weights(tmp_path / WEIGHTS)
    save_file({"b.int8_scale": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"b\.int8_scale"):
        load_weights(tmp_path / WEIGHTS)

"""Model folders: what is saved loads bit for bit, and what is damaged or foreign is named."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldmseg_fast.checkpoints.categories_file import save_categories
from ldmseg_fast.checkpoints.model_card import training_facts, write_model_card
from ldmseg_fast.checkpoints.model_folder import (
    load_component,
    load_component_config,
    load_index,
    save_component,
    save_index,
)
from ldmseg_fast.checkpoints.tensors import load_state, load_weights, save_weights
from ldmseg_fast.config import MaskVAEConfig, to_dict
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import inside, write_json
from ldmseg_fast.models.mask_vae import MaskVAE

SMALL = MaskVAEConfig(num_bits=3, num_slots=8, widths=(8, 16), decoder_width=8, num_upscalers=1, norm_groups=4)


def test_weights_of_every_dtype_and_layout(tmp_path):
    state = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2).double(),
        "channels_last": torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last),
        "view": torch.randn(6, 8)[::2, 1:5],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    save_weights(state, tmp_path / "model.safetensors")
    for loaded in (load_weights(tmp_path / "model.safetensors"), load_file(tmp_path / "model.safetensors")):
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert loaded[name].dtype == tensor.dtype
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_components_come_back_bit_for_bit(model_dir):
    for name in ("unet", "mask_vae", "image_vae"):
        module = load_component(model_dir, name)
        weights = load_weights(model_dir / name / "model.safetensors")
        assert module.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_saving_again_replaces_the_component(tmp_path):
    first, second = MaskVAE(SMALL), MaskVAE(SMALL)
    for vae in (first, second):
        save_component(tmp_path / "model", "mask_vae", SMALL, vae.state_dict(), {"_more": 1})
        save_index(tmp_path / "model", ["mask_vae"], {"image_size": 8})
    loaded = load_component(tmp_path / "model", "mask_vae").state_dict()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in loaded.items())
    assert load_component_config(tmp_path / "model", "mask_vae") == (SMALL, {"_more": 1})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["mask_vae", "model_index.json"]


def test_saving_again_keeps_what_others_have_put_there(tmp_path):
    vae = MaskVAE(SMALL)
    elsewhere = tmp_path / "model" / "elsewhere"
    save_component(tmp_path / "model", "mask_vae", SMALL, vae.state_dict())
    (tmp_path / "model" / "mask_vae").rename(elsewhere)
    (tmp_path / "model" / "mask_vae").symlink_to(elsewhere)
    (elsewhere / "notes.txt").write_text("mine")
    (elsewhere / "more").mkdir()
    (elsewhere / "more" / "picture.png").write_bytes(b"dear")
    save_component(tmp_path / "model", "mask_vae", SMALL, vae.state_dict(), {"_more": 2})
    for place in (elsewhere, tmp_path / "model" / "mask_vae"):
        assert (place / "notes.txt").read_text() == "mine"
        assert (place / "more" / "picture.png").read_bytes() == b"dear"
    assert load_component_config(tmp_path / "model", "mask_vae") == (SMALL, {"_more": 2})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["elsewhere", "mask_vae"]
    assert (tmp_path / "model" / "mask_vae").is_symlink()


def test_half_weights_load_as_single_precision(tmp_path):
    vae = MaskVAE(SMALL).half()
    save_component(tmp_path, "mask_vae", SMALL, vae.state_dict())
    loaded = load_component(tmp_path, "mask_vae")
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (99, "newer model format 99, this version reads 1; update ldmseg_fast"),
        (0, "foreign or older model format 0, this version reads 1; convert it again"),
        (None, "foreign or older model format None"),
        ("1", "foreign or older model format '1'"),
    ],
)
def test_other_format_versions(version, message, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"format_version": version})
    with pytest.raises(CheckpointError, match=message):
        load_index(folder)


def test_damaged_folders(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = folder / "unet" / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", b"\xff" * 64, whole[: len(whole) // 2]):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged safetensors"):
            load_component(folder, "unet")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        load_component(folder, "unet")
    (tmp_path / "outside").write_bytes(whole)
    weights.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        load_component(folder, "unet")

    config = folder / "mask_vae" / "config.json"
    values = json.loads(config.read_text())
    for content, message in (
        ("{", "damaged, no JSON"),
        ("[1]", "a mapping of settings expected"),
        (json.dumps(values | {"num_bitz": 3}), "did you mean num_bits"),
        (json.dumps(values | {"num_bits": "many"}), "a whole number expected"),
        (json.dumps(values | {"decoder_width": 24}), r"of another shape: decoder\.0\.bias \(16,\) instead of \(24,\)"),
    ):
        config.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            load_component(folder, "mask_vae")
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"model_index\.json: a mapping of settings expected"):
        load_index(folder)


def test_load_state_lists_everything_at_once():
    module = nn.Linear(2, 3)
    with pytest.raises(CheckpointError) as error:
        load_state(module, {"weight": torch.zeros(3, 3), "b": torch.zeros(1)}, "file")
    message = str(error.value)
    assert "1 missing: bias" in message
    assert "1 unexpected: b" in message
    assert "weight (3, 3) instead of (3, 2)" in message
    assert message.startswith("file: ")


def test_inside(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert inside(tmp_path / "link", tmp_path / "link" / "file")
    for path in (tmp_path / "a" / ".." / "b", tmp_path):
        with pytest.raises(CheckpointError, match="out of the folder"):
            inside(tmp_path / "a", path)


def test_model_card(tmp_path):
    (tmp_path / "logs").mkdir()
    lines = [{"step": 10, "loss": 1.0}, {"step": 10, "val/pq": 41.234, "val/sq": 70.0, "val/rq": 58.0}, {"step": 12}]
    (tmp_path / "logs" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    write_model_card(tmp_path, {"data": "/data/coco|x", "mask_vae": SMALL, "notes": {"a": 1}})
    card = (tmp_path / "README.md").read_text()
    assert "| steps | 12 |" in card
    assert "| class-agnostic PQ on the validation split | 41.23 at step 10 |" in card
    assert "/data/coco\\|x" in card
    assert "num_bits=3" in card
    assert training_facts(tmp_path / "logs") == {}
    log = tmp_path / "logs" / "log.jsonl"
    before = training_facts(tmp_path)
    log.write_bytes(log.read_bytes() + b'5\n[1]\n{"a": 1}\n\xff\n{"step": 9')  # what a power cut may leave
    assert training_facts(tmp_path) == before


def test_model_card_of_a_model_with_categories(tmp_path):
    (tmp_path / "logs").mkdir()
    record = {"step": 10, "val/pq": 41.0, "val/class_pq": 31.0, "val/class_pq_things": 21.0, "val/class_pq_stuff": 11.0}
    (tmp_path / "logs" / "log.jsonl").write_text(json.dumps(record) + "\n")
    kinds = [Category(n, name, name != "sky", (0, 0, 0)) for n, name in enumerate(("cat", "sky", "dog"))]
    save_categories(tmp_path, CategoryTable(tuple(kinds)))
    write_model_card(tmp_path, {})
    rows = (tmp_path / "README.md").read_text().splitlines()
    assert {"| class-aware PQ | 31.00 |", "| class-aware PQ, things | 21.00 |"} < set(rows)
    assert {"| class-aware PQ, stuff | 11.00 |", "| things (2) | cat, dog |", "| stuff (1) | sky |"} < set(rows)


def test_every_model_folder_has_a_card(model_dir):
    card = (model_dir / "README.md").read_text()
    assert "LDMSegPipeline.from_pretrained" in card
    assert "unet.block_out_channels=(16, 32)" in card
    index = json.loads((model_dir / "model_index.json").read_text())
    assert index["format_version"] == 1
    assert to_dict(load_component_config(model_dir, "mask_vae")[0])["num_bits"] == 5


def test_a_full_disk_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    vae = MaskVAE(SMALL)
    save_component(tmp_path, "mask_vae", SMALL, vae.state_dict())
    write_json(tmp_path / "report.json", {"pq": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_component(tmp_path, "mask_vae", SMALL, {name: value + 1 for name, value in vae.state_dict().items()})
    with pytest.raises(OSError, match=r"No space left on device: .*report\.json"):
        write_json(tmp_path / "report.json", {"pq": 2})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask_vae", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"pq": 1}
    for name, value in load_component(tmp_path, "mask_vae").state_dict().items():
        assert (value == vae.state_dict()[name]).all()

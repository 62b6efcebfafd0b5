"""Files that are no checkpoint of the original code, or a hostile one: nothing runs, and nothing is left behind."""

import io
import json
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from ldmseg_fast.commands.convert import convert_checkpoint
from ldmseg_fast.config import MaskVAEConfig, UNetConfig
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.models.mask_vae import MaskVAE
from tests.commands.original_files import (
    BASE_UNET,
    MASK,
    UNET,
    VAE,
    P,
    assert_nothing_written,
    original_model,
    run,
    write,
)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class State:
    """Pickles as an object with a state."""

    def __setstate__(self, state):
        raise AssertionError("ran")

    def __getstate__(self):
        return {"x": 1}


def malicious(marker: Path):
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"__import__('os').system('touch {marker}')"),
        "exec": Call(exec, code),
        "getattr": Call(getattr, marker, "touch"),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "import": Call(__import__, "antigravity"),
        "nested": {"unet": {"conv_in.weight": Call(Path.touch, marker)}},
        "in p": {"vae": {"a": torch.zeros(1)}, "p": {"lr": Call(eval, code)}},
        "in opt": {"vae": {"a": torch.zeros(1)}, "opt": [Call(exec, code)]},
        "torch.load": Call(torch.load, str(marker)),
        "object": {"vae": State()},
        "bytearray": {"vae": {"a": Call(bytearray, 10**12)}},
        "tensor": {"vae": {"a": Call(torch.Tensor, 10**6, 10**6)}},
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", malicious(Path("marker")))
def test_a_malicious_pickle_is_refused_and_nothing_runs(name, protocol, tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save(malicious(marker)[name], path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="refused, nothing was run"):
        convert_checkpoint(path, tmp_path / "out")
    path.write_bytes(pickle.dumps(malicious(marker)[name], protocol))
    with pytest.raises(CheckpointError, match=r"no checkpoint of torch\.save"):
        convert_checkpoint(path, tmp_path / "out")
    torch.save(malicious(marker)[name], path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"no checkpoint of torch\.save"):
        convert_checkpoint(path, tmp_path / "out")
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


def test_bombs_are_refused(files):
    values = {"vae": {"encoder.0.weight": torch.zeros(1).expand(10**6, 10**6)}}
    with pytest.raises(CheckpointError, match="more than is stored"):
        run(files, values)
    packed = files / "packed.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"vae": "x" * 10**7}, 2))
    with pytest.raises(CheckpointError, match="compressed entries"):
        convert_checkpoint(packed, files / "out")
    shared: list = []
    for _ in range(60):
        shared = [shared, shared]
    with pytest.raises(CheckpointError):
        run(files, {"vae": shared, "p": shared})
    assert_nothing_written(files)


def test_damaged_and_foreign_files(files):
    whole = write(files / "model.pt", original_model()).read_bytes()
    cut = files / "cut.pt"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            convert_checkpoint(cut, files / "out")
    damaged = bytearray(whole)
    start = whole.index(b"conv_in.weight")
    damaged[start - 200 : start + 200] = os.urandom(400)
    cut.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        convert_checkpoint(cut, files / "out")
    empty_zip = io.BytesIO()
    zipfile.ZipFile(empty_zip, "w").close()
    for content in (b"\xff\xd8\xff\xe0 no model", b"{}", empty_zip.getvalue()):
        cut.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            convert_checkpoint(cut, files / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        convert_checkpoint(files / "nothing.pt", files / "out")
    assert_nothing_written(files)


def test_files_that_are_no_checkpoints_say_what_they_are(files):
    (files / "folder.pt").mkdir()
    os.mkfifo(files / "pipe.pt")
    for name, message in (("folder.pt", "a folder"), ("pipe.pt", "a named pipe")):
        with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
            convert_checkpoint(files / name, files / "out")


def test_weights_that_were_damaged_on_the_way(files):
    """Each record of torch.save has a checksum, unless that was switched off; torch.load does not look at it."""
    values = {"vae": MaskVAE(MASK).state_dict(), "p": P}
    torch.serialization.set_crc32_options(False)
    try:
        convert_checkpoint(write(files / "model.pt", values), files / "plain")
    finally:
        torch.serialization.set_crc32_options(True)
    path = write(files / "model.pt", values)
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + entry.file_size] ^= 1  # in its bytes, which follow a short header
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pt: damaged checkpoint \(Bad CRC-32"):
        convert_checkpoint(path, files / "out")
    assert_nothing_written(files)


@pytest.mark.parametrize("value", ["x", 0, -1, float("nan"), True, [], 10**60, 1.5], ids=lambda value: "")
def test_numbers_of_the_settings_that_are_none(files, value):
    settings = P | {"vae_model_kwargs": P["vae_model_kwargs"] | {"norm_num_groups": value}}
    with pytest.raises(CheckpointError, match=r"`p` has norm_num_groups=.*: a positive whole number below") as error:
        run(files, {"vae": MaskVAE(MASK).state_dict(), "p": settings})
    assert len(str(error.value)) < 400 and str(error.value).startswith(str(files / "model.pt"))


def edited(name, key, value):
    """`original_model` with one tensor of one network replaced, or dropped where `value` is None."""
    values = original_model()
    state = dict(values[name])
    if value is None:
        del state[key]
    else:
        state[key] = value
    return values | {name: state}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [1, 2], "holds a list"),
        (lambda: {"model": {}, "epoch": 3}, "it holds epoch, model"),
        (lambda: {}, "it holds nothing"),
        (lambda: {"vae": {}}, "dictionary of tensors expected"),
        (lambda: {"vae": [torch.zeros(1)]}, "dictionary of tensors expected, not list"),
        (lambda: {"vae": {"encoder.0.weight": torch.zeros(3)}}, "no mask auto-encoder"),
        (lambda: {"vae": original_model()["unet"]}, "no mask auto-encoder"),
        (lambda: {"unet": original_model()["unet"]}, "'unet' without 'vae_semseg' and 'vae_image'"),
        (lambda: original_model() | {"unet": MaskVAE(MASK).state_dict()}, "no UNet"),
        (lambda: original_model(vae_image={"a": torch.zeros(1)}), "no AutoencoderKL"),
        (lambda: original_model(p=P | {"train_kwargs": {"encoding_mode": "color"}}), "encoded as 'color'"),
        (lambda: original_model(p=P | {"image_scaling_factor": "big"}), "image_scaling_factor='big'"),
        (lambda: original_model(p=P | {"noise_scheduler_kwargs": {"beta_schedule": "odd"}}), "beta_schedule='odd'"),
        (lambda: original_model(p=P | {"noise_scheduler_kwargs": {"clip_sample": True}}), "clip_sample"),
        (lambda: original_model(p=P | {"transformation_kwargs": {"size": 33}}), "multiple of 8 pixels"),
        (lambda: original_model(p=P | {"vae_model_kwargs": {"norm_num_groups": 7}}), "norm groups 7"),
        (lambda: original_model(p=P | {"vae_model_kwargs": {"parametrization": "discrete"}}), "discrete"),
        (lambda: edited("unet", "conv_in.bias", torch.zeros(16)), "differ, though they are one tensor"),
        (lambda: edited("unet", "conv_norm_out.weight", None), "1 missing: conv_norm_out.weight"),
        (lambda: edited("unet", "extra.weight", torch.zeros(1)), "1 unexpected: extra.weight"),
        (lambda: edited("unet", "time_embedding.linear_1.weight", torch.zeros(3, 4)), r"linear_1.weight \(3, 4\)"),
        (
            lambda: edited("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight", torch.zeros(1)),
            "attn2",
        ),
        (lambda: edited("unet", "conv_out.weight", "text"), "conv_out.weight is a str"),
        (lambda: edited("vae_semseg", "decoder.0.bias", None), "1 missing: decoder.0.bias"),
        (lambda: edited("vae_semseg", "quantize.weight", torch.zeros(1)), "1 unexpected: quantize.weight"),
        (lambda: edited("vae_image", "quant_conv.bias", None), "1 missing: quant_conv.bias"),
        (lambda: edited("vae_image", "post_quant_conv.bias", None), "1 missing: post_quant_conv.bias"),
        (lambda: edited("vae_image", "extra.bias", torch.zeros(1)), "1 unexpected: extra.bias"),
        (lambda: edited("vae_image", "decoder.conv_in.bias", torch.zeros(16)), "missing: decoder"),
        (
            lambda: original_model(mask=MaskVAEConfig(widths=(8, 16), num_upscalers=1, norm_groups=8)),
            "do not fit each other",
        ),
        (lambda: original_model(unet=UNetConfig(**{**vars(UNET), "in_channels": 9})), "conv_in takes 9"),
    ],
)
def test_errors_say_what_is_wrong(make, message, files):
    with pytest.raises(CheckpointError, match=message):
        run(files, make())
    assert_nothing_written(files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [16, 64]}, r"block_out_channels \(16, 32\) in the tensors, \(16, 64\)"),
        ({"layers_per_block": 2}, "layers_per_block 1 in the tensors, 2"),
        ({"use_linear_projection": True}, "linear_projection"),
        ({"attention_head_dim": 3}, "3 heads do not divide 16"),
        ({"attention_head_dim": [2]}, "head counts"),
        ({"norm_num_groups": 5}, "5 norm groups do not divide"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"mid_block_type": None, "class_embed_type": "timestep"}, "class_embed_type"),
        ({"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}, "attention"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "mirror"),
        ({"sample_size": "x"}, "image size"),
    ],
)
def test_a_configuration_that_does_not_fit(change, message, files):
    (files / "unet.json").write_text(json.dumps(BASE_UNET | change))
    with pytest.raises(CheckpointError, match=message):
        run(files, original_model())
    assert_nothing_written(files)


def test_configuration_files_that_are_none(files):
    values = original_model()
    with pytest.raises(CheckpointError, match="--unet-config"):
        run(files, values, unet_config=None)
    with pytest.raises(CheckpointError, match=r"nothing\.json: no such file"):
        run(files, values, unet_config=files / "nothing.json")
    (files / "vae.json").write_text("no json")
    with pytest.raises(CheckpointError, match=r"vae\.json"):
        run(files, values)
    (files / "vae.json").write_text(json.dumps(VAE | {"block_out_channels": [8, 16, 32]}))
    with pytest.raises(CheckpointError, match="does not fit --image-vae: block_out_channels"):
        run(files, values)
    secret = files / "secret.json"
    secret.write_text(json.dumps(VAE))
    (files / "linked").mkdir()
    (files / "linked" / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        run(files, values, image_vae=files / "linked")
    assert_nothing_written(files)


def test_configurations_of_networks_that_an_auto_encoder_does_not_have_are_refused(files):
    values = {"vae": MaskVAE(MASK).state_dict(), "p": P}
    for options, words in (
        ({"unet_config": files / "nowhere.json"}, "--unet-config .*nowhere.json would change nothing; leave it out"),
        ({"image_vae": "owner/nowhere"}, "--image-vae owner/nowhere would change nothing; leave it out"),
        (
            {"unet_config": files / "unet.json", "image_vae": files},
            "--unet-config .* and --image-vae .* leave them out",
        ),
    ):
        with pytest.raises(ArgumentError, match=words):
            run(files, values, **{"unet_config": None, "image_vae": None} | options)
    assert_nothing_written(files)

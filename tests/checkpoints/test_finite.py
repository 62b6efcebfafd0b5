"""NaN and infinity in weights, latents or logits are an error that names the network, and nothing is written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldmseg_fast import LDMSegPipeline, cli
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.checkpoints.tensors import WEIGHTS, check_finite
from ldmseg_fast.commands.convert import convert_checkpoint
from ldmseg_fast.errors import CheckpointError, NonFiniteError
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.export.model_export import ExportSettings, export_model
from ldmseg_fast.export.networks import load_network
from tests.commands.test_convert import BASE_UNET, VAE, original_model

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def spoil(folder, name, value, dtype=torch.float32):
    """Puts `value` into one weight of a component; gives that weight's name."""
    path = folder / name / WEIGHTS
    state = load_file(path)
    key = max(state, key=lambda each: state[each].numel())
    state[key] = state[key].clone().to(dtype)
    state[key].view(-1)[7] = value
    save_file(state, path)
    return key


@pytest.mark.parametrize("name", ["unet", "mask_vae", "image_vae"])
def test_no_command_takes_a_model_with_one_nan(name, model_dir, scenes, tmp_path, capsys):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    key = spoil(folder, name, float("nan"))
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    ids = np.zeros((48, 64, 3), np.uint8)
    ids[:, :20, 0] = 1
    Image.fromarray(ids).save(tmp_path / "map.png")
    out = tmp_path / "out"
    commands = {
        "predict": [str(folder), str(tmp_path / "a.png"), "--out", str(out)],
        "inpaint": [
            *(str(folder), "--image", str(tmp_path / "a.png"), "--map", str(tmp_path / "map.png")),
            *("--unknown-id", "0", "--out", str(out)),
        ],
        "evaluate": [str(folder), "--data", str(scenes), "--limit", "1", "--json", str(out / "report.json")],
    }
    for command, arguments in commands.items():
        assert cli.main([command, *arguments]) == 2
        said = capsys.readouterr()
        assert f"{name}/{WEIGHTS}: 1 tensors are not finite (NaN or infinity): {key}" in said.err
        assert "PQ" not in said.out
    with pytest.raises(CheckpointError, match=f"{name}.*not finite"):
        export_model(folder, tmp_path / "export", ExportSettings())
    assert not out.exists() or not list(out.iterdir())
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e300])
def test_infinity_and_what_float32_does_not_hold(value, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    spoil(folder, "unet", value, torch.float64 if value == 1e300 else torch.float32)
    with pytest.raises(CheckpointError, match="not finite"):
        LDMSegPipeline.from_pretrained(folder, device="cpu")


def test_an_auto_encoder_with_one_nan(model_dir, scenes, tmp_path):
    folder = shutil.copytree(model_dir.with_name(model_dir.name + "-autoencoder"), tmp_path / "model")
    spoil(folder, "mask_vae", float("nan"))
    with pytest.raises(CheckpointError, match=r"mask_vae.*not finite"):
        evaluate(folder, scenes, EvaluationOptions(limit=1))


def test_weights_that_half_precision_does_not_hold(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    spoil(folder, "unet", 1e6)
    info = read_model_info(folder)
    with pytest.raises(CheckpointError, match=r"1e\+06, which torch\.float16 does not hold.*bfloat16 or float32"):
        TorchBackend(info, "cpu", torch.float16)
    with pytest.raises(CheckpointError, match="not finite"):
        load_network(info, "unet", torch.float16)
    spoil(folder, "mask_vae", 1e6)
    with pytest.raises(CheckpointError, match=r"torch\.float16 does not hold"):
        load_network(info, "mask_vae", torch.float16)
    TorchBackend(info, "cpu", torch.float32)


def test_what_is_finite_passes():
    large = torch.tensor([65504.0, -65504.0])
    check_finite(
        {"a": large, "b": torch.zeros(0), "c": torch.arange(3), "d": large.half(), "e": large[:1].bfloat16()}, ""
    )
    check_finite({"a": large}, "", torch.float16)
    check_finite({"meta": torch.empty(3, device="meta")}, "")


def test_convert_refuses_it_too(tmp_path):
    values = original_model()
    key = "decoder.0.weight"
    weight = values["vae_semseg"][key].clone()
    weight.view(-1)[0] = float("nan")
    torch.save(values | {"vae_semseg": values["vae_semseg"] | {key: weight}}, tmp_path / "model.pt")
    for name, config in (("unet.json", BASE_UNET), ("vae.json", VAE)):
        (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vae_semseg'\]: 1 tensors are not finite.*decoder\.0\.weight"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", tmp_path / "unet.json", tmp_path / "vae.json")
    assert not (tmp_path / "out").exists()


# ---- what a network computes


class Spoilt:
    """A backend one of whose networks gives NaN for one value."""

    def __init__(self, backend, name):
        self.backend, self.name = backend, name

    def __getattr__(self, name):
        found = getattr(self.backend, name)
        if name != self.name:
            return found

        def spoilt(*args, **kwargs):
            result = found(*args, **kwargs).clone()
            result[0, 0, 0, 3] = float("nan")
            return result

        return spoilt


@pytest.mark.parametrize(
    ("network", "said"), [("encode_image", "image_vae: image latents"), ("sample", "unet: sampled latents")]
)
@pytest.mark.parametrize("output", ["panoptic", "latent", "logits"])
def test_latents(network, said, output, model_dir):
    pipe = LDMSegPipeline(Spoilt(TorchBackend(read_model_info(model_dir), "cpu"), network))
    with pytest.raises(NonFiniteError, match=f"{said} are not finite"):
        pipe([PICTURE], 1, output_type=output)


def test_inpainting_and_ensembles(model_dir):
    segmentation, known = np.ones((48, 64), np.int32), np.ones((48, 64), bool)
    known[:, :20] = False
    pipe = LDMSegPipeline(Spoilt(TorchBackend(read_model_info(model_dir), "cpu"), "denoise"))
    for method in ("pixels", "estimate", "renoise"):
        with pytest.raises(NonFiniteError, match="unet"):
            pipe.inpaint([PICTURE], [segmentation], [known], 2, method=method, draft_steps=0)
    with pytest.raises(NonFiniteError, match="unet"):
        pipe.ensemble([PICTURE], 2, num_inference_steps=2, solver="dpmpp_2m")
    with pytest.raises(NonFiniteError, match="initial noise"):
        LDMSegPipeline.from_pretrained(model_dir, device="cpu")(
            [PICTURE], 1, latents=torch.full((1, 4, 16, 16), torch.nan)
        )


def test_logits(model_dir):
    backend = TorchBackend(read_model_info(model_dir), "cpu")
    torch.nn.init.constant_(backend.mask_vae.decoder[-1].bias, float("nan"))
    with pytest.raises(NonFiniteError, match="mask_vae: slot logits are not finite"):
        LDMSegPipeline(backend)([PICTURE], 1)
    with pytest.raises(NonFiniteError, match="mask_vae: slot logits"):
        backend.decode_mask(torch.zeros(1, *backend.info.latent_shape), (64, 64), "logits")


def test_the_model_is_named_with_its_dtype(model_dir):
    info = dataclasses.replace(read_model_info(model_dir))
    backend = Spoilt(TorchBackend(info, "cpu", torch.bfloat16), "sample")
    with pytest.raises(NonFiniteError, match=rf"{model_dir.name}.*in bfloat16; run it in float32"):
        LDMSegPipeline(backend)([PICTURE], 1)

"""Training in eight bits: what it changes of a UNet, that it learns as bf16 does, and what it refuses."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from ldmseg_fast.config import UNetConfig, load_config
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.models.unet import UNet
from ldmseg_fast.training import fp8, machine
from ldmseg_fast.training.fp8 import check_fp8, train_in_fp8
from ldmseg_fast.training.loop import train
from tests.conftest import NARROW

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(
    not fp8.importlib.util.find_spec("torchao"), reason="no torchao; pip install 'ldmseg_fast[fp8]'"
)


def small_unet(**changes):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "attention": (True, True), "num_heads": (2, 2), "norm_groups": 8}
    return UNet(UNetConfig(**({"in_channels": 12, "sample_size": 8, **sizes} | changes)))


@needs_torchao
def test_transformers_multiply_in_eight_bits_and_nothing_else():
    unet = small_unet(conditioning="learned", cross_attention_dim=16)
    before, names = {k: v.clone() for k, v in unet.state_dict().items()}, [n for n, _ in unet.named_parameters()]
    plain = small_unet(conditioning="learned", cross_attention_dim=16)
    told = train_in_fp8(unet)
    changed = [name for name, module in unet.named_modules() if type(module).__name__ == "Float8Linear"]
    assert (
        changed and told.startswith(f"{len(changed)} linear layers") and all(".attentions." in name for name in changed)
    )
    assert any("attn2.to_k" in name for name in changed)
    assert [n for n, _ in unet.named_parameters()] == names
    for key, value in unet.state_dict().items():
        assert torch.equal(value, before[key])
    inputs = torch.randn(2, 12, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16)
    outputs = []
    for network in (plain, unet):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(network(*inputs).float())
        outputs[-1].square().mean().backward()
    assert torch.cosine_similarity(outputs[0].flatten(), outputs[1].flatten(), dim=0) > 0.99
    assert not torch.equal(*outputs)
    for (name, one), other in zip(plain.named_parameters(), unet.parameters()):
        assert one.grad is not None and other.grad is not None and other.grad.dtype is torch.float32
        if one.grad.norm() > 1e-6:
            assert torch.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.9, name


@needs_torchao
def test_a_unet_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match="no linear layer of this UNet's transformers"):
        train_in_fp8(small_unet(attention=(False, False), mid_attention=False))


@needs_torchao
def test_layers_of_odd_sides_stay():
    unet = small_unet(block_out_channels=(24, 48))
    train_in_fp8(unet)
    of_eight_bits = [module for module in unet.modules() if type(module).__name__ == "Float8Linear"]
    assert of_eight_bits and all(module.in_features % 16 == module.out_features % 16 == 0 for module in of_eight_bits)
    stayed = [module for module in unet.modules() if type(module) is nn.Linear]
    assert any(module.in_features == 24 for module in stayed)


@needs_torchao
def test_products_have_sides_that_a_gpu_takes(monkeypatch):
    """Gradients of weights sum over the rows: 3 pictures of 7 x 7 cells here."""
    from torchao.float8 import float8_ops

    inner, rows = [], []
    preprocess = float8_ops.preprocess_addmm

    def watched(a, b):
        found = preprocess(a, b)
        inner.append(found[0].shape[1])
        rows.append(found[0].shape[0])
        return found

    monkeypatch.setattr(float8_ops, "preprocess_addmm", watched)
    unet = small_unet(sample_size=14, conditioning="learned", cross_attention_dim=16)
    train_in_fp8(unet)
    unet(torch.randn(3, 12, 14, 14), torch.tensor([3, 500, 7]), torch.randn(3, 5, 16)).square().mean().backward()
    assert inner and all(side % 16 == 0 for side in inner) and any(side % 16 for side in rows)


@needs_torchao
def test_a_run_in_eight_bits(model_dir, scenes, tmp_path, monkeypatch):
    """It learns about as the run in bf16, saves weights of the same names, and goes on from them."""
    monkeypatch.setattr(machine, "check_fp8", lambda device, precision: None)
    base = [*NARROW, f"data.root={scenes}", f"model.mask_vae={model_dir}-autoencoder", "train.precision=bf16"]
    base += ["train.batch_size=2", "train.log_every=1", "train.validate_every=1000", "data.val_limit=1"]
    losses = {}
    for name in ("false", "true"):
        config = load_config("tiny", [*base, "train.steps=4", f"train.fp8={name}", f"output_dir={tmp_path / name}"])
        train("diffusion", config)
        lines = (tmp_path / name / "logs" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss": ' in line]
    assert losses["true"] == pytest.approx(losses["false"], rel=0.02) and losses["true"] != losses["false"]
    train("diffusion", replace(config, train=replace(config.train, steps=5)), resume=True)
    train(
        "autoencoder", load_config("tiny", [*base, "train.steps=1", "train.fp8=true", f"output_dir={tmp_path / 'vae'}"])
    )


@pytest.mark.parametrize(
    ("precision", "installed", "message"),
    [
        ("bf16", True, r"train\.fp8=true needs a GPU of sm_\d+ or newer, not cpu; set train\.fp8=false"),
        ("fp16", True, r"train\.precision=bf16, not with fp16"),
        ("bf16", False, r"pip install 'ldmseg_fast\[fp8\]'"),
    ],
)
def test_refused(precision, installed, message, monkeypatch):
    if not installed:
        monkeypatch.setattr(fp8, "why_not_fp8_products", lambda device: "")
        monkeypatch.setitem(sys.modules, "torchao", None)
        monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        check_fp8(CPU, precision)


def test_refused_with_other_settings():
    with pytest.raises(ConfigError, match=r"train\.fp8=true: ZeRO 3"):
        load_config("tiny", ["train.fp8=true", "train.zero_stage=3"])

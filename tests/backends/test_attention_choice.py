"""The attention of a model is chosen where it is loaded."""

import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.errors import ArgumentError, BackendError
from ldmseg_fast.kernels.attention import reference
from ldmseg_fast.models.layers import Attention


def chosen(pipe: LDMSegPipeline) -> set[str]:
    return {layer.backend for layer in pipe.backend.unet.modules() if isinstance(layer, Attention)}


def test_the_choice_reaches_every_layer(model_dir):
    for name in ("auto", "sdpa"):
        assert chosen(LDMSegPipeline.from_pretrained(model_dir, attention=name, device="cpu")) == {name}


@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_what_cannot_run_is_refused_at_load(backend, model_dir):
    message = "attention=triton needs a GPU, the model is on cpu; use attention=auto or sdpa"
    with pytest.raises(BackendError, match=f"^{message}$"):
        LDMSegPipeline.from_pretrained(model_dir, backend, device="cpu", attention="triton")
    with pytest.raises(ArgumentError, match="attention='flash': one of auto"):
        LDMSegPipeline.from_pretrained(model_dir, backend, device="cpu", attention="flash")


def test_fp8_is_left_out_where_there_is_none(model_dir):
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    plain = LDMSegPipeline.from_pretrained(model_dir, device="cpu")
    message = "^attention=fp8: it needs a GPU of sm_89 or newer, not cpu; attention=auto is computed instead"
    with pytest.warns(UserWarning, match=message):
        left_out = LDMSegPipeline.from_pretrained(model_dir, device="cpu", attention="fp8")
    assert chosen(left_out) == {"auto"}
    assert torch.equal(left_out(picture, 1, output_type="latent"), plain(picture, 1, output_type="latent"))


def test_graphs_have_their_own(model_dir, tmp_path):
    for backend in ("onnxruntime", "tensorrt"):
        with pytest.raises(BackendError, match=f"attention=sdpa: .* backend={backend} takes auto only"):
            LDMSegPipeline.from_pretrained(model_dir, backend, tmp_path, attention="sdpa")


def test_fp8_computes_the_attention_of_a_sample(model_dir, monkeypatch):
    """On a CPU by the reference, once the fallback is out of the way."""
    monkeypatch.setattr("ldmseg_fast.backends.torch_backend.choose_attention", lambda name, *_: name)
    calls = []
    plain = reference.attention_fp8
    monkeypatch.setattr(reference, "attention_fp8", lambda *arguments: calls.append(1) or plain(*arguments))
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    load = {"device": "cpu", "dtype": torch.bfloat16}
    exact, rounded = (LDMSegPipeline.from_pretrained(model_dir, attention=name, **load) for name in ("auto", "fp8"))
    expected = exact(picture, 1, output_type="latent").float()
    assert not calls
    result = rounded(picture, 1, output_type="latent").float()
    layers = [layer for layer in rounded.backend.unet.modules() if isinstance(layer, Attention)]
    assert len(calls) == len(layers)
    assert 0 < float((result - expected).norm() / expected.norm()) < 0.1

"""Models with conditioning: trained queries are in the graph, CLIP's tokens are its input."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.backends.graphs.manifest import model_hash, read_manifest
from ldmseg_fast.checkpoints.model_folder import load_component, save_component
from ldmseg_fast.export import to_onnx, to_triton
from tests.conftest import make_model

KINDS = ("learned", "clip_image", "clip_text")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Small random CLIP models and a tokenizer of letters, laid out as in a Stable Diffusion folder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *"abc", *(f"{letter}</w>" for letter in "abc")]
    CLIPTokenizer({word: index for index, word in enumerate(words)}, []).save_pretrained(folder / "tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=6, bos_token_id=0, eos_token_id=1, **size)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def exported(request, clip, tmp_path_factory):
    """(kind, model folder, folder of graphs)"""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    path = clip if kind != "learned" else ""
    settings = (f"unet.conditioning={kind}", "unet.cross_attention_dim=12", "conditioning.num_queries=5")
    model = make_model(root / "model", (*settings, f"conditioning.path={path}"))
    assert to_onnx.main([str(model), "--out", str(root / "graphs"), "--no-parity"]) == 0
    return kind, model, root / "graphs"


def test_the_pipeline_gives_torchs_latents(exported):
    kind, model, graphs = exported
    fast = LDMSegPipeline.from_pretrained(model, backend="onnxruntime", engine_dir=graphs, device="cpu")
    plain = LDMSegPipeline.from_pretrained(model, device="cpu")
    pictures = [np.random.default_rng(seed).integers(0, 256, (50, 60, 3), np.uint8) for seed in range(2)]
    captions = ["a b", "c"] if kind == "clip_text" else None  # guided: two evaluations in one batch
    for solver in ("ddim", "heun"):
        found, expected = (
            pipe(pictures, 3, output_type="latent", captions=captions, solver=solver) for pipe in (fast, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    if captions:
        other = fast(pictures, 3, output_type="latent", captions=["c", "c"])
        assert not torch.allclose(other[0], found[0]) and torch.allclose(
            other[1], fast(pictures, 3, output_type="latent", captions=captions)[1], atol=1e-4
        )


def test_the_graph_takes_what_a_picture_brings(exported):
    kind, _, graphs = exported
    tensors = read_manifest(graphs).graphs["denoiser"].spec.tensors
    shapes = {"learned": None, "clip_image": ("batch", 5, 12), "clip_text": ("batch", 6, 12)}
    assert (tensors["context"].shape if "context" in tensors else None) == shapes[kind]


def test_changed_queries_are_another_model(exported, tmp_path):
    _, model, _ = exported
    before = model_hash(model)
    component = load_component(model, "conditioning")
    state = {name: value + 1 if value.is_floating_point() else value for name, value in component.state_dict().items()}
    shutil.copytree(model, tmp_path / "m")
    assert model_hash(tmp_path / "m") == before
    save_component(tmp_path / "m", "conditioning", component.config, state)
    assert model_hash(tmp_path / "m") != before


def test_what_needs_a_picture_for_its_context_is_not_served(exported, tmp_path, capsys):
    kind, model, graphs = exported
    served = to_triton.main([str(graphs), "--out", str(tmp_path / "r")])
    assert served == (0 if kind == "learned" else 2)
    if kind != "learned":
        assert "the server's sampler has no CLIP encoder" in capsys.readouterr().err
        assert to_onnx.main([str(model), "--out", str(tmp_path / "g"), "--sampler-steps", "2"]) == 2
        assert f"unet.conditioning={kind} is sampled step by step" in capsys.readouterr().err

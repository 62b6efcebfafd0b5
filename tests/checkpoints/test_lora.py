"""A LoRA is read under the names of diffusers, PEFT and others, and folded as by hand; what does not fit says so."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldmseg_fast.checkpoints.lora import METADATA, fold_lora
from ldmseg_fast.checkpoints.tensors import opened_weights
from ldmseg_fast.errors import CheckpointError

LINEAR, OUT, CONV = "mid_block.attentions.0.attn1.to_q", "mid_block.attentions.0.attn1.to_out.0", "conv_in"
RANK, SCALE = 3, 0.7


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    shapes = {LINEAR: (8, 6), OUT: (6, 8), CONV: (4, 5, 3, 3)}
    state = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return state | {"conv_in.bias": torch.zeros(4)}


@pytest.fixture
def factors(state):
    """{layer: (down, up)}"""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for layer in (LINEAR, OUT, CONV):
        outputs, inputs, *window = state[f"{layer}.weight"].shape
        down = torch.randn(RANK, inputs, *window, generator=generator)
        found[layer] = down, torch.randn(outputs, RANK, *(1 for _ in window), generator=generator)
    return found


NAMES = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "unet.{}.alpha"),
    "peft with an adapter's name": (
        "base_model.model.{}.lora_A.default.weight",
        "{}.lora_B.default.weight",
        "{}.alpha",
    ),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "unet.{}.lora.alpha"),
    "without the network": ("{}.lora.down.weight", "{}.lora.up.weight", "{}.alpha"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}


def file_of(path, factors, names="peft", alpha=None, extra=None, metadata=None):
    down_name, up_name, alpha_name = NAMES[names]
    tensors = dict(extra or {})
    for layer, (down, up) in factors.items():
        written = layer.replace(".", "_") if names == "kohya" else layer
        tensors |= {down_name.format(written): down, up_name.format(written): up}
        tensors |= {} if alpha is None else {alpha_name.format(written): torch.tensor(float(alpha))}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def by_hand(state, factors, scale):
    folded = dict(state)
    for layer, (down, up) in factors.items():
        change = torch.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
        folded[f"{layer}.weight"] = state[f"{layer}.weight"] + scale * change
    return folded


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("alpha", [None, 6])
def test_every_layer_gets_its_change(state, factors, tmp_path, names, alpha):
    found = fold_lora(state, file_of(tmp_path / "l.safetensors", factors, names, alpha), SCALE)
    assert_equal(found, by_hand(state, factors, SCALE * (alpha or RANK) / RANK))
    assert found["conv_in.bias"] is state["conv_in.bias"]


def test_processors_of_attention(state, factors, tmp_path):
    attention = "unet.mid_block.attentions.0.attn1.processor"
    tensors = {}
    for name, layer in (("to_q_lora", LINEAR), ("to_out_lora", OUT)):
        down, up = factors[layer]
        tensors |= {f"{attention}.{name}.down.weight": down, f"{attention}.{name}.up.weight": up}
    found = fold_lora(state, file_of(tmp_path / "l.safetensors", {}, extra=tensors), SCALE)
    assert_equal(found, by_hand(state, {layer: factors[layer] for layer in (LINEAR, OUT)}, SCALE))


def test_alpha_of_the_metadata(state, factors, tmp_path):
    settings = {"unet.r": RANK, "unet.lora_alpha": 12, "unet.alpha_pattern": {"conv_in": 1}, "text_encoder.r": 1}
    metadata = {METADATA: json.dumps(settings)}
    found = fold_lora(state, file_of(tmp_path / "l.safetensors", factors, metadata=metadata))
    linear = {layer: factors[layer] for layer in (LINEAR, OUT)}
    expected = by_hand(by_hand(state, linear, 12 / RANK), {CONV: factors[CONV]}, 1 / RANK)
    assert_equal(found, expected)
    settings["unet.use_rslora"] = True
    metadata = {METADATA: json.dumps(settings | {"unet.alpha_pattern": {}})}
    found = fold_lora(state, file_of(tmp_path / "s.safetensors", factors, metadata=metadata))
    assert_equal(found, by_hand(state, factors, 12 / RANK**0.5))


def test_a_scale_of_zero_changes_nothing(state, factors, tmp_path):
    found = fold_lora(state, file_of(tmp_path / "l.safetensors", factors), 0.0)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_text_encoder_beside_it_stays_unread(state, factors, tmp_path):
    extra = {"text_encoder.text_model.layers.0.q_proj.lora_A.weight": torch.ones(1, 2)}
    found = fold_lora(state, file_of(tmp_path / "l.safetensors", factors, extra=extra))
    assert_equal(found, by_hand(state, factors, 1.0))


A, B = torch.ones(2, 6), torch.ones(8, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_encoder.q.lora_A.weight": A}, "a LoRA of a text encoder alone"),
        ({"lora_te_q.lora_down.weight": A}, "a LoRA of a text encoder alone"),
        ({}, "no LoRA of a UNet as diffusers saves it; it is empty"),
        ({"unet.conv_in.weight": A}, r"as diffusers saves it; unet\.conv_in\.weight"),
        ({f"unet.{LINEAR}.lora_A.weight": A, f"unet.{LINEAR}.lora_magnitude_vector": B}, "lora_magnitude_vector"),
        ({"unet.up.attn2.to_k.lora_A.weight": A}, r"another UNet; this one has no up\.attn2\.to_k; train it on this"),
        ({"lora_unet_up_attn2_to_k.lora_up.weight": A}, "another UNet; this one has no lora_unet_up_attn2_to_k"),
        ({f"unet.{LINEAR}.lora_A.weight": A}, rf"of {LINEAR} one of two factors is missing"),
        ({f"unet.{LINEAR}.alpha": torch.tensor(1.0)}, "one of two factors is missing"),
        ({f"unet.{LINEAR}.lora_A.weight": A, f"{LINEAR}.lora_A.weight": A.clone()}, "has two changes"),
        ({f"{LINEAR}.lora_A.weight": A, f"{LINEAR}.lora_B.weight": B.T.contiguous()}, r"\(2, 6\) and \(2, 8\) do not"),
        ({f"{LINEAR}.lora_A.weight": A[:, :4].contiguous(), f"{LINEAR}.lora_B.weight": B}, r"its weight \(8, 6\)"),
        ({f"{LINEAR}.lora_A.weight": A[0].clone(), f"{LINEAR}.lora_B.weight": B}, "do not fit its weight"),
        ({f"{LINEAR}.lora_A.weight": A[:0].clone(), f"{LINEAR}.lora_B.weight": B[:, :0].clone()}, "do not fit its"),
        ({f"{LINEAR}.lora_A.weight": A * float("nan"), f"{LINEAR}.lora_B.weight": B}, "not finite"),
    ],
)
def test_what_does_not_fit_is_one_error(state, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        fold_lora(state, tmp_path / "l.safetensors")
    assert str(raised.value).startswith(str(tmp_path / "l.safetensors")) and "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_factors_of_another_type(state, tmp_path, dtype):
    tensors = {f"{LINEAR}.lora_A.weight": A.to(dtype), f"{LINEAR}.lora_B.weight": B}
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=rf"another type: {LINEAR}\.lora_A\.weight {dtype}; save the LoRA in"):
        fold_lora(state, tmp_path / "l.safetensors")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_an_alpha_of_another_type(state, factors, tmp_path, dtype):
    path = file_of(tmp_path / "l.safetensors", factors, extra={"unet.conv_in.alpha": torch.tensor(1.0).to(dtype)})
    with pytest.raises(CheckpointError, match=rf"another type: unet\.conv_in\.alpha {dtype}"):
        fold_lora(state, path)


def test_an_alpha_may_be_a_whole_number(state, factors, tmp_path):
    path = file_of(tmp_path / "l.safetensors", factors, "kohya", extra={"lora_unet_conv_in.alpha": torch.tensor(6)})
    scales = {LINEAR: SCALE, OUT: SCALE, CONV: SCALE * 6 / RANK}
    for layer, scale in scales.items():
        expected = by_hand(state, {layer: factors[layer]}, scale)[f"{layer}.weight"]
        torch.testing.assert_close(fold_lora(state, path, SCALE)[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("alpha", "scale"), [(1e38, 1000.0), (1.0, 1e38)])
def test_a_change_beyond_float32(state, factors, tmp_path, alpha, scale):
    path = file_of(tmp_path / "l.safetensors", factors, alpha=alpha)
    path = path if alpha > 1 else file_of(path, {k: (d * 1e20, u) for k, (d, u) in factors.items()})
    with pytest.raises(CheckpointError, match=r"l\.safetensors: .* is beyond float32; take a smaller scale"):
        fold_lora(state, path, scale)


def test_a_pattern_without_end(state, factors, tmp_path):
    for pattern in ("(.+)+(.+)+zzz", "(a|b)*", ".*.*.*.*q", ".?" * 30 + "zzz"):
        metadata = {METADATA: json.dumps({"unet.alpha_pattern": {pattern: 1}})}
        with pytest.raises(CheckpointError, match=r"alpha_pattern '.*': a pattern that may be searched"):
            fold_lora(state, file_of(tmp_path / "l.safetensors", factors, metadata=metadata))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1" + "0" * 400])
def test_an_alpha_that_is_not_finite(state, factors, tmp_path, alpha):
    path = file_of(tmp_path / "l.safetensors", factors, metadata={METADATA: f'{{"unet.lora_alpha": {alpha}}}'})
    with pytest.raises(CheckpointError, match=f"damaged, its {METADATA} has an alpha that is no number"):
        fold_lora(state, path)


@pytest.mark.parametrize("text", ["no json", "[]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": {"(": 1}}'])
def test_damaged_metadata(state, factors, tmp_path, text):
    file_of(tmp_path / "l.safetensors", factors, metadata={METADATA: text})
    with pytest.raises(CheckpointError, match=f"damaged, its {METADATA}"):
        fold_lora(state, tmp_path / "l.safetensors")


def test_files_that_are_none(state, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        fold_lora(state, tmp_path / "none.safetensors")
    (tmp_path / "l.safetensors").write_bytes(b"PK\x03\x04pickle")
    with pytest.raises(CheckpointError, match="a pickle"):
        fold_lora(state, tmp_path / "l.safetensors")


def test_a_header_whose_length_looks_like_a_pickle(state, tmp_path):
    path = tmp_path / "l.safetensors"
    for length in (0x0280, 0x0480):
        save_file({"weight": A}, path, {"padding": "x" * (length - 120)})
        first = path.read_bytes()[:2]
        size = int.from_bytes(first, "little")
        save_file({"weight": A}, path, {"padding": "x" * (length - 120 + length - size)})
        assert path.read_bytes()[:2] == length.to_bytes(2, "little")
        with opened_weights(path) as file:
            assert torch.equal(file.get_tensor("weight"), A)

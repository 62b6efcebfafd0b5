from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmseg_fast.kernels.mask_bits import decode_mask_bits, encode_mask_bits, host, reference
from ldmseg_fast.kernels.mask_bits.op import decode_op, encode_op

SHAPES = [(1, 8, 8), (2, 63, 65), (1, 100, 31), (1, 1, 1023), (0, 4, 4)]
ID_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


def random_ids(shape, num_bits, dtype, device):
    return torch.randint(0, min(2**num_bits, 128), shape, device=device).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_encode_equals_reference(shape, channels_last, device, poison):
    for num_bits, dtype in product((1, 7, 8, 16), (torch.uint8, torch.int64)):
        ids = random_ids(shape, num_bits, dtype, device)
        actual = host.encode_mask_bits(ids, num_bits, None, torch.float16, channels_last)
        expected = reference.encode_mask_bits(ids, num_bits, None, torch.float16, channels_last)
        assert torch.equal(actual, expected)
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert actual.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("dtype", ID_DTYPES)
@pytest.mark.parametrize("table_dtype", [torch.uint8, torch.int64])
def test_encode_with_a_table(dtype, table_dtype, device, poison):
    ids = random_ids((2, 33, 31), 7, dtype, device)
    table = torch.randint(0, 128, (2, 128), device=device).to(table_dtype)
    for channels_last, out in product((False, True), (torch.float32, torch.float16)):
        actual = host.encode_mask_bits(ids, 7, table, out, channels_last)
        assert torch.equal(actual, reference.encode_mask_bits(ids, 7, table, out, channels_last))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_encode_with_categories(shape, channels_last, device, poison):
    """One pass over both maps gives the ids' planes and, after them, the categories'."""
    table = torch.randint(0, 128, (shape[0], 128), device=device)
    for num_bits, category_bits, dtype in ((7, 5, torch.uint8), (5, 12, torch.int16), (1, 1, torch.uint8)):
        ids = random_ids(shape, num_bits, torch.uint8, device)
        categories = torch.randint(0, 2**category_bits, shape, device=device).to(dtype)
        actual = host.encode_mask_bits(ids, num_bits, table, torch.float16, channels_last, categories, category_bits)
        expected = reference.encode_mask_bits(
            ids, num_bits, table, torch.float16, channels_last, categories, category_bits
        )
        assert torch.equal(actual, expected)
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert actual.is_contiguous(memory_format=wanted)
        alone = host.encode_mask_bits(categories, category_bits, None, torch.float16, channels_last)
        assert torch.equal(actual[:, num_bits:], alone)
        assert torch.equal((actual[:, num_bits:] == 0).all(1), categories == 0)


def test_strided_ids(device, poison):
    ids = random_ids((2, 20, 40), 7, torch.int32, device)[:, ::2, 1::3]
    assert torch.equal(
        host.encode_mask_bits(ids, 7, None, torch.float32, False),
        reference.encode_mask_bits(ids, 7, None, torch.float32, False),
    )


@pytest.mark.parametrize(
    "shape", [(1, 7, 8, 8), (2, 16, 63, 9), (1, 1, 33, 31), (3, 5, 1, 1023), (0, 7, 4, 4)], ids=str
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_decode_equals_reference(shape, memory_format, device, poison):
    for dtype in (torch.float32, torch.float16):
        bits = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
        assert torch.equal(host.decode_mask_bits(bits), reference.decode_mask_bits(bits))


def test_decode_of_a_slice(device, poison):
    bits = torch.randn(2, 9, 12, 14, device=device)[:, 1:8, 2:, ::2]
    assert torch.equal(host.decode_mask_bits(bits), reference.decode_mask_bits(bits))


def test_golden_values(shared):
    safetensors = pytest.importorskip("safetensors.torch")
    golden = safetensors.load_file(shared / "golden" / "reference.safetensors")
    assert torch.equal(encode_mask_bits(golden["segment_ids"]), golden["bits_minus1_1"])
    assert torch.equal(decode_mask_bits(golden["bits_minus1_1"]), golden["bits_decoded"].int())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ids_survive_remap_and_round_trip(data):
    """Void stays void, every other id becomes its table entry, whatever the ids, the table and K."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_bits = data.draw(st.integers(1, 16), label="num_bits")
    size = data.draw(st.integers(1, 300), label="table entries")
    entries = data.draw(st.lists(st.integers(0, 2**num_bits - 1), min_size=size, max_size=size), label="table")
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40), label="ids")
    table = torch.tensor([[0, *entries[1:]]], device=device)
    segment_ids = torch.tensor(ids, device=device)[None, None]
    expected = table[0, segment_ids]
    bits = host.encode_mask_bits(segment_ids, num_bits, table, torch.float16, False)
    assert torch.equal(host.decode_mask_bits(bits), expected.int())
    assert torch.equal((bits == 0).all(1), expected == 0)
    assert torch.equal(encode_mask_bits(segment_ids, num_bits, table, torch.float16), bits)


def test_ids_without_an_entry_are_void_unless_checked(device):
    ids = torch.tensor([[[1, 5, -1]]], device=device)
    table = torch.tensor([[0, 3]], device=device)
    bits = host.encode_mask_bits(ids, 7, table, torch.float32, False)
    assert host.decode_mask_bits(bits).tolist() == [[[3, 0, 0]]]


def test_op(device, check_op):
    ids = random_ids((2, 9, 7), 7, torch.uint8, device)
    table = torch.randint(0, 128, (2, 256), device=device)
    check_op(encode_op, (ids, 7, table, torch.float16, True, True))
    check_op(encode_op, (ids, 1 + 7, None, torch.float32, False, False))
    categories = random_ids((2, 9, 7), 5, torch.int16, device)
    check_op(encode_op, (ids, 7, table, torch.float16, True, True, categories, 5))
    check_op(decode_op, (torch.randn(2, 7, 5, 3, device=device),))


def test_bad_input(device, refuses):
    ids = torch.ones(2, 4, 4, dtype=torch.int32, device=device)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    f32 = torch.float32
    for name, args in {
        "segment_ids": (ids[0], 7, None, f32, False, True),
        "num_bits": (ids, 17, None, f32, False, True),
        "dtype": (ids, 7, None, torch.int32, False, True),
        "table": (ids, 7, table[:1], f32, False, True),
    }.items():
        refuses(name, encode_mask_bits, encode_op, args)
    refuses("segment_ids", encode_mask_bits, encode_op, (ids.float(), 7, None, f32, False, True))
    refuses("table", encode_mask_bits, encode_op, (ids, 7, table.float(), f32, False, True))
    for name, categories in {
        "category_bits": (None, 5),
        "category_ids": (ids[:, :2], 5),
    }.items():
        refuses(name, encode_mask_bits, encode_op, (ids, 7, None, f32, False, True, *categories))
    refuses("category_bits", encode_mask_bits, encode_op, (ids, 7, None, f32, False, True, ids, 17))
    refuses("category_ids", encode_mask_bits, encode_op, (ids, 7, None, f32, False, True, ids.float(), 5))
    values = {"op": encode_op, "fake": False}  # a fake tensor has no values to look at
    refuses("segment_ids", encode_mask_bits, args=(ids * 3, 7, table, f32, False, True), **values)
    refuses("segment_ids", encode_mask_bits, args=(-ids, 7, None, f32, False, True), **values)
    refuses("num_bits", encode_mask_bits, args=(ids * 128, 7, None, f32, False, True), **values)
    refuses("num_bits", encode_mask_bits, args=(ids, 7, table + 200, f32, False, True), **values)
    refuses("category_bits", encode_mask_bits, args=(ids, 7, None, f32, False, True, ids * 32, 5), **values)
    refuses("category_ids", encode_mask_bits, args=(ids, 7, None, f32, False, True, -ids, 5), **values)
    refuses("bits", decode_mask_bits, decode_op, (ids,))
    refuses("bits", decode_mask_bits, decode_op, (ids[None],))
    refuses("bits", decode_mask_bits, decode_op, (torch.zeros(1, 17, 2, 2, device=device),))

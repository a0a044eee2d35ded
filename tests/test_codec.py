"""Codecs: the stated bounds hold, what cannot be held is refused, and what arrives damaged is refused."""

import pytest
import torch
import zstandard

from halfpass.errors import InputError, RunError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import messages
from halfpass.wire.codec import CODECS, _pack, _unpack

BITS = {"int8": 8, "int4": 4, "int2": 2}
LOSSY = [name for name in CODECS if not CODECS[name].exact]
INTEGER = [name for name in CODECS if CODECS[name].per_channel]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(name, values):
    out = torch.empty_like(values)
    CODECS[name].decode(CODECS[name].encode(values), out)
    return out


def through_message(name, tensor, out=None):
    data = messages.write_tensor(tensor, name).SerializeToString()
    return messages.read_tensor(pb.Tensor.FromString(data), "here", out)


def ranges(values):
    channels = values.flatten(0, -2)
    return channels.amax(0) - channels.amin(0) if channels.numel() else 0.0


def bound(name, values):
    """Of each value, by the range of its channel: the last dimension."""
    codec = CODECS[name]
    spread = ranges(values)
    return codec.of_range * spread + codec.relative * values.abs() + codec.absolute


OUTLIER = normal(4096, 3, seed=5).relu()
OUTLIER[7] = 1e5
AWKWARD = {  # (R, C)
    "shifted mean": normal(1000, 4) + 100,
    "shifted far": normal(1000, 4) + 1e6,
    "relu": normal(1001, 5).relu(),
    "relu and others": torch.cat((normal(130, 3).relu(), normal(130, 2, seed=1) - 3, normal(130, 1).abs() + 1), 1),
    "few are not zero": (normal(5000, 2) - 3.3).relu(),
    "outlier": OUTLIER,
    "scales of their own": normal(257, 4).relu() * torch.tensor([1e-8, 1e-3, 1.0, 1e4]),
    "small": normal(1000, 1) * 1e-6,
    "tiny": normal(100, 3) * 1e-37,
    "subnormal": normal(100, 3) * 1e-40,
    "constant": torch.full((7, 3), -3.3),
    "one element": torch.tensor([[0.1]]),
    "one row": normal(1, 9),
    "two rows": normal(2, 3),
    "empty": torch.empty(0, 3),
    "no channels": torch.empty(3, 0),
    "zeros": torch.zeros(5, 2),
    "negative zeros": torch.tensor([[-0.0], [1.0], [0.0]]),
    "largest of fp16": torch.tensor([[65504.0], [-65504.0]]),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("case", AWKWARD)
def test_codecs_keep_their_bound(name, case):
    values = AWKWARD[case]
    if name.startswith("fp16") and case == "outlier":
        values = values.clamp(max=65504)
    if name.startswith("fp16") and case == "shifted far":
        values = values / 100
    found = decoded(name, values)
    assert ((found - values).abs() <= bound(name, values)).all()
    if values.numel():
        relu = values.amin(0) == 0
        assert (found[:, relu][values[:, relu] == 0] == 0).all()


@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith("fp16")])
def test_codecs_keep_their_bound_for_large_values(name):
    values = normal(100, 3).clamp(-2, 2) * 4e37
    assert ((decoded(name, values) - values).abs() <= bound(name, values)).all()


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
@pytest.mark.parametrize("seed", range(5))
def test_values_stay_within_their_channel_s_range_and_are_few(name, seed):
    values = torch.cat((normal(777, 3, seed=seed) ** 3, normal(777, 3, seed=seed).relu() + 5, normal(777, 1).relu()), 1)
    found = decoded(name, values)
    slack = 1e-6 * values.abs().amax(0)
    assert (found >= values.amin(0) - slack).all()
    assert (found <= values.amax(0) + slack).all()
    assert all(len(channel.unique()) <= 2 ** BITS[name] for channel in found.T)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_do_lose_and_are_smaller(name):
    values = AWKWARD["shifted mean"]
    assert not torch.equal(decoded(name, values), values)
    bits = BITS.get(name.removesuffix("+zstd"), 16)
    size = len(CODECS[name].encode(values))
    if name.endswith("+zstd"):
        assert size < 0.9 * 4 * values.numel()
    else:
        assert size == values.numel() * bits / 8 + (8 * values.shape[1] if name in BITS else 0)


@pytest.mark.parametrize("dtype", messages.DTYPES.values())
@pytest.mark.parametrize("name", ["none", "none+zstd"])
def test_none_is_exact_for_every_dtype(name, dtype):
    values = (normal(33, 2, seed=3) * 50).abs().to(dtype)
    assert torch.equal(decoded(name, values), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LOSSY)
def test_values_keep_their_dtype_and_are_rounded_to_it_besides(name, dtype):
    values = normal(500, 3).to(dtype)
    found = decoded(name, values)
    assert found.dtype == dtype
    rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2 * found.double().abs()
    assert ((found.double() - values.double()).abs() <= bound(name, values.double()) + rounding).all()


# ------------------------------------------------------------------------------------------------ mean squared error


def from_minimum_to_maximum(values, bits):
    """The plain way: levels spread over each channel's range, the nearest one is taken."""
    lo, step = values.amin(0), (values.amax(0) - values.amin(0)) / (2**bits - 1)
    return lo + ((values - lo) / step).round() * step


def relative_error(found, values):
    return (found - values).square().mean(0) / values.square().mean(0)


@pytest.mark.parametrize(("name", "values", "expected", "of_plain"), [
    ("int2", normal(20000, 4).relu() * torch.tensor([1e-3, 1.0, 20.0, 1e6]), 0.05, 0.4),
    ("int2", torch.cat((torch.zeros(1, 4), normal(20000, 4).abs())), 0.05, 0.4),
    ("int2", (normal(20000, 4) - 1).relu(), 0.06, 0.4),
    # Lloyd and Max: 0.1188 with four evenly spaced levels, 0.01154 with sixteen, of a normal distribution.
    ("int2", normal(20000, 4), 0.1188 * 1.03, 0.4),
    ("int4", normal(20000, 4).relu(), 0.004, 0.6),
    ("int4", normal(20000, 4), 0.01154 * 1.03, 0.7),
])  # fmt: skip
def test_few_levels_lie_where_the_values_are(name, values, expected, of_plain):
    """`expected`: relative, of each channel."""
    error = relative_error(decoded(name, values), values)
    assert (error < expected).all()
    assert (error < of_plain * relative_error(from_minimum_to_maximum(values, BITS[name]), values)).all()


def test_int2_does_not_lose_the_mean():
    values = normal(20000, 3) + torch.tensor([100.0, -5.0, 0.0])
    assert ((decoded("int2", values).mean(0) - values.mean(0)).abs() < 0.05).all()


@pytest.mark.parametrize(("name", "bits"), [("int2+zstd", 1.6), ("int4+zstd", 3.2)])
def test_activations_are_small_when_compressed(name, bits):
    values = normal(20000, 16).relu()
    assert 8 * len(CODECS[name].encode(values)) / values.numel() < bits


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
def test_packed_codes_come_back(bits, rows):
    codes = torch.randint(0, 2**bits, (rows, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    packed = _pack(codes, bits)
    assert len(packed) == -(-rows * bits // 8)
    assert torch.equal(_unpack(packed, bits)[:rows], codes)


# -------------------------------------------------------------------------------------------------- tensors


PICTURES = normal(3, 5, 4, 6).relu() * torch.tensor([1e-3, 1.0, 50.0, 1e3, 1e6])[:, None, None]  # (B, C, H, W)


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("tensor", [
    PICTURES, PICTURES.contiguous(memory_format=torch.channels_last), PICTURES[:, :, 1:, ::2], PICTURES.bfloat16(),
    PICTURES[:, :, :1, :1], PICTURES.expand(3, 5, 4, 6)[:0], normal(7, 3, 5).transpose(0, 2), normal(9), torch.tensor(2.5),
])  # fmt: skip
def test_dimension_1_of_pictures_and_the_last_of_others_are_channels(name, tensor):
    """By the scale of another channel, the small ones would be lost."""
    found = through_message(name, tensor)
    assert found.shape == tensor.shape
    assert found.dtype == tensor.dtype
    values, back = (t.movedim(1, -1) if t.ndim == 4 else t.reshape(-1, 1) if t.ndim < 2 else t for t in (tensor, found))
    rounding = 2.0**-8 * back.abs() if tensor.dtype == torch.bfloat16 else 0.0
    if tensor.numel():
        assert ((back - values).abs() <= bound(name, values) + rounding).all()


@pytest.mark.parametrize("name", CODECS)
def test_decoding_into_a_tensor_gives_the_same_and_allocates_none(name):
    values = PICTURES.clamp(max=100).contiguous(memory_format=torch.channels_last)
    expected = through_message(name, values)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for order in (torch.channels_last, torch.contiguous_format):  # of another order, too: the values are what counts
        out = torch.full(values.shape, 7.0).contiguous(memory_format=order)
        assert through_message(name, values, out) is out
        assert torch.equal(out, expected)
    with pytest.raises(InputError, match=r"here: expected shape \(3, 5, 4\), float32, found shape \(3, 5, 4, 6\), float32"):
        through_message(name, values, torch.empty(3, 5, 4))
    with pytest.raises(InputError, match=r"here: expected shape \(3, 5, 4, 6\), float64, found shape \(3, 5, 4, 6\), float32"):
        through_message(name, values, torch.empty(values.shape, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("name", "value", "found"), [
    ("fp16", float("nan"), "nan"), ("fp16", 7e4, "70000"), ("fp16", -7e4, "-70000"), ("bf16", float("inf"), "inf"),
    *((name, value, found) for name in BITS for value, found in (
        (float("nan"), "nan"), (float("-inf"), "-inf"), (float("inf"), "inf"), (1e38, "1e.38"),
    )),
])  # fmt: skip
def test_lossy_codecs_refuse_what_they_cannot_hold(name, value, found):
    for name_ in (name, f"{name}+zstd"):
        values = torch.ones(10, 3)
        values[4, 1] = value
        text = rf"codec {name}, value 13: expected finite values within ±.*, found {found}; .* or use codec none"
        with pytest.raises(RunError, match=text):
            CODECS[name_].encode(values)
        assert torch.equal(decoded(name_, torch.ones(10, 3)), torch.ones(10, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_infinity_of_other_dtypes_is_refused_too(dtype):
    values = torch.ones(10, 3, dtype=dtype)
    values[4, 1] = float("inf")
    for name in LOSSY:
        with pytest.raises(RunError, match="value 13: expected finite values"):
            CODECS[name].encode(values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_lossy_codecs_refuse_other_dtypes_on_both_sides(dtype):
    for name in LOSSY:
        with pytest.raises(InputError, match=f"codec .*: expected floating point values, found {dtype}; use codec none"):
            CODECS[name].encode(torch.ones(8, 1, dtype=dtype))
        message = messages.write_tensor(torch.ones(8, 1), name)
        message.dtype = str(dtype).removeprefix("torch.")
        with pytest.raises(InputError, match=r"here: expected the values of shape \(8, 1\)"):
            messages.read_tensor(message, "here")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data * 2,
    lambda data: b"garbage",
])  # fmt: skip
def test_damaged_bytes_are_refused_and_the_next_good_ones_are_read(name, damage):
    message = messages.write_tensor(PICTURES.clamp(max=100), name)
    good = message.data
    message.data = damage(good)
    with pytest.raises(InputError, match=r"here: expected the values of shape \(3, 5, 4, 6\), float32, found \d+ bytes; both"):
        messages.read_tensor(message, "here")
    message.data = good
    messages.read_tensor(message, "here")


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", [0, 1])
def test_scales_that_are_not_finite_are_refused(name, scale, place):
    """The last is finite and its highest level is not."""
    message = messages.write_tensor(torch.tensor([0.0, 1.0, 2.0]), name)
    scales = torch.frombuffer(bytearray(message.data[:8]), dtype=torch.float32)
    if scale == 3e38:
        scales[:] = scale
    scales[place] = scale
    message.data = scales.numpy().tobytes() + message.data[8:]
    with pytest.raises(InputError, match=r"here: expected the values of shape \(3,\), float32, found"):
        messages.read_tensor(message, "here")


@pytest.mark.parametrize("name", [name for name in CODECS if name.endswith("+zstd")])
def test_a_bomb_is_refused_before_it_goes_off(name):
    message = messages.write_tensor(torch.ones(4), name)
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    unstated = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**28))
    for data in (bomb, unstated, message.data + bomb):
        message.data = data
        with pytest.raises(InputError, match=r"expected the values of shape \(4,\), float32, found \d+ bytes"):
            messages.read_tensor(message, "here")

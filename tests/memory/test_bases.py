"""Quantised layers hold the numbers that the formats' descriptions give, and are the bytes that are promised."""

import copy
import math
import random

import pytest
import torch
from torch import nn

from mpp.lora.stack import load_base
from mpp.memory.bases import QUANTISED, check_base, dequantise, quantise
from mpp.memory.scaled import ScaledLinear

# The 16 numbers of NF4, from appendix E of Dettmers et al. 2023 (arXiv 2305.14314), as the paper prints them
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def e4m3():
    """All finite numbers of the format, from its description: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    found = set()
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):  # NaN
                value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
                found |= {value, -value}
    return sorted(found)


def linear(seed, dtype):
    """A layer of a drawn size and scale, with a row of zeros."""
    draw = random.Random(seed)
    out, into = draw.randint(2, 40), 64 * draw.randint(1, 3)
    made = nn.Linear(into, out, bias=draw.random() < 0.5).to(dtype).requires_grad_(False)
    values = torch.randn(out, into, generator=torch.Generator().manual_seed(seed)) * 10 ** draw.uniform(-3, 2)
    values[draw.randrange(out)] = 0
    made.weight.copy_(values)
    return made


def quantised(layer, base):
    holder = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    quantise(holder, ["layer"], base)
    return holder["layer"]


def nearest(value, numbers):
    """The distance of a value to the number next to it."""
    return min(abs(value - number) for number in numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["fp8", "int8"])
def test_each_weight_becomes_the_nearest_number_of_its_rows_scale(base, dtype):
    numbers, most = (e4m3(), 448) if base == "fp8" else (range(-127, 128), 127)
    for seed in range(4):
        layer = linear(seed, dtype)
        made = quantised(layer, base)
        for row, kept, scale in zip(
            layer.weight.double().tolist(), made.dequantize(torch.float64).tolist(), made.scale.tolist(), strict=True
        ):
            largest = max(map(abs, row))
            assert scale[0] == pytest.approx(largest / most if largest else 1, rel=torch.finfo(dtype).eps)
            for value, found in zip(row[:16], kept, strict=False):
                best = nearest(max(-most, min(most, value / scale[0])), numbers)
                assert abs(value / scale[0] - found / scale[0]) <= best + 1e-6 * most + max(
                    0, abs(value / scale[0]) - most
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_becomes_the_nearest_of_the_papers_sixteen_numbers_of_its_64(dtype):
    for seed in range(4):
        layer = linear(seed, dtype)
        kept = quantised(layer, "nf4").dequantize(torch.float32).flatten().tolist()
        flat = layer.weight.double().flatten().tolist()
        for start in range(0, len(flat), 64):
            block = flat[start : start + 64]
            most = max(map(abs, block)) or 1.0
            for value, found in zip(block, kept[start:], strict=False):
                assert nearest(found / most, NF4) < 1e-2 * (dtype == torch.bfloat16) + 1e-6
                assert abs(value - found) / most <= nearest(value / most, NF4) + 1e-2


@pytest.mark.parametrize("base", QUANTISED)
def test_the_layer_is_a_linear_layer_with_the_dequantised_weight(base):
    for seed in range(3):
        layer = quantised(linear(seed, torch.float32), base)
        inputs = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        outputs = layer(inputs)
        outputs.square().sum().backward()
        weight, bias = layer.dequantize().double(), 0 if layer.bias is None else layer.bias.double()
        wanted = inputs.detach().double() @ weight.T + bias
        torch.testing.assert_close(outputs.detach().double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        gradient = 2 * wanted @ weight
        torch.testing.assert_close(inputs.grad.double(), gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("base", QUANTISED)
def test_the_backward_pass_keeps_the_packed_weight_alone(base):
    layer, kept = quantised(linear(1, torch.float32), base), []
    inputs = torch.randn(2, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(inputs)
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr(), layer.scale.data_ptr()}


def test_a_scale_for_the_whole_weight_multiplies_in_float32_and_is_rounded_once():
    numbers = torch.randn(8, 16).to(torch.float8_e5m2)
    layer = ScaledLinear(numbers, torch.tensor(0.0123456789), None, torch.bfloat16)
    assert torch.equal(layer.dequantize(), (numbers.float() * 0.0123456789).bfloat16())


def stored(module):
    """Bytes of all storages that a module's parameters and buffers lie in."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("base", QUANTISED)
def test_a_quantised_layer_is_as_many_bytes_as_its_format_says(base):
    for seed in range(6):
        layer = linear(seed, torch.bfloat16)
        rows, columns = layer.weight.shape
        numbers = {
            "fp8": rows * columns + 2 * rows,
            "int8": rows * columns + 2 * rows,
            "nf4": rows * columns // 2 + 4 * math.ceil(rows * columns / 64),
        }
        assert stored(quantised(layer, base)) == numbers[base] + 2 * rows * (layer.bias is not None)


def test_moving_and_casting_a_model_leaves_its_numbers_alone(architecture):
    for base in QUANTISED:
        transformer = load_base(architecture, base)
        names = [name for name, _ in architecture.quantisable(transformer)]
        before = [dequantise(transformer.get_submodule(name)) for name in names]
        transformer.to(torch.bfloat16).to("cpu")
        copied = copy.deepcopy(transformer)
        for name, weight in zip(names, before, strict=True):
            packed = copied.get_submodule(name).weight
            assert packed.dtype == torch.int8
            torch.testing.assert_close(copied.get_submodule(name).dequantize(torch.float32), weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("base", ["fp4", "", "FP8", None])
def test_an_unknown_base_is_refused(base):
    with pytest.raises(ValueError, match=r"memory\.base must be one of bf16, fp8, int8, nf4"):
        check_base(base, "memory.base")


def test_nf4_without_its_package_is_refused_with_the_way(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"memory\.base=nf4 needs the package bitsandbytes; pip install 'mpp\[nf4\]'"):
        check_base("nf4", "memory.base")

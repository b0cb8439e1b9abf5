"""Text encoders of transformers in fewer bits, each weight quantised as soon as it is read, and layers that wait.

It is transformers' own loading, with its names of tensors and its exceptions of precision; the quantizer is added to it
as its documentation has them added.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpp.memory.bases import quantise
from mpp.memory.streaming import Streaming
from mpp.models.contract import repeated

_METHOD = "mpp"


def load_quantised(kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype, base: str) -> PreTrainedModel:
    """A text encoder on the CPU, never more of it unquantised than one weight and what stays so.

    Args:
        kind: Its class.
        folder: As transformers saves it.
        dtype: Of what is not quantised, and of computations.
        base: One of `mpp.memory.bases.QUANTISED`.
    """
    return kind.from_pretrained(folder, dtype=dtype, quantization_config=_Config(base))


def quantisable(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[str]:
    """Names of the linear layers that are quantised: those in repeated layers.

    Embeddings, norms and heads lie outside of these, and a vision tower's patches. What transformers keeps in float32
    stays as it is. (T5 casts what goes into its `wo` to that weight's dtype unless it is int8, as packed weights
    are.)

    Args:
        model: May be on the meta device.
        dtype: As `load_quantised`.
    """
    exact = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()  # noqa: SLF001
    if dtype == torch.float16:
        exact |= set(model._keep_in_fp32_modules or ())  # noqa: SLF001
    for prefix, layer in repeated(model):
        for name, module in layer.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear) and exact.isdisjoint(name.split(".")):
                yield name


def count_text_layers(folder: Path) -> int:
    """How many layers read the text, without weights; 0 of what is no model of transformers.

    Args:
        folder: Of a text encoder, with its configuration.
    """
    if "model_type" not in json.loads((folder / "config.json").read_bytes()):
        return 0
    return AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers


def stream_text_layers(model: PreTrainedModel, resident: int) -> Streaming:
    """Let repeated layers wait in the CPU's memory; a vision tower's make room for those that read the text.

    Args:
        model: On the CPU, its weights frozen.
        resident: As `memory.text_layers`; a list that has no more layers stays whole while it runs.
    """
    lists = groupby(repeated(model), key=lambda named: named[0].rpartition(".")[0])
    return Streaming([[layer for _, layer in group] for _, group in lists], resident)


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):
    def __init__(self, base: str) -> None:
        super().__init__(quant_method=_METHOD)
        self.base = base


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    """Says what is quantised, and does it."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:  # noqa: ANN401
        self.names = {f"{name}.weight" for name in quantisable(model, model.dtype)}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:  # noqa: ANN401
        del model
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self.quantization_config.base)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Quantise(ConversionOps):
    """Puts a quantised layer where the layer of a weight was."""

    def __init__(self, base: str) -> None:
        self.base = base

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **_: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(weight[0] if isinstance(weight, list) else weight, requires_grad=False)
        quantise(model, [name], self.base)
        missing_keys.discard(full_layer_name)
        for tensor in model.get_submodule(name).state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # noqa: SLF001 (or transformers would draw it anew)
        return {}

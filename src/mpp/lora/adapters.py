"""Adapters by PEFT: inject, switch off and restore, adapter-only state, LoRA files."""

import difflib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mpp.core import draws
from mpp.models.experts import parts_of

SCALED = ("lora_B.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a")  # the factor of each kind that may take its scale
ADAPTER = "default"  # PEFT's and diffusers' name for a model's only adapter
_LYCORIS = {"lokr": LoKrConfig, "loha": LoHaConfig}  # kinds that PEFT has from LyCORIS, whose settings are called alike


@dataclass(frozen=True)
class Adapter:
    """Which adapter is trained.

    Args:
        kind: `lora`; `rslora` (scale alpha / sqrt(rank), Kalajdzievski 2023, arXiv 2312.03732); `dora` (Liu et al.
            2024, arXiv 2402.09353); `lokr` (Kronecker product, Yeh et al. 2023, arXiv 2309.14859); `loha` (Hadamard
            product of two updates of that rank, Hyeon-Woo et al. 2021, arXiv 2108.06098).
        rank: Rank, >= 1.
        alpha: Scale numerator, > 0; the update is scaled by alpha / rank.
        targets: Module names, or one regex over full module names; None: the family's default.
        dropout: Dropout on the adapter's input, in [0, 1); of `lokr` and `loha` of a layer's whole update.
        init: A LoRA that the run starts from, of any program: a file, or the output folder of a run; None: a fresh one.
        rank_pattern: Ranks of modules that have another, >= 1, by a regex on the end of their names: `to_q`, or
            `blocks.0.*`. The first that fits holds, as in PEFT.
        alpha_pattern: Scale numerators of modules that have another, > 0, likewise.
        b_lr_ratio: The matrices B learn at so many times the learning rate, > 0: LoRA+ (Hayou et al. 2024, arXiv
            2402.12354), which finds ratios well above 1 efficient, such as 16. `lokr` and `loha` have no B.

    Raises:
        ValueError: A setting is out of its range.
    """

    kind: Literal["lora", "rslora", "dora", "lokr", "loha"] = "lora"
    rank: int = 16
    alpha: float = 16
    targets: str | Sequence[str] | None = None
    dropout: float = 0.0
    init: str | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    b_lr_ratio: float = 1

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.kind not in ("lora", "rslora", "dora", *_LYCORIS):
            raise ValueError(f"lora.kind must be lora, rslora, dora, lokr or loha, got {self.kind!r}")
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora.rank must be at least 1 and lora.alpha above 0, got {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")
        for name, pattern, value in self._patterns():
            if not (value >= 1 if name == "rank_pattern" else value > 0):
                least = "at least 1" if name == "rank_pattern" else "above 0"
                raise ValueError(f"lora.{name}: {pattern} must be {least}, got {value}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"lora.{name}: {pattern} is no regex ({error})") from error
        if not 0 < self.b_lr_ratio < math.inf:
            raise ValueError(f"lora.b_lr_ratio must be above 0 and finite, got {self.b_lr_ratio}")
        if self.b_lr_ratio != 1 and self.kind in _LYCORIS:
            raise ValueError(f"lora.b_lr_ratio={self.b_lr_ratio} is for the matrix B, and lora={self.kind} has none")

    @property
    def draws_layers(self) -> bool:
        """Whether each layer draws in each pass if it adds its update at all, which no compiler can follow."""
        return self.kind in _LYCORIS and self.dropout > 0

    def _patterns(self) -> Iterator[tuple[str, str, float]]:
        for name in ("rank_pattern", "alpha_pattern"):
            yield from ((name, pattern, value) for pattern, value in (getattr(self, name) or {}).items())

    def check_patterns(self, layers: Sequence[str]) -> None:
        """Refuse patterns that no module's rank or alpha comes from.

        Args:
            layers: Names of the modules that get the adapter.

        Raises:
            ValueError: As above; names the nearest.
        """
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = list(getattr(self, name) or {})
            unused = set(patterns) - {get_pattern_key(patterns, layer) for layer in layers}
            if unused:
                pattern = next(pattern for pattern in patterns if pattern in unused)
                ends = {".".join(layer.split(".")[-n:]) for layer in layers for n in range(1, layer.count(".") + 2)}
                near = difflib.get_close_matches(pattern, sorted(ends), 3) or sorted(ends, key=len)[:8]
                raise ValueError(
                    f"lora.{name}: {pattern} fits no module that gets an adapter, or an earlier pattern takes them all"
                    f"; nearest are {', '.join(near)}"
                )

    def config(self, default_targets: str | Sequence[str]) -> PeftConfig:
        """The PEFT configuration."""
        targets = self.targets or default_targets
        modules = targets if isinstance(targets, str) else list(targets)
        if self.kind in _LYCORIS:
            made = partial(_LYCORIS[self.kind], alpha=self.alpha, module_dropout=self.dropout)
        else:
            made = partial(
                LoraConfig,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                use_rslora=self.kind == "rslora",
                use_dora=self.kind == "dora",
            )
        return made(
            r=self.rank,
            target_modules=modules,
            rank_pattern=dict(self.rank_pattern or {}),
            alpha_pattern=dict(self.alpha_pattern or {}),
        )


def check_kind(kind: str, base: str, what: str) -> None:
    """Refuse a kind of adapter that PEFT makes from weights which a base has packed.

    Args:
        kind: As `Adapter.kind`.
        base: As `memory.base`.
        what: Is of that kind, for the error.

    Raises:
        ValueError: As above.
    """
    if base in ("nf4", "gguf") and kind in _LYCORIS:
        raise ValueError(
            f"memory.base={base} does not go with {what}, which PEFT shapes after a packed weight; take "
            "memory.base=fp8 or int8, or a plain LoRA"
        )


def inject(transformer: nn.Module, adapter: Adapter, default_targets: str | Sequence[str], *, seed: int) -> None:
    """Freeze the transformer and add a trainable float32 adapter.

    Each layer's tensors are drawn by PEFT's own law from (seed, the layer's name): they are the same whatever the
    base's precision and device, the order of its layers, and the other layers that have an adapter.

    Args:
        transformer: A single transformer, or experts, whose layers' names begin with theirs.
        adapter: What is added.
        default_targets: Where, if `adapter` does not say.
        seed: Of the draws; the global random state is left as it was.

    Raises:
        ValueError: `lora.targets` match no module, or modules that adapters cannot attach to; a pattern for ranks or
            alphas matches none of them.
    """
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        for expert, part in parts_of(transformer):
            _add_adapter(part, adapter, default_targets)
            adapter.check_patterns([name for name, layer in part.named_modules() if isinstance(layer, BaseTunerLayer)])
            for name, layer in part.named_modules(prefix=expert):
                if isinstance(layer, BaseTunerLayer):
                    _draw(layer, adapter.kind, draws.generator(seed, "adapter", name).initial_seed())
                    if adapter.kind in _LYCORIS and not adapter.draws_layers:
                        _never_draw(layer)


def _add_adapter(transformer: nn.Module, adapter: Adapter, default_targets: str | Sequence[str]) -> None:
    config = adapter.config(default_targets)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following .*_pattern keys")  # which is refused later
            transformer.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in transformer.named_modules() if _is_linear(m)})
        raise ValueError(
            f"lora.targets={config.target_modules} fit no trainable module of {type(transformer).__name__}: "
            f"{str(error).splitlines()[0][:200]}; its linear layers end in {', '.join(linear)}"
        ) from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def adapter_layers(transformer: nn.Module) -> Iterator[BaseTunerLayer]:
    """All adapter layers, found anew: looking into their factors too, as `modules` does, takes seven times as long."""
    left = [transformer]
    while left:
        module = left.pop()
        if isinstance(module, BaseTunerLayer):
            yield module
            left.append(module.base_layer)  # which may hold adapters of its own
        else:
            left.extend(module.children())


def _draw(layer: BaseTunerLayer, kind: str, seed: int) -> None:
    """Draw a layer's adapter in float32 on the CPU: PEFT draws in the base's precision, and on its device.

    That of a skeleton, on the meta device, has no numbers and stays there.
    """
    trainable = {parameter: parameter.device for parameter in layer.parameters() if parameter.requires_grad}
    for parameter, device in trainable.items():
        parameter.data = parameter.data.to(device if device.type == "meta" else "cpu", torch.float32)
    torch.default_generator.manual_seed(seed)  # of the CPU alone
    if kind in _LYCORIS:
        layer.reset_adapter_parameters(ADAPTER)
    else:
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
    for parameter, device in trainable.items():
        parameter.data = parameter.data.to(device)


def _never_draw(layer: BaseTunerLayer) -> None:
    """PEFT's LoKr and LoHa draw in train mode even where dropout is 0; nothing else in them depends on the mode."""
    layer.eval()
    layer.train = lambda mode=True: layer


def has_adapter(transformer: nn.Module) -> bool:
    """Whether the transformer carries an adapter that can be switched off."""
    return any(True for _ in adapter_layers(transformer))


@contextmanager
def adapters_off(transformer: nn.Module) -> Iterator[None]:
    """The base model: adapters are bypassed inside, and each layer's own previous state comes back on the way out.

    Sets PEFT's per-layer flag instead of calling `disable_adapters`, which flips `requires_grad` of every adapter
    and would make parameters trainable that were frozen on purpose. Train mode is not touched either. A test
    compares this with `disable_adapters`, since the flag is private to PEFT.
    """
    with layers_off(list(adapter_layers(transformer))):
        yield


@contextmanager
def layers_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """The same for some layers alone."""
    before = [(layer, layer.disable_adapters) for layer in layers]
    try:
        for layer, _ in before:
            _switch(layer, off=True)
        yield
    finally:
        for layer, off in before:
            _switch(layer, off=off)


def _switch(layer: BaseTunerLayer, *, off: bool) -> None:
    layer._disable_adapters = off  # noqa: SLF001 (tests/models/test_private.py says when it changes)


def adapter_state(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by their PEFT names, e.g. `blocks.0.attn1.to_q.lora_A.weight`; references, not copies.

    With experts each name begins with the expert's, e.g. `high.blocks...`.
    """
    return {
        f"{part}.{name}" if part else name: tensor
        for part, model in parts_of(transformer)
        for name, tensor in get_peft_model_state_dict(model, adapter_name=ADAPTER).items()
    }


def load_adapter_state(transformer: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load what `adapter_state` gave, in place.

    Raises:
        ValueError: Names or shapes differ from the transformer's adapter.
    """
    expected = adapter_state(transformer)
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape]
    if missing or extra or shapes:
        raise ValueError(
            f"{source} does not hold this run's adapter: {len(missing)} of {len(expected)} tensors missing"
            f"{_first(missing)}, {len(extra)} unknown{_first(extra)}, {len(shapes)} of another shape{_first(shapes)}; "
            "resume with the lora settings it was made with"
        )
    for part, model in parts_of(transformer):
        set_peft_model_state_dict(model, part_state(state, part), adapter_name=ADAPTER)


def part_state(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """One expert's share of what `adapter_state` gave, without its prefix; all of it for a lone transformer."""
    if not part:
        return dict(state)
    return {name.removeprefix(f"{part}."): v for name, v in state.items() if name.startswith(f"{part}.")}


def _first(names: Sequence[str]) -> str:
    return f" (first: {names[0]})" if names else ""

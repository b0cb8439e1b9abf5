"""A run that starts from a LoRA: its tensors become those of the fresh adapter."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mpp.lora.adapters import SCALED, Adapter, adapter_state, inject, part_state
from mpp.lora.files import LoraFile, Update, attach, updates
from mpp.lora.reading import find_loras
from mpp.models.contract import Architecture
from mpp.models.experts import parts_of
from mpp.wording import few

log = logging.getLogger("mpp")

_DOWN, _UP = "lora_A.weight", "lora_B.weight"
_INDEX = {"lora": "lora", "rslora": "lora", "dora": "dora", "lokr": "lokr", "loha": "hada"}


@dataclass(frozen=True)
class Start:
    """What a fresh adapter is filled with.

    Attributes:
        path: As it was asked for.
        updates: By transformer and module, with the scale that they have in the file.
    """

    path: Path
    updates: Mapping[str, Mapping[str, Update]]

    @classmethod
    def read(cls, adapter: Adapter, architecture: Architecture) -> "Start | None":
        """What `lora.init` names; None without it. Nothing is loaded but the file.

        Raises:
            ValueError: The file is none of this model, or its kind or modules are not those of the run.
        """
        if adapter.init is None:
            return None
        path = Path(adapter.init)
        skeleton = dict(parts_of(architecture.skeleton()))
        found = {}
        for part, lora in find_loras(path, architecture, skeleton).items():
            attach(skeleton[part], lora)
            found[part] = updates(skeleton[part], lora.tensors, magnitudes=True)
            _check_kind(lora, adapter)
        start = cls(path, found)
        fresh = architecture.skeleton()
        inject(fresh, adapter, architecture.lora_targets, seed=0)
        start.fill(fresh)
        return start

    def fill(self, transformer: nn.Module) -> None:
        """Fill the fresh adapter, and say what was not exact; on the meta device the fit is checked alone.

        Where the rank is lower than the file's, the update is cut by its singular values, the best there is of that
        rank (Eckart and Young 1936). Where it is higher, the rest of the adapter begins as a fresh one does: without
        effect.

        Raises:
            ValueError: The run has no adapter where the file has one, or factors of another shape.
        """
        errors, bare = {}, 0
        for part, model in parts_of(transformer):
            theirs = self.updates.get(part, {})
            mine = updates(model, part_state(adapter_state(transformer), part), magnitudes=True)
            unknown = sorted(theirs.keys() - mine.keys())
            if unknown:
                raise ValueError(
                    f"lora.init={self.path} has {', '.join(few(unknown, 3))}, for which this run has no adapter; set "
                    "lora.targets so that it has"
                )
            bare += len(mine.keys() - theirs.keys())
            for module, update in theirs.items():
                error = _fill(f"lora.init={self.path}: {module}", mine[module], update)
                if error:
                    errors[module] = error
        if next(transformer.parameters()).is_meta:
            return
        log.info("the adapter starts from %s", self.path)
        if bare:
            log.info("%d modules have no LoRA there and start as a fresh one does", bare)
        if errors:
            worst = max(errors, key=errors.__getitem__)
            whole = math.sqrt(sum(error**2 for error in errors.values()) / len(errors))
            log.warning(
                "its rank is cut: the updates change by %.2g of their size (root mean square over %d modules; %.2g in "
                "%s); set lora.rank to keep them",
                *(whole, len(errors), errors[worst], worst),
            )


def _check_kind(lora: LoraFile, adapter: Adapter) -> None:
    names = {name.rpartition(".")[2][:4] if "lora_" not in name else "lora" for name in lora.tensors}
    kind = "dora" if lora.is_dora else names.pop()
    if kind != _INDEX[adapter.kind]:
        called = {"hada": "loha"}.get(kind, kind)
        raise ValueError(f"lora.init={lora.path} is a {called}, this run trains a {adapter.kind}; choose lora={called}")


@torch.no_grad()
def _fill(where: str, mine: Update, theirs: Update) -> float:
    """Fill one module's factors in place; the relative error of the update, by the Frobenius norm."""
    ratio = theirs.scale / mine.scale
    new, error = dict(theirs.factors), 0.0
    if _DOWN in new and new[_DOWN].shape[0] != mine.factors[_DOWN].shape[0]:
        rank = mine.factors[_DOWN].shape[0]
        if set(new) != {_DOWN, _UP}:
            raise ValueError(f"{where} is a DoRA of rank {new[_DOWN].shape[0]}; set lora.rank={new[_DOWN].shape[0]}")
        if new[_DOWN].shape[0] > rank:
            new, error = _cut(new[_DOWN], new[_UP], rank)
        else:
            new = _widened(new, mine.factors)
    held = next(name for name in SCALED if name in new)
    new[held] = new[held] if ratio == 1 else new[held] * ratio
    if set(new) != set(mine.factors):
        raise ValueError(
            f"{where} holds {', '.join(sorted(new))}, this run's adapter {', '.join(sorted(mine.factors))}"
        )
    for name, tensor in new.items():
        if tensor.shape != mine.factors[name].shape:
            raise ValueError(
                f"{where}.{name} is {tuple(tensor.shape)}, this run's {tuple(mine.factors[name].shape)}; set lora.rank "
                "and the other lora settings to the file's"
            )
        if not mine.factors[name].is_meta:
            mine.factors[name].copy_(tensor)
    return error


def _widened(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's ranks first, then what a fresh adapter has, with zeros behind it."""
    down, up = mine[_DOWN].clone(), torch.zeros_like(mine[_UP])
    rank = theirs[_DOWN].shape[0]
    if not down.is_meta:
        down[:rank], up[:, :rank] = theirs[_DOWN], theirs[_UP]
    return {_DOWN: down, _UP: up}


def _cut(down: Tensor, up: Tensor, rank: int) -> tuple[dict[str, Tensor], float]:
    """The best factors of a lower rank, both of the same norm, and what they miss."""
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    turned, values, back = torch.linalg.svd(left.R @ right.R.T)
    root = values[:rank].sqrt()
    factors = {
        _UP: ((left.Q @ turned[:, :rank]) * root).to(up.dtype),
        _DOWN: (root[:, None] * (back[:rank] @ right.Q.T)).to(down.dtype),
    }
    whole = float(values.norm())
    return factors, float(values[rank:].norm()) / whole if whole else 0.0

"""Train the toy base model: `python -m benchmarks.phantom_limb.train_base --out DIR`.

Hours of one core or minutes of a GPU; the result is a diffusers folder in float16, the exponential average of the
weights. On a CPU with bfloat16 instructions the matrix products run in bfloat16 and the model is compiled, which is
three times as fast; the checkpoint needs neither.
"""

import argparse
import copy
import json
import math
import time
import types
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.phantom_limb.sampling import toy
from benchmarks.phantom_limb.world import render, training_scenes
from mpp.models.contract import Architecture, Prompt
from mpp.models.families.toy import Toy

UNIFORM = 0.1  # share of sigmas drawn uniformly, so that both ends are learned


def untrained(architecture: Toy) -> WanTransformer3DModel:
    """The base's transformer with random weights: 2.1 million parameters."""
    return WanTransformer3DModel(
        patch_size=tuple(architecture.latents.patch),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=architecture.latents.channels + 2,
        out_channels=architecture.latents.channels,
        text_dim=architecture.text_dim,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        rope_max_seq_len=32,
    )


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer in bfloat16, float32 in and out."""
    return functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()


class FusedAttention:
    """WAN's attention with one product for queries, keys and values; the same mathematics as diffusers' own."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention, or cross-attention where there are encoder states."""
        if encoder_hidden_states is None:
            layers = (attn.to_q, attn.to_k, attn.to_v)
            weight, bias = torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers])
            q, k, v = product(hidden_states, weight, bias).chunk(3, -1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            turn = torch.complex(rotary_emb[0][..., 0::2].float(), rotary_emb[1][..., 1::2].float())
            q, k = (
                torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k)
            )
        out = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def make_fast(transformer: WanTransformer3DModel) -> None:
    """Change how a transformer computes, in place; parameters and their names stay."""
    transformer.set_attn_processor(FusedAttention())
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and "time" not in name:
            layer.forward = types.MethodType(lambda self, x: product(x, self.weight, self.bias), layer)


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4),
    ]


def rate_at(step: int, steps: int, decay_from: float, warmup: int = 200) -> float:
    """Share of the peak rate: linear warm-up, constant, then linear to 0."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (steps * (1 - decay_from)))


class Batches:
    """Endless batches of the world, noise and sigmas from one generator."""

    def __init__(self, architecture: Toy, size: int, seed: int, device: str) -> None:
        self.architecture, self.size, self.device = architecture, size, device
        self.encoders = architecture.load_encoders(device)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, object]:
        """Latents, noise, sigma and conditioning."""
        scenes, captions = training_scenes(self.size, self.generator)
        latents = self.encoders.encode_pixels(render(scenes)[:, :, None] * 2 - 1)
        noise = torch.randn(latents.shape, generator=self.generator)
        u = torch.rand(self.size, 2, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        sigma = torch.where(u[:, 0] < UNIFORM, u[:, 1], self.architecture.sigma.quantile(u[:, 1], 36).float())
        conditioning = self.architecture.collate(self.encoders.encode_text([Prompt(caption) for caption in captions]))
        return latents.to(self.device), noise.to(self.device), sigma.to(self.device), conditioning.to(self.device)


def mean_error(architecture: Architecture, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, object]) -> Tensor:
    """Mean squared error of the velocity."""
    latents, noise, sigma, conditioning = batch
    s = sigma.view(-1, 1, 1, 1, 1)
    prediction = architecture.velocity(model, (1 - s) * latents + s * noise, sigma, conditioning)
    return (prediction - (noise - latents)).square().mean()


def save(model: nn.Module, architecture: Toy, folder: Path) -> None:
    """Write weights in float16 as a diffusers folder."""
    half = untrained(architecture)
    half.load_state_dict(model.state_dict())
    for parameter in half.parameters():
        parameter.data = parameter.data.half()
    half.save_pretrained(folder)


def resume(
    state: Path, model: nn.Module, average: nn.Module, batches: Batches, steppers: Sequence[torch.optim.Optimizer]
) -> tuple[int, list[dict[str, float]]]:
    """Load an interrupted training; returns its step and log."""
    saved = torch.load(state, weights_only=False)
    model.load_state_dict(saved["model"])
    average.load_state_dict(saved["average"])
    batches.generator.set_state(saved["generator"])
    for optimizer, values in zip(steppers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return saved["step"], saved["log"]


def train(args: argparse.Namespace) -> None:
    """Train, logging to `args.out`; an interrupted training goes on from `args.out/state.pt`."""
    torch.manual_seed(args.seed)
    architecture = toy()
    model = untrained(architecture).to(args.device)
    average = copy.deepcopy(model).requires_grad_(False)
    if args.device == "cpu":
        make_fast(model)
    batches = Batches(architecture, args.batch, args.seed, args.device)
    held_out = Batches(architecture, 256, 2**40, args.device)()
    steppers = optimizers(model, args.rate)
    state = args.out / "state.pt"
    start, log = resume(state, model, average, batches, steppers) if state.exists() else (0, [])
    compiled = torch.compile(model, dynamic=False)
    running, began = 0.0, time.time() - (log[-1]["seconds"] if log else 0)
    for step in range(start, args.steps):
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_at(step, args.steps, args.decay_from)
        loss = mean_error(architecture, compiled, batches())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running += loss.item()
        if not math.isfinite(running):
            raise SystemExit(f"the loss is not finite at step {step}")
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            with torch.no_grad():
                validation = mean_error(architecture, average, held_out).item()
            log.append(
                {"step": step + 1, "train": running / args.every, "validation": validation,
                 "seconds": round(time.time() - began)}
            )  # fmt: skip
            running = 0.0
            print(json.dumps(log[-1]), flush=True)
            (args.out / "training_log.json").write_text(json.dumps(log, indent=0))
            save(average, architecture, args.out)
            torch.save(
                {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1, "log": log,
                 "generator": batches.generator.get_state(), "optimizers": [o.state_dict() for o in steppers]},
                state,
            )  # fmt: skip


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--decay-from", type=float, default=0.4, help="share of the steps after which the rate falls")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between logs and checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "threads", "device")}
    (args.out / "training.json").write_text(json.dumps(settings, indent=1) + "\n")
    train(args)


if __name__ == "__main__":
    main()

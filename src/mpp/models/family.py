"""What all families on diffusers classes share: where weights lie, how they load, how samples are generated.

Not an architecture: a family's file says what is its own, this one how diffusers is used.
"""

import gc
import inspect
import json
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from mpp.files import weights_fingerprint
from mpp.memory.counting import Meter, bytes_of
from mpp.memory.link import check_link
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Architecture, Generation, Identity, Prompt, Ready
from mpp.models.filling import fill, folder_state, in_precision
from mpp.models.published import published_config
from mpp.models.single_file import SingleFile, stored
from mpp.models.text_encoders import count_text_layers, load_quantised, stream_text_layers
from mpp.models.text_limit import TextLimit
from mpp.models.weights import (
    SINGLE_FILES,
    announced,
    component_fingerprint,
    count_of,
    fingerprint_if_present,
    loading,
    resolve_folder,
)

DType = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_IMAGES = "image_encoder"  # among what makes embeddings, and no text encoder


@dataclass(kw_only=True, eq=False)
class Family(Architecture):
    """An architecture on diffusers' classes: loads, checks, fingerprints and generates.

    Args:
        pretrained: Diffusers folder, hub id, or (where `single_file` is set) one file of the transformer with the
            original's or diffusers' keys: `.safetensors`, in full precision or fp8, or `.gguf`.
        vae: Folder or hub id of the VAE; None: `pretrained`.
        text_encoder: Folder or hub id of text encoders, tokenizers and image encoders; None: `pretrained`.
        dtype: Of the frozen transformer; `float32`, `bfloat16` or `float16`. What diffusers keeps in float32 stays.
        vae_dtype: Of the VAE.
        text_dtype: Of the text encoders, and of the cached embeddings.

    Raises:
        ValueError: An unknown dtype.
    """

    vae: str | None = None
    text_encoder: str | None = None
    dtype: DType = "bfloat16"
    vae_dtype: DType = "float32"
    text_dtype: DType = "bfloat16"

    transformer_class: ClassVar[type[ModelMixin]]
    single_file: ClassVar[SingleFile | None] = None
    text_components = ("text_encoder",)  # folders whose weights make the cached embeddings
    cached_settings = ("text_length",)

    def __post_init__(self) -> None:
        """Refuse unknown dtypes; what is not set has its place with the transformer."""
        super().__post_init__()
        for name in ("dtype", "vae_dtype", "text_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"model.{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")
        self.vae = self.vae or self.pretrained
        self.text_encoder = self.text_encoder or self.pretrained

    # ---------------------------------------------------------------- for families to say

    def expected_config(self) -> dict[str, object]:
        """Entries that the transformer's configuration must have under this model config."""
        return {}

    @abstractmethod
    def pipeline(self, transformer: nn.Module, encoders: "FamilyEncoders") -> DiffusionPipeline:
        """Diffusers' pipeline around the transformer and the VAE, without text encoders."""

    @abstractmethod
    def arguments(
        self, positive: Conditioning, negative: Conditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """The pipeline's arguments besides sizes, steps, seed and output type."""

    # ---------------------------------------------------------------- weights

    def check(self) -> None:
        """Refuse a transformer that is not there, not loadable here, or of another shape; loads no weights.

        Raises:
            ValueError: Says which entry differs.
        """
        config = self.transformer_config()
        kind, wanted_kind = config.get("_class_name", ""), self.transformer_class.__name__
        if kind != wanted_kind:
            raise ValueError(
                f"model.pretrained={self.pretrained} holds a {kind}, this model config needs {wanted_kind}"
            )
        for name, wanted in self.expected_config().items():
            if config.get(name) != wanted:
                raise ValueError(
                    f"model.pretrained={self.pretrained} has {name}={config.get(name)}, this model config needs "
                    f"{wanted}; choose the model config that fits"
                )

    def transformer_config(self, *, published: bool = False) -> dict[str, Any]:
        """Configuration of the transformer, from its folder or read off a single file's header.

        Entries that the folder's file leaves out have the class's defaults.

        Args:
            published: Fetch nothing: of a hub id that is not on this machine take what is known of it.

        Raises:
            ValueError: There is none, or nothing is known.
        """
        file, name = self._file(), self.transformer_class.__name__
        if file is None:
            try:
                folder = resolve_folder(
                    self.pretrained, self.folders[""], "model.pretrained", files="*.json", fetch=not published
                )
                config = json.loads((folder / "config.json").read_bytes())
            except ValueError:
                if not published or Path(self.pretrained).expanduser().is_dir():
                    raise
                config = {"_class_name": name, **self.expected_config(), **published_config(self.pretrained)}
        else:
            config = self.single_file.describe(file, name)
        if config.get("_class_name") != name:
            return config
        known = inspect.signature(self.transformer_class.__init__).parameters.values()
        defaults = {p.name: p.default for p in known if p.default is not inspect.Parameter.empty}
        return json.loads(json.dumps({**defaults, **config}))  # tuples as lists, as in the file

    def identity(self, *, fetch: bool = False) -> Identity:
        """Fingerprints of transformer, VAE and text encoders."""
        file = self._file()
        transformer = (
            fingerprint_if_present(self.pretrained, self.folders[""], "model.pretrained", fetch=False)
            if file is None
            else weights_fingerprint(file)
        )
        parts = [
            component_fingerprint(self.text_encoder, name, "model.text_encoder", fetch=fetch)
            for name in self.text_components
        ]
        text = None if None in parts else "+".join(parts)
        return Identity(transformer, component_fingerprint(self.vae, "vae", "model.vae", fetch=fetch), text)

    def load_transformer(self, ready: Ready | None = None) -> nn.Module:
        """The frozen transformer in `dtype`."""
        return self.load_part(self.folders[""], ready)

    def load_part(self, subfolder: str, ready: Ready | None = None) -> nn.Module:
        """One frozen transformer in `dtype`; its blocks one after the other where somebody waits for them."""
        file, size = self._file(), count_of(sum(p.numel() for p in self.skeleton().parameters()))
        folder = resolve_folder(self.pretrained, subfolder, "model.pretrained") if file is None else None
        kind = self.dtype if file is None else stored(file) or self.dtype
        with announced(f"{subfolder} ({size}, {kind})"):
            if file is not None:
                transformer = self.single_file.load(
                    file, self.transformer_class, DTYPES[self.dtype], blocks=self.blocks, ready=ready
                )
            elif ready is None:
                transformer = self.transformer_class.from_pretrained(folder, torch_dtype=DTYPES[self.dtype])
            else:
                option, transformer = f"model.pretrained={self.pretrained}", self.skeleton()
                state = folder_state(folder, option)
                fill(transformer, state, DTYPES[self.dtype], option, blocks=self.blocks(transformer), ready=ready)
        return transformer.requires_grad_(False)

    def stored(self) -> Mapping[str, str]:
        """Of a single file in fp8 or GGUF `{"": "fp8"}` or `{"": "gguf"}`, read off its header."""
        file = self._file()
        kind = None if file is None else stored(file)
        return {} if kind is None else {"": kind}

    def skeleton(self, *, published: bool = False) -> nn.Module:
        """The transformer without weights, on the meta device, in the precisions that they are loaded in."""
        with init_empty_weights():
            transformer = self.transformer_class.from_config(self.transformer_config(published=published))
        return in_precision(transformer, DTYPES[self.dtype])

    def _file(self) -> Path | None:
        path = Path(self.pretrained).expanduser()
        if path.suffix not in SINGLE_FILES:
            return None
        if not path.is_file():
            raise ValueError(f"model.pretrained={self.pretrained} is not there")
        if self.single_file is None:
            raise ValueError(
                f"model.pretrained={self.pretrained}: diffusers cannot load a {self.transformer_class.__name__} from a "
                "single file; give a diffusers folder or a hub id"
            )
        return path

    # ---------------------------------------------------------------- samples

    def scheduler(self, default: SchedulerMixin | None = None) -> SchedulerMixin:
        """The pipeline's own scheduler where `pretrained` holds one that can be had, else `default`."""
        try:
            folder = resolve_folder(self.pretrained, "scheduler", "model.pretrained")
            name = json.loads((folder / "scheduler_config.json").read_bytes())["_class_name"]
        except (ValueError, OSError, KeyError):
            return default or FlowMatchEulerDiscreteScheduler()
        import diffusers  # noqa: PLC0415 (classes by name)

        return getattr(diffusers, name).from_pretrained(folder)

    @torch.no_grad()
    def generate(
        self,
        transformer: nn.Module,
        encoders: "FamilyEncoders",
        positive: Conditioning,
        negative: Conditioning | None,
        generation: Generation,
    ) -> Float[Tensor, "frames channels height width"]:
        """Generate with diffusers' own pipeline; pixels in [0, 1] on the CPU."""
        pipe = self.pipeline(transformer, encoders)
        pipe.set_progress_bar_config(disable=True)
        arguments = {
            "height": generation.height,
            "width": generation.width,
            "num_inference_steps": generation.steps,
            "generator": torch.Generator().manual_seed(generation.seed),
            "output_type": "pt",
            **self.arguments(positive, negative, generation),
        }
        output = pipe(**arguments)
        frames = output.frames if hasattr(output, "frames") else output.images
        return output_pixels(frames)


class FamilyEncoders:
    """VAE, text and image encoders, each loaded on first use and freed by `release`."""

    vae_class: ClassVar[type[ModelMixin]]

    def __init__(self, family: Family, device: torch.device | str, memory: EncoderMemory | None = None) -> None:
        self.model = family
        self.device = torch.device(device)
        self.memory = memory or EncoderMemory()
        self.text_device = torch.device("cpu") if self.memory.text_encoder == "cpu" else self.device
        check_link(self.memory.text_layers, self.text_device, "text_layers", "text_encoder")
        if self.memory.text_layers != "all":
            self._check_layers(self.memory.text_layers)
        self.seconds_loading = 0.0
        self._loaded: dict[str, Any] = {}

    @contextmanager
    def loading(self, what: str, dtype: torch.dtype, more: str = "") -> Iterator[None]:
        """Say what is loaded, count the time, and name the setting in errors.

        Args:
            what: `vae`, or the folder of a text encoder or of what belongs to it.
            dtype: What it is loaded in.
            more: What else is said of it.
        """
        setting = "vae" if what == "vae" else "text_encoder"
        name, kind = what.replace("vae", "VAE").replace("_", " "), str(dtype).removeprefix("torch.")
        start = time.monotonic()
        with loading(getattr(self.model, setting), f"model.{setting}"), announced(f"{name} ({kind}{more})"):
            yield
        self.seconds_loading += time.monotonic() - start

    def vae(self) -> ModelMixin:
        """The VAE in `vae_dtype`.

        Raises:
            ValueError: Not there, or of another latent shape than the model's.
        """
        if "vae" not in self._loaded:
            dtype = DTYPES[self.model.vae_dtype]
            with self.loading("vae", dtype):
                folder = resolve_folder(self.model.vae, "vae", "model.vae")
                vae = self.vae_class.from_pretrained(folder, torch_dtype=dtype)
                self.check_vae(vae)
                vae = self._fitted(vae.to(self.device))
            # Samples are generated under the run's autocast, which would decode a float32 VAE in bfloat16.
            vae.decode = torch.autocast(self.device.type, enabled=False)(vae.decode)
            self._loaded["vae"] = vae
        return self._loaded["vae"]

    def _fitted(self, vae: ModelMixin) -> ModelMixin:
        if self.memory.vae == "tiled":
            vae.enable_tiling()
            vae.enable_slicing()
        return vae.eval().requires_grad_(False)

    def decode_bytes(self, shape: Sequence[int]) -> int:
        """Weights, latents, and all that the VAE makes of them, at the peak."""
        folder = resolve_folder(self.model.vae, "vae", "model.vae", files="*.json", fetch=False)
        with torch.device("meta"):
            vae = self.vae_class.from_config(json.loads((folder / "config.json").read_bytes()))
            vae = self._fitted(nn.Module.to(vae, DTYPES[self.model.vae_dtype]))
        with torch.no_grad(), Meter() as meter:
            vae.decode(torch.empty(self.vae_shape(shape), device="meta", dtype=vae.dtype))
        return meter.peaks[""] + bytes_of([*vae.parameters(), *vae.buffers()])

    def vae_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what the VAE is given of one sample's latents `(c, f, h, w)`."""
        return (1, *shape)

    def check_vae(self, vae: ModelMixin) -> None:
        """Refuse a VAE of another latent shape: raise ValueError."""

    def encoder(
        self, kind: type[PreTrainedModel], subfolder: str = "text_encoder", dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """A text encoder in `text_dtype` as `memory` has it, or an image encoder, or in another dtype."""
        if subfolder not in self._loaded:
            dtype = dtype or DTYPES[self.model.text_dtype]
            text = subfolder in self.model.text_components and subfolder != _IMAGES
            resident = self.memory.text_layers if text else "all"
            base = self.memory.text_weights if text else "bf16"
            with self.loading(subfolder, dtype, "" if base == "bf16" else f" in {base}"):
                folder = resolve_folder(self.model.text_encoder, subfolder, "model.text_encoder")
                model = load_quantised(kind, folder, dtype, base) if base != "bf16" else None
                model = (model or kind.from_pretrained(folder, dtype=dtype)).eval().requires_grad_(False)
                if resident != "all":
                    stream_text_layers(model, resident)
                self._loaded[subfolder] = model.to(self.text_device if text else self.device)
        return self._loaded[subfolder]

    def _check_layers(self, resident: int) -> None:
        """Refuse more layers than any text encoder has, without weights: raise ValueError."""
        count, where = 0, (self.model.text_encoder, "model.text_encoder")
        for name in (name for name in self.model.text_components if name != _IMAGES):
            folder = resolve_folder(where[0], name, where[1], files="*.json")
            with loading(*where):
                count = max(count, count_text_layers(folder))
        if resident > count:
            raise ValueError(
                f"memory.text_layers={resident}: the text encoder has {count} layers that could wait in the CPU's "
                f"memory; set a number from 2 to {count}, or all"
            )

    def tokenizer(self, subfolder: str = "tokenizer", kind: Any = AutoTokenizer) -> Any:  # noqa: ANN401
        """A tokenizer (or a processor, by its class)."""
        if subfolder not in self._loaded:
            with loading(self.model.text_encoder, "model.text_encoder"):
                folder = resolve_folder(self.model.text_encoder, subfolder, "model.text_encoder")
                self._loaded[subfolder] = kind.from_pretrained(folder)
        return self._loaded[subfolder]

    def text_limit(self) -> TextLimit | None:
        """How much of a caption the main text encoder reads; None: any length."""
        return TextLimit(self.tokenizer(), self.model.text_length)

    def unread(self, captions: Sequence[str]) -> list[str]:
        """Of each caption the words beyond the length that the main text encoder reads."""
        limit = self.text_limit()
        return ["" if limit is None else limit.unread(caption) for caption in captions]

    def encode_images(
        self, pixels: Float[Tensor, "1 channels frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """Nothing: this family sees no images."""
        del pixels, controls
        return {}

    def release(self) -> None:
        """Free everything."""
        if not self._loaded:
            return
        self._loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def captions_of(prompts: Sequence[Prompt]) -> list[str]:
    """The texts alone, for encoders that see no images."""
    return [prompt.text for prompt in prompts]


def exact_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Of an input that must not be rounded: float32 where autocast takes it, else the dtype of the weights."""
    kind = device.type
    return torch.float32 if kind != "meta" and torch.is_autocast_enabled(kind) else weights


def output_pixels(frames: Any) -> Float[Tensor, "frames channels height width"]:  # noqa: ANN401
    """The first sample of a pipeline's output as `(frames, channels, height, width)` in [0, 1] on the CPU."""
    if isinstance(frames, Tensor) or (isinstance(frames, list) and isinstance(frames[0], Tensor)):
        first = frames[0] if not (isinstance(frames, Tensor) and frames.ndim == 4) else frames
    else:
        first = torch.from_numpy(np.asarray(frames[0]))
    first = first.float().cpu().clamp(0, 1)
    return first[None] if first.ndim == 3 else first

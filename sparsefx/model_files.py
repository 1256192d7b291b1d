"""Models as the shell command finds them: a Hugging Face folder, or a bare .safetensors file."""

import importlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsefx import checkpoint
from sparsefx.attributes import set_tensor
from sparsefx.checkpoint.layout import KEY, WEIGHTS_FILE, BadLayout, layout_from_json
from sparsefx.errors import CorruptCheckpoint, MissingPackage, SparseFXError, UnreadableModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "config.json"
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# A bare file does not say which matrices are looked up by row; in common models these names do.
_TABLES = ("embed", "wte", "wpe", "shared")


class WeightFile(nn.Module):
    """The tensors of a .safetensors file, its matrices as layers.

    Each 2-D floating-point "<layer>.weight" becomes an nn.Linear read as [out, in], except lookup
    tables, which become an nn.Embedding and are never pruned by a glob; other tensors stay tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            layer, _, leaf = name.rpartition(".")
            if layer and leaf == "weight" and tensor.dim() == 2 and tensor.is_floating_point():
                _add_layer(self, layer, tensor)
        for name, tensor in tensors.items():
            set_tensor(self, name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Runs every linear on its own; `inputs`: str(in_features) -> x [rows, in_features]."""
        return [layer(inputs[str(layer.in_features)]) for layer in self.linears()]

    def linears(self) -> list[nn.Linear]:
        """Every matrix that is not a lookup table."""
        return [module for module in self.modules() if isinstance(module, nn.Linear)]


def load_model(path: Path, dtype: str = "auto") -> nn.Module:
    """The model at `path`, in eval mode, on the CPU; a bare file gives a WeightFile.

    dtype: a key of DTYPES, or "auto" for that of the file. Nothing is downloaded or unpickled, and
    no code of the folder is run. Raises UnreadableModel, MissingPackage.
    """
    if path.is_dir():
        model: nn.Module = _load_folder(path, dtype)
        return model.eval()
    tensors = load_tensors(path)
    if dtype != "auto":
        tensors = {
            name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    return _weight_file(path, tensors).eval()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, by name. Raises UnreadableModel."""
    if not path.is_file():
        remedy = "Give a Hugging Face folder (with config.json) or a .safetensors file"
        raise UnreadableModel(path=path, rule="there is no such file or folder", remedy=remedy)
    try:
        layout = _layout_text(path)
        return load_file(path) if layout is None else _unpacked(path, layout)
    except SafetensorError as error:
        remedy = "Convert the weights to .safetensors; pickled files (.bin, .pt) are not read"
        rule = f"it is not a safetensors file ({error})"
        raise UnreadableModel(path=path, rule=rule, remedy=remedy) from error


def sample_inputs(model: nn.Module, rows: int, batch: int = 1) -> dict[str, object]:
    """Random arguments for one call, the same each time: `batch` sequences of `rows` tokens.

    A vision model gets `batch` images, a WeightFile `rows` rows for each width. Raises
    UnreadableModel for a model whose inputs are neither.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, WeightFile):
        widths = {layer.in_features: layer.weight.dtype for layer in model.linears()}
        samples = {
            str(width): torch.randn(rows, width, generator=generator).to(dtype)
            for width, dtype in widths.items()
        }
        return {"inputs": samples}
    known = pretrained(model)
    main, config = known.main_input_name, known.config
    if main == "input_ids":
        length = min(rows, getattr(config, "max_position_embeddings", rows))  # not in every config
        count = known.get_input_embeddings().num_embeddings
        ids = torch.randint(count, (batch, length), generator=generator)
        decoder = {"decoder_input_ids": ids.clone()} if config.is_encoder_decoder else {}
        return {"input_ids": ids, **decoder}
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.rand(batch, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    raise UnreadableModel(
        path=type(model).__name__,
        rule=f"no sample of its input {main!r} can be made up",
        remedy="Pass the arguments of one call by name: --input FILE.safetensors",
    )


def pretrained(model: nn.Module) -> "PreTrainedModel":
    """`model`, which came from a Hugging Face folder, as the class that has a configuration.

    What a configuration holds depends on the model, so it has no useful static type.
    """
    return cast("PreTrainedModel", model)


def _unpacked(path: Path, layout_text: str) -> dict[str, Tensor]:
    """The dense tensors of the sparse checkpoint that `sparsefx.save` wrote."""
    try:
        layout = layout_from_json(layout_text)
    except BadLayout as error:
        raise CorruptCheckpoint(path=path, rule=str(error)) from error
    # Every layout stores at least one bit for each element, so more elements cannot be there.
    if sum(prod(entry.shape) for entry in layout.entries.values()) > 8 * path.stat().st_size:
        raise CorruptCheckpoint(path=path, rule="its layout is larger than the file can hold")
    if path.name != WEIGHTS_FILE or layout.masks_only:
        rule = "it is a sparse checkpoint under another name, or of masks alone"
        remedy = f"Give the {WEIGHTS_FILE} that sparsefx.save wrote"
        raise UnreadableModel(path=path, rule=rule, remedy=remedy)
    tensors = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in layout.entries.items()}
    tensors |= {alias: tensors[name] for alias, name in layout.aliases.items()}
    checkpoint.load(path.parent, _weight_file(path, tensors))
    return tensors


def _weight_file(path: Path, tensors: Mapping[str, Tensor]) -> WeightFile:
    try:
        return WeightFile(tensors)
    except (KeyError, AttributeError) as error:
        rule = f"its tensor names are not those of a model's weights ({error})"
        raise UnreadableModel(path=path, rule=rule, remedy="Rename the tensors") from error


def _load_folder(folder: Path, dtype: str) -> "PreTrainedModel":
    """A folder that save_pretrained or `sparsefx sparsify` wrote, or one with a single .gguf."""
    try:
        return _from_pretrained(folder, dtype)
    # What transformers raises for a folder that it cannot read; none of these is a bug of ours.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SparseFXError):
            raise
        rule = f"transformers says: {' '.join(str(error).split())}"
        remedy = "See that it holds config.json and the weights as .safetensors"
        raise UnreadableModel(path=folder, rule=rule, remedy=remedy) from error


def _from_pretrained(folder: Path, dtype: str) -> "PreTrainedModel":
    transformers = _transformers(folder)
    options: dict[str, object] = {"dtype": DTYPES.get(dtype, "auto"), "local_files_only": True}
    gguf = sorted(folder.glob("*.gguf"))
    if not (folder / CONFIG_FILE).is_file():
        if len(gguf) != 1:
            remedy = "Give a folder that save_pretrained wrote, or a .safetensors file"
            raise UnreadableModel(path=folder, rule=f"it holds no {CONFIG_FILE}", remedy=remedy)
        family = transformers.AutoModelForCausalLM
        model: PreTrainedModel = family.from_pretrained(folder, gguf_file=gguf[0].name, **options)
        return model
    family = getattr(transformers, _architecture(folder), transformers.AutoModel)
    weights = folder / WEIGHTS_FILE
    if weights.is_file() and _layout_text(weights) is not None:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = checkpoint.load(folder, family._from_config(config, dtype=config.dtype))
        return model if dtype == "auto" else model.to(DTYPES[dtype])
    model = family.from_pretrained(folder, use_safetensors=True, **options)
    return model


def _transformers(folder: Path) -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackage(
            feature=f"reading the folder {folder}",
            package="transformers",
            remedy="pip install 'sparsefx[huggingface]'",
        ) from error


def _layout_text(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(KEY)


def _architecture(folder: Path) -> str:
    """The model class that config.json names, "AutoModel" where it names none."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        names = config.get("architectures") or ["AutoModel"]
        return str(names[0])
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        remedy = "Take the config.json that save_pretrained wrote"
        rule = f"config.json is no JSON description of a model ({error})"
        raise UnreadableModel(path=folder, rule=rule, remedy=remedy) from error


def _add_layer(root: nn.Module, path: str, weight: Tensor) -> None:
    out, width = weight.shape
    *parents, leaf = path.split(".")
    owner = root
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if any(word in path for word in _TABLES):
        owner.add_module(leaf, nn.Embedding(out, width, device="meta"))
    else:
        owner.add_module(leaf, nn.Linear(width, out, bias=False, device="meta"))

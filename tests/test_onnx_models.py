"""export() of small random Hugging Face models: dense and packed, dynamic sizes, both forms."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

from sparsefx.codegen.onnx.export import export
from sparsefx.graph import capture
from sparsefx.spec import NM, Unstructured
from tests.onnx_graphs import pack

transformers = pytest.importorskip("transformers")

AUTO = Dim.AUTO
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@dataclass(frozen=True)
class Case:
    """A model, its example inputs and its dynamic sizes; `packed`: how many linears it packs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    dynamic: dict[str, dict[int, object]] = field(default_factory=dict)
    packed: int = 0


def ids() -> torch.Tensor:
    return torch.randint(0, 99, (2, 7), generator=torch.Generator().manual_seed(1))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"attention_mask": mask, "input_ids": ids()}


def pixels() -> dict[str, torch.Tensor]:
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": noise}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=99, num_key_value_heads=2, max_position_embeddings=64, use_cache=False, **SMALL
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=99, max_position_embeddings=64, **SMALL)
    return transformers.BertModel(config)


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SMALL))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5_encoder() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False
    )
    return transformers.T5EncoderModel(config)


SEQUENCE = {0: AUTO, 1: AUTO}
CASES = {
    "llama": Case(llama, lambda: {"input_ids": ids()}, {"input_ids": SEQUENCE}, 14),
    "bert": Case(bert, padded, {"attention_mask": SEQUENCE, "input_ids": SEQUENCE}, 13),
    "vit": Case(vit, pixels, {"pixel_values": {0: AUTO}}, 13),
    "gpt2": Case(gpt2, lambda: {"input_ids": ids()}, {"input_ids": SEQUENCE}, 8),
    "t5_encoder": Case(t5_encoder, lambda: {"input_ids": ids()}, {"input_ids": SEQUENCE}, 12),
}


def built(case: Case, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case.make().eval().to(dtype)


def prune(model: nn.Module) -> None:
    """Widths of 64 become 2:4, everything else 80 % sparse; embeddings and the head stay dense."""
    for name, weight in model.named_parameters():
        if is_block_matrix(name, weight):
            pattern = NM(2, 4) if 64 in weight.shape else Unstructured(0.8)
            stored = weight.data.T if is_transposed(name) else weight.data
            stored *= pattern.keep(stored.abs().float())


def is_block_matrix(name: str, weight: torch.Tensor) -> bool:
    outside = ("embed", "lm_head", "wte", "wpe", "shared", "relative_attention")
    return weight.dim() == 2 and not any(word in name for word in outside)


def is_transposed(name: str) -> bool:
    return ".c_" in name  # GPT-2's Conv1D stores [in, out]


def layout(name: str, weight: torch.Tensor) -> tuple[int, int] | str | None:
    if not is_block_matrix(name, weight):
        return None
    return (2, 4) if 64 in weight.shape else "bitmap"


@pytest.mark.parametrize("name", CASES)
def test_dense(name, tmp_path):
    case = CASES[name]
    model, inputs = built(case, torch.float32), case.inputs()
    gm = capture(model, (), inputs, case.dynamic)
    facts = export(
        gm, (), inputs, tmp_path / "m.onnx", reference=model, dynamic_shapes=case.dynamic, opset=24
    )
    check_facts(facts.shapes, facts.max_abs_error, 1e-4)
    check_names(facts.path, model)


@pytest.mark.parametrize("form", ["standard", "functions"])
@pytest.mark.parametrize("name", CASES)
def test_packed(name, form, tmp_path):
    case = CASES[name]
    model, inputs = built(case, torch.float32), case.inputs()
    prune(model)
    gm = capture(model, (), inputs, case.dynamic)
    assert pack(gm, layout) == case.packed
    facts = export(
        gm, (), inputs, tmp_path / "m.onnx", reference=model, dynamic_shapes=case.dynamic, form=form
    )
    check_facts(facts.shapes, facts.max_abs_error, 1e-4)
    check_names(facts.path, model)
    assert len(facts.weights) == case.packed
    stored = sum(weight.stored_bytes for weight in facts.weights)
    assert stored < 0.55 * sum(weight.dense_bytes for weight in facts.weights)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_packed_half(name, tmp_path):
    case = CASES[name]
    model, inputs = built(case, torch.float16), case.inputs()
    prune(model)
    gm = capture(model, (), inputs, case.dynamic)
    assert pack(gm, layout) == case.packed
    path = tmp_path / "m.onnx"
    facts = export(gm, (), inputs, path, reference=model, dynamic_shapes=case.dynamic)
    check_facts(facts.shapes, facts.max_abs_error, 5e-2)


def check_facts(shapes: tuple[dict, ...], error: float | None, bound: float) -> None:
    assert error is not None
    assert 0 < error < bound
    assert len(shapes) == 3
    assert len({tuple(shape.values()) for shape in shapes}) == 3
    assert all(len({size[0] for size in shape.values()}) == 1 for shape in shapes)  # one batch


def check_names(path: Path, model: nn.Module) -> None:
    """Each matrix of the model is in the file under one of its names, whole or in parts."""
    names = {tensor.name for tensor in onnx.load(path).graph.initializer}
    spelled: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.dim() > 1:
            spelled.setdefault(id(weight), set()).add(name)
    for aliases in spelled.values():
        assert any(alias in names or f"{alias}.values" in names for alias in aliases), aliases

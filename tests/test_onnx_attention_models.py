"""A small Hugging Face Llama with thresholds on its attentions, through export()."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds, ThetaThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.codegen.onnx.export import export
from sparsefx.graph import capture
from sparsefx.passes.threshold_softmax import ThresholdSoftmax
from sparsefx.pipeline import PassContext, run

transformers = pytest.importorskip("transformers")

LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")
DYNAMIC = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
OPERATORS = {"skip": "SkipSoftmaxAttention", "theta": "ThetaAttention"}
THRESHOLDS: dict[str, AttentionThresholds] = {
    "skip": SkipThresholds((10.0,) * 4, (2.5,) * 4, (16, 16), "sink_diagonal"),
    "theta": ThetaThresholds(8, (16, 64), ((1.0, 2.0),) * 4, (), "pre", "exp_threshold", True),
}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """Biases on q and k, and slow rotations, make scores that decay with distance."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.fill_(1.3)
            layer.self_attn.k_proj.bias.fill_(1.3)
            layer.self_attn.v_proj.weight.mul_(20)
    return model


def ids(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {"input_ids": torch.randint(0, 99, (batch, length), generator=generator)}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)["logits"]


@pytest.mark.parametrize(
    ("method", "form"), [("skip", "standard"), ("skip", "functions"), ("theta", "functions")]
)
def test_llama(llama, method, form, tmp_path):
    gm = capture(llama, (), ids(2, 40), DYNAMIC)
    thresholds = dict.fromkeys(LAYERS, THRESHOLDS[method])
    assert run(gm, [ThresholdSoftmax(Wanted(thresholds))], PassContext()) == {
        "threshold_softmax": 2
    }
    facts = export(
        gm, (), ids(2, 40), tmp_path / "m.onnx", reference=gm, dynamic_shapes=DYNAMIC, form=form
    )
    assert facts.max_abs_error < 1e-4
    assert len({shape["input_ids"] for shape in facts.shapes}) == 3
    assert [each.name for each in facts.attentions] == list(LAYERS)
    ours = [node.op_type for node in onnx.load(facts.path).graph.node if node.domain]
    assert ours == ([OPERATORS[method]] * 2 if form == "functions" else [])
    inputs = ids(3, 120)
    session = onnxruntime.InferenceSession(facts.path)
    (found, *_) = session.run(None, {"input_ids": inputs["input_ids"].numpy()})
    expected = logits(gm, inputs)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
    assert (logits(llama, inputs) - expected).abs().max() > 1e-2

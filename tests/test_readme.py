"""The README's example runs as it is printed, on a folder called my-model."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from examples.real_models import smollm2
from sparsefx.annotations import attention_thresholds
from sparsefx.calibrate.attention.solve import SparsityOutOfReach

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_example_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, attention, pruning = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 11
    _, tokenizer = smollm2(layers=1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    names["batches"] = [torch.arange(512)[None] % 100]
    with torch.no_grad():
        exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("Sparse models are")
    assert "model.layers.0.mlp.up_proj" in printed
    with pytest.warns(SparsityOutOfReach):  # a random model attends everywhere
        exec(compile(attention, "README.md", "exec"), names)
    fast = names["fast"]
    assert isinstance(fast, transformers.LlamaForCausalLM)
    assert set(attention_thresholds(fast)) == {"model.layers.0.self_attn"}
    exec(compile(pruning, "README.md", "exec"), names)
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().out

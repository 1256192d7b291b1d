"""The examples' decoder says what the model says, in two graphs."""

from collections.abc import Callable, Sequence
from copy import copy

import pytest
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from examples.decoding import Decoder, static_cache

CONTEXT = 12


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_steps_equal_one_call(model: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    ids = torch.randint(97, (1, CONTEXT + 5))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    decoder = Decoder(model, static_cache(model, CONTEXT + 5))
    for _ in range(2):  # the second round finds the cache used
        found = [decoder.prefill(ids[:, :CONTEXT])]
        found += [decoder.step(ids[:, p : p + 1], p) for p in range(CONTEXT, CONTEXT + 5)]
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)


def test_generate_equals_the_model_alone(model: LlamaForCausalLM) -> None:
    torch.manual_seed(2)
    ids = torch.randint(97, (1, CONTEXT))
    decoder = Decoder(model, static_cache(model, CONTEXT + 8))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, CONTEXT:]
    assert decoder.generate(ids, 8).tolist() == expected.tolist()
    assert decoder.generate(ids, 8).tolist() == expected.tolist()


def test_all_of_it_is_two_graphs(model: LlamaForCausalLM) -> None:
    graphs = []

    def count(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    torch.manual_seed(3)
    ids = torch.randint(97, (3, CONTEXT))
    compiled = copy(model)
    compiled.compile(backend=count, dynamic=False)
    decoder = Decoder(compiled, static_cache(model, CONTEXT + 8))
    eager = Decoder(model, decoder.cache)
    for row in ids:
        decoder.prefill(row[None])
    decoder.prefill(ids.T.contiguous().T[:1])  # other strides
    eager.prefill(ids[:1])
    for position in range(CONTEXT, CONTEXT + 3):
        decoder.step(ids[:1, :1], position)
    decoder.generate(ids[:1], 8)
    assert len(graphs) == 2

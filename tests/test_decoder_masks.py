"""Padding of an encoder and of its decoder are two masks."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsefx.calibrate.sequential import run_blocks
from tests.block_visits import Recorder, needs_of, nothing

LENGTH = 7
ENCODER = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * LENGTH])
DECODER = torch.tensor([[1] * LENGTH, [1, 1, 1, 1, 1, 0, 0]])


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = hf.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    return hf.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("given", ["decoder_input_ids", "labels"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_mask_of_each(given: str, masked: bool) -> None:
    model = t5()
    ids = torch.randint(1, 64, (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    batch: dict[str, object] = {"input_ids": ids[0], "attention_mask": ENCODER, given: ids[1]}
    if masked:
        batch["decoder_attention_mask"] = DECODER
    seen = Recorder(nothing)
    read: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: read.__setitem__(f"{name}.weight", args[0].detach())
            )
    with torch.no_grad():
        model(**batch)
    expected = dict(read)
    run_blocks(model, [batch], needs_of(model), seen, progress=False).close()
    decoder = int(DECODER.sum()) if masked else 2 * LENGTH
    for name, (rows, _) in seen.counts.items():
        of_encoder = name.startswith("encoder") or "EncDecAttention.k" in name
        of_encoder |= "EncDecAttention.v" in name
        assert rows == (int(ENCODER.sum()) if of_encoder else decoder), name
        mask = ENCODER if of_encoder else DECODER if masked else torch.ones_like(DECODER)
        own = expected[name][mask.bool()]
        torch.testing.assert_close(seen.grams[name], own.T @ own, rtol=1e-4, atol=1e-4)
    assert any("decoder" in name for name in seen.counts)

"""Small random Hugging Face models with inputs, one function each: (model, args, kwargs)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn


class Case(NamedTuple):
    """A model in eval mode and a call of it. `linears`, `attentions`: how many it runs."""

    model: nn.Module
    kwargs: dict[str, object]
    linears: int
    attentions: int


def ids(batch: int, length: int, vocabulary: int = 96) -> Tensor:
    """Random token ids, the same for the same sizes."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def llama(batch: int = 2, length: int = 7) -> Case:
    """Grouped-query attention, gated MLP, no cache."""
    model = hf.LlamaForCausalLM(_llama_config()).eval()
    return Case(model, {"input_ids": ids(batch, length), "use_cache": False}, 15, 2)


def llama_padded(batch: int = 2, length: int = 7) -> Case:
    """The same with a padding mask on the left."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    case = llama(batch, length)
    return case._replace(kwargs={**case.kwargs, "attention_mask": mask})


def llama_cached(batch: int = 2, length: int = 7) -> Case:
    """The same, filling a key-value cache."""
    case = llama(batch, length)
    return case._replace(kwargs={"input_ids": ids(batch, length), "use_cache": True})


def bert(batch: int = 2, length: int = 7) -> Case:
    """An encoder with a padding mask."""
    config = hf.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    model = hf.BertModel(config).eval()
    return Case(model, {"input_ids": ids(batch, length), "attention_mask": mask}, 13, 2)


def vit(batch: int = 2, length: int = 0) -> Case:
    """A vision transformer; its patch embedding is a convolution."""
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    return Case(hf.ViTModel(config).eval(), {"pixel_values": pixels}, 13, 2)


def t5_encoder(batch: int = 2, length: int = 7) -> Case:
    """Relative position bias; attention written out by hand."""
    config = hf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return Case(hf.T5EncoderModel(config).eval(), {"input_ids": ids(batch, length)}, 12, 2)


def whisper_encoder(batch: int = 2, length: int = 0) -> Case:
    """Two 1-d convolutions before a transformer."""
    config = hf.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
    )
    model = hf.WhisperModel(config).eval().get_encoder()
    features = torch.randn(batch, 8, 32, generator=torch.Generator().manual_seed(batch))
    return Case(model, {"input_features": features}, 12, 2)


def gpt2(batch: int = 2, length: int = 7) -> Case:
    """Conv1D: weights stored [in, out]."""
    config = hf.GPT2Config(
        vocab_size=96,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf.GPT2LMHeadModel(config).eval()
    return Case(model, {"input_ids": ids(batch, length), "use_cache": False}, 9, 2)


def mixtral(batch: int = 2, length: int = 7) -> Case:
    """A mixture of experts; the experts' weights are one 3-d parameter."""
    config = hf.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    model = hf.MixtralForCausalLM(config).eval()
    return Case(model, {"input_ids": ids(batch, length), "use_cache": False}, 11, 2)


def _llama_config() -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


CASES: dict[str, Callable[..., Case]] = {
    "llama": llama,
    "llama_padded": llama_padded,
    "llama_cached": llama_cached,
    "bert": bert,
    "vit": vit,
    "t5_encoder": t5_encoder,
    "whisper_encoder": whisper_encoder,
    "gpt2": gpt2,
    "mixtral": mixtral,
}

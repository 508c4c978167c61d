"""The Transformer encoder and decoder (Vaswani et al. 2017).

Shapes: B sentences, R rows (B × beam), S source and T target positions, D width.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from seq2seq.config.schema import TransformerConfig
from seq2seq.model.attention import Attention, KeyValue, Position
from seq2seq.model.decoder_state import CacheUpdate, KVCache, State
from seq2seq.model.interface import Decoded, Memory
from seq2seq.model.layers import FeedForward, Packing, Residual, build_norm, dropout, value_or


class Input(nn.Module):
    """Scale embedded tokens, then add positions and dropout (§3.4, §3.5)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = config.width**0.5
        self.position = Position(config.position, config.width, config.max_length)
        self.p = value_or(config.embedding_dropout, config.dropout)

    def forward(self, x_RTD: Tensor, start: int = 0) -> Tensor:
        return dropout(self.position(x_RTD * self.scale, start), self.p, self.training)


class EncoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = _attention(config, config.position)
        self.feed_forward = _feed_forward(config)
        self.attention_residual, self.feed_forward_residual = _residual(config), _residual(config)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, packing: Packing | None) -> Tensor:
        first, second = self.attention_residual, self.feed_forward_residual
        y_BSD = first.prepare_input(x_BSD)
        kv = self.attention.project(y_BSD, mask_BS, packing=packing)
        x_BSD = first.add_output(x_BSD, self.attention(y_BSD, kv, packing=packing).context_RTD)
        return second.add_output(x_BSD, self.feed_forward(second.prepare_input(x_BSD)))


class Encoder(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input = Input(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = _final_norm(config)

    def forward(self, source_BSD: Tensor, mask_BS: Tensor, packing: Packing | None = None) -> Memory:
        x_BSD = self.input(source_BSD)
        x_BSD = packing.pack(x_BSD) if packing else x_BSD
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask_BS, packing)
        x_BSD = self.norm(x_BSD)
        return Memory(packing.unpack(x_BSD) if packing else x_BSD, mask_BS)


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = _attention(config, config.position)
        # Rotary and ALiBi relate positions of one sentence, so cross-attention uses neither.
        self.cross_attention = _attention(config, "none")
        self.feed_forward = _feed_forward(config)
        self.self_residual, self.cross_residual = _residual(config), _residual(config)
        self.feed_forward_residual = _residual(config)

    def forward(
        self,
        x_RTD: Tensor,
        cache: CacheUpdate,
        memory: KeyValue,
        start: int,
        weights: bool,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor | None]:
        first, second, third = self.self_residual, self.cross_residual, self.feed_forward_residual
        y_RTD = first.prepare_input(x_RTD)
        kv = cache.add(self.self_attention.project(y_RTD, start=start, packing=packing))
        attended = self.self_attention(
            y_RTD, kv, start=start, causal=cache.single_hypothesis, position_S=cache.position_P, packing=packing
        )
        x_RTD = first.add_output(x_RTD, attended.context_RTD)
        attended = self.cross_attention(second.prepare_input(x_RTD), memory, weights=weights, packing=packing)
        x_RTD = second.add_output(x_RTD, attended.context_RTD)
        x_RTD = third.add_output(x_RTD, self.feed_forward(third.prepare_input(x_RTD)))
        return x_RTD, attended.weights_RNTS


class Decoder(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input = Input(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = _final_norm(config)

    def start(self, memory: Memory) -> State:
        """Return each layer's keys and values of the source, and an empty cache."""
        projected = (cast(DecoderLayer, layer).cross_attention.project(*memory) for layer in self.layers)
        # Stored once as every step multiplies them; otherwise each step would copy them first.
        memories = (
            kv._replace(key_RNSH=kv.key_RNSH.mT.contiguous().mT, value_RNSH=kv.value_RNSH.contiguous())
            for kv in projected
        )
        return State(tuple(memories), KVCache())

    def forward(
        self, target_RTD: Tensor, state: State, weights: bool = False, packing: Packing | None = None
    ) -> Decoded:
        x_RTD = self.input(target_RTD, state.length)
        x_RTD = packing.pack(x_RTD) if packing else x_RTD
        cache, attention_weights = CacheUpdate(state, target_RTD), []
        for layer, memory in zip(self.layers, state.memory, strict=True):
            x_RTD, weights_RNTS = layer(x_RTD, cache, memory, state.length, weights, packing)
            attention_weights.append(weights_RNTS)
        state = state.advance(cache.finish(), target_RTD.shape[1])
        return Decoded(self.norm(x_RTD), state, tuple(attention_weights) if weights else ())


def _attention(config: TransformerConfig, position: str) -> Attention:
    a = config.attention
    return Attention(config.width, config.width, config.width, a.heads, a.score, position, a.dropout)


def _feed_forward(config: TransformerConfig) -> FeedForward:
    return FeedForward(
        config.width, config.feed_forward, config.activation, value_or(config.activation_dropout, config.dropout)
    )


def _residual(config: TransformerConfig) -> Residual:
    return Residual(config.width, config.norm, config.norm_position, config.dropout, config.layer_dropout)


def _final_norm(config: TransformerConfig) -> nn.Module:
    return build_norm(config.norm, config.width) if config.norm_position == "pre" else nn.Identity()

"""Build a model from its config; the only module that names both families."""

from __future__ import annotations

from seq2seq.config.schema import LSTMConfig, ModelConfig
from seq2seq.data.tokenizer import Vocabulary
from seq2seq.model.interface import Seq2Seq


def build_model(config: ModelConfig, vocabulary: Vocabulary) -> Seq2Seq:
    """Build the model that a config describes, for a vocabulary."""
    if isinstance(config, LSTMConfig):
        from seq2seq.model import lstm

        return Seq2Seq(lstm.Encoder(config), lstm.Decoder(config), vocabulary, config.embedding, config)
    from seq2seq.model import transformer

    return Seq2Seq(transformer.Encoder(config), transformer.Decoder(config), vocabulary, config.width, config)


def parameter_table(model: Seq2Seq) -> list[tuple[str, int]]:
    """Count parameters by part; a shared parameter counts once."""
    seen: set[int] = set()
    table = []
    for name, part in model.named_children():
        new = {id(p): p.numel() for p in part.parameters() if id(p) not in seen}
        seen |= new.keys()
        table.append((name.replace("_", " "), sum(new.values())))
    return [(name, count) for name, count in table if count]

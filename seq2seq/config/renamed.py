"""Keys of earlier versions: stored configs are read under the new names; an error for a typed old key names the new."""

from __future__ import annotations

# Old key → new key, both as they are typed.
RENAMED = {
    "data.more": "data.extra",
    "model.kernel": "model.kernel_size",
    "model.norm_place": "model.norm_position",
    "model.start": "model.decoder_init",
    "model.tie": "model.tie_embeddings",
    "optimizer.clip": "optimizer.clip_norm",
    "optimizer.epsilon": "optimizer.eps",
    "optimizer.halve_after": "optimizer.plateau_patience",
    "optimizer.rate": "optimizer.lr",
    "search.choose": "search.select_by",
    "search.epsilon": "search.epsilon_cutoff",
    "search.no_repeat": "search.no_repeat_ngram",
    "search.normalization": "search.length_normalization",
    "tokenizer.coverage": "tokenizer.character_coverage",
    "tokenizer.sentences": "tokenizer.max_sentences",
    "tokenizer.symbols": "tokenizer.user_symbols",
    "training.average_last": "training.average_checkpoints",
    "training.cutoff": "training.simcut_cutoff",
    "training.samples": "training.examples",
    **{
        f"optimizer.kinds.{kind}.{old}": f"optimizer.param_groups.{kind}.{new}"
        for kind in ("embeddings", "matrices", "vectors")
        for old, new in (("rate", "lr_scale"), ("decay", "weight_decay"))
    },
}

"""seq2seq shortlist: learn a checkpoint's shortlists from its training pairs, and measure them on validation pairs."""

from __future__ import annotations

from seq2seq.config.schema import ShortlistConfig
from seq2seq.data.corpus import load_split
from seq2seq.data.encoding import EncodedCorpus, encode_corpus, encode_training
from seq2seq.data.shortlist import Shortlist, coverage, learn_shortlist
from seq2seq.data.tokenizer import Tokenizer
from seq2seq.evaluation.testsets import stored_config
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run

COUNTS = (25, 50, 100, 200)  # values of search.shortlist to measure


def shortlist(config: ShortlistConfig) -> None:
    """Learn the shortlists, write them into the checkpoint's folder, and print what they contain."""
    run = Run.find(config.run, config.outputs)
    folder = run.checkpoint(config.checkpoint)
    stored, tokenizer = stored_config(run, config), Tokenizer.load(folder)
    data = stored.data
    train, validation = (load_split(data, split, stored.seed) for split in ("train", "validation"))
    if train is None:
        raise UserError(f"{data.name} has no training pairs to learn from; set data_path=FOLDER")
    encoded, _ = encode_training(train, tokenizer, data.max_length, data.cache)
    found = learn_shortlist(encoded, tokenizer.vocabulary)
    print(f"run        {run.folder}\nlearned    from {len(encoded):,} training pairs")
    if validation is not None:
        print_coverage(found, encode_corpus(validation, tokenizer), tokenizer.vocabulary.target)
    try:
        path = found.save(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    print(f"written    {path}; use it: seq2seq translate run={run.folder} search.shortlist=100")


def print_coverage(found: Shortlist, validation: EncodedCorpus, vocabulary: int) -> None:
    for count in COUNTS:
        measured = coverage(found, validation, count)
        print(
            f"coverage   search.shortlist={count}: {measured.subwords:.1%} of the reference subwords of validation, "
            f"{measured.sentences:.1%} of the sentences, with {measured.size:,.0f} of {vocabulary:,} subwords"
        )

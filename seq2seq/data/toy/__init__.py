"""A small English-German grammar that generates a random parallel corpus.

Every sentence is built in both languages simultaneously from tokens that carry link keys; an English and a
German token that share a key translate each other, so the construction yields the word alignment.
Each English sentence has exactly one translation, and every ambiguity is resolved inside the sentence.

Read in this order: `tokens`, `lexicon`, `syntax`, `english`, `german`, `phrases`, `clauses`, `sentences`, `corpus`.
"""

from seq2seq.data.toy.corpus import Pair, splits

__all__ = ["Pair", "splits"]

"""The parts of a sentence before either language orders and inflects them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from seq2seq.data.toy.lexicon import THIRD, Noun, Verb
from seq2seq.data.toy.tokens import Tokens


@dataclass(frozen=True)
class NounPhrase:
    """A noun phrase: its English words, and its German words for each case (N, A, D or G)."""

    english: Tokens
    german: Callable[[str], Tokens]
    agreement: int = THIRD
    gender: str = "m"  # or f, n, p (plural)
    person: int = 3
    objective: Tokens = ()  # the English words of a pronoun as an object
    indefinite: bool = False
    noun: Noun | None = None

    @property
    def object(self) -> Tokens:
        """The English words after a verb or a preposition."""
        return self.objective or self.english


class Adverbial(NamedTuple):
    """An adverbial and its English spot: f (front), c (front with a comma), m (before the verb) or e (end)."""

    english: Tokens
    german: Tokens
    spot: str


class Body(NamedTuple):
    """The dependents of the verb: in English in sequence, in German by slots of the middle field."""

    english: Tokens = ()
    light: Tokens = ()  # pronouns
    dative: Tokens = ()  # the receiver of a direct object
    manner: Tokens = ()
    object: Tokens = ()
    tail: Tokens = ()  # adjuncts, prepositional phrases and predicatives, which "nicht" precedes
    loose: bool = False  # the object is indefinite


@dataclass(frozen=True)
class Clause:
    """The parts of a clause."""

    subject: NounPhrase
    verb: Verb
    tense: str  # simple, progressive, past, perfect, future or a modal
    body: Body
    key: int
    adverbial: Adverbial | None = None
    negation: str = ""  # not, never, or "no" for a "not" that German expresses by "kein"
    not_key: int = 0
    aux_key: int = 0

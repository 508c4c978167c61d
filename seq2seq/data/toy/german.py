"""German inflection, word order and spelling."""

from __future__ import annotations

from seq2seq.data.toy.lexicon import MODALS, PLURAL, POSSESSIVES, Noun, Verb
from seq2seq.data.toy.syntax import Clause
from seq2seq.data.toy.tokens import Token, Tokens, make_tokens

# Articles and endings by case for masculine, feminine, neuter and plural; "_" is no ending.
ARTICLES = {"N": "der die das die", "A": "den die das die", "D": "dem der dem den", "G": "des der des der"}
RELATIVES = {"N": "der die das die", "A": "den die das die", "D": "dem der dem denen"}
STRONG = {"N": "er e es e", "A": "en e es e", "D": "em er em en", "G": "es er es er"}
EIN = {**STRONG, "N": "_ e _ e", "A": "en e _ e"}
WEAK = {"N": "e e e en", "A": "en e e en", "D": "en en en en", "G": "en en en en"}
MIXED = {**WEAK, "N": "er e es en", "A": "en e es en"}
NO_ARTICLE = {**STRONG, "G": "en er en er"}

DER_WORDS = {"this": "dies", "these": "dies", "every": "jed", "which": "welch"}
EIN_WORDS = {"a": "ein", "no": "kein", **POSSESSIVES}
QUANTIFIERS = {"some": "einig", "many": "viel"}
STEMS = {"teuer": "teur", "dunkel": "dunkl", "müde": "müd"}  # of adjectives that lose a letter before an ending
IRREGULAR_PRESENT = {
    "sein": "bin bist ist sind",
    "haben": "habe hast hat haben",
    "werden": "werde wirst wird werden",
    "wissen": "weiß weißt weiß wissen",
    "mögen": "mag magst mag mögen",
}
CONTRACTIONS = {
    "in dem": "im",
    "in das": "ins",
    "an dem": "am",
    "an das": "ans",
    "zu dem": "zum",
    "zu der": "zur",
    "bei dem": "beim",
    "von dem": "vom",
}


def form_of(table: dict[str, str], case: str, gender: str) -> str:
    """The article or ending in a table for a case and a gender."""
    return table[case].split()["mfnp".index(gender)].strip("_")


def decline(noun: Noun, gender: str, case: str) -> str:
    """A noun in a case; a masculine genitive in -n is the form of all cases but the nominative."""
    if gender == "p":
        return noun.plural + ("n" if case == "D" and noun.plural[-1] not in "ns" else "")
    weak = noun.gender == "m" and noun.genitive.endswith("n")
    return noun.genitive if case == "G" or (weak and case != "N") else noun.german


def determine(determiner: str, gender: str, case: str) -> tuple[str, str]:
    """A determiner, empty where German has none, and the ending of the adjectives after it."""
    if determiner == "the":
        return form_of(ARTICLES, case, gender), form_of(WEAK, case, gender)
    if determiner in DER_WORDS:
        return DER_WORDS[determiner] + form_of(STRONG, case, gender), form_of(WEAK, case, gender)
    if determiner in EIN_WORDS:
        return EIN_WORDS[determiner] + form_of(EIN, case, gender), form_of(MIXED, case, gender)
    ending = form_of(NO_ARTICLE, case, gender)
    return QUANTIFIERS[determiner] + ending if determiner in QUANTIFIERS else "", ending


def conjugate(verb: Verb, agreement: int, past: bool) -> str:
    """A verb in the present or the simple past."""
    if past:
        return verb.preterite + (("n" if verb.preterite.endswith("e") else "en") if agreement == PLURAL else "")
    if verb.infinitive in IRREGULAR_PRESENT:
        return IRREGULAR_PRESENT[verb.infinitive].split()[agreement]
    stem = verb.present[:-1]
    first = verb.infinitive[:-1] + ("" if verb.infinitive.endswith("en") else "e")
    second = stem + ("t" if stem[-1] in "sßzx" else "st")
    return (first, second, verb.present, verb.infinitive)[agreement]


def german_verb(c: Clause) -> tuple[Token, Tokens]:
    """The finite verb and the right bracket."""
    verb, agreement = c.verb, c.subject.agreement
    if c.tense in ("simple", "progressive", "past"):
        return Token(conjugate(verb, agreement, c.tense == "past"), (c.key,)), make_tokens(verb.prefix, c.key)
    rest = verb.german_participle if c.tense == "perfect" else verb.infinitive
    auxiliary = {"perfect": verb.auxiliary, "future": "werden"}.get(c.tense, "")
    forms = IRREGULAR_PRESENT[auxiliary] if auxiliary else MODALS[c.tense]
    return Token(forms.split()[agreement], (c.aux_key,)), make_tokens(verb.prefix + rest, c.key)


def middle_field(c: Clause, adverbial: Tokens) -> Tokens:
    """The words between the finite verb and the right bracket, without the subject."""
    negator = make_tokens({"not": "nicht", "never": "nie"}.get(c.negation, ""), c.not_key)
    before, after = (negator, ()) if c.body.loose else ((), negator)
    return c.body.light + c.body.dative + adverbial + before + c.body.manner + c.body.object + after + c.body.tail


def german_clause(c: Clause, front: Tokens | None = None) -> Tokens:
    """Order a main clause with the verb second, after the given front, the adverbial or the subject."""
    finite, bracket = german_verb(c)
    adverbial, subject = c.adverbial.german if c.adverbial else (), c.subject.german("N")
    if front is None and c.adverbial and c.adverbial.spot in "fc":
        front, adverbial = adverbial, ()
    if front is None:
        front, subject = subject, ()
    return (*front, finite, *subject, *middle_field(c, adverbial), *bracket)


def german_subordinate_clause(c: Clause) -> Tokens:
    """Order a subordinate clause, whose finite verb comes last."""
    finite, bracket = german_verb(c)
    if c.tense in ("simple", "progressive", "past"):
        finite, bracket = Token(c.verb.prefix + finite.text, finite.keys), ()
    return (*c.subject.german("N"), *middle_field(c, c.adverbial.german if c.adverbial else ()), *bracket, finite)


def spell_german(words: Tokens) -> Tokens:
    """Contract prepositions with their articles and drop a comma before the final mark."""
    result: list[Token] = []
    for token in words:
        contraction = CONTRACTIONS.get(f"{result[-1].text} {token.text}") if result else None
        if contraction:
            token = Token(contraction, result.pop().keys + token.keys)
        result.append(token)
    return tuple(result[:-1] if result[-1].text == "," else result)

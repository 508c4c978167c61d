"""English inflection, word order and spelling."""

from __future__ import annotations

import re

from seq2seq.data.toy.lexicon import BE, THIRD
from seq2seq.data.toy.syntax import Clause
from seq2seq.data.toy.tokens import Token, Tokens, make_tokens


def with_ending(base: str, ending: str) -> str:
    """A verb with a regular -s or -ing."""
    if ending == "s":
        ending = "es" if re.search(r"(s|sh|ch|x|go)$", base) else ending
        return base[:-1] + "ies" if re.search(r"[^aeiou]y$", base) else base + ending
    if base.endswith("ie"):
        return base[:-2] + "ying"
    if re.search(r"[^e]e$", base):
        return base[:-1] + ending
    doubles = re.match(r"^[^aeiou]*[aeiou][bdgmnpt]$", base) or base in ("begin", "forget")
    return base + base[-1] * bool(doubles) + ending


def finite_verb(base: str, past: str, key: int, third: bool, is_past: bool, support: bool) -> tuple[Tokens, Tokens]:
    """An auxiliary and a full verb: "does buy" where support is asked for, else "buys"."""
    if support:
        return make_tokens("did" if is_past else "does" if third else "do", key), make_tokens(base, key)
    present = "has" if base == "have" else with_ending(base, "s")
    return (), make_tokens(past if is_past else present if third else base, key)


def english_verb(c: Clause, support: bool) -> tuple[Tokens, Tokens]:
    """The auxiliary, if any, and the rest of the verb."""
    verb, third = c.verb, c.subject.agreement == THIRD
    if c.tense == "progressive" or verb is BE:
        forms = "was were was were" if c.tense == "past" else "am are is are"
        rest = "" if verb is BE else with_ending(verb.base, "ing")
        return make_tokens(forms.split()[c.subject.agreement], c.key), make_tokens(rest, c.key)
    if c.tense in ("simple", "past"):
        return finite_verb(verb.base, verb.past, c.key, third, c.tense == "past", support)
    if c.tense == "perfect":
        return make_tokens("has" if third else "have", c.aux_key), make_tokens(verb.participle, c.key)
    infinitive = make_tokens(verb.base, c.key)
    if c.tense in ("want to", "wanted to", "have to", "had to"):
        base, past = ("want", "wanted") if c.tense.startswith("want") else ("have", "had")
        auxiliary, rest_of_modal = finite_verb(base, past, c.aux_key, third, c.tense.startswith(past), support)
        return auxiliary, rest_of_modal + make_tokens("to", c.aux_key) + infinitive
    first, *others = make_tokens("will" if c.tense == "future" else c.tense, c.aux_key)
    return (first,), (*others, *infinitive)


def english_clause(c: Clause, question: Tokens | None = None) -> Tokens:
    """Order a statement, or a question after its question word."""
    auxiliary, rest = english_verb(c, c.negation in ("not", "no") or question is not None)
    adverbial, spot = (c.adverbial.english, c.adverbial.spot) if c.adverbial else ((), "")
    negator = make_tokens("not" if c.negation == "no" else c.negation, c.not_key)
    middle = negator + (adverbial if spot == "m" else ()) + rest
    ending = c.body.english + (adverbial if spot == "e" else ())
    if question is not None:
        return question + auxiliary + c.subject.english + middle + ending
    opening = {"f": adverbial, "c": adverbial + make_tokens(",")}.get(spot, ())
    return opening + c.subject.english + auxiliary + middle + ending


def spell_english(words: Tokens) -> Tokens:
    """Write "an" before a vowel and "cannot" in one word."""
    result: list[Token] = []
    for token, following in zip(words, (*words[1:], Token(".")), strict=True):
        if token.text == "a" and following.text[0] in "aeiou":
            token = Token("an", token.keys)
        if token.text == "not" and result and result[-1].text == "can":
            token = Token("cannot", result.pop().keys + token.keys)
        result.append(token)
    return tuple(result)

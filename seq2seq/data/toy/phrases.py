"""Random noun phrases, prepositional phrases and adverbials in both languages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from seq2seq.data.toy.german import STEMS, decline, determine
from seq2seq.data.toy.lexicon import (
    BIG_AND_SMALL,
    CITIES,
    COLORS,
    NAMES,
    NUMBERS,
    OCCASIONS,
    PLURAL,
    POSSESSIVES,
    PRONOUNS,
    SURFACES,
    TENS,
    THIRD,
    UNITS,
    WEEKDAYS,
    Adjective,
    Noun,
    Pronoun,
    adjectives_for,
    adverbs_for,
    members,
)
from seq2seq.data.toy.syntax import Adverbial, NounPhrase
from seq2seq.data.toy.tokens import Dice, Sides, Token, Tokens, align, joined, make_tokens, new_key

# Determiners, repeated by frequency; "+" asks for a plural, "0" for no determiner.
SUBJECT = "the the the the the the the the the the+ the+ the+ a a a a this these+ every my my my+ some+ many+ number+"
OBJECT = SUBJECT + " 0+ 0+ number+ a a"
NOT_OBJECT = "the the the the the+ this my no no no+"  # "no" is the German half of an English "not a"
NEVER_OBJECT = "the the my a a 0+"
DEFINITE = "the the the the+ this these+ my my+"
LOCAL = "the the the the the the the a this"
MASS = "0 0 0 0 the the the my"
NOT_MASS = "no the"
NO_BARE = " ".join(option for option in OBJECT.split() if option != "0+")  # "gives her apples" has two readings
UNOWNED = ("folk", "job", "room", "work", "nature", "opening", "transport", "event")  # never "my king"
OWNED = ("animal", "text", "clothing", "item", "vessel", "device", "wheels", "music", "home")  # "the king's dog"

TEENS, ADULT = tuple(range(13, 20)) * 14, (*range(20, 100), *tuple(range(20, 100, 10)) * 4)


def number_words(number: int) -> Sides:
    """A number from two to ninety-nine."""
    if number < 20:
        return align(*NUMBERS[number - 2])
    (english_tens, german_tens), ones = TENS[number // 10 - 2], number % 10
    if not ones:
        return align(english_tens, german_tens)
    english_ones, german_ones = NUMBERS[ones - 2] if ones > 1 else ("one", "ein")
    return align(f"{english_tens}-{english_ones}", f"{german_ones}und{german_tens}")


def random_number(dice: Dice, large: float = 0.15) -> Sides:
    """A number up to twelve, or with the given probability up to ninety-nine."""
    return number_words(dice.pick(TEENS + ADULT) if dice.chance(large) else 2 + int(dice.random() * 11))


def build(
    noun: Noun, determiner: str, plural: bool = False, extras: Sequence[Sides] = (), not_key: int = 0
) -> NounPhrase:
    """Put a noun phrase together; a not_key makes its article the "kein" of an English "not a"."""
    gender, key, noun_key = "p" if plural else noun.gender, not_key or new_key(), new_key()
    bare = determiner in ("0", "number") or (not_key and (plural or not noun.plural))
    article = () if bare else make_tokens("a" if not_key else determiner, key)
    english_extras, german_extras = joined(extras)
    english = (*article, *english_extras, Token(noun.english_plural if plural else noun.english, (noun_key,)))

    def german(case: str) -> Tokens:
        form, ending = determine("no" if not_key else determiner, gender, case)
        inflected = (token._replace(text=token.text.replace("~", ending)) for token in german_extras)
        return (*make_tokens(form, key), *inflected, Token(decline(noun, gender, case), (noun_key,)))

    indefinite = bool(not_key) or determiner in ("0", "a", "some", "many", "number", "every")
    return NounPhrase(english, german, PLURAL if plural else THIRD, gender, indefinite=indefinite, noun=noun)


def attribute(adjective: Adjective) -> Sides:
    """An adjective in front of a noun; "~" stands for the German ending."""
    return align(adjective.english, STEMS.get(adjective.german, adjective.german) + "~")


@functools.cache
def determiners(noun: Noun, options: str) -> list[str]:
    """The options that suit a noun, repeated by frequency."""
    if noun.kind in ("food", "drink", "language"):
        options = NOT_MASS if options == NOT_OBJECT else "the my" if options == NO_BARE else MASS
    elif not noun.plural and noun.kind != "kin":
        return ["the"]
    if noun.kind == "kin":
        options = "my" if not noun.plural or options == "the" else "my my my my+"
    if noun.kind == "language":
        options = options.split()[0]
    return [o for o in options.split() if not (o.startswith("my") and noun.kind in UNOWNED)]


def noun_phrase(dice: Dice, noun: Noun, options: str, describe: float = 0.3, not_key: int = 0) -> NounPhrase:
    """A phrase around a noun with one of the determiners, now and then with adjectives or an owner."""
    choice = dice.pick(determiners(noun, options))
    determiner, plural, fitting = choice.rstrip("+"), choice.endswith("+"), adjectives_for(noun)
    chosen = [dice.pick(fitting)] if fitting and dice.chance(describe) else []
    if chosen and chosen[0].english in COLORS and BIG_AND_SMALL[0] in fitting and dice.chance(0.4):
        chosen = [dice.pick(BIG_AND_SMALL), *chosen]
    adjectives = [attribute(adjective) for adjective in chosen]
    if determiner == "the" and noun.kind in OWNED and dice.chance(0.1):
        return owned(dice, noun, plural, adjectives)
    number = [random_number(dice)] if determiner == "number" else []
    determiner = dice.pick(tuple(POSSESSIVES)) if determiner == "my" else determiner
    return build(noun, determiner, plural, number + adjectives, not_key if determiner == "no" else 0)


def owned(dice: Dice, noun: Noun, plural: bool, adjectives: Sequence[Sides]) -> NounPhrase:
    """Somebody's thing: a name precedes it in both languages, a noun follows it as a German genitive."""
    named = dice.chance(0.4)
    thing = build(noun, "0" if named else "the", plural, adjectives)
    owner = first_name(dice) if named else noun_phrase(dice, dice.pick(members("people")), "the")
    *front, last = owner.english

    def german(case: str) -> Tokens:
        if named:
            return (Token(last.text + "s", last.keys), *thing.german(case))
        return thing.german(case) + owner.german("G")

    english = (*front, Token(last.text + "'s", last.keys), *thing.english[not named :])
    return replace(thing, english=english, german=german, indefinite=False)


def first_name(dice: Dice) -> NounPhrase:
    """Somebody's first name."""
    gender = dice.pick("mf")
    english, german = align(*[dice.pick(NAMES[gender])] * 2)
    return NounPhrase(english, lambda case: german, gender=gender)


def pronoun_phrase(pronoun: Pronoun) -> NounPhrase:
    """A personal pronoun as a phrase."""
    key = new_key()
    forms = {"N": pronoun.nominative, "A": pronoun.accusative, "D": pronoun.dative}
    return NounPhrase(
        make_tokens(pronoun.english, key),
        lambda case: make_tokens(forms[case], key),
        pronoun.agreement,
        person=pronoun.person,
        objective=make_tokens(pronoun.objective, key),
    )


def argument(
    dice: Dice, classes: str, options: str, subject: NounPhrase | None = None, describe: float = 0.3
) -> NounPhrase:
    """A phrase for a slot in a verb's frame; no object repeats a subject in the first or second person."""
    if "person" in classes.split() and dice.chance(0.35):
        if dice.chance(0.35):
            return first_name(dice)
        taken = subject.person if subject and subject.person < 3 else 0
        return pronoun_phrase(dice.pick([pronoun for pronoun in PRONOUNS if pronoun.person != taken]))
    return noun_phrase(dice, dice.pick(members(classes)), options, describe)


def with_preposition(english: str, german: str, case: str, phrase: NounPhrase) -> Sides:
    """A prepositional phrase."""
    return joined([align(english, german), (phrase.object, phrase.german(case))])


def place_phrase(dice: Dice, classes: str, relation: str) -> Sides:
    """A phrase of location (at), direction (to) or origin (from)."""
    if "city" in classes.split() and dice.chance(0.6):
        prepositions = {"at": ("in", "in"), "to": ("to", "nach"), "from": ("from", "aus")}[relation]
        return joined([align(*prepositions), align(*dice.pick(CITIES))])
    noun = dice.pick(members(classes))
    phrase = noun_phrase(dice, noun, LOCAL)
    if relation == "at":
        return with_preposition(noun.location, noun.german_location, "D", phrase)
    if relation == "from":
        return with_preposition("from", "aus" if noun.german_location == "in" else "von", "D", phrase)
    return with_preposition("to", noun.direction, "D" if noun.direction == "zu" else "A", phrase)


def surface_phrase(dice: Dice, case: str) -> Sides:
    """A phrase of location (dative) or direction (accusative) on, under or near a piece of furniture."""
    english, german = dice.pick(SURFACES)
    return with_preposition(english, german, case, noun_phrase(dice, dice.pick(members("furniture")), LOCAL))


def occasion(dice: Dice) -> Sides:
    """A phrase about an event or a cause."""
    english, german, case, kind = dice.pick(OCCASIONS)
    return with_preposition(english, german, case, noun_phrase(dice, dice.pick(members(kind)), "the"))


def moment(dice: Dice, tense: str) -> Sides:
    """A span of time that has passed, a day of the week, an hour, or both."""
    if tense == "past" and dice.chance(0.4):
        number, unit, (ago, vor) = random_number(dice), align(*dice.pick(UNITS)), align("ago", "vor")
        return number[0] + unit[0] + ago, vor + number[1] + unit[1]
    hour = joined([align("at", "um"), random_number(dice, 0), align("o'clock", "Uhr")])
    if tense == "simple" or dice.chance(0.25):
        return hour
    day, tag = dice.pick(WEEKDAYS)
    date = align(f"on {day}", f"am {tag}")
    return joined([date, hour]) if dice.chance(0.3) else date


def random_adverbial(dice: Dice, tense: str, spots: str) -> Adverbial | None:
    """A random adverbial for a tense ("modal" for all modals), if it fits a free spot."""
    if tense in ("simple", "past", "future", "modal") and dice.chance(0.42):
        dated = dice.chance(0.6)
        sides, spot = moment(dice, tense) if dated else occasion(dice), dice.pick("ef" if dated else "ec")
    else:
        adverb = dice.pick(adverbs_for(tense))
        sides, spot = align(adverb.english, adverb.german), dice.pick(adverb.spots)
    return Adverbial(*sides, spot) if spot in spots else None

"""Random clauses: a subject, a verb in a tense, what fills its frame, adverbials and negation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seq2seq.data.toy.lexicon import COMPANY, MANNERS, MODALS, PLAIN, SECOND, THIRD, Verb, members
from seq2seq.data.toy.phrases import (
    DEFINITE,
    LOCAL,
    NEVER_OBJECT,
    NO_BARE,
    NOT_OBJECT,
    OBJECT,
    SUBJECT,
    argument,
    noun_phrase,
    place_phrase,
    random_adverbial,
    surface_phrase,
    with_preposition,
)
from seq2seq.data.toy.syntax import Body, Clause, NounPhrase
from seq2seq.data.toy.tokens import Dice, Tokens, align, make_tokens, new_key

TENSES = (*("simple",) * 3, *("progressive",) * 2, *("past",) * 4, *("perfect",) * 2, "future", "modal", "modal")


def random_clause(
    dice: Dice,
    subject: NounPhrase | None = None,
    tenses: Sequence[str] = TENSES,
    verbs: Sequence[Verb] = PLAIN,
    *,
    given: NounPhrase | None = None,
    gap: bool = False,
    negate: float = 0.16,
    time: float = 0.6,
    spots: str = "fcme",
) -> Clause:
    """A random clause with the given parts and options."""
    who, verb, tense = fitting_parts(dice, subject, tenses, verbs)
    key, not_key, state, negation = new_key(), new_key(), "state" in verb.flags, ""
    if not who.indefinite and tense != "must" and verb.frame not in ("DA", "music") and dice.chance(negate):
        negation = "never" if tense in ("simple", "perfect") and not state and dice.chance(0.3) else "not"

    def make_object() -> NounPhrase | None:
        return given if gap or given else random_object(dice, verb, who, negation, not_key)

    body, adverbial = complement(dice, verb, who, key, make_object), None
    if verb.flags and not state and not negation and dice.chance(0.35):
        body = add_adjunct(dice, verb, body, who)
    if not state and negation != "never" and dice.chance(time):
        free = spots.strip("me") if negation else spots
        adverbial = random_adverbial(dice, "modal" if tense in MODALS else tense, free)
    negation = "no" if negation == "not" and body.loose else negation
    return Clause(who, verb, tense, body, key, adverbial, negation, not_key, new_key())


def fitting_parts(
    dice: Dice, subject: NounPhrase | None, tenses: Sequence[str], verbs: Sequence[Verb]
) -> tuple[NounPhrase, Verb, str]:
    """Choose a verb, a tense and, unless it is given, a subject that suit each other."""
    while True:
        verb, tense = dice.pick(verbs), dice.pick(tenses)
        tense = dice.pick(tuple(MODALS)) if tense == "modal" else tense
        who = subject or argument(dice, verb.subjects, SUBJECT)
        if is_idiomatic(verb, who, tense):
            return who, verb, tense


def is_idiomatic(verb: Verb, subject: NounPhrase, tense: str) -> bool:
    """Whether a clause in this tense is idiomatic, and its English shows the tense."""
    if tense in ("simple", "past") and verb.past == verb.base and subject.agreement != THIRD:
        return False  # "they read" could be present or past
    if tense == "past":
        return subject.agreement != SECOND  # "du kauftest" is bookish
    if "state" in verb.flags:
        return tense == "simple"
    if tense == "progressive":
        return "plain" not in verb.flags
    return tense not in MODALS or "person" in verb.subjects


def random_object(dice: Dice, verb: Verb, subject: NounPhrase, negation: str, not_key: int) -> NounPhrase:
    """An object of a verb; "no" in it stands for "not a"."""
    options = object_options(verb, negation)
    if options == NOT_OBJECT:
        return noun_phrase(dice, dice.pick(members(verb.objects)), options, not_key=not_key)
    return argument(dice, verb.objects, options, subject)


def object_options(verb: Verb, negation: str) -> str:
    """The determiners that an object may have."""
    if verb.frame in ("A", "put") and negation:
        return NOT_OBJECT if negation == "not" else NEVER_OBJECT
    if verb.frame == "D" or negation == "not":
        return DEFINITE
    return NO_BARE if verb.frame == "DA" else LOCAL if verb.frame.startswith(("through", "around")) else OBJECT


def complement(
    dice: Dice, verb: Verb, subject: NounPhrase, key: int, make_object: Callable[[], NounPhrase | None]
) -> Body:
    """Fill a verb's frame; make_object gives its object, or None to leave a gap."""
    particle = make_tokens(verb.particle, key)
    match verb.frame.split(":"):
        case ["at" | "to" | "from" as relation]:
            english, tail = place_phrase(dice, verb.objects, relation)
        case ["near"]:
            english, tail = surface_phrase(dice, "D")
        case ["onto"]:
            target = noun_phrase(dice, dice.pick(members(verb.objects)), LOCAL)
            english, tail = with_preposition("onto", "auf", "A", target)
        case ["music"]:
            english, tail = align(*dice.pick([(f"the {n.english}", n.german) for n in members("music")]))
        case [preposition, german, case] if thing := make_object():
            english, tail = with_preposition(preposition, german, case, thing)
        case ["A" | "D" | "DA" | "put"] if thing := make_object():
            return fill_objects(dice, verb, subject, particle, thing)
        case _:
            english, tail = (), ()
    return Body(particle + english, tail=tail)


def fill_objects(dice: Dice, verb: Verb, subject: NounPhrase, particle: Tokens, thing: NounPhrase) -> Body:
    """The objects of a transitive, dative or ditransitive verb."""
    german = thing.german("D" if verb.frame == "D" else "A")
    if thing.objective:
        return Body(thing.object + particle if verb.particle == "up" else particle + thing.object, light=german)
    body = Body(particle + thing.object, object=german, loose=thing.indefinite)
    if verb.frame == "put":
        target, tail = surface_phrase(dice, "A")
        return body._replace(english=body.english + target, tail=tail)
    if verb.frame == "DA":
        receiver = argument(dice, "person", DEFINITE, subject)
        body = body._replace(english=receiver.object + body.english)
        dative = receiver.german("D")
        return body._replace(light=dative) if receiver.objective else body._replace(dative=dative)
    return body


def add_adjunct(dice: Dice, verb: Verb, body: Body, subject: NounPhrase) -> Body:
    """Add the place, the company, the beneficiary or the manner that the verb allows."""
    flag = dice.pick(verb.flags.split())
    if flag == "plain" or (flag == "with" and verb.frame.startswith("with")):
        return body
    if flag in MANNERS:
        english, german = align(*dice.pick(MANNERS[flag]))
        early = body.tail and not body.object  # "runs quickly to the lake", but "eats the apple quickly"
        return body._replace(english=english + body.english if early else body.english + english, manner=german)
    if flag == "place":
        english, german = place_phrase(dice, "room work nature", "at")
    else:
        preposition, german_preposition, case = dice.pick(COMPANY[flag])
        companion = argument(dice, "person", DEFINITE, subject)
        english, german = with_preposition(preposition, german_preposition, case, companion)
    return body._replace(english=body.english + english, tail=german + body.tail)

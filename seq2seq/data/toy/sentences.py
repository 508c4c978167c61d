"""The kinds of sentences, each with its frequency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from seq2seq.data.toy.clauses import TENSES, random_clause
from seq2seq.data.toy.english import english_clause
from seq2seq.data.toy.german import RELATIVES, form_of, german_clause, german_subordinate_clause, middle_field
from seq2seq.data.toy.lexicon import (
    ACTIVE,
    ADJECTIVES,
    BE,
    CONJUNCTIONS,
    COST,
    DEEDS,
    NOUNS,
    PERSONAL,
    PLAIN,
    PLURAL,
    PRONOUNS,
    SECOND,
    STATES,
    THIRD,
    VERBS,
    Adjective,
    Verb,
    adjectives_for,
    members,
)
from seq2seq.data.toy.phrases import (
    ADULT,
    DEFINITE,
    argument,
    attribute,
    build,
    noun_phrase,
    number_words,
    place_phrase,
    pronoun_phrase,
    random_adverbial,
    random_number,
)
from seq2seq.data.toy.syntax import Body, Clause, NounPhrase
from seq2seq.data.toy.tokens import Dice, Sides, Token, align, joined, make_tokens, new_key

NOW, THEN = ("simple", "progressive"), ("past",)
INHABITANTS = (("furniture vessel", "room"), ("animal", "nature"), ("job", "work"), ("work castle hotel", "city"))
GERMAN_COMMA: Sides = ((), (Token(","),))
Maker = Callable[[Dice], Sides]
PATTERNS: list[tuple[Maker, str]] = []  # with the final mark


def pattern(weight: int, mark: str = ".") -> Callable[[Maker], Maker]:
    """Register a maker of sentences that end in a mark; a greater weight makes it more frequent."""

    def register(maker: Maker) -> Maker:
        PATTERNS.extend([(maker, mark)] * weight)
        return maker

    return register


def statement_of(c: Clause) -> Sides:
    """A clause as a statement."""
    return english_clause(c), german_clause(c)


def question_of(c: Clause, question: Sides = ((), ())) -> Sides:
    """A clause as a question."""
    return english_clause(c, question[0]), german_clause(c, question[1])


def subordinate_of(c: Clause) -> Sides:
    """A clause as a subordinate one."""
    return english_clause(c), german_subordinate_clause(c)


@pattern(40)
def statement(dice: Dice) -> Sides:
    """A main clause."""
    return statement_of(random_clause(dice))


@pattern(7, "?")
def yes_no_question(dice: Dice) -> Sides:
    """A question without a question word."""
    return question_of(trait_clause(dice) if dice.chance(0.2) else random_clause(dice, negate=0, spots="me"))


@pattern(3, "?")
def who_question(dice: Dice) -> Sides:
    """A question for the subject."""
    left, right = align("who", "wer")
    return statement_of(random_clause(dice, NounPhrase(left, lambda case: right), verbs=PERSONAL, negate=0, spots="me"))


@pattern(7, "?")
def object_question(dice: Dice) -> Sides:
    """A question for the object: whom, what, which or how many."""
    verb = dice.pick([v for v in PLAIN if v.frame in ("A", "D")])
    nouns = [n for n in members(verb.objects) if n.plural and n.kind != "kin"]
    if "person" in verb.objects.split():
        question = align("whom", "wem" if verb.frame == "D" else "wen")
    elif verb.frame == "A" and (dice.chance(0.4) or not nouns):
        question = align("what", "was")
    else:
        thing = noun_phrase(dice, dice.pick(nouns), "which which+ 0+ 0+")
        question = thing.english, thing.german(verb.frame)
        question = joined([align("how many", "wie viele"), question]) if thing.indefinite else question
    return question_of(random_clause(dice, verbs=[verb], gap=True, negate=0, time=0.3, spots="me"), question)


@pattern(3, "?")
def place_question(dice: Dice) -> Sides:
    """A question for a location, a direction or an origin."""
    verb = dice.pick([v for v in PLAIN if v.frame in ("at", "to", "from")])
    question = align("where", {"at": "wo", "to": "wohin", "from": "woher"}[verb.frame])
    c = random_clause(dice, verbs=[verb], negate=0, time=0.4, spots="me")
    rest = make_tokens("from", *question[0][0].keys) if verb.frame == "from" else ()
    return question_of(replace(c, body=Body(rest)), question)


@pattern(2, "?")
def time_question(dice: Dice) -> Sides:
    """A question for the time."""
    c = random_clause(dice, None, ("simple", "past", "future", "modal"), ACTIVE, negate=0, time=0)
    return question_of(c, align("when", "wann"))


@pattern(2, "?")
def reason_question(dice: Dice) -> Sides:
    """A question for the reason."""
    return question_of(random_clause(dice, negate=0.2, time=0.3, spots="me"), align("why", "warum"))


def being(
    dice: Dice, subject: NounPhrase, predicate: Sides, tense: str = "simple", adverbs: str = "", negate: float = 0
) -> Clause:
    """A clause with a form of "be" and a predicative, now and then with an adverbial of the given kind."""
    adverbial = random_adverbial(dice, adverbs, "fcme") if adverbs else None
    free = subject.indefinite or (adverbial and adverbial.spot in "me")
    negation = "not" if not free and dice.chance(negate) else ""
    body = Body(predicate[0], tail=predicate[1])
    return Clause(subject, BE, tense, body, new_key(), adverbial, negation, new_key())


def predicative(adjective: Adjective) -> Sides:
    """An adjective after a form of "be"."""
    return align(adjective.english, adjective.german)


def trait_clause(dice: Dice, adverbs: Sequence[str] = ("",)) -> Clause:
    """A description of somebody or something; only passing states take adverbials of time."""
    noun = dice.pick([n for n in NOUNS if adjectives_for(n) and n.kind != "event"])
    subject = argument(dice, "person" if noun in members("people") else noun.english, DEFINITE, describe=0)
    adjective = dice.pick(adjectives_for(subject.noun or members("man")[0]))
    negate = 0.2 if any(adverbs) else 0
    if subject.agreement != SECOND and dice.chance(0.25):
        return being(dice, subject, predicative(adjective), "past", negate=negate)
    chosen = dice.pick(adverbs) if any(adverbs) and adjective.english in STATES else adverbs[0]
    return being(dice, subject, predicative(adjective), "simple", chosen, negate)


@pattern(7)
def trait(dice: Dice) -> Sides:
    """A statement with a predicative adjective."""
    return statement_of(trait_clause(dice, dice.pick((("", "", "be"), ("any", "be", "be")))))


@pattern(3)
def profession(dice: Dice) -> Sides:
    """A statement of a profession; German has no article there unless an adjective describes the noun."""
    subject = human(dice, "kin person")
    if subject.agreement != THIRD or (subject.noun and subject.noun.kind == "job"):
        return profession(dice)
    job = dice.pick([n for n in members("job") if n.gender == subject.gender])
    adjectives = [attribute(dice.pick(adjectives_for(job)))] if dice.chance(0.5) else []
    phrase = build(job, "a", extras=adjectives)
    predicate = phrase.english, phrase.german("N")[not adjectives :]
    return statement_of(being(dice, subject, predicate, dice.pick(("simple", "past"))))


@pattern(4)
def comparison(dice: Dice) -> Sides:
    """A comparison of two things by a comparative or as equals."""
    noun = dice.pick(members("people animal things vehicle furniture place"))
    rival = dice.pick(members(noun.kind))
    shared = [a for a in adjectives_for(noun) if a.english_comparative and a in adjectives_for(rival)]
    if noun == rival or not shared:
        return comparison(dice)
    adjective = dice.pick(shared)
    first, second = (noun_phrase(dice, n, "the the this", describe=0) for n in (noun, rival))
    equal = [align("as", "so"), predicative(adjective), align("as", "wie")]
    more = [align(adjective.english_comparative, adjective.german_comparative), align("than", "als")]
    pieces = equal if dice.chance(0.4) else more
    return statement_of(being(dice, first, joined([*pieces, (second.english, second.german("N"))]), negate=0.2))


@pattern(3)
def existence(dice: Dice) -> Sides:
    """A statement that something exists at a location."""
    kinds, region = dice.pick(INHABITANTS)
    thing = noun_phrase(dice, dice.pick(members(kinds)), "a a a number+ many+ some+")
    location = place_phrase(dice, region, "at")
    plural, past, there = thing.agreement == PLURAL, dice.chance(0.4), align("there", "es")
    be = align(("were" if plural else "was") if past else "are" if plural else "is", "gab" if past else "gibt")
    what = thing.english, thing.german("A")
    if dice.chance(0.4):
        return joined([location, (there[0] + be[0], be[1] + there[1]), what])
    return joined([there, be, what, location])


@pattern(3)
def price(dice: Dice) -> Sides:
    """A statement of a price."""
    subject = noun_phrase(dice, dice.pick(members("things wheels music")), "the the this")
    left, right = joined([random_number(dice, 1), align("euros", "Euro")])
    return statement_of(Clause(subject, COST, dice.pick(("simple", "past")), Body(left, tail=right), new_key()))


@pattern(3)
def age(dice: Dice) -> Sides:
    """A statement of somebody's age."""
    young = dice.chance(0.2)
    subject = noun_phrase(dice, dice.pick(members("boy girl child" if young else "folk job")), "the the this")
    if not young and (dice.chance(0.5) or subject.noun in members("boy girl child")):
        subject = argument(dice, "brother sister uncle aunt friend neighbor colleague person", "the this")
    number = random_number(dice, 0) if young else number_words(dice.pick(ADULT))
    return statement_of(being(dice, subject, joined([number, align("years old", "Jahre alt")])))


def with_clause(first: Clause, link: Sides, second: Clause) -> Sides:
    """A main clause followed by a subordinate clause."""
    return joined([statement_of(first), GERMAN_COMMA, link, subordinate_of(second)])


@pattern(8)
def subordinate(dice: Dice) -> Sides:
    """A main clause and an adverbial clause, in either order."""
    conjunction, german_conjunction, era = dice.pick(CONJUNCTIONS)
    tenses = {"any": dice.pick((NOW, THEN)), "present": NOW[:1], "past": THEN}[era]
    side = random_clause(dice, None, tenses, ACTIVE, time=0.15, negate=0.1, spots="me")
    link, verbs = align(conjunction, german_conjunction), [v for v in PLAIN if v.base != "ask"]  # "asks her if ..."
    if dice.chance(0.6):
        return with_clause(random_clause(dice, None, tenses, verbs, time=0.1, spots="fcm"), link, side)
    first = random_clause(dice, None, tenses, verbs, time=0.1, spots="m")
    return joined([link, subordinate_of(side), align(",", ","), (english_clause(first), german_clause(first, ()))])


def human(dice: Dice, classes: str = "people person") -> NounPhrase:
    """A person or persons to whom "he", "she" or "they" can refer."""
    while True:
        subject = argument(dice, classes, DEFINITE, describe=0.1)
        if subject.gender != "n" and not subject.objective:
            return subject


@pattern(5)
def reason(dice: Dice) -> Sides:
    """A deed, and the feelings of the same person."""
    subject, tenses = human(dice), dice.pick((NOW, THEN))
    first = random_clause(dice, subject, tenses, DEEDS, time=0.2, spots="fcm")
    word = "they" if subject.agreement == PLURAL else "she" if subject.gender == "f" else "he"
    same = pronoun_phrase(next(pronoun for pronoun in PRONOUNS if pronoun.english == word))
    adjective = dice.pick([a for a in ADJECTIVES if a.english in STATES])
    second = being(dice, same, predicative(adjective), tenses[0], negate=0.1)
    if dice.chance(0.6):
        return with_clause(first, align("because", "weil"), second)
    return joined([statement_of(first), align(", but", ", aber"), statement_of(second)])


@pattern(3)
def pair_of_clauses(dice: Dice) -> Sides:
    """Two main clauses; before "und" only English has a comma."""
    tenses = dice.pick((NOW, THEN))
    first, second = (random_clause(dice, None, tenses, time=0.15, negate=0.1, spots="me") for _ in range(2))
    link = align(", but", ", aber") if dice.chance(0.5) else joined([(make_tokens(","), ()), align("and", "und")])
    return joined([statement_of(first), link, statement_of(second)])


@pattern(4)
def pair_of_deeds(dice: Dice) -> Sides:
    """One subject with two verbs."""
    tenses = dice.pick((NOW[:1], THEN))
    first = random_clause(dice, None, tenses, DEEDS, time=0.2, negate=0, spots="fc")
    others = [v for v in DEEDS if v.base != first.verb.base]
    second = random_clause(dice, first.subject, tenses, others, time=0, negate=0)
    left, right = statement_of(second)
    rest = left[len(first.subject.english) :], right[len(first.subject.german("N")) :]
    return joined([statement_of(first), align("and", "und"), rest])


@pattern(3)
def pair_of_people(dice: Dice) -> Sides:
    """Two people as one subject."""
    one, other, link = human(dice), human(dice), align("and", "und")
    if one.noun == other.noun:
        return pair_of_people(dice)
    left, right = one.english + link[0] + other.english, link[1]
    subject = NounPhrase(left, lambda case: one.german(case) + right + other.german(case), PLURAL)
    return statement_of(random_clause(dice, subject, verbs=PERSONAL))


@pattern(6)
def report(dice: Dice) -> Sides:
    """A report of somebody's words, thoughts, knowledge or questions."""
    tenses = dice.pick((NOW[:1], THEN))
    reports = [v for v in VERBS if v.frame in ("that", "whether")]
    first = random_clause(dice, None, tenses, reports, time=0.2, negate=0.2, spots="fc")
    second = random_clause(dice, None, THEN if tenses is THEN else TENSES, time=0.3, negate=0.1, spots="me")
    links = (("that", "dass"),) if first.verb.frame == "that" else (("whether", "ob"), ("why", "warum"))
    return with_clause(first, align(*dice.pick(links)), second)


@pattern(5)
def attempt(dice: Dice) -> Sides:
    """Something that somebody tries, hopes or forgets to do."""
    attempts, tenses = [v for v in VERBS if v.frame == "inf"], ("simple", "progressive", "past", "past", "perfect")
    first = random_clause(dice, None, tenses, attempts, time=0.3, negate=0, spots="fcm")
    deeds = [v for v in DEEDS if v.frame not in ("none", "music") and "plain" not in v.flags]
    deed = random_clause(dice, first.subject, NOW[:1], deeds, time=0, negate=0)
    (to, zu), verb = align("to", "zu"), deed.verb
    infinitive = (*zu, Token(verb.infinitive, (deed.key,)))
    if verb.prefix:
        infinitive = (Token(f"{verb.prefix}zu{verb.infinitive}", (*zu[0].keys, deed.key)),)
    rest = to + make_tokens(verb.base, deed.key) + deed.body.english, middle_field(deed, ()) + infinitive
    return joined([statement_of(first), GERMAN_COMMA, rest])


def relative(dice: Dice, head: NounPhrase, verbs: Sequence[Verb], gap: bool) -> Sides:
    """A relative clause about a noun, which is the subject or, with a gap, the object in it."""
    people, tenses = head.noun in members("people"), ("simple", "past", "perfect")
    if gap:
        c = random_clause(dice, None, tenses, verbs, gap=True, time=0.15, negate=0.1, spots="me")
        link = align("whom" if people else "that", form_of(RELATIVES, c.verb.frame, head.gender))
        return joined([link, subordinate_of(c)])
    left, right = align("who" if people else "that", form_of(RELATIVES, "N", head.gender))
    subject = replace(head, english=left, german=lambda case: right)
    return subordinate_of(random_clause(dice, subject, tenses, verbs, time=0.15, negate=0.1, spots="me"))


@pattern(4)
def subject_relative(dice: Dice) -> Sides:
    """A statement about somebody whom a relative clause describes."""
    head, gap = noun_phrase(dice, dice.pick(members("folk job")), "the the the+ this"), dice.chance(0.5)
    verbs = [v for v in DEEDS if not gap or (v.frame in ("A", "D") and "person" in v.objects.split())]
    left, right = relative(dice, head, verbs, gap)
    comma = make_tokens(",")
    whole = replace(head, english=head.english + left, german=lambda case: head.german(case) + comma + right + comma)
    return statement_of(random_clause(dice, whole, verbs=PERSONAL, time=0.2, spots="me"))


@pattern(5)
def object_relative(dice: Dice) -> Sides:
    """A statement about something that a relative clause at the end describes."""
    noun = dice.pick(members("animal text things wheels music"))
    thing = noun_phrase(dice, noun, "the the the+ a")
    verbs = [v for v in PLAIN if v.frame == "A" and noun in members(v.objects)]
    unadorned = [v if v.flags == "state" else v._replace(flags="") for v in verbs if "plain" not in v.flags]
    first = random_clause(dice, verbs=unadorned, given=thing, negate=0, time=0.3, spots="fcm")
    second = relative(dice, thing, [v for v in verbs if v.base != first.verb.base], gap=True)
    return joined([statement_of(first), GERMAN_COMMA, second])

"""The words of both languages: nouns, adjectives, verbs and adverbs from the tables in this folder, the others below.

The first line of a table names its columns, the fields of the class; "-" is an empty cell.
"""

import functools
from pathlib import Path
from typing import NamedTuple, TypeVar

Row = TypeVar("Row", bound=NamedTuple)
FIRST, SECOND, THIRD, PLURAL = range(4)  # the forms of a verb, as for ich, du, er and wir


class Noun(NamedTuple):
    """A noun of both languages; without a plural it is a mass noun or unique."""

    kind: str  # a class of nouns, to which verbs, adjectives and determiners refer
    english: str
    english_plural: str
    german: str
    gender: str  # m, f, n
    genitive: str
    plural: str
    location: str  # the preposition of a place: "at school", "in der Schule", "zur Schule"
    german_location: str
    direction: str


class Adjective(NamedTuple):
    """An adjective, perhaps with its comparative, and the nouns that it suits."""

    english: str
    english_comparative: str
    german: str
    german_comparative: str
    nouns: str


class Verb(NamedTuple):
    """A verb of both languages with one frame and the nouns that may fill it; a row repeated is more frequent."""

    base: str
    past: str
    participle: str
    particle: str
    prefix: str  # separable
    infinitive: str
    present: str  # of the third person
    preterite: str
    german_participle: str
    auxiliary: str  # of the perfect
    subjects: str
    # none; A (accusative), D (dative), DA (both); at, to, from (a place); near, onto (furniture); put (A and onto);
    # music; that, whether, inf (a clause); or a preposition as english:german:case.
    frame: str
    objects: str
    # state (simple tenses, no adverbials), plain (no progressive), and adjuncts: place, or a key of COMPANY or MANNERS
    flags: str


class Adverb(NamedTuple):
    """An adverb with its tenses ("be" for any of that verb) and its possible spots, as in Adverbial."""

    english: str
    german: str
    tenses: str
    spots: str


class Pronoun(NamedTuple):
    """A personal pronoun."""

    english: str
    objective: str
    nominative: str
    accusative: str
    dative: str
    person: int
    agreement: int


def read_table(name: str, row_type: type[Row]) -> tuple[Row, ...]:
    """Read a table of this folder."""
    text = Path(__file__).with_name(f"{name}.tsv").read_text(encoding="utf-8")
    header, *rows = (line.split("\t") for line in text.splitlines())
    assert tuple(header) == row_type._fields
    return tuple(row_type._make("" if cell == "-" else cell for cell in row) for row in rows)


NOUNS = read_table("nouns", Noun)
ADJECTIVES = read_table("adjectives", Adjective)
VERBS = read_table("verbs", Verb)
ADVERBS = read_table("adverbs", Adverb)

GROUPS = {
    "people": "folk job kin",
    "person": "folk job kin",  # as an argument of a verb also names and pronouns, see argument()
    "things": "clothing item vessel device",
    "vehicle": "wheels transport",
    "place": "room home work nature",
}
KINDS = {noun.kind for noun in NOUNS}
BIG_AND_SMALL = ADJECTIVES[:2]
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "gray")
STATES = ("happy", "sad", "tired", "sick", "nervous", "hungry", "thirsty", "angry", "curious")

*_, BE, COST = VERBS
PLAIN = tuple(v for v in VERBS if v.frame not in ("", "that", "whether", "inf"))
ACTIVE = tuple(v for v in PLAIN if "state" not in v.flags)
PERSONAL = tuple(v for v in PLAIN if "person" in v.subjects)
DEEDS = tuple(v for v in ACTIVE if "person" in v.subjects)

MODALS = {
    "can": "kann kannst kann können",
    "must": "muss musst muss müssen",
    "may": "darf darfst darf dürfen",
    "should": "sollte solltest sollte sollten",
    "could": "konnte konntest konnte konnten",
    "would like to": "möchte möchtest möchte möchten",
    "want to": "will willst will wollen",
    "have to": "muss musst muss müssen",
    "wanted to": "wollte wolltest wollte wollten",
    "had to": "musste musstest musste mussten",
}
PRONOUNS = (
    Pronoun("I", "me", "ich", "mich", "mir", 1, FIRST),
    Pronoun("you", "you", "du", "dich", "dir", 2, SECOND),
    Pronoun("he", "him", "er", "ihn", "ihm", 3, THIRD),
    Pronoun("she", "her", "sie", "sie", "ihr", 3, THIRD),
    Pronoun("we", "us", "wir", "uns", "uns", 1, PLURAL),
    Pronoun("they", "them", "sie", "sie", "ihnen", 3, PLURAL),
)
POSSESSIVES = {"my": "mein", "your": "dein", "his": "sein", "her": "ihr", "our": "unser", "their": "ihr"}
NAMES = {
    "m": ("Peter", "Paul", "Martin", "Robert", "David", "Leon"),
    "f": ("Anna", "Maria", "Julia", "Emma", "Laura", "Sophie"),
}
CITIES = (
    ("Berlin", "Berlin"),
    ("Vienna", "Wien"),
    ("Munich", "München"),
    ("Rome", "Rom"),
    ("Paris", "Paris"),
    ("Italy", "Italien"),
    ("France", "Frankreich"),
)
WEEKDAYS = (
    ("Monday", "Montag"),
    ("Tuesday", "Dienstag"),
    ("Wednesday", "Mittwoch"),
    ("Thursday", "Donnerstag"),
    ("Friday", "Freitag"),
    ("Saturday", "Samstag"),
    ("Sunday", "Sonntag"),
)
UNITS = (("days", "Tagen"), ("weeks", "Wochen"), ("months", "Monaten"), ("years", "Jahren"))  # of time, dative
NUMBERS = (  # from two
    ("two", "zwei"),
    ("three", "drei"),
    ("four", "vier"),
    ("five", "fünf"),
    ("six", "sechs"),
    ("seven", "sieben"),
    ("eight", "acht"),
    ("nine", "neun"),
    ("ten", "zehn"),
    ("eleven", "elf"),
    ("twelve", "zwölf"),
    ("thirteen", "dreizehn"),
    ("fourteen", "vierzehn"),
    ("fifteen", "fünfzehn"),
    ("sixteen", "sechzehn"),
    ("seventeen", "siebzehn"),
    ("eighteen", "achtzehn"),
    ("nineteen", "neunzehn"),
)
TENS = (  # from twenty
    ("twenty", "zwanzig"),
    ("thirty", "dreißig"),
    ("forty", "vierzig"),
    ("fifty", "fünfzig"),
    ("sixty", "sechzig"),
    ("seventy", "siebzig"),
    ("eighty", "achtzig"),
    ("ninety", "neunzig"),
)

# Manners and company by the flag of the verbs that allow them.
MANNERS = {
    "pace": (("quickly", "schnell"), ("slowly", "langsam")),
    "care": (("carefully", "vorsichtig"),),
    "patience": (("patiently", "geduldig"),),
    "effort": (("diligently", "fleißig"),),
    "voice": (("loudly", "laut"), ("quietly", "leise")),
    "skill": (("well", "gut"), ("badly", "schlecht")),
}
COMPANY = {
    "with": (("with", "mit", "D"), ("without", "ohne", "A")),
    "for": (("for", "für", "A"),),
}
SURFACES = (("on", "auf"), ("under", "unter"), ("next to", "neben"), ("behind", "hinter"), ("in front of", "vor"))
OCCASIONS = (  # prepositions, the case and the kind of noun
    ("after", "nach", "D", "event"),
    ("before", "vor", "D", "event"),
    ("during", "während", "G", "event"),
    ("because of", "wegen", "G", "cause"),
    ("despite", "trotz", "G", "cause"),
)
CONJUNCTIONS = (  # and the time of both clauses
    ("because", "weil", "any"),
    ("although", "obwohl", "any"),
    ("while", "während", "any"),
    ("when", "wenn", "present"),
    ("when", "als", "past"),
    ("if", "wenn", "present"),
)


@functools.cache
def members(classes: str) -> tuple[Noun, ...]:
    """The nouns of some kinds, groups of kinds or single words."""
    expanded = " ".join(GROUPS.get(name, name) for name in classes.split()).split()
    return tuple(noun for name in expanded for noun in NOUNS if name == (noun.kind if name in KINDS else noun.english))


@functools.cache
def adjectives_for(noun: Noun) -> tuple[Adjective, ...]:
    """The adjectives that suit a noun."""
    return tuple(adjective for adjective in ADJECTIVES if noun in members(adjective.nouns))


@functools.cache
def adverbs_for(tense: str) -> tuple[Adverb, ...]:
    """The adverbs that suit a tense."""
    return tuple(adverb for adverb in ADVERBS if {tense, "any"} & {*adverb.tenses.split()})

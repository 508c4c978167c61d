"""Laws of the toy corpus; the grammar checks know German on their own and nothing of the generator's rules."""

import re
from collections import Counter
from itertools import pairwise

import pytest

from seq2seq.data import toy
from seq2seq.data.toy import lexicon
from seq2seq.data.toy.clauses import TENSES
from seq2seq.data.toy.english import with_ending
from seq2seq.data.toy.lexicon import ADJECTIVES, NOUNS, VERBS
from seq2seq.utils.text import words_and_marks

Corpus = dict[str, list[toy.Pair]]

ARTICLE_STEMS = "ein|kein|mein|dein|sein|ihr|unser|dies|jed"
DATIVE_PREPOSITIONS = {"mit", "von", "bei", "nach", "zu", "aus"}
ACCUSATIVE_PREPOSITIONS = {"durch", "für", "gegen", "ohne", "um"}
GENITIVE_PREPOSITIONS = {"während", "wegen", "trotz"}
SUBORDINATORS = {"dass", "ob", "obwohl", "weil", "wenn", "als"}
FORBIDDEN = {"in dem", "in das", "an dem", "an das", "bei dem", "von dem", "zu dem", "zu der"}
FINITE_AUXILIARIES = set(
    """bin bist ist sind war waren habe hast hat haben hatte hatten werde wirst wird werden kann kannst können muss
    musst müssen darf darfst dürfen sollte solltest sollten konnte konntest konnten möchte möchtest möchten will willst
    wollen wollte wolltest wollten musste musstest mussten weiß weißt wissen mag magst mögen""".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return toy.splits()


@pytest.fixture(scope="module")
def pairs(corpus: Corpus) -> list[toy.Pair]:
    return [pair for part in corpus.values() for pair in part]


@pytest.fixture(scope="module")
def german(pairs: list[toy.Pair]) -> list[list[str]]:
    """The target sides as words, the first one in lower case unless it is a noun or a name."""
    capitals = {noun.german for noun in NOUNS} | {noun.plural for noun in NOUNS}
    sentences = [words_and_marks(pair.target) for pair in pairs]
    return [[first if first in capitals else first.lower(), *rest] for first, *rest in sentences]


def inflected(stems: str, endings: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{stems})(?:{endings})")


def test_sizes_and_distinct_sources(corpus: Corpus, pairs: list[toy.Pair]) -> None:
    assert {name: len(part) for name, part in corpus.items()} == {"train": 20_000, "validation": 500, "test": 500}
    assert len({pair.source.lower() for pair in pairs}) == len(pairs)


@pytest.mark.slow
def test_seed_decides_the_corpus(corpus: Corpus) -> None:
    assert toy.splits(1) == corpus
    assert toy.splits(2)["test"] != corpus["test"]


@pytest.mark.slow
def test_target_is_a_function_of_the_source(pairs: list[toy.Pair]) -> None:
    translations = {pair.source: pair for pair in pairs}
    others = [pair for seed in (2, 3) for part in toy.splits(seed).values() for pair in part]
    repeated = [pair for pair in others if pair.source in translations]
    assert len(repeated) > 300
    assert all(pair == translations[pair.source] for pair in repeated)


def test_words_restore_the_text(pairs: list[toy.Pair]) -> None:
    assert words_and_marks("At two o'clock twenty-one cats, Anna's, sleep.") == [
        "At", "two", "o'clock", "twenty-one", "cats", ",", "Anna's", ",", "sleep", ".",
    ]  # fmt: skip
    for text in (text for pair in pairs for text in pair[:2]):
        assert re.sub(r" ([.,?])", r"\1", " ".join(words_and_marks(text))) == text


def test_lengths(pairs: list[toy.Pair]) -> None:
    lengths = Counter(len(words_and_marks(pair.source)) for pair in pairs)
    assert min(lengths) >= 3 and max(lengths) <= 24
    assert sum(count for length, count in lengths.items() if 4 <= length <= 16) > 0.95 * len(pairs)


def test_capitals_and_final_marks(pairs: list[toy.Pair]) -> None:
    for pair in pairs:
        assert pair.source[0].isupper() and pair.target[0].isupper()
        assert pair.source[-1] == pair.target[-1] and pair.source[-1] in ".?"
        assert "  " not in pair.source + pair.target


def test_indefinite_article(pairs: list[toy.Pair]) -> None:
    for pair in pairs:
        for article, following in re.findall(r"\b(an?) (\w)", pair.source, flags=re.IGNORECASE):
            assert (article.lower() == "an") == (following in "aeiou"), pair.source


def test_links_are_in_range_and_plentiful(pairs: list[toy.Pair]) -> None:
    total = linked = 0
    for pair in pairs:
        source, target = words_and_marks(pair.source), words_and_marks(pair.target)
        assert all(0 <= i < len(source) and 0 <= j < len(target) for i, j in pair.links)
        assert (len(source) - 1, len(target) - 1) in pair.links
        assert len(set(pair.links)) == len(pair.links)
        ends = {j for _, j in pair.links}
        total += sum(word != "," for word in target)
        linked += sum(word != "," and j in ends for j, word in enumerate(target))
    assert linked > 0.97 * total


def test_links_join_nouns_with_their_translations(pairs: list[toy.Pair]) -> None:
    nouns = {form: noun for noun in NOUNS for form in (noun.english, noun.english_plural)}
    verbs = {form for verb in VERBS for form in (verb.base, verb.past, verb.participle)} | {"meeting"}
    checked = 0
    for pair in pairs:
        source, target = words_and_marks(pair.source), words_and_marks(pair.target)
        for i, word in enumerate(source):
            if word in nouns and word not in verbs and word not in {"German", "English", "French"}:
                partners = [target[j] for k, j in pair.links if k == i]
                known = {nouns[word].german, nouns[word].genitive, nouns[word].plural, nouns[word].plural + "n"}
                assert known & set(partners), pair
                checked += 1
    assert checked > 20_000


def test_every_lexeme_is_frequent(corpus: Corpus) -> None:
    seen = Counter(
        part
        for pair in corpus["train"]
        for word in words_and_marks(pair.source.lower())
        for part in {word, *word.split("-"), word.removesuffix("'s")}
    )

    def occurrences(*forms: str) -> int:
        return sum(seen[form.lower()] for form in set(forms))

    rare = [noun.english for noun in NOUNS if occurrences(noun.english, noun.english_plural) < 20]
    rare += [a.english for a in ADJECTIVES if occurrences(a.english, a.english_comparative) < 20]
    for verb in VERBS:
        regular = [with_ending(verb.base, ending) for ending in ("s", "ing")]
        if occurrences(verb.base, verb.past, verb.participle, *regular) < 20:
            rare.append(verb.base)
    tables = (lexicon.ADVERBS, lexicon.NUMBERS, lexicon.TENS, lexicon.WEEKDAYS, lexicon.CITIES, lexicon.CONJUNCTIONS)
    others = [row[0] for table in (*tables, *lexicon.MANNERS.values()) for row in table]
    rare += [phrase for phrase in others if min(seen[word.lower()] for word in phrase.split()) < 20]
    assert rare == []


def test_tables_refer_to_words_and_rules_that_exist() -> None:
    classes = [a.nouns for a in ADJECTIVES] + [names for verb in VERBS for names in (verb.subjects, verb.objects)]
    names = {name for text in classes for name in text.split()}
    assert [name for name in sorted(names) if not lexicon.members(name)] == []
    adjuncts = {"state", "plain", "place", *lexicon.COMPANY, *lexicon.MANNERS}
    assert {flag for verb in VERBS for flag in verb.flags.split()} <= adjuncts
    tenses = {"any", "be", "modal", *TENSES}
    assert {tense for adverb in lexicon.ADVERBS for tense in adverb.tenses.split()} <= tenses
    assert {spot for adverb in lexicon.ADVERBS for spot in adverb.spots} <= set("fcme")
    assert {verb.auxiliary for verb in VERBS} == {"haben", "sein"}
    assert {noun.gender for noun in NOUNS} == set("mfn")


def test_prepositions_govern_their_cases(german: list[list[str]]) -> None:
    articles = inflected(rf"{ARTICLE_STEMS}|d", "|e|er|en|em|es|as|ie")
    dative = inflected(rf"{ARTICLE_STEMS}|d", "em|er|en")
    accusative = inflected(rf"{ARTICLE_STEMS}|d", "|en|e|es|as|ie")
    genitive = inflected(rf"{ARTICLE_STEMS}|d", "es|er")
    checked = 0
    for sentence in german:
        for word, following in pairwise(sentence):
            for prepositions, forms in (
                (DATIVE_PREPOSITIONS, dative),
                (ACCUSATIVE_PREPOSITIONS, accusative),
                (GENITIVE_PREPOSITIONS, genitive),
            ):
                # "während" may also open a clause, and "ihr" may be a pronoun.
                clause = word == "während" and genitive.fullmatch(following) is None
                if word in prepositions and articles.fullmatch(following) and not clause and following != "ihr":
                    assert forms.fullmatch(following), " ".join(sentence)
                    checked += 1
    assert checked > 1000


def test_contractions(german: list[list[str]]) -> None:
    for sentence in german:
        for pair in pairwise(sentence):
            assert " ".join(pair) not in FORBIDDEN, " ".join(sentence)


def test_subordinate_clauses_end_in_a_finite_verb(german: list[list[str]]) -> None:
    finite = FINITE_AUXILIARIES | {
        verb.prefix + form
        for verb in VERBS
        for preterite in [verb.preterite]
        for form in (
            *(verb.infinitive, verb.infinitive[:-1], verb.infinitive[:-1] + "e", verb.present),
            *(verb.present[:-1] + "st", verb.present[:-1] + "t", preterite, preterite + "n", preterite + "en"),
        )
    }
    checked = 0
    for sentence in german:
        for i, word in enumerate(sentence):
            if word in SUBORDINATORS and (i == 0 or sentence[i - 1] == ","):
                end = next(j for j in range(i, len(sentence)) if sentence[j] in ",.?")
                assert sentence[end - 1] in finite, " ".join(sentence)
                checked += 1
    assert checked > 2000


def test_subordinate_clauses_have_commas(german: list[list[str]]) -> None:
    for sentence in german:
        for before, word in pairwise(sentence):
            if word in SUBORDINATORS - {"als"}:
                assert before == ",", " ".join(sentence)


def test_nouns_agree_with_their_articles(german: list[list[str]]) -> None:
    by_form = {noun.german: noun for noun in NOUNS if noun.german not in {n.plural for n in NOUNS}}
    possible = {"m": {"der", "den", "dem", "des"}, "f": {"die", "der"}, "n": {"das", "dem", "des"}}
    for sentence in german:
        for before, article, word in zip([".", *sentence], sentence, sentence[1:], strict=False):
            # Behind a comma the word is a relative pronoun.
            if before != "," and article in {"der", "die", "das", "den", "dem", "des"} and word in by_form:
                assert article in possible[by_form[word].gender], " ".join(sentence)


def test_weak_nouns_take_their_ending(german: list[list[str]]) -> None:
    weak = {noun.german for noun in NOUNS if noun.gender == "m" and noun.genitive == noun.german + "en"}
    assert {"Student", "Bär", "Prinz"} <= weak
    for sentence in german:
        for article, word in pairwise(sentence):
            if article in {"den", "dem", "einen", "einem", "keinen", "diesem", "jedem", "des"}:
                assert word not in weak, " ".join(sentence)


def test_negation_is_on_both_sides(pairs: list[toy.Pair]) -> None:
    for pair in pairs:
        source, target = set(words_and_marks(pair.source)), set(words_and_marks(pair.target))
        english = bool(source & {"not", "cannot", "never"})
        negative = bool(target & {"nicht", "nie"}) or any(re.fullmatch(r"kein(e[mnrs]?)?", word) for word in target)
        assert english == negative, pair

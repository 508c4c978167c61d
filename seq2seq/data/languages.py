"""Languages, as the names of files and columns show them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

# Each language by its code (ISO 639-1 where it has one), its other codes, its English name, and common misspellings.
_LANGUAGES = """
af afr afrikaans, am amh amharic, ar ara arabic, as asm assamese, ast asturian, az aze azj azerbaijani, ba bak
bashkir, be bel belarusian, bg bul bulgarian, bn ben bengali, bo bod tib tibetan, br bre breton, bs bos bosnian, ca
cat catalan, ceb cebuano, cs ces cze czech cz, cy cym wel welsh, da dan danish, de deu ger german, dz dzo dzongkha, el
ell gre greek, en eng english, eo epo esperanto, es spa spanish, et est estonian, eu eus baq basque, fa fas per pes
persian, fi fin finnish, fil tl tgl filipino tagalog, fo fao faroese, fr fra fre french, fy fry frisian, ga gle irish,
gd gla gaelic, gl glg galician, gu guj gujarati, ha hau hausa, he heb hebrew, hi hin hindi, hr hrv croatian, hsb
sorbian, ht hat haitian, hu hun hungarian, hy hye arm armenian, id ind indonesian, ig ibo igbo, is isl ice icelandic,
it ita italian, iu iku inuktitut, ja jpn japanese jp, jv jav javanese, ka kat geo georgian, kk kaz kazakh, km khm
khmer, kn kan kannada, ko kor korean kr, ku kur kurdish, ky kir kyrgyz, la lat latin, lb ltz luxembourgish, ln lin
lingala, lo lao, lt lit lithuanian, lv lav latvian, lzh, mg mlg malagasy, mi mri mao maori, mk mkd mac macedonian, ml
mal malayalam, mn mon mongolian, mr mar marathi, ms msa may malay, mt mlt maltese, my mya bur burmese, nan, nb nob
bokmal, ne nep nepali, nl nld dut dutch, nn nno nynorsk, no nor norwegian, oc oci occitan, om orm oromo, or ori odia,
pa pan punjabi, pl pol polish, ps pus pashto, pt por portuguese, qu que quechua, ro ron rum romanian, ru rus russian,
rw kin kinyarwanda, sa san sanskrit, sd snd sindhi, si sin sinhala, sk slk slo slovak, sl slv slovenian, sn sna shona,
so som somali, sq sqi alb albanian, sr srp serbian, su sun sundanese, sv swe swedish, sw swa swahili, ta tam tamil, te
tel telugu, tg tgk tajik, th tha thai, ti tir tigrinya, tk tuk turkmen, tr tur turkish, tt tat tatar, ug uig uyghur,
uk ukr ukrainian ua, ur urd urdu, uz uzb uzbek, vi vie vietnamese vn, wo wol wolof, wuu, xh xho xhosa, yi yid yiddish,
yo yor yoruba, yue cantonese, zh zho chi cmn chinese cn, zu zul zulu
"""
CODES = {name: names.split()[0] for names in _LANGUAGES.split(",") for name in names.split()}
WITH_REGION = re.compile(r"(?:.*[^A-Za-z])?([a-z]{2,3})[-_](?:[A-Z]{2}|[A-Z][a-z]{3})")  # pt_BR, zh-Hans, eng_Latn
NEUTRAL_SUFFIXES = re.compile(r"(\.(gz|bz2|xz|zst|txt|text|tok|tc|lc|bpe|clean|raw|norm|dedup))+$", re.IGNORECASE)
ROLES = (("source", "target"), ("src", "tgt"), ("src", "trg"))  # names of columns that show a direction alone
OTHER_SUFFIX = re.compile(r"(?!src|tgt|trg|ref|hyp|out)[a-z]{2,3}")  # as short as a language's
NUMBERS = {"id", "no"}  # Indonesian and Norwegian, but beside two other languages the number of a row


def code_of(name: str) -> str | None:
    """Return the code of the one language that a name contains: "sentence_deu_Latn" → "de"."""
    if (match := WITH_REGION.fullmatch(name)) and match[1] in CODES:
        return CODES[match[1]]
    codes = {CODES[word] for word in name_words(name) if word in CODES}
    return codes.pop() if len(codes) == 1 else None


def languages_of_files(source: str, target: str) -> tuple[str | None, str | None]:
    """Return the languages that two parallel files are named after; None where a name shows none."""
    (stem, first), (other_stem, second) = map(_stem_and_suffix, (source, target))
    found = [suffix if _is_language(suffix) else None for suffix in (first, second)]
    if stem == other_stem and any(found):
        # Beside a known language, another short suffix of the same name is a language too: train.en, train.tlh.
        found = [
            name if OTHER_SUFFIX.fullmatch(name) else seen for name, seen in zip((first, second), found, strict=True)
        ]
    if None in found:
        found = _in_differing_words(source, target) or found
    codes = [code_of(language or "") or language for language in found]
    return (None, None) if codes[0] == codes[1] else (found[0], found[1])


def name_and_language(file: str) -> tuple[str, str | None]:
    """Return the name of a plain file without its language, and its language, if its suffix shows one."""
    stem, suffix = _stem_and_suffix(file)
    return stem, suffix if _is_language(suffix) else None


def is_unknown(language: str | None) -> bool:
    """Whether a language has no name, or only that of its side."""
    return not language or any(language in pair for pair in ROLES)


def language_columns(columns: Sequence[str]) -> list[str]:
    """Return the columns of a table that hold sentences, as far as their names show it, in order."""
    for pair in ROLES:
        if set(pair) <= set(columns):
            return list(pair)
    named = [column for column in columns if code_of(column)]
    return named if len(named) <= 2 else [column for column in named if column.lower() not in NUMBERS]


def _stem_and_suffix(path: str) -> tuple[str, str]:
    name = NEUTRAL_SUFFIXES.sub("", PurePath(path).name)
    stem, dot, suffix = name.rpartition(".")
    return (stem, suffix) if dot else (name, "")


def _is_language(suffix: str) -> bool:
    return suffix.lower() in CODES or (WITH_REGION.fullmatch(suffix) is not None and code_of(suffix) is not None)


def _in_differing_words(source: str, target: str) -> list[str | None] | None:
    """Return the only language among the words of each path that the other lacks: en/train.txt, de/train.txt."""
    counts = Counter(name_words(source)), Counter(name_words(target))
    languages = [[word for word in own - other if word in CODES] for own, other in (counts, counts[::-1])]
    return [words[0] for words in languages] if all(len(words) == 1 for words in languages) else None


def name_words(name: str) -> list[str]:
    """Return the words of the name of a file, folder or column, in lower case."""
    return re.findall(r"[a-z]+", name.lower())

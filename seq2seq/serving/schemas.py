"""The bodies that the API reads, and the answers it gives: pydantic checks the former and documents both."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Layers = list[list[list[list[float]]]]  # layer, head, target subword, source subword

Texts = Annotated[list[str], Field(fail_fast=True)]  # a body may hold 100,000 wrong ones; the first is enough

ENGLISH = "A dog runs in the snow."
GERMAN = "Ein Hund rennt im Schnee."
SPLIT = "Translate sentence by sentence; false: the text is one sentence, which the model's limit may truncate."
SEARCH = "A preset's name, or keys of the search config (GET /v1/search lists them); the rest keeps the server's value."


class Body(BaseModel):
    """What every request may contain; an unknown key is an error, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    api_key: Annotated[str | None, Field(description="The server's API key, if not in the Authorization header.")] = (
        None
    )
    model: Annotated[str | None, Field(description="A name from GET /v1/models; default: its first.")] = None


class SearchBody(Body):
    search: Annotated[
        str | dict[str, Any] | None, Field(description=SEARCH, examples=[{"beam": 5, "n_best": 2}, "greedy"])
    ] = None


class TranslateBody(SearchBody):
    text: Annotated[str | Texts, Field(description="One text, or several.", examples=[ENGLISH])]
    prefix: Annotated[
        str | Texts | None,
        Field(description="How the translation must begin; a list has one entry for each text.", examples=["Ein Hund"]),
    ] = None
    attention: Annotated[bool, Field(description="Return the attention weights, which costs a second pass.")] = False
    split: Annotated[bool, Field(description=SPLIT)] = True


class StreamBody(SearchBody):
    text: Annotated[str, Field(description="One text.", examples=[ENGLISH])]
    prefix: Annotated[str, Field(description="How the translation must begin.", examples=["Ein Hund"])] = ""


class ScoreBody(SearchBody):
    source: Annotated[Texts, Field(description="Source sentences.", examples=[[ENGLISH]])]
    target: Annotated[Texts, Field(description="A translation of each source.", examples=[[GERMAN]])]
    attention: Annotated[bool, Field(description="Return the attention weights.")] = False


class AlternativesBody(SearchBody):
    text: Annotated[str, Field(description="The source sentence.", examples=[ENGLISH])]
    prefix: Annotated[str, Field(description="The translation up to the word.", examples=["Ein Hund"])] = ""
    count: Annotated[int, Field(description="How many alternatives.", ge=1, le=50)] = 6


class AttentionBody(Body):
    text: Annotated[str, Field(description="The source sentence.", examples=[ENGLISH])]
    target: Annotated[str | None, Field(description="Its translation; default: the best one.")] = None
    layer: Annotated[int | None, Field(description="One decoder layer, from 0; default: the mean of all.")] = None
    head: Annotated[int | None, Field(description="One head, from 0; default: the mean of all.")] = None


class ReloadBody(Body):
    """All models, if none is named."""


class LibreTranslateBody(BaseModel):
    """A LibreTranslate request; its numbers may be strings, as forms have no others, and unknown fields are ignored."""

    q: Annotated[str | Texts, Field(description="One text, or several.", examples=["A dog runs."])]
    source: Annotated[str, Field(description="A source language, or auto.", examples=["en"])]
    target: Annotated[str, Field(description="A target language.", examples=["de"])]
    format: Annotated[str, Field(description="text, or html: tags stay, and the text between two is translated.")] = (
        "text"
    )
    alternatives: Annotated[int, Field(description="Further translations of each text.", ge=0, le=10)] = 0
    api_key: Annotated[str | None, Field(description="The server's API key, if it has one.")] = None


class DetectBody(BaseModel):
    q: Annotated[str | Texts, Field(description="The text.", examples=["A dog runs."])]
    api_key: Annotated[str | None, Field(description="The server's API key, if it has one.")] = None


# ----------------------------------------------------------------------------------- answers, for the documentation


class Error(BaseModel):
    error: Annotated[str, Field(examples=["search.beam: 'x' is not a whole number"])]


class Attention(BaseModel):
    weights: Annotated[Layers, Field(description="[layer][head][target subword or the end][source subword]")]


class Translation(BaseModel):
    text: Annotated[str, Field(examples=[GERMAN])]
    score: Annotated[float | None, Field(description="What ranks the translations of a sentence.")]
    log_probability: float | None
    pieces: Annotated[list[str], Field(description="The subwords of the text.")]
    probabilities: Annotated[list[float | None], Field(description="Of each subword, then of the end.")]
    attention: Attention | None = None


class Sentence(BaseModel):
    source: str
    source_pieces: Annotated[list[str], Field(description="As the model read them, with the end mark.")]
    truncated: Annotated[bool, Field(description="The sentence exceeded the model's limit.")]
    translations: Annotated[list[Translation], Field(description="Best first.")]


class Text(BaseModel):
    text: Annotated[str, Field(description="The best translations, joined as the sentences of the input were.")]
    gaps: Annotated[list[str], Field(description="What stands before, between and after the sentences.")]
    sentences: list[Sentence]


class TranslateAnswer(BaseModel):
    model: str
    update: Annotated[int | None, Field(description="The update of the checkpoint that translated.")]
    results: Annotated[list[Text], Field(description="One for each text.")]


class ScoredPair(Translation):
    source_pieces: Annotated[list[str], Field(description="As the model read them, with the end mark.")]
    truncated: Annotated[bool, Field(description="The source exceeded the model's limit.")]


class ScoreAnswer(BaseModel):
    model: str
    update: int | None
    results: Annotated[list[ScoredPair], Field(description="One for each pair.")]


class Alternative(BaseModel):
    piece: Annotated[str, Field(description="The next subword.", examples=["▁läuft"])]
    probability: float | None
    text: Annotated[str, Field(description="The translation that goes on after prefix and subword.")]


class AlternativesAnswer(BaseModel):
    alternatives: Annotated[list[Alternative], Field(description="Likeliest first.")]


class AttentionAnswer(BaseModel):
    source_pieces: list[str]
    pieces: Annotated[list[str], Field(description="The target subwords, without the end.")]
    weights: Annotated[list[list[float]], Field(description="[target subword or the end][source subword]")]
    layers: int
    heads: int


class Model(BaseModel):
    name: str
    source: Annotated[str, Field(description="The source language.", examples=["en"])]
    target: Annotated[str, Field(description="The target language.", examples=["de"])]
    runs: list[str]
    checkpoint: str
    update: int | None
    engine: Annotated[str, Field(examples=["torch"])]
    family: Annotated[str, Field(examples=["transformer"])]
    parameters: int
    max_length: Annotated[int, Field(description="Source subwords that the model reads.")]
    layers: Annotated[int, Field(description="Of the decoder's attention to the source.")]
    heads: int
    scores: Annotated[dict[str, float], Field(description="Validation scores of the checkpoint.")]
    config: Annotated[dict[str, Any], Field(description="The run's config.")]


class ModelsAnswer(BaseModel):
    models: list[Model]
    default: str


class Option(BaseModel):
    name: Annotated[str, Field(examples=["beam"])]
    type: Literal["integer", "number", "string", "array"]
    default: Any
    help: Annotated[str, Field(examples=["hypotheses kept per sentence"])]
    choices: list[str] | None = None
    maximum: Annotated[int | float | None, Field(description="The most that this server accepts.")] = None


class SearchAnswer(BaseModel):
    options: list[Option]
    presets: dict[str, dict[str, Any]]


class Language(BaseModel):
    code: Annotated[str, Field(examples=["en"])]
    name: Annotated[str, Field(examples=["English"])]
    targets: Annotated[list[str], Field(examples=[["de"]])]


class Detected(BaseModel):
    confidence: Annotated[float, Field(description="0 to 100")]
    language: Annotated[str, Field(examples=["en"])]


class LibreTranslateAnswer(BaseModel):
    translatedText: str | list[str]
    detectedLanguage: Detected | list[Detected] | None = None
    alternatives: list[str] | list[list[str]] | None = None


class Health(BaseModel):
    status: Annotated[str, Field(examples=["ok"])]

"""The prompt: type a sentence to translate it; a line that begins with a colon is a command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import yaml

from seq2seq.config.loading import build_config, not_a_choice, search_preset, to_dict
from seq2seq.config.paths import choices
from seq2seq.config.schema import SearchConfig, ServeConfig, TranslateConfig
from seq2seq.data.tokenizer import BEGIN, PAD, UNKNOWN
from seq2seq.inference.translator import Translation, Translator
from seq2seq.utils.console import Screen, pad, width
from seq2seq.utils.errors import UserError, nearest, reason_of
from seq2seq.utils.images import attention_image
from seq2seq.utils.run import Run
from seq2seq.utils.text import one_line

HISTORY = 1000  # lines kept between two sessions
ALTERNATIVES = 6
HELP = {
    ":help": "list the commands",
    ":beam N": "set the beam size, or any other search key: :n_best 3, :length_penalty 0.6, :forbid Hund, Hunde",
    ":search": "show all search keys; :search CHOICE loads a preset: {choices}",
    ":run NAME": "switch to another run, even one still training; NAME,NAME loads an ensemble",
    ":compare NAME": "compare with a second run; without a name, stop comparing",
    ":reload": "load the newest checkpoint of a run still training; :reload last, :reload best",
    ":tokens": "show the subwords of the last translation with their probabilities",
    ":attention": "show the attention weights; :attention 2 selects layer 2, :attention 2 1 its head 1",
    ":attention FILE.png": "save them as an image; layer and head may follow",
    ":alternatives N": "show alternatives for word N with their continuations; the word itself works too",
    ":prefix TEXT": "translate the last sentence again, starting with TEXT",
    ":score TEXT": "score your own translation of the last sentence",
    ":quit": "leave the prompt, like Ctrl-D",
}
COMMANDS = tuple(dict.fromkeys(usage[1:].split()[0] for usage in HELP if usage != ":beam N"))
KEYS = tuple(SearchConfig.__dataclass_fields__)


@dataclass(frozen=True)
class LoadedRuns:
    """One run, or several as an ensemble, loaded from their checkpoints."""

    runs: tuple[Run, ...]
    checkpoints: tuple[Path, ...]
    translator: Translator

    @property
    def name(self) -> str:
        return "+".join(run.folder.name for run in self.runs)

    @property
    def age(self) -> str:
        """The update at which each checkpoint was saved."""
        numbers = [(folder.name, folder.name.rpartition("-")[2]) for folder in self.checkpoints]
        return ", ".join(f"update {int(number):,}" if number.isdecimal() else name for name, number in numbers)


def open_runs(
    name: str | list[str] | None, checkpoint: str | list[str], config: TranslateConfig | ServeConfig
) -> LoadedRuns:
    """Open a run by name, the newest run without a name, or an ensemble for several names, each with its checkpoint."""
    runs = [Run.find(each, config.outputs) for each in (name if isinstance(name, list) else [name])]
    checkpoints = checkpoint if isinstance(checkpoint, list) else [checkpoint] * len(runs)
    read = [read_checkpoint(run, which, config) for run, which in zip(runs, checkpoints, strict=True)]
    translator = Translator.ensemble([translator for _, translator in read], [run.folder.name for run in runs])
    return LoadedRuns(tuple(runs), tuple(folder for folder, _ in read), translator)


def read_checkpoint(run: Run, which: str, config: TranslateConfig | ServeConfig) -> tuple[Path, Translator]:
    """Load a checkpoint; if a training in progress deletes it meanwhile, load its successor."""
    while True:
        folder = run.checkpoint(which)
        try:
            return folder, Translator.from_checkpoint(folder, config.device, config.precision, config.engine)
        except UserError:
            if run.checkpoint(which) == folder:
                raise


def continuations(
    translator: Translator, source: str, prefix: str, search: SearchConfig, count: int
) -> list[tuple[str, float, str]]:
    """Return the likeliest subwords after a prefix, with their probabilities and the texts that continue with them."""
    special = {translator.tokenizer.target.id_to_piece(i) for i in (PAD, UNKNOWN, BEGIN)}
    candidates = translator.alternatives(source, prefix, count + len(special))
    candidates = [(piece, p) for piece, p in candidates if piece not in special][:count]
    prefixes = [(prefix + piece.replace("▁", " ")).strip() for piece, _ in candidates]
    translations = translator.translate([source] * len(candidates), replace(search, n_best=1), prefixes=prefixes)
    return [
        (piece, probability, prefix if piece == "</s>" else best.text)
        for (piece, probability), (best, *_) in zip(candidates, translations, strict=True)
    ]


class Prompt:
    """Answers typed lines; keeps the search settings, the models and the last sentence."""

    def __init__(self, config: TranslateConfig, loaded: LoadedRuns, out: TextIO) -> None:
        self.config, self.search, self.checkpoint = config, config.search, config.checkpoint
        self.models = [loaded]  # two when comparing
        self.screen = Screen(out)
        self.source = ""
        self.last: list[Translation] = []  # each model's best translation of `source`
        self.open = True

    def print_greeting(self) -> None:
        loaded = self.models[0]
        where = f"{loaded.name}, {loaded.age}, on {loaded.translator.device}, beam {self.search.beam}"
        if engine := self.engine():
            where += f", {engine}"
        self.screen.print(f"{where}. Type a sentence; :help lists commands.")

    def engine(self) -> str:
        """Name the engine if the user chose one."""
        return "" if self.config.engine == "torch" else self.models[0].translator.engine_for(self.search)

    def answer(self, line: str) -> None:
        """Answer a line; an error is printed and never ends the prompt."""
        try:
            if line.startswith(":") and not line.startswith("::"):
                self.command(line[1:])
            elif line.strip():
                # Two colons: a sentence that itself begins with a colon.
                self.translate(line[1:] if line.startswith("::") else line)
        except UserError as error:
            for problem in error.problems:
                self.screen.print(f"error: {problem}")
        except Exception as error:
            self.screen.print(f"error: {reason_of(error)}")

    def command(self, line: str) -> None:
        name, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if name.startswith("search."):
            self.change(name.removeprefix("search."), rest.strip())
        elif name in COMMANDS:
            getattr(self, f"_{name}")(line.strip()[len(name) :].strip())
        elif name in KEYS:
            self.change(name, rest.strip())
        else:
            raise UserError(f":{name}: no such command; :help lists them{nearest(name, [*COMMANDS, *KEYS])}")

    # ------------------------------------------------------------------------------------ translating

    def translate(self, source: str, prefix: str = "") -> None:
        self.source, self.last = source.strip(), []
        for model in self.models:
            began = time.perf_counter()
            translations = model.translator.translate([self.source], self.search, prefixes=[prefix], attention=True)[0]
            self.show(model, translations, f", {time.perf_counter() - began:.2f} s")
            self.last.append(translations[0])

    def show(self, model: LoadedRuns, translations: list[Translation], seconds: str = "") -> None:
        """Print ranked translations with their scores, and the model's name when comparing."""
        names = max(width(each.name) for each in self.models) + 2
        label = pad(model.name, names) if len(self.models) > 1 else ""
        for rank, translation in enumerate(translations):
            facts = f"[{translation.score:.3f}{'' if rank else seconds}]"
            self.screen.print(f"{label}{one_line(translation.text)}  {self.screen.dim(facts)}")
        if translations[0].truncated:
            self.screen.print(f"{label}source truncated to {model.translator.max_length} subwords")

    def retranslate(self) -> None:
        """Translate the last sentence again, under the changed settings."""
        if self.source:
            self.translate(self.source)

    def last_translations(self) -> list[tuple[LoadedRuns, Translation]]:
        if not self.last:
            raise UserError("no sentence yet; type one first")
        return list(zip(self.models, self.last, strict=True))

    def _prefix(self, text: str) -> None:
        self.last_translations()
        self.translate(self.source, text)

    def _score(self, text: str) -> None:
        self.last_translations()
        if not text:
            raise UserError("usage: :score TEXT (your translation of the last sentence)")
        self.last = []
        for model in self.models:
            scored = model.translator.score([self.source], [text], self.search, attention=True)[0]
            self.show(model, [scored])
            self.screen.print_tokens(scored.pieces, scored.token_log_probabilities)
            self.last.append(scored)

    # ------------------------------------------------------------------------------------ inspecting

    def _tokens(self, rest: str) -> None:
        for model, translation in self.last_translations():
            if not translation.source_pieces:
                raise UserError("the sentence is empty, so it has no subwords")
            if len(self.models) > 1:
                self.screen.print(model.name)
            self.screen.print_tokens(translation.pieces, translation.token_log_probabilities)

    def _attention(self, rest: str) -> None:
        words = rest.split()
        path = words.pop(0) if words and words[0].lower().endswith(".png") else None
        translation = self.last_translations()[0][1]
        if translation.weights_LNTS is None:
            raise UserError("the sentence is empty, so it has no attention")
        layer, head = layer_and_head(words, translation.weights_LNTS.shape)
        weights_TS, targets = translation.attention(layer, head), [*translation.pieces, "</s>"]
        if path is None:
            self.screen.heat_map(weights_TS, translation.source_pieces, targets)
            return
        try:
            attention_image(weights_TS, translation.source_pieces, targets).save(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        self.screen.print(f"written {path}")

    def _alternatives(self, rest: str) -> None:
        model, translation = self.last_translations()[0]
        words = translation.text.split()
        index = word_index(words, rest)
        prefix = " ".join(words[:index])
        found = continuations(model.translator, self.source, prefix, self.search, ALTERNATIVES)
        column_width = max(width(piece) for piece, _, _ in found) + 2
        for piece, probability, text in found:
            self.screen.print(f"{probability:6.1%}  {pad(piece, column_width)}{self.screen.dim(text)}")

    # -------------------------------------------------------------------------------------- changing

    def change(self, key: str, value: str) -> None:
        """Set a search key; without a value, print it."""
        if key not in KEYS:
            raise UserError(f"search.{key}: no such key{nearest(key, KEYS)}")
        before = getattr(self.search, key)
        if value:
            given = {**to_dict(self.search), key: parse_value(value, isinstance(before, list))}
            self.search = build_config(SearchConfig, given)
        after = getattr(self.search, key)
        self.screen.print(f"{key} {format_value(before)}" + (f" → {format_value(after)}" if after != before else ""))

    def _search(self, rest: str) -> None:
        possible = choices("search")
        key, _, value = rest.partition(" ")
        if key in KEYS and rest not in possible:
            self.change(key, value.strip())
        elif rest and rest not in possible:
            raise UserError(not_a_choice("search", rest, possible))
        else:
            self.search = search_preset(rest) if rest else self.search
            self.screen.print_columns([f"{key} {format_value(value)}" for key, value in to_dict(self.search).items()])

    def _run(self, rest: str) -> None:
        if rest:
            self.models[0] = self._load(rest)
        self.screen.print(f"{self.models[0].name}, {self.models[0].age}")
        if rest:
            self.retranslate()

    def _compare(self, rest: str) -> None:
        self.models = [self.models[0], *([self._load(rest)] if rest else [])]
        self.screen.print(" vs. ".join(f"{model.name}, {model.age}" for model in self.models))
        self.retranslate()

    def _load(self, names: str) -> LoadedRuns:
        return open_runs([name.strip() for name in names.split(",")], self.checkpoint, self.config)

    def _reload(self, rest: str) -> None:
        for index, model in enumerate(self.models):
            newest = tuple(run.checkpoint(rest or self.checkpoint) for run in model.runs)
            if newest == model.checkpoints:
                self.screen.print(f"{model.name}: {model.age}, nothing newer")
                continue
            self.models[index] = open_runs(
                [str(run.folder) for run in model.runs], rest or self.checkpoint, self.config
            )
            self.screen.print(f"{model.name}: {model.age} → {self.models[index].age}")
        self.checkpoint = rest or self.checkpoint
        self.retranslate()

    def _help(self, rest: str) -> None:
        column_width = max(map(len, HELP)) + 2
        self.screen.print("Type a sentence to translate it; the score and the time taken follow in brackets.")
        for usage, purpose in HELP.items():
            self.screen.print(f"  {pad(usage, column_width)}{purpose.format(choices=', '.join(choices('search')))}")

    def _quit(self, rest: str) -> None:
        self.open = False


def layer_and_head(words: list[str], shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Return layer and head, counted from 1 in the words and from 0 in the result; None if not named."""
    indices: list[int | None] = [None, None]
    if len(words) > 2:
        raise UserError(":attention takes a layer and a head, or a FILE.png and both")
    for i, (word, what) in enumerate(zip(words, ("layer", "head"), strict=False)):
        if not word.isdecimal() or not 1 <= int(word) <= shape[i]:
            raise UserError(
                f":attention {word}: no such {what}; possible: 1 to {shape[i]}, or a name that ends in .png"
            )
        indices[i] = int(word) - 1
    return indices[0], indices[1]


def word_index(words: list[str], wanted: str) -> int:
    """Return the index of a word given by its number or spelling; one past the last is the end of the text."""
    if wanted.isdecimal() and 1 <= int(wanted) <= len(words) + 1:
        return int(wanted) - 1
    bare = [word.strip(".,;:!?\"'»«„“”").casefold() for word in words]
    if wanted.casefold() in bare:
        return bare.index(wanted.casefold())
    raise UserError(
        f":alternatives {wanted}: no such word; possible: 1 to {len(words) + 1}, or one of: {' '.join(words)}"
    )


def parse_value(text: str, many: bool) -> object:
    if many:
        return [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def format_value(value: object) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else f"{value}"


# ------------------------------------------------------------------------------------------ the loop


def converse(config: TranslateConfig) -> None:
    """Read and answer until Ctrl-D or :quit."""
    session = Prompt(config, open_runs(config.run, config.checkpoint, config), sys.stdout)
    session.print_greeting()
    with history():
        while session.open:
            try:
                # Invalid UTF-8 arrives as lone surrogates, which tokenizers reject.
                session.answer(input("> ").encode("utf-8", "replace").decode())
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()


@contextmanager
def history() -> Iterator[None]:
    """Enable line editing, completion, and the history of earlier sessions."""
    try:
        import readline
    except ImportError:  # on Windows the terminal provides editing
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "seq2seq" / "history"
    with suppress(OSError):
        readline.read_history_file(path)
    names = sorted(f":{name}" for name in {*COMMANDS, *KEYS})
    readline.set_completer(lambda text, i: ([name for name in names if text and name.startswith(text)] + [None])[i])
    readline.set_completer_delims(" ")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    try:
        yield
    finally:
        readline.set_history_length(HISTORY)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)

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

from seq2seq.config.loading import plain, search_preset, typed
from seq2seq.config.paths import CONFIGS
from seq2seq.config.schema import SearchConfig, TranslateConfig
from seq2seq.data.tokenizer import BEGIN, PAD, UNKNOWN
from seq2seq.inference.translator import Translation, Translator
from seq2seq.utils.console import Screen, padded, width
from seq2seq.utils.errors import UserError, nearest
from seq2seq.utils.images import attention_image
from seq2seq.utils.run import Run

HISTORY = 1000  # lines kept between two sessions
ALTERNATIVES = 6
HELP = {
    ":help": "this",
    ":beam N": "and every other key of the search: :n_best 3, :length_penalty 0.6, :forbid Hund, Hunde",
    ":search": "all keys with their values; :search CHOICE starts from {choices}",
    ":run NAME": "another run, also one that is still training; NAME,NAME is an ensemble",
    ":compare NAME": "a second run beside the first; without a name the first alone again",
    ":reload": "the newest checkpoint of a run that is still training; :reload last, :reload best",
    ":tokens": "the subwords of the last translation and their probabilities",
    ":attention": "where each of them looked; :attention 2 takes layer 2, :attention 2 1 its head 1",
    ":attention FILE.png": "the same as a picture; layer and head may follow",
    ":alternatives N": "what could stand at word N, and how it would go on; instead of N the word itself",
    ":prefix TEXT": "the last sentence again, its translation beginning with TEXT",
    ":score TEXT": "what the model gives your own translation of the last sentence",
    ":quit": "or Ctrl-D",
}
COMMANDS = tuple(dict.fromkeys(usage[1:].split()[0] for usage in HELP if usage != ":beam N"))
KEYS = tuple(SearchConfig.__dataclass_fields__)


@dataclass(frozen=True)
class Opened:
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


def open_runs(name: str | list[str] | None, checkpoint: str, config: TranslateConfig) -> Opened:
    """Open a run by name, the newest run without a name, or an ensemble for several names."""
    runs = [Run.find(each, config.outputs) for each in (name if isinstance(name, list) else [name])]
    read = [read_checkpoint(run, checkpoint, config) for run in runs]
    translator = Translator.ensemble([translator for _, translator in read], [run.folder.name for run in runs])
    return Opened(tuple(runs), tuple(folder for folder, _ in read), translator)


def read_checkpoint(run: Run, which: str, config: TranslateConfig) -> tuple[Path, Translator]:
    """Load a checkpoint; if a training in progress deletes it meanwhile, load its successor."""
    while True:
        folder = run.checkpoint(which)
        try:
            return folder, Translator.from_checkpoint(folder, config.device, config.precision)
        except UserError:
            if run.checkpoint(which) == folder:
                raise


class Prompt:
    """Answers typed lines; keeps the search settings, the models and the last sentence."""

    def __init__(self, config: TranslateConfig, opened: Opened, out: TextIO) -> None:
        self.config, self.search, self.checkpoint = config, config.search, config.checkpoint
        self.models = [opened]  # two when comparing
        self.screen = Screen(out)
        self.source = ""
        self.last: list[Translation] = []  # each model's best translation of `source`
        self.open = True

    def greet(self) -> None:
        opened = self.models[0]
        where = f"{opened.name}, {opened.age}, on {opened.translator.device}, beam {self.search.beam}"
        self.screen.print(f"{where}. Type a sentence; :help lists commands.")

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
            reason = " ".join(str(error).split())[:200]
            self.screen.print(f"error: {reason or type(error).__name__}")

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
            found = model.translator.translate([self.source], self.search, prefixes=[prefix], attention=True)[0]
            self.show(model, found, f", {time.perf_counter() - began:.2f} s")
            self.last.append(found[0])

    def show(self, model: Opened, found: list[Translation], seconds: str = "") -> None:
        """Print ranked translations with their scores, and the model's name when comparing."""
        names = max(width(each.name) for each in self.models) + 2
        label = padded(model.name, names) if len(self.models) > 1 else ""
        for rank, translation in enumerate(found):
            facts = f"[{translation.score:.3f}{'' if rank else seconds}]"
            self.screen.print(f"{label}{' '.join(translation.text.splitlines())}  {self.screen.dim(facts)}")
        if found[0].cut:
            self.screen.print(f"{label}over {model.translator.max_length} subwords; its end was left out")

    def again(self) -> None:
        """Translate the last sentence again, under the changed settings."""
        if self.source:
            self.translate(self.source)

    def shown(self) -> list[tuple[Opened, Translation]]:
        if not self.last:
            raise UserError("no sentence yet; type one first")
        return list(zip(self.models, self.last, strict=True))

    def _prefix(self, text: str) -> None:
        self.shown()
        self.translate(self.source, text)

    def _score(self, text: str) -> None:
        self.shown()
        if not text:
            raise UserError(":score needs your translation of the last sentence: :score TEXT")
        self.last = []
        for model in self.models:
            scored = model.translator.score([self.source], [text], self.search, attention=True)[0]
            self.show(model, [scored])
            self.screen.tokens(scored.pieces, scored.token_log_probabilities)
            self.last.append(scored)

    # ------------------------------------------------------------------------------------ inspecting

    def _tokens(self, rest: str) -> None:
        for model, translation in self.shown():
            if len(self.models) > 1:
                self.screen.print(model.name)
            self.screen.tokens(translation.pieces, translation.token_log_probabilities)

    def _attention(self, rest: str) -> None:
        words = rest.split()
        path = words.pop(0) if words and words[0].lower().endswith(".png") else None
        translation = self.shown()[0][1]
        if translation.weights_LNTS is None:
            raise UserError("an empty sentence; there is nothing to look at")
        layer, head = places(words, translation.weights_LNTS.shape)
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
        model, translation = self.shown()[0]
        words = translation.text.split()
        place = word_place(words, rest)
        prefix = " ".join(words[:place])
        special = {model.translator.tokenizer.target.id_to_piece(i) for i in (PAD, UNKNOWN, BEGIN)}
        likely = model.translator.alternatives(self.source, prefix, ALTERNATIVES + len(special))
        likely = [(piece, p) for piece, p in likely if piece not in special][:ALTERNATIVES]
        begun = [(prefix + piece.replace("▁", " ")).strip() for piece, _ in likely]
        search = replace(self.search, n_best=1)
        found = model.translator.translate([self.source] * len(likely), search, prefixes=begun)
        wide = max(width(piece) for piece, _ in likely) + 2
        for (piece, probability), ranked in zip(likely, found, strict=True):
            text = prefix if piece == "</s>" else ranked[0].text
            self.screen.print(f"{probability:6.1%}  {padded(piece, wide)}{self.screen.dim(text)}")

    # -------------------------------------------------------------------------------------- changing

    def change(self, key: str, value: str) -> None:
        """Set a search key; without a value, print it."""
        if key not in KEYS:
            raise UserError(f"search.{key}: no such key{nearest(key, KEYS)}")
        before = getattr(self.search, key)
        if value:
            given = {**plain(self.search), key: as_value(value, isinstance(before, list))}
            self.search = typed(SearchConfig, given)
        after = getattr(self.search, key)
        self.screen.print(f"{key} {said(before)}" + (f" → {said(after)}" if after != before else ""))

    def _search(self, rest: str) -> None:
        possible = search_choices()
        key, _, value = rest.partition(" ")
        if key in KEYS and rest not in possible:
            self.change(key, value.strip())
        elif rest and rest not in possible:
            raise UserError(
                f"search: {rest!r} is not a choice; possible: {', '.join(possible)}{nearest(rest, possible)}"
            )
        else:
            self.search = search_preset(rest) if rest else self.search
            self.screen.wrapped([f"{key} {said(value)}" for key, value in plain(self.search).items()])

    def _run(self, rest: str) -> None:
        if rest:
            self.models[0] = self._opened(rest)
        self.screen.print(f"{self.models[0].name}, {self.models[0].age}")
        if rest:
            self.again()

    def _compare(self, rest: str) -> None:
        self.models = [self.models[0], *([self._opened(rest)] if rest else [])]
        self.screen.print(" beside ".join(f"{model.name}, {model.age}" for model in self.models))
        self.again()

    def _opened(self, names: str) -> Opened:
        return open_runs([name.strip() for name in names.split(",")], self.checkpoint, self.config)

    def _reload(self, rest: str) -> None:
        for place, model in enumerate(self.models):
            newest = tuple(run.checkpoint(rest or self.checkpoint) for run in model.runs)
            if newest == model.checkpoints:
                self.screen.print(f"{model.name}: {model.age}, nothing newer")
                continue
            self.models[place] = open_runs(
                [str(run.folder) for run in model.runs], rest or self.checkpoint, self.config
            )
            self.screen.print(f"{model.name}: {model.age} → {self.models[place].age}")
        self.checkpoint = rest or self.checkpoint
        self.again()

    def _help(self, rest: str) -> None:
        wide = max(map(len, HELP)) + 2
        self.screen.print("A sentence gets its translation, with its score and the time it took.")
        for usage, purpose in HELP.items():
            self.screen.print(f"  {padded(usage, wide)}{purpose.format(choices=', '.join(search_choices()))}")

    def _quit(self, rest: str) -> None:
        self.open = False


def search_choices() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "search").glob("*.yaml"))


def places(words: list[str], shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Return layer and head, counted from 1 in the words and from 0 in the result; None if not named."""
    found: list[int | None] = [None, None]
    if len(words) > 2:
        raise UserError(":attention takes a layer and a head, or a FILE.png and both")
    for i, (word, what) in enumerate(zip(words, ("layer", "head"), strict=False)):
        if not word.isdecimal() or not 1 <= int(word) <= shape[i]:
            raise UserError(
                f":attention {word}: no such {what}; possible: 1 to {shape[i]}, or a name that ends in .png"
            )
        found[i] = int(word) - 1
    return found[0], found[1]


def word_place(words: list[str], wanted: str) -> int:
    """Return the index of a word given by its number or spelling; one past the last is the end of the text."""
    if wanted.isdecimal() and 1 <= int(wanted) <= len(words) + 1:
        return int(wanted) - 1
    bare = [word.strip(".,;:!?\"'»«„“”").casefold() for word in words]
    if wanted.casefold() in bare:
        return bare.index(wanted.casefold())
    raise UserError(
        f":alternatives {wanted}: no such word; possible: 1 to {len(words) + 1}, or one of: {' '.join(words)}"
    )


def as_value(text: str, many: bool) -> object:
    if many:
        return [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def said(value: object) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else f"{value}"


# ------------------------------------------------------------------------------------------ the loop


def converse(config: TranslateConfig) -> None:
    """Read and answer until Ctrl-D or :quit."""
    session = Prompt(config, open_runs(config.run, config.checkpoint, config), sys.stdout)
    session.greet()
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

"""Laws of the prompt: commands show what the translator returns, and no input ends it."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.config.schema import TranslateConfig
from seq2seq.inference.prompt import COMMANDS, HELP, KEYS, Prompt, open_runs
from seq2seq.inference.translator import Translator
from seq2seq.utils.console import SHADES, width
from seq2seq.utils.images import attention_image, colours
from seq2seq.utils.run import Run
from tests.helpers.configs import FAMILIES
from tests.helpers.runs import saved_run

SHORT = ["model.max_length=16", "data.max_length=15"]
SENTENCE = "Some dogs see cats."


@cache
def translate_config() -> TranslateConfig:
    config: TranslateConfig = load_config("translate", "run=transformer", "device=cpu", "precision=float32")
    return config


class Session:
    """A prompt in a folder with two runs, and its answer to each line."""

    def __init__(self, outputs: Path) -> None:
        self.runs = {family: Run(outputs / family) for family in FAMILIES}
        config = replace(translate_config(), outputs=str(outputs))
        self.prompt = Prompt(config, open_runs(config.run, config.checkpoint, config), io.StringIO())

    def __call__(self, line: str) -> str:
        self.prompt.screen.out = shown = io.StringIO()
        self.prompt.answer(line)
        return shown.getvalue().rstrip("\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("prompt")
    for family in FAMILIES:
        saved_run(outputs / family, family, *SHORT)
    return outputs


@pytest.fixture
def type_(runs: Path, tmp_path: Path) -> Session:
    return Session(Path(shutil.copytree(runs, tmp_path / "outputs")))


def translator(run: Run, which: str = "best") -> Translator:
    return Translator.from_checkpoint(run.checkpoint(which), "cpu", "float32")


@pytest.mark.slow
def test_a_sentence_gets_its_translation(type_: Session) -> None:
    """With its score, ranked, and under the search that was set."""
    model = translator(type_.runs["transformer"])
    for setting, changes in ((":beam 3", {"beam": 3}), (":n_best 2", {"n_best": 2}), (":length_penalty=0.3", {})):
        assert "→" in type_(setting)
        assert all(getattr(type_.prompt.search, key) == value for key, value in changes.items())
        found = model.translate([SENTENCE], type_.prompt.search)[0]
        output = type_(SENTENCE).splitlines()
        assert [line.rpartition("  [")[0] for line in output] == [translation.text for translation in found]
        assert [float(re.findall(r"\[(-?[\d.]+)", line)[-1]) for line in output] == [
            pytest.approx(translation.score, abs=6e-4) for translation in found
        ]
    assert type_("   ") == "" and type_.prompt.source == SENTENCE
    type_("::-)")
    assert type_.prompt.source == ":-)", "two colons are a sentence that begins with one"


def test_every_command_is_explained_and_every_key_can_be_set(type_: Session) -> None:
    output = type_(":help")
    assert all(f":{name}" in output for name in COMMANDS) and all(usage in output for usage in HELP)
    shown = type_(":search")
    for key in KEYS:
        assert f"{key} " in shown and type_(f":search.{key}").startswith(f"{key} ")
    for choice in ("greedy", "sample", "diverse", "mbr", "beam"):
        type_(f":search {choice}")
        assert type_.prompt.search == search_preset(choice)
    assert type_(":forbid cats, two dogs") == "forbid none → cats, two dogs"
    assert type_.prompt.search.forbid == ["cats", "two dogs"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (":bean 3", "did you mean beam?"),
        (":atention", "did you mean attention?"),
        (":search.lenght_penalty 1", "did you mean length_penalty?"),
        (":beam many", "'many' is not a whole number"),
        (":beam 0", "out of range"),
        (":n_best 9", "widen"),
        (":search bean", "did you mean beam?"),
        (":run lstn", "did you mean lstm?"),
        (":reload wrost", "wrost is not a checkpoint"),
        (":tokens", "type one first"),
        (":alternatives 1", "type one first"),
        (":score", "type one first"),
        (":", "no such command"),
        (":beam [", "not a whole number"),
    ],
)
def test_what_is_wrong_is_one_line_and_changes_nothing(line: str, message: str, type_: Session) -> None:
    before = type_.prompt.search, type_.prompt.models
    output = type_(line)
    assert output.startswith("error: ") and message in output and "\n" not in output
    assert (type_.prompt.search, type_.prompt.models) == before and type_.prompt.open


def test_nothing_that_is_typed_ends_the_prompt(type_: Session) -> None:
    chance = random.Random(3)
    type_(SENTENCE)
    words = [
        *COMMANDS,
        *KEYS,
        "search.",
        "0",
        "-1",
        "1e9",
        "nan",
        "lstm",
        "[",
        "\0",
        "🙂",
        "מ",
        "..",
        "x" * 300,
        "=",
        ",",
    ]
    for _ in range(100):
        line = ":" + " ".join(chance.choices(words, k=chance.randint(1, 3)))
        if "quit" not in line and ".png" not in line:
            type_(line)
            type_(":search greedy")  # or the search might have been set to draw a million samples
    assert type_.prompt.open and not type_(":run transformer").startswith("error")
    type_(":quit")
    assert not type_.prompt.open


def test_subwords_are_aligned_above_their_probabilities(type_: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    type_(SENTENCE)
    best = type_.prompt.last[0]
    rows = type_(":tokens").splitlines()
    assert " ".join(rows[0::2]).split() == [*best.pieces, "</s>"] and all(width(row) <= 40 for row in rows)
    assert " ".join(rows[1::2]).split() == [f"{math.exp(log):.2f}" for log in best.token_log_probabilities]
    for above, below in zip(rows[0::2], rows[1::2], strict=True):
        assert [m.start() for m in re.finditer(r"\S+", above)] == [m.start() for m in re.finditer(r"\S+", below)]


def test_a_sentence_that_normalises_to_nothing_has_no_subwords(type_: Session) -> None:
    assert type_("\u200b").startswith("  [0.000")
    assert type_(":tokens") == "error: the sentence is empty, so it has no subwords"
    assert type_(":attention") == "error: the sentence is empty, so it has no attention"


def test_colour_is_for_terminals_that_allow_it(type_: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in type_(SENTENCE) + type_(":tokens") + type_(":attention"), "not into a file"
    config, opened = type_.prompt.config, type_.prompt.models[0]
    for variable, coloured in ((None, True), ("1", False)):
        if variable:
            monkeypatch.setenv("NO_COLOR", variable)
        terminal = Terminal()
        prompt = Prompt(config, opened, terminal)
        prompt.answer(SENTENCE)
        prompt.answer(":tokens")
        prompt.answer(":attention")
        assert ("\x1b[38;5;" in terminal.getvalue()) == coloured


def test_attention_is_that_of_the_translation(type_: Session, tmp_path: Path) -> None:
    """As shades in the terminal and as a picture: a row for each target subword, a column for each source subword."""
    type_(SENTENCE)
    best = type_.prompt.last[0]
    for words, layer, head in (("", None, None), (" 2", 1, None), (" 1 2", 0, 1)):
        weights_TS = best.attention(layer, head)
        rows = [line for line in type_(f":attention{words}").splitlines() if re.match(r" *(\S+) ", line)]
        shades = [["".join(s for limit, s, _ in SHADES if not w < limit)[0] * 2 for w in row] for row in weights_TS]
        names = [*best.pieces, "</s>"]
        left = max(map(len, names))
        wanted = [f"{name:>{left}} {''.join(row)}".rstrip() for name, row in zip(names, shades, strict=True)]
        assert [row.rstrip() for row in rows[-len(names) - 1 : -1]] == wanted
    path = tmp_path / "map.png"
    assert type_(f":attention {path} 1 2") == f"written {path}"
    wanted_image = attention_image(best.attention(0, 1), best.source_pieces, [*best.pieces, "</s>"])
    with Image.open(path) as image:
        assert image.tobytes() == wanted_image.tobytes()
    for line in (
        ":attention 3",
        ":attention 1 9",
        ":attention x",
        ":attention 1 1 1",
        f":attention {tmp_path}/no/a.png",
    ):
        assert type_(line).startswith("error: ")


def test_a_picture_has_the_colours_of_the_weights() -> None:
    """Darker for more; each cell is where its labels cross."""
    steps = colours(torch.linspace(0, 1, 50)).astype(int).sum(-1)
    assert (steps[1:] < steps[:-1]).all()
    weights_TS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    image = attention_image(weights_TS, ["▁a", "▁bc", "</s>"], ["▁x", "日本🙂"])
    columns = [
        x for x in range(image.width) if image.getpixel((x, image.height - 20)) == tuple(colours(torch.ones(())))
    ]
    rows = [y for y in range(image.height) if image.getpixel((columns[0], y)) == tuple(colours(torch.ones(())))]
    assert len(columns) == len(rows) > 10, "one square of the first column, in the last row"


def test_alternatives_are_the_likeliest_at_a_word(type_: Session) -> None:
    type_(":search greedy")
    type_(SENTENCE)
    text = type_.prompt.last[0].text
    model = translator(type_.runs["transformer"])
    words = text.split()
    for wanted, position in (("1", 0), (str(len(words) + 1), len(words))):
        output = type_(f":alternatives {wanted}").splitlines()
        likely = dict(model.alternatives(SENTENCE, " ".join(words[:position]), 20))
        shown = [(line.split()[1], float(line.split("%")[0])) for line in output]
        assert shown and all(likely[piece] == pytest.approx(percent / 100, abs=6e-4) for piece, percent in shown)
        assert [percent for _, percent in shown] == sorted((percent for _, percent in shown), reverse=True)
    assert "no such word" in type_(":alternatives 99")


def test_a_prefix_is_forced_and_a_given_translation_is_scored(type_: Session) -> None:
    model = translator(type_.runs["transformer"])
    type_(SENTENCE)
    found = model.translate([SENTENCE], type_.prompt.search, prefixes=["Some Cats"])[0][0]
    assert type_(":prefix Some Cats").startswith(found.text) and found.text.startswith("Some Cats")
    scored = model.score([SENTENCE], ["Some Cats."], type_.prompt.search)[0]
    first, pieces, probabilities = type_(":score Some Cats.").splitlines()
    assert first == f"Some Cats.  [{scored.score:.3f}]" and pieces.split() == [*scored.pieces, "</s>"]
    assert probabilities.split() == [f"{math.exp(log):.2f}" for log in scored.token_log_probabilities]


def test_compare_shows_two_runs_side_by_side(type_: Session) -> None:
    alone = {name: translator(run).translate([SENTENCE])[0][0].text for name, run in type_.runs.items()}
    assert type_(SENTENCE).startswith(alone["transformer"])
    output = type_(":compare lstm").splitlines()
    assert output[0] == "transformer, update 1 vs. lstm, update 1"
    assert [line.split(maxsplit=1)[0] for line in output[1:]] == ["transformer", "lstm"]
    assert all(alone[line.split()[0]] in line for line in output[1:])
    assert type_(":compare").splitlines()[1].startswith(alone["transformer"])
    assert type_(":run lstm").splitlines()[1].startswith(alone["lstm"])


def test_reload_takes_a_newer_checkpoint(type_: Session) -> None:
    """Of a run that still trains while the prompt is open, even after the old checkpoint was deleted."""
    run = type_.runs["transformer"]
    type_(SENTENCE)
    assert "nothing newer" in type_(":reload")
    old, new = run.checkpoint("best"), run.checkpoints / "update-0001200"
    shutil.copytree(old, new)
    weights = load_file(new / "model.safetensors")
    save_file({name: torch.randn_like(tensor) for name, tensor in weights.items()}, new / "model.safetensors")
    shutil.rmtree(old)
    (run.checkpoints / "index.json").write_text(json.dumps({"last": new.name, "best": new.name}))
    output = type_(":reload").splitlines()
    assert output[0] == "transformer: update 1 → update 1,200"
    assert output[1].startswith(translator(run).translate([SENTENCE])[0][0].text)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_the_prompt_with_its_history(type_: Session, tmp_path: Path) -> None:
    import pty

    state = tmp_path / "state"
    main, other = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    # A session of its own with this terminal: only so does Ctrl-C reach it.
    begin = "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    begin += "runpy.run_module('seq2seq', run_name='__main__')"
    command = [sys.executable, "-c", begin, "translate", f"run={type_.runs['lstm'].folder}"]
    program = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
    )
    os.close(other)
    unread = ""

    def read_until(wanted: str) -> str:
        """What the terminal shows next, up to the wanted text; what follows is left for the next call."""
        nonlocal unread
        while wanted not in unread:
            assert select.select([main], [], [], 120)[0], unread
            unread += os.read(main, 65536).decode("utf-8", "replace")
        seen, _, unread = unread.partition(wanted)
        return seen

    try:
        assert "lstm, update 1, on" in read_until("> ")
        os.write(main, f"{SENTENCE}\n".encode())
        answer = read_until(" s]")
        read_until("> ")
        os.write(main, b"\x1b[A\n")  # the line above
        assert answer.rpartition("[")[0].splitlines()[-1] in read_until(" s]")
        read_until("> ")
        os.write(main, b":nonsense\n")
        assert "no such command" in read_until("> ")
        # Ctrl-C leaves the line, not the prompt; Python misses one that comes just before it waits for a key.
        while "\n" not in unread:
            os.write(main, b"\x03")
            if select.select([main], [], [], 1)[0]:
                unread += os.read(main, 65536).decode("utf-8", "replace")
        read_until("> ")
        os.write(main, b"\x04")
        assert program.wait(timeout=60) == 0
    finally:
        # A prompt left alone would wait for its next line for ever.
        program.kill()
        program.wait()
        os.close(main)
    history = state / "seq2seq" / "history"
    assert history.read_text().splitlines() == [SENTENCE, ":nonsense"]  # one line for what stands twice in a row
    assert history.stat().st_mode & 0o077 == 0

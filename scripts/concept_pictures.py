"""Pictures of the concept pages, from eight small runs, each trained in under half a minute on one core.

Shapes: L layers, N heads, T target and S source subwords, W target and X source words, H head width, K hypotheses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmarks import COLOURS, save
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor, nn

from seq2seq import train
from seq2seq.config.loading import search_preset
from seq2seq.data import toy
from seq2seq.data.toy.corpus import Pair
from seq2seq.decoding.backtrack import Trellis
from seq2seq.decoding.beam import advance, start
from seq2seq.evaluation.alignment import AlignmentErrors, alignment_errors, word_attention
from seq2seq.evaluation.metrics import RESAMPLES, rstrip_lines, sacrebleu_metric
from seq2seq.inference.checkpoint import load_checkpoint
from seq2seq.inference.translator import SPECIALS, Translation, Translator
from seq2seq.model.attention import Attention, Position, alibi, rotate
from seq2seq.utils.run import Run
from seq2seq.utils.text import words_and_marks

SETTINGS = (
    *("data=files", "tokenizer=word", "optimizer.schedule=linear", "optimizer.warmup=60", "training.updates=300"),
    *("training.validate_every=300", "training.tokens=1024", "training.label_smoothing=0"),
    *("precision=float32", "processes=1"),
)
LSTM = ("model=lstm", "model.width=64", "model.embedding=64", "model.dropout=0.1", "optimizer.lr=1e-2")
TRANSFORMER = (
    *("model=transformer", "model.width=64", "model.feed_forward=128", "model.encoder_layers=2"),
    *("model.decoder_layers=2", "model.dropout=0", "model.attention.dropout=0", "optimizer.lr=6e-3"),
)
SCORES = ("additive", "dot", "scaled_dot", "general", "cosine")
POSITIONS = ("sinusoidal", "rotary", "alibi")
RUNS: dict[str, tuple[str, ...]] = {score: (*LSTM, f"model.attention.score={score}") for score in SCORES}
RUNS |= {position: (*TRANSFORMER, f"model.position={position}") for position in POSITIONS}

LONGEST, FREQUENT = 10, 1000  # words and marks of a sentence; how many of each language the corpus has
TEST, VALIDATION = 500, 100  # pairs
DISTANCE = 6  # shown to either side of a position
CHANNELS = 32  # shown of a value
BEAM = 3
SENTENCES = 100  # whose self-attention is averaged
OWN, LIVED, DIED = COLOURS[0], "0.2", "0.65"  # the best hypothesis, others that ended, those that fell out of the beam
HEADS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5")


def draw(outputs: str, images: Path) -> None:
    """Train the runs that `outputs` lacks, and draw every picture."""
    test = write_corpus(Path(outputs, "concepts"))
    translators = {name: open_run(name, outputs) for name in RUNS}
    errors = {name: alignment_of(translators[name], test) for name in RUNS}
    example = max(test[:100], key=lambda pair: (crossings(pair), pair.source))
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
    draw_weighted_sum(translators["dot"], example, images / "weighted-sum.svg")
    draw_scores({name: translators[name] for name in SCORES}, errors, example, images / "scores.svg")
    draw_positions({name: translators[name] for name in POSITIONS}, test, images / "positions.svg")
    draw_families(translators["additive"], translators["sinusoidal"], errors, example, images / "families.svg")
    draw_beam(translators["sinusoidal"], test, images / "beam.svg")
    draw_bootstrap({name: translators[name] for name in ("sinusoidal", "dot")}, test, images / "bootstrap.svg")


# ------------------------------------------------------------------------------------------ corpus and runs


def write_corpus(folder: Path) -> list[Pair]:
    """Write the short sentences of frequent words in the built-in corpus, which a small model learns in seconds."""
    every = {pair.source: pair for pair in chain(*toy.splits().values())}.values()
    short = [pair for pair in every if 3 < len(words_and_marks(pair.source)) <= LONGEST]
    sources, targets = frequent(pair.source for pair in short), frequent(pair.target for pair in short)
    pairs = [p for p in short if sources.issuperset(words_and_marks(p.source))]
    pairs = [p for p in pairs if targets.issuperset(words_and_marks(p.target))]
    test, validation, rest = pairs[:TEST], pairs[TEST : TEST + VALIDATION], pairs[TEST + VALIDATION :]
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in (("test", test), ("validation", validation), ("train", rest)):
        for language, lines in (("en", [p.source for p in members]), ("de", [p.target for p in members])):
            (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return test


def frequent(sentences: Iterable[str]) -> set[str]:
    return {word for word, _ in Counter(chain(*map(words_and_marks, sentences))).most_common(FREQUENT)}


def open_run(name: str, outputs: str) -> Translator:
    """Load a run, after training it if it is missing; its modules stay as the model has them."""
    run, corpus = Run(Path(outputs, f"concepts-{name}")), Path(outputs, "concepts")
    if not run.result.exists():
        files = [f"data.{split}=[{corpus / split}.en,{corpus / split}.de]" for split in ("train", "validation", "test")]
        train(f"name={run.folder.name}", f"outputs={outputs}", *files, *SETTINGS, *RUNS[name])
    config, tokenizer, model = load_checkpoint(run.checkpoint("last"))
    return Translator(model.eval(), tokenizer, torch.device("cpu"), config.model.max_length)


def alignment_of(translator: Translator, test: Sequence[Pair]) -> AlignmentErrors:
    sources, targets = [pair.source for pair in test], [pair.target for pair in test]
    return alignment_errors(translator, sources, targets, [frozenset(pair.links) for pair in test])


def crossings(pair: Pair) -> int:
    """Count the pairs of links whose order differs between the languages."""
    return sum(a[0] < b[0] and a[1] > b[1] for a in pair.links for b in pair.links)


def forced(translator: Translator, pair: Pair) -> Translation:
    """Return the model's attention while it reads the reference."""
    return translator.score([pair.source], [pair.target], attention=True)[0]


@contextmanager
def calls_of(attention: Attention) -> Iterator[list[tuple[Any, ...]]]:
    """Collect query and memory of each call of an attention."""
    calls: list[tuple[Any, ...]] = []
    handle = attention.register_forward_pre_hook(lambda _, given: calls.append(given))
    yield calls
    handle.remove()


# ------------------------------------------------------------------------------------------ attention


def draw_weighted_sum(translator: Translator, pair: Pair, path: Path) -> None:
    """Draw similarity, softmax and weighted sum of the target word that moved furthest, in an LSTM."""
    scored = forced(translator, pair)
    score_TS, value_SD = scores_and_values(translator, pair)
    t, labels = furthest_word(pair), [*words_of(scored.source_pieces[:-1]), "(end)"]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(7, 3.3), sharey=True, layout="constrained", width_ratios=(1, 1, 1.5)
    )
    weight_S = score_TS[t].softmax(-1)
    bars(left, score_TS[t], f"similarity to “{words_of(scored.pieces)[t]}”", "{:.1f}")
    bars(middle, weight_S, "softmax: weights", "{:.2f}")
    left.set_yticks([*range(len(labels)), len(labels) + 0.5], [*labels, "weighted sum"])
    left.get_yticklabels()[-1].set_fontweight("bold")
    draw_values(right, value_SD[:, :CHANNELS], weight_S @ value_SD[:, :CHANNELS])
    left.set_ylim(len(labels) + 1.1, -0.6)
    save(figure, path)


@torch.inference_mode()
def scores_and_values(translator: Translator, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return an LSTM's scores before the softmax, T × S, and the values that it averages."""
    attention = model_of(translator).decoder.attention
    with calls_of(attention) as calls:
        forced(translator, pair)
    query_NTH = torch.cat(
        [attention.scored_query(attention._split(attention.query(query)))[0] for query, _ in calls], 1
    )
    memory = calls[0][1]
    return (query_NTH @ memory.key_RNSH[0].mT)[0], memory.value_RNSH[0, 0]


def model_of(translator: Translator) -> Any:
    """Return the model, whose parts depend on its family."""
    return translator.models.models[0]


def words_of(pieces: Sequence[str]) -> list[str]:
    return [piece.replace("▁", "") for piece in pieces]


def furthest_word(pair: Pair) -> int:
    """Return the target word whose source word lies furthest from the same position."""
    return max(pair.links, key=lambda link: abs(link[0] - link[1]))[1]


def bars(axes: Axes, value_S: Tensor, title: str, form: str) -> None:
    colours = [COLOURS[value == value_S.max()] for value in value_S]
    drawn = axes.barh(range(len(value_S)), value_S.numpy(), color=colours, height=0.7)
    axes.bar_label(drawn, [form.format(value).replace("-", "−") for value in value_S], padding=3, fontsize=8)
    axes.set_title(title, loc="left")
    axes.margins(x=0.3)
    axes.axvline(0, color=LIVED, linewidth=0.8)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_values(axes: Axes, value_SD: Tensor, context_D: Tensor) -> None:
    """Draw each source word's value, and below them their weighted sum."""
    limit = float(value_SD.abs().max())
    for top, rows in ((-0.5, value_SD), (len(value_SD), context_D[None])):
        extent = (0, CHANNELS, top + len(rows), top)
        axes.imshow(rows, cmap="RdBu", vmin=-limit, vmax=limit, extent=extent, aspect="auto", interpolation="none")
    axes.set_xlim(0, CHANNELS)
    axes.set_title(f"values, first {CHANNELS} channels", loc="left")
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_scores(translators: dict[str, Translator], errors: dict[str, AlignmentErrors], pair: Pair, path: Path) -> None:
    """Draw the attention of each score to one sentence, and the true alignment."""
    figure, grid = plt.subplots(2, 3, figsize=(7, 5.2), sharex=True, sharey=True, layout="constrained")
    for axes, (name, translator) in zip(grid.flat, translators.items(), strict=False):
        weights_WX = word_attention(forced(translator, pair))[0, 0]
        heatmap(axes, weights_WX, f"{name}, error rate {errors[name].mean:.2f}", pair)
    true_WX = torch.zeros_like(weights_WX)
    for x, w in pair.links:
        true_WX[w, x] = 1
    heatmap(grid.flat[-1], true_WX, "the grammar's links", pair)
    save(figure, path)


def heatmap(axes: Axes, weights_WX: Tensor, title: str, pair: Pair) -> None:
    """Draw the weights from target words to source words, with a dot on each true link."""
    axes.imshow(weights_WX, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    source, target = zip(*pair.links, strict=True)
    axes.scatter(source, target, s=10, color=COLOURS[1])
    axes.set_title(title, loc="left")
    axes.set_xticks(range(weights_WX.shape[1]), words_and_marks(pair.source), rotation=90)
    axes.set_yticks(range(weights_WX.shape[0]), words_and_marks(pair.target))
    axes.tick_params(length=0)


def draw_families(
    lstm: Translator, transformer: Translator, errors: dict[str, AlignmentErrors], pair: Pair, path: Path
) -> None:
    """Draw an LSTM's attention beside a Transformer's: its best head, and the mean of all."""
    ours, theirs = errors["additive"], errors["sinusoidal"]
    rate, layer, head = theirs.best
    weights_LNWX = word_attention(forced(transformer, pair))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(7, 2.9), sharey=True, layout="constrained")
    heatmap(left, word_attention(forced(lstm, pair))[0, 0], f"LSTM\nerror rate {ours.mean:.2f}", pair)
    title = f"Transformer, layer {layer + 1}, head {head + 1}\nerror rate {rate:.2f}"
    heatmap(middle, weights_LNWX[layer, head], title, pair)
    heatmap(right, weights_LNWX.mean((0, 1)), f"Transformer, mean of heads\nerror rate {theirs.mean:.2f}", pair)
    save(figure, path)


# ------------------------------------------------------------------------------------------ positions


@torch.inference_mode()
def draw_positions(translators: dict[str, Translator], test: Sequence[Pair], path: Path) -> None:
    """Draw what each kind adds to a score by distance, and below it what heads of a trained encoder attend to."""
    figure, grid = plt.subplots(2, 3, figsize=(7, 4.2), sharex=True, layout="constrained")
    distances, sentences = range(-DISTANCE, DISTANCE + 1), test[:SENTENCES]
    for (above, below), (name, translator) in zip(grid.T, translators.items(), strict=True):
        attention = model_of(translator).encoder.layers[0].attention
        for curve, colour in zip(similarity(name, attention), HEADS, strict=False):
            above.plot(distances, curve, color=colour)
        for head, curve in enumerate(weight_by_distance(translator, attention, sentences)):
            below.plot(distances, curve, color=HEADS[head], label=f"head {head + 1}")
        above.set_title(f"{name}\n{'penalty' if name == 'alibi' else 'similarity of two positions'}", loc="left")
        above.set_ylim((None, 0.1) if name == "alibi" else (0, 1.05))
        below.set_title("weight in layer 1", loc="left")
        below.set(xlabel="key position − query position", ylim=(0, 0.5))
    grid[1, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def similarity(kind: str, attention: Attention) -> Tensor:
    """Return curves over the distance: of equal vectors that differ by their positions alone, or ALiBi's penalties."""
    positions, middle = 2 * DISTANCE + 1, DISTANCE
    if kind == "alibi":
        return alibi(attention.heads, positions, positions, 0, torch.zeros(1))[0, :, middle]
    if kind == "rotary":
        vector_PH = rotate(torch.ones(1, 1, positions, attention.key.out_features // attention.heads), 0)[0, 0]
    else:
        width = attention.key.in_features
        vector_PH = Position(kind, width, positions)(torch.zeros(1, positions, width))[0]
    unit_PH = nn.functional.normalize(vector_PH, dim=-1)
    return (unit_PH @ unit_PH[middle])[None]


def weight_by_distance(translator: Translator, attention: Attention, test: Sequence[Pair]) -> Tensor:
    """Return each head's mean weight at each distance: N × distances, over the pairs of positions that have it."""
    total_ND, count_D = torch.zeros(attention.heads, 2 * DISTANCE + 1), torch.zeros(2 * DISTANCE + 1)
    for pair in test:
        with calls_of(attention) as calls:
            translator._start(translator._encode_sources([pair.source]))
        weights_NSS = attention(*calls[0], weights=True).weights_RNTS[0, :, :-1, :-1]  # without the end mark
        for d in range(-DISTANCE, DISTANCE + 1):
            diagonal_NX = weights_NSS.diagonal(d, 1, 2)
            total_ND[:, d + DISTANCE] += diagonal_NX.sum(1)
            count_D[d + DISTANCE] += diagonal_NX.shape[1]
    return total_ND / count_D


# ------------------------------------------------------------------------------------------ beam search


class Node(NamedTuple):
    """A hypothesis of the beam after some step."""

    step: int
    k: int
    word: str
    log_probability: float
    origin: int  # index of the hypothesis it extends


class Finished(NamedTuple):
    """A hypothesis that ended: END extends `origin` at `step`."""

    step: int
    origin: int
    log_probability: float
    score: float


@torch.inference_mode()
def search_tree(translator: Translator, source: str) -> tuple[list[Node], list[Finished]]:
    """Return every hypothesis that was ever in the beam, and the finished ones, best first."""
    search = replace(search_preset("beam"), beam=BEAM)
    state, task = translator._batch(translator._encode_sources([source]), None, search, None)
    trellis = Trellis(BEAM)
    live = start(state, task, search, SPECIALS, 0, None)
    while len(live):
        live = advance(translator.models.step, live, search, SPECIALS, trellis)
    nodes = []
    for step, ((_, last_BK, origin_BK, log_probability_BK),) in enumerate(trellis.steps, 1):
        words = words_of(translator.tokenizer.pieces(last_BK[0].tolist()))
        columns = zip(words, log_probability_BK[0].tolist(), origin_BK[0].tolist(), strict=True)
        nodes += [Node(step, k, *column) for k, column in enumerate(columns)]
    _, score_BK, log_probability_BK, node_BK = trellis.finished[0]
    ends = zip(node_BK[0].tolist(), log_probability_BK[0].tolist(), score_BK[0].tolist(), strict=True)
    return nodes, [Finished(node // BEAM, node % BEAM, *values) for node, *values in ends]


def path_of(end: Finished, nodes: Sequence[Node]) -> set[Node]:
    """Return the hypotheses that a finished one grew through."""
    found, k = set(), end.origin
    for step in range(end.step - 1, 0, -1):
        node = next(node for node in nodes if (node.step, node.k) == (step, k))
        found.add(node)
        k = node.origin
    return found


def draw_beam(translator: Translator, test: Sequence[Pair], path: Path) -> None:
    """Draw a beam, a row for each step and the likeliest hypothesis to the left, where greedy search errs."""
    pair = instructive(translator, test)
    nodes, ends = search_tree(translator, pair.source)
    best, lived = path_of(ends[0], nodes), set().union(*(path_of(end, nodes) for end in ends))
    steps = nodes[-1].step
    figure, axes = plt.subplots(figsize=(7, 0.5 + 0.5 * steps), layout="constrained")
    axes.axis("off")
    axes.set(xlim=(-0.5, BEAM + 0.5), ylim=(steps + 0.9, -0.4))
    axes.set_title(f"source: {pair.source}", loc="left")
    box(axes, (BEAM - 1) / 2, 0, "(begin)", OWN)
    for node in nodes:
        colour = OWN if node in best else LIVED if node in lived else DIED
        edge(axes, node.k, node.step, node, colour)
        box(axes, node.k, node.step, f"{node.word}  {minus(node.log_probability)}", colour)
    y = 0.0
    for end in sorted(ends, key=lambda end: end.step):
        y = max(end.step, y + 0.7)  # several may end at one step
        colour = OWN if end == ends[0] else LIVED
        edge(axes, BEAM, y, end, colour)
        box(axes, BEAM, y, f"(end)  score {minus(end.score)}", colour)
    save(figure, path)


def instructive(translator: Translator, test: Sequence[Pair]) -> Pair:
    """Return a short pair that the beam translates as the reference does, and greedy search does not."""
    greedy, beam = translate(translator, test, 1), translate(translator, test, BEAM)
    rows = zip(test, greedy, beam, strict=True)
    return min(rows, key=lambda row: (row[2] != row[0].target, row[1] == row[0].target, len(row[0].target)))[0]


def translate(translator: Translator, test: Sequence[Pair], beam: int) -> list[str]:
    search = replace(search_preset("beam"), beam=beam)
    return [best[0].text for best in translator.translate([pair.source for pair in test], search)]


def edge(axes: Axes, x: float, y: float, node: Node | Finished, colour: str) -> None:
    """Join a hypothesis at x, y with the one that it extends."""
    origin = (BEAM - 1) / 2 if node.step == 1 else node.origin
    axes.plot((origin, x), (node.step - 1 + 0.2, y - 0.2), color=colour, linewidth=2 if colour == COLOURS[0] else 1)


def minus(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.text(x, y, text, ha="center", va="center", color=colour, bbox={"facecolor": "white", "edgecolor": colour})


# ------------------------------------------------------------------------------------------ BLEU


def draw_bootstrap(translators: dict[str, Translator], test: Sequence[Pair], path: Path) -> None:
    """Draw BLEU of two runs on 1,000 resamples of the test set, and their difference on the same resamples."""
    references = [pair.target for pair in test]
    resampled = {
        name: resampled_bleu(translate(translator, test, 1), references) for name, translator in translators.items()
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained", width_ratios=(3, 2))
    for i, ((name, scores), colour) in enumerate(zip(resampled.items(), COLOURS, strict=True)):
        histogram(left, scores, colour, f"concepts-{name}", i)
    first, second = resampled.values()
    histogram(right, second - first, LIVED, "difference", 0)
    right.axvline(0, color="black", linewidth=1)
    left.set_xlabel("BLEU of a resample")
    right.set_xlabel("difference on the same resample")
    save(figure, path)


def resampled_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Return BLEU of each resample; with equal seeds, those of two systems draw the same sentences."""
    from sacrebleu.significance import _bootstrap_resample

    metric = sacrebleu_metric("bleu")
    statistics = metric._extract_corpus_statistics(rstrip_lines(hypotheses), [references])
    _, scores = _bootstrap_resample(statistics, metric, RESAMPLES)
    return np.array([score.score for score in scores])


def histogram(axes: Axes, values: NDArray[np.float64], colour: str, label: str, row: int) -> None:
    """Draw the resamples, and in a row below them the interval that holds 95 % of them."""
    low, high = np.percentile(values, (2.5, 97.5))
    axes.hist(values, bins=25, color=colour, alpha=0.45, label=f"{label}: {low:.1f} to {high:.1f}")
    axes.plot((low, high), (-8 * row - 6,) * 2, color=colour, linewidth=4, solid_capstyle="butt")
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handlelength=1)

"""Run every GPU path of the program once, in under four minutes, and report which ones fail.

    python scripts/check_gpu.py                 # on the first GPU
    python scripts/check_gpu.py --device cpu    # the same checks on a CPU, to try the script
    python scripts/check_gpu.py --only search   # the checks whose name contains a word

Small models train on the built-in corpus through the program's own commands. In float32, losses and translations must
match those of the CPU; in bfloat16, losses must lie within its tolerance; a resumed run must be bit-identical.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from seq2seq.cli.main import dispatch, load_config
from seq2seq.data.corpus import open_corpora
from seq2seq.model import attention
from seq2seq.model.layout import Packed
from seq2seq.model.packed_attention import attend_masked, attend_packed
from seq2seq.utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES = ("transformer", "lstm")
SMALL = {
    "transformer": ["model.width=64", "model.feed_forward=128", "model.encoder_layers=2", "model.decoder_layers=2"],
    "lstm": ["model.width=64", "model.embedding=64", "model.encoder_layers=2", "model.decoder_layers=2"],
}
EXACT = ["model.dropout=0", "model.attention.dropout=0", "precision=float32"]
UPDATES = 12  # of a short run
LOSS_TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 3e-2}  # relative
PAIRS, SENTENCES = 4000, 200  # of training, to translate
AGREEMENT = 0.98  # of translations: rounding decides between hypotheses of nearly equal score
BFLOAT16_AGREEMENT = 0.6
RULES = {
    "require": ["search.require=[Haus]"],
    "forbid": ["search.forbid=[der,die,das]"],
    "no_repeat": ["search.no_repeat_ngram=2"],
    "coverage": ["search.coverage_penalty=0.2"],
}

Check = Callable[["Program"], str]
CHECKS: dict[str, Check] = {}


class Program:
    """The commands of the program on one device, with all runs in one folder."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder

    def run(self, *arguments: str) -> str:
        """Run a command → what it printed; an error of the program becomes an exception."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            dispatch([*arguments, f"outputs={self.folder}"])
        return out.getvalue()

    def train(self, name: str, family: str, *overrides: str, device: str = "", updates: int = UPDATES) -> list[float]:
        """Train a small model → the loss of every update."""
        self.run(
            "train", f"name={name}", *self.corpus(), f"model={family}", *SMALL[family],
            f"device={device or self.device}", f"training.updates={updates}", f"training.validate_every={updates}",
            "training.log_every=1", "training.tokens=1024", *overrides,
        )  # fmt: skip
        return self.losses(name)

    def losses(self, name: str) -> list[float]:
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]

    def on_cpu(self, name: str, family: str, *overrides: str) -> list[float]:
        """Return the losses of a run on the CPU, trained once."""
        if (self.folder / name / "result.json").exists():
            return self.losses(name)
        return self.train(name, family, *overrides, device="cpu")

    def corpus(self) -> list[str]:
        """Return the overrides for a corpus of a few thousand pairs."""
        files = ",".join(str(self.folder / f"train.{side}") for side in ("en", "de"))
        cache = f"data.cache={self.folder / 'cache'}"
        return ["data=files", f"data.train=[{files}]", cache, "tokenizer.vocabulary=1000"]

    def translate(self, run: str, *overrides: str, device: str = "") -> list[str]:
        """Translate the first sentences of the test set."""
        source, output = self.folder / "source.txt", self.folder / "output.txt"
        output.unlink(missing_ok=True)
        self.run(
            "translate", f"run={run}", f"input={source}", f"output={output}", f"device={device or self.device}",
            "processes=1", *overrides,
        )  # fmt: skip
        return output.read_text(encoding="utf-8").splitlines()

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        index = json.loads((self.folder / run / "checkpoints" / "index.json").read_text())
        return load_file(self.folder / run / "checkpoints" / index["last"] / "model.safetensors")

    def trained(self, family: str) -> str:
        """Train one run for all checks of the search → its name."""
        name = f"trained-{family}"
        if not (self.folder / name / "result.json").exists():
            self.train(name, family, "precision=float32", "optimizer.lr=3e-3", "optimizer.warmup=50", updates=300)
        return name


def check(name: str, each: tuple[str, ...] = FAMILIES) -> Callable[[Callable[[Program, str], str]], None]:
    """Register a check, once for each family or case."""

    def register(function: Callable[[Program, str], str]) -> None:
        for case in each:
            CHECKS[f"{name}, {case}"] = lambda program, case=case: function(program, case)  # type: ignore[misc]

    return register


def compare_losses(found: list[float], expected: list[float], tolerance: float) -> str:
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    assert worst <= tolerance, f"losses differ by {worst:.2g}, over {tolerance:g}: {found} instead of {expected}"
    return f"losses within {worst:.1e} of the CPU's"


def agreement(found: list[str], expected: list[str], at_least: float) -> str:
    assert len(found) == len(expected), f"{len(found)} lines instead of {len(expected)}"
    equal = sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)
    assert equal >= at_least, f"only {equal:.1%} of the translations are equal"
    return f"{equal:.1%} of {len(expected)} translations equal"


# -------------------------------------------------------------------------------------------------- training


@check("training in float32 is the CPU's")
def _(program: Program, family: str) -> str:
    expected = program.on_cpu(f"cpu-{family}", family, *EXACT)
    return compare_losses(program.train(f"float32-{family}", family, *EXACT), expected, LOSS_TOLERANCE["float32"])


@check("training in bfloat16")
def _(program: Program, family: str) -> str:
    expected = program.on_cpu(f"cpu-{family}", family, *EXACT)
    found = program.train(f"bfloat16-{family}", family, *EXACT[:2], "precision=bfloat16")
    return compare_losses(found, expected, LOSS_TOLERANCE["bfloat16"])


@check("packed training in float32 is the CPU's", ("transformer",))
def _(program: Program, family: str) -> str:
    expected = program.on_cpu(f"cpu-{family}", family, *EXACT)
    with patch.object(attention, "attend_packed", wraps=attend_packed) as kernel:
        found = program.train(f"packed-{family}", family, *EXACT, "training.packing=true")
    assert kernel.call_count or program.device == "cpu", "sentences were padded"
    return compare_losses(found, expected, LOSS_TOLERANCE["float32"])


@check("packed attention is masked attention", ("float32", "bfloat16", "float16"))
def _(program: Program, precision: str) -> str:
    """Contexts and gradients: of itself, causal, and of a source."""
    device, tolerance = torch.device(program.device), {"float32": 1e-4}.get(precision, 0.02)
    cases = [([1], [1], False), ([5, 1, 17, 130], [5, 1, 17, 130], True), ([3, 64, 2], [70, 1, 9], False)]
    for (lengths, sources, causal), width in itertools.product(cases, (8, 32, 128)):
        masks = [torch.arange(max(each)) < torch.tensor(each)[:, None] for each in (lengths, sources)]
        queries, keys = (Packed(mask.flatten().nonzero()[:, 0].to(device), *mask.shape).with_bounds() for mask in masks)
        query, key, value = inputs = [
            torch.randn(1, 4, sum(each), width, device=device).div(4).to(getattr(torch, precision)).requires_grad_()
            for each in (lengths, sources, sources)
        ]
        found, expected = (form(query, key, value, queries, keys, causal) for form in (attend_packed, attend_masked))
        gradients = (torch.autograd.grad(context.square().sum(), inputs) for context in (found, expected))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)
    return f"contexts and gradients of {len(cases)} cases and 3 head widths within {tolerance:g}"


@check("training in tf32")
def _(program: Program, family: str) -> str:
    if program.device == "cpu":
        return "not on a CPU"
    expected = program.on_cpu(f"cpu-{family}", family, *EXACT)
    found = program.train(f"tf32-{family}", family, *EXACT[:2], "precision=tf32")
    torch.set_float32_matmul_precision("highest")
    return compare_losses(found, expected, LOSS_TOLERANCE["tf32"])


@check("deterministic=true resumes to the same bits")
def _(program: Program, family: str) -> str:
    options = ("deterministic=true", "training.updates=12", "training.validate_every=6")
    program.train(f"whole-{family}", family, *options)
    program.train(f"parts-{family}", family, *options[:1], "training.updates=6", "training.validate_every=6")
    program.train(f"parts-{family}", family, *options)
    torch.use_deterministic_algorithms(False)
    whole, parts = program.weights(f"whole-{family}"), program.weights(f"parts-{family}")
    different = [key for key, x in whole.items() if not torch.equal(x, parts[key])]
    assert not different, f"{len(different)} of {len(whole)} weights differ, the first is {different[0]}"
    return f"{len(whole)} weights equal"


@check("optimizer", ("muon", "schedule_free", "adafactor"))
def _(program: Program, name: str) -> str:
    losses = [program.train(f"{name}-{family}", family, f"optimizer={name}")[-1] for family in FAMILIES]
    return "last losses " + ", ".join(f"{loss:.2f}" for loss in losses)


OPTIONS = {
    "tokens=auto": ["training.tokens=auto"],
    "accumulation and average=ema": ["training.update_tokens=4000", "training.average=ema"],
    "packing": ["training.packing=true"],
    "r_drop": ["training.r_drop=1"],
    "simcut": ["training.simcut=1"],
    "word and layer dropout": ["model.word_dropout=0.1", "model.layer_dropout=0.1"],
    "subword sampling": ["tokenizer.sampling=0.1", "training.average=last"],
}


@check("training option", tuple(OPTIONS))
def _(program: Program, option: str) -> str:
    name = "option-" + "".join(filter(str.isalnum, option))
    losses = [program.train(f"{name}-{family}", family, *OPTIONS[option])[-1] for family in FAMILIES]
    return "last losses " + ", ".join(f"{loss:.2f}" for loss in losses)


@check("attention score", ("additive", "dot", "general", "cosine"))
def _(program: Program, score: str) -> str:
    options = ["model.attention.heads=2", f"model.attention.score={score}", *EXACT]
    details = []
    for family, position in zip(FAMILIES, ("rotary", "learned"), strict=True):
        expected = program.on_cpu(f"cpu-{score}-{family}", family, *options, f"model.position={position}")
        found = program.train(f"{score}-{family}", family, *options, f"model.position={position}")
        details.append(compare_losses(found, expected, LOSS_TOLERANCE["float32"]))
    return details[0]


@check("out of memory is one line", ("before the first update",))
def _(program: Program, _: str) -> str:
    if program.device == "cpu":
        return "not on a CPU"
    try:
        program.train("too-large", "transformer", f"training.tokens={2**28}")
    except UserError as error:
        assert "training.tokens" in str(error), str(error)
        return " ".join(str(error).split())[:90]
    raise AssertionError("a batch of 268 million tokens was accepted")


@check("one process for each GPU, with torchrun", ("ddp", "fsdp"))
def _(program: Program, parallel: str) -> str:
    count = max(1, torch.cuda.device_count()) if program.device != "cpu" else 2
    words = [
        "train", f"name={parallel}", f"training.parallel={parallel}", *program.corpus(), "model=transformer",
        *SMALL["transformer"], "training.updates=4", "training.validate_every=4",
        f"device={program.device.split(':')[0]}", f"outputs={program.folder}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "-m", "seq2seq", *words]
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    return f"{count} processes"


# ---------------------------------------------------------------------------------------------------- search


@check("translations in float32 are the CPU's")
def _(program: Program, family: str) -> str:
    run, details = program.trained(family), []
    for search in ("greedy", "beam"):
        words = (f"search={search}", "precision=float32")
        expected = program.translate(run, *words, device="cpu")
        details.append(agreement(program.translate(run, *words), expected, AGREEMENT))
    return "; ".join(details)


@check("translations in bfloat16")
def _(program: Program, family: str) -> str:
    run = program.trained(family)
    expected = program.translate(run, "precision=float32")
    return agreement(program.translate(run, "precision=bfloat16"), expected, BFLOAT16_AGREEMENT)


@check("translations in float16")
def _(program: Program, family: str) -> str:
    if program.device == "cpu":
        return "not on a CPU"
    run = program.trained(family)
    expected = program.translate(run, "precision=float32")
    return agreement(program.translate(run, "precision=float16"), expected, BFLOAT16_AGREEMENT)


@check("search.graphs=true translates the same to rounding")
def _(program: Program, family: str) -> str:
    run, details = program.trained(family), []
    for search in ("greedy", "beam"):
        words = (f"search={search}", "precision=float32", "search.tokens=4000")
        expected, graph = program.translate(run, *words), torch.cuda.CUDAGraph
        with patch.object(graph, "replay", autospec=True, side_effect=graph.replay) as replay:
            found = program.translate(run, *words, "search.graphs=true")
        assert replay.call_count or program.device == "cpu", "no graph was replayed"
        details.append(f"{agreement(found, expected, AGREEMENT)}, {replay.call_count} replays")
    return "; ".join(details)


@check("search", ("diverse", "mbr", "sample"))
def _(program: Program, search: str) -> str:
    few = ["search.samples=4"] if search != "diverse" else []
    lines = [program.translate(program.trained(family), f"search={search}", *few) for family in FAMILIES]
    return f"{sum(map(len, lines))} lines"


@check("search with rules", tuple(RULES))
def _(program: Program, rule: str) -> str:
    details = []
    for family in FAMILIES:
        words = (*RULES[rule], "precision=float32")
        expected = program.translate(program.trained(family), *words, device="cpu")
        details.append(agreement(program.translate(program.trained(family), *words), expected, AGREEMENT))
    return "; ".join(details)


@check("deterministic algorithms", ("sample", "beam"))
def _(program: Program, search: str) -> str:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        lines = [program.translate(program.trained("transformer"), f"search={search}") for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    return agreement(lines[0], lines[1], 1.0)


@check("an ensemble of both families", ("beam",))
def _(program: Program, _: str) -> str:
    for family in FAMILIES:
        program.trained(family)
    lines = program.translate("[" + ",".join(f"trained-{family}" for family in FAMILIES) + "]")
    return f"{len(lines)} lines"


@check("command", ("evaluate", "compare", "score", "report"))
def _(program: Program, command: str) -> str:
    runs = [program.trained(family) for family in FAMILIES]
    device, source = f"device={program.device}", program.folder / "source.txt"
    if command == "evaluate":
        return program.run("evaluate", *runs, device, "detail=true").split("BLEU")[1][:14].strip()
    if command == "compare":
        return f"{len(program.run('compare', *runs, device).splitlines())} lines"
    if command == "score":
        lines = program.run("score", f"run={runs[0]}", f"source={source}", f"target={source}", device, "summary=true")
        return lines.strip().splitlines()[-1]
    program.run("report", runs[0], device)
    return f"{(program.folder / runs[0] / 'report.html').stat().st_size:,} bytes"


@check("compile=true")
def _(program: Program, family: str) -> str:
    expected = program.on_cpu(f"cpu-{family}", family, *EXACT)
    found = program.train(f"compiled-{family}", family, *EXACT, "compile=true")
    log = (program.folder / f"compiled-{family}" / "train.log").read_text()
    line = next((line for line in log.splitlines() if line.startswith("compile")), "no line about compile")
    assert "failed" not in line, line
    return f"{compare_losses(found, expected, LOSS_TOLERANCE['float32'])}; {' '.join(line.split())}"


# ------------------------------------------------------------------------------------------------------- all


def outcomes(program: Program, only: str, deadline: float) -> Iterator[tuple[str, str, float]]:
    """Run the chosen checks → name, failure or empty text, seconds; each also prints a line."""
    for name, function in CHECKS.items():
        if not re.search(only, name):
            continue
        began, failure, detail = time.perf_counter(), "", ""
        if began > deadline:
            yield name, "not run: no time left", 0.0
            continue
        try:
            detail = function(program)
        except (Exception, SystemExit) as error:  # whatever a GPU, a compiler or the program raises
            frame = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({frame.filename}:{frame.lineno})"
        seconds = time.perf_counter() - began
        print(f"{'FAILED' if failure else 'ok':6} {seconds:5.1f} s  {name}: {failure or detail}", flush=True)
        yield name, failure, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="device to check (default: cuda)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="run the checks whose name matches")
    parser.add_argument("--minutes", type=float, default=4.0, help="start no check after this time (default: 4)")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU found; --device cpu tries the script without one")
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else "CPU"
    print(f"{device}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    torch.set_num_threads(min(4, torch.get_num_threads()))  # for models so small
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        program = Program(arguments.device, Path(folder))
        write_corpus(program)
        results = list(outcomes(program, arguments.only, began + 60 * arguments.minutes))
    failed = [name for name, failure, _ in results if failure]
    print(f"\n{len(results) - len(failed)} of {len(results)} checks passed in {time.perf_counter() - began:.0f} s")
    raise SystemExit("failed: " + "; ".join(failed) if failed else 0)


def write_corpus(program: Program) -> None:
    """Write pairs of the built-in corpus to files: a corpus to train on, and sentences to translate."""
    config = load_config("train", f"data.cache={program.folder / 'cache'}")
    corpora = open_corpora(config.data, config.seed, lambda _: None)
    assert corpora.test is not None
    for name, lines in (
        ("train.en", corpora.train.source[:PAIRS]),
        ("train.de", corpora.train.target[:PAIRS]),
        ("source.txt", corpora.test.source[:SENTENCES]),
    ):
        (program.folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The service with real models in real processes: answers are the translator's, whatever dies, reloads or closes."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from seq2seq.cli.main import load_config
from seq2seq.config.schema import ServeConfig
from seq2seq.inference.prompt import continuations
from seq2seq.inference.translator import Translation, Translator
from seq2seq.serving.service import (
    Busy,
    Closing,
    Partial,
    SentenceResult,
    Service,
    TimedOut,
    TooLarge,
    UnknownModel,
    WorkerLost,
)
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from tests.helpers.runs import saved_run

pytestmark = pytest.mark.slow
T = TypeVar("T")
WORDS = ["dogs", "cats", "a", "cow", "the", "birds", "see", "some", "and", "Some"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    saved_run(folder / "a", "transformer")
    saved_run(folder / "b", "lstm")
    return folder


def config(outputs: Path, *overrides: str) -> ServeConfig:
    loaded: ServeConfig = load_config(
        "serve", f"outputs={outputs}", "run=[a,b]", "precision=float32", "device=cpu", "processes=2", "search.beam=2",
        "search.length_factor=0", "search.length_extra=6", *overrides,
    )  # fmt: skip
    return loaded


@asynccontextmanager
async def running(configured: ServeConfig) -> AsyncIterator[Service]:
    service = await Service.start(configured)
    try:
        yield service
    finally:
        await service.close()


def served(configured: ServeConfig, work: Callable[[Service], Awaitable[T]]) -> T:
    async def run() -> T:
        async with running(configured) as service:
            return await work(service)

    return asyncio.run(run())


def sentences(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 7))) + "." for _ in range(count)]


def new_checkpoint(run: Run, seed: int, name: str = "update-0000002") -> None:
    """A later checkpoint with other weights, as training saves it."""
    other = saved_run(run.folder.parent / f"{run.folder.name}-{seed}", "transformer", seed=seed)
    shutil.move(other.checkpoint("last"), run.checkpoints / name)
    (run.checkpoints / "index.json").write_text(f'{{"last": "{name}", "best": "{name}"}}')


def expected(folder: Path, texts: list[str], configured: ServeConfig) -> list[str]:
    translator = Translator.from_checkpoint(folder, "cpu", "float32")
    return [ranked[0].text for ranked in translator.translate(texts, configured.search)]


def agree(found: Sequence[Translation], wanted: Sequence[Translation]) -> bool:
    """Equal but for the order in which floats are summed, which depends on the batch."""
    exact = [[(t.text, t.pieces, t.source_pieces, t.truncated) for t in ranked] for ranked in (found, wanted)]
    numbers = [[(t.score, t.log_probability, *t.token_log_probabilities) for t in ranked] for ranked in (found, wanted)]
    near = [one == pytest.approx(other, abs=1e-4) for one, other in zip(*numbers, strict=True)]
    return exact[0] == exact[1] and all(near)


def test_every_answer_is_the_translators(outputs: Path) -> None:
    """Texts of both models, streams, scores and alternatives at the same time, in batches with one another."""
    configured = config(outputs, "search.n_best=2")
    texts = sentences(8)

    async def streamed(service: Service, text: str) -> tuple[list[Partial], list[SentenceResult]]:
        events = [event async for event in service.stream(text, model="b", prefix="Dogs")]
        return [e for e in events if isinstance(e, Partial)], [e for e in events if isinstance(e, SentenceResult)]

    async def work(service: Service) -> list[Any]:
        assert list(service.models) == ["a", "b"]
        return await asyncio.gather(
            *(service.translate([text]) for text in texts),
            service.translate(texts, model="b", attention=True, prefixes=["Cats", *[""] * 7]),
            service.score(texts[:3], texts[3:6], model="b", attention=True),
            service.alternatives(texts[0], "Dogs", count=3),
            streamed(service, "\n".join(texts)),
        )

    *alone, together, scores, alternatives, (partials, streams) = served(configured, work)
    a, b = (Translator.load(name, outputs=str(outputs), device="cpu", precision="float32") for name in "ab")
    for text, (result,) in zip(texts, alone, strict=True):
        (sentence,) = result.sentences
        assert (sentence.source, sentence.update) == (text, 1)
        assert agree(sentence.translations, a.translate([text], configured.search)[0])
    wanted = b.translate(texts, configured.search, prefixes=["Cats", *[""] * 7], attention=True)
    for result, ranked in zip(together, wanted, strict=True):
        assert agree(result.sentences[0].translations, ranked) and result.update == 1
        given = result.sentences[0].translations[0].attention()
        assert given.allclose(ranked[0].attention(), atol=1e-5)
    assert agree(scores, b.score(texts[:3], texts[3:6], configured.search))
    assert scores[0].attention().shape == (len(scores[0].pieces) + 1, len(scores[0].source_pieces))
    wanted_alternatives = continuations(a, texts[0], "Dogs", configured.search, 3)
    assert [one[::2] for one in alternatives] == [one[::2] for one in wanted_alternatives]
    assert [one.probability for one in alternatives] == pytest.approx([p for _, p, _ in wanted_alternatives], abs=1e-5)
    grown = b.translate(texts, configured.search, prefixes=["Dogs", *[""] * 7])
    assert all(agree(result.translations, ranked) for result, ranked in zip(streams, grown, strict=True))
    assert [result.source for result in streams] == texts
    assert all(0 <= partial.sentence < 8 for partial in partials)


def test_texts_keep_their_lines_and_spaces(outputs: Path) -> None:
    configured = config(outputs, "run=a")
    text = "\n  Some dogs. A cow see.\r\n\r\n\tthe birds\ud800 \n"

    async def work(service: Service) -> list[Any]:
        return await service.translate([text, "", " \n", text], prefixes=["Dogs", "Dogs", "", ""], split=True)

    first, empty, blank, second = served(configured, work)
    parts = ["Some dogs.", "A cow see.", "the birds?"]
    assert [s.source for s in first.sentences] == parts and first.gaps == ("\n  ", " ", "\r\n\r\n\t", " \n")
    outputs_ = expected(outputs / "a/checkpoints/update-0000001", parts, configured)
    assert second.text == "".join(gap + part for gap, part in zip(second.gaps, [*outputs_, ""], strict=True))
    assert first.text.startswith("\n  Dogs")
    assert [s.translations[0].text for s in first.sentences[1:]] == outputs_[1:]  # the prefix is that of the first
    assert (empty.text, empty.sentences, blank.text, blank.sentences) == ("", (), " \n", ())


def test_killed_workers_cost_no_request_its_answer(outputs: Path) -> None:
    """Each worker is killed in the middle of a batch, one after the other; the counters say so."""
    configured = config(outputs, "run=a", "batch_tokens=100")
    texts = sentences(80)

    async def work(service: Service) -> list[Any]:
        results: list[Any] = []
        for restarts, worker in enumerate(service.pool.workers, 1):
            parts = ["\n".join(texts[i : i + 10]) for i in range(0, 80, 10)]
            requests = [asyncio.ensure_future(service.translate([part])) for part in parts]
            while worker in service.pool.idle:
                await asyncio.sleep(0)
            os.kill(worker.process.pid, signal.SIGKILL)
            results = [result for (result,) in await asyncio.gather(*requests)]
            while service.stats().restarts < restarts:
                service.pool.replace_dead()  # also if it had just ended its last batch
                await asyncio.sleep(0.05)
        assert service.stats().workers == 2
        return results

    results = served(configured, work)
    found = [s.translations[0].text for result in results for s in result.sentences]
    assert found == expected(outputs / "a/checkpoints/update-0000001", texts, configured)


def test_a_batch_that_kills_two_workers_fails_alone(outputs: Path) -> None:
    """The requests of that batch get an error; those after it are answered."""
    configured = config(outputs, "run=a", "processes=1")

    async def work(service: Service) -> None:
        (worker,) = service.pool.workers
        lost = asyncio.ensure_future(service.translate(["Dogs. " * 400]))
        for _ in range(2):
            while not service.stats().running_sentences:
                await asyncio.sleep(0.005)
            os.kill(worker.process.pid, signal.SIGKILL)
            while service.stats().running_sentences:
                await asyncio.sleep(0.005)
        with pytest.raises(WorkerLost):
            await lost
        assert (await service.translate(["dogs"]))[0].sentences

    served(configured, work)


def test_a_newer_checkpoint_is_loaded_while_requests_go_on(outputs: Path, tmp_path: Path) -> None:
    """Each answer is that of the update it names; after the reload all come from the new one, the old may be gone."""
    shutil.copytree(outputs / "a", tmp_path / "a")
    run, configured, texts = Run(tmp_path / "a"), config(tmp_path, "run=a"), sentences(4)

    async def work(service: Service) -> list[Any]:
        results: list[Any] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                results.extend(await service.translate(texts))

        clients = [asyncio.ensure_future(client()) for _ in range(3)]
        await asyncio.sleep(0.3)
        assert [info.update for info in await service.reload()] == [1]
        new_checkpoint(run, seed=1)
        shutil.copytree(run.checkpoints / "update-0000001", tmp_path / "old")
        shutil.rmtree(run.checkpoints / "update-0000001")
        assert [info.update for info in await service.reload("a")] == [2]
        stop.set()
        await asyncio.gather(*clients)
        new_checkpoint(run, seed=3, name="update-0000003")  # not what a new worker shall load
        for worker in service.pool.workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        await service.translate(texts * 4)
        while service.stats().restarts < 2:
            await asyncio.sleep(0.05)
        after = await service.translate(texts * 4)
        assert {result.update for result in after} == {2}
        assert service.stats().reloads == 1 and service.models["a"].update == 2
        return [*results, *after]

    results = served(configured, work)
    assert {result.update for result in results} == {1, 2}
    by_update = {
        1: expected(tmp_path / "old", texts, configured),
        2: expected(run.checkpoints / "update-0000002", texts, configured),
    }
    assert by_update[1] != by_update[2]
    for result in results:
        (sentence,) = result.sentences
        assert result.text == by_update[result.update][texts.index(sentence.source)]


def test_a_broken_checkpoint_leaves_the_former_one(
    outputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is one line, for who asks and, once, in the log of a server that looks by itself."""
    shutil.copytree(outputs / "a", tmp_path / "a")
    run, configured = Run(tmp_path / "a"), config(tmp_path, "run=a", "reload_s=0.05")

    async def work(service: Service) -> None:
        before = await service.translate(["Some dogs."])
        new_checkpoint(run, seed=1)
        (run.checkpoint("last") / "model.safetensors").write_bytes(b"no weights")
        while not caplog.messages:
            await asyncio.sleep(0.02)
        with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged"):
            await service.reload()
        await asyncio.sleep(0.3)
        assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
        assert (await service.translate(["Some dogs."]))[0].text == before[0].text and service.models["a"].update == 1
        new_checkpoint(run, seed=2, name="update-0000003")
        while service.models["a"].update != 3:
            await asyncio.sleep(0.02)

    served(configured, work)


def test_closing_answers_what_was_accepted_and_refuses_the_rest(outputs: Path) -> None:
    async def run() -> None:
        service = await Service.start(config(outputs, "run=a"))
        processes = [worker.process for worker in service.pool.workers]
        accepted = [asyncio.ensure_future(service.translate(["Dogs see cats. " * 5])) for _ in range(10)]
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(service.close())
        await asyncio.sleep(0)
        with pytest.raises(Closing):
            await service.translate(["dogs"])
        results = await asyncio.gather(*accepted)
        await closing
        assert all(len(result.sentences) == 5 for (result,) in results)
        assert [process.exitcode for process in processes] == [0, 0]

    asyncio.run(run())


def test_closing_takes_no_longer_than_it_may(outputs: Path) -> None:
    """What is not answered by then gets an error, and busy workers are killed."""

    async def run() -> None:
        service = await Service.start(config(outputs, "run=a", "shutdown_s=0.1", "max_sentences=100000"))
        accepted = asyncio.ensure_future(service.translate(["Dogs see cats. " * 5000]))
        while not service.stats().running_sentences:
            await asyncio.sleep(0.01)
        await service.close()
        with pytest.raises(Closing):
            await accepted
        assert not any(worker.alive for worker in service.pool.workers)

    asyncio.run(run())


def test_limits_are_named_and_callers_who_leave_free_the_queue(outputs: Path) -> None:
    configured = config(
        outputs, "run=a", "processes=1", "max_characters=20000", "max_queue_characters=30000", "max_sentences=900"
    )

    async def work(service: Service) -> None:
        for text, key in (("d" * 20001, "max_characters"), ("Dogs. " * 901, "max_sentences")):
            with pytest.raises(TooLarge, match=key):
                await service.translate([text])
        with pytest.raises(UnknownModel, match=r"no model 'ab'; possible: a; did you mean a\?"):
            await service.translate(["dogs"], model="ab")
        with pytest.raises(UserError, match="prefix: 1 prefixes for 2 texts"):
            await service.translate(["dogs", "cats"], prefixes=[""])
        with pytest.raises(UserError, match=r"search\.require"):
            await service.translate(["dogs"], search=replace(configured.search, require=["日"]))
        long = "Dogs see cats and birds. " * 700
        clients = [asyncio.ensure_future(service.translate([long])) for _ in range(3)]
        await asyncio.wait(clients, return_when=asyncio.FIRST_EXCEPTION)
        refused = [client.exception() for client in clients if client.done()]
        assert all(isinstance(error, Busy) and 1 <= error.retry_after <= 600 for error in refused) and refused
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        stats = service.stats()
        assert (stats.queued_sentences, stats.queued_characters) == (0, 0) and not service.requests
        assert (await service.translate(["dogs"]))[0].sentences

    served(configured, work)


def test_a_request_over_its_time_ends(outputs: Path) -> None:
    async def work(service: Service) -> None:
        with pytest.raises(TimedOut, match="timeout_s"):
            await service.translate(["Dogs see cats. " * 200])
        with pytest.raises(TimedOut):
            async for _ in service.stream("Dogs see cats. " * 200):
                pass
        assert service.stats().queued_sentences == 0

    served(config(outputs, "run=a", "processes=1", "timeout_s=0.001"), work)


def test_models_that_cannot_be_loaded_are_one_line(outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs / "a", tmp_path / "a")
    (tmp_path / "a/checkpoints/update-0000001/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged"):
        asyncio.run(Service.start(config(tmp_path, "run=a")))


def test_an_ensemble_is_one_model(outputs: Path) -> None:
    async def work(service: Service) -> Any:
        (info,) = service.models.values()
        assert (info.name, info.runs, info.update) == ("a+b", ("a", "b"), 1)
        return await service.translate(["Some dogs."])

    configured = config(outputs, "ensemble=true", "processes=1")
    ((sentence,),) = [result.sentences for result in served(configured, work)]
    both = Translator.load(["a", "b"], outputs=str(outputs), device="cpu", precision="float32")
    assert agree(sentence.translations, both.translate(["Some dogs."], configured.search)[0])

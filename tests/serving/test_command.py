"""What the command prints about itself."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seq2seq.cli.commands.serve import serve, url
from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset, to_dict
from seq2seq.serving.middleware import is_loopback
from seq2seq.serving.workers import Models, ModelSpec
from seq2seq.utils.errors import UserError
from tests.helpers.runs import saved_run
from tests.helpers.serving import serve_config

HOSTS = [("127.0.0.1", 1), ("localhost", 1), ("::1", 1), ("0.0.0.0", 0), ("a.b", 0)]


@pytest.mark.parametrize(("host", "loopback"), HOSTS)
def test_only_loopback_addresses_need_no_key(host: str, loopback: int) -> None:
    assert is_loopback(host) == bool(loopback)


def test_the_address_can_be_opened_in_a_browser() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert (
            url("127.0.0.1", listener) == f"http://127.0.0.1:{port}" and url("::1", listener) == f"http://[::1]:{port}"
        )


def test_without_its_packages_one_line_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "seq2seq.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'seq2seq\[serve\]'"):
        serve(load_config("serve"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ensemble=true", "ensemble: an ensemble needs several runs"),
        ("max_characters=2000000", "max_characters: 2000000 characters never fit"),
        ("port=70000", "port: 70000 is out of range"),
    ],
)
def test_contradictions_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("serve", override)
    assert error.value.problems[0].startswith(message)


def test_a_server_without_the_shortlists_of_its_search_does_not_start(tmp_path: Path) -> None:
    """It loads them at its start: no request is the first to miss them."""
    run, search = saved_run(tmp_path / "any", "lstm").folder, to_dict(replace(search_preset("greedy"), shortlist=3))
    config = serve_config(run=str(run), device="cpu", precision="float32", search=search)
    with pytest.raises(UserError, match=r"^search\.shortlist: .* make one with seq2seq shortlist run=NAME"):
        Models(config).load(ModelSpec("any", (str(run),)))
    models = Models(serve_config(run=str(run), device="cpu", precision="float32"))
    assert models.load(ModelSpec("any", (str(run),))).info.family

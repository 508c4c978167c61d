"""What the command prints about itself."""

from __future__ import annotations

import socket
import sys

import pytest

from seq2seq.cli.commands.serve import serve, url
from seq2seq.cli.main import load_config
from seq2seq.serving.middleware import is_loopback
from seq2seq.utils.errors import UserError

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

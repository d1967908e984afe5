"""Untrusted JSON is read strictly, or refused in a few words."""

import os
import re
import socket

import pytest

from jexit import untrusted
from jexit.errors import MissingFile, UserError
from jexit.untrusted import parse_json, read_json, read_object


def test_what_readers_differ_about_is_refused(deadline):
    for data, why in (
        (b'{"a": 1', "line 1: Expecting ',' delimiter"),
        (b"{\n3}", "line 2: "),
        (b"", "line 1: Expecting value"),
        (b'"\xff"', "not UTF-8"),
        ("[1]".encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "nested too deeply"),
        (b"[1e999]", "the number 1e999 is not finite"),
        (b"-1e999", "the number -1e999 is not finite"),
        (b"1" + b"0" * 9000, "the number 10000000000000000000 is not finite"),
        (b"NaN", "the number NaN is not finite"),
        (b"[-Infinity]", "the number -Infinity is not finite"),
        (b'{"b": {"a": 1, "c": 2, "a": 1}}', "duplicate key 'a'"),
        # Among many keys it is found in linear time.
        (b"{" + b", ".join(b'"%d": 0' % (n % 199_999) for n in range(200_000)) + b"}", "key '0'"),
    ):
        with pytest.raises(ValueError, match=re.escape(why)) as caught:
            parse_json(data)
        assert len(str(caught.value)) < 100 and "\n" not in str(caught.value)
    for data, value in (
        (b'\xef\xbb\xbf{"a": "\xc3\xa4"}', {"a": "ä"}),
        (b"[1e308, -0.5, 7, null, true]", [1e308, -0.5, 7, None, True]),
        (b"[1000000000000000019884624838656]", [1000000000000000019884624838656]),
        (b"[" * 3 + b"]" * 3, [[[]]]),
    ):
        assert parse_json(data) == value
    parse_json(b"[" * 64 + b"]" * 64)


def test_what_is_no_file_is_not_waited_for(tmp_path, deadline):
    os.mkfifo(tmp_path / "a named pipe")
    (tmp_path / "a directory").mkdir()
    (tmp_path / "a device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a socket"))
        for kind in ("a named pipe", "a directory", "a device", "a socket"):
            words = "cannot be read" if kind == "a socket" else f"is {kind}, not a file"
            with pytest.raises(UserError, match=rf"{kind} {words}.*; copy it again"):
                read_json(tmp_path / kind, "copy it again")


def test_a_file_is_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_BYTES", 1 << 20)
    path = tmp_path / "a.json"
    path.write_bytes(b" " * (1 << 20))
    with pytest.raises(ValueError, match="Expecting value"):
        read_json(path, "copy it again")
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=r"a\.json is larger than 1 MiB, the most .*; copy it"):
        read_json(path, "copy it again")


def test_an_object_is_asked_for(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json", "") == [1]
    with pytest.raises(ValueError, match=r"a\.json contains a JSON list, not an object; copy it"):
        read_object(tmp_path / "a.json", "copy it again")
    with pytest.raises(MissingFile, match=r"none\.json does not exist; copy it again"):
        read_object(tmp_path / "none.json", "copy it again")

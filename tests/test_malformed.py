"""A sample of the malformed inputs of tests/tools/malformed.py; the script itself runs them all."""

import os

import malformed
import pytest


def test_malformed_inputs_are_accepted_or_refused_and_leave_nothing(tmp_path):
    counts, faults = malformed.campaign(tmp_path, seed=1, count=40)
    assert sum(counts.values()) == 40 and not faults, "\n".join(faults)


@pytest.mark.parametrize("name, expected", [
    ("exploded", "payload"), ("left.tmp", "left-over"), ("in2", "left-over"), (None, "left-over")])
def test_the_campaign_sees_what_is_left(tmp_path, monkeypatch, name, expected):
    def bad(argv):
        if name:
            os.mkdir(name)
        if name == "in2":
            raise ValueError

    monkeypatch.setitem(malformed.ROUTES, "bad", (bad, [], "IN.out"))
    assert malformed.judge("bad", "any", {"in": b""}, tmp_path, tmp_path / "case")[0] == expected


def stop(error):
    raise error


def hang(_):
    while True:
        pass


@pytest.mark.parametrize("how, argument, verdict, expected", [
    (stop, ValueError("what"), "refuse", "refused"), (stop, FileNotFoundError("no file"), "any", "refused"),
    (stop, ValueError("what"), "accept", "misjudged"), (stop, SystemExit(9), "any", "crash"),
    (os.mkdir, "in.out", "refuse", "misjudged"), (os.mkdir, "in.out", "accept", "accepted"), (hang, "", "any", "hang"),
])
def test_the_campaign_tells_how_a_case_ended(tmp_path, monkeypatch, how, argument, verdict, expected):
    monkeypatch.setattr(malformed, "LIMIT", 1)
    monkeypatch.setattr(malformed, "check_output", lambda path: None)
    monkeypatch.setitem(malformed.ROUTES, "how", (lambda argv: how(argument), [], "IN.out"))
    assert malformed.judge("how", verdict, {"in": b""}, tmp_path, tmp_path / "case")[0] == expected

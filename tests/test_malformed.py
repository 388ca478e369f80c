"""A sample of the malformed inputs of tests/tools/malformed.py; the script itself runs them all."""

import os

import malformed
from prepare_data import check


def test_malformed_inputs_end_in_a_sentence_or_an_error_of_python_and_leave_nothing(tmp_path):
    counts, faults, _, _ = malformed.campaign(tmp_path, seed=1, count=40, as_user=False)
    assert sum(counts.values()) == 40 and not faults, "\n".join(faults)


def test_the_campaign_sees_the_faults_it_looks_for(tmp_path, monkeypatch):
    def bad(argv):
        if argv[0] == "half":
            return
        (tmp_path / "case" / {"x": "canary", "left": "y.tmp"}.get(argv[0], "in2")).mkdir()
        if argv[0] == "error":
            raise ValueError

    faults = {"x": "payload", "left": "left-over", "error": "left-over", "half": "left-over"}
    for name, expected in faults.items():
        monkeypatch.setitem(malformed.ROUTES, "bad", (bad, [name], "IN.out"))
        case = (0, "", "refuse", "bad", "", {"in": b""})
        (tmp_path / "case").exists() and (tmp_path / "case").rename(tmp_path / f"before {name}")
        assert malformed.judge(case, tmp_path, tmp_path / "case")[0] == expected


def refuse(sentence):
    check(False, sentence)


def stop(error):
    raise error


def hang(_):
    while True:
        pass


def test_the_campaign_tells_sentences_errors_and_misjudged_cases_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(malformed, "LIMIT", 1)
    monkeypatch.setattr(malformed, "check_output", lambda path: None)
    for i, (how, argument, verdict, expected) in enumerate([
        (refuse, "no file", "refuse", "sentence"), (refuse, "no file", "accept", "misjudged"),
        (stop, FileNotFoundError("no file"), "refuse", "sentence"), (refuse, "two\nlines", "any", "error"),
        (stop, ValueError("what"), "refuse", "error"), (stop, ValueError("what"), "accept", "misjudged"),
        (stop, SystemExit(9), "any", "crash"), (os.mkdir, "in.out", "refuse", "misjudged"),
        (os.mkdir, "in.out", "any", "accepted"), (hang, "", "any", "hang"),
    ]):
        main = lambda argv, how=how, argument=argument: how(argument)  # noqa: E731
        monkeypatch.setitem(malformed.ROUTES, "how", (main, [], "IN.out"))
        case = (0, "", verdict, "how", "", {"in": b""})
        assert malformed.judge(case, tmp_path, tmp_path / str(i))[0] == expected

"""A sample of the malformed inputs of tests/tools/malformed.py; the script itself runs them all."""

import os

import malformed


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


def test_the_campaign_tells_sentences_errors_and_misjudged_cases_apart(tmp_path, monkeypatch):
    def leave(how):
        def main(argv):
            if how == "done":
                os.mkdir("in.out")
            elif how != "hang":
                raise how
            while how == "hang":
                pass
        return main

    monkeypatch.setattr(malformed, "LIMIT", 1)
    monkeypatch.setattr(malformed, "check_output", lambda path: None)
    for i, (how, verdict, expected) in enumerate([
        (SystemExit("no file"), "refuse", "sentence"), (SystemExit("no file"), "accept", "misjudged"),
        (ValueError("what"), "refuse", "error"), (ValueError("what"), "accept", "misjudged"),
        (SystemExit("two\nlines"), "any", "error"), (SystemExit(9), "any", "crash"),
        ("done", "refuse", "misjudged"), ("done", "any", "accepted"), ("hang", "any", "hang"),
    ]):
        monkeypatch.setitem(malformed.ROUTES, "how", (leave(how), [], "IN.out"))
        case = (0, "", verdict, "how", "", {"in": b""})
        assert malformed.judge(case, tmp_path, tmp_path / str(i))[0] == expected

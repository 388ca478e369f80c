"""A sample of the malformed inputs of tests/malformed.py; the script itself runs them all."""

import malformed


def test_malformed_inputs_are_refused_in_a_sentence_and_leave_nothing(tmp_path):
    counts, faults, _ = malformed.campaign(tmp_path, seed=1, count=40, as_user=False)
    assert sum(counts.values()) == 40 and not faults, "\n".join(faults)


def test_the_campaign_sees_the_faults_it_looks_for(tmp_path, monkeypatch):
    def bad(argv):
        (tmp_path / "case" / {"x": "canary", "left": "y.tmp"}.get(argv[0], "in2")).mkdir()
        if argv[0] == "crash":
            raise ValueError

    for name, expected in (("x", "payload"), ("left", "left-over"), ("crash", "traceback"),
                           ("y", "left-over")):
        monkeypatch.setitem(malformed.ROUTES, "bad", (bad, [name], "IN.out"))
        case = (0, "", "refuse", "bad", "", {"in": b""})
        (tmp_path / "case").exists() and (tmp_path / "case").rename(tmp_path / f"before {name}")
        assert malformed.judge(case, tmp_path, tmp_path / "case")[0] == expected

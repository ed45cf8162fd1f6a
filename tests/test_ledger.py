"""The ledger refuses what a measurement does not support."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llm_from_scratch import ledger

ROW = {
    "section": "3.2",
    "claim": "a claim",
    "function": "llama.attention",
    "test": "tests/test_llama.py::test_x",
}
EFFECT = ledger.Interval(0.031, 0.020, 0.042, 5, "nats")


def claim(**changes):
    ledger.claim(**({"id": "L023"} | ROW | changes))


def test_line(capsys):
    claim(predicted=ledger.at_least(0.01, "nats"), measured=EFFECT, verdict="reproduced")
    assert capsys.readouterr().out == (
        "L023 | §3.2 | reproduced | a claim | predicted: > 0.01 nats | "
        "measured: 0.031 [0.020, 0.042] nats, n=5 | llama.attention | tests/test_llama.py::test_x\n"
    )


def test_interval_agrees_with_scipy():
    values = [0.3, -0.1, 0.25, 0.7, 0.11, 0.2]
    found = ledger.interval(values, "nats")
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-12)
    assert (found.mean, found.n) == (pytest.approx(np.mean(values)), 6)


def test_interval_of_two_by_hand():
    # t(0.975, 1) = 12.706; s / sqrt(2) of {0, 1} is 0.5
    found = ledger.interval([0.0, 1.0])
    assert found.high == pytest.approx(0.5 + 12.7062 * 0.5, abs=1e-3)
    assert str(ledger.interval([1, 1, 1], "bits")) == "1.000 [1.000, 1.000] bits, n=3"


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_interval_refuses(values):
    with pytest.raises(ValueError, match="interval needs"):
        ledger.interval(values)


@given(st.floats(-2, 2), st.floats(0, 2), st.floats(0, 2), st.sampled_from(ledger.VERDICTS))
def test_effect_verdicts(mean, half, bound, verdict):
    """Property: exactly the verdict that the definition gives is accepted."""
    measured = ledger.Interval(mean, mean - half, mean + half, 5, "nats")
    low = mean - half
    right = "reproduced" if low > bound else "weaker" if low > 0 else "absent"
    accepted = verdict == right or (verdict == "simulated only" and right == "reproduced")
    predicted = ledger.at_least(bound, "nats")
    if accepted:
        claim(predicted=predicted, measured=measured, verdict=verdict)
    else:
        with pytest.raises(ValueError, match="not supported"):
            claim(predicted=predicted, measured=measured, verdict=verdict)


@pytest.mark.parametrize(
    "low, high, right",
    [(-0.05, 0.05, "reproduced"), (-0.01, 0.02, "reproduced"), (-0.06, 0.0, "absent"),
     (0.01, 0.051, "absent"), (0.2, 0.3, "absent"), (-1, 1, "absent")],
)  # fmt: skip
def test_equivalence(low, high, right):
    measured = ledger.Interval((low + high) / 2, low, high, 5, "nats")
    predicted = ledger.within(0.05, "nats")
    assert ledger.judge(predicted, measured) == right
    claim(predicted=predicted, measured=measured, verdict=right)
    for wrong in {"reproduced", "weaker", "absent"} - {right}:
        with pytest.raises(ValueError, match="not supported"):
            claim(predicted=predicted, measured=measured, verdict=wrong)


def test_boundaries_are_not_reproduced():
    at_bound = ledger.Interval(0.2, 0.1, 0.3, 5)
    assert ledger.judge(ledger.at_least(0.1), at_bound) == "weaker"
    assert ledger.judge(ledger.at_least(0), ledger.Interval(0.1, 0.0, 0.2, 5)) == "absent"


@pytest.mark.parametrize(
    "verdict", ["reproduced", "derived", "simulated only", "paper inconsistent"]
)
def test_identity(verdict, capsys):
    claim(predicted="equal", measured="equal to 1e-6", verdict=verdict)
    assert f"| {verdict} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"verdict": "weaker", "predicted": "x", "measured": "y"}, "about an effect"),
        ({"verdict": "absent", "predicted": "x", "measured": "y"}, "about an effect"),
        ({"verdict": "confirmed", "predicted": "x", "measured": "y"}, "no such verdict"),
        ({"verdict": "reproduced", "predicted": "x", "measured": EFFECT}, "judged against"),
        ({"verdict": "reproduced", "predicted": ledger.at_least(0), "measured": "y"}, "needs ledger"),
        ({"verdict": "reproduced", "predicted": ledger.at_least(0, "bits"), "measured": EFFECT}, "'bits'"),
        ({"verdict": "derived", "predicted": "x", "measured": "a | b"}, "without '|'"),
        ({"verdict": "derived", "predicted": "x", "measured": "a\nb"}, "one non-empty line"),
        ({"verdict": "derived", "predicted": "x", "measured": "a\u2028b"}, "one non-empty line"),
        ({"verdict": "derived", "predicted": " ", "measured": "y"}, "predicted"),
        ({"verdict": "derived", "predicted": "x", "measured": "y", "claim": "a|b"}, "claim"),
        ({"verdict": "derived", "predicted": "x", "measured": "y", "id": "L23"}, "L023"),
        ({"verdict": "derived", "predicted": "x", "measured": "y", "id": "T023"}, "L023"),
        ({"verdict": "derived", "predicted": "x", "measured": "y", "function": "RMSNorm"}, "llama.RMSNorm"),
        ({"verdict": "derived", "predicted": "x", "measured": "y", "test": "test_x"}, "tests/test_llama"),
        ({"verdict": "derived", "predicted": "x", "measured": "y", "section": ""}, "section"),
    ],
)  # fmt: skip
def test_refuses(changes, message, capsys):
    with pytest.raises(ValueError, match=message.replace("|", r"\|").replace(".", r"\.")):
        claim(**changes)
    assert capsys.readouterr().out == ""  # nothing is printed that could be harvested


def test_not_finite_is_refused():
    broken = ledger.Interval(float("nan"), float("nan"), float("nan"), 5, "nats")
    for verdict in ("reproduced", "absent"):
        with pytest.raises(ValueError, match="not finite"):
            claim(predicted=ledger.at_least(0, "nats"), measured=broken, verdict=verdict)


@pytest.mark.parametrize("make, bound", [(ledger.at_least, -0.1), (ledger.within, 0.0),
                                         (ledger.at_least, float("nan")), (ledger.within, float("inf"))])  # fmt: skip
def test_bounds(make, bound):
    with pytest.raises(ValueError, match="finite"):
        make(bound)


def test_result(capsys):
    ledger.result("bigram", 3.61567, "bits per byte", "validation plays")
    ledger.result("bytes", 209806, "bytes")
    assert capsys.readouterr().out.splitlines() == [
        "result | bigram | 3.616 | bits per byte | validation plays",
        "result | bytes | 209806 | bytes |",
    ]
    for bad in ({"name": "a|b"}, {"value": float("nan")}, {"unit": ""}, {"note": "a\nb"}):
        with pytest.raises(ValueError):
            ledger.result(**({"name": "a", "value": 1.0, "unit": "u"} | bad))


def test_results_are_found_from_the_package(tmp_path, monkeypatch):
    package = tmp_path / "somewhere" / "llm_from_scratch"
    (tmp_path / "somewhere" / "results").mkdir(parents=True)
    package.mkdir()
    spec = type("Spec", (), {"submodule_search_locations": [str(package)]})
    monkeypatch.setattr(ledger.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="make run"):
        ledger.results()
    stored = {"bigram": {"value": 3.6, "unit": "bits per byte", "note": "", "chapter": "01_bigram"}}
    (tmp_path / "somewhere" / "results" / "results.json").write_text(json.dumps(stored))
    monkeypatch.chdir("/")  # the working directory does not matter
    assert ledger.results() == stored

"""Claims, predictions, measurements and verdicts: the replication ledger.

Written from chapters/00_datasets.py by `make export`: edit there.
"""

import importlib.util
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

VERDICTS = ("reproduced", "weaker", "absent", "simulated only", "derived", "paper inconsistent")
IDENTITY_VERDICTS = ("reproduced", "derived", "simulated only", "paper inconsistent")


@dataclass(frozen=True)
class Interval:
    """A measured effect: its mean, the ends of its 95 % interval, the number of values, a unit."""

    mean: float
    low: float
    high: float
    n: int
    unit: str = ""
    digits: int = 3

    def __str__(self) -> str:
        d = self.digits
        numbers = f"{self.mean:.{d}f} [{self.low:.{d}f}, {self.high:.{d}f}]"
        return f"{numbers} {self.unit}".rstrip() + f", n={self.n}"


def interval(values: Iterable[float], unit: str = "", digits: int = 3) -> Interval:
    """The mean of `values` with its 95 % t-interval, mean ± t(0.975, n − 1) · s / √n.

    `values`: one number per seed, or one paired difference per seed or play.
    Raises ValueError for fewer than two values or one that is not finite.
    """
    values = [float(v) for v in values]
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"an interval needs finite values, got {values}")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, unit, digits)


@dataclass(frozen=True)
class Prediction:
    """What we expect of an effect before we measure it; made by `at_least` or `within`."""

    kind: str
    bound: float
    unit: str = ""

    def __str__(self) -> str:
        sign = {"at least": "> ", "within": "within ±"}[self.kind]
        return f"{sign}{self.bound:g} {self.unit}".rstrip()


def at_least(x: float, unit: str = "") -> Prediction:
    """The prediction that an effect is strictly greater than `x` ≥ 0 (orient it so that it is positive)."""
    if not (math.isfinite(x) and x >= 0):
        raise ValueError(f"at_least needs a finite bound ≥ 0, got {x}: turn the difference round")
    return Prediction("at least", float(x), unit)


def within(m: float, unit: str = "") -> Prediction:
    """The prediction that there is no difference larger than `m` > 0."""
    if not (math.isfinite(m) and m > 0):
        raise ValueError(f"within needs a finite margin > 0, got {m}")
    return Prediction("within", float(m), unit)


def judge(predicted: Prediction, measured: Interval) -> str:
    """The one verdict that an interval supports: "reproduced", "weaker" or "absent".

    `at_least(x)`: reproduced if the whole interval lies above x, weaker if above 0 only, else absent.
    `within(m)`: reproduced if the whole interval lies inside ±m, else absent.
    """
    if predicted.kind == "within":
        inside = -predicted.bound <= measured.low and measured.high <= predicted.bound
        return "reproduced" if inside else "absent"
    if measured.low > predicted.bound:
        return "reproduced"
    return "weaker" if measured.low > 0 else "absent"


def _check_verdict(predicted: Prediction | str, measured: Interval | str, verdict: str) -> None:
    """Raise ValueError unless the measurement supports the verdict."""
    if verdict not in VERDICTS:
        raise ValueError(f"no such verdict: {verdict!r}; there are {', '.join(VERDICTS)}")
    if isinstance(measured, Interval):
        if not isinstance(predicted, Prediction):
            raise ValueError("an interval is judged against ledger.at_least(x) or ledger.within(m)")
        if predicted.unit != measured.unit:
            raise ValueError(f"predicted in {predicted.unit!r}, measured in {measured.unit!r}")
        if not all(math.isfinite(v) for v in (measured.mean, measured.low, measured.high)):
            raise ValueError(f"the interval is not finite: {measured}")
        supported = judge(predicted, measured)
        allowed = (supported, "simulated only") if supported == "reproduced" else (supported,)
        if verdict not in allowed:
            raise ValueError(
                f"{verdict!r} is not supported: predicted {predicted}, measured {measured}, "
                f"which is {supported!r}"
            )
    elif isinstance(predicted, Prediction):
        raise ValueError("a prediction with a bound needs ledger.interval(...) as the measurement")
    elif verdict not in IDENTITY_VERDICTS:
        raise ValueError(f"{verdict!r} is about an effect: measure it with ledger.interval(...)")


def _check_field(what: str, text: str, form: str = "", example: str = "") -> str:
    """The text of one field of a line; ValueError if it would break the line or has a wrong form."""
    text = str(text)
    if not text.strip() or "|" in text or len(text.splitlines()) != 1:
        raise ValueError(f"{what} must be one non-empty line without '|', got {text!r}")
    if form and not re.fullmatch(form, text):
        raise ValueError(f"{what} must look like {example}, got {text!r}")
    return text.strip()


def claim(
    id: str,
    *,
    section: str,
    claim: str,
    predicted: Prediction | str,
    measured: Interval | str,
    verdict: str,
    function: str,
    test: str,
) -> None:
    """Print one row of the replication ledger, if the measurement supports the verdict.

    `measured` is an `Interval` for an effect, or a text for an identity, closed form or derivation
    that an assert in the same cell has shown. Raises ValueError for a verdict that does not follow
    from the measurement, units that differ, an id not like L023 or S058, a text with '|' or newline.
    """
    _check_verdict(predicted, measured, verdict)
    row = (
        _check_field("id", id, r"[LS]\d{3}", "L023 or S058"),
        _check_field("section", f"§{section}" if section[:1].isdigit() else section),
        verdict,
        _check_field("claim", claim),
        "predicted: " + _check_field("predicted", predicted),
        "measured: " + _check_field("measured", measured),
        _check_field("function", function, r"[a-z]\w*\.[A-Za-z_][\w.]*", "llama.RMSNorm"),
        _check_field(
            "test", test, r"tests/test_\w+\.py::test_\w+", "tests/test_llama.py::test_rms_norm"
        ),
    )
    print(" | ".join(row))


def result(name: str, value: float, unit: str, note: str = "", digits: int = 3) -> None:
    """Print a headline number that later chapters compare with: `result | name | value | unit | note`.

    `make run` collects these lines into results/results.json. Raises ValueError if `value` is not
    finite or a text would break the line.
    """
    if not math.isfinite(value):
        raise ValueError(f"result {name!r} is not finite: {value}")
    number = str(value) if isinstance(value, int) else f"{float(value):.{digits}f}"
    row = ["result", _check_field("name", name), number, _check_field("unit", unit)]
    row += [_check_field("note", note) if note else ""]
    print(" | ".join(row).rstrip())


def results() -> dict[str, dict]:
    """The stored headline numbers of the chapters: name → value, unit, note, chapter.

    Raises FileNotFoundError outside a checkout of the repository: they are no part of the package.
    """
    spec = importlib.util.find_spec("llm_from_scratch")
    starts = [Path(p).resolve() for p in (spec.submodule_search_locations if spec else ())]
    for folder in (parent for start in starts for parent in start.parents):
        if (path := folder / "results" / "results.json").is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(
        f"no results/results.json above {', '.join(map(str, starts)) or 'the package'}: stored "
        "results need a checkout of the repository (pip install -e .) in which `make run` has run"
    )

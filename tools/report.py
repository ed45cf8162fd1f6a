"""What the executed notebooks say, gathered: results/results.json, LEDGER.md, and the tables in README.md.

`python tools/report.py` writes them, `python tools/report.py --check` compares and names what is stale.
"""

import argparse
import ast
import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path

from course import ROOT, CourseError, cells, read_notebook, scripts
from export import defined

VERDICTS = ["reproduced", "weaker", "absent", "simulated only", "derived", "paper inconsistent"]
SECTIONS = {
    "1": "Introduction",
    "3.1": "Pre-training data",
    "3.2": "Architecture and scaling laws",
    "3.3": "Infrastructure",
    "3.4": "Training recipe",
    "4.1": "Post-training: modelling",
    "4.2": "Post-training: data",
    "4.3": "Capabilities",
    "5.1": "Results of the base model",
    "5.2": "Results after post-training",
    "5.3": "Human evaluation",
    "5.4": "Safety",
    "6": "Inference",
    "7": "Vision",
    "8": "Speech",
}


def printed(notebook: Path) -> list[tuple[str, str]]:
    """Every line that the notebook's code cells printed, with the first line of the cell."""
    found = []
    for cell in read_notebook(notebook).cells:
        for output in cell.get("outputs", []) if cell.cell_type == "code" else []:
            if output.output_type == "stream" and output.name == "stdout":
                marker = cell.source.partition("\n")[0]
                found += [(marker, line) for line in output.text.splitlines()]
    return found


def claims(root: Path = ROOT) -> dict[str, dict]:
    """The claims tested, by id: the line that `ledger.claim` printed, taken apart.

    Raises CourseError for an id claimed twice, or whose cell does not say `#| claim ID`.
    """
    found: dict[str, dict] = {}
    fields = ["section", "verdict", "claim", "predicted", "measured", "function", "test"]
    for script in scripts(root):
        notebook = script.with_suffix(".ipynb")
        if not notebook.exists():
            continue
        lines = [
            (marker, parts)
            for marker, line in printed(notebook)
            if len(parts := line.split(" | ")) == 8 and re.fullmatch(r"[LS]\d{3}", parts[0])
        ]
        for marker, (name, *rest) in lines:
            if marker.split() != ["#|", "claim", name]:
                raise CourseError(
                    f"{notebook.name}: the cell of {name} must begin `#| claim {name}`"
                )
            if name in found:
                raise CourseError(
                    f"{notebook.name}: {name} is claimed in {found[name]['chapter']} too"
                )
            found[name] = dict(zip(fields, rest, strict=True)) | {"chapter": script.stem}
            for field in ("predicted", "measured"):
                found[name][field] = found[name][field].removeprefix(f"{field}: ")
        marked = {" ".join(w) for c in cells(script) if (w := c.words("claim")) is not None}
        if silent := marked - {parts[0] for _, parts in lines}:
            raise CourseError(
                f"{notebook.name}: {sorted(silent)} marked as claim, no verdict printed"
            )
    return found


def qualified(tree: ast.Module) -> set[str]:
    """The names a module defines, and what its classes do: "RMSNorm", "RMSNorm.__call__"."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {*defined(tree), *(f"{c.name}.{name}" for c in classes for name in defined(c))}


def unknown_targets(found: dict[str, dict], root: Path = ROOT) -> list[str]:
    """Claims whose id, verdict, function or test does not exist."""
    faults = []
    known = {row["id"] for row in inventory()}
    for name, claim in found.items():
        where = f"chapters/{claim['chapter']}.ipynb: claim {name}"
        if name not in known:
            faults.append(f"{where} is no id of tools/claims.tsv")
        if claim["verdict"] not in VERDICTS:
            faults.append(f"{where} has the verdict {claim['verdict']!r}, not one of {VERDICTS}")
        module, _, function = claim["function"].partition(".")
        path = root / "llm_from_scratch" / f"{module}.py"
        if not path.exists() or function not in qualified(ast.parse(path.read_text())):
            faults.append(f"{where} names {claim['function']}, which is not in the package")
        file, _, test = claim["test"].partition("::")
        path = root / file
        if not path.exists() or f"def {test.partition('[')[0]}(" not in path.read_text():
            faults.append(f"{where} names the test {claim['test']}, which is not there")
    return faults


def results(root: Path = ROOT) -> dict[str, dict]:
    """The headline numbers by name: the lines that `ledger.result` printed, with a note or without.

    Raises CourseError for a name that is printed twice.
    """
    found: dict[str, dict] = {}
    for script in scripts(root):
        notebook = script.with_suffix(".ipynb")
        for _, line in printed(notebook) if notebook.exists() else []:
            parts = [part.strip() for part in line.split("|")]
            if parts[0] == "result" and len(parts) in (4, 5):
                _, name, value, unit, note = (*parts, "")[:5]
                if name in found:
                    raise CourseError(
                        f"{notebook.name}: the result {name!r} is printed in "
                        f"{found[name]['chapter']} already"
                    )
                number = json.loads(value)  # a whole number stays one
                found[name] = {
                    "value": number,
                    "shown": f"{number:,}" if isinstance(number, int) else value,
                    "unit": unit,
                    "note": note,
                    "chapter": script.stem,
                }
    return found


def results_text(root: Path = ROOT) -> str:
    return json.dumps(results(root), indent=1, ensure_ascii=False) + "\n"


def inventory() -> list[dict]:
    """The 240 techniques of the paper (L) and of the other sources (S): id, where, technique, chapter."""
    with (Path(__file__).parent / "claims.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def one_line(root: Path = ROOT) -> str:
    """The ledger in a sentence."""
    tested = Counter(c["verdict"] for name, c in claims(root).items() if name.startswith("L"))
    total = sum(row["id"].startswith("L") for row in inventory())
    counts = ", ".join(f"{tested[v]} {v}" for v in VERDICTS if tested[v])
    return f"{sum(tested.values())} of {total} claims of the paper tested: {counts or 'none yet'}."


def ledger_text(root: Path = ROOT) -> str:
    """LEDGER.md: a row per id, by section of the paper; then a table for the other sources."""
    found = claims(root)

    def row(entry: dict) -> str:
        claim = found.get(entry["id"])
        if claim is None:
            return f"| {entry['id']} | {entry['technique']} | *not yet tested* | | | {entry['chapter']} | |"
        chapter = f"[{claim['chapter']}](chapters/{claim['chapter']}.ipynb)"
        return (
            f"| {entry['id']} | {claim['claim']} | **{claim['verdict']}** | {claim['predicted']} | "
            f"{claim['measured']} | {chapter} `{claim['function']}` | `{claim['test']}` |"
        )

    head = "| id | claim | verdict | predicted | measured | where | test |\n|---|---|---|---|---|---|---|"
    out = [
        "# The replication ledger\n",
        "Each claim of *The Llama 3 Herd of Models* (arXiv 2407.21783) that a chapter tests: predicted, "
        "measured at miniature scale,\nand given a verdict that the measurement supports. Generated by "
        "`make ledger` from the executed notebooks.\n",
        f"**{one_line(root)}**\n",
        "*reproduced*: the effect is there as worded. *weaker*: there, but smaller than predicted. "
        "*absent*: the 95 % interval does\nnot show it: no effect, the wrong sign, or too noisy to tell. *simulated only*: the mechanism is shown without the "
        "hardware or the people it needs.\n*derived*: follows by arithmetic. *paper inconsistent*: the "
        "paper's own numbers disagree.\n",
    ]
    rows = [e for e in inventory() if e["id"].startswith("L")]
    for section, title in SECTIONS.items():
        of = [
            e
            for e in rows
            if (e["where"].split(";")[0].split(" ")[0] + ".").startswith(section + ".")
        ]
        if of:
            out += [f"## {section} {title}\n", head, *map(row, of), ""]
    others = [e for e in inventory() if e["id"].startswith("S")]
    for source in dict.fromkeys(e["where"] for e in others):
        out += [f"## {source}\n", head, *[row(e) for e in others if e["where"] == source], ""]
    return "\n".join(out)


def first_line(script: Path) -> tuple[str, str]:
    """The chapter's title without its number, and its one-sentence summary."""
    lines = cells(script)[0].source.splitlines()
    title = lines[0].lstrip("# ").partition(" · ")[2]
    return title, " ".join(line[2:] for line in lines if line.startswith("> "))


def blocks(root: Path = ROOT) -> dict[str, str]:
    """The generated parts of README.md by name."""
    numbers = results(root)
    path = root / "results" / "chapters.json"
    costs = json.loads(path.read_text()) if path.exists() else {}
    table = [
        "| chapter | what you build | the numbers it reaches | seconds, cold | GFLOP/s | GB |",
        "|---|---|---|---|---|---|",
    ]
    for script in scripts(root):
        title, sentence = first_line(script)
        reached = "; ".join(
            f"{name}: {n['shown']} {n['unit']}"
            for name, n in numbers.items()
            if n["chapter"] == script.stem
        )
        took = costs.get(script.stem, {})
        table.append(
            f"| [{script.stem[:2]} {title}](chapters/{script.stem}.ipynb) | {sentence} | {reached} "
            f"| {took.get('seconds', '')} | {took.get('gflops', '')} | {took.get('gigabytes', '')} |"
        )
    return {
        "ledger": f"**{one_line(root)}** Every row, with what was predicted and what was measured: "
        "[LEDGER.md](LEDGER.md).",
        "chapters": "\n".join(table),
        "bits_per_byte": bits_table(numbers),
        "mini_llama": mini_llama(root),
    }


def bits_table(numbers: dict[str, dict]) -> str:
    """README's table of every model that predicts the validation plays, worst first."""
    rows = [(n["value"], name, n) for name, n in numbers.items() if n["unit"] == "bits per byte"]
    lines = ["| model | bits per byte | chapter | |", "|---|---|---|---|"]
    for _, name, of in sorted(rows, reverse=True):
        lines.append(f"| {name} | {of['shown']} | {of['chapter'][:2]} | {of['note']} |")
    return "\n".join(lines)


def mini_llama(root: Path = ROOT) -> str:
    """README's part on the model that `make train` made: numbers, curve and sample of the stored run."""
    folder = root / "results" / "mini_llama"
    if not folder.exists():
        return ""
    of = json.loads((folder / "summary.json").read_text())
    sample = (folder / "samples.txt").read_text().split("\n--------\n")[0].strip()
    return (
        f"The stored run: {of['parameters']:,} parameters, {of['tokens']:,} tokens ({of['epochs']} epochs), "
        f"**{of['validation_bits_per_byte']:.3f} bits per byte** on the validation plays, in "
        f"{of['seconds'] / 60:.0f} minutes on a machine whose matrix products reach "
        f"{of['matmul_gflops']} GFLOP/s.\n\n"
        "![Training and validation loss of the stored run](results/mini_llama/curves.png)\n\n"
        f"What it writes after the first line:\n\n```text\n{sample}\n```"
    )


def readme_text(root: Path = ROOT) -> str:
    """README.md with its generated parts brought up to date."""
    text = (root / "README.md").read_text()
    for name, block in blocks(root).items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise CourseError(f"README.md needs the lines `{begin.strip()}` and `{end.strip()}`")
        text = f"{before}{begin}{block}\n{end}{after}"
    return text


def wanted(root: Path = ROOT) -> dict[str, str]:
    """Every generated file, as the notebooks say it should be."""
    return {
        "results/results.json": results_text(root),
        "LEDGER.md": ledger_text(root),
        "README.md": readme_text(root),
    }


def stale(root: Path = ROOT) -> list[str]:
    """The generated files that are not what the notebooks say."""
    return [
        f"{name} is stale: run `make ledger`"
        for name, text in wanted(root).items()
        if not (root / name).exists() or (root / name).read_text() != text
    ]


def write_results(root: Path = ROOT) -> None:
    (root / "results" / "results.json").write_text(results_text(root))


def write(root: Path = ROOT) -> None:
    for name, text in wanted(root).items():
        (root / name).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, fail on a difference")
    try:
        if parser.parse_args().check:
            if faults := stale():
                sys.exit("\n".join(faults))
        else:
            write()
            print(one_line())
    except CourseError as error:
        sys.exit(str(error))

"""The question–answer pairs under `## Remember` of every chapter, as a tab-separated file that Anki imports."""

import re
import sys

from course import ROOT, CourseError, cells, scripts

PAIR = re.compile(r"^\*\*Q:\*\* (.+?)\s*^\*\*A:\*\* (.+?)(?=^\*\*Q:|^#|\Z)", re.M | re.S)


def cards(root=ROOT) -> list[tuple[str, str, str]]:
    """(question, answer, chapter) in reading order. Raises CourseError for a chapter without five pairs."""
    found = []
    for script in scripts(root):
        text = "\n".join(c.source for c in cells(script) if "## Remember" in c.source)
        pairs = [tuple(" ".join(part.split()) for part in match) for match in PAIR.findall(text)]
        if len(pairs) < 5:
            raise CourseError(
                f"{script.name}: {len(pairs)} question–answer pairs under Remember, not 5"
            )
        found += [(question, answer, script.stem) for question, answer in pairs]
    return found


if __name__ == "__main__":
    try:
        rows = cards()
    except CourseError as error:
        sys.exit(str(error))
    path = ROOT / "runs" / "flashcards.tsv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    print(
        f"{len(rows)} cards in {path.relative_to(ROOT)}: import it into Anki, fields separated by tabs"
    )

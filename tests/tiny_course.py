"""A course of two chapters that needs nothing but the standard library: what the tools' tests work on, and break.

`write(root)` writes the tree as an author leaves it; `tests/test_repo.py` has the tools do the rest.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HEADER = """\
# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,jupyter,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""

CLAIM = (
    "L023 | §3.2 | reproduced | doubling twice is multiplying by four | predicted: the same | "
    "measured: 28 and 28 | alpha.quadruple | tests/test_alpha.py::test_quadruple"
)

ALPHA = '''\
# %% [markdown]
# # 00 · Doubling
#
# > Numbers, doubled.
#
# *Reading time 1 min · runs in about 1 s · difficulty ●○○*

# %%
#| export
from math import sqrt

# %% [markdown]
# ## Twice

# %%
#| export workbook
def double(x: float) -> float:
    """Twice `x`."""
    # the learner must not see this comment
    return 2 * x

# %% [markdown]
# ### The check of double

# %%
assert double(3) == 6
print("double 7:", double(7))

# %% [markdown]
# ## Four times, and a root

# %%
#| export public
def quadruple(x: float) -> float:
    """Four times `x`, by doubling."""
    return double(double(x))

# %%
#| export
from collections import Counter
from math import floor

# %%
#| export
FACTOR = 4

class Root:
    """The whole part of a square root."""

    def __init__(self, x: float):
        self.x = x

    def floor(self) -> int:
        return floor(sqrt(self.x))

def counted(text: str) -> Counter:
    """How often each letter occurs."""
    return Counter(text)

# %% [markdown]
# ### The claim

# %%
#| claim L023
assert quadruple(7) == FACTOR * 7
print("CLAIM")

# %%
print("result | quadruple | 28 | ones | of seven")
print("result | root | 3.100 | ones")
Root(17).floor(), counted("aab")["a"]

# %% [markdown]
# ## Remember
#
# **Q:** What is twice two? **A:** Four, one after the other.

# %% [markdown]
# ## Exercise
# Halve a number; success is 3 from 6.

# %% tags=["solution"] jupyter={"source_hidden": true}
def half(x):
    return x / 2

assert half(6) == 3
'''.replace("CLAIM", CLAIM)

BETA = '''\
# %% [markdown]
# # 01 · Sums
#
# > Sums of doubled numbers,
# > in two lines.

# %%
#| export
from llm_from_scratch.alpha import double

# %% [markdown]
# ## Adding

# %%
#| export public workbook
class Adder:
    """Adds up what it is given, doubled."""

    total = 0

    def add(self, x: float) -> float:
        """The total so far, with twice `x`."""
        self.total += double(x)
        return self.total

# %% [markdown]
# ### The check of Adder

# %%
adder = Adder()
adder.add(1)
assert adder.add(2) == 6
adder.total

# %% tags=["nbval-ignore-output"]
print("an address, which varies:", id(adder))

# %% tags=["solution"] jupyter={"source_hidden": true}
assert Adder().add(2) == 4
'''

TEST = """\
def test_quadruple():
    pass
"""

FILES = {
    "chapters/00_alpha.py": HEADER + ALPHA,
    "chapters/01_beta.py": HEADER + BETA,
    "tests/test_alpha.py": TEST,
    "results/chapters.json": '{"00_alpha": {"seconds": 1.0, "gigabytes": 0.1}, '
    '"01_beta": {"seconds": 1.0, "gigabytes": 0.1}}',
}


def write(root: Path) -> None:
    """Write the scripts, a test and the measured costs under `root`."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(ROOT / "pyproject.toml", root)

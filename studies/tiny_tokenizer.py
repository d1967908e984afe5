"""Builds the tokenizer of the shipped tiny model from the tasks' text in this repository.

    python studies/tiny_tokenizer.py --target=DIR

Byte-level BPE with 512 entries: four special tokens, the 256 bytes (so any text can be encoded),
whole words of the tasks' text, runs of one to four plus signs, `####`, and merges learned from
those words so that unknown words are not spelled byte by byte. Every digit is a separate token. The
build has no randomness: the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import pathlib
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from jexit.errors import UserError
from jexit.tasks.tom.task import Tom
from jexit.tasks.word_problems import BOXES, NAMES, OBJECTS, TEMPLATES

VOCAB_SIZE = 512
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# The pieces that BPE sees: `####`, runs of plus signs, single digits, words with the space before
# them, and whatever is left between those.
PIECES = r"#{4}|\+{1,4}|[0-9]| ?[A-Za-z]+"
SYMBOLS = ("+", "++", "+++", "++++", "####")
OTHER_WORDS = ("sum", " by", " at", " once")  # the command words of `sums`
STORIES = 400  # that the words of `tom` are collected from


def written(text: str) -> str:
    """Returns the text in GPT-2's byte-level alphabet, with a printable character for each byte."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pieces.pre_tokenize_str(text)[0][0]


def task_words() -> list[str]:
    """Returns every word of the tasks' text, sorted, with its leading space if it has one."""
    slots = {"n": NAMES, "m": NAMES, "o": OBJECTS, "x": BOXES}
    words = set(OTHER_WORDS)
    for template in TEMPLATES:
        holes = dict.fromkeys(template.ranges, "0")
        for slot, values in slots.items():
            for value in values:
                filled = {name: options[0] for name, options in slots.items()} | {slot: value}
                words.update(re.findall(PIECES, template.text.format(**filled, **holes)))
    stories = Tom(steps="mixed")
    for index in range(STORIES):
        story = stories.problem("train", index)
        words.update(re.findall(PIECES, f"{story.prompt}\n{story.completion}"))
    return sorted(word for word in words if word.strip().isalpha() and len(word.strip()) > 1)


def learn_merges(words: list[str], known: set[str], count: int) -> list[tuple[str, str]]:
    """Learns byte-pair merges from the words until they add `count` tokens to those in `known`.

    Ties go to the pair that sorts first. A merge whose result is a word already in the vocabulary
    adds no token.
    """
    spelled = [list(written(word)) for word in words]
    merges, known = [], set(known)
    while count > 0:
        pairs = collections.Counter(
            pair for pieces in spelled for pair in itertools.pairwise(pieces)
        )
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        count -= left + right not in known
        known.add(left + right)
        spelled = [_merged(pieces, left, right) for pieces in spelled]
    return merges


def _merged(pieces: list[str], left: str, right: str) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        # The last result may be a merge already made here; it can only equal `left` by spelling.
        if result and result[-1] == left and piece == right:
            result[-1] = left + right
        else:
            result.append(piece)
    return result


def build() -> Tokenizer:
    """Builds the tokenizer, with exactly `VOCAB_SIZE` entries."""
    words = task_words()
    entries = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    whole = [*SYMBOLS, *map(written, words)]
    entries += [entry for entry in whole if entry not in entries]
    merges = learn_merges(words, set(entries), VOCAB_SIZE - len(entries))
    entries += [token for token in map("".join, merges) if token not in entries]
    if len(entries) > VOCAB_SIZE:
        raise UserError(
            f"the tasks' words need {len(entries)} entries, but the tiny vocabulary has only "
            f"{VOCAB_SIZE}; remove words from jexit/tasks/word_problems.py or tom/text.py"
        )
    entries += [f"<|unused{i}|>" for i in range(VOCAB_SIZE - len(entries))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={entry: i for i, entry in enumerate(entries)},
            merges=merges,
            # A piece that is an entry is taken whole: words need no chain of merges leading to
            # them, which is what lets them fit.
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def save(target: pathlib.Path) -> None:
    """Writes the tokenizer into the folder `target`, in the files that `transformers` reads."""
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "additional_special_tokens": [USER, ASSISTANT],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (target / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", "utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=pathlib.Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    save(arguments.target)
    print(f"wrote the tiny tokenizer ({VOCAB_SIZE} entries) to {arguments.target}")


if __name__ == "__main__":
    main()

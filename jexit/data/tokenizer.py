"""One tokenizer class over Hugging Face's, from a model directory."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

# What a model directory may hold of a tokenizer, in the order of a directory listing.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


class Tokenizer:
    """Text to ids and back, the chat format, and the *set* of end tokens.

    `eos_ids` joins the tokenizer's own end token with the end tokens that the directory's
    `generation_config.json` and `config.json` name (Qwen3 ends with 151645 or 151643). `pad_id` may
    be one of them: lengths, never the pad id, say where a sequence ends.
    """

    def __init__(
        self, backend: Any, *, eos_ids: Iterable[int] = (), directory: pathlib.Path | None = None
    ) -> None:
        self.backend = backend
        self.directory = directory
        own = () if backend.eos_token_id is None else (backend.eos_token_id,)
        self.eos_ids: frozenset[int] = frozenset((*own, *eos_ids))
        if not self.eos_ids:
            raise ValueError(
                f"the tokenizer in {directory} names no end token, so generation could not stop; "
                "set eos_token in its tokenizer_config.json"
            )
        self.eos_id: int = own[0] if own else min(self.eos_ids)
        self.pad_id: int = self.eos_id if backend.pad_token_id is None else backend.pad_token_id

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads the tokenizer of a model directory.

        Raises FileNotFoundError when the directory or its tokenizer files are missing, ValueError
        when they cannot be read.
        """
        # Without PyTorch, transformers says so on stderr whenever it is imported.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        path = cls.find(directory)
        try:
            backend = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"the tokenizer in {path} cannot be read ({reason}); "
                "copy the checkpoint's tokenizer files again"
            ) from error
        return cls(backend, eos_ids=_configured_eos_ids(path), directory=path)

    @staticmethod
    def find(directory: str | os.PathLike[str]) -> pathlib.Path:
        """The directory itself, once it is known to hold a tokenizer's files; reads none of them.

        Raises FileNotFoundError when the directory or its tokenizer files are missing.
        """
        path = pathlib.Path(directory)
        if not path.is_dir():
            raise FileNotFoundError(
                f"no model directory at {path}; set config.model.path to one that convert.from_hf "
                "or a run has written"
            )
        if not (path / "tokenizer.json").exists() and not (
            (path / "vocab.json").exists() and (path / "merges.txt").exists()
        ):
            raise FileNotFoundError(
                f"{path} holds no tokenizer (tokenizer.json, or vocab.json with merges.txt); "
                "copy the tokenizer's files of the checkpoint into it"
            )
        return path

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (a model's embedding may be padded beyond it)."""
        return len(self.backend)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.backend.chat_template)

    def chat_text(self, user_message: str) -> str:
        """The prompt's text: the user's turn and the opening of the assistant's.

        Without a chat template it is the message itself.
        """
        if not self.has_chat_template:
            return user_message
        return self.backend.apply_chat_template(
            [{"role": "user", "content": user_message}],
            tokenize=False,
            add_generation_prompt=True,
        )

    def encode_prompt(self, user_message: str) -> list[int]:
        """The ids of `chat_text(user_message)`."""
        return self.encode(self.chat_text(user_message))

    def encode(self, text: str) -> list[int]:
        """The ids of the text, nothing added; special tokens written in it become themselves."""
        return self.backend.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, several times as fast."""
        return self.backend(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def encode_prompts(self, user_messages: Sequence[str]) -> list[list[int]]:
        """`encode_prompt` for many messages at once."""
        return self.encode_batch([self.chat_text(message) for message in user_messages])

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """The text of the ids; special tokens (end, padding) are left out unless kept."""
        return self.backend.decode(
            [int(i) for i in ids],
            skip_special_tokens=not keep_special,
            clean_up_tokenization_spaces=False,
        )

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Each id's own text, for display; a lone part of a character shows as U+FFFD."""
        return [self._token(int(i)) for i in ids]

    @functools.cached_property
    def _token(self) -> Any:
        def token(i: int) -> str:
            return self.backend.decode(
                [i], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

        return functools.lru_cache(maxsize=65_536)(token)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's files, chat template included, into a directory.

        Files that the tokenizer was read from are copied as they are, so that a checkpoint's
        tokenizer stays byte for byte what its publisher shipped.
        """
        target = pathlib.Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if self.directory is None or not self.directory.is_dir():
            self.backend.save_pretrained(str(target))
            return
        if self.directory.resolve() == target.resolve():
            return
        for name in TOKENIZER_FILES:
            if (source := self.directory / name).exists():
                shutil.copyfile(source, target / name)


def _configured_eos_ids(directory: pathlib.Path) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.exists():
            continue
        try:
            value = json.loads(file.read_text("utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} is not a JSON object ({error}); copy it again from the checkpoint"
            ) from error
        ids = value if isinstance(value, list) else [value]
        found.update(i for i in ids if isinstance(i, int))
    return found

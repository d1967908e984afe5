"""The tokenizer of a model directory, based on Hugging Face's tokenizers."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

from jexit.data import chat_template
from jexit.errors import MissingFile, UserError
from jexit.presets import LARGEST_COUNT
from jexit.tasks.answers import THINK_START
from jexit.tasks.base import Message
from jexit.untrusted import check_files, read_object

_OPEN_END = "\ue000OPEN\ue000 "  # marks the end of a message that is to be continued

Thinking = Literal["auto", "on", "off"]
Messages = Sequence[Message]

# The tokenizer's files that a model directory may contain, in the order of a directory listing.
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
    """Converts between text and token ids, and applies the chat template of a model.

    `backend` is a tokenizer of transformers. The attribute `eos_ids` combines the backend's
    end-of-sequence token with the argument `eos_ids`, because a model may have several such tokens
    (Qwen3: 151645 and 151643). The padding token `pad_id` may be one of them, so the end of a
    sequence must be determined from its length, never from `pad_id`. Raises UserError if there is
    no end-of-sequence token.
    """

    def __init__(
        self, backend: Any, *, eos_ids: Iterable[int] = (), directory: pathlib.Path | None = None
    ) -> None:
        self.backend = backend
        self.directory = directory
        self._thinking: Thinking = "auto"
        self._system = ""
        own = () if backend.eos_token_id is None else (backend.eos_token_id,)
        self.eos_ids: frozenset[int] = frozenset((*own, *eos_ids))
        if not self.eos_ids:
            raise UserError(
                f"the tokenizer in {directory} does not define an end-of-sequence token, so "
                "generation could not stop; set eos_token in its tokenizer_config.json"
            )
        self.eos_id: int = own[0] if own else min(self.eos_ids)
        self.pad_id: int = self.eos_id if backend.pad_token_id is None else backend.pad_token_id

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Loads the tokenizer of a model directory.

        Raises MissingFile if the directory or its tokenizer files are missing, and UserError if the
        files cannot be read.
        """
        # Without this, transformers prints a warning on import if PyTorch is not installed.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        path = cls.find(directory)
        try:
            backend = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the tokenizer in {path} cannot be read ({reason}); "
                "copy the checkpoint's tokenizer files again"
            ) from error
        return cls(backend, eos_ids=_configured_eos_ids(path), directory=path)

    @staticmethod
    def find(directory: str | os.PathLike[str]) -> pathlib.Path:
        """Returns `directory` as a path, after checking that it contains the files of a tokenizer.

        Raises MissingFile if the directory or its tokenizer files are missing, and UserError for a
        special file or a link that leads out of the directory.
        """
        path = pathlib.Path(directory)
        if not path.is_dir():
            raise MissingFile(
                f"there is no model directory at {path}; set config.model.path to one that "
                "convert.from_hf or a run has written"
            )
        if not (path / "tokenizer.json").exists() and not (
            (path / "vocab.json").exists() and (path / "merges.txt").exists()
        ):
            raise MissingFile(
                f"{path} contains no tokenizer (tokenizer.json, or vocab.json with merges.txt); "
                "copy the checkpoint's tokenizer files into it"
            )
        check_files(path)
        return path

    @property
    def vocab_size(self) -> int:
        """The number of token ids, including added tokens; the embedding may have more rows."""
        return len(self.backend)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.backend.chat_template)

    @property
    def thinking(self) -> Thinking:
        """The thinking mode for the chat template: `on`, `off`, or `auto` (the template's default).

        Assigning `on` or `off` raises UserError if the template has no switch for thinking, such as
        Qwen3's `enable_thinking`.
        """
        return self._thinking

    @thinking.setter
    def thinking(self, value: Thinking) -> None:
        if value not in get_args(Thinking):
            raise UserError(
                f"thinking is {value!r}, but it must be one of {', '.join(get_args(Thinking))}; "
                "choose one of these"
            )
        if value != "auto" and not self.has_thinking_switch:
            raise UserError(
                f"thinking is {value!r}, but the chat template of {self.directory} has no switch "
                "for thinking; set config.task.thinking=auto"
            )
        self._thinking = value
        vars(self).pop("opens_thinking", None)

    @property
    def system(self) -> str:
        """The system message before every prompt; if empty, the chat template may use its own.

        Assigning a message raises UserError if there is no chat template, or if the template
        rejects or omits the message.
        """
        return self._system

    @system.setter
    def system(self, value: str) -> None:
        if value and not self._shows_system(value):
            raise UserError(
                f"the system message {reprlib.repr(value)} cannot be used in the prompts of "
                f"{self.directory}, because no chat template there supports it; set "
                "config.task.system=''"
            )
        self._system = value
        vars(self).pop("opens_thinking", None)

    def _shows_system(self, value: str) -> bool:
        messages = [{"role": "system", "content": value}, {"role": "user", "content": "?"}]
        try:
            return self.has_chat_template and value.strip() in self.render(messages)
        except UserError:  # the template rejects system messages
            return False

    @functools.cached_property
    def has_thinking_switch(self) -> bool:
        """Whether the chat template renders different prompts with thinking on and off."""
        if not self.has_chat_template:
            return False
        probe = [{"role": "user", "content": "?"}]
        return self._render(probe, thinking="on") != self._render(probe, thinking="off")

    @functools.cached_property
    def opens_thinking(self) -> bool:
        """Whether the chat template ends a prompt with `<think>`, which completions then close."""
        return self.has_chat_template and self.chat_text("?").rstrip().endswith(THINK_START)

    def render(self, messages: Messages, *, answer: bool = True) -> str:
        """Returns messages (`role`, `content`) as one string in the format of the chat template.

        With `answer`, the string ends with the beginning of the assistant's turn; otherwise with
        the content of the last message, which a model can then continue. Raises UserError if the
        template is broken, rejects the messages or exceeds a limit (see `chat_template.render`).
        """
        return self._render(messages, thinking=self._thinking, answer=answer)

    def _render(self, messages: Messages, *, thinking: Thinking, answer: bool = True) -> str:
        variables = self.backend.special_tokens_map | {"add_generation_prompt": answer}
        if thinking != "auto":
            variables["enable_thinking"] = thinking == "on"
        messages = [dict(message) for message in messages]
        if not answer:
            messages[-1] = messages[-1] | {"content": messages[-1]["content"] + _OPEN_END}
        try:
            text = chat_template.render(self._template(), messages, **variables)
            return text if answer else _left_open(text)
        except ValueError as error:
            raise UserError(
                f"the chat template in {self._template_place} failed ({error}); "
                "if it rejects the messages, change them; otherwise correct the template, or copy "
                "it again from the checkpoint"
            ) from None

    def _template(self) -> str:
        found = self.backend.chat_template
        if isinstance(found, dict):  # several by name
            found = found.get("default")
        if not isinstance(found, str):
            raise UserError(
                "it is neither a string nor a set of templates with one named 'default'"
            )
        return found

    @property
    def _template_place(self) -> str:
        """The file that contains the chat template, for error messages."""
        if self.directory is None:
            return "the tokenizer"
        file = self.directory / "chat_template.jinja"
        return str(file if file.exists() else self.directory / "tokenizer_config.json")

    def chat_text(self, prompt: str | Messages) -> str:
        """Returns a conversation as a string that ends where the assistant's answer begins.

        `prompt` is the user's message, or a list of messages that ends with the user's. The
        tokenizer's `system` message comes first, unless the list begins with a system message.
        Without a chat template, the string contains only the messages, with a line break after a
        user's message and a blank line after an assistant's. Raises UserError if there is a system
        message but no template.
        """
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        own = said[0]["role"] == "system"
        if self.has_chat_template:
            before = [{"role": "system", "content": self._system}] if self._system else []
            return self.render(said if own else before + said)
        if own:
            raise UserError(
                f"a prompt has a system message, but the tokenizer of {self.directory} has no chat "
                "template to format it; leave the message out, or give the tokenizer a template"
            )
        ends = {"user": "\n", "assistant": "\n\n"}
        text = "".join(turn["content"] + ends[turn["role"]] for turn in said)
        return text.removesuffix("\n")

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Returns the token ids of `chat_text(prompt)`, with a BOS token if the model has one."""
        return self.encode_prompts([prompt])[0]

    def encode_prompts(self, prompts: Sequence[str | Messages]) -> list[list[int]]:
        """Returns the token ids of each prompt, like `encode_prompt` but several times as fast."""
        texts = [self.chat_text(prompt) for prompt in prompts]
        return self.encode_batch(texts) if self.has_chat_template else self.encode_texts(texts)

    @functools.cached_property
    def begin_id(self) -> int | None:
        """The id of the BOS token that the tokenizer puts before texts, or None if it adds none."""
        begin = self.backend.bos_token_id
        return begin if begin is not None and self.backend.encode("")[:1] == [begin] else None

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, after BOS if the tokenizer adds one (`begin_id`).

        A text that already starts with BOS does not get a second one.
        """
        made = self.encode_batch(texts)
        if self.begin_id is None:
            return made
        return [ids if ids[:1] == [self.begin_id] else [self.begin_id, *ids] for ids in made]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without adding BOS or end-of-sequence tokens.

        Special tokens that are written out in `text`, such as `<|im_end|>`, become their ids.
        """
        return self.backend.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, like `encode` but several times as fast."""
        return self.backend(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Returns the string for token ids, without special tokens unless `keep_special`."""
        return self.backend.decode(
            [int(i) for i in ids],
            skip_special_tokens=not keep_special,
            clean_up_tokenization_spaces=False,
        )

    def completion_text(self, ids: Iterable[int]) -> str:
        """Returns the text by which a task judges the completion with the token ids `ids`.

        The text begins with `<think>` if the chat template ends prompts with `<think>`. Without it,
        an unfinished thought would look like an answer.
        """
        return (f"{THINK_START}\n" if self.opens_thinking else "") + self.decode(ids)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Returns each token's string, for display; an incomplete character becomes U+FFFD."""
        return [self._token(int(i)) for i in ids]

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that a token encodes, which may be only a part of a character."""
        text = self._token(int(token))
        if "\ufffd" not in text:
            return text.encode()
        piece = self.backend.convert_ids_to_tokens(int(token))
        if one := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(one[1])
        if self._byte_of_character.keys() >= set(piece):
            return bytes(self._byte_of_character[character] for character in piece)
        return text.encode()

    @functools.cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """The byte that each character of a byte-level vocabulary stands for."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {character: byte for byte, character in bytes_to_unicode().items()}

    @functools.cached_property
    def _token(self) -> Callable[[int], str]:
        return functools.lru_cache(maxsize=65_536)(lambda i: self.decode([i], keep_special=True))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's files, including the chat template, into a directory.

        The files that the tokenizer was loaded from are copied unchanged.
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


def _left_open(text: str) -> str:
    """Returns the rendered string `text` up to the mark `_OPEN_END` after its last message.

    Raises UserError if the chat template has left out the mark.
    """
    before, mark, after = text.rpartition(_OPEN_END.strip())
    if not mark:
        raise UserError("it drops the end of the last message, which the model must continue")
    # A template that strips messages has removed the mark's last character. It would also have
    # removed spaces before the mark.
    return before if after.startswith(_OPEN_END[-1]) else before.rstrip()


def _configured_eos_ids(directory: pathlib.Path) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.exists():
            continue
        values = read_object(file, "copy it again from the checkpoint")
        found.update(token_ids(values.get("eos_token_id"), f"{file} sets eos_token_id to"))
    return found


def token_ids(value: Any, what: str) -> tuple[int, ...]:
    """Returns the token ids in a JSON value: an id, a list of ids or None, which means no ids.

    Raises UserError if an entry is not a token id. The error message begins with `what`.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for number in ids:
        if type(number) is not int or not 0 <= number < LARGEST_COUNT:
            raise UserError(
                f"{what} {reprlib.repr(number)}, but a token id is a whole number from 0 to "
                f"{LARGEST_COUNT - 1}; copy the file again from the checkpoint"
            )
    return tuple(ids)

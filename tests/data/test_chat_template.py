import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading

import pytest

from chat_templates import DEFAULT_SYSTEM, OPENED, SWITCHED, with_template
from jexit.data import chat_template
from jexit.data.tokenizer import Tokenizer
from jexit.errors import UserError

MESSAGES = [
    {"role": "user", "content": "sum 12"},
    {"role": "assistant", "content": " +3####3 "},
    {"role": "user", "content": 'sum "37" <é\u2028\n>'},
]

IDIOMS = """
{%- set ns = namespace(found=false, last=messages|length - 1) %}
{%- macro turn(message) -%}
    <|{{ message.role }}|>{{ message['content'] | trim }}
{%- endmacro %}
{% for message in messages if message.role != 'system' %}
    {% if loop.index0 == ns.last %}{% set ns.found = true %}{% endif %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {{- turn(message) }}{{ eos_token }}
    {{ dict(message, n=loop.index) | tojson }} {{ message | tojson(indent=1) }}
    {% generation %}{% set kept = 1 %}{{ message.content[::-1] }}{% endgeneration %}
    {% break %}
{% endfor %}
{{ ns.found }} {{ tools is none }} {{ documents is none }} {{ kept is defined }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def children():
    """The processes that this one has started and not waited for."""
    tasks = pathlib.Path(f"/proc/{os.getpid()}/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


def test_templates_find_what_transformers_gives_them():
    for template in (SWITCHED, OPENED, DEFAULT_SYSTEM, IDIOMS):
        tokenizer = with_template(template)
        render = functools.partial(tokenizer.backend.apply_chat_template, tokenize=False)
        assert tokenizer.render(MESSAGES) == render(MESSAGES, add_generation_prompt=True)
        for content in ("+3", "+3 ", "+3\n\n"):
            opened = [*MESSAGES, {"role": "assistant", "content": content}]
            if template is not IDIOMS:  # which stops after the first message
                theirs = render(opened, continue_final_message=True)
                assert tokenizer.render(opened, answer=False) == theirs


def test_a_template_gets_the_same_date_every_day():
    """Prompts of a run that goes on tomorrow, and of the model's server, are those of today."""
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert with_template(dated).render(MESSAGES).startswith("26 Jul 2024")


def test_a_message_is_continued_where_the_template_left_it():
    stripping = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    opened = [MESSAGES[0], {"role": "assistant", "content": "+3 "}]
    assert with_template(stripping).render(opened, answer=False) == "[sum 12][+3"
    with pytest.raises(ValueError, match="drops the end of the last message"):
        with_template("{{ messages[0].content }}").render(opened, answer=False)


BROKEN = [
    ("a\n{% for m in messages %}", r"line 2: Unexpected end of template"),
    ("a\n\n{{ nothing.there }}", "line 3: 'nothing' is undefined"),
    ("{{ raise_exception('Roles must\n alternate.') }}", r"line 1: Roles must alternate\)"),
    ("{{ 1 + 'a' }}", "unsupported operand"),
    ("{{ ''.__class__.__mro__ }}", "line 1: access to attribute '__class__'"),
    ("{% set ns = namespace(_x=1) %}", "cannot contain '_x'"),
    ("{% set ns = namespace() %}{% set ns._x = 1 %}", "cannot contain '_x'"),
    ("{{ messages.append(1) }}", "of .list. object is unsafe"),
    (5, "it is neither a string nor"),
    ({"other": "a"}, "a set of templates with one named 'default'"),
    # Without end, or larger than the memory.
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ("{{ 'x' * 10**9 }}", "it takes more than 512 MiB of memory"),
    (
        "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}"
        "{% endfor %}",
        "it takes more than 512 MiB of memory",
    ),
    (
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "it writes more than 10,000,000 characters",
    ),
]


def test_a_broken_template_is_named_in_one_sentence():
    for template, reason in BROKEN:
        tokenizer = with_template(template)
        with pytest.raises(UserError, match=reason) as caught:
            tokenizer.chat_text("sum 12")
        message = str(caught.value)
        place = f"{tokenizer.directory}/chat_template.jinja"
        assert message.startswith(f"the chat template in {place} failed (")
        assert message.endswith("correct the template, or copy it again from the checkpoint")
        assert "\n" not in message and len(message) < 400
    assert with_template(SWITCHED).chat_text("sum 37") == "<|user|>sum 37<|assistant|>"


LOOP = "{% for i in range(99999) %}"
DOUBLING = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    threads = threading.active_count()
    for template in (
        LOOP * 4 + "{% endfor %}" * 4,
        DOUBLING + "{{ f(60) }}",
        "{% set a = 10**(10**9) %}",  # one operation, in which no Python runs
    ):
        with pytest.raises(UserError, match=r"\(it takes more than 0.2 s of processor time\)"):
            with_template(template).chat_text("sum 12")
        assert not children()
        assert threading.active_count() == threads
    assert with_template(SWITCHED).chat_text("sum 37") == "<|user|>sum 37<|assistant|>"


def test_a_template_in_the_tokenizers_settings_is_named(tmp_path):
    tokenizer = with_template("{% endif %}")
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"template in {tmp_path}/tokenizer_config.json failed"):
        Tokenizer.load(tmp_path).chat_text("sum 12")
    with pytest.raises(ValueError, match="the chat template in the tokenizer failed"):
        Tokenizer(tokenizer.backend).chat_text("sum 12")


def test_a_reply_that_was_not_waited_for_is_no_answer_to_the_next_request():
    def interrupt(*_):
        raise KeyboardInterrupt

    tokenizer = with_template(SWITCHED)
    tokenizer.chat_text("sum 1")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            with_template(LOOP * 4 + "{% endfor %}" * 4).chat_text("sum 2")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not children()
    assert tokenizer.chat_text("sum 3") == "<|user|>sum 3<|assistant|>"


PRINTS = "print(pid, flush=True)"
STARTS_ONE = """
import os, sys
from jexit.data import chat_template
assert chat_template.render("{{ messages[0].content }}", [{"content": "a"}]) == "a"
pid = chat_template._child._process.pid
"""


def test_the_process_that_renders_ends_with_the_one_that_asks():
    for end in (f"{PRINTS}; os._exit(3)", f"{PRINTS}; input()"):
        command = [sys.executable, "-c", STARTS_ONE + end]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asking:
            child = int(asking.stdout.readline())
            try:
                ended = os.pidfd_open(child)
            except ProcessLookupError:
                continue
            asking.send_signal(signal.SIGKILL)
            assert select.select([ended], [], [], 60)[0]
            os.close(ended)


def test_a_forked_process_has_its_own():
    forks = """
other = os.fork()
assert chat_template.render("{{ messages[0].content }}", [{"content": "b"}]) == "b"
if other:
    assert chat_template._child._process.pid == pid
    assert os.waitpid(other, 0)[1] == 0
else:
    assert chat_template._child._process.pid != pid
"""
    subprocess.run([sys.executable, "-W", "error", "-c", STARTS_ONE + forks], check=True)

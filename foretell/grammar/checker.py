"""The process that compiles a grammar first: what takes too long or too much memory ends here, and harms nobody.

A compiler in native code cannot be interrupted, and a thread cannot be ended; a process can. It reads a form per
line and answers with a line each: {"error": one line or "", "text": the grammar, "bytes": memory that it took}.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from typing import Any

from foretell.core.structured import StructuredOutput
from foretell.grammar.limits import CHECK_BYTES, CHECK_CPU_SECONDS, parser_limits
from foretell.grammar.text import grammar_text


def check(form: StructuredOutput, tokenizer: Any) -> dict[str, Any]:
    from llguidance import LLMatcher

    before = resident_bytes()
    try:
        text = grammar_text(form)
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=parser_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
    except Exception as error:
        return {"error": one_line(str(error)) or type(error).__name__}
    if matcher.is_error():
        return {"error": in_our_words(matcher.get_error())}
    return {"error": "", "text": text, "bytes": max(0, resident_bytes() - before)}


def in_our_words(error: str) -> str:
    """Where the library's own speak of what its users cannot see."""
    if "NoExtensionBias" in error:
        return "no text has this form"
    if "coerce_one_of" in error:
        return "the parts of a oneOf do not exclude each other: use anyOf"
    return one_line(error)


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def allow_cpu_seconds(seconds: int) -> None:
    """The kernel ends this process when it has used so much more; whole seconds, rounded up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + seconds + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    answers = threading.Lock()

    def work(line: str) -> None:
        allow_cpu_seconds(CHECK_CPU_SECONDS)
        with answers:
            print(json.dumps(check(StructuredOutput(**json.loads(line)), tokenizer)), flush=True)

    print("ready", flush=True)
    for line in sys.stdin:  # its end is the parent's: leave at once, whatever is being compiled
        threading.Thread(target=work, args=(line,), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()

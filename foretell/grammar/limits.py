"""What a grammar may cost. One set of limits for the check and for use, so that what passes one passes the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from llguidance import LLParserLimits

CHECK_CPU_SECONDS: Final = 1  # to compile one grammar; a machine that is busy may take longer by the clock
CHECK_BYTES: Final = 1 << 30  # address space of the process that checks
CACHE_BYTES: Final = 256 << 20
CACHE_ENTRIES: Final = 256
STEP_SECONDS: Final = 0.25  # one mask of one request; normal ones take 0.02 to 0.5 ms
TOTAL_SECONDS: Final = 5.0  # all masks of one request, …
TOTAL_SECONDS_PER_TOKEN: Final = 0.005  # … and so much more with each of its tokens


def parser_limits() -> LLParserLimits:
    """llguidance's own limits, tighter than its defaults: about 50 ms and 20 MB for the worst mask."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=600,
        initial_lexer_fuel=300_000,
        step_lexer_fuel=200_000,
        step_max_items=10_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )

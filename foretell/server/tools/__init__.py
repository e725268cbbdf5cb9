"""Tool calls in a model's text: streaming parsers, and forms for answers that must call one."""

from foretell.server.tools.calls import ToolCallDelta
from foretell.server.tools.choice import tool_choice_schema
from foretell.server.tools.formats import TOOL_FORMATS, detect_tool_format, marker_tokens, tool_parser_for
from foretell.server.tools.parser import ToolParser
from foretell.server.tools.streamed import ConstrainedParser
from foretell.server.tools.told import template_knows_tools, told_in_words

__all__ = [
    "TOOL_FORMATS",
    "ConstrainedParser",
    "ToolCallDelta",
    "ToolParser",
    "detect_tool_format",
    "marker_tokens",
    "template_knows_tools",
    "told_in_words",
    "tool_choice_schema",
    "tool_parser_for",
]

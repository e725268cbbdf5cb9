"""What can be wrong with a trace file."""

from foretell.errors import ForetellError


class TraceFormatError(ForetellError):
    """A trace file is broken or of no known format; the message names file, line and field."""

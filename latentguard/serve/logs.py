"""Log lines without what people wrote: of an error its kind and its place in the code, not its words. Knows no request."""

import logging
import logging.config
import traceback
from types import TracebackType

log = logging.getLogger("latentguard.serve")


class Wordless(logging.Formatter):
    """Tracebacks without messages: an error's message may quote a prompt. `words=True` leaves them in."""

    def __init__(self, words: bool = False) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.words = words

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback under it; not the one that another handler may have left in the record."""
        record.exc_text = None
        return super().format(record)

    def formatException(self, ei: "tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]") -> str:  # noqa: N802
        """Frames and kinds, of causes too."""
        if self.words or ei[1] is None:
            return super().formatException(ei)
        return frames(ei[1])


def frames(error: BaseException) -> str:
    """Where an error and what it came from were raised, and their kinds."""
    lines = [] if (earlier := error.__cause__ or error.__context__) is None else [frames(earlier), "then"]
    return "\n".join([*lines, "".join(traceback.format_tb(error.__traceback__)) + type(error).__qualname__])


def set_up(words: bool) -> None:
    """Everything to stderr; what is served at INFO, other libraries from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(Wordless(words))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("latentguard").setLevel(logging.INFO)

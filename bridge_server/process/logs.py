"""The worker's log: text on a terminal, else JSON lines. Imports no framework."""

import json
import logging
import sys
import time


def set_up(
    level: str,
    form: str | None = None,
) -> None:
    """Log to stderr at this level, as "text" or "json".

    The default is text on a terminal, and JSON elsewhere.
    """
    is_text = sys.stderr.isatty() if form is None else form == "text"
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(text if is_text else _JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("bridge_server", "bridge_wire"):
        logging.getLogger(name).setLevel(level.upper())


def enable_loggers() -> None:
    """Enable the worker's loggers again, since logging.config in a model's module disables them."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.startswith(
            ("bridge_server", "bridge_wire")
        ):
            logger.disabled = False


class _JsonFormatter(logging.Formatter):
    """One JSON object per line, for log collectors and for the parent of a spawned worker."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps(
            {
                "time": when,
                "level": record.levelname,
                "logger": record.name,
                "message": message,
            }
        )

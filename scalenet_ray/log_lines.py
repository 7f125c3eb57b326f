"""Logs as lines of JSON: one object a line, for people with a cluster's worth of them to search."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

from scalenet_ray.core.errors import UserError

__all__ = ["JsonLines", "log_to_stderr"]


class JsonLines(logging.Formatter):
    """A record as a JSON object: time (UTC), level, logger, message, and what `extra={"fields": ...}` held."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Have the package log to the standard error: warnings, or from the level that SCALENET_RAY_LOG names.

    Raises:
        UserError: if it names none.
    """
    level = os.environ.get("SCALENET_RAY_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        msg = f"SCALENET_RAY_LOG must be DEBUG, INFO, WARNING or ERROR, got {level}"
        raise UserError(msg)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("scalenet_ray")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)

"""Lets a user of the host interrupt what runs after a sampler has returned: runs of plans."""

from __future__ import annotations

import sys


class Interrupted(BaseException):
    """An interrupt on its way out of runs of plans, which go on after any other failure.

    Attributes:
        error: what the host raises.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def check() -> None:
    """Raises Interrupted if the host's user has interrupted it."""
    host = sys.modules.get("comfy.model_management")  # the host has imported it, if it is there
    throw = getattr(host, "throw_exception_if_processing_interrupted", None)
    if throw is not None:
        try:
            throw()
        except Exception as error:
            raise Interrupted(error) from error

"""Responses of a server that an error keeps open.

An ``HTTPError`` is the response itself, with its socket. Its traceback refers to the error
again, so that without :func:`close_responses` the socket stays open until the garbage
collector happens to run, in whatever the program does by then.
"""

from __future__ import annotations

import urllib.error

__all__ = ["close_responses"]


def close_responses(error: BaseException) -> None:
    """Close the responses of servers that an error, or one that led to it, keeps open.

    Args:
        error: Error of a download by urllib or requests, which stays readable; other errors
            are left alone.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        response = getattr(current, "response", None)  # of requests
        if isinstance(current, urllib.error.HTTPError):
            current.close()
        elif response is not None and hasattr(response, "close"):
            response.close()
        current = current.__cause__ or current.__context__

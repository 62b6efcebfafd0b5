"""Says in one line what the Hugging Face Hub refuses, and tries again what may pass."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ldmseg_fast.errors import HubError, UserError

T = TypeVar("T")

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
PASSING = (408, 429, 500, 502, 503, 504)  # answers that another try may change
TRIES, LONGEST_WAIT = 3, 20.0  # seconds


class UnreachableError(HubError):
    """Reports that the Hub does not answer, or not now; what is in the cache can still be used."""


def library(name: object) -> Any:
    """Imports huggingface_hub.

    Raises:
        HubError: it is not installed; the message begins with `name`.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise HubError(
            f"{name}: the Hub needs huggingface_hub ({error}); pip install 'ldmseg_fast[hub]', or give a local folder"
        ) from None
    return huggingface_hub


def retried(call: Callable[[], T]) -> T:
    """Calls again, at most `TRIES` times in all, where the Hub answers that it is busy; waits as long as it says."""
    errors = library("retried").errors
    for number in range(1, TRIES + 1):
        try:
            return call()
        except errors.HfHubHTTPError as error:
            status, headers = _status(error), getattr(error.response, "headers", {})
            if status not in PASSING or number == TRIES:
                raise
            asked = str(headers.get("Retry-After", ""))
            time.sleep(min(float(asked) if asked.isdecimal() else 2.0 ** (number - 1), LONGEST_WAIT))
    raise AssertionError  # the last try returns or raises


@contextmanager
def told(name: object, action: str = "read") -> Iterator[None]:
    """Turns errors of huggingface_hub inside a `with` block into a line.

    Args:
        name: of the repository.
        action: what is done with it: "read" or "write".

    Raises:
        UnreachableError: no connection, a lost one, or a Hub that is busy or broken.
        HubError: the Hub's refusal.
    """
    hub = library(name)
    errors = hub.errors
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of each try to go on
    try:
        yield
    except errors.GatedRepoError as error:
        where = f"{hub.constants.ENDPOINT}/{str(name).partition('@')[0]}"
        if _status(error) == 401:
            raise HubError(f"{name}: gated; accept its conditions at {where}, then {LOG_IN}") from None
        raise HubError(f"{name}: gated, and your account has no access; ask for it at {where}") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name}: the repository has no such branch, tag or commit; check what follows the @") from None
    except errors.RepositoryNotFoundError:
        here = "no such folder here, and " if action == "read" else ""
        cure = "check the name" if action == "read" else "check the name and that your account may write there"
        raise HubError(
            f"{name}: {here}{hub.constants.ENDPOINT} has no model of this name, or it is private; {cure}; for a "
            f"private one {LOG_IN}"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise UnreachableError(f"{name}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from None
    except errors.LocalTokenNotFoundError:
        raise HubError(f"{name}: no token of the Hub here; {LOG_IN}") from None
    except errors.LocalEntryNotFoundError as error:  # of a file, after its connection was lost
        raise UnreachableError(_lost(hub, name, error.__cause__ or error)) from None
    except errors.HfHubHTTPError as error:
        raise _refused(hub, name, error, action) from None
    except (errors.HTTPError, errors.FileMetadataError) as error:  # type: ignore[attr-defined]
        raise UnreachableError(_lost(hub, name, error)) from None
    except RuntimeError as error:  # an upload wraps what happened, and hf_xet has nothing else
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(hub, name, cause, action) from None
        if isinstance(error, UserError):
            raise
        raise UnreachableError(_lost(hub, name, cause or error)) from None
    except ValueError as error:  # what the Hub does not take of a card's front matter
        if isinstance(error, UserError) or "Invalid metadata" not in str(error):
            raise
        raise HubError(f"{name}: {' '.join(str(error).split())[:300]}; mend the front matter of README.md") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cache = hub.constants.HF_HUB_CACHE
            raise HubError(f"{name}: no space left in {cache}; free some, or set HF_HOME to another disk") from None
        if "Consistency check failed" not in str(error):
            raise
        raise UnreachableError(_lost(hub, name, error)) from None
    finally:
        logger.setLevel(level)


def _refused(hub: Any, name: object, error: Any, action: str) -> HubError:
    status = _status(error)
    if status == 401:
        return HubError(f"{name}: the Hub does not take the token (401); {LOG_IN} with a new one")
    if status == 403:
        what = "a token that may write" if action == "write" else "a token that may read it"
        return HubError(f"{name}: the Hub forbids it (403); use {what}: {LOG_IN}")
    if status == 412 or (status == 409 and action == "write"):
        return HubError(f"{name}: the repository has changed meanwhile; run the command again")
    if status in PASSING:
        return UnreachableError(f"{name}: {hub.constants.ENDPOINT} is busy or out of order ({status}); try again later")
    return HubError(f"{name}: the Hub answers {status}: {_first_line(error)}")


def _lost(hub: Any, name: object, error: BaseException) -> str:
    return (
        f"{name}: no connection to {hub.constants.ENDPOINT}, or it was lost ({_first_line(error)}); run it again when "
        f"there is one: files that are whole stay in the cache"
    )


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

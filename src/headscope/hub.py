"""Diagnose failed downloads from the Hugging Face hub, with advice for the user."""

from collections.abc import Iterator
from typing import Literal

Trouble = Literal["gated", "missing", "unreachable"]

_CARRIERS = ("aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")
"""HTTP packages; which of them raises depends on the version of `huggingface_hub`."""


def trouble(error: BaseException) -> Trouble | None:
    """Classify an error by its type and causes; None if it is not of the hub.

    `missing` may be a private repository, which the hub hides without a login.
    """
    from huggingface_hub import errors  # which loads an HTTP client, while every command line imports this file

    missing = (
        errors.EntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    )
    unreachable = (ConnectionError, TimeoutError, errors.HfHubHTTPError)
    causes = list(_causes(error))
    if any(isinstance(e, errors.GatedRepoError) or "is a gated dataset" in str(e) for e in causes):
        return "gated"
    for e in causes:
        if isinstance(e, errors.LocalEntryNotFoundError):  # which is also an EntryNotFoundError
            return "unreachable"
        if isinstance(e, missing) or type(e).__name__ == "DatasetNotFoundError":
            return "missing"
        if isinstance(e, unreachable) or type(e).__module__.partition(".")[0] in _CARRIERS:
            return "unreachable"
    return None


def advice(error: BaseException, name: str, *, otherwise: str, dataset: bool = False) -> str:
    """Return advice for an error.

    Args:
        error: the exception.
        name: name of the repository.
        otherwise: advice for an error that is not of the hub.
        dataset: whether it is of a dataset.
    """
    match trouble(error):
        case "gated":
            return (
                f"accept the terms at https://huggingface.co/{'datasets/' * dataset}{name}, then log in with "
                "`hf auth login`, or set HF_TOKEN to a token of an account that has access"
            )
        case "missing":
            return "check the name; for a private repository log in with `hf auth login`, or set HF_TOKEN"
        case "unreachable":
            return (
                "check the network, or fetch it where there is one, "
                f"`hf download {name}{' --repo-type dataset' * dataset} --local-dir FOLDER`, and pass the path of "
                "FOLDER instead of the name"
            )
        case None:
            return otherwise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""What to do when something cannot be fetched from the Hugging Face hub."""

from collections.abc import Iterator

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)


def advice(error: BaseException, name: str, *, otherwise: str) -> str:
    """What a user can do about an error of the hub, found among its causes.

    Args:
        error: what was raised.
        name: of the repository.
        otherwise: what to say of any other error.
    """
    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return (
                f"ask for access at https://huggingface.co/{name}, then log in with `hf auth login`, or set HF_TOKEN "
                "to a token of an account that has it"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return "check the name; for a private repository log in with `hf auth login`, or set HF_TOKEN"
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return (
                f"check the network, or fetch it where there is one, `hf download {name} --local-dir FOLDER`, and pass "
                "the path of FOLDER instead of the name"
            )
    return otherwise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

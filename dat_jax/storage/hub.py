"""Repositories of the Hugging Face Hub: their addresses, copies of them in a local cache, and commits to them.

Only this module imports huggingface_hub, which is optional. Its environment variables apply: HF_TOKEN, HF_HOME (the cache),
HF_HUB_OFFLINE and HF_ENDPOINT.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dat_jax.errors import UserError, explain_missing_module, name_some

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"hf://(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^\s@]+))?", re.ASCII)


class HubAddress(NamedTuple):
    """A revision of a repository.

    Attributes:
      repository: USER/REPOSITORY.
      revision: branch, tag or commit; None for the branch main.
    """

    repository: str
    revision: str | None


def is_on_hub(path: str | os.PathLike) -> bool:
    """Whether a path is meant as the address of a repository, even if the address is not well-formed."""
    return re.match(r"\s*hf:/", os.fspath(path), re.IGNORECASE) is not None


def parse_hub_address(address: str | os.PathLike) -> HubAddress:
    """Split the address hf://USER/REPOSITORY or hf://USER/REPOSITORY@REVISION.

    Raises:
      UserError: the address has another form.
    """
    text = os.fspath(address)
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UserError(
            f"{text!r}: expected hf://USER/REPOSITORY or hf://USER/REPOSITORY@REVISION, where REVISION is a branch, a tag or a "
            "commit."
        )
    return HubAddress(match["repository"], match["revision"])


def check_hub_address(address: str | os.PathLike) -> None:
    """Check, without network access, that an address is well-formed and that the package for it is installed.

    Raises:
      UserError: it is not.
    """
    parse_hub_address(address)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{os.fspath(address)} cannot be used. {explain_missing_module('huggingface_hub')}")


def download_repository(address: str | os.PathLike, *, patterns: Sequence[str] | None = None) -> pathlib.Path:
    """Copy the files of a repository to the cache of huggingface_hub, as far as they are not there.

    Without network access, a copy that is in the cache is used.

    Args:
      address: address of the repository.
      patterns: files to copy, as patterns of ``fnmatch``; None for all.

    Returns:
      Folder of the revision in the cache. It may also have other files that were copied before.

    Raises:
      UserError: the address is wrong, the repository or the revision does not exist or cannot be read, or there is neither
        network access nor a copy.
    """
    check_hub_address(address)
    repository, revision = parse_hub_address(address)
    with _hub_errors(address, "read"):
        from huggingface_hub import snapshot_download

        patterns = None if patterns is None else list(patterns)
        folder = pathlib.Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    logger.info("%s: commit %s.", os.fspath(address), folder.name)
    return folder


def commit_folder(
    folder: pathlib.Path,
    address: str,
    *,
    defaults: Mapping[str, str],
    is_replaced: Callable[[str], bool],
    message: str,
    private: bool = False,
) -> str:
    """Write the files of a local folder to a repository, as one commit. A missing repository or branch is created.

    Args:
      folder: local folder.
      address: address of the repository, with a branch as the revision if it has one.
      defaults: texts of further files by name, for files that neither the folder nor the repository has.
      is_replaced: name of a file -> whether it is deleted from the repository if the folder does not have it.
      message: title of the commit.
      private: whether a missing repository is created as a private one.

    Returns:
      URL of the commit.

    Raises:
      UserError: the address is wrong, the repository cannot be written, or it is public despite ``private``. No file of the
        repository has changed then.
    """
    check_hub_address(address)
    repository, branch = parse_hub_address(address)
    with _hub_errors(address, "written"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"{address} is public, but a private repository is requested. Make it private, or choose another."
            )
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        present = set(api.list_repo_files(repository, revision=branch))
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        texts = {name: text for name, text in defaults.items() if name not in present | files.keys()}
        outdated = sorted(name for name in present - files.keys() - texts.keys() if is_replaced(name))
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
        operations += [CommitOperationDelete(name) for name in outdated]
        commit = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return commit.commit_url


@contextlib.contextmanager
def _hub_errors(address: str | os.PathLike, action: str) -> Iterator[None]:
    """Context in which every error of huggingface_hub becomes a UserError: "... cannot be ``action``: reason"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the library, and of several others that it uses
        reason = _describe(error, parse_hub_address(address)).rstrip(".")
        raise UserError(f"{os.fspath(address)} cannot be {action}: {reason}.") from error


def _describe(error: BaseException, address: HubAddress) -> str:
    """The reason of a failure, in words."""
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login`, or set HF_TOKEN to a token that has access"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            return _describe(error.__cause__, address)
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        network = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} does not answer"
        return f"{network}, and there is no complete copy in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {address.revision or 'main'}{_list_revisions(address)}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owners grant access on request, see {constants.ENDPOINT}/{address.repository}; then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private; {login}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"access is denied (status {status}); {login}"
        return f"{constants.ENDPOINT} answers with status {status} {error.server_message or ''}".rstrip()
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # while a file is uploaded
        return _describe(error.__cause__, address)
    if re.search(r"Connect|Timeout|Network|Protocol", type(error).__name__):
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text.removesuffix(" Please retry with `force_download=True`.")[:300]


def _list_revisions(address: HubAddress) -> str:
    """The branches and tags of a repository for an error message; "" if they cannot be listed."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(address.repository)
    except Exception:  # the error that is being described is raised
        return ""
    return f"; it has {name_some([ref.name for ref in (*refs.branches, *refs.tags)])}"

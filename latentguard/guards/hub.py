"""A guard's folder to the Hub and from it, through huggingface_hub. Knows no field of it: `folder.py` checks what comes.

Three files travel and no other; what comes from the Hub is data, and is read as such.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard.errors import InputError
from latentguard.guards.folder import FILES, GUARD, save
from latentguard.weights import hub_reachable, quiet_unless_watched

if TYPE_CHECKING:
    from latentguard.guards.guard import LatentGuard

log = logging.getLogger(__name__)


def push(
    guard: "LatentGuard", repo: str, *, private: bool = True, token: str | None = None, revision: str | None = None, message: str = "Upload a Latent Guard"
) -> str:
    """Upload a guard's folder to `owner/name`, made if it is not there; its address.

    Args:
        private: also of a repository that is there already: a public one is refused, for nothing says that it is meant.
        revision: a branch, made if it is not there.

    Raises:
        InputError: for a guard that cannot be saved, a wrong name, no access, and a Hub out of reach.
    """
    from huggingface_hub import HfApi, constants

    _check_name(repo)
    quiet_unless_watched()
    with tempfile.TemporaryDirectory(prefix="latentguard-") as scratch:
        folder = save(guard, Path(scratch, "guard"))
        _check_reach(repo, f"save the guard to a folder instead (guard.save) and push it later; it was not pushed to {repo}")
        with _told(repo, "pushed to", revision):
            api = HfApi(token=token)
            made = api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise InputError(f"{repo} is public on {constants.ENDPOINT}: pass private=False to push there, or name another repository")
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES), revision=revision, commit_message=message)
    return str(made)


def pull(repo: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a guard: `repo` itself where such a folder is here, else fetched from the Hub as `owner/name`.

    Where the Hub cannot be reached, the copy that was fetched last is taken, with a warning.

    Raises:
        InputError: for a wrong name, no access, no such guard, and a Hub out of reach without a copy.
    """
    if (here := Path(repo).expanduser()).is_dir():
        return here
    if repo.startswith((".", "/", "~")) or here.exists():
        raise InputError(f"{repo}: there is no such folder; give one that LatentGuard.save wrote, or a Hub id (owner/name)")
    _check_name(repo)
    quiet_unless_watched()
    from huggingface_hub import constants, snapshot_download

    away = not constants.HF_HUB_OFFLINE and not hub_reachable()
    if away:
        log.warning("%s cannot be reached: the copy of %s fetched last is taken, if there is one", constants.ENDPOINT, repo)
    with _told(repo, "fetched from", revision):
        folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(FILES), local_files_only=away))
    if not (folder / GUARD).exists():
        raise InputError(f"{repo} is on the Hub but holds no {GUARD}, so it is no guard: give one that guard.push_to_hub wrote")
    return folder


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("no owner")
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no folder here and no name on the Hub: give owner/name, of letters, digits, dots, dashes and underscores") from error


def _check_reach(repo: str, way_out: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"HF_HUB_OFFLINE is set: unset it, or {way_out}")
    if not hub_reachable():
        raise InputError(f"{constants.ENDPOINT} cannot be reached: {way_out}")


@contextmanager
def _told(repo: str, doing: str, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises as one sentence with the way out."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(f"{repo} is gated: accept its terms at {page}, then run `hf auth login` or pass token=") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r}: leave revision out, or name one of {page}/tree/main") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"{repo} is not on {constants.ENDPOINT}, or you may not see it: correct the name, run `hf auth login`, or pass token=") from error
    except errors.LocalTokenNotFoundError as error:
        raise InputError(f"{repo} cannot be {doing} the Hub without a token: run `hf auth login`, or pass token=") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{repo} is not in the cache and {constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE is set): give a folder, or try again on line"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(f"{repo} cannot be {doing} the Hub with this token ({status}): run `hf auth login` with one that may, or pass token=") from error
        raise InputError(f"{repo} cannot be {doing} the Hub ({_first_line(error)}): try again, or use a folder") from error
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, as the version has it
        raise InputError(f"{repo} cannot be {doing} the Hub ({type(error).__name__}: {_first_line(error)}): try again, or use a folder") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]

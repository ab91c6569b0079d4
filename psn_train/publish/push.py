"""A folder -> a repository of the hub, in one commit: all of it is there, or nothing.

`huggingface_hub.upload_folder`, and timm's `push_to_hf_hub` that calls it, may split an upload into several commits
where hf_xet is installed; `create_commit` makes one. Files are uploaded before it; what no commit names nobody sees.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from psn_train.publish.folder import FILES
from psn_train.publish.naming import PublishError, check_name, split_repo

# the hub's own, which says what is stored as a large file
_OF_THE_HUB = ".gitattributes"


@dataclass(frozen=True)
class Target:
    """Where a folder goes, and what is there now.

    Attributes:
        repo: org/ARCHITECTURE.TAG.
        revision: a branch; None: the main one.
        user: whose token it is.
        exists: whether there is such a repository.
        head: the newest commit of the branch; None where there is no such branch yet.
    """

    repo: str
    revision: str | None
    user: str
    exists: bool
    head: str | None


def open_target(repo: str, architecture: str, *, revision: str | None = None, overwrite: bool = False) -> Target:
    """Look at where a folder is to go, before anything is computed or written for it.

    Args:
        repo: org/ARCHITECTURE.TAG.
        revision: a branch, which is made if there is none of that name; None: the main one.
        overwrite: go on from a commit that is there; its files are replaced, and stay in the history.

    Raises:
        PublishError: the name is another network's; no token, an invalid one, or no right to the namespace; a
            repository that exists without `overwrite`, or that holds another architecture; no hub.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    org, name = split_repo(repo)
    check_name(name, architecture, f"--to {repo}")
    if get_token() is None:
        raise PublishError(
            f"--to {repo}: no token of the hub; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = _api()
    with _told(repo, "whoami"):
        who = api.whoami()
    names = [who["name"], *(one["name"] for one in who.get("orgs", ()))]
    if "orgs" in who and org.lower() not in (one.lower() for one in names):
        raise PublishError(
            f"--to {repo}: the token is of {who['name']}, who may write to {', '.join(names)} and not to {org}; name "
            f"one of these, or have {org} add {who['name']}"
        )
    with _told(repo, "looking at the repository"):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return Target(repo, revision, who["name"], False, None)
        head = info.sha
        if revision is not None:
            try:
                info = api.model_info(repo, revision=revision)
                head = info.sha
            except RevisionNotFoundError:
                head = None
    files = [file.rfilename for file in info.siblings or ()]
    _check_same_network(api, repo, architecture, info.sha, files)
    if head is not None and not overwrite:
        where = repo if revision is None else f"{repo}, branch {revision},"
        held = ", ".join(sorted(set(files) - {_OF_THE_HUB})[:5]) or "nothing in it"
        raise PublishError(
            f"--to: {where} exists already, with {held}. "
            "Give --overwrite for a new commit in its place, --revision NAME for a branch beside it, or another tag"
        )
    return Target(repo, revision, who["name"], True, head)


def _check_same_network(api, repo: str, architecture: str, sha: str, files) -> None:
    if "config.json" not in files:
        return
    with tempfile.TemporaryDirectory() as folder, _told(repo, "reading its config.json"):
        path = api.hf_hub_download(repo, "config.json", revision=sha, local_dir=folder)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    found = config.get("architecture") if isinstance(config, dict) else None
    if found != architecture:
        raise PublishError(
            f"--to: {repo} exists and holds {f'a {found}' if found else 'something else'}, not a {architecture}; its "
            "config.json says so. Choose another tag"
        )


def push(folder: Path, target: Target, *, message: str, private: bool = False) -> str:
    """Commit the folder's files; returns the commit's URL.

    What the branch held besides is deleted by the same commit. A commit whose answer is lost is looked for.

    Raises:
        PublishError: with what is left, if anything is: a repository or branch that was made for the commit is deleted
            again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    api, made, making, sent = _api(), None, None, False
    try:
        if not target.exists:
            making = "repository"
            with _told(target.repo, "creating the repository"):
                api.create_repo(target.repo, exist_ok=False, **({"private": True} if private else {}))
            made, making = making, None
        if target.revision is not None and target.head is None:
            making = "branch"
            with _told(target.repo, f"creating the branch {target.revision}"):
                api.create_branch(target.repo, branch=target.revision)
            made, making = made or making, None
        with _told(target.repo, "uploading"):
            info = api.model_info(target.repo, revision=target.revision)
            others = [file.rfilename for file in info.siblings or () if file.rfilename not in (*FILES, _OF_THE_HUB)]
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in FILES]
            operations += [CommitOperationDelete(path_in_repo=name) for name in others]
            sent = True
            commit = api.create_commit(
                target.repo,
                operations,
                commit_message=message,
                revision=target.revision,
                # refused if somebody commits meanwhile
                parent_commit=target.head or info.sha,
            )
        return str(commit.commit_url)
    except BaseException as error:
        if sent and isinstance(error, PublishError):
            # the connection may be lost after the commit was made
            with contextlib.suppress(Exception):
                if (head := _head_that_holds(api, target, folder)) is not None:
                    return f"{api.endpoint}/{target.repo}/commit/{head}"
        left = _undo(api, target, made)
        if making is not None and not isinstance(error.__cause__, HfHubHTTPError):
            # no answer, and so no refusal
            left += f" Whether a {making} was made nobody knows: look at {api.endpoint}/{target.repo}."
        if isinstance(error, PublishError):
            raise PublishError(f"{error}\n{left}") from error
        print(left, file=sys.stderr)
        raise


def _head_that_holds(api, target: Target, folder: Path) -> str | None:
    """The newest commit of the branch, if its files are those of the folder, by their hashes."""
    info = api.model_info(target.repo, revision=target.revision, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or () if file.rfilename != _OF_THE_HUB}
    if set(there) != set(FILES):
        return None
    for name in FILES:
        data, file = (folder / name).read_bytes(), there[name]
        if file.lfs is not None:
            same = file.lfs["sha256"] == hashlib.sha256(data).hexdigest()
        else:
            # what git calls a blob
            same = file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if not same:
            return None
    return info.sha


def _undo(api, target: Target, made: str | None) -> str:
    """Delete what was made for a commit that did not come to be; returns what is there now, in words."""
    if made is None:
        return f"Nothing is published: {target.repo} is as it was." if target.exists else "Nothing is published."
    where = target.repo if made == "repository" else f"{target.repo}, branch {target.revision}"
    try:
        if made == "repository":
            api.delete_repo(target.repo, missing_ok=True)
        else:
            api.delete_branch(target.repo, branch=target.revision)
    except Exception as error:
        return (
            f"Nothing is published, but the empty {made} {where} is left: it could not be deleted "
            f"({type(error).__name__}). Delete it at {api.endpoint}/{target.repo}/settings, or publish with "
            "--overwrite."
        )
    return f"Nothing is published or left: the {made} that was made for it is deleted again."


def _api():
    from huggingface_hub import HfApi

    import psn_train

    return HfApi(library_name="psn_train", library_version=psn_train.__version__)


@contextlib.contextmanager
def _told(repo: str, doing: str) -> Iterator[None]:
    """Errors of the hub and of the network as a PublishError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except PublishError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip().splitlines()[0]
        advice = {
            401: "the token is not valid: log in again with `hf auth login`, or set HF_TOKEN",
            403: "the token has no right to this: take one with write access to the organisation's repositories",
            404: "there is no such thing, or the token may not see it",
            409: "the name is taken, or was taken meanwhile: choose another tag",
            412: "somebody committed to it meanwhile: look at it, and publish again",
        }.get(status, "try again later")
        raise PublishError(f"--to {repo}: {doing} failed with status {status} ({said}); {advice}") from error
    except Exception as error:
        # requests, httpx or hf_xet, by the version of huggingface_hub
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        hint = "" if isinstance(cause, ValueError) else f". Is {constants.ENDPOINT} within reach?"
        raise PublishError(f"--to {repo}: {doing} failed: {type(cause).__name__}: {cause}{hint}") from error

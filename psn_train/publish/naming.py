"""What something is published as: its one name ARCHITECTURE.TAG, and its licence."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import PurePath

from psn_train.models.published import TAG

# as docs/hub/repositories-licenses of the hub lists them, but for those of single models, `unknown` and `other`
_KNOWN = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr
"""
LICENSES = tuple(_KNOWN.split())


class PublishError(ValueError):
    """Something cannot be published as it is asked for. Nothing of it is left, or the message says what."""


@dataclass(frozen=True)
class License:
    """The licence of the weights, as the hub's cards have it.

    Attributes:
        identifier: one of LICENSES, or `other`.
        name, link: of `other` alone.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return self.identifier if self.name is None else f"{self.name} ({self.link})"


def check_license(identifier: str | None, name: str | None = None, link: str | None = None) -> License:
    """The licence that was asked for; none is ever assumed.

    Raises:
        PublishError: there is none, the hub does not know it, or `other` without its name and link.
    """
    if identifier is None:
        raise PublishError(
            "--license: not given, and no licence is assumed for weights; say under which they are published, such as "
            "--license apache-2.0, cc-by-4.0 or cc-by-nc-4.0, as the data that they were trained on allows"
        )
    if identifier == "other":
        if not name or not link:
            raise PublishError("--license other: wanted --license-name NAME and --license-link URL, too")
        return License(identifier, name, link)
    if identifier not in LICENSES:
        near = difflib.get_close_matches(re.sub(r"[\s_]+", "-", identifier.lower()), LICENSES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PublishError(
            f"--license: {identifier!r} is no identifier of the hub{hint} Another licence is --license other with "
            "--license-name and --license-link. Known: " + ", ".join(LICENSES)
        )
    if name or link:
        raise PublishError(f"--license-name and --license-link go with --license other, and not with {identifier}")
    return License(identifier)


def split_repo(repo: str) -> tuple[str, str]:
    """org/ARCHITECTURE.TAG -> (org, ARCHITECTURE.TAG).

    Raises:
        PublishError: it is no repository's name.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        org, slash, name = repo.partition("/")
        if not slash:
            raise HFValidationError("wanted org/name")
    except HFValidationError as error:
        raise PublishError(
            f"--to: got {repo!r}, wanted org/ARCHITECTURE.TAG, such as me/sew_resnet18_psn.tet_t4_in1k ({error})"
        ) from error
    return org, name


def check_name(name: str, architecture: str, where: str) -> str:
    """The tag of ARCHITECTURE.TAG.

    Args:
        name: the one asked for.
        architecture: the network's, which the name has to begin with.
        where: what names it, for the message.

    Raises:
        PublishError: it names another architecture, no tag, or a tag that timm would not take for one.
    """
    found, _, tag = name.partition(".")
    if found != architecture or not TAG.fullmatch(tag):
        raise PublishError(
            f"{where}: got the name {name!r}, and this is a {architecture}; wanted {architecture}.TAG with a tag of "
            "a-z, 0-9 and _, such as tet_t4_in1k: architecture, tag and repository share one name"
        )
    return tag


def name_of_folder(folder: PurePath, architecture: str, recipe_name: str) -> tuple[str, str]:
    """(ARCHITECTURE.TAG, TAG) of what is written to a folder.

    The folder's own name decides where it is one of a network; else the recipe's; else the tag is the recipe's name.

    Raises:
        PublishError: the folder is named after another network.
    """
    from timm.models import is_model

    if "." in folder.name and is_model(folder.name.partition(".")[0]):
        return folder.name, check_name(folder.name, architecture, f"--to-folder {folder}")
    head, _, tag = recipe_name.partition(".")
    if head != architecture or not TAG.fullmatch(tag):
        tag = re.sub(r"[^a-z0-9_]+", "_", recipe_name.lower()).strip("_") or "own"
    return f"{architecture}.{tag}", tag

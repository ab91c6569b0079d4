"""Published weights by name: `timm.create_model("ARCHITECTURE.TAG", pretrained=True)`, and the bare ARCHITECTURE.

A maintainer adds a tag to PUBLISHED: `psn publish RUN --to org/ARCHITECTURE.TAG` prints its entry. Weights of one's own
get their name by `register_pretrained` in one's own code; `hf-hub:org/ARCHITECTURE.TAG` needs neither.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Mapping

from timm.models import PretrainedCfg, generate_default_cfgs, model_entrypoint, register_model

from psn_train.models import conv_net, sew_resnet  # noqa: F401 (register their architectures)
from psn_train.models.registration import NETWORKS, TAG_ARGUMENTS

# ARCHITECTURE.TAG -> arguments of `register_pretrained`; the first tag of an architecture is the one of its bare name
PUBLISHED: dict[str, dict] = {}

TAG = re.compile(r"[a-z0-9][a-z0-9_]*")
_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}


def register_pretrained(
    architecture: str,
    tag: str,
    hf_hub_id: str,
    *,
    model_args: Mapping[str, object] | None = None,
    pretrained_cfg: Mapping[str, object] | None = None,
) -> None:
    """Give weights on the hub a name in timm's registry, ARCHITECTURE.TAG.

    The first tag of an architecture is what its bare name loads with pretrained=True. Without weights the bare name
    stays the network as it is defined here.

    Args:
        architecture: one of `NETWORKS`.
        tag: such as tet_t4_in1k.
        hf_hub_id: org/ARCHITECTURE.TAG, with @REVISION where it is not the newest; the name is the repository's.
        model_args: `model_args` of the repository's config.json, such as T; arguments of create_model go before them.
        pretrained_cfg: what differs from the architecture's, such as num_classes, input_size, mean, std, license.

    Raises:
        ValueError: no such architecture, another name than the repository's, a key that timm does not know, or the tag
            is registered for another repository.
    """
    name = f"{architecture}.{tag}"
    if architecture not in NETWORKS:
        raise ValueError(
            f"register_pretrained: {architecture!r} is no network of psn_train; see psn_train.models.NETWORKS"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", tag):
        raise ValueError(f"register_pretrained: got tag={tag!r}, wanted a-z, 0-9 and _, such as tet_t4_in1k")
    repo, _, revision = hf_hub_id.partition("@")
    if repo.count("/") != 1 or repo.partition("/")[2] != name or ("@" in hf_hub_id and not revision):
        raise ValueError(
            f"register_pretrained: got hf_hub_id={hf_hub_id!r}, wanted org/{name}: architecture, tag and repository "
            "share one name"
        )
    if unknown := sorted(set(pretrained_cfg or ()) - _FIELDS):
        raise ValueError(f"register_pretrained: pretrained_cfg: timm does not know {', '.join(unknown)}")
    entrypoint = model_entrypoint(architecture)
    module = sys.modules[entrypoint.__module__]
    known = module.default_cfgs[architecture]
    if tag in known.tags and known.cfgs[tag].hf_hub_id != hf_hub_id:
        raise ValueError(f"register_pretrained: {name} is registered for {known.cfgs[tag].hf_hub_id} already")
    plain = known.cfgs[""]
    # lists where JSON had no tuples
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in (pretrained_cfg or {}).items()}
    cfg = dataclasses.replace(plain, **{**changes, "hf_hub_id": hf_hub_id, "architecture": architecture, "tag": tag})
    cfgs = {architecture: plain, **{f"{architecture}.{one}": known.cfgs[one] for one in known.tags if one}, name: cfg}
    module.default_cfgs[architecture] = generate_default_cfgs(cfgs)[architecture]
    TAG_ARGUMENTS[name] = dict(model_args or {})
    with warnings.catch_warnings():
        # that it is overwritten is meant
        warnings.filterwarnings("ignore", message="Overwriting ")
        register_model(entrypoint)


for _name, _entry in PUBLISHED.items():
    register_pretrained(*_name.split(".", 1), **_entry)

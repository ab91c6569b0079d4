"""`psn publish --to` against a stand-in for the hub's API: what is there afterwards, what timm loads, every refusal."""

import hashlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import small_document, train_here
from hub_standin import hub_standin
from safetensors.torch import load

from psn_train.cli import main
from psn_train.models import published, register_pretrained
from psn_train.models.registration import TAG_ARGUMENTS
from psn_train.publish.folder import FILES
from psn_train.publish.hub import load_run
from psn_train.publish.naming import PublishError
from psn_train.publish.push import Target, open_target, push

NAME = "sew_resnet10_psn.digits"
REPO = f"lab.eu/{NAME}"

# huggingface_hub's own
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run_dir(digit_shards, tmp_path_factory) -> Path:
    document = small_document(digit_shards, tmp_path_factory.mktemp("push") / "run")
    assert train_here({**document, "schedule": {"epochs": 1, "by": "step"}}) == 0
    return Path(document["run_dir"])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four files as `push` takes them; the weights are large, the others not."""
    made = tmp_path / "folder"
    made.mkdir()
    for name in FILES:
        (made / name).write_bytes(name.encode() * (2000 if name.endswith(".safetensors") else 3))
    (made / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    return made


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that huggingface_hub takes for the hub, with a token that may write to `me` and `lab`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with hub_standin() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_me")
        # it tries five times, and waits seconds between
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=lambda: 0.0))
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        yield hub
        _http.close_session()


@pytest.fixture
def publish(run_dir, capsys, checked_here):
    """publish("--overwrite", ...) of the run to REPO -> (status, stdout, stderr)."""

    def run(*words, to=REPO) -> tuple[int, str, str]:
        capsys.readouterr()
        given = ["--to", to, "--license", "mit", "--workers", "0"]
        return (main(["publish", str(run_dir), *given, *map(str, words)]), *capsys.readouterr())

    return run


# ---- up, and down again


@pytest.mark.parametrize("lfs_above", [10_000, None], ids=["large file", "regular file"])
def test_published_and_loaded_by_timm(hub, publish, run_dir, lfs_above):
    hub.lfs_above = lfs_above
    status, out, _ = publish()
    assert status == 0 and f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in out
    assert set(hub.files(REPO)) == {*FILES, ".gitattributes"}
    assert len(hub.repos[REPO].branches["main"]) == 2 and hub.asked("POST", "/commit/") == 1
    assert len(hub.large) == (1 if lfs_above else 0) and not hub.repos[REPO].private
    assert f'"hf-hub:{REPO}"' in hub.files(REPO)["README.md"].decode()
    model = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), load_run(run_dir)[0](images))
    assert model.pretrained_cfg["tag"] == "digits" and model.pretrained_cfg["license"] == "mit"
    assert hub.asked("GET", "/_large/") == (1 if lfs_above else 0)


_FRESH = """
import sys, timm, psn_train
model = timm.create_model(sys.argv[1], pretrained=True)
print(model.T, model.num_classes, model.pretrained_cfg["hf_hub_id"])
"""


def test_a_fresh_process_with_plain_timm_loads_it(hub, publish, tmp_path):
    assert publish()[0] == 0
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN")
    words = [sys.executable, "-c", _FRESH, f"hf-hub:{REPO}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == f"2 10 {REPO}\n", done.stderr


def test_private_branches_and_overwriting(hub, publish):
    assert publish("--private")[0] == 0 and hub.repos[REPO].private
    weights = hub.files(REPO)["model.safetensors"]
    # a branch beside it is a new one each time
    status, out, _ = publish("--revision", "v2")
    assert status == 0 and f"hf-hub:{REPO}@v2" in out and set(hub.repos[REPO].branches) == {"main", "v2"}
    assert len(hub.repos[REPO].branches["main"]) == 2
    assert timm.create_model(f"hf-hub:{REPO}@v2", pretrained=True).T == 2
    status, _, err = publish("--revision", "v2")
    assert status == 2 and f"{REPO}, branch v2, exists already" in err
    # what lay there besides, such as pickled weights, goes with the same commit
    main_branch = hub.repos[REPO].branches["main"]
    main_branch[-1][1]["pytorch_model.bin"] = main_branch[-1][1]["model.safetensors"]
    assert publish()[0] == 2 and len(main_branch) == 2
    assert publish("--overwrite", "--which", "last")[0] == 0 and len(main_branch) == 3
    assert set(hub.files(REPO)) == {*FILES, ".gitattributes"} and hub.files(REPO)["model.safetensors"] == weights


def test_a_new_branch_of_another_networks_files_holds_ours_alone(hub, folder):
    hub.add(REPO, notes=b"mine", config_json=b'{"architecture": "sew_resnet10_psn"}')
    target = open_target(REPO, "sew_resnet10_psn", revision="v1")
    assert target.exists and target.head is None
    push(folder, target, message="v1")
    assert set(hub.files(REPO, "v1")) == {*FILES, ".gitattributes"} and "notes" in hub.files(REPO)


def test_through_hf_xet_it_is_one_commit_too(hub, folder, monkeypatch, tmp_path):
    """Where it is installed, huggingface_hub uploads through it, here to a store in a folder."""
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.store = f"local://{tmp_path / 'store'}"
    weights = (folder / "model.safetensors").read_bytes()
    with pytest.raises(PublishError, match=r"(?s)uploading failed.*the repository that was made for it is deleted"):
        # the hub does not find it in its store
        push(folder, open_target(REPO, "sew_resnet10_psn"), message="new")
    assert hub.repos == {}
    hub.large[hashlib.sha256(weights).hexdigest()] = weights
    push(folder, open_target(REPO, "sew_resnet10_psn"), message="new")
    assert hub.files(REPO)["model.safetensors"] == weights and len(hub.repos[REPO].branches["main"]) == 2
    assert hub.asked("GET", "/xet-write-token/") and not hub.asked("PUT", "/_large/")
    assert list((tmp_path / "store").rglob("*xorb*"))


# ---- refused, and nothing left


@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        ("", REPO, "no token of the hub; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", REPO, "whoami failed with status 401 .*; the token is not valid"),
        ("hf_of_other", REPO, "the token is of other, who may write to other and not to lab.eu"),
        ("hf_reads_only", REPO, "creating the repository failed with status 403 .*the token has no right to this"),
        (
            "hf_of_me",
            "me/sew_resnet18_psn.digits",
            "got the name 'sew_resnet18_psn.digits', and this is a sew_resnet10",
        ),
        ("hf_of_me", "me/sew_resnet10_psn", r"wanted sew_resnet10_psn\.TAG"),
    ],
)
def test_tokens_rights_and_names(hub, publish, monkeypatch, token, repo, says):
    monkeypatch.setenv("HF_TOKEN", token)
    status, out, err = publish(to=repo)
    assert status == 2 and out == "" and len(re.findall("^psn: ", err, re.MULTILINE)) == 1 and "Traceback" not in err
    assert re.search(says, err), err
    assert hub.repos == {} and hub.asked("POST", "/commit/") == 0


def test_what_can_be_known_before_is_said_before_anything_is_evaluated(hub, publish, monkeypatch):
    from psn_train.publish import publishing

    monkeypatch.setattr(publishing, "check_folder", lambda *_, **__: pytest.fail("it was evaluated"))
    hub.add(REPO, config_json=b"{}")
    assert publish()[0] == 2
    monkeypatch.delenv("HF_TOKEN")
    assert publish()[0] == 2


def test_a_name_that_is_taken(hub, publish, folder):
    hub.add(REPO, config_json=b'{"architecture": "sew_resnet10_psn"}', notes=b"")
    before = hub.files(REPO)
    status, _, err = publish()
    assert status == 2 and f"{REPO} exists already, with config.json, notes. Give --overwrite" in err
    hub.add("lab/sew_resnet10_psn.other", config_json=b'{"architecture": "resnet18"}')
    for words in ((), ("--overwrite",), ("--revision", "v1")):
        status, _, err = publish(*words, to="lab/sew_resnet10_psn.other")
        assert status == 2 and "holds a resnet18, not a sew_resnet10_psn" in err
    assert hub.files(REPO) == before and len(hub.repos) == 2
    # by somebody else, in the meantime or out of sight
    target = open_target("me/sew_resnet10_psn.new", "sew_resnet10_psn")
    hub.add("me/sew_resnet10_psn.new", theirs=b"")
    with pytest.raises(PublishError, match=r"(?s)status 409 .*the name is taken.*Nothing is published"):
        push(folder, target, message="new")
    assert set(hub.files("me/sew_resnet10_psn.new")) == {".gitattributes", "theirs"}


def test_a_commit_meanwhile_is_not_overwritten(hub, folder):
    hub.add(REPO, config_json=b'{"architecture": "sew_resnet10_psn"}')
    target = open_target(REPO, "sew_resnet10_psn", overwrite=True)
    hub.repos[REPO].commit("main", {}, "of somebody else")
    with pytest.raises(PublishError, match=r"(?s)status 412 .*somebody committed to it meanwhile.*is as it was"):
        push(folder, target, message="ours")
    assert hub.files(REPO) == {}


@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("fault", ["upload", "before", "status"])
def test_cut_in_mid_upload_leaves_nothing(hub, folder, fault, revision):
    """Neither of a repository that is new, nor in one that is there."""
    if fault == "upload":
        hub.cut_upload = 5000
    elif fault == "before":
        hub.cut_commit = "before"
    else:
        hub.answers["POST", f"/api/models/{REPO}/commit/"] = 500
    with pytest.raises(PublishError, match=r"(?s)uploading failed.*Nothing is published or left: the repository"):
        push(folder, open_target(REPO, "sew_resnet10_psn", revision=revision), message="new")
    assert hub.repos == {} and hub.asked("DELETE", "/api/repos/delete") == 1
    hub.add(REPO, config_json=b'{"architecture": "sew_resnet10_psn"}')
    before = hub.files(REPO)
    target = open_target(REPO, "sew_resnet10_psn", revision=revision, overwrite=revision is None)
    left = "is as it was" if revision is None else "the branch that was made for it is deleted again"
    with pytest.raises(PublishError, match=f"(?s)uploading failed.*{left}"):
        push(folder, target, message="again")
    assert hub.files(REPO) == before and set(hub.repos[REPO].branches) == {"main"}
    # and once the line holds, it goes through
    hub.cut_upload = hub.cut_commit = None
    hub.answers.clear()
    push(folder, target, message="again")
    assert hub.files(REPO, revision or "main")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_commit_whose_answer_is_lost_counts(hub, folder):
    hub.cut_commit = "after"
    url = push(folder, open_target(REPO, "sew_resnet10_psn"), message="new")
    assert url == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].branches['main'][-1][0]}"
    assert set(hub.files(REPO)) == {*FILES, ".gitattributes"}


def test_what_cannot_be_deleted_is_said(hub, folder):
    hub.cut_commit = "before"
    hub.answers["DELETE", "/api/repos/delete"] = 403
    with pytest.raises(PublishError, match=f"the empty repository {REPO} is left: .*Delete it at .*settings"):
        push(folder, open_target(REPO, "sew_resnet10_psn"), message="new")
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_interrupted_by_hand_leaves_nothing(hub, folder, monkeypatch, capsys):
    from huggingface_hub import HfApi

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push(folder, open_target(REPO, "sew_resnet10_psn"), message="new")
    assert hub.repos == {} and "Nothing is published or left" in capsys.readouterr().err


def test_a_hub_that_is_not_there(hub, folder):
    target = Target(REPO, None, "me", False, None)
    hub.down = 0
    with pytest.raises(PublishError, match=f"whoami failed: .*Is {hub.url} within reach"):
        open_target(REPO, "sew_resnet10_psn")
    with pytest.raises(
        PublishError,
        match=r"(?s)creating the repository failed.*Nothing is published. Whether a repository was made nobody",
    ):
        push(folder, target, message="new")


def test_a_card_that_the_hub_refuses_is_found_before_the_upload(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(PublishError, match=r"(?s)Invalid metadata in README.md.*the repository that was made"):
        push(folder, open_target(REPO, "sew_resnet10_psn"), message="new")
    assert hub.repos == {} and hub.large == {}


# ---- names of published weights


@pytest.fixture
def registry():
    """timm's registry as it was, afterwards."""
    entry = timm.models.model_entrypoint("sew_resnet10_psn")
    module = sys.modules[entry.__module__]
    before = module.default_cfgs["sew_resnet10_psn"]
    yield
    module.default_cfgs["sew_resnet10_psn"] = before
    TAG_ARGUMENTS.clear()
    with pytest.warns(UserWarning, match="Overwriting"):
        timm.models.register_model(entry)


def test_a_registered_tag_is_loaded_by_its_name_and_by_the_bare_one(hub, publish, run_dir, registry):
    _, out, _ = publish()
    # what the command prints is what PUBLISHED takes
    (entry,) = eval(out[out.index("{") :]).values()
    register_pretrained("sew_resnet10_psn", "digits", **entry)
    assert {"sew_resnet10_psn", NAME} <= set(timm.list_pretrained("sew_resnet10_*"))
    saved = load(hub.files(REPO)["model.safetensors"])
    for name in ("sew_resnet10_psn", NAME):
        model = timm.create_model(name, pretrained=True)
        assert model.T == 2 and all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
        assert model.pretrained_cfg["tag"] == "digits" and model._model_args["width"] == 8
    # the network without weights is what it was
    plain = timm.create_model("sew_resnet10_psn")
    assert (plain.T, plain.num_classes, plain.in_chans) == (4, 1000, 3) and "tag" not in plain.pretrained_cfg
    assert timm.create_model(NAME).num_classes == 10
    assert timm.create_model(NAME, pretrained=True, num_classes=3).num_classes == 3
    with pytest.raises(ValueError, match="they were trained with another T or k"):
        timm.create_model(NAME, pretrained=True, T=3)
    # a second tag goes by its name alone
    register_pretrained("sew_resnet10_psn", "later", "me/sew_resnet10_psn.later")
    assert timm.create_model("sew_resnet10_psn", pretrained=True).pretrained_cfg["tag"] == "digits"


def test_mistakes_about_tags(registry):
    for words, says in (
        (("resnet18", "a", "me/resnet18.a"), "is no network of psn_train"),
        (("sew_resnet10_psn", "A b", "me/sew_resnet10_psn.A b"), "wanted a-z, 0-9 and _"),
        (("sew_resnet10_psn", "a", "me/sew_resnet10_psn.b"), r"wanted org/sew_resnet10_psn\.a"),
        (("sew_resnet10_psn", "a", "sew_resnet10_psn.a"), r"wanted org/sew_resnet10_psn\.a"),
    ):
        with pytest.raises(ValueError, match=says):
            register_pretrained(*words)
    with pytest.raises(ValueError, match="timm does not know meann"):
        register_pretrained("sew_resnet10_psn", "a", "me/sew_resnet10_psn.a", pretrained_cfg={"meann": (0,)})
    register_pretrained("sew_resnet10_psn", "a", "me/sew_resnet10_psn.a")
    with pytest.raises(ValueError, match=r"is registered for me/sew_resnet10_psn\.a already"):
        register_pretrained("sew_resnet10_psn", "a", "you/sew_resnet10_psn.a")
    for name, entry in published.PUBLISHED.items():
        assert entry["hf_hub_id"].partition("@")[0].partition("/")[2] == name

"""Bytes of failing sources: in order, each once, however often the source fails; what does not pass is said at once."""

import hashlib
import os
import subprocess
import time

import numpy as np
import pytest
from flaky_server import Plan, flaky_server

from psn_train.data.fetch import ChangedError, FetchError, Patience, fetch_blocks, fetch_bytes, hide_password
from psn_train.data.index import NoShards, Shard, ShardIndex, load_index, save_index

QUICK = Patience(attempts=8, stall_s=1.0, first_wait_s=0.01)
SIZE = 3_000_000


@pytest.fixture
def data(tmp_path):
    """A file of noise; its folder is served."""
    noise = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.tar").write_bytes(noise)
    return noise


def digest(url: str, patience: Patience = QUICK, size: int | None = SIZE) -> str:
    got = hashlib.sha256()
    for block in fetch_blocks(url, patience, size=size):
        got.update(block)
    return got.hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", ["refuse", "cut", "stall", "short", "trickle"])
def test_every_fault_is_survived(data, tmp_path, fault, ranges):
    plan = Plan(seed=3, faults=(fault,), failures=2, ranges=ranges, stall_s=2.0)
    with flaky_server(tmp_path / "web", plan) as (url, served):
        assert digest(f"{url}/x.tar") == hashlib.sha256(data).hexdigest()
    assert served.faults[fault] >= (1 if fault == "trickle" else 2)
    if fault in ("cut", "stall", "short"):
        assert served.requests[0] == ("/x.tar", None) and served.requests[-1][1].startswith("bytes=")
        # without ranges the server sends all of it each time
        assert (served.sent["/x.tar"] == SIZE) == ranges


@pytest.mark.parametrize("seed", range(4))
def test_mixed_faults(data, tmp_path, seed):
    faults = ("refuse", "cut", "short", "trickle")
    with flaky_server(tmp_path / "web", Plan(seed=seed, faults=faults, failures=6)) as (url, served):
        assert digest(f"{url}/x.tar") == hashlib.sha256(data).hexdigest()
    assert sum(served.faults.values()) >= 1


def test_a_range_sends_only_what_was_missing(data, tmp_path):
    with flaky_server(tmp_path / "web", Plan(seed=1, faults=("cut",), failures=3)) as (url, served):
        assert digest(f"{url}/x.tar") == hashlib.sha256(data).hexdigest()
    assert served.faults["cut"] == 3 and served.sent["/x.tar"] == SIZE


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_does_not_pass_is_one_message_at_once(data, tmp_path, status):
    with flaky_server(tmp_path / "web", Plan(answers={"/x.tar": status})) as (url, served):
        with pytest.raises(FetchError, match=rf"/x\.tar: HTTP {status} .*; check the address"):
            digest(f"{url}/x.tar")
        with pytest.raises(NoShards, match=r"no shards at .*/web: .*HTTP 404"):
            load_index(f"{url}/web")
    assert served.requests.count(("/x.tar", None)) == 1


def test_a_source_that_never_answers_well_is_given_up(data, tmp_path, capfd):
    patience = Patience(attempts=3, stall_s=1.0, first_wait_s=0.01)
    match = r"cannot be fetched: HTTP 503 .*3 failures in a row; data.fetch_attempts"
    server = flaky_server(tmp_path / "web", Plan(answers={"/x.tar": 503}))
    with server as (url, served), pytest.raises(FetchError, match=match):
        digest(f"{url}/x.tar", patience)
    assert len(served.requests) == 3
    with pytest.raises(FetchError, match="refused"):
        digest("http://127.0.0.1:9/x.tar", patience)


def test_retries_are_said_in_one_line(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("psn_train.data.fetch._Says.last", float("-inf"))
    monkeypatch.setenv("RANK", "3")
    with flaky_server(tmp_path / "web", Plan(faults=("refuse",), failures=5)) as (url, _):
        digest(f"{url}/x.tar?token=secret")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fetching (rank 3 on ") and "/x.tar?...: HTTP 503" in line and "secret" not in line
    assert "attempt 2 of 8 in" in line


def test_retry_after_is_honoured(data, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("psn_train.data.fetch._rest", waits.append)
    with flaky_server(tmp_path / "web", Plan(faults=("refuse",), failures=1, retry_after="7", status=429)) as (url, _):
        digest(f"{url}/x.tar")
    date = "Fri, 31 Dec 2999 23:59:59 GMT"
    with flaky_server(tmp_path / "web", Plan(faults=("refuse",), failures=1, retry_after=date)) as (url, _):
        digest(f"{url}/x.tar")
    assert waits == [7.0, 600.0]


def test_waits_grow_and_differ(data, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("psn_train.data.fetch._rest", waits.append)
    plan = Plan(answers={"/x.tar": 500})
    with flaky_server(tmp_path / "web", plan) as (url, _), pytest.raises(FetchError):
        digest(f"{url}/x.tar", Patience(attempts=9, first_wait_s=1.0))
    assert (len(waits) == 8 and waits == sorted(set(waits))) or max(waits[-2:]) <= 60
    assert all(0.5 * min(60, 2**n) <= wait <= min(60, 2**n) for n, wait in enumerate(waits))


def test_another_version_is_not_mixed_with_the_first(data, tmp_path):
    with flaky_server(tmp_path / "web", Plan(seed=1, faults=("cut",), failures=1)) as (url, _):
        blocks = fetch_blocks(f"{url}/x.tar", QUICK)
        first = next(blocks)
        (tmp_path / "web" / "x.tar").write_bytes(data[::-1])
        with pytest.raises(ChangedError, match="changed while it was fetched"):
            assert first == b"" or b"".join(blocks)


def test_a_small_file_is_fetched_anew_when_it_changes(tmp_path):
    (tmp_path / "index.json").write_bytes(b"{}" * 1000)
    with flaky_server(tmp_path, Plan(seed=2, faults=("cut", "refuse"), failures=4)) as (url, _):
        assert fetch_bytes(f"{url}/index.json", QUICK) == b"{}" * 1000


def test_a_login_goes_into_the_header_and_no_message(data, tmp_path):
    with flaky_server(tmp_path / "web", Plan(answers={"/no.tar": 403})) as (url, served):
        url = url.replace("http://", "http://me:pass%20word@")
        assert digest(f"{url}/x.tar") == hashlib.sha256(data).hexdigest()
        assert served.authorization == "Basic bWU6cGFzcyB3b3Jk"
        with pytest.raises(FetchError) as caught:
            digest(f"{url}/no.tar")
    assert "pass" not in str(caught.value) and "me:" not in str(caught.value)


def test_no_secret_of_any_source_is_shown(tmp_path):
    for url, shown in {
        "https://h/x.tar?sig=secret&k=1": "https://h/x.tar?...",
        "ftp://me:secret@h/x.tar": "ftp://h/x.tar",
        "s3://bucket/x.tar": "s3://bucket/x.tar",
        "/data/a@b?.tar": "/data/a@b?.tar",
        "pipe:curl -s 'https://me:secret@h/x?sig=secret' | cat": "pipe:curl -s 'https://h/x?...' | cat",
        "pipe:curl -u me:secret https://h/x": "pipe:curl -u ... https://h/x",
        "pipe:curl -H 'Authorization: Bearer secret' https://h/x": "pipe:curl -H 'Authorization: ...' https://h/x",
        "pipe:AWS_SECRET_ACCESS_KEY=secret aws s3 cp s3://b/x -": "pipe:AWS_SECRET_ACCESS_KEY=... aws s3 cp s3://b/x -",
        "pipe:aws s3 cp s3://b/x - --region eu": "pipe:aws s3 cp s3://b/x - --region eu",
    }.items():
        assert hide_password(url) == shown
    quick = Patience(attempts=1, stall_s=1.0, first_wait_s=0.01)
    for url in (
        "nonsense://me:secret@h/x",
        "pipe:nothing_of_this_name -u me:secret",
        "http://127.0.0.1:9/x?sig=secret",
    ):
        with pytest.raises(FetchError) as caught:
            digest(url, quick)
        assert "me:secret" not in str(caught.value) and "sig=secret" not in str(caught.value)


def test_an_index_behind_a_signature(tmp_path):
    """The query of the folder's URL goes to the index and to the shards, and into no message."""
    save_index(ShardIndex("images", "train", ["a"], [1], [Shard("x.tar", 1, 9, "0" * 64, [0, 9])]), tmp_path)
    with flaky_server(tmp_path, Plan()) as (url, served):
        for where in (f"{url}/?sig=secret", f"{url}/index.json?sig=secret"):
            index = load_index(where)
            assert served.requests[-1][0] == "/index.json?sig=secret"
            assert index.shard_url(index.shards[0]) == f"{url}/x.tar?sig=secret" and "secret" not in index.place
        with pytest.raises(NoShards) as caught:
            load_index(f"{url}/nothing?sig=secret")
    assert "secret" not in str(caught.value)


def test_blanks_and_letters_of_a_path(data, tmp_path):
    (tmp_path / "web" / "x.tar").rename(tmp_path / "web" / "ein \u00fc.tar")
    with flaky_server(tmp_path / "web", Plan()) as (url, served):
        assert digest(f"{url}/ein \u00fc.tar?a=b c") == hashlib.sha256(data).hexdigest()
        assert digest(f"{url}/ein%20%C3%BC.tar") == hashlib.sha256(data).hexdigest()
    assert served.requests[0][0] == "/ein%20%C3%BC.tar?a=b%20c"
    with pytest.raises(FetchError, match="check the address"):
        digest("http://h:port/x.tar")


def test_what_is_sent_compressed_is_refused(data, tmp_path):
    """Object stores send what was stored with an encoding, whatever is asked for."""
    server = flaky_server(tmp_path / "web", Plan(headers={"Content-Encoding": "gzip"}))
    match = r"x\.tar: the server sends it compressed \(Content-Encoding: gzip\)"
    with server as (url, served), pytest.raises(FetchError, match=match):
        digest(f"{url}/x.tar")
    assert len(served.requests) == 1


def test_commands(data, tmp_path):
    right = hashlib.sha256(data).hexdigest()
    path = tmp_path / "web" / "x.tar"
    assert digest(f"pipe:cat {path}") == right
    # fails twice, after a third and after two thirds
    mark = tmp_path / "mark"
    command = (
        f"echo x >> {mark}; n=$(wc -l < {mark}); if [ $n = 3 ]; then cat {path}; else head -c ${{n}}000000 {path}; "
    )
    assert digest(f"pipe:{command} echo broken >&2; exit 5; fi") == right
    mark.unlink()
    # no bad status, but too little
    assert digest(f"pipe:{command} fi") == right
    patience = Patience(attempts=2, stall_s=1.0, first_wait_s=0.01)
    with pytest.raises(FetchError, match=r"status 3: the last line \(2 failures"):
        digest("pipe:echo first >&2; echo the last line >&2; exit 3", patience)
    with pytest.raises(FetchError, match="ended after 8 of 3000000 bytes"):
        digest("pipe:echo too few", patience)
    with pytest.raises(FetchError, match=r"there is no such command.*nothing_of_this_name"):
        digest("pipe:nothing_of_this_name --fast", patience)


def test_curl_through_faults(data, tmp_path):
    with flaky_server(tmp_path / "web", Plan(seed=5, faults=("refuse", "cut"), failures=3)) as (url, served):
        assert digest(f"pipe:curl -sSf {url}/x.tar") == hashlib.sha256(data).hexdigest()
    assert sum(served.faults.values()) == 3


def test_a_stalled_command_is_killed_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    patience = Patience(attempts=2, stall_s=0.5, first_wait_s=0.01)
    with pytest.raises(FetchError, match=r"wrote nothing for 0\.5 s"):
        digest(f"pipe:echo some; (echo $BASHPID; exec sleep 1000) >> {pids} & echo $! >> {pids}; wait", patience)
    for pid in {int(word) for word in pids.read_text().split() if word.isdigit()}:
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.05)
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        assert state in ("", "Z")


def test_filesystems_of_fsspec(data, monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    with fsspec.open("memory://bucket/x.tar", "wb") as file:
        file.write(data)
    assert digest("memory://bucket/x.tar") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FetchError, match=r"FileNotFoundError: .*check the address"):
        digest("memory://bucket/y.tar")
    opened, fails = MemoryFileSystem.open, iter(["broken", "stalls"])

    def failing(self, path, mode="rb", **options):
        file, fails_how, read = opened(self, path, mode, **options), next(fails, None), [0]

        class Failing:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def seek(self, position):
                file.seek(position)

            def read(self, size):
                read[0] += 1
                if fails_how == "broken" and read[0] == 2:
                    raise RuntimeError("of the library's own")
                if fails_how == "stalls":
                    time.sleep(3)
                return file.read(size)

        return Failing()

    monkeypatch.setattr(MemoryFileSystem, "open", failing)
    assert digest("memory://bucket/x.tar") == hashlib.sha256(data).hexdigest()
    assert next(fails, None) is None


def test_a_missing_package_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(FetchError, match=r"shards of s3:// need a package: pip install s3fs"):
        digest("s3://bucket/x.tar")
    monkeypatch.undo()
    with pytest.raises(FetchError, match="the scheme nonsense:// is not known"):
        digest("nonsense://bucket/x.tar")


def test_what_is_published_holds_no_secret(small):
    from psn_train.publish.hub import shown_recipe
    from psn_train.recipe import check_recipe, recipe_hash

    url = "https://me:secret@h/train?sig=secret"
    recipe = check_recipe(small(data={"train": url, "val": None, "hold_out": 10}))
    shown = shown_recipe(recipe)
    assert shown["data"]["train"] == "https://h/train?..." and "secret" not in str(shown)
    assert recipe_hash(type(recipe).model_validate(shown)) == recipe_hash(recipe) and recipe.data.train == url

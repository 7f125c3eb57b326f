"""Files on disk and on S3: errors, retries, timeouts."""

from __future__ import annotations

import errno
import os
import stat
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from scalenet_ray.core.errors import UserError
from scalenet_ray.data import stores
from scalenet_ray.data.storage import atomic_writer, exists, join, list_files, read_bytes, write_bytes_atomic
from tests.s3_faults import ANSWERS, BREAKS, FaultyS3, faulty_s3


@pytest.fixture(params=["local", "s3", "gs"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on disk, then one in S3, then one in a store that obstore reaches."""
    if request.param == "local":
        return str(tmp_path)
    return request.getfixturevalue("s3_bucket" if request.param == "s3" else "object_bucket")


def test_what_is_written_is_read_back(base: str):
    for data in (b"", b"some bytes", b"others, over the old ones"):
        write_bytes_atomic(f"{base}/new/folder/file.bin", data)
        assert read_bytes(f"{base}/new/folder/file.bin") == data


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(base: str):
    write_bytes_atomic(f"{base}/file", b"old")

    def write_half() -> None:
        with atomic_writer(f"{base}/file") as handle:
            handle.write(b"half of the n")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert read_bytes(f"{base}/file") == b"old"
    assert list_files(base) == [f"{base}/file"]


def test_a_failed_local_write_leaves_no_scratch_file(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_bytes_atomic(tmp_path / "taken", b"a file where a folder stands")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_full_disk_is_named_with_the_file(tmp_path: Path):
    with pytest.raises(OSError, match="No space left") as error, atomic_writer(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_large_s3_file_is_written_in_parts_and_appears_whole(s3_bucket: str):
    part = bytes(range(256)) * 4096
    with atomic_writer(f"{s3_bucket}/large") as handle:
        for _ in range(60):
            handle.write(part)
        assert not exists(f"{s3_bucket}/large")
    assert read_bytes(f"{s3_bucket}/large") == part * 60


def test_a_written_file_has_the_usual_mode(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    write_bytes_atomic(tmp_path / "ours", b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_listing_is_sorted_recursive_and_by_suffix_of_any_case(base: str):
    for name in ("b.JPG", "a.png", "sub/c.jpg", "notes.txt", ".hidden.jpg", ".cache/d.jpg"):
        write_bytes_atomic(f"{base}/in/{name}", b"x")
    wanted = [f"{base}/in/a.png", f"{base}/in/b.JPG", f"{base}/in/sub/c.jpg"]
    assert list_files(f"{base}/in", (".jpg", ".png")) == wanted
    assert list_files(f"{base}/in/", (".jpg", ".png")) == wanted
    assert list_files(f"{base}/in") == [*wanted[:2], f"{base}/in/notes.txt", wanted[2]]


def test_globs_are_matched(base: str):
    for name in ("a1.jpg", "a2.jpg", "b.jpg", "sub/a3.jpg"):
        write_bytes_atomic(f"{base}/in/{name}", b"x")
    assert list_files(f"{base}/in/a*.jpg") == [f"{base}/in/a1.jpg", f"{base}/in/a2.jpg"]
    assert list_files(f"{base}/in/a[2-9].jpg") == [f"{base}/in/a2.jpg"]
    assert f"{base}/in/sub/a3.jpg" in list_files(f"{base}/in/**/a?.jpg")
    assert list_files(f"{base}/in/none*") == []


def test_one_file_lists_itself(base: str):
    write_bytes_atomic(f"{base}/one.jpg", b"x")
    assert list_files(f"{base}/one.jpg", (".jpg",)) == [f"{base}/one.jpg"]


def test_a_folder_with_glob_characters_in_its_name_is_a_folder(tmp_path: Path):
    (tmp_path / "set [1]").mkdir()
    (tmp_path / "set [1]" / "a.jpg").write_bytes(b"x")
    assert list_files(tmp_path / "set [1]") == [str(tmp_path / "set [1]" / "a.jpg")]


def test_a_link_that_leads_back_up_is_not_followed(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list_files(tmp_path, (".jpg",)) == [str(tmp_path / "a.jpg")]


def test_local_addresses_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a::b.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert list_files(".") == [str(tmp_path / "a::b.jpg")]
    assert read_bytes("a::b.jpg") == b"x"
    assert read_bytes(f"file://{tmp_path}/a::b.jpg") == b"x"


def test_exists_sees_files_and_folders(base: str):
    write_bytes_atomic(f"{base}/folder/file", b"x")
    assert exists(f"{base}/folder")
    assert exists(f"{base}/folder/file")
    assert not exists(f"{base}/folder/other")


@pytest.mark.parametrize("act", [read_bytes, list_files])
def test_what_is_missing_is_named_with_what_to_check(base: str, act: Callable[[str], object]):
    with pytest.raises(FileNotFoundError, match=r"/none/at.all: there is no such file or folder; check the "):
        act(f"{base}/none/at.all")


def test_a_missing_bucket_is_a_missing_file(s3_bucket: str):
    with pytest.raises(FileNotFoundError, match="check the bucket and key, and AWS_ENDPOINT_URL"):
        write_bytes_atomic(f"{s3_bucket}-of-nobody/file", b"x")


def test_other_processes_files_are_seen_at_once(s3_bucket: str):
    write_bytes_atomic(f"{s3_bucket}/in/1", b"x")
    assert len(list_files(f"{s3_bucket}/in")) == 1
    S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3_bucket}/in/2", b"x")
    assert len(list_files(f"{s3_bucket}/in")) == 2


def test_a_space_in_a_file_address_may_be_written_as_percent_20(tmp_path: Path):
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "a.txt").write_bytes(b"one")
    (tmp_path / "my%20photos.txt").write_bytes(b"two")
    assert read_bytes(f"file://{tmp_path}/my%20photos/a.txt") == b"one"
    assert read_bytes(f"file://localhost{tmp_path}/my%20photos/a.txt") == b"one"
    assert list_files(f"file://{tmp_path}/my%20photos") == [f"{tmp_path}/my photos/a.txt"]
    assert read_bytes(f"file://{tmp_path}/my%20photos.txt") == b"two"


@pytest.mark.parametrize("address", ["", "  "])
def test_an_empty_address_is_no_folder(address: str):
    with pytest.raises(UserError, match="an address must be a path, file:// or a store's, as s3://, got '"):
        list_files(address)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path):
    with pytest.raises(OSError, match=r"cannot read .*: it is a folder; name a file in it"):
        read_bytes(tmp_path)


@pytest.mark.parametrize("address", ["gopher://host/file", "simplecache::s3://bucket/file"])
def test_other_addresses_are_refused(address: str):
    with pytest.raises(
        UserError, match="must be a path, or start with file://, s3://, gs://, az://, hf:// or https://"
    ):
        read_bytes(address)


def test_missing_credentials_are_named_as_such(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match="no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        read_bytes(f"{s3_bucket}/file")


def test_no_message_holds_a_secret(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "_S3_READ_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    secrets = ["key-of-a-test", "word-that-must-stay-hidden", "word-in-the-endpoint", "word-in-the-address"]
    shown = []
    for endpoint in (os.environ["AWS_ENDPOINT_URL"], "http://user:word-in-the-endpoint@127.0.0.1:9"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        S3FileSystem.clear_instance_cache()
        with pytest.raises(OSError, match="cannot read s3://") as caught:
            read_bytes(f"{s3_bucket}/none")
        shown.append("".join(traceback.format_exception(caught.value)))
    with pytest.raises(ValueError, match="must not hold credentials") as refused:
        read_bytes("s3://key:word-in-the-address@bucket/file")
    shown.append(str(refused.value))
    assert "the endpoint cannot be reached" in shown[1]
    assert [secret for secret in secrets for text in shown if secret in text] == []


def test_joined_parts_stay_below_their_base():
    assert join("s3://bucket/data/", "val", "/a.jpg") == "s3://bucket/data/val/a.jpg"
    assert join("/data", "val/", "a.jpg") == "/data/val/a.jpg"
    assert join("/", "a.jpg") == "/a.jpg"


# --- what is too large ------------------------------------------------------------------------------


def test_a_file_over_the_limit_is_refused_before_it_is_read(base: str, monkeypatch: pytest.MonkeyPatch):
    write_bytes_atomic(f"{base}/file", b"12345678")
    assert read_bytes(f"{base}/file", max_bytes=8) == b"12345678"
    monkeypatch.setattr(S3FileSystem, "cat_file", lambda *a, **k: pytest.fail("it was read"))
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"/file may have 7 bytes, got 8: split or shrink it"):
        read_bytes(f"{base}/file", max_bytes=7)


def test_a_device_without_end_is_not_read_to_its_end():
    with pytest.raises(ValueError, match="/dev/zero may have 1000 bytes, got 1001"):
        read_bytes("/dev/zero", max_bytes=1000)


# --- S3 that fails ----------------------------------------------------------------------------------


def use_endpoint(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_S3_TIMEOUTS", {"connect_timeout": 5, "read_timeout": 1})


QUICK = ("reset", "cut short")


@pytest.fixture(
    params=[pytest.param(fault, marks=() if fault in QUICK else pytest.mark.slow) for fault in (*ANSWERS, *BREAKS)]
)
def faulty(
    request: pytest.FixtureRequest, s3_bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyS3]:
    """S3 where every request fails the first time that it is made."""
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], [request.param]) as server:
        use_endpoint(server.address, monkeypatch)
        yield server


def test_each_request_may_fail_once(s3_bucket: str, faulty: FaultyS3):
    write_bytes_atomic(f"{s3_bucket}/in/file", b"0123456789" * 1000)
    assert read_bytes(f"{s3_bucket}/in/file", max_bytes=20_000) == b"0123456789" * 1000
    assert list_files(f"{s3_bucket}/in") == [f"{s3_bucket}/in/file"]
    assert exists(f"{s3_bucket}/in/file")
    assert sum(faulty.injected.values()) >= 4


def test_a_large_answer_that_breaks_off_is_fetched_again(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    # Larger than the pieces in which s3fs would fetch it.
    data = bytes(range(256)) * 4096 * 60
    write_bytes_atomic(f"{s3_bucket}/large", data)
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], ["cut short"]) as server:
        use_endpoint(server.address, monkeypatch)
        assert read_bytes(f"{s3_bucket}/large") == data
        assert server.injected["cut short"] >= 1


def test_without_further_attempts_the_same_faults_are_errors(
    s3_bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch
):
    write_bytes_atomic(f"{s3_bucket}/file", b"x" * 1000)
    behind = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(stores, "_S3_READ_ATTEMPTS", 1)
    for fault in ("internal error", "cut short"):
        with faulty_s3(behind, [fault]) as server:
            use_endpoint(server.address, monkeypatch)
            with pytest.raises(OSError, match=r"cannot read s3://.*: S3 failed with"):
                read_bytes(f"{s3_bucket}/file")
            assert server.injected[fault] == 1


def test_a_server_that_stays_down_is_given_up(s3_bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "_S3_ATTEMPTS", 2)
    monkeypatch.setattr(stores, "_S3_READ_ATTEMPTS", 1)
    use_endpoint("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(OSError, match="the endpoint cannot be reached; check AWS_ENDPOINT_URL"):
        read_bytes(f"{s3_bucket}/file")


# --- who asks ---------------------------------------------------------------------------------------


def test_a_public_bucket_is_read_without_credentials(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    write_bytes_atomic(f"{s3_bucket}/in/file", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as server:
        use_endpoint(server.address, monkeypatch)
        assert read_bytes(f"{s3_bucket}/in/file") == b"x"
        assert list_files(f"{s3_bucket}/in") == [f"{s3_bucket}/in/file"]
        assert server.signed == {False: 2}


def test_a_profile_has_the_credentials_and_the_endpoint(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_bytes_atomic(f"{s3_bucket}/file", b"x")
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as server:
        config = f"[profile minio]\nendpoint_url = {server.address}\nregion = us-east-1\n"
        (tmp_path / "config").write_text(config)
        (tmp_path / "credentials").write_text("[minio]\naws_access_key_id = a\naws_secret_access_key = b\n")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_PROFILE", "minio")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        S3FileSystem.clear_instance_cache()
        assert read_bytes(f"{s3_bucket}/file") == b"x"
        assert server.signed == {True: 1}


@pytest.mark.parametrize("call", [read_bytes, list_files, exists])
def test_an_endpoint_that_is_no_address_is_the_users_to_correct(
    call: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "htp:/nowhere")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word-of-a-test")
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(OSError, match="Invalid endpoint: htp:/nowhere; check the address and AWS_ENDPOINT_URL"):
            call("s3://bucket/key")
    finally:
        S3FileSystem.clear_instance_cache()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_bytes_atomic("~/file", b"here")
    assert (tmp_path / "file").read_bytes() == b"here"


def test_what_is_no_regular_file_is_not_written_over(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe, a socket or a device is there; name another file"):
        write_bytes_atomic(tmp_path / "pipe", b"data")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_file_where_a_folder_is_wanted_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/x: .*file"):
        write_bytes_atomic(tmp_path / "file" / "x", b"data")

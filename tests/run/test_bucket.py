"""Objects, leases, lines and manifests in a bucket, against servers that fail now and then."""

import json
import threading
import uuid

import pytest

from spannorm_jax.durable import InUse, to_json
from spannorm_jax.errors import UserError
from spannorm_jax.run import bucket, holds, lines, manifest, store
from spannorm_jax.run.folder import run_folder_path

pytestmark = pytest.mark.buckets


@pytest.fixture
def folder(service):
    service.faults.clear()
    service.answered.clear()
    return run_folder_path(f"{service.scheme}://bucket/{uuid.uuid4().hex}")


def is_write(method, path):
    return method in ("PUT", "POST") and "?delete" not in path


def of_another_host(path, **more):
    bucket.write(path, json.dumps({"pid": 1, "host": "elsewhere", "machine": "m", "owner": "o"} | more).encode())


# ---- objects ----------------------------------------------------------------------------------------


def test_of_two_creators_one_has_the_object(folder):
    assert bucket.create(folder / "a", b"one")
    assert not bucket.create(folder / "a", b"two")
    assert bucket.read(folder / "a") == b"one"


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_creation_that_was_done_and_answered_with_an_error_is_ones_own(service, folder, code):
    service.fail(code, of=is_write, done=True)
    assert bucket.create(folder / "a", b"one")
    assert service.answered == [code]
    assert bucket.read(folder / "a") == b"one"


def test_a_creation_that_is_refused_where_nothing_is_is_tried_again(service, folder):
    service.fail(412, of=is_write)
    assert bucket.create(folder / "a", b"one")
    assert service.answered == [412]


@pytest.mark.parametrize("code", [429, 500, 503])
def test_what_fails_for_a_moment_is_asked_again(service, folder, code):
    service.fail(code)
    bucket.write(folder / "a", b"one")
    service.fail(code)
    assert bucket.read(folder / "a") == b"one"
    service.fail(code)
    assert bucket.entries(folder) == {"a": False}
    assert service.answered == [code] * 3


def test_what_is_refused_for_good_is_an_error_of_the_system_that_names_the_object(service, folder):
    service.fail(403, times=1000)
    with pytest.raises(OSError, match="a") as raised:
        bucket.write(folder / "a", b"one")
    assert raised.value.strerror or raised.value.errno


def test_folders_are_listed_walked_copied_and_removed(folder):
    for name in ("b/c", "b/d/e", "a", "metrics.jsonl"):
        bucket.write(folder / name, name.encode())
    assert bucket.entries(folder) == {"a": False, "b": True, "metrics.jsonl": False}
    assert list(store.walk(folder / "b")) == [(f"{folder}/b", ["d"], ["c"]), (f"{folder}/b/d", [], ["e"])]
    store.move_folder(folder / "b", folder / "x")
    assert bucket.entries(folder / "b") == {}
    assert bucket.read(folder / "x" / "d" / "e") == b"b/d/e"
    store.remove_folder(folder / "x")
    assert bucket.entries(folder) == {"a": False, "metrics.jsonl": False}
    assert bucket.entries(folder / "none") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hdfs://x/y", "gs:// and s3:// are"),
        ("gs://bucket", "names no object"),
        ("gs:///x", "names no object"),
        ("gs://bucket/a/../b", "names no object"),
        ("gs://bucket/a//b", "names no object"),
        ("s3://bucket/a[0]", "mean something else"),
        ("gs:/bucket/a", "write gs://BUCKET/FOLDER"),
    ],
)
def test_an_address_that_cannot_be_a_run_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        run_folder_path(text)


def test_a_service_that_lets_nobody_in_is_one_line(service, folder):
    service.fail(403, times=10**6)
    with pytest.raises(UserError, match=r"cannot be looked into: .*(Permission denied|Forbidden)"):
        run_folder_path(str(folder))
    service.faults.clear()
    with pytest.raises(OSError, match=r"no such bucket|does not exist"):
        bucket.write(run_folder_path(f"{service.scheme}://nobucket/x") / "a", b"")


# ---- leases -----------------------------------------------------------------------------------------


def test_a_lease_keeps_others_out_and_is_free_when_it_ends(folder):
    with bucket.lease(folder / "LOCK", "the run") as holds_it:
        assert holds_it()
        assert store.is_locked(folder / "LOCK")
        with (
            pytest.raises(InUse, match=r"the run is in use by process \d+ on "),
            bucket.lease(folder / "LOCK", "the run"),
        ):
            pass
    assert not store.is_locked(folder / "LOCK")
    with bucket.lease(folder / "LOCK", "the run") as holds_it:
        assert holds_it()
        assert len(bucket.entries(folder / "LOCK")) == 1  # those before it are removed


def test_a_holder_elsewhere_is_alive_as_long_as_it_renews_and_dead_after(folder, monkeypatch, capsys):
    path = folder / "LOCK" / "00000007"
    of_another_host(path)
    ended = threading.Event()

    def renew():
        number = 0
        while not ended.wait(0.2):
            number += 1
            of_another_host(path, renewed=number)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(InUse, match="process 1 on elsewhere"), bucket.lease(folder / "LOCK", "the run"):
        pass
    ended.set()
    thread.join()
    monkeypatch.setattr(bucket, "LEASE_S", 1.0)
    with bucket.lease(folder / "LOCK", "the run") as holds_it:
        assert holds_it()
        assert list(bucket.entries(folder / "LOCK")) == ["00000008"]
    assert "looking for 1 s whether that process is alive" in capsys.readouterr().out


def test_a_holder_that_was_alive_and_dies_is_waited_for_and_then_dead(folder, monkeypatch):
    monkeypatch.setattr(bucket, "LEASE_S", 0.5)
    path, watch = folder / "LOCK" / "00000001", bucket.Watch()
    of_another_host(path)
    assert watch.look(path) is None
    of_another_host(path, renewed=1)
    assert watch.look(path) is True
    with bucket.lease(folder / "LOCK", "the run", wait=True) as holds_it:
        assert holds_it()
    monkeypatch.setattr(bucket, "LEASE_S", 0.0)
    of_another_host(path, renewed=1)
    assert watch.look(path) is False


def test_another_process_that_has_the_id_of_a_dead_one_is_not_the_holder(folder):
    own = bucket.Beat(folder / "LOCK" / "00000001")
    bucket.write(own.path, json.dumps(own.text | {"began": "7"}).encode())  # a container's first process, once more
    with bucket.lease(folder / "LOCK", "the run") as holds_it:
        assert holds_it()


def test_who_was_taken_for_dead_learns_that_it_holds_nothing(folder):
    with bucket.lease(folder / "LOCK", "the run") as holds_it:
        of_another_host(folder / "LOCK" / "00000002")
        assert not holds_it()
    assert json.loads(bucket.read(folder / "LOCK" / "00000002"))["host"] == "elsewhere"  # and does not release it


def test_of_many_that_want_a_lease_one_has_it_at_a_time(folder):
    inside, most, failed = [], [], []

    def work():
        try:
            with bucket.lease(folder / "LOCK", "the run", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, failed) == ([1] * 4, [])


def test_a_checkpoint_that_a_reader_holds_is_not_removed(folder, monkeypatch):
    checkpoints = folder / "checkpoints"
    bucket.write(checkpoints / "4" / manifest.MANIFEST, b"{}")
    reader, trainer = holds.Hold(checkpoints), holds.Claims(checkpoints)
    assert reader.take(4)
    assert not reader.take(5)
    assert trainer.take(4)  # the reader has gone on to another
    assert reader.take(4)
    assert not trainer.take(4)
    assert trainer.take(8)
    reader.release()
    assert trainer.take(4)
    of_another_host(folder / holds.HOLDS / "4-dead")
    assert not trainer.take(4)
    monkeypatch.setattr(bucket, "LEASE_S", 0.0)
    assert trainer.take(4)  # it was not renewed


# ---- lines ------------------------------------------------------------------------------------------


def steps(path):
    return [json.loads(line)["step"] for line in lines.read(path).splitlines()]


def test_lines_of_several_writers_are_all_there(folder):
    path = folder / "eval.jsonl"
    assert not lines.exists(path)
    assert lines.tail(path) == []
    with pytest.raises(FileNotFoundError):
        lines.read(path)
    threads = [threading.Thread(target=lines.append, args=(path, {"step": step})) for step in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps(path)) == list(range(6))


def test_a_trainer_that_goes_on_replaces_the_lines_beyond_its_checkpoint(folder):
    path = folder / "metrics.jsonl"
    writer = lines.open_writer(path)
    for step in (1, 2, 3, 4):
        writer.write({"step": step})
        writer.sync()
    writer.write({"step": 5})  # is lost with the process
    lines.keep_until(path, 3)
    assert steps(path) == [1, 2, 3]
    writer = lines.open_writer(path)
    writer.write({"step": 4, "again": True})
    writer.close()
    assert lines.read(path) == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "again": true}\n'
    lines.keep_until(path, 4)
    assert len(bucket.entries(folder / "metrics.jsonl.parts")) == 1  # joined, for the readers' sake


def test_a_writer_beside_another_stops_with_one_line(folder):
    path = folder / "metrics.jsonl"
    one, other = lines.open_writer(path), lines.open_writer(path)
    for writer, text in ((one, "one"), (other, "other")):
        writer.write({"step": 1, "of": text})
    one.sync()
    with pytest.raises(UserError, match="written by another process too"):
        other.sync()
    assert lines.read(path) == b'{"step": 1, "of": "one"}\n'


def test_a_damaged_line_is_named_and_nothing_is_changed(folder):
    path = folder / "metrics.jsonl"
    broken = b'{"step": 1}\n{"st\n{"step": 3}\n'
    bucket.write(path, broken)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
        lines.keep_until(path, 9)
    assert lines.read(path) == broken


def test_lines_that_were_copied_from_a_disk_or_back_go_on(folder, tmp_path):
    local = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        lines.append(local, {"step": step})
    store.upload(tmp_path, folder)
    path = folder / "metrics.jsonl"
    assert steps(path) == [1, 2, 3]
    lines.keep_until(path, 2)
    lines.append(path, {"step": 3})
    assert steps(path) == [1, 2, 3]

    back = tmp_path / "back" / "metrics.jsonl"
    for name in (
        "metrics.jsonl",
        *(f"metrics.jsonl.parts/{n}" for n in bucket.entries(folder / "metrics.jsonl.parts")),
    ):
        target = back.parent / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(bucket.read(folder / name))
    assert steps(back) == [1, 2, 3]
    lines.keep_until(back, 2)
    with_writer = lines.open_writer(back)
    with_writer.write({"step": 3})
    with_writer.close()
    assert steps(back) == [1, 2, 3]
    assert [p.name for p in back.parent.iterdir()] == ["metrics.jsonl"]


# ---- manifests --------------------------------------------------------------------------------------


def test_a_manifest_tells_of_objects_that_are_changed_or_gone(folder):
    checkpoint = folder / "4"
    for name in ("params/d/x", "meta/metadata"):
        bucket.write(checkpoint / name, name.encode())
    manifest.write_manifest(checkpoint)
    bucket.write(checkpoint / "commit_success.txt", b"")
    assert manifest.fault(checkpoint) is None
    bucket.write(checkpoint / "params/d/x", b"something else")
    assert f"{checkpoint}/params/d/x is damaged" in manifest.fault(checkpoint)
    bucket.remove(checkpoint / "params/d/x")
    assert f"{checkpoint}/params/d/x is missing" in manifest.fault(checkpoint)


@pytest.mark.parametrize("changed", [False, True])
def test_a_manifest_holds_where_the_checkpoint_is_copied_to(folder, tmp_path, changed):
    names = ("params/x", "meta/metadata")
    for name in names:
        (tmp_path / "4" / name).parent.mkdir(parents=True)
        (tmp_path / "4" / name).write_bytes(name.encode())
        bucket.write(folder / "5" / name, name.encode())
    manifest.write_manifest(tmp_path / "4")
    manifest.write_manifest(folder / "5")
    store.upload(tmp_path / "4", folder / "4")
    for name in (*names, manifest.MANIFEST):
        (tmp_path / "5" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "5" / name).write_bytes(bucket.read(folder / "5" / name))
    if changed:
        bucket.write(folder / "4" / "params" / "x", b"else")
        (tmp_path / "5" / "params" / "x").write_bytes(b"else")
    for copy in (folder / "4", tmp_path / "5"):
        found = manifest.fault(copy)
        assert (found is not None and "params/x is damaged" in found) if changed else found is None


def test_values_are_json_as_on_a_disk(folder):
    store.write_json(folder / "DONE", {"loss": float("nan")})
    assert bucket.read(folder / "DONE").decode() == to_json({"loss": None}, indent=2) + "\n"

"""Seen to fail when: `write_atomic` writes to the path itself; `read_json` skips the checksum; a lock is not held;
a name in a folder that is a file passes for writable; a pipe is waited for; what is missing inside of a dict passes."""

import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
import torch

from topkapi import files, tensor_files
from topkapi.errors import TopkapiError

VALUE = {"b": [1, 2.5, None], "a": {"x": "é"}}


def test_write_atomic_replaces_a_file_or_leaves_it(tmp_path):
    path = tmp_path / "new" / "file"
    files.write_text_atomic(path, "first")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, fail)
    assert path.read_text() == "first"
    files.write_text_atomic(path, "second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(IsADirectoryError) as refused:
        files.write_text_atomic(tmp_path / "new", "a folder")
    assert refused.value.filename == str(tmp_path / "new")  # not the temporary file's


def test_what_cannot_be_written_is_said_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "file").write_text("before")
    before = sorted(tmp_path.rglob("*"))
    for name in ("", tmp_path / "new.json", tmp_path / "file", tmp_path / "a" / "b é" / "new.json"):
        files.require_writable("--json", name)
    files.require_writable("--out", tmp_path, is_folder=True)
    files.require_writable("--out", tmp_path / "a" / "b", is_folder=True)
    for path, is_folder, reason in [
        (tmp_path, False, "something else than a file"),
        (tmp_path / "file", True, "something else than a folder"),
        ("/dev/null", False, "something else than a file"),
        (tmp_path / "file" / "x.json", False, f"in {tmp_path / 'file'} (Not a directory)"),
        (tmp_path / "file" / "a" / "b", True, f"in {tmp_path / 'file'} (Not a directory)"),
        ("/proc/topkapi/x.json", False, "in /proc ("),
        ("/proc", True, "in /proc ("),
    ]:
        with pytest.raises(TopkapiError) as refused:
            files.require_writable("--json", path, is_folder)
        assert str(refused.value).startswith(f"--json {path}: ")
        assert reason in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "before"


def test_json_comes_back(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {**VALUE, "t": (1, 2)})
    assert files.read_json(path, "Thing") == {**VALUE, "t": [1, 2]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "Thing: no file .*a.json. Mend it."),
        (b"", "Thing: .*a.json is damaged: not JSON .*. Mend it."),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "has no checksum: it is damaged, or not a file of Topkapi's. Mend it."),
        (b'{"a": 1}', "has no checksum"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1, "checksum": "0"}', "damaged or was edited: its content does not match its checksum. Mend it."),
    ],
)
def test_json_that_is_not_ours_or_was_changed(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(TopkapiError, match=expected):
        files.read_json(tmp_path / "a.json", "Thing", "Mend it.")


def test_an_edited_value_is_noticed(tmp_path):
    files.write_json(tmp_path / "a.json", VALUE)
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace("2.5", "2.6"))
    with pytest.raises(TopkapiError, match="damaged or was edited"):
        files.read_json(tmp_path / "a.json", "Thing")


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    give_up = Timer(5, lambda: os.close(os.open(tmp_path / "pipe", os.O_RDWR)))  # ends whoever waits for it
    give_up.start()
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="neither a file nor a folder"):
            files.read_file(path)
    give_up.cancel()
    with pytest.raises(IsADirectoryError):
        files.read_file(tmp_path)


def test_what_a_sound_file_lacks_is_named(tmp_path):
    value = {"a": 1, "b": {"c": "x", "d": {"e": 2}}, "some": {"f": {"n": 1}, "g": {"n": "1"}}}
    require = partial(files.require_shape, value, path=tmp_path, what="Thing", remedy="Mend it.")
    for shape in ({"a": int, "z": int | None}, {"b": {"c": str, "d": {"e": int}}}, {"b": {"*": str | dict}}, {}):
        require(shape)
    for shape, name in [
        ({"a": int, "z": int}, "z"),
        ({"a": str}, "a"),
        ({"a": {"x": int}}, "a"),
        ({"b": {"d": {"e": str}}}, "b.d.e"),
        ({"some": {"*": {"n": int}}}, "some.g.n"),
    ]:
        with pytest.raises(TopkapiError, match=f"Thing: {tmp_path} has no {name}, or another .* Mend it."):
            require(shape)


def test_tensors_come_back_and_others_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"x": torch.randn(3, 2), "n": torch.arange(4), "h": torch.ones(2, dtype=torch.bfloat16)}
    tensor_files.save_tensors(tensors, path)
    checksum = files.sha256(path)
    found = tensor_files.load_tensors(path, checksum, "Thing")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(TopkapiError, match=r"Thing: .* is damaged or another file"):
        tensor_files.load_tensors(path, "0" * 64, "Thing")
    with pytest.raises(TopkapiError, match=r"Thing: no file .*. Mend it."):
        tensor_files.load_tensors(tmp_path / "none", checksum, "Thing", "Mend it.")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(TopkapiError, match="is not a safetensors file"):
        tensor_files.load_tensors(tmp_path / "text", files.sha256(tmp_path / "text"), "Thing")


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        tensor_files.save_tensors({"x": torch.ones(2)}, tmp_path / "none" / "t.safetensors")


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".a.json.77.tmp").write_text("half")
    (tmp_path / ".step-00000005.tmp").mkdir()
    (tmp_path / ".step-00000005.tmp" / "state").write_text("half")
    for name in ("a.json", ".lock", "b.tmp"):
        (tmp_path / name).write_text("kept")
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a.json", "b.tmp"]


def test_a_lock_has_one_holder_and_ends_with_its_process(tmp_path):
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / ".lock")], **pipes) as other:
        assert other.stdout.readline() == b"held\n"

        def refuse():
            raise TopkapiError("busy")

        with pytest.raises(TopkapiError, match="busy"), files.lock(tmp_path, refuse):
            pytest.fail("two processes hold the lock")
        with files.lock(tmp_path, other.kill):  # waits for the lock, which the kill frees
            assert other.wait() == -9
    for _ in range(2):
        with files.lock(tmp_path, refuse):
            pass

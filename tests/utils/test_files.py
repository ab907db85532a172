"""Files: a folder is replaced only where dlm wrote all of it; a lock goes with the process that holds it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dlm.utils.files import LOCK, MARKER, check_replaceable, locked, whole_folder, write_json


def folder_of_ours(path):
    with whole_folder(path) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "weights").write_text("1")
    return path


@pytest.mark.parametrize("kind", ["file beside", "file below", "no marker", "empty folders", "link inside"])
def test_what_dlm_did_not_write_is_not_replaced(tmp_path, kind):
    """Fault: --export deleted whatever stood in its place."""
    folder = folder_of_ours(tmp_path / "a")
    own, message = folder / "notes.txt", r"a holds what dlm did not write \(notes.txt\) and would be replaced"
    if kind == "file below":
        own, message = folder / "part" / "notes.txt", r"\(part/notes.txt\)"
    if kind == "no marker":
        (folder / MARKER).unlink()
        message = r"\(notes.txt, part/weights\)"
    if kind == "link inside":
        own.symlink_to(tmp_path)
    elif kind == "empty folders":
        folder, message = tmp_path / "b", r"b holds what dlm did not write \(folders\)"
        (folder / "mine").mkdir(parents=True)
        own = folder / "mine"
    else:
        own.write_text("mine")
    with pytest.raises(ValueError, match=message):
        check_replaceable(folder)
    with pytest.raises(ValueError, match=message), whole_folder(folder):
        pass
    assert own.exists()


def test_files_and_links_are_not_replaced(tmp_path):
    folder_of_ours(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"link is a symbolic link to .*a: name the folder itself"):
        check_replaceable(tmp_path / "link")
    with pytest.raises(ValueError, match="file is a file: give the name of a folder"):
        check_replaceable(tmp_path / "file")


def test_our_own_and_empty_folders_are_replaced(tmp_path):
    folder_of_ours(folder_of_ours(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    folder_of_ours(tmp_path / "b")
    assert (tmp_path / "a" / "part" / "weights").is_file() and (tmp_path / "b" / MARKER).is_file()


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="did not write"), whole_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").write_text("1")
    assert [child.name for child in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "mine").is_file()


HOLD = "import sys, dlm.utils.files as f\nwith f.locked(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()"


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    """Fault: two trainers wrote into one output."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    message = rf"is being written by process {other.pid} on .*another output"
    with pytest.raises(ValueError, match=message), locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    with locked(tmp_path), locked(tmp_path):  # nested in one process
        assert (tmp_path / LOCK).is_file()
    with locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """Fault: a process that makes batches outlived a killed run, and its output could not be resumed."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(tmp_path):
            child = os.fork()
            if child == 0:
                os.write(write, b"%d\n" % os.getpid())
                time.sleep(60)
            time.sleep(60)
        os._exit(0)
    child = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_json_does_not_replace_a_device_or_a_link(tmp_path):
    """Fault: `--json /dev/null` put a file in the place of the device."""
    null, link = tmp_path / "null", tmp_path / "link.json"
    null.symlink_to(os.devnull)
    link.symlink_to(tmp_path / "real.json")
    write_json(null, {"a": 1})
    write_json(link, {"a": 1})
    assert null.is_symlink() and null.is_char_device() and link.is_symlink()
    assert (tmp_path / "real.json").read_text() == '{"a": 1}\n' and not list(tmp_path.glob(".*"))

import os
import subprocess
import sys

import pytest

from dpo_jax.data import folders


def write(folder, text):
    with folders.replaced_folder(folder, "the text") as incomplete:
        (incomplete / "text").write_text(text)


def prefix(folder):
    return f".incomplete.{folder.name}.{os.uname().nodename}."


def pid_of_the_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_folder_is_made_with_its_parents_and_replaced(tmp_path):
    folder = tmp_path / "a" / "b"
    write(folder, "one")
    write(folder, "two")
    assert (folder / "text").read_text() == "two"
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "a"
    write(folder, "one")
    with folders.replaced_folder(folder, "the text") as incomplete:
        (incomplete / "text").write_text("two")
        assert (folder / "text").read_text() == "one"
    assert (folder / "text").read_text() == "two"


def test_error_keeps_the_old_folder_and_passes_through(tmp_path):
    folder = tmp_path / "a"
    write(folder, "one")

    def interrupted():
        with folders.replaced_folder(folder, "the text") as incomplete:
            (incomplete / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in folder.iterdir()] == ["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_rests_of_dead_writers_are_removed_and_those_of_running_ones_are_not(tmp_path):
    folder = tmp_path / "a"
    dead, running = pid_of_the_dead(), os.getppid()
    for name in (f"{dead}", f"{dead}.old", f"{running}", "strange"):
        (tmp_path / f"{prefix(folder)}{name}").mkdir()
    write(folder, "one")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a", f"{prefix(folder)}{running}", f"{prefix(folder)}strange"}


def test_file_in_the_way_is_named_and_kept(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError, match="Cannot write the text to .*a file lies there"):
        write(tmp_path / "a", "one")
    assert (tmp_path / "a").read_text() == "x"


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError, match="Cannot write the text to .*Choose another folder, or give this user the right"):
        folders.check_writable(tmp_path / "a" / "b", "the text")


def test_check_leaves_nothing_behind(tmp_path):
    assert folders.check_writable(tmp_path / "a" / "b", "the text") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())

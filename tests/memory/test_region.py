import contextlib
import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.errors import PoolError
from kvstrata.memory import region as region_module
from kvstrata.memory.headroom import available_memory_bytes
from kvstrata.memory.populate import Population
from kvstrata.memory.region import SharedRegion

SIZE = 8 << 20


@contextlib.contextmanager
def created(size=SIZE, directory=None):
    region = SharedRegion.create(size, directory)
    try:
        yield region
    finally:
        region.close()


def test_it_is_writable_zeros_of_the_size_asked_for():
    with created() as region:
        assert len(region.view) == SIZE
        assert region.view.format == "B"
        assert not region.view.readonly
        assert not any(region.view)


def test_both_sides_see_each_others_writes():
    with created() as region:
        other = SharedRegion.attach(os.dup(region.fd), SIZE)
        assert other.address != region.address
        other.view[5:8] = b"abc"
        region.view[-1] = 7
        assert bytes(region.view[4:9]) == b"\0abc\0"
        assert other.view[-1] == 7
        other.close()


def test_the_address_is_that_of_the_view():
    with created() as region:
        region.view[:4] = b"here"
        assert ctypes.string_at(region.address, 4) == b"here"


def test_nobody_can_shrink_it():
    with created() as region:
        for size in (0, SIZE // 2, 2 * SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_views_outlive_close_and_the_mapping_ends_with_the_last():
    region = SharedRegion.create(SIZE)
    region.view[:3] = b"abc"
    views = [region.view[0:2], region.view[2:3]]
    region.close()
    region.close()
    with pytest.raises(PoolError):
        _ = region.view
    with pytest.raises(PoolError):
        _ = region.fd
    assert bytes(views.pop()) == b"c"
    assert "kvstrata-l1" in Path("/proc/self/maps").read_text()
    views.clear()
    assert "kvstrata-l1" not in Path("/proc/self/maps").read_text()


def test_close_unmaps_at_once_when_no_view_is_out():
    region = SharedRegion.create(SIZE)
    region.close()
    assert "kvstrata-l1" not in Path("/proc/self/maps").read_text()


def test_the_pages_are_populated_and_content_stays():
    with created() as region:
        region.view[SIZE // 2] = 42
        assert region.populated_bytes == 0
        assert not region.wait_populated(0)
        region.populate()
        region.populate()
        assert region.wait_populated()
        assert region.populated_bytes == SIZE
        assert os.fstat(region.fd).st_blocks * 512 == SIZE
        assert region.view[SIZE // 2] == 42


def test_an_old_kernel_gets_its_pages_by_another_way(monkeypatch):
    monkeypatch.setattr("kvstrata.memory.populate._MADV_POPULATE_WRITE", 9999)
    with created() as region:
        region.view[SIZE // 2] = 42
        region.populate()
        assert region.wait_populated()
        assert os.fstat(region.fd).st_blocks * 512 == SIZE
        assert region.view[SIZE // 2] == 42


def test_population_stops_when_told_and_before_close_unmaps():
    region = SharedRegion.create(256 << 20)
    region.populate()
    region.close()
    assert region.populated_bytes <= 256 << 20


def test_population_steps_need_not_divide_the_size():
    with created(3 * mmap.PAGESIZE) as region:
        population = Population(region.address, region.fd, region.size_bytes, step_bytes=2 * mmap.PAGESIZE)
        assert population.wait()
        assert population.done_bytes == region.size_bytes


def test_population_that_fails_says_so_and_ends(caplog):
    population = Population(0, -1, SIZE)
    assert not population.wait()
    assert population.done_bytes == 0
    assert "could be populated" in caplog.text


def test_a_directory_holds_it_without_a_name(tmp_path):
    with created(directory=tmp_path) as region:
        region.view[:3] = b"abc"
        assert list(tmp_path.iterdir()) == []
        other = SharedRegion.attach(os.dup(region.fd), SIZE)
        assert bytes(other.view[:3]) == b"abc"
        other.close()
    assert list(tmp_path.iterdir()) == []


def test_more_than_there_is_names_size_and_setting():
    available = available_memory_bytes()
    assert available is not None
    with pytest.raises(PoolError) as caught:
        SharedRegion.create(2 * available)
    message = str(caught.value)
    assert f"{2 * available / 2**30:.2f} GiB" in message
    assert "available" in message
    assert "max_local_cpu_size" in message
    assert "--l1-size-gb" in message


def test_a_directory_that_is_too_small_is_named(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr(region_module, "available_memory_bytes", lambda: None)
    with pytest.raises(PoolError) as caught:
        SharedRegion.create(2 * free, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "max_local_cpu_size" in str(caught.value)


@pytest.mark.parametrize("directory", ["/nonexistent/directory", "/proc"])
def test_a_directory_that_cannot_hold_it_is_named(directory):
    with pytest.raises(PoolError, match=directory):
        SharedRegion.create(SIZE, directory)


@pytest.mark.parametrize("size", [0, -1])
def test_it_has_a_size(size):
    with pytest.raises(PoolError, match="max_local_cpu_size"):
        SharedRegion.create(size)


def test_attach_refuses_a_file_that_is_too_small():
    with created() as region, pytest.raises(PoolError, match="announced"):
        SharedRegion.attach(os.dup(region.fd), SIZE + 1)


def test_nothing_is_left_after_a_kill():
    """A process that made a pool and dies leaves no file in /dev/shm (here: none at all, by any name)."""
    code = (
        "import os, signal\n"
        "from kvstrata.memory.region import SharedRegion\n"
        f"region = SharedRegion.create({SIZE})\n"
        "region.view[:3] = b'abc'\n"
        "print(os.readlink(f'/proc/self/fd/{region.fd}'), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert done.stdout == "/memfd:kvstrata-l1 (deleted)\n"

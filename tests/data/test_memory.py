"""Free memory notices what is taken; freed memory may be kept, pages of a mapped file given back."""

import math
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from program import resident_bytes

from cifar_lightning.data import memory
from cifar_lightning.data.memory import free_host_bytes, give_back_pages
from cifar_lightning.errors import UserError

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")


MEMINFO = """MemTotal:       16000000 kB
MemFree:         1000000 kB
MemAvailable:    9000000 kB
"""


def test_what_linux_calls_available_is_free_and_another_system_has_a_small_laptops_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "Path", lambda path: meminfo if path == "/proc/meminfo" else Path(path))
    assert free_host_bytes() == 8e9
    meminfo.write_text(MEMINFO)
    assert free_host_bytes() == 9e6 * 1024


@on_linux
def test_the_free_memory_of_this_machine_is_known():
    assert 1e8 < free_host_bytes() < 1e14


def write_cgroup(folder, limit):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("15000000000\n")
    (folder / "memory.stat").write_text("anon 1000000000\nfile 14000000000\ninactive_file 12000000000\n")


@on_linux
def test_a_container_that_has_read_many_files_still_has_the_memory_they_are_cached_in(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for limit, free in ((16_000_000_000, 13e9), ("max", math.inf)):
        write_cgroup(tmp_path, limit)
        assert memory._free_in_container(tmp_path) == free
    write_cgroup(tmp_path, 3_500_000_000)
    assert memory.free_host_bytes() == 5e8


@pytest.mark.parametrize(("system", "is_refused"), [("linux", True), ("darwin", False)])
def test_images_are_refused_only_where_the_free_memory_is_known(system, is_refused, monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 8e9)
    monkeypatch.setattr(memory.sys, "platform", system)
    memory.check_fits((1000, 1000, 1000, 3), "--data.root photos", "")
    with pytest.raises(UserError, match=r"--data.root photos: 3,000 .* 9\.0 GB") if is_refused else nullcontext():
        memory.check_fits((3000, 1000, 1000, 3), "--data.root photos", "")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_memory_that_is_kept_is_used_again_without_the_system():
    program = """
import resource
import numpy as np
from cifar_lightning.data.memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(100_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = new_pages()
keep_freed_memory()
np.ones(100_000_000, np.uint8)
print(given_back, new_pages())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    given_back, kept = (int(number) for number in done.stdout.split())
    assert given_back > 100
    assert kept < given_back / 20


@on_linux
def test_the_pages_read_of_a_mapped_file_are_given_back_and_its_content_stays(tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, np.arange(25_000_000, dtype=np.uint8))
    before = resident_bytes()
    mapped = np.load(path, mmap_mode="r")
    total = int(mapped[::512].sum())
    assert resident_bytes() > before + 2e7
    give_back_pages(mapped[5:])
    assert resident_bytes() < before + 5e6
    assert int(mapped[::512].sum()) == total


def test_an_array_in_memory_and_a_mapping_that_was_written_to_keep_their_content(tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, np.zeros(100_000, np.uint8))
    private = np.load(path, mmap_mode="c")
    for array in (private, np.zeros(100_000, np.uint8)):
        array[:] = 7
        give_back_pages(array)
        assert (array == 7).all()

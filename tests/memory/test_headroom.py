from pathlib import Path

from kvstrata.memory.headroom import available_memory_bytes


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(tmp_path: Path, cgroup: str = "0::/pod/container\n") -> tuple[Path, Path]:
    write(tmp_path / "proc/meminfo", "MemTotal: 2000 kB\nMemAvailable:  1000 kB\n")
    write(tmp_path / "proc/self/cgroup", cgroup)
    return tmp_path / "proc", tmp_path / "cgroup"


def limit(directory: Path, maximum: str, current: int, inactive_file: int = 0) -> None:
    write(directory / "memory.max", f"{maximum}\n")
    write(directory / "memory.current", f"{current}\n")
    write(directory / "memory.stat", f"anon 5\ninactive_file {inactive_file}\n")


def test_without_cgroup_limits_it_is_what_the_host_has(tmp_path):
    proc, cgroup = machine(tmp_path)
    assert available_memory_bytes(proc, cgroup) == 1000 * 1024
    limit(cgroup / "pod/container", "max", 500)
    assert available_memory_bytes(proc, cgroup) == 1000 * 1024


def test_the_tightest_cgroup_counts_wherever_it_is(tmp_path):
    proc, cgroup = machine(tmp_path)
    limit(cgroup / "pod/container", "900000", 100_000)
    assert available_memory_bytes(proc, cgroup) == 800_000
    limit(cgroup / "pod", "500000", 400_000, inactive_file=50_000)
    assert available_memory_bytes(proc, cgroup) == 150_000
    limit(cgroup, "1000", 2000)
    assert available_memory_bytes(proc, cgroup) == 0


def test_inside_a_cgroup_namespace_the_root_is_ones_own(tmp_path):
    proc, cgroup = machine(tmp_path, "0::/\n")
    limit(cgroup, "700000", 0)
    assert available_memory_bytes(proc, cgroup) == 700_000


def test_other_versions_of_cgroups_set_no_limit_that_is_known(tmp_path):
    proc, cgroup = machine(tmp_path, "4:memory:/pod\n")
    limit(cgroup / "pod", "1", 0)
    assert available_memory_bytes(proc, cgroup) == 1000 * 1024


def test_a_system_that_says_nothing(tmp_path):
    assert available_memory_bytes(tmp_path, tmp_path) is None


def test_this_machine_says_something():
    available = available_memory_bytes()
    assert available is not None
    assert available > 0

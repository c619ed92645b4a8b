"""What gets installed; an install that leaves anything out must say so.

Builds run in a copy of the sources through setuptools' build hooks, as pip would call them. A build without torch is
one in which `import torch` fails; one without a compiler has CXX set to a command that does not exist.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.utils.cpp_extension
from setuptools import Distribution

from fastgpt.core import native

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "fastgpt", "kernels", "bench", "csrc"]
UNSET = ("FASTGPT_CUDA", "FASTGPT_NO_EXT", "CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout without what a build leaves behind."""
    copy = tmp_path_factory.mktemp("sources")
    junk = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py", "results")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=junk, symlinks=True)
        else:
            shutil.copy(ROOT / part, copy / part)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_nothing.py").touch()
    (copy / "fastgpt" / "_C.abi3.so").touch()  # left by an editable install: must not get into a wheel
    return copy


def build(sources: Path, out: Path, hook: str = "build_wheel", **env: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Run a build hook in a separate copy; return the process, and the file that it wrote, if any."""
    here = out / "sources"
    shutil.copytree(sources, here, symlinks=True)
    (out / "dist").mkdir()
    command = "import sys; del sys.path[0]; "  # as pip calls it: the sources are not on the path
    command += f"from setuptools import build_meta; build_meta.{hook}({str(out / 'dist')!r})"
    clean = {name: value for name, value in os.environ.items() if name not in UNSET} | {"MAX_JOBS": "1"} | env
    done = subprocess.run([sys.executable, "-c", command], cwd=here, env=clean, capture_output=True, text=True)
    made = list((out / "dist").iterdir())
    return done, made[0] if made else out


def test_nvcc_is_found_where_it_usually_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch finds it there too, even if PATH does not name it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    found = runpy.run_path(str(ROOT / "setup.py"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    find = found["find_cuda_home"]
    for place, home in ((tmp_path / "bin" / "nvcc", tmp_path), (tmp_path / "absent", None)):
        monkeypatch.setitem(find.__globals__, "USUAL_NVCC", str(place))
        if home is None:
            with pytest.raises(found["Unbuildable"], match="nvcc was not found"):
                find()
        else:
            assert find() == home


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def without_torch(folder: Path) -> str:
    """Return a folder for PYTHONPATH that makes `import torch` fail."""
    stub = folder / "no_torch"
    stub.mkdir()
    (stub / "torch.py").write_text("raise ImportError('no torch here')\n")
    return str(stub)


@pytest.fixture(scope="module")
def pure_wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    done, wheel = build(sources, tmp_path_factory.mktemp("pure"), FASTGPT_NO_EXT="1")
    assert "FASTGPT_NO_EXT=1 was set" in last_line(done)
    return wheel


def test_pure_wheel_contents(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(pure_wheel).namelist()
    expected = {f"fastgpt/{p.relative_to(ROOT / 'fastgpt').as_posix()}" for p in (ROOT / "fastgpt").rglob("*.py")}
    expected |= {f"fastgpt/configs/{p.name}" for p in (ROOT / "fastgpt" / "configs").glob("*.yaml")}
    page = ROOT / "fastgpt" / "evaluate" / "human" / "page"
    expected |= {f"fastgpt/evaluate/human/page/{p.name}" for p in page.iterdir()} | {
        "fastgpt/serve/page.html",
        "fastgpt/serve/page.js",
    }
    tasks = ROOT / "fastgpt" / "evaluate" / "tasks"
    expected |= {f"fastgpt/evaluate/tasks/{p.name}" for p in tasks.glob("*.yaml")}
    expected |= {f"fastgpt/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    expected |= {f"fastgpt/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "bench").rglob("*.py")}
    assert expected | {"fastgpt/_build_info.py"} <= set(names), "a package without __init__.py is left out of wheels"
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastgpt"}
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu", ".h")) or "test" in name.split("/")[0]]


def test_metadata_does_not_depend_on_the_machine(pure_wheel: Path) -> None:
    wheel = zipfile.ZipFile(pure_wheel)
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert 'Requires-Dist: triton>=3.6; platform_system == "Linux"' in metadata
    assert "Requires-Dist: torch>=2.11\n" in metadata and "Requires-Python: >=3.10" in metadata
    assert (
        "fastgpt = fastgpt.cli:main"
        in wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    )


def test_pure_install_imports_and_says_what_is_missing(pure_wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    code = (
        "import fastgpt, fastgpt.kernels, fastgpt.bench, torch; from fastgpt.core import native; "
        f"assert fastgpt.__file__.startswith({str(tmp_path)!r}), fastgpt.__file__; "
        "fastgpt.ops.layer_norm(torch.ones(2, 4)); print(native.BUILT); print(*native.describe(), sep='\\n')"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'cpu': False, 'cuda': False}")
    assert "FASTGPT_NO_EXT=1 was set" in done.stdout and "pip install" in done.stdout


def test_benchmarks_run_from_a_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    """Run one op's benchmark from measurement to page, in an empty folder: no checkout, no git, no compiled kernels."""
    zipfile.ZipFile(pure_wheel).extractall(tmp_path / "site")
    quick = "layer_norm --device cpu --shape 8x16 --phase forward --seconds 0.02 --json rows.jsonl".split()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for arguments in (
        [],
        quick,
        ["compare", "rows.jsonl", "rows.jsonl"],
        ["report", "rows.jsonl"],
        ["all", "--dry-run"],
    ):
        command = [sys.executable, "-m", "fastgpt.cli", "bench", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        if arguments[:1] == ["compare"]:  # a pure wheel has no compiled backend
            assert done.returncode == 2 and "compare: A and B have no fastgpt row in common" in done.stderr
        else:
            assert done.returncode == 0, done.stdout + done.stderr
    assert '"commit": null' in (tmp_path / "rows.jsonl").read_text()
    assert "sources" in (tmp_path / "bench-results" / "REPORT.html").read_text()


def test_without_torch_the_install_succeeds_and_says_so(sources: Path, tmp_path: Path) -> None:
    done, wheel = build(sources, tmp_path, PYTHONPATH=without_torch(tmp_path))
    said = last_line(done)
    assert "pure Python install; left out cpu: torch is not importable in the build; run `pip install torch`" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    info = zipfile.ZipFile(wheel).read("fastgpt/_build_info.py").decode()
    assert "torch is not importable" in info and "BUILT = []" in info


def test_without_compiler_the_install_succeeds_and_says_so(sources: Path, tmp_path: Path) -> None:
    done, wheel = build(sources, tmp_path, CXX="no-such-compiler")
    assert "pure Python install; left out cpu: no C++ compiler (no-such-compiler); install g++" in last_line(done)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_failing_compile_is_left_out_and_said(sources: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'broken-c++: cannot compile' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done, wheel = build(sources, tmp_path, CXX=str(compiler), FASTGPT_CUDA="0")
    assert "pure Python install; left out cuda: FASTGPT_CUDA=0 was set" in last_line(done)
    assert "left out cpu: compiling failed (" in last_line(done)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_cuda_1_without_nvcc_is_one_clear_error(sources: Path, tmp_path: Path) -> None:
    done, _ = build(sources, tmp_path, FASTGPT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: fastgpt: FASTGPT_CUDA=1, but the cuda kernels cannot be built: CUDA_HOME=")
    assert "install the CUDA toolkit" in said


@pytest.mark.parametrize("setting", [{"FASTGPT_CUDA": "yes"}, {"TORCH_CUDA_ARCH_LIST": "Hopper"}])
def test_wrong_settings_are_named(sources: Path, tmp_path: Path, setting: dict[str, str]) -> None:
    (name, value), *_ = setting.items()
    if name == "TORCH_CUDA_ARCH_LIST" and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    done, _ = build(sources, tmp_path, **setting)
    assert done.returncode != 0 and f"fastgpt: {name}" in done.stderr and repr(value.lower()) in done.stderr.lower()


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import setup.py as a module; nothing is built."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "asked, archs, dropped",
    [
        ("", "8.0+PTX;9.0a", ""),
        ("8.0;9.0a+PTX", "8.0;9.0a+PTX", ""),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "8.0;8.6;9.0;10.0", "7.5, 12.0+PTX"),  # as preset by images
        ("7.0;7.5+PTX", "8.0+PTX;9.0a", "7.0, 7.5+PTX"),
    ],
)
def test_architectures_that_do_not_compile_are_left_out_and_said(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, archs: str, dropped: str
) -> None:
    """With a mocked compiler: check nvcc's arguments and the build's last line."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_75 compute_80 compute_86 compute_90 compute_100; echo V13.0.88\n")
    nvcc.chmod(0o755)
    told: list[str] = []

    class Compile:
        def __init__(self, distribution: Distribution) -> None:
            self.distribution = distribution

        def ensure_finalized(self) -> None:
            self.extensions = self.distribution.ext_modules
            told.extend(self.extensions[0].extra_compile_args["nvcc"])

        def run(self) -> None:
            pass

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(torch.utils.cpp_extension, "BuildExtension", Compile)
    command = setup_script.BuildNative(Distribution())
    command.initialize_options()
    assert command._compile(torch, tmp_path) is not None
    said = setup_script.facts.summary()
    assert [f for f in told if f.startswith("-gencode")] == setup_script.gencode_flags(archs)
    assert said.startswith("fastgpt: built the cpu and cuda kernels")
    assert f"not {dropped} of TORCH_CUDA_ARCH_LIST" in said if dropped else "TORCH_CUDA_ARCH_LIST" not in said


def test_sdist_holds_the_native_sources(sources: Path, tmp_path: Path) -> None:
    done, sdist = build(sources, tmp_path, hook="build_sdist")
    assert done.returncode == 0, done.stderr
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.*") if p.is_file()}
    assert native and native <= names
    assert {f"fastgpt/{part}" for part in ("kernels/__init__.py", "bench/__init__.py", "configs/tiny.yaml")} <= names
    assert {"setup.py", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.py"))]


@pytest.mark.extended
def test_cpu_wheel_builds_and_loads(sources: Path, tmp_path: Path) -> None:
    done, wheel = build(sources, tmp_path, FASTGPT_CUDA="0")
    assert last_line(done).startswith("fastgpt: built the cpu kernels; left out cuda: FASTGPT_CUDA=0 was set")
    assert "-cp310-abi3-" in wheel.name
    target = tmp_path / "target"
    zipfile.ZipFile(wheel).extractall(target)
    assert str(ROOT).encode() not in (target / "fastgpt" / "_C.abi3.so").read_bytes()
    code = (
        "import fastgpt.ops, torch; from fastgpt.core import native; assert native.BUILT['cpu'], native.describe(); "
        "x = torch.randn(4, 8); y = torch.ops.fastgpt.layer_norm_fwd.cpu(x, None, None, None, 1e-5)[0]; "
        "torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], cwd=target, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "capability, driver, said",
    [
        ((9, 0), 13, ""),
        ((8, 9), 13, ""),
        ((10, 0), 13, "nothing was compiled for sm_100"),
        ((9, 0), 12, "the driver is for CUDA 12, but nvcc was 13"),
        ((9, 0), 0, ""),
    ],
)
def test_doctor_says_what_this_gpu_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], driver: int, said: str
) -> None:
    """Report kernels that the driver has to compile first, and a driver that is too old for nvcc's runtime."""
    facts = {
        "TORCH": "2.11.0",
        "NVCC": "13.0.88",
        "ARCHS": ["sm_80", "compute_80", "sm_90a"],
        "DATE": "",
        "SOURCES": "",
    }
    monkeypatch.setattr(native, "_INFO", facts)
    monkeypatch.setattr(native, "BUILT", {"cpu": True, "cuda": True})
    monkeypatch.setattr(native, "_driver_cuda", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    lines = native._on_this_gpu()
    assert len(lines) == bool(said) and all(said in line for line in lines)

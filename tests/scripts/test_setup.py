"""The set-up that `mapo` does: what it decides, and the whole of it with a stand-in for torch, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import setup

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("platform", "nvidia_gpu", "override", "expected"),
    [
        ("linux", False, "", ["torch==2.13.0"]),
        ("linux", True, "", ["torch"]),
        ("darwin", False, "", ["torch"]),
        ("win32", True, "", ["torch"]),
        ("linux", False, "  ", ["torch==2.13.0"]),
        ("linux", True, "torch --index-url https://x/cu128", ["torch", "--index-url", "https://x/cu128"]),
        ("linux", False, "'/a b/torch.whl'", ["/a b/torch.whl"]),
        ("win32", False, '"C:\\a b\\torch.whl" --no-deps', ["C:\\a b\\torch.whl", "--no-deps"]),
    ],
)
def test_which_torch(platform: str, nvidia_gpu: bool, override: str, expected: list[str]) -> None:
    assert setup.torch_arguments(platform, nvidia_gpu, override, "2.13.0") == expected


def test_a_gpu_shows_by_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "nvidia0"
    monkeypatch.setattr(setup, "GPU_TRACES", (str(trace),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not setup.has_nvidia_gpu()
    trace.touch()
    assert setup.has_nvidia_gpu()
    trace.unlink()
    command = tmp_path / ("nvidia-smi.exe" if os.name == "nt" else "nvidia-smi")
    command.touch(mode=0o755)
    assert setup.has_nvidia_gpu()


def test_dev_adds_the_tools_of_the_tests() -> None:
    run, dev = setup.requirements(ROOT, "run"), setup.requirements(ROOT, "dev")
    assert run == dev[: len(run)]
    assert "torch" in run
    assert any(package.startswith("pytest") for package in dev)
    assert not any(package.startswith("pytest") for package in run)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What the set-up reads, in a folder with a space in its name."""
    root = tmp_path / "a folder"
    (root / "scripts").mkdir(parents=True)
    for name in ("mapo", "mapo.bat", "pyproject.toml", "scripts/setup.py", "scripts/torch-version"):
        shutil.copy(ROOT / name, root / name)
    (root / "requirements.txt").write_text("# comment\ntorch  # any\n", encoding="utf-8")
    (root / "mapo_core").mkdir()
    (root / "mapo_core" / "__main__.py").write_text(
        "import sys, torch\nprint('ran', torch.__version__, sys.argv[1:])\nsys.exit(7)\n", encoding="utf-8"
    )
    return root


def test_done_until_something_changes(project: Path) -> None:
    python = setup.venv_python(project / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert not setup.is_done(project, "run")
    setup.mark_done(project, "run")
    assert setup.is_done(project, "run")
    assert not setup.is_done(project, "dev")
    setup.mark_done(project, "dev")
    assert setup.is_done(project, "dev")

    (project / "requirements.txt").write_text("torch\nnumpy>=9\n", encoding="utf-8")
    assert not setup.is_done(project, "run")
    setup.mark_done(project, "dev")
    assert setup.is_done(project, "run")
    python.unlink()
    assert not setup.is_done(project, "run")


@pytest.mark.parametrize("folder", ["lib/python3.13/site-packages", "Lib/site-packages"])
def test_packages_whose_installation_was_interrupted_are_installed_again(folder: str, tmp_path: Path) -> None:
    packages = tmp_path / folder
    whole, half = packages / "whole-1.dist-info", packages / "half-1.dist-info"
    for info in (whole, half):
        info.mkdir(parents=True)
        (info / "METADATA").touch()
    (whole / "INSTALLER").touch()
    setup.drop_half_installed(tmp_path)
    assert whole.exists()
    assert not half.exists()


@pytest.mark.skipif(os.name == "nt", reason="virtual environments hold copies there")
def test_links_to_a_python_that_is_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(tmp_path / "gone")
    (tmp_path / "python3").symlink_to(sys.executable)
    setup.drop_dead_links(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["python3"]


def stand_in_torch(folder: Path, version: str) -> Path:
    """A wheel named torch that pip installs without a network."""
    path = folder / f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("torch.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"torch.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def mapo(script: Path, torch: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `mapo` as a user does, from elsewhere; pip has nothing but MAPO_TORCH to install from."""
    env = {
        **os.environ,
        "MAPO_TORCH": torch,
        "PIP_NO_INDEX": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    return subprocess.Popen(
        [str(script), *arguments],
        cwd=script.parents[1],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


SCRIPT = "mapo.bat" if os.name == "nt" else "mapo"


def test_the_first_start_sets_up_and_the_next_ones_only_run(project: Path, tmp_path: Path) -> None:
    old, new = stand_in_torch(tmp_path, "1.0"), stand_in_torch(tmp_path, "2.0")
    code, output = finish(mapo(project / SCRIPT, f'"{old}"', "train", "two words"))
    assert "Setting up" in output
    assert output.splitlines()[-1] == "ran 1.0 ['train', 'two words']"
    assert code == 7

    script = project / SCRIPT
    if os.name != "nt":
        script = tmp_path / "elsewhere" / "mapo-link"
        script.parent.mkdir()
        script.symlink_to(Path("..") / project.name / SCRIPT)
    assert finish(mapo(script, f'"{new}"', "runs")) == (7, "ran 1.0 ['runs']\n")

    # Other requirements: the set-up runs again, and leaves the torch that is there.
    (project / "requirements.txt").write_text("torch>=0.5\n", encoding="utf-8")
    code, output = finish(mapo(project / SCRIPT, f'"{new}"', "runs"))
    assert "Setting up" in output
    assert output.splitlines()[-1] == "ran 1.0 ['runs']"

    # A requirement that this torch does not meet is said, not met behind the user's back.
    (project / "requirements.txt").write_text("torch>=1.5\n", encoding="utf-8")
    code, output = finish(mapo(project / SCRIPT, f'"{new}"', "runs"))
    assert code == 1
    assert "ran" not in output.splitlines()
    assert "Set-up failed" in output


def test_a_failed_set_up_says_why_and_is_completed_by_the_next(project: Path, tmp_path: Path) -> None:
    code, output = finish(mapo(project / SCRIPT, "no-such-package-anywhere", "runs"))
    assert code == 1
    assert "No matching distribution found for no-such-package-anywhere" in output
    assert str(project / ".venv" / "setup.log") in output
    assert "run this again" in output
    code, output = finish(mapo(project / SCRIPT, f'"{stand_in_torch(tmp_path, "1.0")}"', "runs"))
    assert output.splitlines()[-1] == "ran 1.0 ['runs']"
    assert "virtual environment" not in output  # it was there


def test_two_set_ups_at_once_are_one(project: Path, tmp_path: Path) -> None:
    torch = f'"{stand_in_torch(tmp_path, "1.0")}"'
    results = [finish(process) for process in [mapo(project / SCRIPT, torch, "runs") for _ in range(2)]]
    assert [code for code, _ in results] == [7, 7]
    log = (project / ".venv" / "setup.log").read_text(encoding="utf-8")
    assert log.count("-m venv") == 1
    assert log.count("Successfully installed torch") == 1

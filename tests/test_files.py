"""A file is wholly there or not at all, a broken one is named, and two processes share none."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, case_of
from linear_gaussian import LinearGaussian
from typer.testing import CliRunner

import varmeta as vm
from benchmarks.kills import at_operations
from varmeta import cli, files
from varmeta.figures import draw_all
from varmeta.inference import fit as fit_module
from varmeta.runs import RunFolder, run_folder

CASE = case_of(LinearGaussian.random(3, num_tasks=4, dim=2))
FEW = vm.GradientDescent(0.01, 3, tolerance=0)
REPTILE = vm.Reptile(steps=3, minimiser=FEW)
POOLED = vm.CompletePooling(draws=20)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(os.name == "nt", reason="links, signals and flock as POSIX has them"),
]


class Killed(BaseException):
    """As SIGKILL: nothing that comes after it touches a file."""


class Operations:
    """Counts the operations on files, and fails at one of them and at all that follow."""

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        self.at, self.error, self.count = at, error or Killed(), 0

    def __call__(self, what: str) -> None:
        self.count += 1
        if self.at is not None and self.count > self.at:
            raise self.error


def killed_at(at: int, work: Callable[[Path], Any], path: Path) -> None:
    with pytest.raises(Killed), at_operations(Operations(at), path.parent):
        work(path)


def operations(work: Callable[[Path], Any], path: Path) -> int:
    count = Operations()
    with at_operations(count, path.parent):
        work(path)
    return count.count


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def learn(checkpoint: Path | None = None, strategy: vm.Strategy = REPTILE, **more: Any) -> vm.Fit:
    return vm.fit(strategy, CASE.density, CASE.tasks, checkpoint=checkpoint, **more)


def compare(folder: Path | None = None, overwrite: bool = False, **strategies: Any) -> Any:
    return vm.compare(
        strategies or {"pooled": POOLED},
        CASE.density,
        CASE.tasks,
        draws=20,
        folder=folder,
        overwrite=overwrite,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varmeta.report_write.write_figures", lambda *_: [])


@pytest.fixture
def no_arviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varmeta.export.netcdf", lambda _: b"data")
    monkeypatch.setattr("varmeta.export.to_arviz", lambda *_, **__: None)


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)


# -- kills -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_step")
def test_a_fit_killed_at_any_file_operation_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = learn(tmp_path / "whole.pt")
    total = operations(learn, tmp_path / "counted.pt")
    assert total > 20  # four checkpoints, of five operations each
    for at in range(total):
        path = tmp_path / f"{at}" / "run.pt"
        path.parent.mkdir()
        killed_at(at, learn, path)
        resumed = learn(path)
        assert_same(resumed.state.state_dict(), whole.state.state_dict())
        assert resumed.history["loss"].tolist() == whole.history["loss"].tolist()
        assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


OLD, NEW, OTHER = {"seed": 0}, {"seed": 1}, {"seed": 2}
OLD_FILES = {"table.csv": "old", "states/a.pt": "old a", "failures/a.txt": "sad"}
NEW_FILES = {"table.csv": "new", "states/b.pt": "new b", "B.nc": "b"}


def old_run(folder: Path, overwrite: bool = False) -> None:
    with run_folder(folder, OLD, overwrite=overwrite) as run:
        for name, text in OLD_FILES.items():
            run.write(name, text)
        run.finish()
        run.take_place()
    (folder / "mine.txt").write_text("dear")


def new_run(folder: Path, overwrite: bool = False) -> None:
    """Not finished: a strategy has failed, say, and the same call tries it again."""
    with run_folder(folder, NEW, overwrite=overwrite) as run:
        run.write("failures/b.txt", "bad")
        for name, text in NEW_FILES.items():
            run.write(name, text)
        run.remove("failures/b.txt")
        run.take_place()


def replace_run(folder: Path) -> None:
    new_run(folder, overwrite=True)


def test_overwriting_killed_at_any_file_operation_leaves_the_old_run_or_the_new(
    tmp_path: Path,
) -> None:
    def prepared(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "old", tmp_path / name))

    old_run(tmp_path / "old")
    calm = prepared("calm")
    new_run(calm, overwrite=True)
    before, wanted = tree(tmp_path / "old"), tree(calm)
    assert set(wanted) == {*NEW_FILES, "run.json", "mine.txt"}
    found = []
    for at in range(operations(replace_run, prepared("counted"))):
        folder = prepared(f"{at}")
        killed_at(at, replace_run, folder)
        with pytest.raises(FileExistsError), run_folder(folder, OTHER):  # whoever looks next
            pass
        left = {n: b for n, b in tree(folder).items() if not n.startswith("replacement/")}
        assert left in (before, wanted)
        found.append(left == wanted)
        begun = (folder / "replacement" / "run.json").exists()
        new_run(folder, overwrite=not (begun or found[-1]))
        assert tree(folder) == wanted
    assert found == sorted(found) and 10 < sum(found) < len(found) - 10


def test_a_run_killed_at_any_file_operation_leaves_nothing_that_is_nobodys(
    tmp_path: Path,
) -> None:
    (tmp_path / "counted").mkdir()
    for at in range(operations(new_run, tmp_path / "counted" / "run")):
        folder = tmp_path / f"{at}" / "run"
        folder.parent.mkdir()
        killed_at(at, new_run, folder)
        old_run(folder, overwrite=True)
        assert set(tree(folder)) == {*OLD_FILES, "run.json", "mine.txt"}


# -- a run that replaces another -------------------------------------------------------------------


@dataclass(frozen=True)
class Ends(vm.CompletePooling):
    """Ends badly in its step, as long as there is something in `HOW`."""

    def step(self, *arguments: Any) -> Any:
        if HOW:
            raise HOW[0]
        return super().step(*arguments)


HOW: list[BaseException] = []


@pytest.fixture(autouse=True)
def well() -> Iterator[None]:
    HOW.clear()
    yield
    HOW.clear()


@pytest.mark.usefixtures("no_pictures", "no_arviz")
def test_overwrite_removes_the_old_run_only_when_the_new_one_is_there(tmp_path: Path) -> None:
    folder, strategies = tmp_path / "run", {"a": POOLED, "b": Ends(draws=20)}
    compare(folder)
    before = tree(folder)
    HOW[:] = [KeyboardInterrupt("now")]
    with pytest.raises(KeyboardInterrupt):
        compare(folder, overwrite=True, **strategies)
    assert {n: b for n, b in tree(folder).items() if "replacement" not in n} == before
    with pytest.raises(FileExistsError, match="finished run"):
        compare(folder, other=POOLED)
    HOW[:] = [RuntimeError("no")]
    failed = compare(folder, overwrite=True, b=Ends(draws=20))  # all fail: there is no new run
    assert failed.folder == folder / "replacement"
    assert {n: b for n, b in tree(folder).items() if "replacement" not in n} == before
    some = compare(folder, overwrite=True, **strategies)
    assert some.folder == folder and list(some.failures) == ["b"]
    assert {"a.nc", "failures/b.txt", "table.csv"} <= set(tree(folder))
    assert not (folder / "replacement").exists() and "pooled.nc" not in tree(folder)
    HOW.clear()
    done = compare(folder, **strategies)  # the same command, without overwrite
    assert not done.failures and "failures/b.txt" not in tree(folder)


# -- names in run.json -----------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["../victim.txt", "{top}/victim.txt", "out/victim.txt", "", ".", "a\0b", 3, "states"]
)
def test_a_run_names_no_file_outside_its_folder(tmp_path: Path, name: Any, overwrite: bool) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim.txt"
    with run_folder(folder, OLD, ["a"]) as run:
        run.state_file("a")
    victim.write_text("alive")
    (folder / "out").symlink_to(tmp_path)
    name = name.format(top=tmp_path) if isinstance(name, str) else name
    manifest = {"finished": True, "settings": OLD, "files": ["states/a.pt", name]}
    (folder / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(vm.BrokenFile, match=r"run\.json names .*, which is no file within its"):
        compare(folder, overwrite=overwrite)
    assert victim.read_text() == "alive"


# -- broken files ----------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """One bit of the numbers; between the parts of an archive there are bytes that mean nothing."""
    place = len(data) // 2
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            large = max(parts.infolist(), key=lambda part: part.file_size)
        name, extra = (
            int.from_bytes(data[large.header_offset + k :][:2], "little") for k in (26, 28)
        )
        place = large.header_offset + 30 + name + extra + large.compress_size // 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def saved(content: Any) -> bytes:
    return (
        bytes(files.packed({"x": content}))
        if not isinstance(content, dict)
        else bytes(files.packed(content))
    )


def archive(_: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


class Code:
    """What torch would only read where it may run code."""


def contents(data: bytes) -> dict[str, Any]:
    """What a checkpoint holds; of another file nothing."""
    zipped = data.startswith(b"PK")
    return torch.load(io.BytesIO(data), weights_only=True) if zipped else {}


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "cut in half": lambda data: data[: len(data) // 2],
    "last byte cut": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"dear reader",
    "not UTF-8": lambda data: b"\xff\xfe{}",
    "a JSON list": lambda data: b"[1, 2]",
    "JSON without our keys": lambda data: b'{"a": 1}',
    "JSON of another type": lambda data: b'{"finished": 1, "settings": {}, "files": []}',
    "a pickle": lambda data: pickle.dumps({"state": 1}),
    "a zip file": archive,
    "a tensor": lambda data: saved(torch.zeros(3)),
    "objects": lambda data: saved({"state": Code()}),
    "another's state": lambda data: saved({"state": {}, "epoch": 3}),
    "half a state": lambda data: saved(contents(data) | {"state": {"step": 1}}),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison and a checkpoint that are whole, to be broken copy by copy."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("varmeta.report_write.write_figures", lambda *_: [])
        compare(folder / "run", Reptile=REPTILE)
    learn(folder / "run.pt")
    return folder


def as_checkpoint(path: Path) -> None:
    learn(path)


def as_manifest(path: Path) -> None:
    RunFolder(path.parent, OLD)


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "checkpoint": ("run.pt", "run.pt", as_checkpoint),
    "run.json": ("run/run.json", "run.json", as_manifest),
    "netCDF": ("run/Reptile.nc", "a.nc", vm.from_netcdf),
}


CASES = [(way, reader) for way in WAYS for reader in READERS] + [("one bit", "checkpoint")]


@pytest.mark.parametrize(("way", "reader"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_broken_file_is_named_in_a_sentence(
    way: str, reader: str, good: Path, tmp_path: Path
) -> None:
    source, name, read = READERS[reader]
    data = (good / source).read_bytes()
    (tmp_path / name).write_bytes((WAYS | {"one bit": flipped})[way](data))
    with pytest.raises(vm.BrokenFile) as caught:
        read(tmp_path / name)
    said = str(caught.value)
    assert str(tmp_path / name) in said and "\n" not in said and ". " not in said
    assert "weights_only" not in said and "Errno" not in said
    assert any(remedy in said for remedy in ("remove it", "again to write it anew"))


def test_a_wrong_bit_never_gives_wrong_numbers(good: Path, tmp_path: Path) -> None:
    """PyTorch does not look at the check sums of its files, HDF5 has some only if it is told."""
    rng = np.random.default_rng(0)
    checkpoint = (good / "run/states/Reptile.pt").read_bytes()
    arviz = (good / "run/Reptile.nc").read_bytes()
    whole, kinds = vm.from_netcdf(good / "run/Reptile.nc"), fit_module._SAVED
    content = files.load(good / "run/states/Reptile.pt", kinds)
    found = {"pt": 0, "nc": 0}
    for k in range(30):
        for data, name in ((checkpoint, "pt"), (arviz, "nc"))[: 1 + (k % 8 == 0)]:
            bad, at = bytearray(data), rng.integers(len(data))
            bad[at] ^= 1 << rng.integers(8)
            path = tmp_path / f"{at}.{name}"
            path.write_bytes(bad)
            try:
                if name == "pt":
                    assert_same(files.load(path, kinds), content)
                else:
                    read = vm.from_netcdf(path)
                    for group in ("posterior", "log_likelihood", "observed_data"):
                        assert read[group].equals(whole[group])
            except vm.BrokenFile:
                found[name] += 1
    assert found["pt"] > 10 and found["nc"] > 0  # the rest is padding


def test_what_is_whole_is_read(good: Path, tmp_path: Path) -> None:
    """The readers above refuse what is broken and nothing else."""
    (tmp_path / "run.pt").write_bytes((good / "run.pt").read_bytes())
    with pytest.raises(ValueError, match="differs in the strategy") as caught:
        learn(tmp_path / "run.pt", replace(REPTILE, steps=4))
    assert not isinstance(caught.value, vm.BrokenFile)
    data = vm.from_netcdf(good / "run/Reptile.nc")
    assert np.isfinite(data["posterior"]["theta"]).all()
    with pytest.raises(vm.BrokenFile, match="No such file"):
        vm.from_netcdf(tmp_path / "none.nc")


@pytest.mark.usefixtures("no_pictures", "no_arviz")
def test_a_broken_checkpoint_is_one_row_of_a_comparison(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varmeta.comparison._write", lambda *_: None)  # it is not finished
        compare(folder)
    path = folder / "states" / "pooled.pt"
    path.write_bytes(b"")
    result = compare(folder)
    assert "is empty; remove it to begin anew" in result.failures["pooled"]
    path.unlink()
    assert not compare(folder).failures


# -- what cannot be written ------------------------------------------------------------------------


def never(*_: Any) -> None:
    raise AssertionError("a step was taken")


PATHS: dict[str, str] = {
    "no folder": "nowhere/run.pt",
    "a folder": "",
    "a file for a folder": "file/run.pt",
    "no ordinary file": "/dev/null",
    "too long": "x" * 300,
    "a null byte": "a\0b",
    "of the system": "/proc/run.pt",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_checkpoint_that_cannot_be_written_is_found_before_the_first_step(
    path: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(vm.NotWritten, match=r"checkpoint: .* cannot be written: ") as caught:
        learn(tmp_path / path, on_step=never)
    assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)
    assert "; " in str(caught.value)  # and what to do
    assert caught.value.errno
    assert set(tree(tmp_path)) == {"file"} and Path("/dev/null").is_char_device()


FOLDERS = {"a file": "file", "below a file": "file/run", "too long": "x" * 300}


@pytest.mark.parametrize("folder", [*FOLDERS.values(), "/proc/run"], ids=[*FOLDERS, "system"])
@pytest.mark.parametrize("use", ["compare", "figures", "varmeta compare", "varmeta figures"])
def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(
    use: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varmeta.comparison.fit", never)
    monkeypatch.setattr("varmeta.figures.draw.FIGURES", {"anchor": never})
    (tmp_path / "file").touch()
    place = tmp_path / folder
    if use.startswith("varmeta"):
        out = ["eight_schools", "--out"] if use == "varmeta compare" else ["--folder"]
        result = CliRunner().invoke(cli.app, [use.split()[1], *out, str(place)])
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert "Error: folder: " in result.output
        return
    with pytest.raises(vm.NotWritten, match=r"folder: .* cannot be (made|written): "):
        compare(place) if use == "compare" else draw_all(place)


def test_a_folder_without_the_right_to_write_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varmeta.comparison.fit", never)
    (tmp_path / "mine").mkdir(mode=0o555)
    me = os.geteuid()
    if me == 0:  # who may write everywhere
        os.seteuid(65534)
    try:
        with pytest.raises(vm.NotWritten, match=r"checkpoint: .* written: Permission denied"):
            learn(tmp_path / "mine" / "run.pt", on_step=never)
        with pytest.raises(vm.NotWritten, match=r"folder: .* Permission denied"):
            compare(tmp_path / "mine")
    finally:
        os.seteuid(me)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "run.pt").symlink_to(tmp_path / "big" / "run.pt")
    learn(tmp_path / "run.pt")
    assert (tmp_path / "run.pt").is_symlink() and (tmp_path / "big" / "run.pt").is_file()


@pytest.mark.usefixtures("no_arviz")
def test_a_disk_that_fills_up_ends_in_a_sentence_and_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every kind of file of a comparison in turn; with room the same call goes on."""
    full: list[str] = []
    plain = open

    def opened(path: Any, mode: str = "r", **more: Any) -> Any:
        file = plain(path, mode, **more)
        if "w" in mode and full and full[0] in Path(path).name:
            file.write(b"some of it")

            class Full:
                def __enter__(self) -> Full:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, _: object) -> None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return Full()
        return file

    monkeypatch.setattr(files, "open", opened, raising=False)
    monkeypatch.setattr("varmeta.report_write._DPI", 10)
    folder = tmp_path / "run"
    for name in ("Reptile.pt", "table.csv", "Reptile.nc", "modules.csv", ".png", "table.csv"):
        full[:] = [name]
        before = tree(folder)
        with pytest.raises(vm.NotWritten, match="No space left on device") as caught:
            compare(folder, Reptile=REPTILE)
        assert caught.value.errno == errno.ENOSPC and name in str(caught.value)
        assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)
        after = tree(folder)
        assert before.keys() <= after.keys() and not any("part_" in n for n in after)
    full.clear()
    result, calm = compare(folder, Reptile=REPTILE), compare(Reptile=REPTILE)
    assert result.table["elpd"].tolist() == calm.table["elpd"].tolist()


# -- two at once -----------------------------------------------------------------------------------

_HOLD = """
import fcntl, os, sys, time
f = open(sys.argv[1], "w"); fcntl.flock(f, fcntl.LOCK_EX)
f.write(str(os.getpid())); f.flush(); print("held", flush=True); time.sleep(60)
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the lock of a file, and is killed by SIGKILL at the end."""
    command = [sys.executable, "-S", "-c", _HOLD, str(files.lock_of(path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    path, folder = tmp_path / "run.pt", tmp_path / "run"
    folder.mkdir()
    with another_process(path) as one, another_process(folder / "run.json") as two:
        with pytest.raises(vm.FileInUse, match=rf"run\.pt is in use .*process {one.pid}\); wait"):
            learn(path, on_step=never)
        with pytest.raises(vm.FileInUse, match=rf"folder '.*/run' is in use .*process {two.pid}\)"):
            compare(folder)
        with another_process(tmp_path / "figures"), pytest.raises(vm.FileInUse):
            draw_all(tmp_path)
    assert files.lock_of(path).exists()  # as a kill leaves it
    assert learn(path).finished
    with run_folder(folder, OLD), pytest.raises(vm.FileInUse, match=f"process {os.getpid()}"):
        compare(folder)
    assert not list(tmp_path.glob("*.pt.lock")) and not list(folder.glob("*.lock"))


def test_a_run_within_a_run_is_refused_too(tmp_path: Path) -> None:
    def again(*_: Any) -> None:
        learn(tmp_path / "run.pt")

    with pytest.raises(vm.FileInUse):
        learn(tmp_path / "run.pt", on_step=again)


# -- SIGTERM and errors between the steps ----------------------------------------------------------


def terminate(step: int, _: object) -> None:
    if step == 2:
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_saves_and_ends_with_the_usual_status(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, whole = tmp_path / "run.pt", learn()
    with pytest.raises(SystemExit, match=r"after step 2 of 3; everything done is in") as caught:
        learn(path, on_step=terminate)
    assert isinstance(caught.value, vm.Terminated) and caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "SIGTERM: stopped after step 2 of 3" in caplog.text
    assert_same(learn(path).state.state_dict(), whole.state.state_dict())


def test_a_signal_after_the_last_step_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the loop has asked for the last time."""
    bar = fit_module._bar

    @contextmanager
    def late(progress: bool | None) -> Iterator[Any]:
        with bar(progress) as shown:
            yield shown
        signal.raise_signal(signal.SIGTERM)

    path = tmp_path / "run.pt"
    monkeypatch.setattr(fit_module, "_bar", late)
    with pytest.raises(vm.Terminated):
        learn(path)
    monkeypatch.undo()
    assert learn(path, on_step=never).finished


def test_sigterm_is_the_users_where_nothing_is_saved() -> None:
    seen = []
    learn(on_step=lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    assert set(seen) == {signal.SIG_DFL}


def test_sigterm_passes_through_a_comparison(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Stopped(vm.CompletePooling):
        def step(self, *arguments: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return super().step(*arguments)

    with pytest.raises(vm.Terminated):
        compare(tmp_path / "run", a=Stopped(draws=20))
    assert (tmp_path / "run/states/a.pt").exists()


def test_sigterm_on_the_command_line_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run_comparison", lambda *_, **__: terminate(2, None))
    result = CliRunner().invoke(cli.app, ["compare", "eight_schools"])
    assert result.exit_code == 143 and "Stopped by SIGTERM." in result.output
    assert "The same command, without --overwrite, goes on." in " ".join(result.output.split())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), SystemExit(3), StopIteration()])
def test_an_error_between_the_steps_saves_as_ctrl_c_does(
    error: BaseException, tmp_path: Path
) -> None:
    def fails(step: int, _: object) -> None:
        if step == 2:
            raise error

    path = tmp_path / "run.pt"
    with pytest.raises(type(error)) as caught:
        learn(path, on_step=fails)
    assert caught.value is error and "after step 2 of 3; everything" in caught.value.__notes__[0]
    steps: list[int] = []
    resumed = learn(path, on_step=lambda step, _: steps.append(step))
    assert steps == [3]
    assert_same(resumed.state.state_dict(), learn().state.state_dict())


def test_writing_keeps_the_old_content_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "old")
    total = operations(lambda path: files.write(path, "new"), tmp_path / "b.txt")
    for at in range(total):
        files.write(path, "old")
        error = Operations(at, OSError(errno.ENOSPC, "full"))
        with (
            at_operations(error, tmp_path),
            pytest.raises(vm.NotWritten, match=r"a\.txt could not be"),
        ):
            files.write(path, "new")
        assert path.read_text() in ("old", "new")
    files.write(path, "new")
    assert path.read_text() == "new"

"""Exit statuses and standard error of jobs."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scalenet_ray.console import LiveLine, log_to_stderr, run_job, say
from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.runs.batch import Progress
from scalenet_ray.runs.folder import RunFolder
from tests.job_scripts import REPOSITORY


def fail_with(error: BaseException) -> Callable[[object], int]:
    def main(job: object) -> int:
        raise error

    return main


def in_run(folder: Path, error: BaseException) -> Callable[[object], int]:
    """A job that fails once its run folder has begun."""

    def main(job: object) -> int:
        run = RunFolder(str(folder))
        with run.begin({}, resume=False):
            raise error

    return main


def ended(main: Callable[[object], int], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit status and the standard error."""
    with pytest.raises(SystemExit) as exit_of:
        run_job(main, None)
    return exit_of.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("--limit must be 1"), FileNotFoundError("no such file: a")])
def test_what_the_user_can_correct_is_one_line(
    tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(in_run(tmp_path / "run", error), capsys) == (2, f"error: {error}\n")
    assert not (tmp_path / "run" / "error.txt").exists()


def test_a_bug_in_a_worker_is_one_line_that_names_its_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = WorkerError("KeyError: 'x' in a worker", "the whole\ntrace")
    place = tmp_path / "run" / "error.txt"
    assert ended(in_run(tmp_path / "run", error), capsys) == (1, f"error: {error}; its trace: {place}\n")
    assert place.read_text() == "the whole\ntrace"


def test_a_bug_in_a_worker_before_the_run_leaves_its_trace_in_a_temporary_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, said = ended(fail_with(WorkerError("KeyError: 'x' in a worker", "the trace")), capsys)
    (place,) = tmp_path.iterdir()
    assert (status, said) == (1, f"error: KeyError: 'x' in a worker; its trace: {place}\n")
    assert place.read_text() == "the trace"


def test_a_bug_in_the_driver_keeps_its_trace_and_leaves_it_in_the_run_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as raised:
        run_job(in_run(tmp_path / "run", KeyError("x")), None)
    assert raised.value.__notes__ == [f"its trace: {tmp_path / 'run' / 'error.txt'}"]
    text = (tmp_path / "run" / "error.txt").read_text()
    assert text.startswith("Traceback")
    assert text.endswith("KeyError: 'x'\n")


def test_a_resumed_run_forgets_the_error_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(in_run(tmp_path / "run", WorkerError("KeyError: 'x' in a worker", "the trace")), capsys)
    with RunFolder(str(tmp_path / "run")).begin({}, resume=True):
        assert not (tmp_path / "run" / "error.txt").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_run_says_that_nothing_is_done(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    # A shell's background job starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def main(job: object) -> int:
        signal.raise_signal(number)
        return 0

    try:
        assert ended(main, capsys) == (status, "stopped: nothing done yet\n")
        # The next one ends the process at once.
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)


def test_handlers_of_signals_are_restored() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit):
        run_job(lambda job: 0, None)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as exit_of:
            run_job(lambda job: signal.raise_signal(signal.SIGINT) or 0, None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit_of.value.code == 0


SPEAKER = """
from scalenet_ray.console import run_job, say
def main(job):
    for i in range({lines}):
        say("Übersicht in läufe/日本")
    open({done!r}, "w").close()
    return 0
run_job(main, None)
"""


def test_an_ascii_terminal_gets_other_characters_escaped(tmp_path: Path) -> None:
    script = SPEAKER.format(lines=1, done=str(tmp_path / "done"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("\\xdcbersicht in l\\xe4ufe/\\u65e5\\u672c\n", "")


def test_work_goes_on_when_nobody_reads_the_output(tmp_path: Path) -> None:
    script = SPEAKER.format(lines=20_000, done=str(tmp_path / "done"))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=writes, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "done").exists()


def test_work_goes_on_when_the_output_is_closed(tmp_path: Path) -> None:
    script = SPEAKER.format(lines=1, done=str(tmp_path / "done")) + "\n"
    script = script.replace("def main", "from scalenet_ray.runs.batch import Progress\ndef main")
    script = script.replace("    open(", "    say(Progress('whole', 1, 1))\n    open(")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, script]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "done").exists()


def test_capturing_streams_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_job(lambda job: say("heard") or 0, None)
    assert capsys.readouterr().out == "heard\n"


def test_a_signal_while_the_interpreter_ends_leaves_no_trace() -> None:
    script = (
        "import atexit, os, signal, time\n"
        "from scalenet_ray.console import run_job\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(600)))\n"
        "run_job(lambda job: 0, None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def test_an_error_of_the_system_says_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = ended(fail_with(FileExistsError(17, "File exists", "runs/a")), capsys)
    assert (status, said) == (
        2,
        "error: runs/a: File exists: check the path, its permissions, and the room on its disk\n",
    )


def test_an_interruption_that_no_signal_asked_for_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(fail_with(KeyboardInterrupt()), capsys) == (130, "stopped: nothing done yet\n")


# --- the live line ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """An output that is a terminal."""

    def isatty(self) -> bool:
        return True


BEGUN = Progress("whole", done=0, total=9)
HALF = Progress("whole", done=4, total=9, images=4, tiles={0: 4, 1: 10}, seconds=8.0, queued=7, pace=1.0, failed=1)
DONE = Progress("whole", done=9, total=9, images=9, tiles={0: 9}, seconds=9.0)


def test_progress_says_images_rate_tiles_by_depth_queue_failures_and_time_left() -> None:
    assert str(BEGUN) == "whole: 0/9 images, starting"
    assert str(HALF) == (
        "whole: 4/9 images, 0.5 images/s, 3.50 tiles/image (1.00 + 2.50 by depth), 7 tiles queued, 1 failed, 5 s left"
    )
    assert str(DONE) == "whole: 9/9 images, 1.0 images/s, 1.00 tiles/image, 0 failed, done"


def test_a_terminal_shows_progress_in_one_line_that_other_lines_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setattr(sys, "stdout", Terminal())
    for line in (BEGUN, HALF, "a remark", HALF, DONE, "the table"):
        say(line)
    start = "\r\x1b[K"
    shown = f"{start}whole: 0/9 images, star{start}whole: 4/9 images, 0.5 "
    replaced = f"{start}a remark\n{start}whole: 4/9 images, 0.5 "
    assert sys.stdout.getvalue() == f"{shown}{replaced}{start}{DONE}\nthe table\n"  # type: ignore[attr-defined]


def test_a_pipe_gets_whole_lines_not_too_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("scalenet_ray.console.time.monotonic", lambda: now[0])
    live = LiveLine()
    for seconds, progress in ((0, BEGUN), (1, HALF), (3, HALF), (3.5, HALF), (4, DONE)):
        now[0] = 100.0 + seconds
        live.show(progress)
    assert capsys.readouterr().out.splitlines() == [str(BEGUN), str(HALF), str(DONE)]


def test_a_warning_of_the_log_replaces_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    log_to_stderr()
    say(HALF)
    logging.getLogger("scalenet_ray.test").warning("image given up")
    assert terminal.getvalue().split("\r\x1b[K")[-1].startswith('{"time"')

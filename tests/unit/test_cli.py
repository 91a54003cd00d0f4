"""The command line: answers at once, says one line and exits with 2 where the user is wrong."""

import errno
import io
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer
from runs import write_manifest

from lbr_dist.cli import app, main, quiet
from lbr_dist.cli.options import place
from lbr_dist.recipes.settings import settings
from lbr_dist.training.ds_config import name_accelerator

HEAVY = ("torch", "transformers", "deepspeed", "ray", "mteb", "datasets", "webdataset", "sentence_transformers")


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def lbr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command, in this process: a new one would spend its time on importing torch."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["lbr", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return run


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['lbr', '--help']\n"
        "from lbr_dist.cli import main\n"
        "try: main()\n"
        f"finally: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False).stdout
    for command in ("prepare", "train", "eval", "export", "encode", "search", "report", "recipes", "checkpoint"):
        assert command in shown
    assert "HEAVY []" in shown


def test_help_answers_within_a_second() -> None:
    """In seconds of processor time, so that a busy machine does not decide."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = spent()
        subprocess.run([sys.executable, "-m", "lbr_dist", "--help"], capture_output=True, check=True, timeout=60)
        times.append(spent() - before)
    assert min(times) < 1.0


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [(errno.EACCES, 2, "this user may use it"), (errno.EIO, 1, "the storage works, and run again")],
)
def test_a_file_of_another_user_or_of_failing_storage_is_one_line(
    tmp_path: Path, lbr: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, number: int, code: int, remedy: str
) -> None:
    def closed(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(Path, "iterdir", closed)  # root, as whom tests may run, may read everything
    done = lbr("checkpoint", "list", str(tmp_path))
    assert done.returncode == code
    assert done.stderr == f"error: {tmp_path}/checkpoints: {os.strerror(number)}: see to it that {remedy}\n"


def test_a_checkpoint_in_the_folder_of_another_step_is_told(tmp_path: Path, lbr: Callable[..., Done]) -> None:
    for name, step in (("step-000005", 5), ("step-000099", 20)):
        (folder := tmp_path / "checkpoints" / name).mkdir(parents=True)
        write_manifest(folder, [], {}, step=step)
    listed, verified = (lbr("checkpoint", command, str(tmp_path)) for command in ("list", "verify"))
    for done in (listed, verified):
        assert done.returncode == 0
        renamed, plain = sorted(done.stdout.splitlines(), key=lambda line: "step-000005" in line)
        assert renamed.endswith("its own name is step-000020")
        assert "its own name" not in plain


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["train", "stage1", "optim.lrr=1"], ["unknown key optim.lrr; did you mean optim.lr?"]),
        (["recipes", "stage9"], ["stage9", "stage1"]),
        (["recipes", "stage1", "nowhere/x.yaml"], ["nowhere/x.yaml", "cannot be written (No such file or directory)"]),
        (["encode", "m", "a.jsonl", "b.parquet", "--side", "left"], ["--side left", "query or passage"]),
        (["export", "nowhere", "out"], ["nowhere"]),
        (["export", "nowhere", "out", "--dtype", "int8"], ["--dtype int8"]),
        (["checkpoint", "verify", "nowhere"], ["nowhere"]),
        (["checkpoint", "verify", "."], [".: no run folder", "no checkpoint (it has no manifest.json)"]),
        (["checkpoint", "list", "nowhere"], ["nowhere", "no run folder"]),
        (["audit", "nowhere"], ["nowhere", "audit"]),
        (["report", "nowhere"], ["nowhere"]),
        (["prepare", "a.jsonl", "--out", "o", "--tokenizer", "nowhere", "--field", "question"], ["--field question"]),
        (
            ["prepare", "a.jsonl", "--out", "o", "--tokenizer", "t", "--field", "text=title", "--field", "text=text"],
            ["--field text is given twice", "--field text=title,text"],
        ),
        (["prepare", "a.jsonl", "--out", "o", "--tokenizer", "nowhere"], ["nowhere"]),
        (["eval", "nowhere", "--data", "missing"], ["missing"]),
        (["search", "nowhere", "missing.txt", "q"], ["missing.txt"]),
        (["encode", "nowhere", "in.jsonl", "out.csv"], ["out.csv", "is Parquet", "out.parquet"]),
        (["encode", "nowhere", "in.jsonl", "out.NPY"], ["out.NPY", "is Parquet"]),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lbr: Callable[..., Done],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = lbr(*arguments)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["eval", "m", "--data", "d"], ["--hardest=0", "--hardest=-5", "--generate=-1", "--distractors=-3"]),
        (["search", "m", "c", "q"], ["-k=0"]),
        (["encode", "m", "a", "b"], ["--dim=0"]),
        (["export", "r", "o"], ["--tokens=-1"]),
        (["checkpoint", "consolidate", "r", "o"], ["--max-shard-gib=0", "--max-shard-gib=nan", "--max-shard-gib=inf"]),
        (["mine", "m", "d", "--out", "o"], ["--negatives=0", "--skip=-1", "--depth=0", "--share=nan", "--share=0"]),
        (["mine", "m", "d", "--out", "o"], ["--share=inf", "--margin=-1", "--margin=nan", "--margin=inf"]),
        (
            ["prepare", "a", "--out", "o", "--tokenizer", "t"],
            ["--seed=-1", "--seed=99999999999999999999", "--similarity=nan", "--similarity=0.4", "--max-chars=0",
             "--max-bad-share=nan", "--max-bad-share=2", "--shard-records=0", "--shard-mib=nan", "--shard-mib=0"],
        ),
        (["plan", "stage1"], ["--world-size=0"]),
        (["train", "stage1"], ["--nproc=0"]),
    ],
)  # fmt: skip
def test_numbers_out_of_range_name_their_option(
    command: list[str],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lbr: Callable[..., Done],
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in options:
        done = lbr(*command, *option.split("="))
        assert done.returncode == 2, option
        assert f"Invalid value for '{option.partition('=')[0]}'" in done.stderr.replace(" / '-n'", "'"), done.stderr
    assert not list(tmp_path.iterdir())


NO_PATHS = {
    "prepare": {"kind", "field", "gl", "cl", "eval_", "entity", "domain", "name"},
    "mine": {"index", "device"},
    "surprisal": {"device"},
    "train": {"overrides", "allow_change"},
    "plan": {"overrides", "gpu"},
    "eval": {"device"},
    "export": {"dtype"},
    "encode": {"side", "field", "device"},
    "search": {"queries", "field", "device"},
    "recipes": {"name"},
    "settings": {"prefix"},
    "consolidate": {"dtype"},
}
"""Texts that are no paths, of each command."""


def commands(of: typer.Typer) -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command with its name."""
    for command in of.registered_commands:
        assert command.callback is not None
        yield command.name or command.callback.__name__, command.callback
    for group in of.registered_groups:
        yield from commands(group.typer_instance)


@pytest.mark.parametrize(("cuda", "named"), [(True, None), (False, "cpu")])
def test_whether_there_is_a_gpu_is_what_torch_says(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, named: str | None
) -> None:
    """WSL2 has one, and none of the devices that other machines have."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"})
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    quiet()
    name_accelerator()
    assert os.environ.get("DS_ACCELERATOR") == named


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands it behind `--out=`; a folder of that name was made here."""
    monkeypatch.setenv("HOME", "/home/me")
    seen = 0
    for command, function in commands(app):
        for name, hint in get_type_hints(function, include_extras=True).items():
            kind, *options = get_args(hint)[:2] or [hint]
            if not re.search(r"\b(str|Path)\b", str(kind)):
                continue
            if name not in NO_PATHS.get(command, ()):
                assert options, (command, name)
                assert options[0].callback is place, f"{command} {name}: give it callback=place, or name it in NO_PATHS"
                seen += 1
    assert seen > 30
    for text in ("{}/a", "corpus={}/a", "hf:{}/a?pooling=mean"):
        assert place(text.format("~")) == text.format("/home/me")
    assert place([Path("~/a"), Path("b")]) == [Path("/home/me/a"), Path("b")]
    assert [place(text) for text in ("a~/b", "FIELD~x", "hub:a", None)] == ["a~/b", "FIELD~x", "hub:a", None]


def test_a_tilde_that_no_shell_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lbr: Callable[..., Done]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home", "~"):
        (tmp_path / folder).mkdir()
    assert lbr("recipes", "stage1", "~/a.yaml").returncode == 0
    assert lbr("plan", "~/a.yaml", "output=~/b", "model.path=~/nowhere").returncode == 2
    assert (tmp_path / "home" / "a.yaml").is_file()
    assert f"{tmp_path}/home/t.jsonl" in lbr("eval", "bm25", "--data=~/t.jsonl").stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&- <&-"])
def test_a_closed_stream_ends_no_command(closed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m lbr_dist recipes {closed}"], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (done.stdout == b"") == (closed != "2>&-")


@pytest.mark.parametrize("python", ["", "-u"])
@pytest.mark.parametrize("command", ["settings", "--version"])
def test_output_that_nothing_takes_is_one_line(command: str, python: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, *python.split(), "-m", "lbr_dist", command]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=environ, check=False)
    line = b"error: standard output: No space left on device: send it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_what_a_terminal_cannot_show_ends_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lbr: Callable[..., Done]
) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert lbr("recipes", "stage1", str(tmp_path / "é.yaml")).returncode == 0
    shown.flush()
    assert shown.buffer.getvalue().endswith(b"\\xe9.yaml\n")


def test_settings_are_shown_whole_in_a_pipe(lbr: Callable[..., Done]) -> None:
    out = lbr("settings").stdout
    assert "…" not in out
    assert [setting.name for setting in settings() if setting.name not in out] == []


def test_recipes_are_listed_and_copied(tmp_path: Path, lbr: Callable[..., Done]) -> None:
    assert "stage2" in lbr("recipes").stdout
    target = tmp_path / "mine.yaml"
    assert lbr("recipes", "stage1", str(target)).returncode == 0
    assert "stage: generative" in target.read_text()
    again = lbr("recipes", "stage1", str(target))
    assert again.returncode == 2
    assert "exists" in again.stderr

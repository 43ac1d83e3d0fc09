"""What Windows does otherwise: no folder is flushed, no open file deleted, names and encodings differ.

The rules are simulated on the system that runs the tests, in a process of its own.
"""

from __future__ import annotations

import ast
import builtins
import gc
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import classifier, make_config, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.callbacks.completions import print_samples
from ppo_plus.training.checkpoint import integrity_error, write_manifest
from ppo_plus.training.shutdown import GracefulShutdownCallback

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("ppo_plus", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
# By the documentation of the standard library, "Availability: Unix".
ABSENT = {
    "os": {
        "chown", "ctermid", "fchmod", "fchown", "fork", "forkpty", "geteuid", "getgid", "getgrouplist", "getloadavg",
        "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "lchown", "mkfifo", "nice", "openpty",
        "pread", "preadv", "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile",
        "setpgid", "setpgrp", "setpriority", "setsid", "statvfs", "sync", "sysconf", "uname", "wait", "wait3", "wait4",
        "O_DIRECTORY", "O_NOFOLLOW", "O_SYNC", "O_DSYNC", "O_CLOEXEC",
    },
    "signal": {
        "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGUSR1",
        "SIGUSR2", "alarm", "getitimer", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigpending",
        "sigtimedwait", "sigwait",
    },
}  # fmt: skip
ABSENT_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def posix_only(tree):
    """Names in a module that Windows does not have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in ABSENT.get(node.value.id, ()):
                yield f"{node.lineno}: {node.value.id}.{node.attr}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (f"{node.lineno}: {module}" for module in modules if module in ABSENT_MODULES)


def without_encoding(tree):
    """Calls in a module that read or write text in the encoding of the system."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        keywords = {keyword.arg for keyword in node.keywords}
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args) or owner == "archive"
        texts = name in ("read_text", "write_text") or (name == "open" and owner != "os" and not binary)
        texts = texts or keywords & {"text", "universal_newlines"}
        if texts and "encoding" not in keywords:
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("find", [posix_only, without_encoding])
def test_no_source_relies_on_what_windows_lacks(find):
    assert len(SOURCES) > 40
    found = {str(path): list(find(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_what_windows_lacks_is_found():
    code = "import resource\nos.killpg(1, signal.SIGKILL)\nx.write_text(y)\nopen(z)\nsubprocess.run(c, text=True)"
    assert len(list(posix_only(ast.parse(code)))) == 3 and len(list(without_encoding(ast.parse(code)))) == 3
    fine = "os.kill(1, signal.SIGTERM)\nx.write_text(y, encoding='utf-8')\nopen(z, 'rb')\nsubprocess.run(c)"
    assert not [*posix_only(ast.parse(fine)), *without_encoding(ast.parse(fine))]


def test_a_sample_that_the_encoding_of_a_log_lacks_does_not_end_training(monkeypatch):
    for rich in (True, False):
        log = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", log)
        if not rich:
            monkeypatch.setitem(sys.modules, "rich.console", None)
        print_samples("Samples → 1", {"prompt": ["Привет"], "completion": ["naïve"]})
        log.flush()
        written = log.buffer.getvalue().decode("cp1252")
        assert r"\u041f\u0440" in written.replace("\n", "") and "naïve" in written and r"\u2192" in written


def test_sigbreak_is_listened_to_where_there_is_one(monkeypatch):
    """A service manager on Windows sends it; SIGUSR1 stands for it here."""
    monkeypatch.setattr("ppo_plus.training.shutdown.SIGNALS", (signal.SIGUSR1,))
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with GracefulShutdownCallback() as callback:
            signal.raise_signal(signal.SIGUSR1)
            assert callback.interrupted
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_disk_error_still_ends_the_writing_of_a_checkpoint(tmp_path, monkeypatch):
    """Negative control: only a system that cannot flush is passed over."""
    (tmp_path / "weights").write_bytes(b"1")
    errors = iter([OSError(5, "Input/output error"), OSError(28, "No space left on device")])

    def fsync(descriptor):
        raise next(errors)

    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output|No space"):
            write_manifest(tmp_path)
    assert integrity_error(tmp_path) == "saving was interrupted"


def mapped(file):
    """Whether a file is in the memory of this process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return any(line.endswith(str(file.resolve())) for line in maps.splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="mapped files are read from /proc")
@pytest.mark.parametrize("locked", [True, False])
def test_the_files_of_a_trained_model_are_released_where_they_are_locked(locked, tmp_path, monkeypatch):
    """On Windows no mapped file is replaced, so the model could not be saved where it comes from."""
    monkeypatch.setattr("ppo_plus.models.loading.MAPPED_FILES_ARE_LOCKED", locked)
    policy, reward = tmp_path / "policy", tmp_path / "reward"
    for folder in (policy, reward):
        make_model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    trainer = make_trainer(tmp_path / "out", model=str(policy), peft_config=None, config={"max_steps": 1})
    trainer.train()
    args = RewardConfig(str(tmp_path / "rm"), max_steps=1, use_cpu=True, report_to="none", dataloader_pin_memory=False)
    pairs = Dataset.from_dict({"chosen": ["good film"] * 4, "rejected": ["bad film"] * 4})
    rewards = RewardTrainer(str(reward), args, train_dataset=pairs, processing_class=make_tokenizer())
    gc.collect()
    found = [mapped(folder / "model.safetensors") for folder in (policy, reward)]
    assert found == [not locked] * 2  # the control: elsewhere both are mapped
    assert trainer.model is not None and rewards.model is not None


# --- a run under the rules of Windows ---


def obey_windows():
    """Let this process work with files, folders and signals as on Windows."""
    import fcntl

    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def open_file(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real_fsync(descriptor)

    def rename(source, target, **kwargs):
        if os.path.exists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        return real_rename(source, target, **kwargs)

    def unless_in_use(inner):
        def call(*paths, **kwargs):
            for path in paths:
                if in_use(path):
                    raise PermissionError(13, "The process cannot access the file: it is used", str(path))
            return inner(*paths, **kwargs)

        return call

    os.open, os.fsync, os.rename = open_file, fsync, unless_in_use(rename)
    os.unlink, os.remove, os.replace = map(unless_in_use, (os.unlink, os.remove, os.replace))
    shutil._use_fd_functions = False  # so that all that is deleted goes through os.unlink
    # Of what Windows lacks, all but what the standard library itself calls here where it runs on Unix.
    called = {"statvfs", "sysconf", "sched_getaffinity", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "fork", "getpgid"}
    for module, names in ((os, ABSENT["os"]), (signal, ABSENT["signal"])):
        for name in names - called:
            if hasattr(module, name):
                delattr(module, name)


def in_use(path):
    """Whether this process has a file open, or in its memory."""
    path = os.path.realpath(path)
    opened = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            opened.add(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:  # that of the list itself
            continue
    with builtins.open("/proc/self/maps", encoding="utf-8") as maps:
        return path in opened or any(line.rstrip().endswith(path) for line in maps)


def run_on_windows(folder):
    """Train, evaluate, resume and save; the files that are there after it."""
    obey_windows()
    with pytest.raises(PermissionError):
        os.open(folder, os.O_RDONLY)
    save_file({"x": torch.ones(8)}, folder / "mapped")
    held = load_file(folder / "mapped")
    with pytest.raises(PermissionError):
        (folder / "mapped").unlink()
    del held
    (folder / "mapped").unlink()
    base = folder / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "html_report": True,
              "eval_strategy": "steps", "eval_steps": 3, "log_completions": True}  # fmt: skip
    run = {"model": str(base), "eval_dataset": make_prompts(8), "reward_funcs": classifier(base)}
    first = make_trainer(folder / "ppo", config={**config, "max_steps": 3}, **run)
    first.train()
    assert integrity_error(folder / "ppo" / "checkpoint-3") is None
    # The rollout of that checkpoint is in memory, and its file mapped, when the checkpoint is deleted for the next.
    again = make_trainer(folder / "ppo", config=config, **run)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    again.create_model_card()
    assert integrity_error(folder / "ppo" / "checkpoint-6") is None and not (folder / "ppo" / "checkpoint-3").exists()

    pairs = Dataset.from_dict({"chosen": ["good film"] * 8, "rejected": ["bad film"] * 8})
    trainer = RewardTrainer(
        str(base), RewardConfig(str(folder / "rm"), max_steps=2, save_steps=1, use_cpu=True, report_to="none"),
        train_dataset=pairs, eval_dataset=pairs, processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert make_config(folder).output_dir == str(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="open files are read from /proc")
def test_a_run_under_the_rules_of_windows_keeps_what_it_trained(tmp_path):
    warn = ["-X", "warn_default_encoding"]
    done = subprocess.run(
        [sys.executable, *warn, __file__, str(tmp_path)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files >= {"ppo/report.html", "ppo/README.md", "ppo/checkpoint-6/manifest.json", "rm/reward_model.json"}


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("error", category=EncodingWarning, module=r"ppo_plus(\.|$)")
    run_on_windows(Path(sys.argv[1]))

"""A flag that cannot work is answered in one line: what was given, what was expected, what to do.

A row is a script, flags, and a piece of the line. Nothing is trained or loaded for any of them.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Refusal, one_error, script_path

LONG = "9" * 5000  # int() itself refuses over 4,300 digits

UNKNOWN = [
    ("train_moe", ["--trian.max-steps", 5], "--trian.max-steps, 5; Perhaps you meant: --train.max"),
    ("train_moe", ["--train.max-step", 5], "Perhaps you meant: --train.max-steps INT; --help"),
    ("train_moe", ["--max-steps", 5], "Perhaps you meant: --train.max-steps INT"),
    ("train_moe", ["--train.maxsteps=5"], "Perhaps you meant: --train.max-steps INT"),
    (
        "train_moe",
        ["--model.topk", 1],
        "options: --model.topk, 1; Perhaps you meant: --model.top-k",
    ),
    ("train_moe", ["--train.qwertz", 1], "Perhaps you meant: --"),
    ("train_moe", ["-n", 5], "Unrecognized options: -n, 5; Perhaps you meant: --"),
    ("generate", ["--no-stat"], "--no-stat; Perhaps you meant: --stats, --no-stats; --help lists"),
    ("check", ["--no-test"], "--no-test; Perhaps you meant: --tests, --no-tests; --help lists the"),
    ("doctor", ["--verbose"], "Unrecognized options: --verbose; Perhaps you meant: --help; --help"),
    ("doctor", ["-5"], "Unrecognized options: -5; Perhaps you meant: --help"),
    ("benchmarks/readme", ["--out", "x"], "Unrecognized options: --out, x; Perhaps you meant: --h"),
    ("doctor", ["now"], "Unrecognized options: now; every other value follows a flag; quote a te"),
    ("generate", ["--prompt", "Once", "upon"], "Unrecognized options: upon; every other value"),
    ("download_data", ["tinystories", "openwebtext"], "Unrecognized options: openwebtext"),
    ("benchmarks/ops", ["attentio"], "attentio; Perhaps you meant: --op attention; --help"),
    ("generate", ["--stats", "True"], "Unrecognized options: True"),
    ("generate", ["--stats=True"], "Unrecognized options: True"),
    ("train_tokenizer", ["--dat", "x"], "--dat, x; Perhaps you meant: --data STR; --help lists"),
    ("doctor", ["--tyro-print-completion", "sh"], "Shell should be one `bash`, `zsh`,"),
]
VALUES = [
    ("train_moe", ["--train.max-steps", "ten"], "'ten'; Argument helptext: --train.max-steps INT"),
    ("train_moe", ["--train.max-steps", "1e3"], "parsing --train.max-steps: invalid literal for"),
    ("train_moe", ["--train.max-steps", LONG], "parsing --train.max-steps: Exceeds the limit"),
    ("train_moe", ["--train.dtype", "x" * 5000], "xxx... for argument '--train.dtype'. Expected"),
    (
        "generate",
        ["--prompt", *["word"] * 999],
        "...; every other value follows a flag",
    ),
    ("train_moe", ["--x" + "y" * 5000], "yyy...; Perhaps you meant: --"),
    ("train_moe", ["--train.max-steps", 2**63], "must be a whole number from 1 to 2,147,483,647"),
    ("train_moe", ["--train.max-steps", 10**18], "must be a whole number from 1 to 2,147,483,647"),
    (
        "train_moe",
        ["--train.max-steps"],
        "Missing value for argument '--train.max-steps'. Expected",
    ),
    ("train_moe", ["--train.max-steps="], "--train.max-steps has an empty value"),
    (
        "train_moe",
        ["--train.max-steps", "--train.seed", 1],
        "Missing value for argument '--train.m",
    ),
    ("train_moe", ["--preset"], "Missing value for argument '--preset'"),
    ("train_moe", ["--preset", "--out", "x"], "Missing value for argument '--preset'"),
    (
        "train_moe",
        ["--train.learning-rate", "fast"],
        "to float: 'fast'; Argument helptext: --train",
    ),
    (
        "train_moe",
        ["--train.learning-rate", "nan"],
        "must be a number from 0 to 1,000,000, got nan",
    ),
    (
        "train_moe",
        ["--train.learning-rate", "1e400"],
        "--train.learning-rate must be a number from 0",
    ),
    (
        "train_moe",
        ["--model.norm-eps", "-inf"],
        "--model.norm-eps must be a number from 1e-12 to 1",
    ),
    (
        "train_moe",
        ["--train.seed", 1, "--train.seed", -1],
        "--train.seed must be a whole number fro",
    ),
    (
        "train_moe",
        ["--train.optimizer", "adam"],
        "'adam' for argument '--train.optimizer'. Expected",
    ),
    ("benchmark", ["--dtype", "fp16"], "'float16', 'int8'); --help"),
    ("download_data", ["tinystory"], "'tinystory' for argument 'name'. Expected one of ('tinystor"),
    ("benchmarks/ops", ["--op", "moe_fnn"], "invalid choice 'moe_fnn' for argument '--op'. Expect"),
    ("benchmarks/ops", ["--op", "--cold"], "--op and --dtype need at least one value each"),
    (
        "benchmark",
        ["--batches", 1, "two"],
        "--batches: Could not find valid parse for arguments: [",
    ),
    ("benchmark", ["--batches"], "--batches is empty; give at least one"),
    ("benchmark", ["--batches", 10**30], "each of --batches must be a whole number from 1 to"),
    ("benchmark", ["--prompt-tokens", 10**30], "--prompt-tokens must be a whole number from 1 to"),
    ("generate", ["--seed", "x"], "no type matching {None}|INT could be instantiated from ['x'];"),
    ("generate", ["--prompt"], "Missing value for argument '--prompt'. Expected 1 values; --help"),
    ("generate", ["--prompt", "-x"], "Missing value for argument '--prompt'"),
    ("train_moe", [""], "the first argument has an empty value"),
    ("generate", ["--model", ""], "--model has an empty value (a shell makes that of a variable"),
    ("train_moe", ["--resume", ""], "--resume has an empty value"),
    ("doctor", [LONG, ""], "999 has an empty value"),
    ("generate", ["--prompt", LONG + "\udce9"], "99... is not UTF-8"),
    ("train_tokenizer", ["--data", "x", "--out="], "--out has an empty value"),
    ("train_tokenizer", [], "--data is missing; --kind bpe is made from that file"),
    ("train_tokenizer", ["--kind", "char"], "--data is missing; --kind char is made from that"),
    ("train_tokenizer", ["--kind", "byte", "--data", "x"], "--data is given, but --kind byte has"),
    ("train_tokenizer", ["--kind", "gpt2"], "--vocab-bpe is missing; --kind gpt2 is made from"),
    (
        "train_tokenizer",
        ["--kind", "gpt2", "--vocab-bpe", "x"],
        "--encoder-json is missing; --kind gpt2 is made from that file",
    ),
    (
        "train_tokenizer",
        ["--data", "x", "--encoder-json", "x"],
        "--encoder-json is given, but --kind bpe has no use for it",
    ),
    (
        "train_tokenizer",
        ["--kind", "gpt2", "--vocab-bpe", "x", "--encoder-json", "y"],
        "x: no file of merges there; GPT-2's vocab.bpe and encoder.json are needed",
    ),
    ("train_tokenizer", ["--kind", "bite"], "Expected one of ('bpe', 'char', 'byte', 'gpt2')"),
    ("train_tokenizer", ["--data", "x", "--trainer", "me"], "Expected one of ('pyllm', 'tok"),
    ("generate", ["--prompt", "caf\udce9"], "argument 'caf\\udce9' is not UTF-8"),
    ("generate", ["--model", "a\x1b[2Jb\nc"], "a\\x1b[2Jb c: no such folder"),
    ("generate", ["--seed", f"1\n{'-' * 30}\n\x1b[2J"], "Error parsing --seed: no type matching"),
]
RANGES = [
    ("train_moe", ["--train.max-steps", 0], "--train.max-steps must be a whole number from 1 to"),
    ("train_moe", ["--train.batch-size", -1], "--train.batch-size must be a whole number from 1"),
    (
        "train_moe",
        ["--train.threads", 10**6],
        "--train.threads must be a whole number from 0 to 1,",
    ),
    ("train_moe", ["--train.learning-rate", 0], "--train.learning-rate must be positive, got 0.0"),
    ("train_moe", ["--train.beta1", 1], "--train.beta1 and --train.beta2 must be below 1"),
    ("train_moe", ["--model.top-k", 9], "--model.top-k (9) must not exceed --model.n-experts (8)"),
    (
        "train_moe",
        ["--model.n-heads", 3],
        "--model.d-model (256) must be a multiple of --model.n-h",
    ),
    (
        "train_moe",
        ["--model.n-kv-heads", 3],
        "--model.n-heads (4) must be a multiple of --model.n-",
    ),
    ("train_moe", ["--model.d-model", 0], "--model.d-model must be a whole number from 1 to"),
    ("train_moe", ["--model.norm", "batch"], "--model.norm must be one of rms, layer, got 'batch'"),
    (
        "train_moe",
        ["--train.seq-len", 513],
        "--train.seq-len (513) exceeds the model's context: low",
    ),
    ("train_moe", ["--n-stories", 0], "--n-stories must be a whole number from 1 to"),
    ("train_moe", ["--model.d-model", 2**20], "GB of memory, and this machine has"),
    (
        "train_moe",
        ["--preset", "moe-tinny"],
        "unknown preset 'moe-tinny'; did you mean 'moe-tiny'?",
    ),
    ("train_moe", ["--valid", "v.txt"], "--valid is given without --data; give the training text"),
    (
        "train_moe",
        ["--resume", "r", "--train.max-steps", 360],
        "leave the other flags out ('--train.max-steps 360')",
    ),
    (
        "generate",
        ["--temperature", 0],
        "--temperature must be above 0 and finite, got 0.0; for the",
    ),
    ("generate", ["--top-p", 2], "--top-p must be above 0 and at most 1, got 2.0"),
    (
        "generate",
        ["--top-k", -1],
        "--top-k (0 for all) must be a whole number of at least 0, got -1",
    ),
    ("generate", ["--max-new-tokens", 0], "--max-new-tokens must be a whole number of at least 1"),
    ("generate", ["--seed", -1], "--seed must be a whole number from 0 to"),
    ("generate", ["--interactive", "--prompt", "x"], "give --prompt or --interactive, not both"),
    ("generate", ["--interactive", "--chat"], "give --interactive or --chat, not both; --chat wi"),
    ("generate", ["--fresh"], "--fresh goes with --interactive; give both or neither"),
    ("generate", ["--chat", "--fresh"], "--fresh goes with --interactive; give both or neither"),
    ("generate", ["--system", "Be brief."], "--system goes with --chat; give both or neither"),
    ("generate", ["--context", 0], "--context must be a whole number of at least 1, got 0"),
    ("generate", ["--min-p", 1.5], "--min-p must be a number from 0 to 1, got 1.5"),
    ("generate", ["--min-p", "nan"], "--min-p must be a number from 0 to 1, got nan"),
    (
        "generate",
        ["--repetition-penalty", 0],
        "--repetition-penalty must be a number from 0.01 to 100, got 0.0",
    ),
    ("generate", ["--stop", ""], "--stop has an empty value"),
    (
        "benchmark",
        ["--batches", 1, 0],
        "each of --batches must be a whole number from 1 to",
    ),
    ("benchmark", ["--new-tokens", 1], "--new-tokens must be a whole number from 2 to"),
    ("benchmark", ["--model", "x", "--preset", "y"], "give --model or --preset, not both"),
    (
        "benchmark",
        ["--preset", "moe-tinny"],
        "unknown preset 'moe-tinny'; did you mean 'moe-tiny'?",
    ),
    (
        "train_tokenizer",
        ["--data", "x", "--vocab-size", 259],
        "--vocab-size must be a whole number",
    ),
    (
        "download_data",
        ["--max-documents", 1],
        "--max-documents must be a whole number from 2 to",
    ),
    ("benchmarks/ops", ["--seconds", 0], "--seconds must be above 0, got 0.0"),
    ("benchmarks/balance", ["--every", 0], "--every must be a whole number from 1 to"),
    ("benchmarks/stories", ["--max-steps", -1], "must be a whole number from 0 to"),
    ("benchmarks/tokenizer", ["--merges", 0], "--merges must be a whole number from 1 to"),
    ("benchmarks/tokenizer", ["--runs", -1], "--runs must be a whole number from 1 to 1,000, got"),
    ("benchmarks/gpu", ["--minutes", -1], "--minutes must be at least 0, got -1.0"),
    ("benchmarks/gpu", ["--memory-gib", 0], "--memory-gib must be above 0, got 0.0"),
]
PLACES = [
    ("train_moe", ["--out", "file/run"], "cannot write into file/run (Not a directory); name a"),
    (
        "train_moe",
        ["--out", "/proc/run"],
        "cannot write into /proc/run (No such file or directory)",
    ),
    (
        "train_tokenizer",
        ["--data", "file", "--out", "file"],
        "cannot write into file (File exists)",
    ),
    ("benchmark", ["--preset", "moe-tiny", "--out", "/proc/a/b.json"], "cannot write into /proc/a"),
    ("download_data", ["--out", "file"], "cannot write into file/tinystories (Not a directory)"),
    ("benchmarks/balance", ["--results", "file"], "cannot write into file (File exists)"),
    ("benchmarks/stories", ["--results", "/proc/x"], "cannot write into /proc/x"),
    (
        "benchmarks/stories",
        ["--tinystories", "texts"],
        "texts/valid.txt: no such file; put it beside",
    ),
    ("benchmarks/tokenizer", ["--results", "file"], "cannot write into file (File exists)"),
    ("mutate_kernels", ["--out", "/proc/x/y.json"], "cannot write into /proc/x (No such file or"),
    ("mutate_kernels", ["--out", "texts"], "--out texts is a folder; name a file"),
    ("generate", ["--model", "nowhere"], "nowhere: no such folder; expected a run folder"),
    ("generate", ["--model", "file"], "file: no such folder; expected a run folder"),
    ("generate", [], "no trained model under runs/; train one with python scripts/train_moe.py"),
    ("benchmark", ["--model", "texts"], "texts: no model there; expected model.safetensors"),
    ("train_tokenizer", ["--data", "absent.txt"], "absent.txt: no such file"),
    ("train_tokenizer", ["--data", "texts"], "texts: a folder; give one of the files in it"),
    ("train_tokenizer", ["--data", "empty.txt"], "empty.txt: the file is empty"),
    (
        "train_tokenizer",
        ["--data", "latin1.txt"],
        "latin1.txt: not UTF-8 at byte 5 (0xe4); convert",
    ),
]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        pytest.param(*row, id=f"{row[0]} {' '.join(map(ascii, row[1]))[:60]}")
        for row in (*UNKNOWN, *VALUES, *RANGES, *PLACES)
    ],
)
def test_one_line(
    name: str,
    flags: list[object],
    message: str,
    refusal: Refusal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def began(*arguments: object, **more: object) -> None:
        raise AssertionError("it began to work")

    monkeypatch.setattr("pyllm.train.run.prepare_text", began)
    (tmp_path / "file").write_text("Some text. Some text.")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("A story.")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("Ein B\u00e4r.".encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    line = refusal(name, *flags)
    assert message in line
    assert len(line) < 500
    assert sorted(tmp_path.rglob("*")) == before, "left something behind"


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "mps"])
@pytest.mark.parametrize("name", ["train_moe", "generate", "benchmark", "benchmarks/gpu"])
def test_a_device_that_is_not_here(
    name: str, device: str, refusal: Refusal, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    flag = "--train.device" if name == "train_moe" else "--device"
    model = ["--model", fox] if name in ("generate", "benchmark") else []
    line = refusal(name, flag, device, *model)
    if device == "cuda:9" and not model:
        assert f"invalid choice 'cuda:9' for argument '{flag}'. Expected one of (" in line
    else:
        assert f"device '{device}' is not available on this machine; here: cpu" in line


@pytest.mark.parametrize("device", ["gpu", "cuda:300000", "cuda:-1", "CPU", "cpu:1"])
def test_a_device_that_is_none(device: str, refusal: Refusal, fox: Path) -> None:
    line = refusal("generate", "--model", fox, "--device", device)
    assert "device" in line and device in line


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "no model there; expected model.safetensors"),
        ("model.safetensors", b"", "model.safetensors"),
        ("model.safetensors", b"\x00" * 100, "model.safetensors"),
        ("config.json", None, "config.json"),
        ("config.json", b"[]", "config.json"),
        ("config.json", b"\xff\xfe", "config.json"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
    ],
)
def test_a_damaged_model(
    file: str, content: bytes | None, message: str, refusal: Refusal, fox: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(fox, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert message in refusal("generate", "--model", "damaged", "--max-new-tokens", 1)


def start(
    *command: object, encoding: str = "utf-8", unbuffered: bool = False, **kwargs: object
) -> subprocess.Popen[bytes]:
    """A script in a process of its own; standard streams are pipes unless told otherwise."""
    name, *flags = command
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    environment["PYTHONUNBUFFERED"] = "1" if unbuffered else ""
    arguments = [flag if isinstance(flag, bytes) else str(flag) for flag in flags]
    return subprocess.Popen(
        [sys.executable, str(script_path(str(name))), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        **(pipes | kwargs),
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train_moe", "--preset", "moe-tinny"], "unknown preset 'moe-tinny'; did you mean"),
        (["train_moe", "--train.max-steps", "ten"], "--train.max-steps: invalid literal"),
        (["train_moe", "--model.top-k", 9], "--model.top-k (9) must not exceed"),
        (["train_moe", "--data", "absent.txt"], "absent.txt: no such file"),
        (["generate", "--temperature", "0"], "--temperature must be above 0"),
        (["generate", "--prompt", b"caf\xe9"], "is not UTF-8"),
        (["benchmark", "--model", "absent"], "absent: no such folder"),
        (["train_tokenizer"], "--data is missing; --kind bpe is made from that file"),
        (["download_data", "tinystory"], "Expected one of ('tinystories'"),
        (["doctor", "x"], "Unrecognized options: x"),
        (["check", "--no-test"], "Perhaps you meant: --tests, --no-tests"),
        (["benchmarks/ops", "--seconds", "nan"], "--seconds must be above 0, got nan"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_a_process_of_its_own(command: list[object], message: str) -> None:
    process = start(*command)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, b"")
    assert message in one_error(err.decode())


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_has_had_enough_is_no_error(fox: Path, unbuffered: bool) -> None:
    flags = ("--model", fox, "--max-new-tokens", 10_000_000)
    process = start("generate", *flags, unbuffered=unbuffered)
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    with process.stderr, process.stdin or process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 0


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", [["generate", "--help"], ["doctor"]], ids=["tyro", "rich"])
def test_a_pipe_that_nobody_reads(command: list[object], unbuffered: bool) -> None:
    readable, writable = os.pipe()
    os.close(readable)
    process = start(*command, stdout=writable, unbuffered=unbuffered)
    os.close(writable)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
@pytest.mark.parametrize("flags", [["--max-new-tokens", 3], ["--help"]], ids=["story", "help"])
def test_a_full_disk_behind_stdout(flags: list[object], fox: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start("generate", "--model", fox, *flags, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "No space left on device" in one_error(err.decode())


def test_a_terminal_that_cannot_show_a_character(fox: Path) -> None:
    flags = ("--model", fox, "--prompt", "Caf\u00e9", "--max-new-tokens", 3)
    process = start("generate", *flags, encoding="ascii")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"Caf?")


@pytest.mark.parametrize("typed", [b"", b"\n", b"\n\n"])
def test_interactive_ends_with_its_input(typed: bytes, fox: Path) -> None:
    process = start("generate", "--model", fox, "--interactive", "--max-new-tokens", 2)
    out, err = process.communicate(typed, timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.count(b"> ") == typed.count(b"\n") + 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", None, "no chat template there; expected chat_template in"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected a JSON object, got list"),
        ("chat_template.jinja", b"{% for", "the chat template is not Jinja: TemplateSyntaxError"),
        (
            "chat_template.jinja",
            b"{{ raise_exception('no') }}",
            "refuses the messages: TemplateErr",
        ),
        ("chat_template.jinja", b"no tokens", "ends an answer with no special token that the tok"),
        ("generation_config.json", b'{"eos_token_id": -1}', "eos_token_id must be a whole number"),
    ],
)
def test_a_model_that_cannot_chat(
    file: str, content: bytes | None, message: str, refusal: Refusal, fox: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(fox, folder)
    (folder / "manifest.json").unlink()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert message in refusal("generate", "--model", "damaged", "--chat", "--prompt", "Hello")


def test_a_message_longer_than_the_context(refusal: Refusal, fox: Path) -> None:
    line = refusal("generate", "--model", fox, "--chat", "--prompt", "Hello " * 100)
    assert "tokens with all that belongs to it, and the model looks back on 64, its ans" in line


def test_what_is_typed_must_be_utf8(fox: Path) -> None:
    process = start("generate", "--model", fox, "--interactive", "--max-new-tokens", 2)
    out, err = process.communicate(b"caf\xe9\nOnce\n", timeout=60)
    assert "what was typed is not UTF-8 (0xe9)" in one_error(err.decode())
    assert process.returncode == 0 and b"> Once" in out, "the lines after it are read"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process there")
def test_ctrl_c_says_interrupted(fox: Path) -> None:
    process = start("generate", "--model", fox, "--max-new-tokens", 10_000_000)
    assert process.stdout and process.stderr
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")

"""The console commands: sample, doctor, parity, and how errors are reported to the user."""

import errno
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from fastgpt import cli, train
from fastgpt.core import backend, native, options
from fastgpt.core.backend import ops as registry
from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.data import train_tokenizer
from fastgpt.finetune.adapter import save_adapter
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.models.weights.fingerprint import fingerprint
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.load import load_run

SMALL = (
    "--model.n-layers 1 --model.n-heads 2 --model.width 16 --block-size 16 --micro-batch 2 --batch-tokens 32 "
    "--max-minutes null --max-steps 2 --warmup-steps 1 --vocab-size 300 --sample-tokens 4 --device cpu --out run"
).split()


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["fastgpt", *argv])
    return cli.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run, for `trained` to copy."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        Path("text.txt").write_text(Path(train.__file__).read_text())
        assert run(monkeypatch, "train", *SMALL, "--data", "text.txt") == 0
    return folder / "run"


@pytest.fixture
def trained(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder `run` of a short run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_sample_continues_the_prompt(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        assert run(monkeypatch, "sample", "--run", "run", "--prompt", "import ", "--tokens", "12", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert all(t.startswith("import ") for t in texts) and texts[0] == texts[1] != texts[2]
    words = ("sample", "--run", "run", "--prompt", "import ", "--tokens", "4", "--device", "cpu")
    assert run(monkeypatch, *words, "--weights", "int8") == 0 and capsys.readouterr().out.startswith("import ")


def test_sample_refuses_a_foreign_tokenizer_and_missing_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|endoftexd|>"))
    assert run(monkeypatch, "sample", "--run", "run") == 2
    assert "tokenizer" in capsys.readouterr().err
    file.unlink()
    assert run(monkeypatch, "sample", "--run", "run") == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert run(monkeypatch, "sample", "--run", "nowhere") == 2
    assert "nowhere is neither a checkpoint nor a run folder" in capsys.readouterr().err
    assert run(monkeypatch, "sample", "--run", "run", "--prompt", "") == 2


def test_sample_writes_texts_of_a_grammar(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    Path("schema.json").write_text('{"enum": ["one", 2]}')
    capsys.readouterr()
    for words, fits in ((["--regex", "[0-9]{3}"], "x=[0-9]{3}\n"), (["--json-schema", "schema.json"], 'x=("one"|2)\n')):
        assert run(monkeypatch, "sample", "--run", "run", "--prompt", "x=", *words) == 0
        assert re.fullmatch(fits, capsys.readouterr().out)


def test_sample_prints_several_texts_and_logprobs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ["--run", "run", "--prompt", "import ", "--tokens", "3"]
    assert run(monkeypatch, "sample", *words, "--seed", "4", "--n", "2") == 0
    first, second = capsys.readouterr().out.split("--- sample 2, seed 5 ---\n")
    assert first.startswith("--- sample 1, seed 4 ---\nimport ")
    assert run(monkeypatch, "sample", *words, "--seed", "5", "--logprobs", "2") == 0
    out = capsys.readouterr().out
    assert out.startswith(second) and re.search(r"\n +-\d+\.\d{4}  '.+'  of '.+' -\d\.\d{4}, '.+' -\d\.\d{4}\n", out)


def test_sample_and_chat_use_an_adapter(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its own chat template; not on another base, or with another tokenizer."""
    model = load_run(trained, torch.device("cpu"))[0]
    base, g = fingerprint(model), torch.Generator().manual_seed(0)
    for m in add_lora(model, Lora(rank=2), generator=g).values():
        m.lora_B.data.normal_(0.0, 2.0, generator=g)
    save_adapter(model, "mine", base=base)
    save_adapter(model, "other", base="0" * 64)
    Path("mine/chat_template.jinja").write_text("{% for m in messages %}x{% endfor %}")
    words = ["sample", "--run", "run", "--prompt", "import ", "--tokens", "8", "--temperature", "0"]
    texts = []
    for more in ([], ["--adapter", "mine"], ["--adapter", "mine", "--weights", "int8"]):
        capsys.readouterr()
        assert run(monkeypatch, *words, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1] and all(text.startswith("import ") for text in texts)
    assert run(monkeypatch, *words, "--adapter", "other") == 2
    assert "other was trained on another base" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--adapter", "run") == 2
    assert "run has no adapter, expected adapter_config.json" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("a long message of many words"))  # one token in the adapter's template
    assert run(monkeypatch, "chat", "run", "--adapter", "mine", "--tokens", "4") == 0
    assert "the message needs" not in capsys.readouterr().err
    train_tokenizer(["another text " * 20], 270).save("mine/tokenizer.json")
    assert run(monkeypatch, *words, "--adapter", "mine") == 2
    assert "adapter mine was trained with another tokenizer" in capsys.readouterr().err


def test_sample_refuses_what_the_model_cannot_do(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--context", "17"], "--context: GPT: 17 positions, expected at most 16, the size of the learned table"),
        (["--stop", ""], "--stop is an empty text"),
        (["--json-schema", "none.json"], "--json-schema: none.json cannot be read"),
        (["--regex", "["], "sample: grammar: the regex cannot be used (unclosed character class)"),
        (["--regex", "a" * 40_000], "sample: the text has 40,000 characters, expected at most 32,768"),
    ):
        if "[" in words:
            pytest.importorskip("llguidance")
        capsys.readouterr()
        assert run(monkeypatch, "sample", "--run", "run", *words) == 2
        err = capsys.readouterr().err
        assert err.startswith("fastgpt: error: ") and said in err and err.count("\n") == 1


def test_the_commands_of_the_page_on_generation(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, "runs/tiny")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    if importlib.util.find_spec("llguidance") is None:
        pytest.skip("needs llguidance")
    page = (Path(__file__).parent.parent / "docs" / "generation.md").read_text(encoding="utf-8")
    commands = re.findall("^fastgpt (.*)", page, re.M)
    assert len(commands) == 4
    for command in commands:
        assert run(monkeypatch, *shlex.split(command)) == 0, command


def test_chat_reads_a_pipe(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A message too long for a block of 16 tokens, commands, a conversation that outgrows it, the end of input."""
    (trained / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    capsys.readouterr()
    end, source = os.pipe()
    os.write(source, "\n".join(["x " * 40, "a", "/reset", "/now", "b", "", "c", "d", "e"]).encode())
    os.close(source)
    with open(end, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(monkeypatch, "chat", "run", "--tokens", "4", "--device", "cpu") == 0
    out = capsys.readouterr()
    remarks = [line for line in out.err.splitlines() if not line.startswith("(cut")]
    assert remarks[0].startswith("(the message needs ") and remarks[0].endswith("tokens, expected at most 12)")
    assert remarks[1] == "(the conversation is forgotten)" and remarks[2].startswith("(/now is not a command, expected")
    # how many at a time depends on the length of the replies, and so on the text that the model has learned
    turns = r"\((the oldest turn was|the \d oldest turns were) dropped, because .* the context of 16 tokens\)"
    assert remarks[3:] and all(re.fullmatch(turns, line) for line in remarks[3:]), remarks
    assert len(out.out.splitlines()) >= 5


def test_chat_refuses_a_wrong_template_and_other_input(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for template, said in (("{% for %}", "is not a valid chat template"), ("{{ raise_exception('no') }}", ": no")):
        (trained / "chat_template.jinja").write_text(template)
        capsys.readouterr()
        assert run(monkeypatch, "chat", "run") == 2
        err = capsys.readouterr().err
        assert "chat_template.jinja" in err and said in err and err.count("\n") == 1
    (trained / "chat_template.jinja").unlink()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert run(monkeypatch, "chat", "run") == 2
    assert "chat: the input is not UTF-8" in capsys.readouterr().err


NOT_NUMBERS = ["many", "nan", "inf", "1e400", "-1", "", "null", "10%", "4m", "1,5", "9" * 400]
NUMBERS = {  # command -> options with a number, and numbers out of range for each
    ("sample",): {
        "--tokens": ["1e3"], "--temperature": ["-0.1"], "--top-k": ["2.5"], "--seed": [str(2**63), "1.5"], "--n": ["0"],
        "--top-p": ["0", "1.1"], "--min-p": ["1.1"], "--repetition-penalty": ["0"], "--logprobs": ["1.5"],
        "--context": ["0"],
    },
    ("tune", "--dry-run"): {"--batch": ["0", "1e3"], "--block": ["0"], "--seconds": ["-0.5"]},
    ("train", "--plan", "--tokens", "1e9"): {
        "--gpus": ["0", "1.5"], "--tokens": ["0"], "--price": ["-0.01"], "--mfu": ["0", "1.01", "40"],
    },
    ("parity",): {"--top": ["1e1"]},
}  # fmt: skip


@pytest.mark.parametrize("command", NUMBERS, ids=" ".join)
def test_a_wrong_number_is_one_sentence(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, more in NUMBERS[command].items():
        for value in [*NOT_NUMBERS, *more]:
            assert run(monkeypatch, *command, f"{option}={value}") == 2, (option, value)
            err = capsys.readouterr().err
            assert err.startswith("fastgpt: error: ") and err.count("\n") == 1, err
            assert f"{option} is {value!r}, expected a" in err, err


@pytest.mark.parametrize(
    "words",
    ["layer_norm --seconds nan", "throughput --batch 0", "roofline --steps -1", "host --seconds inf", "memory --gb 0"]
    + ["compare a b --floor nan", "ab --base x --runs 0 -- y", "patching --steps 1e3", "layer_norm --calls 0"],
)
def test_a_wrong_number_of_a_benchmark_is_one_sentence(words: str) -> None:
    with pytest.raises(UserError, match=rf"^{words.split()[0]}: --\w+ is '.*', expected a[^\n]*$"):
        cli.bench(words.split())


def test_a_wrong_choice_in_the_environment_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback at import: a command exits with code 2, and in a program the first call of an op raises."""
    monkeypatch.setattr(backend, "_wrong", [])
    monkeypatch.setattr(backend, "_cache", {})
    monkeypatch.setenv("FASTGPT_KERNELS", "layer_norm=tritn")
    backend.apply_environment()
    assert run_command(lambda: 0) == 2
    said = "FASTGPT_KERNELS: layer_norm='tritn': expected one of cuda, triton, cpu, torch, auto"
    assert capsys.readouterr().err == f"fastgpt: error: {said}\n"
    with pytest.raises(UserError, match=said):
        backend.select("rms_norm", torch.ones(2))


def test_a_wrong_number_among_the_settings_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Test every number among the settings with one wrong value, and every wrong value with a setting of each kind."""
    hints = options.key_types(TrainConfig)
    numbers = [key for key, hint in hints.items() if {int, float} & {hint, *get_args(hint)}]
    wrong = [v for v in NOT_NUMBERS if v != "null"] + ["1:30", ".nan", "-.inf", str(2**63)]
    pairs = [(key, wrong[i % len(wrong)]) for i, key in enumerate(numbers)]
    pairs += [(key, value) for key in ("max_steps", "lr") for value in wrong]
    assert len(numbers) > 40
    for key, value in pairs:
        with pytest.raises(UserError, match=rf"^{key} is .*, expected [^\n]*$"):
            load_config([f"--{key}={value}"])


def test_devices_that_are_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, said in {
        "": "expected auto",
        "cdua": "expected auto",
        "cuda:": "expected auto",
        "cuda": "finds no",
    }.items():
        for command in (["tune", "--dry-run"], ["sample", "--run", "x"]):
            assert run(monkeypatch, *command, f"--device={name}") == 2
            err = capsys.readouterr().err
            assert f"device is {name!r}" in err and said in err and err.count("\n") == 1


def test_commands_without_a_place_for_it_refuse_an_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = ["--kernels", "attention=torch"]
    for argv in (
        ["sample", *kernels], ["doctor", *kernels], ["tune", *kernels], ["parity", *kernels], [*kernels, "train"],
        ["--config", "tiny", "train"], ["doctor", "now"], ["train", "train"], ["train", "--kernels", "attention="],
        ["train", "--kernels"], ["train", "--plan=true"], ["train", "--plan", "--price", "2"], ["tune", "--config="],
        ["bench", *kernels], ["train", "--config="],
    ):  # fmt: skip
        assert run(monkeypatch, *argv, *(["--device", "cpu"] if argv[0] == "train" else [])) == 2, argv
        err = capsys.readouterr().err
        assert err.startswith("fastgpt: error: ") and err.count("\n") == 1, (argv, err)


def test_doctor_names_every_op_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    assert all(op in out for op in registry()) and "torch" in out
    for name, built in native.BUILT.items():
        assert built or native.reason(name) in out


def test_unknown_commands_and_user_errors_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["trian"], [], ["train", "--lrr", "1"], ["train", "--lr", "fast"]):
        assert run(monkeypatch, *argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("fastgpt: error: ") and len(err.splitlines()) == 1 and "Traceback" not in err

    def fails() -> int:
        raise UserError("what, where, expected")

    def interrupted() -> int:
        raise KeyboardInterrupt

    def not_permitted() -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "runs/mine")

    assert run_command(fails) == 2 and run_command(interrupted) == 130
    capsys.readouterr()
    assert run_command(not_permitted) == 2
    assert capsys.readouterr().err == "fastgpt: error: cannot use runs/mine: Permission denied\n"


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    assert re.findall("^  ([a-z-]+) ", capsys.readouterr().out, re.M) == list(cli.COMMANDS)


def test_interrupted_while_pytorch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(train.__file__).parents[1])])}
    command = [sys.executable, "-m", "fastgpt.cli", "train"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (130, "fastgpt: interrupted\n")


@pytest.mark.skipif(not native.BUILT["cpu"], reason="needs fastgpt._C")
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_compiled_kernels_older_than_their_sources(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "_wrong", [])
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    patched = "torch._C._dispatch_has_kernel_for_dispatch_key"
    monkeypatch.setattr(patched, lambda kernel, key: kernel != "fastgpt::linear_fwd.cpu" and has_kernel(kernel, key))
    backend.apply_environment()
    assert run(monkeypatch, command) == 2
    said = capsys.readouterr().err
    assert "fastgpt._C has no fastgpt::linear_fwd.cpu: it was built from an older csrc/; pip install" in said
    assert said.count("\n") == 1

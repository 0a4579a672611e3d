"""The command line: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from regauge.atlas import Atlas
from regauge.cli import app
from regauge.cli_support import parse_size
from regauge.cuts import CUTS
from regauge.errors import BadInput
from regauge.moves import MOVES

HIDDEN, MLP, LAYERS = 16, 24, 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with norm scales that are not one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    path = tmp_path_factory.mktemp("models") / "llama"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rewritten(llama: Path) -> tuple[Path, dict[str, Any]]:
    out = llama.parent / "rewritten"
    moves = ("--move", "fold-scales", "--move", "rotate:style=hadamard", "--move", "permute")
    result = run("rewrite", llama, out, *moves, "--seed", 5, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def run(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "150", "NO_COLOR": "1"}).invoke(app, [str(arg) for arg in args])


def words(text: str) -> str:
    """Text as a reader takes it in: without box drawing and line breaks."""
    return " ".join(word for word in text.split() if not set(word) <= set("─│╭╮╰╯━┃"))


def flat(text: str) -> str:
    return words(text).replace(" ", "")


# --- inspect ---------------------------------------------------------------------------------------


def test_inspect_shows_alike_layers_as_one_row(llama: Path) -> None:
    result = run("inspect", llama)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "mlp:" in line]
    assert len(rows) == 1
    assert str(LAYERS) in rows[0]
    assert str(MLP) in rows[0]
    assert "model.layers.*.mlp:" in rows[0]
    text = words(result.stdout)
    assert "after folding" in text
    assert "orthogonal" in text
    assert "is the output of the network" in text
    assert "silu" in text
    assert f"model.layers.*.input_layernorm.weight ×{LAYERS}" in text


def test_inspect_json_is_the_atlas(llama: Path, tmp_path: Path) -> None:
    result = run("inspect", llama, "--json", "--out", tmp_path / "atlas.json")
    assert result.exit_code == 0
    atlas = Atlas.from_json(result.stdout)
    assert Atlas.from_json((tmp_path / "atlas.json").read_text()) == atlas
    assert dict(atlas.shapes)["model.embed_tokens.weight"] == (50, HIDDEN)
    assert atlas.generators


def test_inspect_reads_no_weights(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert run("inspect", tmp_path).stdout.splitlines()[1:] == run("inspect", llama).stdout.splitlines()[1:]


def test_a_narrow_terminal_gets_a_list_with_the_same_content(llama: Path) -> None:
    narrow = CliRunner(env={"COLUMNS": "70", "NO_COLOR": "1"}).invoke(app, ["inspect", str(llama)])
    assert max(map(len, narrow.stdout.splitlines())) <= 70
    assert f"{LAYERS} × size {MLP}: permutation, any scale" in words(narrow.stdout)
    assert "no permutation: is the output of the network" in words(narrow.stdout)


# --- rewrite and certify ---------------------------------------------------------------------------


def test_rewrite_writes_a_certified_directory_that_transformers_loads(
    llama: Path, rewritten: tuple[Path, dict[str, Any]]
) -> None:
    from transformers import AutoModelForCausalLM

    out, report = rewritten
    assert report["verdict"] == "equivalent"
    assert report["certificate"]["evidence"]["exact"]["relative"] < 1e-10
    assert json.loads((out / "regauge.json").read_text()) == report["manifest"]
    assert [item["move"] for item in report["manifest"]["recipe"]] == ["fold-scales", "rotate", "permute"]
    assert report["manifest"]["seed"] == 5
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (llama, out)]
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        a, b = (model(ids).logits for model in models)
    assert not torch.equal(models[0].model.embed_tokens.weight, models[1].model.embed_tokens.weight)
    assert float((a - b).norm() / a.norm()) < 1e-5


def test_a_recipe_file_and_the_same_moves_give_the_same_bytes(
    llama: Path, rewritten: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("moves: [fold-scales, {name: rotate, style: hadamard}, permute]\nseed: 5\n")
    result = run("rewrite", llama, tmp_path / "out", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    names = [path.name for path in rewritten[0].glob("*.safetensors")]
    assert names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (rewritten[0] / name).read_bytes()


def test_rewrite_says_what_it_did_and_stores_the_dtype_asked_for(llama: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    result = run("rewrite", llama, tmp_path / "out", "--move", "permute:space=hidden", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("equivalent")
    assert "in the stored dtype" in result.stdout
    assert "written to" in result.stdout
    assert result.stderr == ""
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_certify_agrees_and_disagrees(
    llama: Path, rewritten: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    same = run("certify", llama, rewritten[0], "--json")
    assert same.exit_code == 0, same.output
    assert json.loads(same.stdout)["verdict"] == "equivalent within rounding"

    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        other.model.norm.weight[3] *= 1.01
    other.save_pretrained(tmp_path / "other")
    different = run("certify", llama, tmp_path / "other")
    assert different.exit_code == 1
    assert different.stdout.startswith("different")


# --- moves, version, help --------------------------------------------------------------------------


def test_moves_lists_every_move_with_its_identity_and_options() -> None:
    listed = {move["name"]: move for move in json.loads(run("moves", "--json").stdout)}
    assert list(listed) == [*MOVES, *CUTS]
    assert [name for name, item in listed.items() if item["type"] == "cut"] == list(CUTS)
    text = flat(run("moves").stdout)
    for name, move in MOVES.items():
        assert listed[name]["identity"] == move.identity
        assert flat(move.identity) in text
        assert flat(move.needs) in text
        for key, option in move.options.items():
            assert listed[name]["options"][key]["default"] == option.default
            assert f"{key}=" in text


def test_version() -> None:
    import regauge

    assert run("--version").stdout == f"regauge {regauge.__version__}\n"


@pytest.mark.parametrize("verb", ["inspect", "rewrite", "certify", "export", "report", "moves", "demo"])
def test_help_of_every_command_shows_an_example(verb: str) -> None:
    text = run(verb, "--help").stdout
    assert f"  regauge {verb}" in text.split("Examples:")[1]


def test_help_needs_no_tensor_library() -> None:
    code = (
        "import sys, regauge.cli\n"
        "try: regauge.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'scipy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Exit codes" in done.stdout


# --- how it ends -----------------------------------------------------------------------------------


def _refused(llama: Path, *args: object, code: int = 2) -> Result:
    """The command fails with that code, says why on stderr only, leaves nothing, and shows no traceback."""
    out = llama.parent / "never"
    result = run("rewrite", llama, out, *args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert [path for path in llama.parent.iterdir() if "never" in path.name] == []
    return result


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--move", "fold-scale"], "did you mean 'fold-scales'"),
        (["--move", "rotate:angle=3"], "has no option 'angle'"),
        (["--move", "rotate:style=hadamrd"], "did you mean 'hadamard'"),
        ([], "one or more --move, or one --recipe"),
        (["--recipe", "none.yaml"], "cannot read the recipe"),
        (["--move", "permute", "--recipe", "none.yaml"], "one or more --move, or one --recipe"),
        (["--move", "permute", "--max-memory", "much"], "cannot read an amount of memory"),
        (["--move", "permute", "--dtype", "int4"], "is not one of"),
        (["--move", "permute", "--colour", "red"], "No such option"),
    ],
)
def test_bad_usage_ends_with_two(llama: Path, args: list[str], says: str) -> None:
    assert says in words(_refused(llama, *args).stderr)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--layers", "+1", "--where", "*.0.*"], "--where says nothing here"),
        (["--neurons", "+2", "--stack", "model.layers"], "--stack says nothing here"),
        (["--neurons", "9" * 20], "too many neurons"),
        ([], "say what is to grow"),
    ],
)
def test_bad_usage_of_grow_ends_with_two(llama: Path, tmp_path: Path, args: list[str], says: str) -> None:
    result = run("grow", llama, tmp_path / "out", *args)
    assert result.exit_code == 2, result.output
    assert says in words(result.stderr)
    assert not (tmp_path / "out").exists()


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "regauge", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "grow" in done.stdout


def test_an_unknown_key_in_a_recipe_ends_with_two(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("moves: [permute]\nsed: 3\n")
    assert "did you mean 'seed'" in words(_refused(llama, "--recipe", recipe).stderr)


def test_a_symmetry_that_does_not_exist_ends_with_three(llama: Path) -> None:
    result = _refused(llama, "--move", "rotate", code=3)
    assert "is multiplied entry by entry" in words(result.stderr)
    assert "fold-scales" in words(result.stderr)


def test_errors_as_json(llama: Path) -> None:
    error = json.loads(_refused(llama, "--move", "rotate", "--json", code=3).stderr)
    assert error["error"] == "Refused"
    assert error["exit_code"] == 3
    assert error["node"]
    assert error["way_out"]


def test_a_source_that_is_not_there_ends_with_two(tmp_path: Path) -> None:
    for args in (("inspect", tmp_path / "none"), ("certify", tmp_path / "none", tmp_path / "none")):
        result = run(*args)
        assert result.exit_code == 2
        assert "does not exist" in words(result.stderr)
    result = run("inspect", "packaged:none")
    assert result.exit_code == 2
    assert "whisper-tiny.en" in result.stderr


def test_an_output_that_exists_is_never_overwritten(llama: Path, tmp_path: Path) -> None:
    kept = tmp_path / "mine.txt"
    kept.write_text("mine")
    result = run("rewrite", llama, tmp_path, "--move", "permute")
    assert result.exit_code == 2
    assert "exists already" in words(result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_certificate_ends_with_one_and_leaves_nothing(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move that is wrong: one norm scale of the result is not what the plan says."""
    import regauge.moves as registry
    from regauge.moves import Change, Move, Preserves
    from regauge.steps import AddStep

    step = AddStep(torch.full((HIDDEN,), 0.01, dtype=torch.float64))
    wrong = Move(
        name="wrong",
        identity="g ← g + 0.01",
        needs="nothing",
        preserves=Preserves.OUTPUT,
        plan=lambda scene, options: Change({"model.norm.weight": (step,)}),
    )
    monkeypatch.setitem(registry.MOVES, "wrong", wrong)  # pyright: ignore[reportArgumentType]
    result = _refused(llama, "--move", "wrong", code=1)
    assert "the certificate failed" in words(result.stderr)


def test_ctrl_c_says_that_the_same_command_goes_on(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regauge.api.rewrite", interrupt)
    result = _refused(llama, "--move", "permute", code=130)
    assert "same command again" in result.stderr


def test_a_bug_is_not_mistaken_for_a_failed_certificate(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("regauge.api.rewrite", broken)
    result = run("rewrite", llama, llama.parent / "never", "--move", "permute")
    assert result.exit_code == 70
    assert "ZeroDivisionError" in result.stderr
    assert "bug in regauge" in result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("64kib", 2**16),
        ("123", 123),
        ("2g", 2 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 apples", "0", "1e9", "0.1B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInput):
        parse_size(text)

"""The commands that run to their end: what they print, in text and as JSON, and with which exit code."""

import json
import re
from pathlib import Path

import pytest
from typer.main import get_group
from typer.testing import CliRunner

import yoke as package
from yoke.cli.main import app

pytestmark = pytest.mark.processes

PROMPT = "And the LORD said unto"


def answer_of(running):
    return json.loads(running.out)


def test_run_prints_the_text_and_the_speed(yoke, kjv):
    running = yoke.run("run", kjv, "-p", PROMPT, "-n", 12)
    assert running.out.startswith(" Moses")
    assert re.search(r"\[\d+ prompt tokens at [\d.]+/s, 12 written at [\d.]+/s, ended by length\]", running.err)


def test_run_as_json_has_every_documented_field(yoke, kjv):
    answer = answer_of(yoke.run("run", kjv, "-p", PROMPT, "-n", 12, "--seed", 7, "--json"))
    assert set(answer) == documented_fields("yoke run")
    assert (answer["model"], answer["seed"], answer["finish_reason"]) == ("kjv", 7, "length")
    assert (len(answer["tokens"]), answer["completion_tokens"]) == (12, 12)
    assert answer["prefill_tokens_per_s"] > 0
    assert answer["decode_tokens_per_s"] > 0
    assert answer["text"].startswith(" Moses")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, yoke_in, kjv):
    """What one node answers."""
    with yoke_in(tmp_path_factory.mktemp("alone") / "home") as command:
        return answer_of(command.run("run", kjv, "-p", PROMPT, "-n", 32, "--json"))


@pytest.mark.parametrize(
    "layout",
    [
        ["--local-nodes", 3],
        ["--local-nodes", 3, "--ranks", 3, "--shares", "3:2:1"],
        ["--local-nodes", 4, "--stages", 2, "--ranks", 2],
    ],
    ids=["planned", "three uneven ranks", "two stages of two ranks"],
)
def test_every_split_writes_what_one_node_writes(yoke, kjv, alone, layout):
    split = answer_of(yoke.run("run", kjv, "-p", PROMPT, "-n", 32, "--json", *layout))
    assert (split["tokens"], split["text"]) == (alone["tokens"], alone["text"])
    assert yoke.leftovers() == []


def test_the_same_seed_draws_the_same_text(yoke, kjv):
    flags = ["run", kjv, "-p", PROMPT, "-n", 24, "--temperature", 1, "--top-k", 40, "--top-p", 0.95, "--min-p", 0.01, "--json"]
    first, second = (answer_of(yoke.run(*flags, "--seed", 11)) for _ in range(2))
    assert first["tokens"] == second["tokens"]
    assert answer_of(yoke.run(*flags, "--seed", 12))["tokens"] != first["tokens"]


def test_run_ends_at_a_stop_text(yoke, kjv):
    answer = answer_of(yoke.run("run", kjv, "-p", PROMPT, "--stop", ",", "--json"))
    assert (answer["text"], answer["finish_reason"]) == (" Moses", "stop")


def test_run_reads_the_prompt_from_standard_input(yoke, kjv, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT)
    with (tmp_path / "prompt").open() as text:
        assert yoke.run("run", kjv, "-p", "-", "-n", 4, stdin=text).out.startswith(" Moses")


def test_settings_come_from_flag_then_environment_then_file(yoke, kjv):
    (yoke.home / "yoke.yaml").write_text("context: 7777\n")
    assert "context is 7777" in yoke.run("run", kjv, "-p", "a", code=2).err
    assert "context is 8888" in yoke.run("run", kjv, "-p", "a", env={"YOKE_CONTEXT": "8888"}, code=2).err
    assert "context is 9999" in yoke.run("run", kjv, "-p", "a", "--context", 9999, env={"YOKE_CONTEXT": "8888"}, code=2).err


def test_plan_says_who_holds_what(yoke, kjv):
    running = yoke.run("plan", kjv, "--local-nodes", 2)
    assert re.search(r"kjv: \d stage\(s\), plan 1, predicted [\d.]+ tokens/s", running.out)
    for word in ("place", "node", "blocks", "weights"):
        assert word in running.out


def test_plan_as_json_covers_the_model_without_a_gap(yoke, kjv):
    plan = answer_of(yoke.run("plan", kjv, "--local-nodes", 2, "--stages", 2, "--json"))
    assert set(plan) == documented_fields("yoke plan")
    assert (plan["model"], plan["version"], len(plan["shards"])) == ("kjv", 1, 2)
    first, second = plan["shards"]
    assert (first["blocks"][0], first["blocks"][1], second["blocks"][1]) == (0, second["blocks"][0], 10)
    assert all(shard["memory_bytes"] >= shard["weights_bytes"] > 0 for shard in plan["shards"])
    assert {shard["node_id"] for shard in plan["shards"]} == {first["node_id"], second["node_id"]}
    assert first["node_id"] != second["node_id"]


def test_bench_as_json_has_every_documented_field(yoke, kjv):
    result = answer_of(yoke.run("bench", kjv, "--prompt-tokens", 32, "--decode-tokens", 8, "--sessions", 2, "--runs", 2, "--local-nodes", 2, "--json"))
    assert set(result) == documented_fields("yoke bench")
    assert (result["model"], result["prompt_tokens"], result["decode_tokens"], result["sessions"], result["runs"]) == ("kjv", 32, 8, 2, 2)
    assert result["prefill_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0
    assert all(stage["steps"] > 0 for stage in result["stages"])


def test_bench_prints_a_table(yoke, kjv):
    running = yoke.run("bench", kjv, "--prompt-tokens", 16, "--decode-tokens", 4, "--runs", 1)
    assert re.search(r"prompt of 16 read at [\d.]+ tokens/s, 4 tokens written at [\d.]+ tokens/s", running.out)
    assert "where the time went" in running.out


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_convert_writes_a_file_that_runs(yoke, repository, kind):
    target = yoke.home / "model.gguf"
    assert "wrote" in yoke.run("convert", repository / "models" / "kjv-9m", target, "--type", kind).err
    assert [path.name for path in yoke.home.glob("*.gguf*")] == ["model.gguf"]
    assert answer_of(yoke.run("run", target, "-p", PROMPT, "-n", 4, "--json"))["completion_tokens"] == 4


def test_version_is_the_package_s(yoke):
    assert yoke.run("--version").out == f"yoke {package.__version__}\n"


COMMANDS = ["run", "chat", "serve", "join", "plan", "status", "bench", "convert"]


def test_help_lists_every_command(yoke):
    text = yoke.run("--help").out
    for command in COMMANDS:
        assert re.search(rf"^  {command}\s+\w", text, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_manual_explain_every_flag(command):
    shown = " ".join(CliRunner().invoke(app, [command, "--help"], terminal_width=160).output.split())
    manual = manual_section(f"yoke {command}")
    for parameter in get_group(app).get_command(None, command).params:
        assert parameter.help, f"{parameter.name} has no help"
        assert " ".join(parameter.help.split()) in shown
        if parameter.param_type_name == "option":
            for flag in parameter.opts:
                assert flag in shown
                assert f"`{flag}`" in manual or f"`{flag} " in manual, f"docs/cli.md does not tell of {flag}"


def manual_section(title):
    """The part of docs/cli.md under a heading."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    parts = re.split(r"^## `(.+?)`.*$", text, flags=re.MULTILINE)
    sections = {name.split(" ")[0] + " " + name.split(" ")[1]: body for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return sections[title]


def documented_fields(title):
    """The top-level fields of a command's JSON, from the table in docs/cli.md."""
    return set(re.findall(r"^\| `(\w+)` \|", manual_section(title), re.MULTILINE)) or pytest.fail(f"no fields of {title}")

"""``yoke plan`` over a cluster's file: nothing is started, so that all of it can be tried in a moment."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from yoke.cli.main import app
from yoke.core.errors import PlacementError, SettingError
from yoke.testing.models import write_random_model

CLUSTER = """\
nodes:
  - {name: laptop, memory: 300 MB, speed: 2 MB/s, threads: 4}
  - {name: desktop, memory: 16 GB, speed: 4 MB/s}
  - {name: attic, memory: 300 MB, speed: 100 kB/s}
links:
  default: {rtt: 0.5 ms, bandwidth: 1 Gbit/s}
"""
"""Speeds so low that the tiny model takes its time."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.gguf"
    write_random_model(path, architecture="llama", n_blocks=6, width=64, n_heads=4, n_kv_heads=2, head_dim=16, columns=128, vocabulary=400, context=512)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def shown(*arguments: object) -> str:
    found = CliRunner().invoke(app, ["plan", *map(str, arguments)], terminal_width=160, env={"COLUMNS": "160", "NO_COLOR": "1"}, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def answer(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(*arguments, "--json"))
    return found


def test_machines_of_a_file_are_planned_over(model: Path, cluster: Path) -> None:
    text = shown(model, "--cluster", cluster)
    assert re.search(r"tiny: \d stage\(s\), plan 1, predicted [\d.]+ tokens/s for one stream", text)
    assert "desktop streams 0.0 GB/s: it computes" in text
    assert "of 16.00 GB that it offers" in text
    assert "attic is left out" in text
    assert re.search(r"predicted: [\d.]+ tokens/s for 8 streams together; the first token of a prompt of 512 comes after [\d.]+ s", text)
    assert "->" not in text


def test_json_has_the_same_fields_with_and_without_a_change(model: Path, cluster: Path) -> None:
    plain, changed = answer(model, "--cluster", cluster), answer(model, "--cluster", cluster, "--without", "desktop")
    assert plain.keys() == changed.keys()
    assert plain["change"] is None
    assert changed["change"]["before_tokens_per_s"] == plain["predicted_tokens_per_s"]
    assert changed["predicted_tokens_per_s"] < plain["predicted_tokens_per_s"]
    total = sum(plain["stages"][0][part] for part in ("compute_s", "exchange_s", "boundary_s"))
    assert 0 < total < 1 / plain["predicted_tokens_per_s"]
    stages = sum(sum(stage.values()) for stage in plain["stages"])
    assert stages + plain["own_s"] == pytest.approx(1 / plain["predicted_tokens_per_s"])
    assert set(plain["why"]) | set(plain["left_out"]) == {"laptop", "desktop", "attic"}


def test_machine_that_is_thought_of_shows_what_it_would_change(model: Path, cluster: Path) -> None:
    text = shown(model, "--cluster", cluster, "--add", "gpu: 8 GB, 900 MB/s, 0.2 ms, 10 Gbit/s", "--without", "attic")
    told = re.search(r"with gpu, without attic: ([\d.]+) -> ([\d.]+) tokens/s for one stream \(\+(\d+) %\), .* of weights move, in about [\d.]+ s", text)
    assert told is not None
    assert float(told[2]) > float(told[1])
    assert "attic" not in text.split("with gpu")[0]


def test_change_that_moves_nothing_says_so(model: Path, cluster: Path) -> None:
    text = shown(model, "--cluster", cluster, "--add", "snail=200 MB, 1 kB/s")
    assert re.search(r"with snail: .*\(\+0 %\).*; nothing moves", text)
    assert "snail is left out" in text


def test_machine_can_make_a_model_fit(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("nodes: [{name: pi, memory: 134.4 MB, speed: 1 GB/s}]")
    with pytest.raises(PlacementError, match="are missing"):
        shown(model, "--cluster", small)
    assert "with box: nothing fits -> " in shown(model, "--cluster", small, "--add", "box: 1 GB, 1 GB/s")
    change = answer(model, "--cluster", small, "--add", "box: 1 GB, 1 GB/s")["change"]
    assert (change["before_tokens_per_s"], change["before_together_tokens_per_s"]) == (None, None)


def test_explanation_shows_where_the_time_goes_and_what_else_there_is(model: Path, cluster: Path) -> None:
    text = shown(model, "--cluster", cluster, "--explain")
    assert re.search(r"stage +nodes +blocks +compute +exchange +way there", text)
    assert re.search(r"engine, drawing and the way back: [\d.]+ ms; in all [\d.]+ ms", text)
    assert re.search(r"instead: laptop: [\d.]+ tokens/s for one stream, [\d.]+ together", text)


def test_goal_can_be_throughput(model: Path, cluster: Path) -> None:
    one, many = (answer(model, "--cluster", cluster, "--for", goal, "--streams", 4) for goal in ("latency", "throughput"))
    assert (one["goal"], many["goal"], many["streams"]) == ("latency", "throughput", 4)
    assert many["predicted_together_tokens_per_s"] >= one["predicted_together_tokens_per_s"]


def test_longer_prompt_takes_longer(model: Path, cluster: Path) -> None:
    short, long = (answer(model, "--cluster", cluster, "--prompt-tokens", n) for n in (1, 500))
    assert (short["prompt_tokens"], long["prompt_tokens"]) == (1, 500)
    assert long["predicted_first_token_s"] > short["predicted_first_token_s"]


def test_plan_by_hand_is_obeyed_and_compared(model: Path, cluster: Path) -> None:
    cluster.write_text(CLUSTER + "plan:\n  stages:\n    - {nodes: [laptop, attic], shares: [3, 1], blocks: 4}\n    - [desktop]\n")
    by_hand = answer(model, "--cluster", cluster)
    assert [(shard["stage"], shard["rank"], shard["node"], shard["blocks"]) for shard in by_hand["shards"]] == [
        (0, 0, "laptop", [0, 4]),
        (0, 1, "attic", [0, 4]),
        (1, 0, "desktop", [4, 6]),
    ]
    freed = answer(model, "--cluster", cluster, "--without", "attic")
    assert freed["change"]["before_tokens_per_s"] == by_hand["predicted_tokens_per_s"] < freed["predicted_tokens_per_s"]
    assert len(answer(model, "--cluster", cluster, "--stages", 3)["stages"]) == 3, "a grid on the command line goes before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--without", "laptop"], "laptop is the coordinator"),
        (["--without", "garage"], "garage is not there; there are laptop, desktop, attic"),
        (["--add", "attic: 1 GB, 1 GB/s"], "there is a node of this name already"),
        (["--add", "attic"], "expected NAME: MEMORY, SPEED"),
        (["--cluster", "none.yaml"], "cannot be read"),
    ],
)
def test_impossible_changes_are_refused(model: Path, cluster: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        shown(model, "--cluster", cluster, *arguments)


def test_nodes_come_from_a_file_or_are_started() -> None:
    found = CliRunner().invoke(app, ["plan", "m.gguf", "--cluster", "c.yaml", "--local-nodes", "2"])
    assert found.exit_code == 2
    assert "give one or the other" in found.output


def test_machine_may_be_replaced_by_one_of_the_same_name(model: Path, cluster: Path) -> None:
    change = answer(model, "--cluster", cluster, "--without", "desktop", "--add", "desktop: 16 GB, 400 MB/s")["change"]
    assert change["before_tokens_per_s"] < 1e3

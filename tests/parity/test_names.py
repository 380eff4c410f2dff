"""docs/usage.md, "Names in TRL": each setting and each flag in its tables exists."""
import dataclasses
import re
from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="parity with TRL: pip install 'plain-rlhf[parity]'")
pytest.importorskip("trl.experimental.ppo", reason="TRL 1.12 is the last with PPO")
from trl.experimental.ppo import PPOConfig

import dpo
import grpo
import ppo
import reinforce
import reward_model

PAGE = (Path(__file__).parents[2] / "docs/usage.md").read_text().partition("\n## Names in TRL\n")[2]
TABLES = {table.split("\n")[0]: table.split("\n")[2:] for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)}
EXPECTED = {"all trainers": ((trl.GRPOConfig, trl.RLOOConfig, trl.DPOConfig, trl.RewardConfig),
                             (grpo, ppo, reinforce, dpo, reward_model)),
            "`GRPOConfig`": ((trl.GRPOConfig,), (grpo,)),
            "`RLOOConfig`, besides those of `GRPOConfig`": ((trl.RLOOConfig,), (reinforce,)),
            "`PPOConfig` (experimental)": ((PPOConfig,), (ppo,)),
            "`DPOConfig`, `RewardConfig`": ((trl.DPOConfig, trl.RewardConfig), (dpo, reward_model))}


def names(classes) -> list[set]:
    return [{field.name for field in dataclasses.fields(each)} for each in classes]


@pytest.mark.parametrize("title", EXPECTED)
def test_names_in_the_table_exist(title):
    configs, scripts = EXPECTED[title]
    rows, = (rows for head, rows in TABLES.items() if head.startswith(f"| {title} |"))
    # in the tables of two trainers a name has to be in one of them; in that of all, in each
    some = any if "all" not in title else all
    for row in filter(None, rows):
        theirs, ours = row.strip("| ").split(" | ")
        settings = re.findall(r"`([a-z0-9_]+)(?:=[^`]*)?`", theirs)
        flags = [flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", ours)]
        assert settings and (flags or "the same" in ours), row
        for name in set(settings) - {"margin"}:  # a column
            assert some(name in known for known in names(configs)), (row, name)
        for name in set(flags) - ({"steps"} if title == "all trainers" else set()):
            assert some(name in known for known in names(s.Args for s in scripts)), (row, name)


def test_all_tables_are_known():
    assert len(TABLES) == len(EXPECTED)

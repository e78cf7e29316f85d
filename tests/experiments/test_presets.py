"""Presets against the papers' tables, and the command: choices, errors, dry run, record."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")
pytest.importorskip("typer", reason="the command needs the extra 'finetune'")

from experiment_cases import write_classes
from tiny_models import save_encoder
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from typer.testing import CliRunner

from sparse_optim.cli.experiment import EXPERIMENTS
from sparse_optim.cli.main import app
from sparse_optim.experiments import overrides as module
from sparse_optim.experiments.arithmetic import MATH
from sparse_optim.experiments.budgets import BUDGETS
from sparse_optim.experiments.glue import ADAPTERS, GLUE, NER, PFEIFFER_RANK
from sparse_optim.experiments.overrides import Choice, choose
from sparse_optim.experiments.pictures import PICTURES
from sparse_optim.experiments.plan import best_lr, grid, tuning_cells
from sparse_optim.experiments.presets import Block, ExperimentError, Row
from sparse_optim.experiments.quality import (
    BUDGET,
    LORA_RANK,
    QUALITY,
    SMALL,
    SMALL_LORA_RANK,
)
from sparse_optim.experiments.stochastic import STOCHASTIC
from sparse_optim.experiments.sweeps import SWEEPS
from sparse_optim.experiments.table import markdown
from sparse_optim.finetune.adapter_kinds import AdapterRequest
from sparse_optim.finetune.adapters import lora_targets
from sparse_optim.finetune.config import parse_budget
from sparse_optim.finetune.tasks import TASKS
from sparse_optim.integrations import adapter_parameters, add_bottlenecks
from sparse_optim.methods import METHODS
from sparse_optim.policy.selection import resolve_budget

# Table 7b of the ID3 paper: epochs, steps between evaluations, greatest length.
TABLE_7B = {
    "rte": (30, 100, 256),
    "mrpc": (30, 100, 256),
    "cola": (20, 200, 256),
    "stsb": (15, 200, 256),
    "sst2": (7, 500, 256),
    "qnli": (7, 1000, 256),
    "qqp": (3, 4000, 256),
    "mnli": (3, 4000, 256),
    "conll2003": (20, 300, 384),
}


def test_glue_and_ner_have_the_settings_of_tables_7a_and_7b():
    tasks = {task.name: task for task in GLUE.tasks + NER.tasks}
    assert {n: (t.epochs, t.eval_every, t.max_length) for n, t in tasks.items()} == TABLE_7B
    metrics = {name: task.metric for name, task in tasks.items()}
    assert metrics.pop("stsb") == "pearson_spearman"
    assert metrics.pop("cola") == "matthews"
    assert metrics.pop("conll2003") == "f1"
    assert set(metrics.values()) == {"accuracy"}
    for experiment in (GLUE, NER):
        assert {task.batch_size for task in experiment.tasks} == {16}
        assert experiment.model == "microsoft/deberta-v3-base"
        assert (experiment.seeds, experiment.kept) == ((6, 7, 8, 9), 3)
        assert dict(experiment.settings) == {"d3_exp": 2.0, "d3_eps": 1.0}
        rates = {row.name: row.lrs for row in experiment.rows}
        assert rates.pop("full") == (5e-6, 7e-6, 1e-5, 3e-5)  # footnote 3
        assert set(rates.values()) == {(1e-4, 3e-4, 5e-4, 7e-4)}
        assert {row.budget for row in experiment.rows} == {"", "103K", "320K"}


def test_math_has_the_settings_of_table_7():
    (task,) = MATH.tasks
    assert (task.epochs, task.batch_size, task.max_length, task.split) == (3, 4, 256, None)
    assert {row.lrs for row in MATH.rows} == {(3e-4,)}
    assert (MATH.seeds, MATH.settings["d3_exp"], MATH.settings["d3_eps"]) == ((42,), 0.0, 1.0)
    assert {(row.name, row.budget) for row in MATH.rows} == {
        ("lora-r32", ""),
        ("lora-r2", ""),
        ("lora-r4", ""),
        *(
            (f"{method}+lora-r32", budget)
            for method in ("id3", "pafi")
            for budget in ("6.25%", "12.5%")
        ),
    }


def lora_entries(model: torch.nn.Module, row, whole: tuple[str, ...] = ()) -> int:
    """Entries of the LoRA that a row of a preset puts on a model."""
    request = AdapterRequest(row.rank, list(whole), targets=row.settings.get("adapter_targets", ()))
    modules = [model.get_submodule(name) for name in lora_targets(model, request)]
    return row.rank * sum(module.in_features + module.out_features for module in modules)


def test_the_presets_lora_has_the_papers_size_and_scale():
    """Table 2: 1.33M entries of rank 8. Table 5: 3.5M of rank 2, 7M of rank 4."""
    with torch.device("meta"):
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
        base = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
        config = DebertaV2Config(vocab_size=8, share_att_key=True, **relative, **base)
        deberta = DebertaV2ForSequenceClassification(config)
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=8))  # the defaults are those of 7B
    head = ("pooler.dense", "classifier")  # not in the checkpoint: trained whole
    rows = [row for row in GLUE.rows if row.adapter == "lora"]
    assert [(row.rank, row.settings["adapter_alpha"]) for row in rows] == [(8, 8.0)] * 3
    assert {lora_entries(deberta, row, head) for row in rows} == {1_327_104}
    sizes = {row.name: lora_entries(llama, row) for row in MATH.rows}
    assert sizes["lora-r2"] == 3_506_176
    assert sizes["lora-r4"] == 7_012_352
    assert all("adapter_alpha" not in row.settings for row in MATH.rows)  # twice the rank


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=8),
        LlamaConfig(
            vocab_size=8, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
            num_attention_heads=16,
        ),
        Qwen2Config(
            vocab_size=8, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2,
        ),
    ],
    ids=["llama-7b", "mobilellama-1.4b", "qwen2.5-0.5b"],
)  # fmt: skip
def test_budgets_of_math_are_the_entries_of_ranks_2_and_4_of_any_model(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rows = {row.label: row for row in MATH.rows}
    whole = lora_entries(model, rows["lora-r32"])
    for rank, budget in ((2, "6.25%"), (4, "12.5%")):
        entries = resolve_budget(parse_budget(budget), whole)
        assert entries == lora_entries(model, rows[f"lora-r{rank}"])
        assert {f"id3+lora-r32-{budget}", f"pafi+lora-r32-{budget}"} <= rows.keys()


def test_budgets_have_the_tasks_and_settings_of_glue():
    """Figure 6: increment against repeat, from 80K to beyond a sparsity of 99.82%."""
    assert [task.name for task in BUDGETS.tasks] == ["cola", "mrpc", "rte"]
    assert all(task in GLUE.tasks for task in BUDGETS.tasks)
    assert (BUDGETS.model, BUDGETS.seeds, BUDGETS.settings) == (
        *(GLUE.model, GLUE.seeds, GLUE.settings),
    )
    sizes = {row.label: parse_budget(row.budget) for row in BUDGETS.rows}
    assert {f"{method}-80K" for method in ("id3", "repeat-d3")} <= sizes.keys()
    assert {row.method for row in BUDGETS.rows} == {"id3", "repeat-d3"}
    assert max(sizes.values()) > 0.0018 * 184e6 > sorted(set(sizes.values()))[4] == 320_000
    assert len(sizes) == 2 * len(set(sizes.values()))
    assert BUDGETS.paper["id3-103K"] == {"cola": 70.62, "mrpc": 91.01, "rte": 87.12}


def test_sweeps_change_eps_or_exp_and_never_both():
    """Figure 4: the best eps is 0.5, the best exp is -1."""
    rows = {row.name: {**SWEEPS.settings, **row.settings} for row in SWEEPS.rows}
    pairs = {(settings["d3_eps"], settings["d3_exp"]) for settings in rows.values()}
    assert len(pairs) == len(rows) == 9
    assert {exp for eps, exp in pairs if eps == 1.0} == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert {eps for eps, exp in pairs if exp == 2.0} >= {0.5, 1.0}
    assert all(eps == 1.0 or exp == 2.0 for eps, exp in pairs)
    assert rows["id3@exp=-1"]["d3_exp"] == -1.0
    chosen, _ = choose(SWEEPS, Choice(methods="id3@eps=0.5", budgets="1%"))
    assert [row.label for row in chosen.rows] == ["id3@eps=0.5-1%"]


def test_a_choice_changes_the_steps_between_evaluations():
    chosen, _ = choose(MATH, Choice(eval_every=80))
    assert [task.eval_every for task in chosen.tasks] == [80]
    assert [task.eval_every for task in choose(MATH, Choice())[0].tasks] == [None]
    with pytest.raises(ExperimentError, match="--eval-every must be at least 1 step, got 0"):
        choose(MATH, Choice(eval_every=0))


def test_every_picture_of_an_experiment_exists():
    assert {name for one in EXPERIMENTS for name in one.pictures} == set(PICTURES)


def test_adapters_have_the_rows_and_the_size_of_table_3():
    assert [task.name for task in ADAPTERS.tasks] == ["stsb", "cola", "mrpc", "rte"]
    assert [row.label for row in ADAPTERS.rows] == list(ADAPTERS.paper)
    assert (ADAPTERS.seeds, ADAPTERS.kept) == ((6, 7, 8, 9), 3)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=8))
        add_bottlenecks(model, PFEIFFER_RANK)
    size = sum(param.numel() for param in adapter_parameters(model).values())
    assert round(size / 1e6) == 201
    assert round(1 - parse_budget("8M") / size, 2) == 0.96  # "sparsity 96%"


def test_stochastic_budgets_follow_the_model():
    """As many entries as BitFit trains, or a share: the preset has no count of one model."""
    budgets = {row.name: row.budget for row in STOCHASTIC.rows}
    assert {budgets.pop("dps"), budgets.pop("dps-mix")} == {"30%"}  # reserve_p of its authors
    assert set(budgets.values()) == {""}
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=8))
    sizes = {name: param.numel() for name, param in model.roberta.named_parameters()}
    biases = sum(size for name, size in sizes.items() if name.endswith("bias"))
    assert biases == 102_144  # 0.08%
    assert choose(STOCHASTIC, Choice())[1] == []
    chosen, _ = choose(STOCHASTIC, Choice(budgets="500"))
    found = {row.name: row.budget for row in chosen.rows if not row.name.startswith("dps")}
    assert found == {
        **dict.fromkeys(("stochastic-tuning", "top-tuning", "random-tuning"), "500"),
        **dict.fromkeys(("bitfit", "full", "multi-head", "frozen"), ""),
    }
    with pytest.raises(ExperimentError, match=r"id3 needs a budget.*add --budgets"):
        choose(STOCHASTIC, Choice(methods="id3"))  # the share of DPS is none for id3
    chosen, _ = choose(STOCHASTIC, Choice(methods="id3", budgets="1%"))
    assert [row.label for row in chosen.rows] == ["id3-1%"]


def test_stochastic_has_the_settings_of_section_3_1():
    assert {task.max_length for task in STOCHASTIC.tasks} == {128}
    assert {task.batch_size for task in STOCHASTIC.tasks} == {16}
    metrics = {task.name: task.metric for task in STOCHASTIC.tasks}
    assert metrics == {
        "cola": "matthews",
        "sst2": "accuracy",
        "mrpc": "f1_positive",
        "stsb": "spearman",
        "qnli": "accuracy",
        "rte": "accuracy",
    }
    assert dict(STOCHASTIC.settings) == {"adam_eps": 1e-6, "warmup": 0.1}
    assert {row.lrs for row in STOCHASTIC.rows} == {(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}
    assert len(STOCHASTIC.seeds) == STOCHASTIC.kept == 7
    assert not STOCHASTIC.paper


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_presets_name_tasks_metrics_and_rows_that_exist(experiment):
    for task in experiment.tasks:
        assert task.metric in TASKS[task.task].metrics
        assert task.metric not in ("rmse", "perplexity", "token_loss") or task.columns
    labels = [row.label for row in experiment.rows]
    assert set(experiment.paper) <= set(labels)
    for figures in experiment.paper.values():
        assert set(figures) <= {*experiment.columns, "average"}
    for row in experiment.rows:
        assert row.budget == "" or parse_budget(row.budget) > 0


def test_the_papers_averages_are_near_those_of_their_columns():
    """A slip of the pen in a column would show; the paper's own slips reach 0.6."""
    for experiment in (GLUE, ADAPTERS, MATH):
        for label, figures in experiment.paper.items():
            columns = [figures[name] for name in experiment.columns]
            assert abs(sum(columns) / len(columns) - figures["average"]) < 0.7, label


def test_quality_begins_with_the_core_at_equal_budgets():
    first = QUALITY.blocks[0]
    assert [task.name for task in first.tasks] == ["conll2003", "trec50", "stsb", "cola"]
    assert {row.label for row in first.rows} == {
        "full",
        "lora-r3",
        "r-mask@linear-112827",
        "pafi@linear-112827",
        "id3@paper-112827",
        "id3@early-112827",
    }
    assert {row.budget for row in QUALITY.rows} == {"", BUDGET, SMALL}
    pool = 22_565_376
    assert (int(BUDGET), int(SMALL)) == (round(0.005 * pool), int(0.0005 * pool))
    every_linear = 6 * (4 * (384 + 384) + 2 * (384 + 1536))  # entries a rank, six layers
    query_value = 6 * 2 * (384 + 384)
    for budget, entries, rank in (
        (BUDGET, every_linear, LORA_RANK),
        (SMALL, query_value, SMALL_LORA_RANK),
    ):
        distance = {r: abs(r * entries - int(budget)) for r in range(1, 20)}
        assert rank == min(distance, key=distance.get)


def test_rates_of_quality_are_powers_of_two():
    """So that the grids of all rows meet, wherever they grow."""
    for row in QUALITY.rows:
        for lr in row.lrs:
            assert math.log2(lr / 1e-3) == pytest.approx(round(math.log2(lr / 1e-3)))
        assert len(row.lrs) == 1 or row.lrs[1] == pytest.approx(QUALITY.widen * row.lrs[0])


def test_a_row_of_the_preset_keeps_its_rates_where_its_budget_is_asked_for():
    """The preset has the same method with another budget before it."""
    preset = {row.label: row.lrs for row in QUALITY.rows}
    for budget in (BUDGET, SMALL):
        (row,) = choose(QUALITY, Choice(methods="id3@early", budgets=budget))[0].rows
        assert row.lrs == preset[row.label]
    assert preset[f"id3@early-{BUDGET}"] != preset[f"id3@early-{SMALL}"]


def test_a_task_may_want_other_rates():
    """Grid, tuning and a single rate; rates of the user's are taken as they are."""
    cola = next(task for task in QUALITY.tasks if task.name == "cola")
    assert cola.lr_factor == 0.25
    row = Row("full", (1e-3, 2e-3))
    assert [cell.lr for cell in tuning_cells(cola, row, 0, lambda cell: None, 0)] == [2.5e-4, 5e-4]
    assert [cell.lr for cell in grid(Block((cola,), (row,)), (0, 1))] == [2.5e-4, 5e-4]
    assert best_lr(cola, Row("full", (1e-3,)), 0, lambda cell: None) == 2.5e-4
    chosen, _ = choose(QUALITY, Choice(tasks="cola", lrs="3e-3"))
    assert chosen.tasks[0].lr_factor == 1.0


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ExperimentError, match=r"unknown task 'rtee' \(did you mean 'rte'\?\).*cola"
    ):
        choose(GLUE, Choice(tasks="rtee"))
    with pytest.raises(ExperimentError, match=r"unknown method 'id4'.*known: id3.*static-d3"):
        choose(GLUE, Choice(methods="id4"))
    with pytest.raises(ExperimentError, match=r"--lrs: expected numbers.*'fast'"):
        choose(GLUE, Choice(lrs="fast"))
    with pytest.raises(ValueError, match="--budget"):
        choose(GLUE, Choice(budgets="many"))


def test_choices_narrow_and_change_the_preset():
    choice = Choice("mine", "rte, cola", "id3,static-d3", "100,1%", "1e-3", "1,2", 5, 8)
    chosen, left_out = choose(GLUE, choice)
    assert left_out == []
    assert chosen.model == "mine"
    assert [(task.name, task.steps, task.batch_size) for task in chosen.tasks] == [
        ("rte", 5, 8),
        ("cola", 5, 8),
    ]
    assert [row.label for row in chosen.rows] == [
        *("id3-100", "id3-1%", "static-d3-100", "static-d3-1%")
    ]
    assert {row.lrs for row in chosen.rows} == {(1e-3,)}
    assert chosen.seeds == (1, 2)


def test_the_table_names_a_model_that_is_not_the_papers():
    """Else the paper's figures would seem to be of the same model."""
    preset, _ = choose(GLUE, Choice(model=GLUE.model))
    assert (preset.title, preset.paper_note) == (GLUE.title, GLUE.paper_note)
    chosen, _ = choose(GLUE, Choice(model="models/mine"))
    text = markdown(chosen, [])
    assert "**GLUE, development sets; with mine**" in text
    assert "Its figures are those of microsoft/deberta-v3-base." in text


def test_lora_of_a_preset_can_be_put_elsewhere():
    chosen, _ = choose(MATH, Choice(methods="lora-r2,id3", adapter_targets="c_attn, c_fc"))
    targets = [row.settings.get("adapter_targets") for row in chosen.rows]
    assert targets == [("c_attn", "c_fc"), None, None]


def test_bottlenecks_run_without_peft(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert choose(ADAPTERS, Choice())[1] == []
    assert choose(MATH, Choice())[1] == [row.label for row in MATH.rows]


def test_a_preset_leaves_out_what_cannot_run_here_and_says_so(monkeypatch):
    monkeypatch.setattr(module, "METHODS", {"id3": METHODS["id3"], "full": METHODS["full"]})
    chosen, left_out = choose(NER, Choice())
    assert [row.label for row in chosen.rows] == ["id3-103K", "id3-320K", "full"]
    assert "fish-103K" in left_out
    with pytest.raises(ExperimentError, match="--methods: fish-103K cannot run here"):
        choose(NER, Choice(methods="fish"))


def invoke(*arguments: str):
    wide = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["experiment", *arguments], env=wide)


def test_help_shows_the_experiments_with_tasks_and_rows():
    shown = invoke("--help").output
    assert all(experiment.name in shown for experiment in EXPERIMENTS)
    shown = invoke("glue", "--help").output
    assert all(text in shown for text in ("deberta-v3-base", "cola", "id3-320K", "--max-minutes"))
    assert "With --shifted" not in shown
    assert "movies -> amazon" in invoke("quality", "--help").output


def tiny(folder, *more: str):
    if not (folder / "model").exists():
        save_encoder(folder / "model")
        write_classes(folder / "data" / "rte")
    common = ("--model", str(folder / "model"), "--data-folder", str(folder / "data"))
    common += ("--output", str(folder / "out"), "--budgets", "200", "--steps", "2", "--cpu")
    return invoke("glue", *common, "--methods", "id3,full", "--lrs", "1e-3,1e-2", *more)


def test_the_command_lists_runs_records_and_goes_on(tmp_path):
    listed = tiny(tmp_path, "--tasks", "rte", "--dry-run")
    assert "rte-id3-200-seed6-lr0.001" in listed.output
    summary, heading, first, *_ = listed.output.splitlines()
    assert summary.startswith(
        "4 cells, 0 finished, time left: unknown; 4 cells without an estimate"
    )
    assert heading == "Cells in order, with the estimated time of each:"
    assert first.endswith("time unknown")
    assert not (tmp_path / "out").exists()

    record = tmp_path / "record"
    first = tiny(tmp_path, "--tasks", "rte", "--threads", "1", "--record", str(record))
    assert first.exit_code == 0, first.output
    assert "4/4  rte-full-seed7-lr0.01: rte " in first.output
    assert f"Complete: {tmp_path}/out/table.md, {tmp_path}/out/pareto.png" in first.output
    assert "| id3 | 200 | " in (tmp_path / "out" / "table.md").read_text()
    assert "(n = 2)" in first.output
    (file,) = record.iterdir()
    assert file.name.startswith("glue-20")
    content = json.loads(file.read_text())
    assert [len(content["table"]), len(content["cells"])] == [2, 4]
    assert content["cells"][0]["machine"]["threads"] == 1

    again = tiny(tmp_path, "--tasks", "rte", "--threads", "1", "--dry-run")
    assert "4 cells, 4 finished, about 0 minutes left" in again.output


def test_a_plan_says_that_its_grids_may_grow(tmp_path):
    common = (
        "quality",
        "--tasks",
        "trec50",
        "--methods",
        "pafi",
        "--output",
        str(tmp_path / "out"),
    )
    more = "more cells follow where the best rate is at an end"
    grows = invoke(*common, "--dry-run")
    assert grows.exit_code == 0, grows.output
    assert more in grows.output.splitlines()[0]
    fixed = invoke(*common, "--lrs", "8e-3", "--dry-run")
    assert fixed.exit_code == 0, fixed.output
    assert more not in fixed.output


def test_processes_that_share_a_folder_leave_one_table(tmp_path):
    for task in ("rte", "cola"):
        assert tiny(tmp_path, "--tasks", task, "--only", "full").exit_code == 0
        if task == "rte":
            write_classes(tmp_path / "data" / "cola")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| method | budget | lr | cola | rte | average | entries |" in text
    (summary,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert summary["columns"].keys() == summary["lr"].keys() == {"rte", "cola"}


def test_errors_of_the_command_are_one_line(tmp_path):
    for arguments, message in (
        (("--tasks", "nothing"), "unknown task 'nothing'"),
        (("--tasks", "cola"), "data/cola is missing"),
    ):
        result = tiny(tmp_path, *arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output

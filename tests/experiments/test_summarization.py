"""The preset of summaries: what it takes from the paper, its columns, and its beams."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")

from rich.console import Console
from tiny_models import save_bart

from sparse_optim.experiments.launch import make_runner, show_plan
from sparse_optim.experiments.model_cache import ModelCache
from sparse_optim.experiments.overrides import Choice, choose
from sparse_optim.experiments.runner import Decoding, RunOptions
from sparse_optim.experiments.summarization import SHORT, SUMMARIZATION, measure_rouge
from sparse_optim.finetune.metrics import ROUGE
from sparse_optim.finetune.models import find_model, load_tokenizer
from sparse_optim.finetune.spec import ModelSpec


def test_the_preset_has_what_the_paper_says_of_generative_tasks():
    """Section 8.2 and Table 7a; full fine-tuning has the highest rate of footnote 3."""
    assert {task.epochs for task in SUMMARIZATION.tasks} == {3}
    assert {task.batch_size for task in SUMMARIZATION.tasks} == {4}
    assert (SUMMARIZATION.seeds, SUMMARIZATION.settings["d3_exp"]) == ((42,), 0.0)
    rates = {row.label: row.lrs for row in SUMMARIZATION.rows}
    assert rates.pop("full") == (3e-5,)
    assert rates == dict.fromkeys(("id3-320K", "pafi-320K", "r-mask-320K", "lora-r8"), (3e-4,))
    assert not SUMMARIZATION.paper  # it has no figures


def test_cells_have_the_three_values_and_the_beams_asked_for(tmp_path):
    assert tuple(SHORT) == ROUGE
    chosen, _ = choose(SUMMARIZATION, Choice(tasks="xsum", methods="id3"))
    console = Console(file=io.StringIO())
    for beams in (4, 2):
        options = RunOptions(tmp_path, decoding=Decoding(beams=beams))
        runner = make_runner(chosen, options, console)
        (cell,) = runner.wanted()
        config = runner.config(cell)
        assert (config.num_beams, config.max_target_length, config.max_length) == (beams, 128, 1024)
        assert (config.dataset, config.eval_split, config.eval_every) == ("xsum", "test", 10**9)
    assert runner.measure is measure_rouge
    final = {"rouge1": 0.4, "rouge2": 0.2, "rougeL": 0.3, "loss": 2.0}
    trained = SimpleNamespace(metrics={"final": final})
    values = measure_rouge(config, None, trained, cell.task, options)
    assert values == {"xsum R-1": 0.4, "xsum R-2": 0.2, "xsum R-L": 0.3}
    assert tuple(values) == chosen.columns
    show_plan(make_runner(SUMMARIZATION, options, console), console)
    assert "10 cells, 0 finished" in console.file.getvalue()


def test_a_kept_model_writes_as_each_cell_says(tmp_path):
    source = find_model(str(save_bart(tmp_path / "bart")))
    cache, tokenizer = ModelCache(), load_tokenizer(source)
    for beams, length in ((1, 8), (4, 20)):
        spec = ModelSpec(
            source.location, "summarization", num_beams=beams, max_target_length=length
        )
        found = cache(source, spec, tokenizer).model.generation_config
        assert (found.num_beams, found.max_length) == (beams, length + 1)

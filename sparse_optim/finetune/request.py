"""What a job asks of its data. It needs no torch: the command loads data before it imports it."""

from __future__ import annotations

from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import DataRequest


def data_request(config: FinetuneConfig) -> DataRequest:
    """The data settings of the configuration."""
    return DataRequest(
        dataset=config.dataset,
        config=config.dataset_config,
        task=config.task,
        columns=Columns(config.text_column, config.text_pair_column, config.label_column),
        train_split=config.train_split,
        eval_split=config.eval_split,
        eval_fraction=config.eval_fraction,
        max_train_examples=config.max_train_examples,
        max_eval_examples=config.max_eval_examples,
        chat=config.chat,
    )

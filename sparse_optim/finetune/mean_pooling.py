"""A classifier over the mean of BERT's last hidden states.

Sentence encoders such as MiniLM were trained with mean pooling: their first token, which
`BertForSequenceClassification` reads, holds little. It has a model type and a name of the head of
its own, so that no other class takes its weights for its own: `from_pretrained`, peft and
`apply_delta` raise an error or warn of missing weights instead of predicting at chance.

This file depends on transformers alone, because `save_pretrained` copies it beside the weights: the
saved folder loads anywhere with
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledBertConfig(BertConfig):
    """The configuration of BERT under another model type."""

    model_type = "mean-pooled-bert"


class MeanPooledBert(BertForSequenceClassification):
    """BERT, mean of the hidden states of real tokens, dropout, linear layer.

    logits = mean_classifier(sum(mask * hidden) / sum(mask))

    Parameter names are those of `BertForSequenceClassification`, less pooler and classifier.
    """

    config_class = MeanPooledBertConfig

    def __init__(self, config):  # type: ignore[no-untyped-def]  # as transformers calls it
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        del self.classifier
        self.mean_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Scores, and the loss where labels are given.

        Args:
            input_ids, attention_mask, token_type_ids: (batch, length), int64.
            labels: (batch,), int64 classes, or floats for regression; (batch, classes), 1.0 or
                0.0, for several labels an example.
        """
        encoded = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        hidden = encoded.last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.mean_classifier(self.dropout((mask * hidden).sum(1) / mask.sum(1)))
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            loss = functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None and self.config.problem_type == "multi_label_classification":
            loss = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


MeanPooledBertConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
MeanPooledBert.register_for_auto_class("AutoModelForSequenceClassification")  # type: ignore[no-untyped-call]

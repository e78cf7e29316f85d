"""Lightning: `configure_optimizers`, clipping, accumulation, and a run resumed in mid-unmasking."""

from __future__ import annotations

import copy
import math

import pytest

pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning, of the extra 'dev'")

import torch
from op_cases import assert_same_bits
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_optim import IncrementalMaskedAdamW, apply_delta, param_groups
from sparse_optim.integrations.lightning import SelectiveModuleMixin

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch, about Lightning
]
BUDGET, STEPS, LIMIT = 60, 6, 0.02


class Net(LightningModule):
    """A body that is ranked and a head that is trained whole."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)
        self.options = options
        self.rows = []

    def training_step(self, batch, _):
        return self.head(self.body(batch[0])).square().mean()

    def configure_optimizers(self):
        optimizer = IncrementalMaskedAdamW(
            param_groups(self, dense="head"), lr=0.05, budget=BUDGET, unmask_steps=1.0,
            total_steps=self.trainer.estimated_stepping_batches, model=self, **self.options,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_before_zero_grad(self, optimizer):
        self.log_dict({f"id3/{name}": float(n) for name, n in optimizer.metrics().items()})
        self.rows.append(optimizer.metrics()["active"])


class SelectiveNet(SelectiveModuleMixin, Net):
    pass


def batches(count):
    data = torch.randn(2 * count, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(data), batch_size=2)


def fit(net, checkpoint=None, accumulate=1, **given):
    """Train; return the trainer and our optimizer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_steps": STEPS, "accelerator": "cpu", "enable_checkpointing": False}
    trainer = Trainer(accumulate_grad_batches=accumulate, **quiet, **{**options, **given})
    trainer.fit(net, batches(STEPS * accumulate), ckpt_path=checkpoint)
    return trainer, trainer.optimizers[0]


def by_hand(accumulate=1, limit=None, **options):
    """The same steps in a plain loop, clipped outside to this limit."""
    net = Net(**options)
    net.trainer = Trainer(max_steps=STEPS, logger=False, accelerator="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "estimated_stepping_batches", STEPS)
        (optimizer,), (schedule,) = net.configure_optimizers()
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    for number, batch in enumerate(batches(STEPS * accumulate)):
        (net.training_step(batch, 0) / accumulate).backward()
        if number % accumulate == accumulate - 1:
            if limit is not None:
                nn.utils.clip_grad_norm_(trained, limit)
            optimizer.step()
            schedule["scheduler"].step()
            optimizer.zero_grad()
    return net


def same_bits(net, other):
    for got, value in zip(net.parameters(), other.parameters(), strict=True):
        assert_same_bits(got.detach(), value.detach())


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": LIMIT}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_steps_are_those_of_a_plain_loop(accumulate, options):
    net = Net(**options)
    base = copy.deepcopy(net)
    _, optimizer = fit(net, accumulate=accumulate)
    same_bits(net, by_hand(accumulate, **options))
    assert optimizer.metrics()["active"] == BUDGET
    moved = sum(
        int((was != is_now).sum())
        for was, is_now in zip(base.body.parameters(), net.body.parameters(), strict=True)
    )
    assert 0 < moved <= BUDGET
    apply_delta(base, optimizer.delta(net))
    same_bits(base, net)


def test_lightning_clips_outside_and_the_mixin_in_the_step():
    """Both clip once: as a plain loop with `clip_grad_norm_`, and as one with max_grad_norm."""
    outside, inside = Net(), SelectiveNet()
    fit(outside, gradient_clip_val=LIMIT)
    same_bits(outside, by_hand(limit=LIMIT))
    _, optimizer = fit(inside, gradient_clip_val=LIMIT)
    assert optimizer.max_grad_norm == LIMIT
    same_bits(inside, by_hand(max_grad_norm=LIMIT))


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [(None, None, None), (None, 0.5, 0.5), (0.1, 0.5, 0.1), (0.5, 0.1, 0.1), (0.3, 0.0, 0.3)],
)
def test_the_lower_limit_counts(own, given, expected):
    _, optimizer = fit(SelectiveNet(max_grad_norm=own), gradient_clip_val=given)
    assert optimizer.max_grad_norm == expected


@pytest.mark.parametrize(
    "options", [{"sampled_backward": True, "every": 2}, {"fuse_backward": True}]
)
def test_gradients_that_lightning_does_not_find_are_clipped(options):
    free = {**options, "max_grad_norm": math.inf}
    clipped, plain = SelectiveNet(**free), Net(**options, max_grad_norm=LIMIT)
    fit(clipped, gradient_clip_val=LIMIT)
    fit(plain)
    same_bits(clipped, plain)


def test_mixed_precision():
    """Lightning itself refuses to clip the gradients of an optimizer that unscales them."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Net(), precision="bf16-mixed", gradient_clip_val=LIMIT)
    net = SelectiveNet()
    base = copy.deepcopy(net)
    _, optimizer = fit(net, precision="bf16-mixed", gradient_clip_val=LIMIT)
    assert optimizer.max_grad_norm == LIMIT
    apply_delta(base, optimizer.delta(net))
    same_bits(base, net)


def test_clipping_by_value_is_refused_and_other_optimizers_are_lightnings():
    with pytest.raises(ValueError, match="clips the global norm of gradients"):
        fit(SelectiveNet(), gradient_clip_val=LIMIT, gradient_clip_algorithm="value")

    class Dense(SelectiveNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_before_zero_grad(self, optimizer):
            pass

    dense = Dense()
    before = copy.deepcopy(dense)
    fit(dense, gradient_clip_val=1e-6, max_steps=1)
    for was, is_now in zip(before.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(was, is_now, rtol=0, atol=2e-6)


class StepNet(SelectiveNet):
    """Data of the step: a resumed Lightning run does not find its place in the loader."""

    def training_step(self, batch, _):
        generator = torch.Generator().manual_seed(self.global_step)
        return super().training_step([torch.randn(2, 8, generator=generator)], 0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_run_resumed_in_mid_unmasking_is_the_run(tmp_path):
    straight, resumed = StepNet(), StepNet()
    base = copy.deepcopy(resumed)

    def saving(net, **given):
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        given |= {"callbacks": [every], "enable_checkpointing": True, "gradient_clip_val": LIMIT}
        return fit(net, **given)

    trainer, _ = saving(straight)
    assert straight.rows[1:] == [BUDGET * step // STEPS for step in range(1, STEPS)]
    assert trainer.callback_metrics["id3/active"] == straight.rows[-1]
    _, optimizer = saving(resumed, checkpoint=tmp_path / "step=3.ckpt")
    assert resumed.rows == straight.rows[3:]
    same_bits(straight, resumed)
    apply_delta(base, optimizer.delta(resumed))
    same_bits(base, straight)

"""Frozen signs stay, whatever the optimizer does: each one of torch's, and some that move all that they hold."""

import pytest
import pytorch_lightning as pl
import torch
import two_stage
from fit_two_stage import fit
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from two_stage import SmallModule

import pibinn_plugin as pb
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.workflow import quantized_weights


class ZeroGradients(torch.optim.SGD):
    """Gives who has no gradient one of zero, as Muon was published; then momentum and weight decay move it."""

    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        super().step()
        return loss


class MovesByData(torch.optim.Adam):
    """Moves all that it holds by ``.data``, which leaves no trace in a tensor's version."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(0.1)
        return loss


class FlatHistory(torch.optim.Optimizer):
    """One history of all parameters as one vector, along which all are moved (L-BFGS, schedule-free averages)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.direction = None

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        self.direction = flat if self.direction is None else 0.9 * self.direction + flat
        for parameter, part in zip(parameters, self.direction.split([p.numel() for p in parameters]), strict=True):
            parameter.sub_(self.param_groups[0]["lr"] * part.view_as(parameter))
        return loss


MISBEHAVING = [ZeroGradients, MovesByData, FlatHistory]
OF_TORCH = [
    optimizer
    for optimizer in vars(torch.optim).values()
    if isinstance(optimizer, type)
    and issubclass(optimizer, torch.optim.Optimizer)
    # SparseAdam takes sparse gradients only, and no layer here has them.
    and optimizer not in (torch.optim.Optimizer, torch.optim.SparseAdam)
]


class OptimizedModule(SmallModule):
    """Trained by a given optimizer, in manual optimization where that takes matrices only."""

    def __init__(self, optimizer, rate, others):
        super().__init__()
        self.optimizer_class, self.rate, self.others = optimizer, rate, others
        self.automatic_optimization = optimizer is not torch.optim.Muon

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        return two_stage.ManualModule.training_step(self, batch, batch_idx)

    def configure_optimizers(self):
        if self.optimizer_class is torch.optim.Muon:
            matrices = [parameter for parameter in self.parameters() if parameter.dim() == 2]
            rest = [parameter for parameter in self.parameters() if parameter.dim() != 2]
            return [torch.optim.Muon(matrices, lr=self.rate, **self.others), torch.optim.Adam(rest, lr=self.rate)]
        return self.optimizer_class(self.parameters(), lr=self.rate, **self.others)


class Signs(pl.Callback):
    """What the weights and their bits are after each step of stage 2, and the latents after each epoch."""

    def __init__(self):
        self.weights, self.bits, self.latents = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if all(weight.is_frozen for weight in quantized_weights(pl_module)):
            self.bits.append([weight.packed.bits for weight in quantized_weights(pl_module)])
            self.weights.append([weight.module.weight.detach().sign() for weight in quantized_weights(pl_module)])

    def on_train_epoch_end(self, trainer, pl_module):
        if self.bits:
            held = quantized_weights(pl_module)
            self.latents.append([weight.quantizer.structural(weight.latent) >= 0 for weight in held])


def all_equal(lists):
    return len(lists) > 1 and all(
        torch.equal(first, other) for each in lists for first, other in zip(lists[0], each, strict=True)
    )


@pytest.mark.filterwarnings("ignore:The `torch.optim.Optimizer.step` method:UserWarning")
@pytest.mark.parametrize("optimizer", OF_TORCH + MISBEHAVING, ids=lambda optimizer: optimizer.__name__)
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    rate=st.floats(1e-3, 0.1),
    decay=st.floats(0, 0.9),
    starts=st.sampled_from([(2, 4), (0, 0.5), (0.25, 0.3), (0, 0)]),
)
def test_frozen_signs_stay(optimizer, scheme, rate, decay, starts):
    takes_decay = "weight_decay" in optimizer.__init__.__code__.co_varnames
    module = OptimizedModule(optimizer, rate, {"weight_decay": decay} if takes_decay else {})
    before, after = Signs(), Signs()  # what a callback listed before and one listed after sees
    arguments = {"max_steps": 24} if not module.automatic_optimization else {}
    diary = fit(module, before, two_stage.callback(scheme, *starts), after, **arguments)
    assert diary.stages[-1] == "scale"
    assert all_equal(before.weights)
    assert all_equal(after.weights)
    assert all_equal(before.bits + after.bits)
    assert all_equal(after.latents)
    packed = pb.convert(module)
    for mine, kept in zip(pb.weights.packed_weights(packed), after.bits[-1], strict=True):
        assert torch.equal(mine.packed.bits, kept)


class LatentsOfEachStep(pl.Callback):
    """The signs of the latents, as a callback after `TwoStageQAT` finds them."""

    def __init__(self):
        self.signs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch >= 4:
            held = quantized_weights(pl_module)
            self.signs.append([weight.quantizer.structural(weight.latent) >= 0 for weight in held])


@pytest.mark.parametrize("optimizer", [ZeroGradients, FlatHistory], ids=lambda optimizer: optimizer.__name__)
def test_latents_show_the_frozen_signs_after_each_step(optimizer):
    """Of optimizers that would flip them, see below."""
    others = {"momentum": 0.95, "weight_decay": 0.5} if optimizer is ZeroGradients else {}
    module = OptimizedModule(optimizer, 0.05 if optimizer is FlatHistory else 0.3, others)
    diary = LatentsOfEachStep()
    fit(module, two_stage.callback("native", 0, 4), diary)
    assert all_equal(diary.signs)


class FreezesByFlag(pl.Callback):
    """What freezing was: latents that need no gradient, which such optimizers do not ask."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 4:
            for weight in quantized_weights(pl_module):
                weight.latent.requires_grad_(False)
                weight.latent.grad = None


@pytest.mark.parametrize("optimizer", MISBEHAVING, ids=lambda optimizer: optimizer.__name__)
def test_these_optimizers_would_flip_them(optimizer):
    module = OptimizedModule(
        optimizer,
        {FlatHistory: 0.05}.get(optimizer, 0.3),
        {"momentum": 0.95, "weight_decay": 0.5} if optimizer is ZeroGradients else {},
    )
    states = fit(module, pb.TwoStageQAT(two_stage.TARGETS, scale_stage_start=1.0), FreezesByFlag()).states
    assert any(((states[3][name] >= 0) != (states[5][name] >= 0)).any() for name in two_stage.TARGETS)

"""What scripts do that nobody has thought of here: other libraries' layers, unusual loops, copies, several Trainers."""

import copy
import pickle
import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, ModelPruning, ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toy import LateToy, Toy, assert_same, make, trainer, weights

from lightning_quartet import (
    QuartetConfig,
    QuartetLinear,
    QuartetPrecision,
    QuartetQAT,
    convert_to_quartet,
    pack_quartet,
    revert_from_quartet,
    set_quartet_step,
)


def fit(model: pl.LightningModule, *callbacks: pl.Callback, **options) -> pl.Trainer:
    options = {"limit_train_batches": 4, "limit_val_batches": 1} | options
    t = trainer(callbacks=list(callbacks) or [QuartetQAT()], **options)
    t.fit(model)
    return t


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


def converted() -> nn.Sequential:
    model = two_layers()
    convert_to_quartet(model)
    set_quartet_step(model, 0)
    return model


class Around(Toy):
    """A training around any module of 32 features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(dropout=0.0)
        self.net = net


# Layers that are not quite nn.Linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_layers_stay_as_they_are(wrap):
    model = Around(nn.Sequential(wrap(nn.Linear(32, 32)), nn.Linear(32, 32)))
    report = convert_to_quartet(model)
    assert report.converted == ("net.1",)
    assert "ParametrizedLinear" in report.skipped["net.0"]
    fit(model)
    assert type(model.net[0]).__name__ == "ParametrizedLinear"


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes_are_quantised_anew(wrap):
    """Also under accumulation, where weights' projections are kept."""
    model = Around(nn.Sequential(wrap(nn.Linear(32, 32)), nn.Linear(32, 32)))
    before = weights(model)
    fit(model, accumulate_grad_batches=2)
    assert isinstance(model.net[0], QuartetLinear)
    assert not torch.equal(before["net.1.weight"], model.net[1].weight)
    (name,) = (n for n in before if n in ("net.0.weight_g", "net.0.weight_orig"))
    assert not torch.equal(before[name], weights(model)[name])
    layer, x = model.net[0].eval(), torch.randn(4, 32)
    assert torch.equal(layer(x), layer(x))


def test_pruned_layers_keep_their_zeros():
    model = Around(two_layers())
    prune.l1_unstructured(model.net[0], "weight", 0.5)
    fit(model, accumulate_grad_batches=2)
    assert (model.net[0].weight == 0).float().mean() == 0.5
    with pytest.raises(ValueError, match=r"prune\.remove"):
        pack_quartet(model)
    prune.remove(model.net[0], "weight")
    fit(model)
    assert pack_quartet(model) == 2


@pytest.mark.parametrize("pruning_first", [False, True])
def test_pruning_callback(pruning_first):
    callbacks = [QuartetQAT(), ModelPruning("l1_unstructured", amount=0.5)]
    model = Around(two_layers())
    fit(model, *callbacks[:: -1 if pruning_first else 1])
    assert isinstance(model.net[0], QuartetLinear)
    assert (model.net[0].weight == 0).any()


def test_computed_weights_are_not_packed():
    model = Around(two_layers())
    prune.l1_unstructured(model.net[0], "weight", 0.5)
    report = convert_to_quartet(model, config=QuartetConfig(store_master_weights=False))
    assert report.converted == ("net.1",)
    assert "computed from other parameters" in report.skipped["net.0"]


def test_parametrisations_made_later_must_go_before_the_conversion_is_undone():
    model = converted()
    parametrizations.weight_norm(model[0])
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(ValueError, match="ParametrizedQuartetLinear"):
        revert_from_quartet(model)
    assert isinstance(model[1], QuartetLinear)  # nothing was reverted
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert revert_from_quartet(model) == 2


def test_lazy_layers_are_converted_once_they_have_a_size():
    model = nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 32))
    assert "first forward" in convert_to_quartet(model).skipped["0"]
    model(torch.randn(4, 32))
    assert convert_to_quartet(model).converted == ("0",)


def test_other_kinds_of_linear_layers_are_left_alone():
    model = nn.ModuleDict(
        {
            "bilinear": nn.Bilinear(32, 32, 32),
            "quantised": torch.ao.nn.quantized.Linear(32, 32),
            "qat": torch.ao.nn.qat.Linear(32, 32, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
            "linear": nn.Linear(32, 32),
        }
    )
    report = convert_to_quartet(model)
    assert report.converted == ("linear",)
    assert set(report.skipped) == {"qat"}


def test_fused_path_of_layers_that_were_converted_one_by_one():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True).eval()
    convert_to_quartet(layer.linear1)
    convert_to_quartet(layer.linear2)
    assert convert_to_quartet(layer).converted == ()  # nothing new, but the layer is seen now
    x = torch.randn(2, 4, 32)
    with torch.no_grad():
        evaluated = layer(x)
    torch.testing.assert_close(evaluated, layer(x), rtol=1e-5, atol=1e-5)


# Loops ---------------------------------------------------------------------------------------------------------------


class Manual(Toy):
    """Two optimizers; several backwards before each step, each with the other's parameters switched off."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            for part in batch.chunk(2):
                self.notes.append((self.global_step, self.net[0].quartet_enabled, self.net[0]._quartet_seed.tolist()))
                loss = self.loss(part) / 2
                self.losses.append(loss.item())
                self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), 0.01), torch.optim.SGD(self.head.parameters(), 0.01)]


def test_manual_optimization_draws_other_bits_for_each_backward():
    by_callback, by_plugin = make(Manual), make(Manual)
    fit(by_callback)
    trainer(plugins=[QuartetPrecision("32-true")], limit_train_batches=4, limit_val_batches=1).fit(by_plugin)
    assert len({tuple(seed) for _, _, seed in by_callback.notes}) == len(by_callback.notes) == 16
    assert [seed[1] for _, _, seed in by_callback.notes] == [step for step in range(8) for _ in range(2)]
    assert_same(by_callback.notes, by_plugin.notes)
    assert_same(by_callback.losses, by_plugin.losses)
    assert_same(weights(by_callback), weights(by_plugin))


def test_manual_optimization_switches_at_the_exact_step():
    model = make(Manual)
    fit(model, QuartetQAT(start_step=3, end_step=6))
    assert all(enabled == (3 <= step < 6) for step, enabled, _ in model.notes)
    assert {enabled for _, enabled, _ in model.notes} == {False, True}


@pytest.mark.parametrize("kind", ["callback", "plugin"])
def test_manual_optimization_resumes_exactly(tmp_path, kind):
    def parts() -> dict:
        recipe = "quartet_stochastic"
        if kind == "callback":
            return {"callbacks": [QuartetQAT(recipe)]}
        return {"plugins": [QuartetPrecision("32-true", recipe)]}

    whole, first, second = make(Manual), make(Manual), make(Manual)
    trainer(max_epochs=2, limit_train_batches=4, **parts()).fit(whole)
    t = trainer(max_epochs=1, limit_train_batches=4, **parts())
    t.fit(first)
    t.save_checkpoint(tmp_path / "a.ckpt")
    trainer(max_epochs=2, limit_train_batches=4, **parts()).fit(second, ckpt_path=tmp_path / "a.ckpt")
    assert_same(whole.notes, first.notes + second.notes)
    assert_same(whole.losses, first.losses + second.losses)
    assert_same(weights(whole), weights(second))


def test_accumulation_that_changes_between_epochs():
    model = make()
    fit(model, QuartetQAT(), GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=2)
    expected = [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [4, 1], [5, 0], [5, 1]]
    assert [seed[1:] for _, _, seed in model.notes] == expected


def test_lbfgs_evaluates_a_step_with_one_set_of_bits():
    class Newton(Toy):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)

    model = make(Newton, dropout=0.0)
    fit(model)
    assert len(model.notes) > 4
    assert all(seed[1:] == [step, 0] for step, _, seed in model.notes)
    assert torch.isfinite(torch.tensor(model.losses)).all()


def test_layers_frozen_and_thawed_on_the_way():
    class Backbone(Toy):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.backbone = self.net
            self.states = []

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)

        def on_train_epoch_end(self):
            self.states.append(weights(self.net))

    model = make(Backbone)
    before = weights(model.net)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    fit(model, QuartetQAT(), thaw, max_epochs=2, accumulate_grad_batches=2)
    assert torch.equal(before["0.weight"], model.states[0]["0.weight"])
    assert not torch.equal(before["0.weight"], model.states[1]["0.weight"])


def test_modules_inside_modules():
    class Outer(Toy):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.inner = Toy(dropout=0.0)

        def loss(self, batch):
            return super().loss(batch) + self.inner.loss(batch)

    model = make(Outer)
    fit(model)
    layers = [m for m in model.modules() if isinstance(m, QuartetLinear)]
    assert [layer._quartet_seed.tolist() for layer in layers] == [[i << 32, 3, 0] for i in range(4)]


@pytest.mark.parametrize("precision", ["64-true", "16-true"])
def test_other_precisions_of_the_trainer(precision):
    class Descent(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-2)  # Adam's eps is zero in float16

    model = make(Descent, dropout=0.0)
    fit(model, precision=precision, max_epochs=3)
    assert model.net[0].weight.dtype == {"64-true": torch.float64, "16-true": torch.float16}[precision]
    assert isinstance(model.net[0], QuartetLinear)
    assert model.losses[-4] < model.losses[0]


def test_evaluation_without_inference_mode():
    results = []
    for inference_mode in (True, False):
        model = make()
        t = trainer(callbacks=[QuartetQAT()], inference_mode=inference_mode)
        t.fit(model)
        results.append((t.validate(model, verbose=False), t.predict(model)))
    assert_same(*results)


def test_finders_of_the_tuner_leave_a_fit_as_it_would_be(tmp_path):
    expected = make(dropout=0.0)
    fit(expected, limit_train_batches=None)
    model = make(dropout=0.0)
    t = trainer(callbacks=[QuartetQAT()], default_root_dir=tmp_path, limit_val_batches=1)
    Tuner(t).lr_find(model, num_training=5, update_attr=False)
    model.notes.clear()
    model.losses.clear()
    t.fit(model)
    assert_same(model.notes, expected.notes)
    assert_same(model.losses, expected.losses)


# Copies, and several Trainers ----------------------------------------------------------------------------------------


def test_a_trainer_inside_a_training_disturbs_nothing():
    class Outer(Toy):
        def on_train_epoch_end(self):
            fit(make(dropout=0.0), accumulate_grad_batches=2)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 0:  # in the middle of an accumulation
                fit(make(dropout=0.0), accumulate_grad_batches=2)

    model, expected = make(Outer, dropout=0.0), make(dropout=0.0)
    for each in (model, expected):
        fit(each, accumulate_grad_batches=2, max_epochs=2)
    assert_same(model.notes, expected.notes)
    assert_same(model.losses, expected.losses)
    assert_same(weights(model), weights(expected))


def test_trainers_in_threads():
    start = weights(make(dropout=0.0))

    def run(seed: int) -> list[float]:
        model = Toy(dropout=0.0)
        model.load_state_dict(start)
        fit(model, QuartetQAT(QuartetConfig(seed=seed)), accumulate_grad_batches=2, limit_val_batches=0)
        return model.losses

    expected = [run(seed) for seed in range(4)]
    results: dict[int, list[float]] = {}
    threads = [threading.Thread(target=lambda s=seed: results.__setitem__(s, run(s))) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[seed] for seed in range(4)] == expected


def test_one_trainer_for_several_models():
    t = trainer(callbacks=[QuartetQAT()], limit_train_batches=4)
    one, two, expected = make(dropout=0.0), make(dropout=0.0), make(dropout=0.0)
    t.fit(one)
    assert torch.isfinite(torch.tensor(t.test(two, verbose=False)[0]["test_loss"]))
    assert isinstance(two.net[0], QuartetLinear)
    t.fit_loop.max_epochs = 2
    t.fit(two)
    fit(expected, max_epochs=1)
    assert one.losses == expected.losses


def test_a_callback_keeps_no_model_and_is_copied_alone():
    callback, model = QuartetQAT("quartet_stochastic"), make()
    t = fit(model, callback)
    assert callback._converted == []
    callback.log = None  # Lightning puts the module's there
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback)), copy.deepcopy(t).callbacks[0]):
        assert other.config == callback.config
        expected, again = make(dropout=0.0), make(dropout=0.0)
        fit(expected, QuartetQAT("quartet_stochastic"))
        fit(again, other)
        assert_same(weights(expected), weights(again))


def test_a_copy_made_while_training_builds_its_own_layers():
    class Copying(LateToy):
        def on_train_start(self):
            self.__dict__["clone"] = copy.deepcopy(self)

    model = make(Copying, dropout=0.0)
    fit(model)
    clone, layers = model.clone, model.net
    assert "configure_model" not in clone.__dict__
    clone.net = None
    fit(clone)
    assert isinstance(clone.net[0], QuartetLinear)
    assert model.net is layers


# Tools that look at a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "config"),
    [
        *((device, QuartetConfig(backward_dtype=dtype)) for device in ("cpu", "meta") for dtype in ("mxfp4", "bf16")),
        ("cpu", QuartetConfig(backend="triton")),
    ],
    ids=str,
)
def test_products_count_as_operations(device, config):
    model = two_layers().to(device)
    x = torch.randn(32, 32, device=device)

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    expected = count()
    convert_to_quartet(model, config=config)
    set_quartet_step(model, 0)
    assert count() == expected == 5 * 2 * 32**3  # no gradient of the input


def test_operations_of_packed_layers_count_too():
    model = converted()
    pack_quartet(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(2, 32))
    assert counter.get_total_flops() == 2 * 2 * 2 * 32**2


def test_lightning_measures_throughput_and_summarises():
    with torch.device("meta"):
        model = two_layers()
        x = torch.randn(32, 32)
    expected = measure_flops(model, lambda: model(x), lambda y: y.sum())
    convert_to_quartet(model)
    set_quartet_step(model, 0)
    assert measure_flops(model, lambda: model(x), lambda y: y.sum()) == expected

    class Seen(ModelSummary):
        @staticmethod
        def summarize(summary_data, total_parameters, *rest, **options):
            Seen.table = dict(summary_data)

    module = make()
    module.example_input_array = torch.randn(32, 32)
    fit(module, QuartetQAT(), Seen(max_depth=2))
    assert "QuartetLinear" in Seen.table["Type"]


def test_graphs_and_exports(tmp_path):
    module = make()
    module.example_input_array = torch.randn(4, 32)
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    fit(module, QuartetQAT(), logger=logger, limit_train_batches=1)
    model, x = module.net.eval(), torch.randn(6, 32)
    traced = torch.jit.trace(model, torch.randn(4, 32))
    assert torch.equal(traced(x), model(x))
    exported = torch.export.export(model, (torch.randn(4, 32),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert torch.equal(exported.module()(x), model(x))


# Autograd ------------------------------------------------------------------------------------------------------------


def test_a_gradient_penalty_is_refused_and_not_dropped():
    """Where what arrives from above is a constant, torch's once_differentiable would give constants without a word."""
    model, x = converted(), torch.randn(4, 32, requires_grad=True)
    output = model(x)
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (output.sum() + gradient.square().sum()).backward()
    model = nn.Sequential(*two_layers(), nn.Tanh(), nn.Linear(32, 1))
    convert_to_quartet(model)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.norm().backward()


def test_a_graph_that_is_made_and_not_used_changes_nothing():
    gradients = []
    for options in ({}, {"create_graph": True}, {"retain_graph": True}):
        model, x = converted(), torch.ones(4, 32)
        model(x).sum().backward(**options)
        gradients.append([p.grad.detach().clone() for p in model.parameters()])
    assert_same(gradients[0], gradients[1])
    assert_same(gradients[0], gradients[2])


def test_parameters_given_to_a_call():
    model, x = converted(), torch.randn(4, 32)
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, given, x).sum().backward()
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(given[name].grad, parameter.grad)


def test_hooks_on_layers_run():
    model, plain, seen = converted(), converted(), []
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append((inputs[0], outputs[0])))
    model[0].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] / 2,))
    x = torch.randn(4, 32)
    model(x).sum().backward()
    ((inner, outer),) = seen
    assert inner.shape == outer.shape == (4, 32)
    plain[1](plain[0](x) * 2).sum().backward()
    assert torch.equal(model[1].weight.grad, plain[1].weight.grad)
    # Signs are drawn and scales are powers of two: half the gradient gives half the codes' values, bit for bit.
    assert torch.equal(model[0].weight.grad * 1, plain[0].weight.grad / 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside_checkpoints(reentrant):
    def nested(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        inner = lambda y: checkpoint(model[1], y, use_reentrant=reentrant)  # noqa: E731
        return checkpoint(lambda y: inner(model[0](y)), x, use_reentrant=reentrant)

    plain, model = converted(), converted()
    x = torch.randn(4, 32, requires_grad=True)
    plain(x).square().sum().backward()
    nested(model, x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_layer_used_twice_in_one_forward():
    class Twice(Toy):
        def forward(self, x):
            return self.net(self.net(x))

    runs = [make(Twice, dropout=0.0) for _ in range(2)]
    for model in runs:
        fit(model, accumulate_grad_batches=2)
    assert_same(weights(runs[0]), weights(runs[1]))
    assert all(torch.isfinite(torch.tensor(loss)) for loss in runs[0].losses)

"""QuartetQAT in real Trainers: what it does when, next to every Trainer feature."""

import copy
import functools
import logging
import math
import signal
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from toy import LateToy, Toy, assert_same, loader, make, trainer, weights

import lightning_quartet.callbacks.qat as qat
from lightning_quartet import (
    QuartetConfig,
    QuartetLinear,
    QuartetPrecision,
    QuartetQAT,
    convert_to_quartet,
    revert_from_quartet,
)
from quartet_kernels import RECIPES


def quartet_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuartetLinear)]


def fit(model: pl.LightningModule, callback: QuartetQAT | None = None, **options) -> pl.Trainer:
    callbacks = [callback or QuartetQAT(), *options.pop("callbacks", [])]
    t = trainer(callbacks=callbacks, **options)
    torch.manual_seed(2)  # of dropout
    t.fit(model)
    return t


# Conversion in the order of Lightning's calls ------------------------------------------------------------------------


def test_layers_are_converted_before_optimizers_and_trained(caplog):
    class Watching(Toy):
        def configure_optimizers(self):
            self.seen = quartet_names(self)
            return super().configure_optimizers()

    model = make(Watching)
    before, parameters = weights(model), list(model.parameters())
    with caplog.at_level(logging.INFO):
        t = fit(model)
    assert model.seen == ["net.0", "net.3"]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum("linear layers in MXFP4" in record.message for record in caplog.records) == 1
    assert type(t.precision_plugin).__name__ == "Precision"  # as it was


@pytest.mark.parametrize("other_first", [False, True])
def test_layers_of_configure_model(other_first):
    model = make(LateToy)
    callbacks = [QuartetQAT()]
    averaging = WeightAveraging()  # calls configure_model itself
    callbacks.insert(0 if other_first else 1, averaging)
    trainer(callbacks=callbacks).fit(model)
    assert quartet_names(model) == ["net.0", "net.2"]
    assert "configure_model" not in model.__dict__


def test_layers_made_in_the_modules_setup():
    class SetupToy(LateToy):
        configure_model = pl.LightningModule.configure_model

        def setup(self, stage: str) -> None:
            LateToy.configure_model(self)

    model = make(SetupToy)
    fit(model)
    assert quartet_names(model) == ["net.0", "net.2"]
    assert len({tuple(seed) for _, _, seed in model.notes}) == 10


def test_checkpoint_of_a_model_with_late_layers_resumes(tmp_path):
    t = fit(make(LateToy))
    t.save_checkpoint(tmp_path / "a.ckpt")
    model = make(LateToy)
    t = trainer(callbacks=[QuartetQAT()], max_epochs=2)
    t.fit(model, ckpt_path=tmp_path / "a.ckpt")
    assert [step for step, _, _ in model.notes] == list(range(10, 20))


def test_fit_twice_validate_before_test_and_predict_after():
    model = make()
    callback = QuartetQAT()
    t = trainer(callbacks=[callback], max_epochs=1)
    t.validate(model, verbose=False)
    assert quartet_names(model) == ["net.0", "net.3"]
    t.fit(model)
    t.fit_loop.max_epochs = 2
    t.fit(model)
    assert [note[2][1:] for note in model.notes] == [[step, 0] for step in range(20)]
    expected = t.validate(model, verbose=False)[0]["val_loss"]
    assert t.test(model, verbose=False)[0]["test_loss"] == expected
    assert t.predict(model)[0].shape == (4, 32)
    assert quartet_names(model) == ["net.0", "net.3"]
    plain = make()
    plain.load_state_dict(model.state_dict())
    assert trainer().validate(plain, verbose=False)[0]["val_loss"] != expected


def test_revert_on_end_gives_back_plain_layers():
    model = make()
    convert_to_quartet(model.net[3])  # by the user, before
    fit(model, QuartetQAT(revert_on_end=True))
    assert quartet_names(model) == ["net.3"]
    assert type(model.net[0]) is nn.Linear


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("phase", [{"start_step": 3}, {"end_step": 3}, {}], ids=str)
def test_float32_masters_go_with_phases_and_are_cast_back_when_reverted(phase, packed, precision):
    model = make()
    config = QuartetConfig(store_master_weights=not packed)
    t = fit(model, QuartetQAT(config, master_dtype="float32", revert_on_end=True, **phase), precision=precision)
    assert t.global_step == 10
    assert all(map(math.isfinite, model.losses))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(torch.randn(4, 32, dtype=dtype)).dtype == dtype


def test_what_ended_a_run_is_raised_where_its_layers_cannot_be_reverted():
    class Failing(Toy):
        def training_step(self, batch, batch_idx):
            nn.utils.parametrize.register_parametrization(self.net[0], "bias", nn.Identity())
            raise ArithmeticError("mine")

    with pytest.warns(UserWarning, match="could not revert the layers"), pytest.raises(ArithmeticError, match="mine"):
        fit(make(Failing), QuartetQAT(revert_on_end=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, "Ctrl-C"])
@pytest.mark.parametrize("revert", [False, True])
@pytest.mark.parametrize("model_class", [Toy, LateToy])
def test_exception_in_the_middle_leaves_a_usable_model(error, revert, model_class):
    class Failing(model_class):
        fail = True

        def training_step(self, batch, batch_idx):
            if self.fail and batch_idx == 3:
                if error == "Ctrl-C":
                    signal.raise_signal(signal.SIGINT)
                raise error("stop")
            return super().training_step(batch, batch_idx)

    model = make(Failing)
    t = trainer(callbacks=[QuartetQAT(revert_on_end=revert)])
    with pytest.raises(RuntimeError if error is RuntimeError else SystemExit):
        t.fit(model)
    assert "configure_model" not in model.__dict__
    assert type(t.strategy.precision_plugin) is pl.plugins.precision.Precision
    assert bool(quartet_names(model)) != revert
    model.fail = False
    assert torch.isfinite(model(torch.randn(4, 32))).all()
    fit(model)
    assert len(model.losses) == 13


def test_exception_in_another_callbacks_setup_undoes_everything():
    class Bad(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("bad")

    model = make(LateToy)
    t = trainer(callbacks=[QuartetQAT(revert_on_end=True), Bad()])
    with pytest.raises(RuntimeError, match="bad"):
        t.fit(model)
    assert type(t.strategy.precision_plugin) is pl.plugins.precision.Precision
    assert "configure_model" not in model.__dict__


# Steps ---------------------------------------------------------------------------------------------------------------


def test_step_and_micro_batch_under_accumulation():
    model = make()
    fit(model, accumulate_grad_batches=4, max_epochs=2)
    # An epoch of 10 batches: 4, 4, and 2 with the step that ends an epoch.
    expected = [[s, m] for s in range(6) for m in range(4 if s % 3 < 2 else 2)]
    assert [note[2][1:] for note in model.notes] == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_start_and_end_step_are_exact(accumulate):
    model = make(batches=10)
    fit(model, QuartetQAT(start_step=2, end_step=4), accumulate_grad_batches=accumulate)
    assert len(model.notes) == 10
    for step, enabled, _ in model.notes:
        assert enabled == (2 <= step < 4)
    assert {enabled for _, enabled, _ in model.notes} == {True, False}


def test_start_step_after_a_resume_and_in_evaluation(tmp_path):
    t = fit(make(), QuartetQAT(start_step=15))
    t.save_checkpoint(tmp_path / "a.ckpt")
    model = make()
    t = trainer(callbacks=[QuartetQAT(start_step=15)], max_epochs=2)
    t.fit(model, ckpt_path=tmp_path / "a.ckpt")
    assert [enabled for _, enabled, _ in model.notes] == [False] * 5 + [True] * 5
    t.save_checkpoint(tmp_path / "b.ckpt")
    for name, enabled in (("a", False), ("b", True)):
        model = make()
        trainer(callbacks=[QuartetQAT(start_step=15)]).test(model, ckpt_path=tmp_path / f"{name}.ckpt", verbose=False)
        assert model.net[0].quartet_enabled == enabled


@pytest.mark.parametrize("save_at", [5, 6, 7])
def test_phases_are_exact_under_accumulation_and_after_a_resume(tmp_path, save_at):
    """Batches 0 to 11, two to a step, MXFP4 from step 2 (batch 4) to step 4 (batch 8); a checkpoint in between."""

    class Saving(Toy):
        def train_dataloader(self):  # one batch again and again: Lightning resumes an epoch from its first batch
            return DataLoader(next(iter(loader(1, 0))).repeat(12, 1), batch_size=4)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == save_at - 1 and not (tmp_path / "a.ckpt").exists():
                self.trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(**options) -> Toy:
        model = make(Saving, dropout=0.0)
        callback = QuartetQAT("quartet_stochastic", start_step=2, end_step=4)
        trainer(callbacks=[callback], accumulate_grad_batches=2, limit_val_batches=0).fit(model, **options)
        return model

    whole = run()
    assert [(step, enabled) for step, enabled, _ in whole.notes] == [(b // 2, 4 <= b < 8) for b in range(12)]
    resumed = run(ckpt_path=tmp_path / "a.ckpt")
    assert_same(resumed.notes, whole.notes[save_at:])
    if save_at % 2 == 0:  # Lightning saves no gradients: a checkpoint inside an accumulation loses what was added up
        assert_same(resumed.losses, whole.losses[save_at:])
        assert_same(weights(resumed), weights(whole))


def test_plain_phase_equals_a_plain_run():
    plain, model = make(), make()
    torch.manual_seed(2)
    trainer().fit(plain)
    fit(model, QuartetQAT(start_step=1000))
    assert_same(plain.losses, model.losses)
    assert_same(weights(plain), weights(model))


def test_manual_optimization_with_two_optimizers():
    class Manual(Toy):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.notes.append((self.global_step, True, self.net[0]._quartet_seed.tolist()))
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), 0.01), torch.optim.SGD(self.head.parameters(), 0.01)]

    model = make(Manual)
    t = fit(model)
    assert t.global_step == 20
    assert len({tuple(seed) for _, _, seed in model.notes}) == 20  # no two backwards share random bits


def test_random_streams_of_the_user_do_not_move():
    states = []
    for callbacks in ([], [QuartetQAT("quartet_stochastic")]):
        model = make()
        trainer(callbacks=callbacks).fit(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("recipe", ["quartet", "quartet_stochastic"])
def test_same_seed_same_run_and_another_seed_another(recipe):
    runs = []
    for seed in (1, 1, 2):
        model = make()
        fit(model, QuartetQAT(QuartetConfig.from_recipe(recipe, seed=seed)))
        runs.append(weights(model))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["net.0.weight"], runs[2]["net.0.weight"])


# Training features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0},
        {"overfit_batches": 2, "max_epochs": 3},
        {"fast_dev_run": True},
        {"callbacks": [StochasticWeightAveraging(1e-2, swa_epoch_start=1)], "max_epochs": 3},
        {"callbacks": [WeightAveraging()], "max_epochs": 2},
        {"callbacks": [EarlyStopping("val_loss", patience=1, min_delta=10.0)], "max_epochs": 5},
        {"val_check_interval": 3},
        {"barebones": True, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None},
    ],
    ids=lambda options: "-".join(options) if "callbacks" not in options else type(options["callbacks"][0]).__name__,
)
def test_training_feature(options):
    model = make()
    before = weights(model)
    t = fit(model, **options)
    assert quartet_names(model) == ["net.0", "net.3"]
    assert t.global_step > 0
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert not torch.equal(before["net.0.weight"], model.net[0].weight)
    steps = [tuple(seed[1:]) for _, _, seed in model.notes]
    assert len(set(steps)) == len(steps)
    if any(isinstance(c, EarlyStopping) for c in t.callbacks):
        assert t.current_epoch < 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    plain, checkpointed = make(), make(checkpointing=reentrant)
    fit(plain, QuartetQAT("quartet_stochastic"), accumulate_grad_batches=2)
    fit(checkpointed, QuartetQAT("quartet_stochastic"), accumulate_grad_batches=2)
    assert_same(plain.losses, checkpointed.losses)
    assert_same(weights(plain), weights(checkpointed))


def test_learning_rate_finder_leaves_no_trace(tmp_path):
    class Fixed(LearningRateFinder):
        def lr_find(self, trainer, pl_module):
            super().lr_find(trainer, pl_module)
            self.tried = pl_module.losses.copy()
            pl_module.losses.clear()
            pl_module.notes.clear()

    finder = Fixed(num_training_steps=5, update_attr=False)
    model, plain = make(dropout=0.0), make(dropout=0.0)
    fit(model, callbacks=[finder], default_root_dir=tmp_path, enable_checkpointing=True)
    assert len(finder.tried) >= 5
    fit(plain)
    assert model.notes == plain.notes


def test_batch_size_finder(tmp_path):
    class Sized(Toy):
        batch_size = 2

        def train_dataloader(self):
            return loader(10, 0, self.batch_size)

    model = make(Sized)
    fit(model, callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=2)], default_root_dir=tmp_path)
    assert model.batch_size > 2
    assert quartet_names(model) == ["net.0", "net.3"]


class Recording(Toy):
    """Keeps its weights after each optimizer step and at the start of each epoch."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.after_steps, self.at_epochs = [], []

    def on_train_epoch_start(self):
        self.at_epochs.append(weights(self))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step > len(self.after_steps):
            self.after_steps.append(weights(self))


def average(states: list[dict], decay: float | None) -> dict:
    """In float64: the mean, or an exponential average."""
    result = {name: tensor.double() for name, tensor in states[0].items()}
    for n, state in enumerate(states[1:], start=1):
        rate = 1 / (n + 1) if decay is None else 1 - decay
        result = {name: old + (state[name].double() - old) * rate for name, old in result.items()}
    return result


AVERAGES = {
    "mean": (WeightAveraging, None),
    "exponential": (lambda: EMAWeightAveraging(decay=0.8), 0.8),
    "swa": (lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=2), None),
}


@pytest.mark.parametrize("quartet_first", [True, False])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_are_those_of_the_weights_on_the_way(kind, quartet_first):
    make_callback, decay = AVERAGES[kind]
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    callbacks = [QuartetQAT(), make_callback()]
    model = make(Recording)
    t = trainer(callbacks=callbacks if quartet_first else callbacks[::-1], **options)
    t.fit(model)
    assert len(model.after_steps) == 15
    states = model.at_epochs[1:] if kind == "swa" else model.after_steps  # it averages as epochs 2 and 3 begin
    final = weights(model)
    for name, expected in average(states, decay).items():
        torch.testing.assert_close(final[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(final["net.0.weight"], model.after_steps[-1]["net.0.weight"])
    if kind != "swa":  # the last validation was of the quantised averages
        loss = t.callback_metrics["val_loss"]
        assert torch.equal(loss, torch.tensor(t.validate(model, verbose=False)[0]["val_loss"]))
        revert_from_quartet(model)
        assert not torch.equal(loss, torch.tensor(trainer().validate(model, verbose=False)[0]["val_loss"]))


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_a_plain_phase_are_those_without_the_callback(kind):
    make_callback, _ = AVERAGES[kind]
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    plain, model = make(Recording), make(Recording)
    trainer(callbacks=[make_callback()], **options).fit(plain)
    fit(model, QuartetQAT(start_step=1000), callbacks=[make_callback()], **options)
    assert_same(plain.after_steps, model.after_steps)
    assert_same(weights(plain), weights(model))


def test_averages_resume_exactly(tmp_path):
    class Saving(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):  # later the averages are in the model: Lightning's last.ckpt
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(epochs: int, **options) -> Recording:
        model = make(Recording)
        callbacks = [QuartetQAT("quartet_stochastic"), EMAWeightAveraging(decay=0.8), Saving()]
        trainer(max_epochs=epochs, callbacks=callbacks).fit(model, **options)
        return model

    whole, first = run(2), run(1)
    second = run(2, ckpt_path=tmp_path / "0.ckpt")
    assert_same(whole.losses, first.losses + second.losses)
    assert_same(weights(whole), weights(second))


def test_packed_weights_are_not_averaged():
    config = QuartetConfig(store_master_weights=False)
    with pytest.raises(MisconfigurationException, match="4-bit codes"):
        fit(make(), QuartetQAT(config), callbacks=[WeightAveraging()])


@pytest.mark.parametrize("how", ["whole", "part", "module.compile"])
def test_models_that_were_compiled_before(how):
    class Silent(Toy):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)  # a compiled self.log fails in Lightning 2.6 with torch 2.13, without us too

    torch._dynamo.reset()
    model, expected = make(Silent, dropout=0.0), make(Silent, dropout=0.0)
    fit(expected, limit_train_batches=3)
    compile_ = functools.partial(torch.compile, backend="eager")
    if how == "whole":
        fit(compile_(model), limit_train_batches=3)
    else:
        if how == "part":
            model.net = compile_(model.net)
        else:
            model.net.compile(backend="eager")
        model(torch.randn(4, 32))  # compiled as nn.Linear
        fit(model, limit_train_batches=3)
    assert len(quartet_names(model)) == 2
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_deepcopy_of_a_trained_model_trains_on():
    model = make()
    fit(model)
    other = copy.deepcopy(model)
    reference = copy.deepcopy(other)
    fit(other)
    fit(reference)
    assert_same(weights(other), weights(reference))


def test_frozen_layers_stay_and_pass_gradients():
    model = make()
    model.net[3].requires_grad_(False)
    before = weights(model)
    fit(model)
    assert torch.equal(before["net.3.weight"], model.net[3].weight)
    assert not torch.equal(before["net.0.weight"], model.net[0].weight)


class Poisoned(Toy):
    """Becomes non-finite at one place, in one element, in the third batch."""

    def __init__(self, place: str, value: float) -> None:
        super().__init__(dropout=0.0)
        self.place, self.value = place, value

    def training_step(self, batch, batch_idx):
        if batch_idx != 2:
            return super().training_step(batch, batch_idx)
        layer = self.net[3]
        if self.place in ("weight", "bias"):
            with torch.no_grad():
                getattr(layer, self.place).view(-1)[5] = self.value
        elif self.place == "input":
            batch = batch.clone()
            batch[1, 7] = self.value
        return super().training_step(batch, batch_idx)

    def forward(self, x):
        hidden = self.net[:3](x)
        poisoned = self.training and self.trainer.global_step == 2
        poison = torch.zeros_like(hidden)
        poison[2, 3] = self.value
        out = self.net[3](hidden + poison if poisoned and self.place == "activation" else hidden)
        if poisoned and self.place == "gradient":
            out.register_hook(lambda gradient: gradient + poison[:, :32])
        return out


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["input", "activation", "weight", "bias", "gradient"])
def test_non_finite_numbers_reach_the_loss_or_the_gradients(place, value, recipe):
    model = make(functools.partial(Poisoned, place, value))
    fit(model, QuartetQAT(recipe), limit_train_batches=3, limit_val_batches=0)
    assert [math.isfinite(loss) for loss in model.losses] == [True, True, place == "gradient"]
    # Of the weights, Adam has put them into each that their gradients reached.
    assert not torch.isfinite(model.net[0].weight).all()
    assert not torch.isfinite(model.net[3].weight).all()


def test_ddp_in_one_process():
    model = make(dropout=0.0)
    try:
        fit(model, strategy="ddp", devices=1, use_distributed_sampler=False)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    expected = make(dropout=0.0)
    fit(expected)
    torch.testing.assert_close(weights(model), weights(expected))


# Checkpoints ---------------------------------------------------------------------------------------------------------


class Named(Toy):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_a_checkpoint_loads_into_the_plain_model(tmp_path, save_weights_only):
    """What README's table says: master weights, an nn.Linear's numbers, and Quartet's again with the callback."""
    model = make(Named)
    t = fit(model)
    t.save_checkpoint(tmp_path / "quartet.ckpt", weights_only=save_weights_only)
    trained = t.validate(model, verbose=False)[0]["val_loss"]
    for weights_only in (True, False):
        state = torch.load(tmp_path / "quartet.ckpt", weights_only=weights_only)
        assert ("callbacks" in state) != save_weights_only
        plain = make(Named)
        plain.load_state_dict(state["state_dict"], strict=True)
    loaded = Named.load_from_checkpoint(tmp_path / "quartet.ckpt")
    assert type(loaded.net[0]) is nn.Linear
    assert_same(weights(loaded), weights(model))

    as_plain = trainer().validate(loaded, verbose=False)[0]["val_loss"]
    assert as_plain != trained
    assert trainer().validate(plain, verbose=False)[0]["val_loss"] == as_plain
    assert trainer(callbacks=[QuartetQAT()]).validate(loaded, verbose=False)[0]["val_loss"] == trained
    other = make(Named)
    again = trainer(callbacks=[QuartetQAT()]).validate(other, ckpt_path=tmp_path / "quartet.ckpt", verbose=False)
    assert again[0]["val_loss"] == trained

    if save_weights_only:
        with pytest.raises(KeyError, match="checkpoint contains only the model"):  # Lightning's own
            trainer(callbacks=[QuartetQAT()], max_epochs=2).fit(make(Named), ckpt_path=tmp_path / "quartet.ckpt")
    else:
        on = make(Named)
        trainer(max_epochs=2).fit(on, ckpt_path=tmp_path / "quartet.ckpt")  # goes on in high precision
        assert type(on.net[0]) is nn.Linear
        assert len(on.losses) == 10


def test_a_plain_checkpoint_goes_on_in_mxfp4(tmp_path):
    plain = make(Named)
    t = trainer()
    t.fit(plain)
    t.save_checkpoint(tmp_path / "plain.ckpt")
    runs = []
    for _ in range(2):
        model = make(Named)
        trainer(callbacks=[QuartetQAT()], max_epochs=2).fit(model, ckpt_path=tmp_path / "plain.ckpt")
        assert [note[2][1] for note in model.notes] == list(range(10, 20))
        runs.append(weights(model))
    assert_same(*runs)


def test_callback_state_is_primitive_and_another_config_warns(tmp_path, recwarn):
    t = fit(make(), QuartetQAT("quartet_stochastic"))
    t.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["QuartetQAT"]
    assert state["config"]["backward_rounding"] == "stochastic"
    assert state["step"] == 9

    def warnings_of(config: QuartetConfig) -> list[str]:
        recwarn.clear()
        trainer(callbacks=[QuartetQAT(config)], max_epochs=2).fit(make(), ckpt_path=tmp_path / "a.ckpt")
        return [str(w.message) for w in recwarn if "another QuartetConfig" in str(w.message)]

    same = QuartetConfig.from_recipe("quartet_stochastic", backend="reference", accumulation="precise")
    assert warnings_of(same) == []
    t = trainer(plugins=[QuartetPrecision("32-true", "bf16_backward")])
    t.fit(make())
    t.save_checkpoint(tmp_path / "plugin.ckpt")
    other = QuartetConfig(seed=1)  # else Python would not repeat its warning
    for again in ({"callbacks": [QuartetQAT()]}, {"plugins": [QuartetPrecision("32-true", other)]}):
        recwarn.clear()
        trainer(max_epochs=2, **again).fit(make(), ckpt_path=tmp_path / "plugin.ckpt")
        (found,) = [str(w.message) for w in recwarn if "another QuartetConfig" in str(w.message)]
        assert "backward_dtype: 'bf16' in the checkpoint, 'mxfp4' now" in found
    (message,) = warnings_of(QuartetConfig(seed=4))
    assert "backward_rounding: 'stochastic' in the checkpoint, 'nearest' now" in message
    assert "seed: 0" in message
    assert "backend" not in message


@pytest.mark.parametrize("model_class", [Toy, LateToy])
@pytest.mark.parametrize("keep", [0, 0.5, 0.98])
def test_truncated_checkpoint_leaves_the_model_untouched(tmp_path, keep, model_class):
    t = fit(make(model_class))
    t.save_checkpoint(tmp_path / "a.ckpt")
    data = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(data[: int(len(data) * keep)])

    def refused(*callbacks: pl.Callback) -> tuple[type, str, pl.LightningModule]:
        model = make(model_class)
        with pytest.raises(Exception) as caught:
            trainer(callbacks=list(callbacks)).fit(model, ckpt_path=tmp_path / "a.ckpt")
        return type(caught.value), str(caught.value), model

    kind, message, plain = refused()
    for revert in (True, False):
        kind_with_us, message_with_us, model = refused(QuartetQAT(revert_on_end=revert))
        assert (kind_with_us, message_with_us) == (kind, message)  # Lightning's own
        assert_same(weights(plain), weights(model))
        assert all(p.grad is None for p in model.parameters())
        assert bool(quartet_names(model)) != revert
        assert "configure_model" not in model.__dict__
        fit(model, limit_train_batches=1)  # and it can be trained


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"config": "quartett"}, ValueError, "quartett"),
        ({"config": 4}, TypeError, "QuartetConfig"),
        ({"modules_to_not_convert": "head"}, TypeError, "list of names"),
        ({"start_step": -1}, ValueError, "start_step is -1"),
        ({"start_step": 5, "end_step": 5}, ValueError, "end_step is 5"),
        ({"master_dtype": "bfloat16"}, ValueError, "bfloat16"),
    ],
)
def test_bad_argument(options, error, words):
    with pytest.raises(error, match=words):
        QuartetQAT(**options)


@pytest.mark.parametrize(
    ("callback", "model", "options", "error", "words"),
    [
        (QuartetQAT(modules_to_not_convert=["haed"]), Toy, {}, ValueError, "'haed'"),
        (QuartetQAT(modules_to_not_convert=["haed"]), LateToy, {}, ValueError, "'haed'"),
        (QuartetQAT(modules_to_not_convert=["net"]), Toy, {}, ValueError, "no linear layer"),
        (QuartetQAT(modules_to_not_convert=["net"]), LateToy, {}, ValueError, "no linear layer"),
        (QuartetQAT(QuartetConfig(backend="fp8")), Toy, {}, RuntimeError, "fp8"),
        (
            QuartetQAT("quartet"),
            Toy,
            {"plugins": [QuartetPrecision("32-true", "quartet_stochastic")]},
            MisconfigurationException,
            "only one",
        ),
        (
            QuartetQAT(),
            Toy,
            {"plugins": [QuartetPrecision("32-true", modules_to_not_convert=["head"])]},
            MisconfigurationException,
            "only one",
        ),
    ],
)
def test_bad_input_is_found_before_anything_changes(monkeypatch, callback, model, options, error, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it GPU backends run on the CPU
    model = make(model)
    t = trainer(callbacks=[callback], **options)
    plugin = type(t.strategy.precision_plugin)
    with pytest.raises(error, match=words) as caught:
        t.fit(model)
    assert "\n" not in str(caught.value)
    assert quartet_names(model) == []
    assert type(t.strategy.precision_plugin) is plugin
    assert "configure_model" not in model.__dict__


def test_a_trainer_of_pytorch_lightning_is_refused():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    t = pytorch_lightning.Trainer(accelerator="cpu", max_steps=1, callbacks=[QuartetQAT()], **quiet)
    with pytest.raises(MisconfigurationException, match="import lightning.pytorch as pl"):
        t.fit(Other(), loader(2, 0))


@pytest.mark.parametrize(
    ("strategy", "callback", "others", "words"),
    [
        ("DeepSpeedStrategy", QuartetQAT(), [], "DeepSpeed"),
        ("FSDPStrategy", QuartetQAT(master_dtype="float32"), [], "one dtype"),
        ("ModelParallelStrategy", QuartetQAT(), [WeightAveraging()], "WeightAveraging does not work"),
        ("ModelParallelStrategy", QuartetQAT(), [StochasticWeightAveraging(0.1)], "StochasticWeightAveraging"),
    ],
)
def test_strategies_that_cannot_work_are_refused(monkeypatch, strategy, callback, others, words):
    # None of them can be made without a GPU; the check goes by the class.
    monkeypatch.setattr(qat, strategy, pl.strategies.SingleDeviceStrategy)
    model = make()
    with pytest.raises(MisconfigurationException, match=words):
        trainer(callbacks=[callback, *others]).fit(model)
    assert quartet_names(model) == []


def test_an_optimizer_of_other_parameters_is_refused():
    class Elsewhere(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)

    with pytest.raises(MisconfigurationException, match="None of the parameters of SGD"):
        fit(make(Elsewhere))


def test_latent_variables_of_a_frozen_model_are_optimised():
    class Latent(Toy):
        def __init__(self, **options):
            super().__init__(**options)
            self.requires_grad_(False)
            self.z = torch.zeros(32, requires_grad=True)

        def forward(self, x):
            return super().forward(x + self.z)

        def configure_optimizers(self):
            return torch.optim.SGD([self.z], 0.1)

    model = make(Latent)
    fit(model)
    assert model.z.abs().min() > 0


def test_two_callbacks_are_refused():
    class Second(QuartetQAT):
        pass

    with pytest.raises(MisconfigurationException, match="two QuartetQAT"):
        fit(make(), callbacks=[Second()])


def test_layers_with_another_config_keep_it_with_a_warning():
    model = make()
    convert_to_quartet(model, config="quartet_stochastic")
    with pytest.warns(UserWarning, match="revert_from_quartet"):
        fit(model, QuartetQAT("quartet"))
    assert model.net[0].quartet_config.backward_rounding == "stochastic"
    revert_from_quartet(model)
    fit(model, QuartetQAT("quartet"))
    assert model.net[0].quartet_config.backward_rounding == "nearest"


# Runs after runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "enabled"), [(10, None, True), (11, None, False), (0, 10, False), (0, 11, True)]
)
def test_a_checkpoint_is_evaluated_in_the_phase_that_follows_it(tmp_path, start, end, enabled):
    def callback():
        return QuartetQAT(start_step=start, end_step=end)

    model, t = make(batches=10), trainer(callbacks=[callback()])
    t.fit(model)
    t.save_checkpoint(tmp_path / "a.ckpt")
    other = make(batches=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuartetQAT")
        trainer(callbacks=[callback()]).validate(other, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert {layer.quartet_enabled for layer in (model.net[0], other.net[0])} == {enabled}


def test_an_earlier_checkpoint_is_evaluated_in_its_phase_by_the_trainer_that_went_on(tmp_path):
    model = make(batches=10)
    saves = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    t = trainer(callbacks=[QuartetQAT(end_step=6), saves], enable_checkpointing=True)
    t.fit(model)
    for step, enabled in ((4, True), (8, False)):
        t.test(model, ckpt_path=tmp_path / f"step={step}.ckpt", verbose=False)
        assert model.net[0].quartet_enabled is enabled


def test_weights_of_an_unknown_step_are_said_to_be():
    with pytest.warns(UserWarning, match="does not know how many steps these weights were trained and takes 0"):
        trainer(callbacks=[QuartetQAT(start_step=3)]).validate(make(), verbose=False)


def test_micro_batches_without_end():
    class Full(QuartetQAT):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self._step, self._micro_batch = 0, 2**16 - 3

    model = make()
    fit(model, Full(), accumulate_grad_batches=10)
    assert [note[2][2] for note in model.notes][:4] == [2**16 - 2, 2**16 - 1, 0, 1]


def test_layers_of_an_earlier_fit_that_should_be_others_now_are_named():
    model = make()
    fit(model)
    with pytest.warns(UserWarning, match=r"stay as they are, net\.0 \(matches 'net\.0'\): call revert_from_quartet"):
        fit(model, QuartetQAT(modules_to_not_convert=["net.0"]))
    with pytest.warns(UserWarning, match=r"net\.0 \(keeps QuartetConfig\(\)\) and 1 more"):
        fit(model, QuartetQAT("bf16_backward"))


def test_training_on_without_the_callback_is_warned_of(monkeypatch):
    from lightning_quartet import linear

    model = make()
    fit(model)
    monkeypatch.setattr(linear, "_warned", False)
    with pytest.warns(UserWarning, match="its step was never set"):
        trainer().fit(model)


@pytest.mark.parametrize("kind", ["none", "extra"])
def test_optimizers_that_train_nothing_of_the_model(kind):
    class Odd(Toy):
        def configure_optimizers(self):
            if kind == "none":
                return None
            self.automatic_optimization = False
            self.outside = [torch.zeros(1, requires_grad=True)]
            return torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.outside, 0.1)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if kind == "extra":
                self.manual_backward(loss + self.outside[0].sum())
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

    model = make(Odd)
    fit(model)
    assert len(model.losses) == 10


def test_a_resumed_run_with_other_layers_or_phases_is_warned_of(tmp_path):
    model, t = make(), trainer(max_epochs=1, callbacks=[QuartetQAT()])
    t.fit(model)
    t.save_checkpoint(tmp_path / "a.ckpt")
    expected = "another QuartetQAT .modules_to_not_convert: None in the checkpoint, .'net.0'. now; start_step: 0 in"
    t = trainer(max_epochs=2, callbacks=[QuartetQAT(modules_to_not_convert=["net.0"], start_step=30)])
    with pytest.warns(UserWarning, match=expected):
        t.fit(make(), ckpt_path=tmp_path / "a.ckpt")

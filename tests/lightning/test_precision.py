"""Precisions, by the Trainer's option with the callback and as QuartetPrecision, in the Trainer and in Fabric."""

import io
from collections import OrderedDict

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from toy import Toy, assert_same, loader, make, trainer, weights

from lightning_quartet import QuartetConfig, QuartetLinear, QuartetPrecision, QuartetQAT

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]


def fit(model: Toy, **options):
    t = trainer(**options)
    torch.manual_seed(2)
    t.fit(model)
    return t


@pytest.mark.parametrize("precision", PRECISIONS)
def test_callback_plugin_and_both_are_the_same_run(precision):
    ways = (
        {"precision": precision, "callbacks": [QuartetQAT()]},
        {"plugins": [QuartetPrecision(precision)]},
        {"plugins": [QuartetPrecision(precision)], "callbacks": [QuartetQAT()]},
    )
    models = []
    for options in ways:
        model = make()
        t = fit(model, accumulate_grad_batches=3, gradient_clip_val=0.5, max_epochs=2, **options)
        assert isinstance(model.net[0], QuartetLinear)
        assert all(type(p.grad) is torch.Tensor for p in model.parameters() if p.grad is not None)
        assert t.precision_plugin.precision == precision
        models.append(model)
    expected_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert models[0].net[0].weight.dtype == expected_dtype
    for model in models[1:]:
        assert_same(models[0].notes, model.notes)
        assert_same(models[0].losses, model.losses)
        assert_same(weights(models[0]), weights(model))


def test_outputs_have_the_dtype_of_the_precision():
    class Watching(Toy):
        def forward(self, x):
            self.dtypes = (self.net[0](x).dtype, self.net(x).dtype)
            return self.net(x)

    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)):
        model = make(Watching)
        fit(model, precision=precision, callbacks=[QuartetQAT()], limit_train_batches=1)
        assert model.dtypes == (dtype, dtype)


class Overflowing(Toy):
    """Its third batch gives an infinite loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch * (float("inf") if batch_idx == 2 else 1), batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.states = [*getattr(self, "states", []), (weights(self), self.trainer.precision_plugin.scaler.get_scale())]


def cpu_scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.mark.parametrize("kind", ["callback", "plugin"])
def test_a_scaler_skips_the_step_of_a_non_finite_batch_and_recovers(kind):
    model = make(Overflowing, dropout=0.0)
    if kind == "callback":
        plugin = MixedPrecision("16-mixed", "cpu", cpu_scaler())
        fit(model, plugins=[plugin], callbacks=[QuartetQAT()], limit_train_batches=5)
    else:
        plugin = QuartetPrecision("16-mixed")
        assert plugin.scaler is plugin._trainer_plugin.scaler
        plugin.scaler._init_scale = 1024.0
        fit(model, plugins=[plugin], limit_train_batches=5)
    scales = [scale for _, scale in model.states]
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    states = [state["net.0.weight"] for state, _ in model.states]
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[2], states[3])
    assert torch.isfinite(states[4]).all()


def test_scaler_state_is_found_under_lightnings_name(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", cpu_scaler())
    t = fit(make(), plugins=[plugin], callbacks=[QuartetQAT()])
    t.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert state["MixedPrecision"]["scale"] == 1024.0
    plain = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer(plugins=[plain], max_epochs=1).fit(make(), ckpt_path=tmp_path / "a.ckpt")
    assert plain.scaler.get_scale() == 1024.0


def test_float32_masters_train_better_than_bfloat16_weights():
    model = make(dropout=0.0, lr=1e-5)  # steps too small for bfloat16 weights of this size
    before = weights(model)
    fit(model, precision="bf16-true", callbacks=[QuartetQAT(master_dtype="float32")])
    assert model.net[0].weight.dtype == model.net[3].bias.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
    moved = (model.net[0].weight - before["net.0.weight"]).abs()
    assert (moved > 1e-6).float().mean() > 0.9
    model = make(dropout=0.0, lr=1e-5)
    fit(model, precision="bf16-true", callbacks=[QuartetQAT()])
    assert (model.net[0].weight == before["net.0.weight"].bfloat16()).float().mean() > 0.5


def test_masters_leave_a_tied_embedding_in_the_models_dtype():
    class Tied(Toy):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 64)
            self.net[0].weight = self.embed.weight = nn.Parameter(torch.randn(64, 32) * 0.1)

    model = make(Tied)
    fit(model, precision="bf16-true", callbacks=[QuartetQAT(master_dtype="float32")])
    assert model.net[0].weight is model.embed.weight
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.net[3].weight.dtype == torch.float32


# Fabric --------------------------------------------------------------------------------------------------------------


def fabric_run(precision: str, steps: int, saved: bytes | None = None, recipe: str = "quartet_stochastic"):
    """A hand-written loop with accumulation; saves the plugin's state itself, as Fabric does not."""
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QuartetPrecision(precision, recipe))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    assert isinstance(model.module[0], QuartetLinear)
    done, seeds = 0, []
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        done = state["done"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
    batches = list(loader(steps, 0))
    with torch.no_grad():
        model(batches[0])  # an evaluation is no micro-batch
    for i in range(done, steps):
        out = model(batches[i])
        fabric.backward((out - batches[i]).square().mean())
        seeds.append(model.module[0]._quartet_seed.tolist())
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    buffer = io.BytesIO()
    state = {
        "done": steps,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
    }
    torch.save(state, buffer)
    return state, buffer.getvalue(), seeds


@pytest.mark.parametrize("precision", [*PRECISIONS, "16-mixed"])
def test_fabric_loop_resumes_exactly(precision):
    whole, _, seeds = fabric_run(precision, 8)
    assert seeds == [[0, step, micro_batch] for step in range(4) for micro_batch in range(2)]
    _, saved, _ = fabric_run(precision, 4)
    resumed, _, _ = fabric_run(precision, 8, saved)
    assert_same(whole, resumed)


@pytest.mark.parametrize("how", ["ddp", "compiled", "compiled-ddp", "compiled-after"])
def test_fabric_wraps_what_it_likes_around_the_model(how):
    """The converted layers, the seeds and the weights are those of a plain loop."""

    def compiled(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="aot_eager")  # not the full graph: there is none through DDP

    def run(how: str) -> tuple[nn.Module, list]:
        strategy = "ddp" if "ddp" in how else "auto"
        fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=QuartetPrecision("32-true"))
        fabric.launch()
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        model = compiled(net) if how in ("compiled", "compiled-ddp") else net
        model, optimizer = fabric.setup(model, torch.optim.SGD(net.parameters(), 0.1))
        call = compiled(model) if how == "compiled-after" else model
        assert isinstance(net[0], QuartetLinear)
        seeds = []
        for i, batch in enumerate(loader(6, 0)):
            with fabric.no_backward_sync(model, enabled=i % 2 == 0):
                fabric.backward((call(batch) - batch).square().mean())
            seeds.append(net[0]._quartet_seed.tolist())
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        return net, seeds

    expected, expected_seeds = run("plain")
    assert expected_seeds == [[0, step, micro_batch] for step in range(3) for micro_batch in range(2)]
    torch._dynamo.reset()
    try:
        net, seeds = run(how)
    finally:
        torch._dynamo.reset()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert seeds == expected_seeds
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_two_models_of_one_fabric_do_not_share_bits():
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QuartetPrecision("32-true"))
    one, two = (fabric.setup_module(nn.Sequential(nn.Linear(32, 32))) for _ in range(2))
    fabric.backward(two(one(torch.randn(4, 32))).sum())
    first, second = one.module[0]._quartet_seed.tolist(), two.module[0]._quartet_seed.tolist()
    assert first[0] >> 32 == 0
    assert second[0] >> 32 == 1


def test_a_second_model_of_a_fabric_may_have_nothing_to_convert():
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QuartetPrecision("32-true", modules_to_not_convert=["head"]))
    actor = fabric.setup_module(nn.Sequential(OrderedDict(body=nn.Linear(32, 32), head=nn.Linear(32, 32))))
    with pytest.warns(UserWarning, match="converts no layer of Linear"):
        critic = fabric.setup_module(nn.Linear(32, 1))
    fabric.backward(critic(actor(torch.randn(4, 32))).sum())
    assert [type(layer) for layer in actor.module] == [QuartetLinear, nn.Linear]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precision": "16-true"}, ValueError, "'bf16-mixed'"),
        ({"config": "quartett"}, ValueError, "quartett"),
        ({"config": 1}, TypeError, "QuartetConfig"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "list of names"),
    ],
)
def test_bad_argument(options, error, words):
    with pytest.raises(error, match=words):
        QuartetPrecision(**options)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="no linear layer"):
        fit(make(), plugins=[QuartetPrecision("32-true", modules_to_not_convert=["net"])])
    with pytest.raises(ValueError, match="no nn.Linear"):
        Fabric(accelerator="cpu", devices=1, plugins=QuartetPrecision("32-true")).setup_module(nn.ReLU())


def test_equal_configs_in_callback_and_plugin_are_accepted():
    model = make()
    config = QuartetConfig(seed=4)
    fit(model, plugins=[QuartetPrecision("32-true", config)], callbacks=[QuartetQAT(QuartetConfig(seed=4))])
    assert model.net[0].quartet_config == config


def test_fsdp1_takes_only_its_own_plugins():
    with pytest.raises(TypeError, match="FSDPPrecision"):
        FSDPStrategy(precision_plugin=QuartetPrecision("bf16-mixed"))

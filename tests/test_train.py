"""The training loop: equal to the ten-line loop, exact after a kill, and safe when the loss explodes."""

import copy
import itertools
import os
import signal
from functools import partial

import pytest
import torch
from torch import nn

from cmlib import data
from cmlib.consistency import EMA, ConsistencyFunction
from cmlib.continuous import FlowNetwork, MeanFlowFunction
from cmlib.objectives import ECT, SCM, ConsistencyDistillation, Denoising, MeanFlow, ScoreCorrected
from cmlib.ops import pseudo_huber
from cmlib.process import DDPM, EDM
from cmlib.recipes import with_one_more_channel
from cmlib.teacher import Teacher
from cmlib.train import fit, learning_rate, options, plateaued, read_checkpoint, step_seed
from cmlib.unet import UNet
from tests.small import UNET

IMAGES = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCHES = partial(data.batches, IMAGES, 8, 0)


def unet(dropout=0.2):
    torch.manual_seed(0)
    return UNet(**{**UNET, "dropout": dropout})


def distillation():
    teacher = Teacher(unet(0.0), DDPM.linear()).to("cpu")
    objective = ConsistencyDistillation(teacher, EDM(0.01, 80).grid(18), "heun", partial(pseudo_huber, c=0.24), mu=0.9)
    return ConsistencyFunction(unet(), 0.01, 80.0, 1.0), objective


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_equals_the_ten_line_loop():
    process = DDPM.linear()
    losses = []

    def record(step, model):
        losses.append(step)

    _, history = fit(unet(), Denoising(process), BATCHES, 6, lr=1e-3, every=1, on_every=record)

    model, by_hand = unet(), []
    objective = Denoising(process)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for step, batch in zip(range(6), BATCHES(0), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 6, 1e-3)
        generator = torch.Generator().manual_seed(step_seed(0, step, 0))
        torch.manual_seed(step_seed(0, step, 0) + 1)
        loss = objective(model, model, batch, step, generator)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        by_hand.append(loss.item())
    assert [row["loss"] for row in history] == by_hand
    assert losses == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("make", [lambda: (unet(), Denoising(DDPM.linear())), distillation], ids=["teacher", "student"])
def test_twenty_steps_equal_ten_killed_and_ten(tmp_path, make):
    whole, objective = make()
    average, history = fit(whole, objective, BATCHES, 20, folder=tmp_path / "whole", every=5)

    pid = os.fork()
    if pid == 0:  # dies by SIGKILL in step 13, after the checkpoint of step 10

        def dying(start):
            for step, batch in enumerate(BATCHES(start)):
                if step == 12:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        model, objective = make()
        fit(model, objective, dying, 20, folder=tmp_path / "killed", every=5)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert read_checkpoint(tmp_path / "killed" / "checkpoint.pt")["step"] == 10

    resumed, objective = make()
    again, rows = fit(resumed, objective, BATCHES, 20, folder=tmp_path / "killed", every=5, resume=True)
    assert same(whole, resumed) and same(average, again)
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    def poisoned(start):
        for step, batch in enumerate(BATCHES(start), start):
            if step == 7:
                batch["x0"] = batch["x0"] * float("nan")
            yield batch

    with pytest.raises(FloatingPointError, match=r"step 7.*checkpoint"):
        fit(unet(), Denoising(DDPM.linear()), poisoned, 20, folder=tmp_path, every=5)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def test_resume_refuses_another_run(tmp_path):
    objective = Denoising(DDPM.linear())
    fit(unet(), objective, BATCHES, 2, folder=tmp_path)
    with pytest.raises(ValueError, match=r"lr was 0\.0002, is 0\.1"):
        fit(unet(), objective, BATCHES, 2, folder=tmp_path, resume=True, lr=0.1)
    with pytest.raises(ValueError, match="another model"):
        fit(nn.Linear(2, 2), objective, BATCHES, 2, folder=tmp_path, resume=True)


def test_resume_compares_the_objectives_own_options(tmp_path):
    run = partial(fit, batches=BATCHES, steps=2, folder=tmp_path, resume=True)
    run(ConsistencyFunction(unet(), 0.0), ECT(2))
    huber = partial(pseudo_huber, c=0.1)
    for other in (ECT(2, q=256.0, stages=1), ECT(2, stages=4), ScoreCorrected(ECT(2)), ECT(2, distance=huber)):
        with pytest.raises(ValueError, match="objective was 'ECT"):
            run(ConsistencyFunction(unet(), 0.0), other)
    assert options(ScoreCorrected(ECT(2))) != options(ScoreCorrected(ECT(2, q=3.0)))
    assert options(ECT(2, distance=huber)) != options(ECT(2, distance=partial(pseudo_huber, c=0.2)))
    with pytest.raises(ValueError, match="curriculum is 5 steps long, the run 2"):
        run(ConsistencyFunction(unet(), 0.0), ECT(5))


def test_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        fit(unet(), Denoising(DDPM.linear()), BATCHES, 2, folder=tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()


def test_target_network_moves_towards_the_student_and_shares_its_mode():
    model, objective = distillation()
    seen = []

    class Spy(ConsistencyDistillation):
        def __call__(self, f, target, batch, step, generator):
            seen.append((target is not model, target.training, f.training))
            return super().__call__(f, target, batch, step, generator)

    spy = Spy(objective.teacher, objective.levels, "heun", objective.distance, mu=0.9)
    fit(model, spy, BATCHES, 3)
    assert seen == [(True, True, True)] * 3


def test_ema_moves():
    model = nn.Linear(3, 3)
    average = EMA(model, 0.9)
    before = average.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model, 0)
    torch.testing.assert_close(average.model.weight, before + 0.1)


def test_learning_rate_warms_up_linearly_then_anneals():
    rates = [learning_rate(k, 100, 1.0, warmup=10) for k in range(101)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert all(b <= a for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(50, 100, 1.0, schedule="constant") == 1.0


def test_plateau():
    falling = [1 / (k + 1) for k in range(20)]
    assert not plateaued(falling)
    assert plateaued([*falling, *[falling[-1]] * 5])
    assert not plateaued([1.0] * 5)


def test_one_process_can_train_at_two_precisions():
    for precision in ("bf16", "no"):
        _, history = fit(unet(), Denoising(DDPM.linear()), BATCHES, 2, precision=precision)
        assert history[-1]["loss"] > 0


@pytest.mark.parametrize("objective", [SCM(warmup=0), MeanFlow()], ids=["scm", "meanflow"])
def test_a_derivative_is_taken_in_float32_under_mixed_precision(objective):
    f = ConsistencyFunction(unet(0.0), 0.0)
    if isinstance(objective, MeanFlow):
        f = MeanFlowFunction(FlowNetwork(with_one_more_channel(unet(0.0)), 80.0), 80.0)
    losses = {p: fit(copy.deepcopy(f), objective, BATCHES, 1, precision=p)[1][-1]["loss"] for p in ("bf16", "no")}
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05) and losses["bf16"] != losses["no"]


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path, where):
    class Poisoned(Denoising):
        def __call__(self, f, target, batch, step, generator):
            weight = next(iter(f.parameters()))
            if step == 8 and where == "weights":
                with torch.no_grad():
                    weight.fill_(float("nan"))
                return weight.sum().reshape(1) * 0 + torch.ones(1), {}
            if step == 9 and where == "gradient":  # of the very step that ends in a checkpoint; its loss is 0
                return (weight.sum().reshape(1) * 0).sqrt(), {}
            return super().__call__(f, target, batch, step, generator)

    with pytest.raises(FloatingPointError, match="not finite"):
        fit(unet(), Poisoned(DDPM.linear()), BATCHES, 20, folder=tmp_path, every=5)
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["model"].values())


def test_a_run_that_stop_has_ended_does_not_go_on(tmp_path):
    common = dict(folder=tmp_path, every=5, stop=lambda history: len(history) == 2, resume=True)
    first, history = fit(unet(), Denoising(DDPM.linear()), BATCHES, 40, **common)
    again, rows = fit(unet(), Denoising(DDPM.linear()), BATCHES, 40, **common)
    assert [row["step"] for row in rows] == [5, 10] == [row["step"] for row in history]
    assert same(first, again)


def test_compiled_training_is_the_same_training_under_the_same_names(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    (plain, objective), (compiled, _) = distillation(), distillation()
    average, history = fit(plain, objective, BATCHES, 2, every=1, precision="bf16")
    again, rows = fit(compiled, objective, BATCHES, 2, every=1, precision="bf16", folder=tmp_path, compiler=backend)
    assert len(graphs) == 2, "one of the student's network and one of the target's, each whole"
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]
    assert same(plain, compiled) and same(average, again)
    assert list(read_checkpoint(tmp_path / "checkpoint.pt")["model"]) == list(plain.state_dict())

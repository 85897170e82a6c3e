"""Every scheduler class of the installed diffusers, by what it samples: stood in for, refused by name, told of as new.

The list is the installed release's own. A class that a new release adds fails here until somebody has read what its
network answers and has put it in one of the lists of kinds.py; users are warned of it meanwhile.
"""

import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from test_diffusers_settings import SAME, STEPS, base, latents  # noqa: E402

from dss_fast.integrations.diffusers import DSSScheduler, config, kinds  # noqa: E402
from dss_fast.integrations.diffusers.grids import stock_class  # noqa: E402
from helpers.diffusers_classes import config_of, every_class, unclipped  # noqa: E402
from helpers.diffusers_runs import network, noise, run  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:strict=False takes",
    "ignore:as in diffusers, the betas",
)
KINDS = {
    "stood in for": kinds.ORDINARY,
    "strict=False takes": kinds.ANOTHER_TASK,
    "DSSScheduler steps a state along one path": kinds.OTHER,
    "neither a flow": kinds.REFUSED,
}


@pytest.mark.parametrize("name", list(every_class()))
def test_every_class_is_of_one_kind(name):
    of = [kind for kind, names in KINDS.items() if name in names]
    assert len(of) == 1, f"{name}: read its step, and name it in ORDINARY, ANOTHER_TASK, OTHER or REFUSED"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kind = getattr(diffusers, name)
        told = config_of(kind, **unclipped(kind))
        if of == ["stood in for"]:
            DSSScheduler.from_config(told, solver="dpmpp_2m")
            assert not any("unknown to this version" in str(w.message) for w in said)
            return
        with pytest.raises(ValueError, match=of[0]) as refused:
            DSSScheduler.from_config(told, solver="dpmpp_2m")
        assert name in str(refused.value)


@pytest.mark.parametrize("name", [name for name in every_class() if name in kinds.ORDINARY])
@pytest.mark.parametrize("method", ["euler", "dpmpp_2m", "unip2"])
def test_what_is_stood_in_for_has_the_latents_of_stock(name, method):
    kind = getattr(diffusers, name)
    if name.startswith("CogVideoX") and method != "euler":
        pytest.skip("stock's other methods know no snr_shift_scale, and run the model at another noise than its own")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "FlowMatch" in name else {}
    told = config_of(kind, **base(kind))
    told |= {} if method == "euler" else flow
    stock = getattr(diffusers, stock_class(method, config.adopt(told)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = DSSScheduler.from_config(told, solver=method), stock.from_config(told, **base(stock))
        scaled = hasattr(theirs, "scale_model_input")
        ours, theirs = (latents(s, {}) if scaled else run(s, STEPS) for s in (ours, theirs))
    assert (ours - theirs).abs().max() <= SAME * theirs.abs().max()


def test_unclips_pipelines_say_where_a_step_goes():
    scheduler = DSSScheduler.from_config(diffusers.UnCLIPScheduler(clip_sample=False), solver="dpmpp_2m")
    wanted = run(scheduler, 5)
    scheduler.set_timesteps(5)
    x, net, times = noise(), network(), scheduler.timesteps
    for i, t in enumerate(times):
        last = i + 1 == len(times)
        x = scheduler.step(net(x, t), t, x, prev_timestep=None if last else times[i + 1]).prev_sample
    assert torch.equal(x, wanted)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="prev_timestep=.*step 0 goes to the next"):
        scheduler.step(noise(), times[0], noise(), prev_timestep=times[2])


@pytest.mark.parametrize("name", sorted(kinds.ANOTHER_TASK))
def test_another_task_is_refused_however_its_config_comes(name, tmp_path):
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    stock = kind(**unclipped(kind))
    stock.save_pretrained(tmp_path)
    for given in (stock, stock.config, kind.load_config(tmp_path)):
        with pytest.raises(ValueError, match="strict=False takes"):
            DSSScheduler.from_config(given, solver="euler")
    with pytest.raises(ValueError, match=name):
        DSSScheduler.from_pretrained(tmp_path, solver="euler")
    with pytest.warns(UserWarning, match=f"strict=False takes the config of {name}"):
        taken = DSSScheduler.from_config(stock, solver="euler", strict=False)
    assert run(taken, 4).isfinite().all()
    taken.save_pretrained(tmp_path)  # the user's word is kept
    again = DSSScheduler.from_pretrained(tmp_path)
    assert torch.equal(run(again, 4), run(taken, 4))
    with pytest.raises(ValueError, match=name):
        DSSScheduler.from_config(again.config, strict=True)
    # An ordinary class made of that config samples an ordinary network.
    ordinary = diffusers.FlowMatchEulerDiscreteScheduler if taken.config.family == "flow" else diffusers.DDIMScheduler
    assert run(DSSScheduler.from_config(ordinary.from_config(stock.config), solver="euler"), 4).isfinite().all()


def test_a_class_of_a_newer_release_is_told_of(monkeypatch):
    class NewFlowScheduler(diffusers.FlowMatchEulerDiscreteScheduler):
        pass

    monkeypatch.setattr(diffusers, "NewFlowScheduler", NewFlowScheduler, raising=False)
    with pytest.warns(UserWarning, match="NewFlowScheduler is unknown to this version of dss_fast"):
        DSSScheduler.from_config({**NewFlowScheduler(shift=3.0).config, "_class_name": "NewFlowScheduler"})


def test_a_class_of_ones_own_counts_as_the_one_it_derives_from():
    class MyEuler(diffusers.EulerDiscreteScheduler):
        pass

    with pytest.warns(UserWarning, match="MyEuler is no scheduler .* those of EulerDiscreteScheduler"):
        ours = DSSScheduler.from_config(MyEuler(), solver="euler")
    assert ours.config.stock_class == "EulerDiscreteScheduler"

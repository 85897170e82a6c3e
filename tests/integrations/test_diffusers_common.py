"""diffusers' own SchedulerCommonTest, run against DSSScheduler.

Its code is in the GitHub tree only, not in the wheel: fetch a checkout of huggingface/diffusers and point
DIFFUSERS_TREE at it; it also needs `pip install parameterized torchsde requests`. Skipped otherwise;
test_diffusers_scheduler.py and test_diffusers_config.py ask the same questions without it.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

diffusers = pytest.importorskip("diffusers")
TREE = os.environ.get("DIFFUSERS_TREE", "")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # upstream and NumPy 2
if not (Path(TREE) / "tests" / "schedulers" / "test_schedulers.py").is_file():
    pytest.skip("set DIFFUSERS_TREE to a checkout of huggingface/diffusers", allow_module_level=True)


def upstream():
    """Upstream's `tests` package under another name, so that it cannot meet a `tests` of ours."""
    if "diffusers_tests" not in sys.modules:
        root = Path(TREE) / "tests"
        spec = importlib.util.spec_from_file_location(
            "diffusers_tests", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["diffusers_tests"])
    return importlib.import_module("diffusers_tests.schedulers.test_schedulers")


class Common(upstream().SchedulerCommonTest):
    from dss_fast.integrations.diffusers import DSSScheduler

    scheduler_classes = (DSSScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)
    default_num_inference_steps = 10
    settings: dict = {}

    def get_scheduler_config(self, **options):
        return {"num_train_timesteps": 1000, **self.settings, **options}

    def test_configs_survive_saving(self):
        self.check_over_configs(time_step=None)

    def test_other_numbers_of_steps(self):
        for n in (6, 8):
            self.forward_default_kwargs = (("num_inference_steps", n),)
            self.check_over_forward(time_step=None)


class TestFlowPublished(Common):
    settings = {"solver": "sit-xl-2-256", "family": "flow", "shift": 3.0}


class TestFlowHandmade(Common):
    settings = {"solver": "ab2", "family": "flow", "shift": 3.0}


class TestVPPublished(Common):
    # test_trained_betas brings other betas than the table was searched for
    settings = {
        "solver": "dit-xl-2-256",
        "family": "vp",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "strict": False,
    }


class TestVPHandmade(Common):
    settings = {
        "solver": "dpmpp_2m",
        "family": "vp",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }


del Common

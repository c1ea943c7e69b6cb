"""The configs of the documented way from a text to a chat model that prefers: pretraining,
dialogues, pairs. Each begins with the weights of the one before.
"""

import numpy as np
import pytest
from support.datasets import SEQUENCE_LENGTH
from support.paths import ROOT
from support.runs import losses

SHORT = (
    f"data.sequence_length={SEQUENCE_LENGTH}",
    "data.batch_size=8",
    "num_steps=4",
    "schedule.warmup_steps=0",
    "samples.every_steps=0",
    "log.every_steps=1",
    "log.tensorboard=False",
)


@pytest.mark.slow
def test_the_tiny_configs_train_one_after_the_other(runs, dialogues, pairs, tmp_path):
    data = {"tiny": runs.dataset, "sft_tiny": dialogues("packed"), "vrpo_tiny": pairs("packed")}
    before = None
    for name, path in data.items():
        knobs = [*SHORT, f"data.path={path}"]
        if before:
            knobs.append(f"checkpoint.init_from={before}")
        runs.train(tmp_path / name, *knobs, config=ROOT / f"configs/{name}.py")
        curve = losses(tmp_path / name)
        assert len(curve) == 4
        assert np.isfinite(curve).all()
        before = tmp_path / name

"""Memory of a conversion."""

import json
import logging
import os
import subprocess
import sys

import helpers
import numpy as np
import pytest
from official_states import TRANSFORMER, rqvae_config, rqvae_state, transformer_state
from safetensors.numpy import save_file

STAGE1 = {"arch": rqvae_config({"latent_shape": [8, 4, 6], "code_shape": [8, 4, 3]}, {"ch": 32})}
STAGE2_CLASS = TRANSFORMER | {"block_size": [8, 4, 3], "block_size_cond": 1}


@pytest.mark.slow
def test_memory_is_that_of_the_weights(tmp_path):
    """At most a fifth more than the weights and the largest stacked tensor, beside what a bare conversion takes."""
    M, L = 640, 20  # 100 million parameters
    stacks = {"body": {"n_layer": L, "block": {"n_head": 10}}, "head": {"n_layer": 1, "block": {"n_head": 10}}}
    small = {"body": {"n_layer": 1, "block": {"n_head": 2}}, "head": {"n_layer": 1, "block": {"n_head": 2}}}
    (tmp_path / "vae.json").write_text(json.dumps(STAGE1))
    np.savez(tmp_path / "vae.npz", **rqvae_state((7, 7, 7), shared=True, ch=32))
    peaks, weights = {}, {}
    assert command_peak(tmp_path, "vae", "vae.npz")
    for name, changes in (("small", small), ("large", {"embed_dim": M, **stacks})):
        arch = STAGE2_CLASS | changes
        (tmp_path / f"{name}.json").write_text(json.dumps({"arch": arch}))
        state = transformer_state(arch)
        save_file(state, tmp_path / f"{name}.safetensors")
        weights[name] = sum(value.nbytes for value in state.values())
        peaks[name] = command_peak(tmp_path, name, f"{name}.safetensors", f"--tokenizer={tmp_path / 'vae'}")
    assert weights["large"] > 4e8
    stacked = 4 * M * M * 4 * L
    logging.getLogger(__name__).info("peaks %s of weights %s", peaks, weights)
    assert peaks["large"] - peaks["small"] < 1.2 * weights["large"] + stacked


def command_peak(directory, name, state, *more):
    """Peak memory in bytes of a conversion."""
    argv = [f"--config={directory / name}.json", f"--state={directory / state}", f"--out={directory / name}", *more]
    process = subprocess.Popen([sys.executable, "convert_torch.py", *argv], cwd=helpers.ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024

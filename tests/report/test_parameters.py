"""The table of parameters."""

import sys

import helpers
import jax
import jax.numpy as jnp

from rq_jax.devices import sharding
from rq_jax.report.parameters import parameter_table


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[0] == "|"]


def test_arrays_are_listed_with_their_shardings_and_total():
    mesh = helpers.make_mesh(fsdp=4)
    variables = {
        "params": {"up_MF": jnp.zeros((16, 3)), "b": jnp.zeros((2,), jnp.bfloat16)},
        "codebook": {"codebook_KE": (jnp.zeros((5, 2)), jnp.zeros((7, 2)))},
    }
    placed = jax.device_put(variables, sharding.state_shardings(mesh, variables))
    table = parameter_table(placed)
    header, *rows = rows_of(table)
    assert header == ["Name", "Shape", "Dtype", "Size", "Sharding"]
    assert [row[:4] for row in rows] == [
        ["codebook/codebook_KE/0", "(5, 2)", "float32", "10"],
        ["codebook/codebook_KE/1", "(7, 2)", "float32", "14"],
        ["params/b", "(2,)", "bfloat16", "2"],
        ["params/up_MF", "(16, 3)", "float32", "48"],
    ]
    assert rows[3][4] == "('fsdp', None)" and "fsdp" not in rows[0][4]
    assert table.splitlines()[-1] == "Total: 74 -- 292 bytes"


def test_shapes_will_do_and_tensorflow_stays_away():
    assert "params/w" in parameter_table({"params": {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}})
    assert "tensorflow" not in sys.modules

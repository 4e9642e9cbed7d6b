"""The counter of compiled programs counts what compiles, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from compilation import count_compilations


def test_each_new_program_is_counted_once_by_name():
    @jax.jit
    def double(x):
        return 2 * x

    three, five = np.zeros(3, np.float32), np.zeros(5, np.float32)
    with count_compilations() as compiled:
        double(three)
        double(three)
        assert compiled.count == 1
        double(five)
    assert compiled.count == 2 and all("double" in name for name in compiled.names)


def test_a_program_that_was_traced_again_is_counted_again():
    step = jax.jit(lambda x: x - 1)
    x = np.zeros(4, np.float32)
    step(x)
    with count_compilations() as compiled:
        step(x)
    assert compiled.names == []
    step.clear_cache()
    with count_compilations() as compiled:
        step(x)
    assert compiled.count == 1


def test_nothing_is_counted_outside():
    with count_compilations() as compiled:
        pass
    jax.jit(lambda x: jnp.sin(x) + 3)(np.zeros(6, np.float32))
    assert compiled.count == 0

"""The ladder's own rungs can fail."""

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_is_not_awaited_is_a_race(waits):
    def kernel(x_ref, y_ref, kept_ref, done_ref):
        copy = pltpu.make_async_copy(x_ref, kept_ref, done_ref)
        copy.start()
        if waits:
            copy.wait()
        y_ref[...] = kept_ref[...]
        if not waits:
            copy.wait()

    x = jnp.ones((8, 128), jnp.float32)
    interpreter = ladder.tpu_interpreter(detect_races=True)
    run = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
        interpret=interpreter,
    )
    try:
        y = jax.block_until_ready(run(x))
        found = ladder.races_found(interpreter)
    except jax.errors.JaxRuntimeError as error:  # what newer interpreters do
        pltpu.reset_tpu_interpret_mode_state()
        y, found = None, "RACE DETECTED" in str(error)
    assert found != waits
    assert not waits or np.array_equal(y, x)

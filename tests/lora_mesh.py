"""`python -m tests.lora_mesh`: on eight devices LoRA drops the same inputs as on one, each for its own part alone."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import mesh, sharded
from jaxmllm.nn.lora import _drop

CASES = [
    (dict(data=2, fsdp=2, tensor=2), ("batch", None, "heads", None)),
    (dict(fsdp=2, tensor=2, context=2), ("batch", "length", None, "heads")),
    (dict(tensor=8), (None, None, None, "mlp")),
]


def main() -> None:
    x, rate, key = jnp.ones((8, 16, 4, 32)), jnp.float32(0.25), jax.random.key(0)
    expected = np.asarray(jax.jit(_drop)(x, rate, key))
    assert (expected == 0).any()
    for sizes, names in CASES:
        with jax.set_mesh(mesh.Mesh(**sizes).build()):
            compiled = jax.jit(_drop).lower(sharded.shard(x, *names), rate, key).compile()
            np.testing.assert_array_equal(compiled(sharded.shard(x, *names), rate, key), expected)
            text = compiled.as_text()
            assert "[8,16,4,32]" not in text  # each device makes its own part
            assert "all-" not in text and "collective" not in text


if __name__ == "__main__":
    main()

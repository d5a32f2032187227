"""A workdir -> a model that answers questions about pictures."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import mesh as meshes
from jaxmllm.batch import empty_batch
from jaxmllm.config import ConfigError, Run, from_json
from jaxmllm.data.samples import BadSample, make_sample
from jaxmllm.data.sources import Record
from jaxmllm.data.tokenizer import load_tokenizer
from jaxmllm.eval.generate import left_pad, make_generate
from jaxmllm.train.checkpoint import StageCheckpoints, abstract_on
from jaxmllm.train.loop import initial_params
from jaxmllm.train.state import unflatten

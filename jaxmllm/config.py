"""The vocabulary of a recipe: frozen dataclasses that a config file fills in; recipes.py reads and stores them.

A recipe is a Python file with a function `config() -> Run`; every other function of the file is a variant
(`configs/toy.py:name`). The parts of the model are Flax modules, which are dataclasses too, so the config *is* the
model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from jaxmllm.errors import ConfigError, check_local, suggest
from jaxmllm.mesh import Mesh

OPEN = {"open": True}  # metadata of a dict field to which overrides may add keys


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: LLaVA JSON(L), a folder of ArrayRecord shards, or TFDS_FOLDER:SPLIT."""

    path: str
    _: dataclasses.KW_ONLY
    image_root: str | None = None  # default: the folder of `path`
    weight: float = 1.0  # share in the mixture

    def __post_init__(self):
        check_local("source", self.path)
        check_local("image_root", self.image_root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """How records become rows. A stage may replace any of these fields (Stage.data)."""

    tokenizer: str  # Hugging Face tokenizer folder
    template: Any  # data.templates.ChatTemplate
    seq_len: int  # S, tokens of a row
    image_slots: int  # I, images of a row
    targets: Any = None  # data.targets: where the objectives' targets come from
    shards: int | None = None  # virtual shards; None: the largest power of two up to 256 that divides a stage's rows
    packing: bool = True
    max_bad: int = 1000  # stop when more samples than this are unusable
    tiling: Any = None  # data.tiling.Tiling: pictures are also shown in tiles
    fast_jpeg: bool = False  # decode large JPEGs at a fraction of their size: faster, but pixels differ slightly

    def __post_init__(self):
        check_local("tokenizer", self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters are trained whose path matches the regex. The first matching rule counts; each path needs one."""

    pattern: str
    _: dataclasses.KW_ONLY
    lr: float | None = 1.0  # factor of the learning rate; None: frozen
    decay: bool | None = None  # whether weight decay applies; None: to all but norm scales and biases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """Where the weights of each part come from, before the first stage. A part that is not named starts at random.

    A source is a Hugging Face folder, hf:org/name@revision, run:WORKDIR[/stage[/step]], or "random". A part that no
    stage trains must have a source: random weights are frozen only if "random" is written for it.
    """

    llm: str | None = None
    encoders: dict[str, str] = dataclasses.field(default_factory=dict, metadata=OPEN)
    fusers: dict[str, str] = dataclasses.field(default_factory=dict, metadata=OPEN)
    aggregator: str | None = None
    objectives: dict[str, str] = dataclasses.field(default_factory=dict, metadata=OPEN)
    rest: str | None = None  # all parts that are not named

    def __post_init__(self):
        for part, source in self.sources().items():
            check_local(f"init.{part}", source)

    def sources(self) -> dict[str, str]:
        """Part -> source, e.g. {"llm": .., "encoders.clip": ..}, for the parts that are named; also "rest"."""
        found = {name: getattr(self, name) for name in ("llm", "aggregator", "rest")}
        for group in ("encoders", "fusers", "objectives"):
            found |= {f"{group}.{name}": source for name, source in getattr(self, group).items()}
        return {part: source for part, source in found.items() if source is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage; it starts from the parameters of the previous stage."""

    name: str
    sources: tuple[Source, ...]
    rows: int  # B, rows of the global batch
    steps: int | None = None  # either steps or epochs
    epochs: float | None = None  # one epoch: as many trained samples as the sources have records together
    rules: tuple[Rule, ...]
    losses: dict[str, float]  # objective, or auxiliary loss of the blocks -> weight; others are not computed
    optim: Any  # train.optimizers: AdamW, ..
    accumulate: int = 1  # micro-batches per step
    data: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=OPEN)  # fields of Run.data that differ

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"stage {self.name}: give either steps or epochs")
        if self.rows % self.accumulate:
            raise ConfigError(f"stages.{self.name}: rows {self.rows} do not divide by accumulate {self.accumulate}")
        known = [field.name for field in dataclasses.fields(Data)]
        for name in self.data:
            if name not in known:
                raise ConfigError(f"stages.{self.name}.data has no {name!r}{suggest(name, known)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A whole experiment."""

    name: str
    model: nn.Module  # mllm.MLLM
    data: Data
    stages: tuple[Stage, ...]
    init: Init = Init()
    mesh: Mesh = Mesh()
    compute_dtype: str = "bfloat16"  # masters are float32
    seed: int = 0
    log_every: int = 20  # steps
    save_every: int = 500  # steps
    keep: int = 2  # checkpoints per stage

    def __post_init__(self):
        for stage in self.stages:
            for name in stage.losses:
                if name not in self.model.loss_names:
                    known = suggest(name, self.model.loss_names)
                    raise ConfigError(f"stages.{stage.name}.losses: the model has no objective {name!r}{known}")
            for name, value in stage.data.items():
                usual = getattr(self.data, name)
                if isinstance(usual, (int, str)) and value is not None and type(usual) is not type(value):
                    kind = f"expected {type(usual).__name__}, as in {usual!r}, not {value!r}"
                    raise ConfigError(f"stages.{stage.name}.data.{name}: {kind}")
        for part in self.init.sources():
            if part not in (*self.parts(), "rest"):
                raise ConfigError(f"init.{part}: the model has no such part{suggest(part, self.parts())}")

    def parts(self) -> list[str]:
        """The parts of the model that can have a source of weights, e.g. "llm", "encoders.clip"."""
        groups = ("encoders", "fusers", "objectives")
        named = [f"{group}.{name}" for group in groups for name in getattr(self.model, group)]
        return ["llm", *named, *(["aggregator"] if self.model.aggregator else [])]

    def data_of(self, stage: Stage) -> Data:
        """How records become rows in a stage."""
        return dataclasses.replace(self.data, **stage.data)
